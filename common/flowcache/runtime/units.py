"""Write quantities for people."""

PREFIXES = ("", "k", "M", "G", "T", "P", "E")
ROUNDED_TO_NEXT = 999.5
"""From here three digits show 1000 of a unit, which is 1 of the next."""


def scaled(value: float, unit: str) -> str:
    """Write a count with a decimal prefix: `scaled(1.13e17, "FLOP")` is `113 PFLOP`."""
    power = 0
    while abs(value) >= ROUNDED_TO_NEXT and power < len(PREFIXES) - 1:
        value /= 1000
        power += 1
    return f"{value:.3g} {PREFIXES[power]}{unit}"
