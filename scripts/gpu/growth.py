"""Cost against the length of a video: planned for the released sizes, measured on the demos.

Every step is computed in all rows, so that only the length and the KV cache make a difference.
"""

import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from flowcache.errors import UserError
from flowcache.runtime import files
from flowcache.runtime.files import check_writable, write_json
from flowcache.runtime.model import Request, Source, VideoModel, load_model
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare, read_settings
from flowcache.runtime.stats import RunStats, environment
from gpu import magi1 as magi1_subject
from gpu import skyreels_v2 as skyreels_subject
from magi1.model import ASSUMED_TOKENS
from magi1.work import clip_work
from skyreels_v2.work import work_of as skyreels_work_of

NAME = "growth.json"
PROMPT = "a red circle moving right on a black background"
SKYREELS_PLANNED = (97, 177, 337, 657, 977, 1297, 1617, 1937)
SKYREELS_MEASURED = (97, 177, 337, 497)
MAGI1_PLANNED = (96, 192, 384, 768, 1152, 1536, 1920)
MAGI1_MEASURED = (96, 192, 288, 480)
NOTE = (
    "planned: by arithmetic, at the released sizes; measured: the transformer of the demo, seconds "
    "of processor time. Every step is computed; the demos take 10 (SkyReels-V2) and 16 (MAGI-1) "
    "steps."
)
FEWER_STEPS: Mapping[str, tuple[str, ...]] = {
    "skyreels_v2": ("num_steps=10", "ar_step=2"),
    "magi1": ("runtime_config.num_steps=16",),
}
"""For the demos: time per step and chunk depends on the length alone; windows stay as long."""
COMPRESS = ("kv.compress=importance",)


@dataclass(frozen=True)
class Line:
    """One way to make a video of any length.

    Attributes:
        settings: by number of frames.
        is_measured: on the demo, too.
    """

    name: str
    preset: str
    settings: Callable[[int], tuple[str, ...]]
    is_measured: bool = True


def shortened(line: Line, settings: Sequence[str]) -> Line:
    """Return a line with more settings."""
    return replace(line, settings=lambda num_frames: (*line.settings(num_frames), *settings))


def _one_window(num_frames: int) -> tuple[str, ...]:
    return (
        *("prompt=-", f"num_frames={num_frames}"),
        *(f"base_num_frames={num_frames}", "overlap_history=null"),
    )


SKYREELS_LINES = (
    Line("all keys and values", "vanilla_causal", _one_window),
    Line("KV compression", "vanilla_causal", lambda n: (*_one_window(n), *COMPRESS)),
    Line(
        "windows of 97 frames",
        "vanilla_causal",
        lambda n: ("prompt=-", f"num_frames={n}"),
        is_measured=False,
    ),
)


def _clip(num_frames: int) -> tuple[str, ...]:
    return ("prompt=-", f"runtime_config.num_frames={num_frames}", "reuse.policy=vanilla")


MAGI1_LINES = (
    Line("all keys and values", "flowcache_fast_nocompress", _clip),
    Line("KV compression", "flowcache_fast", _clip),
)


Make = Callable[[Line, int], dict[str, Any]]
"""Makes or plans a video of so many frames and returns what that takes."""


def plan_skyreels(line: Line, num_frames: int) -> dict[str, Any]:
    """Plan a video of the 1.3B model at 544x960."""
    request = Request(line.preset, overrides=("dtype=bfloat16", *line.settings(num_frames)))
    config = read_settings(load_model("skyreels_v2"), request, Source("paper"))
    work = skyreels_work_of(config, skyreels_subject.DIT["paper"], dtype=torch.bfloat16)
    return _planned(num_frames, work.num_chunks, flops=work.flops, kv_bytes=work.kv_bytes)


def plan_magi1(line: Line, num_frames: int) -> dict[str, Any]:
    """Plan a video of the distilled 4.5B model at 720x720."""
    settings = (*magi1_subject.SETTINGS["paper"], *line.settings(num_frames))
    request = Request(line.preset, magi1_subject.RELEASED_NAME, settings)
    config = read_settings(load_model("magi1"), request)
    work = clip_work(
        config,
        num_prefix=0,
        prompt_tokens=ASSUMED_TOKENS,
        has_special_tokens=False,
        dtype=config.model_config.dtype,
    )
    return _planned(num_frames, work.num_chunks, flops=work.flops, kv_bytes=work.kv_bytes)


def _planned(num_frames: int, num_chunks: int, *, flops: int, kv_bytes: int) -> dict[str, Any]:
    return {
        "frames": num_frames,
        "chunks": num_chunks,
        "flops_per_chunk": flops / num_chunks,
        "kv_bytes": kv_bytes,
    }


def open_skyreels() -> Make:
    """Load the demo of SkyReels-V2."""
    return _open(load_model("skyreels_v2"), SKYREELS_LINES[0], SKYREELS_MEASURED[0])


