"""Warnings that hold for a whole process are said once, not with every video."""

import contextlib
import logging
from collections.abc import Generator, Iterable


class FirstOnly(logging.Filter):
    """Lets a warning through the first time, and everything that is no warning."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is new, or no warning."""
        message = record.getMessage()
        is_new = record.levelno != logging.WARNING or message not in self.said
        self.said.add(message)
        return is_new


@contextlib.contextmanager
def warned_once(names: Iterable[str]) -> Generator[None, None, None]:
    """Drop what loggers of these names warn of again while the body runs."""
    first_only = FirstOnly()
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addFilter(first_only)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(first_only)
