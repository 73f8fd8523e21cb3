"""From a checked request to the mp4 and its JSON: what every model's run shares."""

import logging
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.bounds import MAX_NAME_BYTES, MAX_PATH_BYTES, path_fault
from flowcache.runtime.checks import Decoded, DegenerateCheck, Modules, NotFiniteError, all_finite
from flowcache.runtime.cli import ProgressBar, choose_output
from flowcache.runtime.compile import Compilation
from flowcache.runtime.ending import check_stopped, undisturbed
from flowcache.runtime.files import check_writable, write_json
from flowcache.runtime.overlap import Worker
from flowcache.runtime.parallel import Ranks, ReportedElsewhereError
from flowcache.runtime.record import REPLAY, Record, build_record, read_record, write_record
from flowcache.runtime.stats import RunStats, Traced, environment, merged
from flowcache.runtime.video import VideoWriter, to_uint8
from flowcache.schedule import Tick

logger = logging.getLogger(__name__)

RECORD_SUFFIX = ".record.json"
SPARE_BYTES = 32
"""Of a name, for what unfinished and further files add: `.NAME.record.json.1234567.part`."""
VIDEO_QUALITY = 8


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    preset: str = "base"
    model: str = "auto"
    """A checkpoint, by its place or by a name that the model's command line explains."""
    overrides: Sequence[str] = ()
    out: str | None = None
    """An `.mp4` file, or a folder in which a fresh name is found; None: `folder`."""
    overwrite: bool = False
    folder: Path = Path("result")
    stem: str | None = None
    """Name of the video in a folder, without number and `.mp4`; None: preset and seed."""
    record: bool = False
    """Whether `NAME.record.json` is written, too: what each pass cost, what the caches held."""
    replay: str | None = None
    """The record of a run whose decisions are made again."""
    is_dry: bool = False
    """Whether the plan alone is wanted."""


@dataclass(frozen=True)
class Target:
    """The video that is to be written."""

    path: Path
    overwrite: bool
    fps: int
    size: tuple[int, int]
    """Height and width in pixels."""
    keeps_partial: bool = True
    """Whether the frames of an unfinished video are kept."""


@dataclass(frozen=True)
class Facts:
    """What the JSON files say of a run beside frames, environment and statistics."""

    preset: str
    model: str
    attention_kernel: str
    attention_probe: Mapping[str, float]
    """Seconds of the kernels that were tried; empty without a probe."""
    cross_attention_kernel: str
    cross_attention_probe: Mapping[str, float]
    """The same of the attention to the prompt."""
    compilation: Compilation | None
    """How compiling the blocks went; None: it was not asked for."""
    config: Mapping[str, Any]
    policy: str
    threshold: float | None
    """Of an adaptive policy; None: the policy has none."""
    replay: Record | None
    """What was replayed instead of the policy's decisions."""
    num_steps: int
    """Denoising steps of a chunk."""
    memory: Mapping[str, Any] | None
    """What was planned to be in memory, see `MemoryPlan.to_dict`; None: no limit was known."""
    chunk_frames: Mapping[int, list[list[int]]]
    """Segment -> for each chunk the frames `[first, stop)` of the video that show it."""


class Shown(Protocol):
    """What a pipeline yields after each tick."""

    @property
    def tick(self) -> Tick:
        """The pass that was just made."""
        ...

    @property
    def later(self) -> Future[Decoded] | None:
        """New frames, which may be under way, or None."""
        ...


@dataclass(frozen=True)
class Clip:
    """One video that was made, and what it cost."""

    frames: Tensor
    """uint8 `[T, H, W, 3]`."""
    stats: RunStats


def claim_output(request: Request, *, stem: str) -> Path:
    """Return where the video goes, after a look at what is there.

    Args:
        stem: name in a folder, if the request has none.

    Raises:
        UserError: the video or its JSON exists and is to be kept, or the folder is not writable.
    """
    for given in (request.out, request.stem or stem, str(request.folder)):
        check_path(given or "", name="out")
    path = choose_output(
        request.out,
        folder=request.folder,
        stem=request.stem or stem,
        overwrite=request.overwrite,
    )
    for suffix in (".json", RECORD_SUFFIX) if request.record else (".json",):
        beside = path.with_suffix(suffix)
        if beside.exists() and not request.overwrite:
            raise UserError(
                f"{beside} exists and is kept: choose another name, or give --overwrite"
            )
    check_writable(path.parent)
    return path


