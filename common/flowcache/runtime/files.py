"""Results on the disk: fresh names, folders that can be written, files written in one step."""

import contextlib
import errno
import json
import os
import re
import struct
import tempfile
import time
import tokenize
import zipfile
import zlib
from collections.abc import Generator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

from flowcache.errors import UserError

MAX_FRESH_NAMES = 100_000
MAX_JSON_DEPTH = 100
"""Nested lists and objects of a JSON file; none that is read here has more than 10."""
_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")
ARRAY_ERRORS = (
    *(OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    RuntimeError,  # a file that says it is encrypted, or packed in an unknown way
    MemoryError,  # a header that announces more than there is
    *(zipfile.BadZipFile, zlib.error, struct.error),
    *(SyntaxError, tokenize.TokenError),  # of a header, which is a Python literal
)
"""What NumPy raises for damaged `.npy` and `.npz` files."""
STEM_CHARACTERS, STEM_BYTES = 100, 180
"""Of the prompt in a file name: upstream's limit, and what file systems allow, less the rest."""
STALE_SECONDS = 24 * 3600
"""After so long without a write an unfinished file may be removed."""


def prompt_stem(prompt: str) -> str:
    """Name a file after the start of a prompt, in what a file name may hold."""
    shown = "".join(c for c in prompt[:STEM_CHARACTERS] if c.isprintable() and c != "/").strip()
    return shown.encode()[:STEM_BYTES].decode(errors="ignore").lstrip(".")


def fresh_path(folder: Path, stem: str, suffix: str) -> Path:
    """Return a path that does not exist: `stem.mp4`, else `stem-001.mp4`, `stem-002.mp4`, ..."""
    first = folder / f"{stem}{suffix}"
    if not first.exists():
        return first
    for number in range(1, MAX_FRESH_NAMES):
        path = folder / f"{stem}-{number:03d}{suffix}"
        if not path.exists():
            return path
    raise UserError(f"{folder} holds {MAX_FRESH_NAMES} files named {stem}: empty it")


def check_free(
    path: Path, *, overwrite: bool, advice: str = "choose another name, or give --overwrite"
) -> None:
    """Check that a file is not there yet, or may be replaced."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: {advice}")


def check_writable(folder: Path) -> None:
    """Make a folder if necessary and try to write a file there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write in folder {folder}: {reason}") from None


@contextlib.contextmanager
def made_folder(folder: Path) -> Generator[None, None, None]:
    """Make a folder that can be written, if need be; a refusal that leaves it empty removes it."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        check_writable(folder)
        yield
    except UserError:
        with contextlib.suppress(OSError):  # something was written
            for each in new:
                each.rmdir()
        raise


def remove_stale_parts(folder: Path, *, before: str, after: str) -> None:
    """Remove unfinished files `BEFORE PID AFTER` that killed processes left a day ago or earlier.

    A file stays while its process runs on this machine, and for a day after the last write in any
    case: on a shared disk it may be another machine's, and what it holds can be rescued.
    """
    pattern = re.compile(rf"{re.escape(before)}(\d+){re.escape(after)}")
    with contextlib.suppress(OSError):  # another process may do the same
        for path in folder.iterdir():
            found = pattern.fullmatch(path.name)
            if found is None or is_running(int(found[1])):
                continue
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()


def is_running(pid: int) -> bool:
    """Tell whether a process runs on this machine; one that can't be asked counts as running."""
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def check_file(path: Path) -> None:
    """Check that there is a file with something in it."""
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a file")
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")


def read_regular(path: Path) -> str:
    """Read a UTF-8 text without its byte order mark; never from a device or a pipe: endless."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path.read_text(encoding="utf-8-sig")


def read_json(path: Path, *, advice: str = "") -> Any:
    """Read a JSON file; a byte order mark is skipped."""
    end = f"; {advice}" if advice else ""
    try:
        text = read_regular(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a readable JSON file (not UTF-8 text){end}") from None
    except (OSError, ValueError) as error:  # ValueError: no path at all
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read ({reason}){end}") from None
    return parse_json(text, source=str(path), advice=advice)


def parse_json(text: str, *, source: str, advice: str = "") -> Any:
    """Parse JSON, but none so deep that what reads it runs out of stack; `source` is its file."""
    end = f"; {advice}" if advice else ""
    brackets = _NO_BRACKETS.sub("", _JSON_STRING.sub("", text))
    depths = accumulate((1 if bracket in "[{" else -1 for bracket in brackets), initial=0)
    if max(depths) > MAX_JSON_DEPTH:
        reason = f"more than {MAX_JSON_DEPTH} nested brackets"
        raise UserError(f"{source}: not a readable JSON file ({reason}){end}")
    try:
        content = json.loads(text)
        if _SURROGATE.search(text):  # alone, it can be written nowhere
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except ValueError as error:
        raise UserError(f"{source}: not a readable JSON file ({error}){end}") from None


def read_json_lines(path: Path, *, advice: str, repairs: bool = False) -> list[Any]:
    """Read a file of JSON lines, if there is one; a last line that was cut short is left out.

    Args:
        advice: what to do about a damaged line before it.
        repairs: whether such a last line is removed from the file, so that others may follow.
    """
    rows, num_bytes = list[Any](), 0
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line if line.endswith(b"\n") else b""))
        except (ValueError, RecursionError):
            if number < len(lines):
                raise UserError(f"{path}: line {number} is damaged: {advice}") from None
            if repairs:
                os.truncate(path, num_bytes)
        num_bytes += len(line)
    return rows


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON in one step: a reader sees the old file or the whole new one."""
    write_text(path, _json(content, indent="") + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text in one step, as `write_json`."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())  # else a power cut may leave an empty file of that name
        os.replace(part, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with contextlib.suppress(OSError):  # it is there after an error or a signal only
            part.unlink()


def _json(value: Any, *, indent: str) -> str:
    """Write a list of plain values on one line, so that a table stays one; else one item a line."""
    inner = indent + "  "
    if isinstance(value, Mapping) and value:
        items = cast("Mapping[str, Any]", value).items()
        lines = [
            f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_json(item, indent=inner)}"
            for key, item in items
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)):
        elements = cast("list[Any]", value)
        if any(isinstance(item, (list, tuple, Mapping)) for item in elements):
            lines = [f"{inner}{_json(item, indent=inner)}" for item in elements]
            return "[\n" + ",\n".join(lines) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)
