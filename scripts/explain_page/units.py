"""Write shares and times for people."""


def percent(share: float, *, digits: int = 1) -> str:
    """Write a share of 1: `percent(0.125)` is `12.5 %`."""
    return f"{100 * share:.{digits}f} %"


def seconds_text(seconds: float) -> str:
    """Write a time: `0.0123` as `12.3 ms`, `0.75` as `0.75 s`, `75` as `75.0 s`."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