def check_path(text: str, *, name: str) -> None:
    """Check that a text can be the path of a video, with room for what is written next to it.

    Raises:
        UserError: it can't.
    """
    fault = path_fault(text)
    if fault is None and len(os.path.abspath(text).encode()) > MAX_PATH_BYTES - SPARE_BYTES:
        fault = f"is a path of over {MAX_PATH_BYTES - SPARE_BYTES} bytes from the root"
    if fault is None and len(Path(text).name.encode()) > MAX_NAME_BYTES - SPARE_BYTES:
        fault = f"has a file name of over {MAX_NAME_BYTES - SPARE_BYTES} bytes: shorten it"
    if fault is not None:
        raise UserError(f"{name} {fault}")


def recorded_run(request: Request) -> Record | None:
    """Return the record that a request replays, or None.

    Raises:
        UserError: the file can't be read or is no record.
    """
    return None if request.replay is None else read_record(Path(request.replay))


def replay_lines(replay: Record | None) -> list[str]:
    """Say what is replayed, in a line of a run's description; [] if nothing is."""
    if replay is None:
        return []
    return [f"replay       the decisions of {replay['video']} ({replay['policy']})"]


def config_layers(
    base: Path, preset: Path, *, checkpoint: Path | None, model: Sequence[Path] = ()
) -> list[Path]:
    """Return the YAML files of a run, lowest first.

    A checkpoint may bring its own values, in `presets/base.yaml` and `presets/PRESET.yaml`.

    Args:
        base: the settings under all presets; may be the preset itself.
        checkpoint: its folder; None: it isn't there yet.
        model: files of the model itself, right above `base`.
    """
    layers = [base, *model]
    for layer in dict.fromkeys([base, preset]):
        if layer != base:
            layers.append(layer)
        own = None if checkpoint is None else checkpoint / "presets" / layer.name
        if own is not None and own.is_file():
            layers.append(own)
    return layers


def traced_by_all(stats: RunStats, ranks: Ranks) -> Traced | None:
    """Exchange what the processes of a run traced; None: nothing was. All must ask for it.

    Raises:
        LostProcessError: one of them ended or hangs.
    """
    ranks.confirm()
    if stats.trace is None:
        return None
    # the sequence ranks of a group make the same passes together: the first one tells of them
    return merged(ranks.world.all_gather(stats.traced())[:: ranks.layout.sequence])


def follow(shown: Iterable[Shown], *, stats: RunStats, ranks: Ranks) -> dict[str, Any]:
    """Carry out a pipeline in a process that writes nothing; return nothing.

    Raises:
        ReportedElsewhereError: a result is not finite, which the first process finds, too.
    """
    for progress in shown:
        check_stopped()
        try:
            _finished(progress)
        except NotFiniteError as error:
            raise ReportedElsewhereError(str(error)) from None
    traced_by_all(stats, ranks)
    return {}


