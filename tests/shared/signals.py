"""Programs that a test starts obey signals, whatever the test itself was started by."""

import signal

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""By which a user, a terminal or a scheduler asks a program to end."""


def heed_signals() -> None:
    """Undo what a shell ignores in the background, and nohup; for `preexec_fn`."""
    for number in ASKED:
        signal.signal(number, signal.SIG_DFL)
