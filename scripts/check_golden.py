"""Run every reference case below a folder against this project's code.

    python scripts/check_golden.py DIR

Prints one row per comparison: case, what, largest absolute error, tolerance, and `pass`, `fail`,
or `known` with the reason (a defect of the reference implementation that ours does not have). Files
that are no cases are named in the end. The exit code is 1 if a check failed or a file is of an
unknown kind, 2 if the argument is wrong, else 0.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from flowcache.runtime.ending import start_quietly

start_quietly(__name__)

import torch
from golden import magi1, self_forcing, skyreels_v2
from golden.case import Check, Kind, read_case

from flowcache.runtime.cli import run_command

KINDS: tuple[Kind, ...] = (*skyreels_v2.KINDS, *magi1.KINDS, *self_forcing.KINDS)
ENDINGS = (".safetensors", ".json")


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    codes: list[int] = []
    return run_command(lambda: codes.append(check_folder(arguments))) or codes[0]


def check_folder(arguments: Sequence[str] | None) -> int:
    """Check a folder; return the exit code."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dir", type=Path, metavar="DIR", help="folder with case files, searched")
    folder: Path = parser.parse_args(arguments).dir
    if not folder.is_dir():
        parser.error(f"{folder} is no folder; give one that holds case files")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in files if path.suffix in ENDINGS]
    if not paths:
        parser.error(f"{folder} holds no case files (*.safetensors, *.json)")
    others = [str(path.relative_to(folder)) for path in files if path.suffix not in ENDINGS]
    width = max(len(str(path.relative_to(folder).with_suffix(""))) for path in paths)
    total = Counter[str]()
    for path in paths:
        name = str(path.relative_to(folder).with_suffix(""))
        for check in check_file(path, folder=folder):
            total[check.status] += 1
            print(row(name, check, width=width), flush=True)
    if others:
        print(f"no case files, not compared: {', '.join(others)}")
    counts = ", ".join(f"{total[status]} {status}" for status in ("pass", "known", "fail"))
    print(f"{len(paths)} files, {total.total()} checks: {counts}")
    return 1 if total["fail"] else 0


@torch.no_grad()
def check_file(path: Path, *, folder: Path) -> Iterator[Check]:
    """Compare one file with our code, to the last tensor."""
    try:
        case = read_case(path, folder=folder)
        kinds = [kind for kind in KINDS if kind.recognises(case)]
        if len(kinds) != 1:
            found = " or ".join(kind.name for kind in kinds) or "none that is known"
            yield failure("kind of case", f"it must be one, found: {found}")
            return
        num_compared = 0
        for check in kinds[0].run(case):
            num_compared += 1
            yield check
        if not num_compared:
            yield failure("whole file", "nothing was compared")
        if case.unread:
            yield failure("whole file", f"not compared: {', '.join(sorted(case.unread)[:5])}")
    # whatever our code does with a strange file, the other files are checked all the same
    except Exception as error:  # noqa: BLE001
        yield failure("run", f"{type(error).__name__}: {error}".splitlines()[0])


def failure(what: str, reason: str) -> Check:
    """Return a check that failed before anything could be compared."""
    return Check(what, float("nan"), 0.0, "fail", reason)


def row(name: str, check: Check, *, width: int) -> str:
    """Format one line of the table."""
    columns = f"{name:{width}}  {check.what:38}  {check.error:8.1e}  {check.tolerance:8.1e}"
    return f"{columns}  {check.status:5}  {check.reason}".rstrip()


if __name__ == "__main__":
    torch.set_num_threads(1)  # the cases are tiny; threads wait for each other on a busy machine
    sys.exit(main())