def open_magi1() -> Make:
    """Load the demo of MAGI-1."""
    return _open(load_model("magi1"), MAGI1_LINES[0], MAGI1_MEASURED[0])


def _open(model: VideoModel, line: Line, num_frames: int) -> Make:
    """Load a demo with the settings of a line."""

    def request(line: Line, num_frames: int) -> Request:
        return Request(line.preset, "demo", (*line.settings(num_frames), f"prompt={PROMPT}"))

    first = prepare(model, request(line, num_frames))
    loaded = load_networks(first, stats=RunStats(first.device))
    inputs = encode_inputs(first, stats=RunStats(first.device))

    def make(line: Line, num_frames: int) -> dict[str, Any]:
        job, stats = prepare(model, request(line, num_frames)), RunStats(first.device)
        shown = model.generate(
            loaded.dit, NoVideo(), job.config, inputs, stats=stats, work=job.work
        )
        row = make_video(num_frames, job.work.num_chunks, shown, stats)
        return row | {"kv_bytes": job.work.kv_bytes}

    return make


class NoVideo:
    """Stands in for a VAE where only the transformer is measured: its pixels are black."""

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Refuse: a video from a prompt alone has nothing to encode."""
        raise AssertionError(f"nothing is given, but {tuple(pixels_B3THW.shape)} is encoded")

    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None, /) -> Tensor:
        """Return a pixel per latent."""
        return torch.zeros(1, 3, *latents_BCFhw.shape[2:])

    def stream(self, ranks: Ranks, /) -> "NoVideo":
        """Begin a segment."""
        return self

    def to(self, device: torch.device | str, /) -> "NoVideo":
        """Stay."""
        return self


def make_video(
    num_frames: int, num_chunks: int, shown: Iterable[object], stats: RunStats
) -> dict[str, Any]:
    """Make a video and return what it took of the processor's time, whoever else wants it."""
    start = time.process_time()
    for _ in shown:
        pass
    return {
        "frames": num_frames,
        "chunks": num_chunks,
        "seconds_per_chunk": (time.process_time() - start) / num_chunks,
        "flops": stats.computed_flops,
    }


@dataclass(frozen=True)
class Model:
    """A model's part.

    Attributes:
        fewer_steps: settings of the demo.
        planned: numbers of frames.
        measured: numbers of frames that the demo makes.
        plan: plans a video at the released size.
        open: loads the demo and returns what makes a video with it.
    """

    title: str
    lines: tuple[Line, ...]
    fewer_steps: tuple[str, ...]
    planned: Sequence[int]
    measured: Sequence[int]
    plan: Make
    open: Callable[[], Make]


MODELS: Mapping[str, Model] = {
    "skyreels_v2": Model(
        "SkyReels-V2 1.3B, 544x960",
        SKYREELS_LINES,
        FEWER_STEPS["skyreels_v2"],
        SKYREELS_PLANNED,
        SKYREELS_MEASURED,
        plan_skyreels,
        open_skyreels,
    ),
    "magi1": Model(
        "MAGI-1 4.5B, 720x720",
        MAGI1_LINES,
        FEWER_STEPS["magi1"],
        MAGI1_PLANNED,
        MAGI1_MEASURED,
        plan_magi1,
        open_magi1,
    ),
}


def grow(out: Path, *, overwrite: bool, models: Mapping[str, Model] = MODELS) -> None:
    """Plan and measure all models and write `growth.json`.

    Raises:
        UserError: the file is there already, or can't be written.
    """
    path = out / NAME
    check_writable(out)
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists and is kept: give another --out, or --overwrite")
    found = {name: _rows(model) for name, model in models.items()}
    document = {
        "note": NOTE,
        "command": "python scripts/bench_gpu.py --growth",
        "environment": environment(torch.device("cpu")),
        "models": found,
    }
    write_json(path, document)
    print(f"wrote {path}")


def _rows(model: Model) -> dict[str, Any]:
    make = model.open()
    # one short video first: what is allocated once must not be on the account of the first length
    make(shortened(model.lines[0], model.fewer_steps), model.measured[0])
    measured: dict[str, list[dict[str, Any]]] = {
        line.name: [] for line in model.lines if line.is_measured
    }
    # all lines at one length before the next, so that a drifting machine slows them alike
    for num_frames in tqdm(model.measured, desc=model.title, disable=not sys.stderr.isatty()):
        for line in model.lines:
            if line.is_measured:
                measured[line.name].append(make(shortened(line, model.fewer_steps), num_frames))
    return {
        "title": model.title,
        "planned": {
            line.name: [model.plan(line, num_frames) for num_frames in model.planned]
            for line in model.lines
        },
        "measured": measured,
    }


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that these commands wrote.

    Raises:
        UserError: it can't be read, or is no JSON object.
    """
    content = files.read_json(path, advice="measure anew with --overwrite")
    if not isinstance(content, dict):
        raise UserError(f"{path}: no JSON object: measure anew with --overwrite")
    return content
