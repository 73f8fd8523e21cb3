"""The command line of every model: arguments, exit codes, device, progress.

PyTorch is imported where it is used, so that --help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flowcache.errors import UserError, no_memory, one_line
from flowcache.runtime.config import preset_names
from flowcache.runtime.ending import EXIT_USER_ERROR, Ending, Place, Stopped, starter_of
from flowcache.runtime.model import MODELS, architecture_of

if TYPE_CHECKING:
    import torch

    from flowcache.runtime.stats import RunStats

EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
"""As of a program that SIGPIPE ended."""
MAX_MESSAGE = 2000
"""Characters of an error."""
SHOWN_PATH = 300
"""Characters of a path in an error."""
LOG_INTERVAL_SECONDS = 15
"""Between two states of the progress bar where it goes to a file."""


# Arguments ----------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2, as all errors of a user.

    What begins with one minus sign and is no flag, as -1GB, is a value: the rule it breaks is said.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # argparse takes numbers alone for values
        self._negative_number_matcher = re.compile(r"-[^-]")

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and end; of several processes one says it."""
        flag = re.fullmatch(r"unrecognized arguments: --(\w+)(?:[ =](\S+).*)?", message)
        if flag is not None:
            key, value = flag[1], flag[2] or "VALUE"
            message = f"--{key} is no flag: settings are given as {key}={value}"
        rank = os.environ.get("RANK", "")
        if rank.isdecimal() and rank.strip("0"):
            self.exit()
        self.exit(EXIT_USER_ERROR, f"error: {message} (--help says what can be given)\n")


SETTINGS_NOTE = """\
Settings are changed by key=value; --list-settings shows all keys. A run prints what it will do, a
progress bar, and a summary, and writes NAME.mp4 and NAME.json (settings, versions, every decision
of the cache, seconds per stage).
"""


def run_parser(
    prog: str, *, description: str, examples: str, presets: Path, model: str, dry_run: str
) -> Parser:
    """Return the arguments that every model's command line takes."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"{examples}\n{SETTINGS_NOTE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(preset_names(presets))
    parser.add_argument("--preset", default="flowcache_fast", help=f"name or YAML file ({names})")
    parser.add_argument("--model", default="auto", help=f"{model} (default: auto)")
    parser.add_argument("--prompt", help="what the video shows")
    parser.add_argument("--image", help="start image")
    parser.add_argument("--video", help="video to extend")
    parser.add_argument("--seed", help="seed of all noise")
    parser.add_argument(
        "--out", help="an .mp4 file, or a folder in which a fresh name is found (default: result)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --out file")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write NAME.record.json, too: what each pass cost and what the KV caches held",
    )
    parser.add_argument(
        "--replay",
        metavar="RECORD",
        help="compute what a recorded run of the same settings computed, instead of deciding anew",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help=f"check everything, print the plan, make nothing; {dry_run}",
    )
    parser.add_argument(
        "--memory-limit",
        dest="memory_limit",
        metavar="24GB",
        help="what of the GPU's memory may be used (default: what is free)",
    )
    parser.add_argument(
        "--embedding-cache",
        dest="embedding_cache",
        metavar="DIR",
        help="keep encoded prompts there and read known ones (default: nothing is kept)",
    )
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="run the blocks as they are (default: compiled on CUDA)",
    )
    parser.add_argument(
        "--list-settings",
        action="store_true",
        help="print every setting with its type and its value under this preset and model",
    )
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings to change")
    return parser


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say which checkpoint a tool works on; see `settle_checkpoint`."""
    parser.add_argument(
        "--model",
        default="demo",
        help="checkpoint, as the model's own command takes it (default: demo)",
    )
    parser.add_argument(
        "--architecture",
        choices=sorted(MODELS),
        help=f"package of the model (default: by its name; demo: {next(iter(MODELS))})",
    )
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)


