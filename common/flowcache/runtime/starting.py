"""What the programs do before they import anything large."""

import signal


def start_quietly(name: str) -> None:
    """Let Ctrl-C end a program without a traceback while it imports; see `runtime.ending` later.

    Args:
        name: `__name__` of the caller: nothing happens unless it is the program itself.
    """
    # where SIGINT is ignored, as in the background of a shell, it stays so
    if name == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
