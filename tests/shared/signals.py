"""Programs that a test starts: they obey signals, whatever the test itself was started by."""

import signal

import psutil

MARK = "FLOWCACHE_TEST"
"""Variable by which every process of a command is found, whoever started it."""

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which a user, a terminal or a scheduler asks a program to end."""


def heed_signals() -> None:
    """Undo what a shell ignores in the background, and nohup; for `preexec_fn`."""
    for number in ASKED:
        signal.signal(number, signal.SIG_DFL)


def living(mark: str, *, name: str = "") -> list[psutil.Process]:
    """Return the processes of a mark whose command lines hold a name."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            is_own = process.environ().get(MARK) == mark
            if is_own and process.status() != psutil.STATUS_ZOMBIE:
                found += [process] if name in " ".join(process.cmdline()) else []
        except psutil.Error:  # it has just ended, or is another user's
            continue
    return found