def write_run(
    shown: Iterable[Shown],
    target: Target,
    *,
    stats: RunStats,
    ranks: Ranks,
    num_ticks: int,
    num_chunks: int,
    facts: Facts,
    modules: Modules,
    before: Tensor | None = None,
    overlaps: bool = False,
) -> dict[str, Any]:
    """Carry out a pipeline, write its frames as they come, and the JSON; return what that holds.

    Args:
        shown: the pipeline.
        num_ticks: ticks that it will make.
        num_chunks: chunks that it will make.
        stats: with a trace, a record is written, too.
        ranks: the processes that make the video; the others `follow`.
        modules: what makes the frames; looked at only if these are no numbers.
        before: frames that the video begins with, uint8 `[T, H, W, 3]`.
        overlaps: whether frames are written in a thread of their own, beside the pipeline.

    Raises:
        NotFiniteError: a result is not finite; the finished frames stay as a partial video.
    """
    bar = ProgressBar(num_ticks=num_ticks, num_chunks=num_chunks)
    check = DegenerateCheck()
    writer = VideoWriter(
        target.path,
        fps=target.fps,
        size=target.size,
        quality=VIDEO_QUALITY,
        overwrite=target.overwrite,
        publishes=False,
        keeps_partial=target.keeps_partial,
    )
    first: list[float] = []

    def write(progress: Shown, later: Future[Decoded]) -> None:
        later.result()  # waiting for the decoder is not writing
        with stats.stage("write", is_concurrent=overlaps):
            frames = _finished(progress, modules=modules)
            check.see(frames.numpy())
            writer.append(frames)
        first.append(stats.elapsed_seconds())

    try:
        with writer, Worker("write", device=stats.device, is_concurrent=overlaps) as written:
            if before is not None:
                writer.append(before)
            for progress in shown:
                check_stopped()
                bar.update(stats, num_finished=len(progress.tick.finishing))
                if progress.later is not None:
                    written.submit(partial(write, progress, progress.later))
            traced = traced_by_all(stats, ranks)
    finally:
        bar.close()
    surroundings = environment(stats.device)
    report = {
        "video": writer.path.name,
        "num_frames": writer.num_frames,
        "alarms": check.alarms(),
        "first_frames_seconds": first[0] if first else None,
        "preset": facts.preset,
        "model": facts.model,
        "attention_kernel": facts.attention_kernel,
        "attention_probe": facts.attention_probe,
        "cross_attention_kernel": facts.cross_attention_kernel,
        "cross_attention_probe": facts.cross_attention_probe,
        "compilation": None if facts.compilation is None else facts.compilation.to_dict(),
        "config": facts.config,
        "memory": facts.memory,
        "processes": asdict(ranks.layout),
        "replay": None if facts.replay is None else facts.replay["video"],
        "environment": surroundings,
        "stats": stats.to_dict(),
    }
    record = None
    if traced is not None:
        record = build_record(
            stats,
            traced,
            video=writer.path.name,
            model=facts.model,
            preset=facts.preset,
            policy=facts.policy if facts.replay is None else REPLAY,
            threshold=facts.threshold if facts.replay is None else None,
            num_steps=facts.num_steps,
            config=facts.config,
            environment=surroundings,
            chunk_frames=facts.chunk_frames,
        )
    with undisturbed():  # the video goes last: one that has its name has its JSON, too
        write_json(writer.path.with_suffix(".json"), report)
        if record is not None:
            write_record(writer.path.with_suffix(RECORD_SUFFIX), record)
        writer.publish()
    logger.info("%s", stats.summary())
    for alarm in check.alarms():
        logger.warning("ALARM         %s", alarm)
    logger.info(
        "wrote         %s: %d frames of %dx%d at %d fps, and %s",
        writer.path,
        writer.num_frames,
        target.size[1],
        target.size[0],
        target.fps,
        writer.path.with_suffix(".json").name,
    )
    return report


def collect(shown: Iterable[Shown], stats: RunStats) -> Clip:
    """Carry out a pipeline and keep its frames in memory.

    Raises:
        NotFiniteError: a result is not finite.
    """
    parts: list[Tensor] = []
    for progress in shown:
        check_stopped()
        if progress.later is not None:
            parts.append(_finished(progress))
    return Clip(torch.cat(parts), stats)


def _finished(progress: Shown, *, modules: Modules | None = None) -> Tensor:
    """Return the new frames of a tick on the host, uint8 `[T, H, W, 3]`, T = 0 without any."""
    if progress.later is None:
        return torch.empty(0, 1, 1, 3, dtype=torch.uint8)
    tick = progress.tick
    try:
        return finished_frames(progress.later.result(), chunks=tick.finishing, tick=tick.index)
    except NotFiniteError as error:
        if modules is None:
            raise
        raise error.caused_by(modules) from None


def finished_frames(decoded: Decoded, *, chunks: Collection[int], tick: int) -> Tensor:
    """Bring frames to the host, uint8 `[T, H, W, 3]`, and look whether they are numbers.

    Args:
        chunks: those that became clean.
        tick: the one in which they did.

    Raises:
        NotFiniteError: a latent or a pixel is not finite.
    """
    checks = torch.stack([decoded.is_latent_finite, all_finite(decoded.frames)])
    frames = to_uint8(decoded.frames).cpu()
    is_latent_finite, is_pixel_finite = checks.tolist()  # the device is done: nothing waits
    if is_latent_finite and is_pixel_finite:
        return frames
    where = "decoded frames" if is_latent_finite else "latents"
    raise NotFiniteError(f"the {where} of {_named(chunks)} (clean after tick {tick})")


def _named(chunks: Collection[int]) -> str:
    first, last = min(chunks), max(chunks)
    return f"chunk {first}" if first == last else f"chunks {first} to {last}"