def settle_checkpoint(options: argparse.Namespace) -> None:
    """Put the checkpoint into `model` and its package into `architecture`.

    Commands of published results say `--model magi1 --checkpoint demo`, which is read as before.
    """
    if options.architecture is None and options.model in MODELS:
        options.architecture, options.model = options.model, options.checkpoint or "demo"
    if options.architecture is None:
        options.architecture = architecture_of(options.model)


# Errors -------------------------------------------------------------------------------------------


def run_command(command: Callable[[], None]) -> int:
    """Run a command; return its exit code.

    A mistake of the user is one line on standard error and exit code 2; a signal is one line and
    128 + its number.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2", "diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if isinstance(sys.stdout, io.TextIOWrapper):  # not where a test captures it
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without the characters
    try:
        place = Place.of(os.environ)
        with Ending(starter_of(os.environ, place), is_first=place.rank == 0):
            command()
    except UserError as error:
        sys.stderr.write(f"error: {in_one_line(str(error))}\n")
        return EXIT_USER_ERROR
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
            sys.stderr.write(f"{stopped}\n" if str(stopped) else "")
        return stopped.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return EXIT_INTERRUPTED
    except (MemoryError, RuntimeError) as error:
        refusal = no_memory(error)
        if refusal is None:
            raise
        sys.stderr.write(f"error: {refusal}\n")
        return EXIT_USER_ERROR
    except BrokenPipeError:
        # who reads has seen enough, as `| head`; nothing more can be written there at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_UNREAD
    except OSError as error:
        # what no check can foresee: a folder that went away, a disk that is full or fails
        place = "" if error.filename is None else f"{str(error.filename)[:SHOWN_PATH]}: "
        refused = no_memory(error) or f"{place}{error.strerror or one_line(error)}"
        sys.stderr.write(f"error: {in_one_line(str(refused))}\n")
        return EXIT_USER_ERROR
    return 0


def in_one_line(text: str) -> str:
    """Return a message with control characters, which could hide it, written out, and cut."""
    if len(text) > MAX_MESSAGE:
        text = f"{text[: MAX_MESSAGE - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# Choices ------------------------------------------------------------------------------------------


def choose_device(name: str, *, local_rank: int | None = None) -> torch.device:
    """Return the device of a run: `auto` is CUDA where there is one, else the CPU."""
    import torch

    from flowcache.runtime.ops import set_allocator

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name} is no device: use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name} is not supported: use auto, cpu, cuda or cuda:0")
    if device.type == "cuda":
        set_allocator()
        if local_rank is not None:
            if ":" in name:
                raise UserError(
                    f"device={name} is one device, but several processes run: use device=cuda"
                )
            device = torch.device("cuda", local_rank)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(
                f"device={device} was asked for, but PyTorch sees {count} CUDA devices here: "
                "use device=cpu, or fix the driver"
            )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the weights: `auto` is bfloat16 on CUDA and float32 on the CPU."""
    import torch

    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)


class ProgressBar:
    """A line that counts ticks and says how many chunks are clean and how many passes reused."""

    def __init__(self, *, num_ticks: int, num_chunks: int) -> None:
        self.num_chunks = num_chunks
        self.num_clean = 0
        from tqdm import tqdm  # only a run needs it

        interval = 0.1 if sys.stderr.isatty() else LOG_INTERVAL_SECONDS
        self.bar = tqdm(total=num_ticks, unit="tick", dynamic_ncols=True, mininterval=interval)

    def update(self, stats: RunStats, *, num_finished: int) -> None:
        """Count one tick and the chunks that became clean in it."""
        self.num_clean += num_finished
        passes = stats.num_computed + stats.num_reused
        share = 100 * stats.num_reused / passes if passes else 0.0
        self.bar.set_postfix_str(
            f"{self.num_clean}/{self.num_chunks} chunks clean, {share:.0f} % reused", refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        """End the line."""
        self.bar.close()
