"""Errors that are one line for the user: what is wrong, and what can be done about it."""

import errno
import re
from collections.abc import Generator
from contextlib import contextmanager

REMEDY = (
    "make the video smaller (height and width, num_frames, frames of a chunk), compress the KV "
    "cache (kv.compress), end other programs, or on a GPU set --memory-limit or offload=true"
)

_ALLOCATION = re.compile(
    r"can't allocate memory|not enough memory|out of memory|cannot allocate memory"
    r"|unable to allocate|bad_alloc|bad allocation|ALLOC_FAILED",
    re.IGNORECASE,
)
"""How PyTorch, NumPy, CUDA's libraries and C++ say that there is no memory."""
_ASKED = re.compile(r"(?:allocate|mmap)\s+(\d+(?:\.\d+)?\s*(?:bytes|[KMGTPE]i?B)\b)", re.IGNORECASE)
"""What was asked for, in such a message: `allocate 2.00 GiB`, `allocate 4096 bytes`."""


class UserError(ValueError):
    """A wrong value given by the user: shown as one line, exit code 2, no traceback.

    The message says what is wrong, the rule, the value found, and what to do.
    """


class NoMemoryError(UserError):
    """The memory of the device or of the host is used up."""


@contextmanager
def memory_named(stage: str) -> Generator[None, None, None]:
    """Turn errors that say that memory is used up into one that names the stage of the run."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if (refusal := no_memory(error, stage=stage)) is None:
            raise
        raise refusal from error


def no_memory(error: BaseException, *, stage: str | None = None) -> NoMemoryError | None:
    """Return what the user needs to know if an error says that memory is used up, else None."""
    if isinstance(error, NoMemoryError):
        return error
    text = one_line(error)
    is_system = isinstance(error, OSError) and error.errno == errno.ENOMEM
    is_torch = isinstance(error, RuntimeError) and _ALLOCATION.search(text) is not None
    if not (isinstance(error, MemoryError) or is_system or is_torch):
        return None
    asked = _ASKED.search(text)
    where = "" if stage is None else f" in stage {stage}"
    size = ""
    if asked is not None:
        number, _, unit = asked[1].partition(" ")
        amount = f"{int(number) / 1e9:.3g} GB" if unit == "bytes" else asked[1]
        size = f", which asked for {amount}"
    kind = "the GPU's memory" if "CUDA" in text or "CUBLAS" in text else "memory"
    return NoMemoryError(f"{kind} is used up{where}{size}: {REMEDY}")


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says; of one that says nothing, its name.

    A line that ends in a colon announces the reason: the next one belongs to it.
    """
    text = str(error).strip() or type(error).__name__
    first, *rest = [line.strip() for line in text.splitlines() if line.strip()]
    return f"{first} {rest[0]}" if first.endswith(":") and rest else first


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line."""
    return " ".join(str(error).split())
