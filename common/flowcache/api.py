"""Make videos from Python: load a model once, then give it prompts.

    import flowcache

    pipe = flowcache.load("demo", preset="flowcache_fast")
    video = pipe("a red circle moving right on a black background", seed=7)
    video.save("circle.mp4")

Settings are those of the presets, under one flat vocabulary for all models: `num_frames`, `height`,
`width`, `num_steps`, `seed`, `fps`, `guidance`, `prompt`, `image`, `video`. A section is a mapping,
as in `reuse={"threshold": 0.2}`.
"""

from __future__ import annotations

import base64
import operator
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.checks import DegenerateCheck
from flowcache.runtime.cli import ProgressBar
from flowcache.runtime.config import check_prompt, from_python, overrides_of
from flowcache.runtime.files import check_free, check_writable, made_folder
from flowcache.runtime.metrics import open_clip, psnr, ssim
from flowcache.runtime.model import (
    MODELS,
    Job,
    Loaded,
    Progress,
    Request,
    VideoModel,
    architecture_of,
    load_model,
)
from flowcache.runtime.parallel import Layout, Ranks, ReportedElsewhereError
from flowcache.runtime.profile import Profile, write_profile
from flowcache.runtime.record import Record
from flowcache.runtime.run import (
    KeptNetworks,
    claim_output,
    describe,
    encode_inputs,
    finished,
    prepare,
    publish,
    read_settings,
    record_of,
    report_of,
    traced_by_all,
)
from flowcache.runtime.stats import Pass, RunStats, Traced
from flowcache.runtime.video import LiveWriter, VideoWriter
from flowcache.tuning.plan import Constraints, Forecast, choose, parse_target
from flowcache.tuning.runs import Runs, numbered
from flowcache.tuning.study import Rows, check_possible, investigate, make_profile

Frames: TypeAlias = NDArray[np.uint8]
"""`[T, H, W, 3]`."""
Picture: TypeAlias = "str | Path | Image.Image | NDArray[np.uint8] | Tensor"
"""A file, or pixels: uint8 `[H, W, 3]`, for a video `[T, H, W, 3]`."""
PICTURES = ("image", "end_image", "video")
_GREY = Image.new("RGB", (64, 64), "grey")
"""A start picture while a model that needs one is loaded."""


@dataclass(frozen=True)
class Tick:
    """What one pass over the active chunks did."""

    index: int
    """From 0, over all windows of a long video."""
    num_ticks: int
    decisions: Sequence[Pass]
    """Of every active chunk in every guidance branch: computed or reused, and the distance."""
    clean: tuple[int, ...]
    """Chunks that became clean."""
    elapsed_seconds: float
    """Since the start of the run, as the host's clock says."""


@dataclass(frozen=True)
class Part:
    """Frames that are finished."""

    frames: Frames
    """uint8 `[T, H, W, 3]`."""
    first: int
    """The number of its first frame in the video."""
    chunks: tuple[int, ...]
    """The chunks that they show; none: given frames that the video begins with."""


@dataclass(frozen=True)
class Plan:
    """What a video will cost; `print` shows all of it."""

    text: str
    """As `--dry-run` prints it."""
    num_frames: int
    """New ones."""
    fps: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    num_chunks: int
    num_ticks: int
    flops: int
    """If every step is computed."""
    weight_bytes: int
    """The transformer's weights."""
    kv_bytes: int
    """The KV caches of all layers and branches."""
    activation_bytes: int
    """Estimate of what one forward needs in addition."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Video:
    """A finished video; a notebook plays it."""

    frames: Frames
    """uint8 `[T, H, W, 3]`."""
    fps: int
    report: Mapping[str, Any]
    """What the JSON of a video holds: settings, versions, decisions, seconds per stage."""
    record: Record | None = field(default=None, repr=False)
    """What each pass cost and what the caches held, if the call asked for it."""

    @property
    def stats(self) -> Mapping[str, Any]:
        """Decisions, FLOPs and seconds of the run."""
        return self.report["stats"]

    @from_python()
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the mp4, its JSON, and its record if there is one; return the path of the mp4.

        Args:
            path: an `.mp4` file, or a folder in which a fresh name is found.

        Raises:
            UserError: a file exists and must not be replaced, or cannot be written.
        """
        _check_path("path", path)
        _check_flag("overwrite", overwrite)
        _, height, width, _ = self.frames.shape
        request = Request(out=str(path), overwrite=overwrite, record=self.record is not None)
        target = claim_output(request, stem=Path(self.report["video"]).stem)
        with VideoWriter(
            target,
            fps=self.fps,
            size=(height, width),
            overwrite=overwrite,
            publishes=False,
            keeps_partial=False,
        ) as writer:
            writer.append(self.frames)
        name = {"video": writer.path.name}
        record = None if self.record is None else {**self.record, **name}
        publish(writer, {**self.report, **name}, record)
        return writer.path

    def __repr__(self) -> str:
        num_frames, height, width, _ = self.frames.shape
        return f"Video({num_frames} frames of {width}x{height} at {self.fps:g} fps)"

    def _repr_html_(self) -> str:
        with tempfile.TemporaryDirectory() as folder:
            mp4 = base64.b64encode(self.save(Path(folder) / "video.mp4").read_bytes()).decode()
        return f'<video controls autoplay loop muted src="data:video/mp4;base64,{mp4}"></video>'


@dataclass(frozen=True)
class Comparison:
    """How much a video differs from a reference, and what each of them cost."""

    psnr: float
    """dB, one mean squared error over the whole clip; `inf` for equal clips."""
    ssim: float
    """Mean over the frames, 1 for equal clips."""
    time_ratio: float | None
    """Seconds of the reference / seconds of the video; None where one is a file."""
    flops_ratio: float | None
    """FLOPs of the reference / FLOPs of the video; None where one is a file."""


@from_python()
def compare(
    video: Video | Frames | str | Path, reference: Video | Frames | str | Path
) -> Comparison:
    """Compare a video with a reference of the same prompt, seed and size.

    Raises:
        UserError: the clips differ in length or size, a file cannot be read, or one is no clip.
    """
    clip, other = _clip(video), _clip(reference)
    times = flops = None
    if isinstance(video, Video) and isinstance(reference, Video):
        times = reference.stats["total_seconds"] / video.stats["total_seconds"]
        flops = reference.stats["flops"]["computed"] / video.stats["flops"]["computed"]
    return Comparison(psnr(clip, other), ssim(clip, other), times, flops)


def _clip(given: Any) -> Tensor:
    if isinstance(given, (str, Path)):
        return torch.from_numpy(np.stack(list(open_clip(Path(given)).frames)))
    frames = given.frames if isinstance(given, Video) else given
    if not isinstance(frames, np.ndarray):
        kind = type(frames).__name__
        raise UserError(f"a clip must be a Video, an array [T, H, W, 3] or a file, not {kind}")
    return torch.from_numpy(frames)


@from_python()
def load(
    model: str | Path = "auto",
    *,
    preset: str | Path = "flowcache_fast",
    architecture: str | None = None,
    progress_bar: bool = True,
    **settings: Any,
) -> Pipeline:
    """Load a model.

    Args:
        model: `demo`, `auto`, a released name, a folder or a hub id, as `--model` on the command
            line; a hub id is downloaded if it is not in the hub's cache.
        preset: its name, or a YAML file.
        architecture: package of the model, as `magi1`; None: the first one that knows the name.
        progress_bar: whether a call shows one.
        settings: of all videos; a call can change them again. `profile` is a file that `tune` has
            saved, whose steps are computed.

    Raises:
        UserError: the model, the preset or a setting is wrong.
    """
    given = {"preset": preset, "architecture": architecture, "progress_bar": progress_bar}
    pipe = unloaded(model, **given, **settings)
    pipe.load()
    return pipe


def unloaded(
    model: str | Path,
    *,
    preset: str | Path,
    architecture: str | None,
    progress_bar: bool,
    ranks: Ranks | None = None,
    **settings: Any,
) -> Pipeline:
    """Return a pipeline that has loaded nothing yet; see `load` and `Pipeline`."""
    name = str(model)
    _check_flag("progress_bar", progress_bar)
    return Pipeline(
        load_model(architecture_of(name) if architecture is None else _known(architecture)),
        Request(preset=_preset(preset), model=name),
        settings,
        progress_bar=progress_bar,
        ranks=ranks,
    )


@dataclass(frozen=True)
class Tuned:
    """Which steps to compute, for the model and the settings of one pipeline."""

    profile: Profile
    """What `save` writes."""
    forecast: Forecast
    """What is expected: `.speedup`, `.flops` (share), `.psnr` (dB), `.seconds`."""

    @from_python()
    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write a YAML file, which `profile=` takes; return its path.

        Raises:
            UserError: the file exists and must not be replaced, or cannot be written.
        """
        path = _check_path("path", path)
        _check_flag("overwrite", overwrite)
        check_free(path, overwrite=overwrite)
        check_writable(path.parent)
        write_profile(self.profile, path)
        return path


@from_python()
def tune(
    pipe: Pipeline,
    prompts: str | Sequence[str],
    *,
    target: str = "speedup=2",
    folder: str | Path | None = None,
    **settings: Any,
) -> Tuned:
    """Find which steps a pipeline should compute; some clips of each prompt are made for it.

    Args:
        prompts: like those that will be used, some 8 of them.
        target: `speedup=3`, `flops=0.35` (share), `psnr=32` (dB), each against every step computed
            with the same preset, or `seconds=60` in the transformer.
        folder: keeps what was measured, so that an interrupted call goes on; None: nothing is kept.
        settings: of the clips, as in a call of the pipeline.

    Raises:
        UserError: the target, a prompt or a setting is wrong, or no plan meets the target.
    """
    if not isinstance(pipe, Pipeline):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"pipe must be what flowcache.load returns, not {pipe!r:.80}")
    wanted, constraints = parse_target(str(target)), Constraints()
    if folder is not None:
        folder = _check_path("folder", folder)
    if not isinstance(prompts, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UserError(f"prompts must be a text or a list of texts, not {prompts!r:.80}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise UserError("prompts is empty: give some texts to calibrate on")
    for text in texts:
        _check_text("prompts", text)
    model, request = pipe.model, pipe.request
    with ExitStack() as stack:
        given = {**pipe.settings, **settings}
        given.pop("profile", None)  # of an earlier call
        files = pipe._as_files(given, request)  # pyright: ignore[reportPrivateUsage]
        named, shown = stack.enter_context(files)
        work = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        overrides = list(overrides_of(named, keys=model.keys))
        runs = Runs(model, request.model, request.preset, overrides, folder=work)
        check_possible(wanted, runs.size(), constraints)
        identity = {
            "model": model.name,
            "checkpoint": request.model,
            "preset": request.preset,
            "settings": list(overrides_of({**named, **shown}, keys=model.keys)),
            "prompts": texts,
        }
        with made_folder(work):
            rows = Rows(work, identity=identity)
            stack.enter_context(pipe._held())  # pyright: ignore[reportPrivateUsage]
            runs.load(pipe.networks)
        clips = numbered(texts, len(texts))
        found = investigate(runs, rows, clips, constraints)
        forecast = choose(wanted, found.forecasts())
        name = f"{model.name} {request.model}"
        plan = found.plans[forecast.cost]
        return Tuned(make_profile(runs, clips, found, plan, model=name), forecast)


def _known(architecture: str) -> str:
    if architecture not in MODELS:
        raise UserError(f"architecture {architecture!r} is unknown: use {' or '.join(MODELS)}")
    return architecture


class Pipeline:
    """A loaded model with a preset. One video is made at a time: other threads wait."""

    def __init__(
        self,
        model: VideoModel,
        request: Request,
        settings: Mapping[str, Any],
        *,
        progress_bar: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """Keep what the calls share; see `load`.

        Args:
            ranks: the processes that make each video; None: this one. The first one is called, the
                others `follow`. Those that have not met yet can `plan`.
        """
        self.model = model
        self.request = request
        self.settings = dict(settings)
        self.progress_bar = progress_bar
        self.ranks = Ranks() if ranks is None else ranks
        self._divided: dict[tuple[Layout, torch.device], Ranks] = {}
        self.networks = KeptNetworks()
        self._lock = threading.Lock()
        self._holder: int | None = None

    @from_python()
    def __call__(
        self,
        prompt: str | None = None,
        *,
        preset: str | None = None,
        record: bool = False,
        on_tick: Callable[[Tick], None] | None = None,
        on_part: Callable[[Part], None] | None = None,
        **settings: Any,
    ) -> Video:
        """Make a video.

        Args:
            prompt: what it shows; None: as the preset says.
            preset: its name, or a YAML file; None: that of the pipeline.
            record: whether the result has a `record`.
            on_tick: called after every pass over the active chunks; raising ends the run.
            on_part: called with frames as they become clean.
            settings: `num_frames`, `seed`, `image`, `profile`, ...; pictures as files or as pixels.

        Raises:
            UserError: a setting is wrong; nothing large was loaded or computed.
        """
        _check_callable("on_part", on_part)
        run = self._run(prompt, settings, preset=preset, record=record, on_tick=on_tick)
        frames: list[Frames] = []
        with closing(run.parts()) as parts:
            for part in parts:
                frames.append(part.frames)
                if on_part is not None:
                    on_part(part)
        return run.video(np.concatenate(frames))

    @from_python()
    def stream(
        self,
        prompt: str | None = None,
        *,
        preset: str | None = None,
        on_tick: Callable[[Tick], None] | None = None,
        **settings: Any,
    ) -> Generator[Part]:
        """Make a video; return its parts as they become clean. Closing the generator ends the run.

        See `__call__` for the arguments, which are checked at once.
        """
        return self._run(prompt, settings, preset=preset, on_tick=on_tick).parts()

    def follow(
        self,
        prompt: str | None = None,
        *,
        preset: str | None = None,
        record: bool = False,
        **settings: Any,
    ) -> None:
        """Take part in a call of the first of several processes; what is wrong is said there."""
        with suppress(UserError, ReportedElsewhereError):
            for _ in self._run(prompt, settings, preset=preset, record=record).parts():
                pass

    @from_python()
    def plan(
        self, prompt: str | None = None, *, preset: str | None = None, **settings: Any
    ) -> Plan:
        """Return what a video would cost, and make nothing."""
        given = {**self._placeholders(), **settings}
        job = self._job("any" if prompt is None else prompt, given, preset=preset)
        work = job.work
        return Plan(
            text=describe(job),
            num_frames=job.value("num_frames"),
            fps=job.value("fps"),
            height=job.value("height"),
            width=job.value("width"),
            num_chunks=work.num_chunks,
            num_ticks=work.num_ticks,
            flops=work.flops,
            weight_bytes=work.weight_bytes,
            kv_bytes=work.kv_bytes,
            activation_bytes=work.activation_bytes,
        )

    @from_python()
    def load(self) -> None:
        """Load the networks now; a call does it if need be."""
        with self._held():
            load, given = self.networks.load, self._placeholders()
            self.ranks.together(lambda: load(self._job("any", given)))

    def _placeholders(self) -> dict[str, Image.Image]:
        """Return grey pictures in place of those that a call must give."""
        required = self.model.required(self.model.find(self.request.model))
        return {name: _GREY for name in required if name not in self.settings}

    # What a run needs --------------------------------------------------------------------------

    def _run(
        self,
        prompt: str | None,
        settings: Mapping[str, Any],
        *,
        preset: str | None,
        record: bool = False,
        on_tick: Callable[[Tick], None] | None = None,
    ) -> _Run:
        _check_callable("on_tick", on_tick)
        _check_flag("record", record)
        job = self.ranks.together(lambda: self._job(prompt, settings, preset=preset, record=record))
        key = job.ranks.layout, job.device
        if key not in self._divided:  # groups of processes are made once
            self._divided[key] = job.ranks.divided(job.device)
        return _Run(self, replace(job, ranks=self._divided[key]), on_tick)

    def _job(
        self,
        prompt: str | None,
        settings: Mapping[str, Any],
        *,
        preset: str | None = None,
        record: bool = False,
    ) -> Job:
        given = {**self.settings, **settings}
        if prompt is not None:
            given["prompt"] = _check_text("prompt", prompt)
        profile = given.pop("profile", None)
        if profile is not None:  # before settings of `reuse`, which may choose another policy
            if not isinstance(profile, (str, Path)):
                raise UserError(f"profile must be a file that tune has saved, not {profile!r:.80}")
            given = {"reuse.policy": "planned", "reuse.profile": profile, **given}
        request = self.request
        if preset is not None:
            request = replace(request, preset=_preset(preset))
        with self._as_files(given, request) as (named, shown):
            overrides = list(overrides_of(named, keys=self.model.keys))
            request = replace(request, overrides=overrides, record=record)
            return prepare(self.model, request, self.ranks, writes=False).changed(**shown)

    @contextmanager
    def _as_files(
        self, settings: Mapping[str, Any], request: Request
    ) -> Generator[tuple[dict[str, Any], dict[str, str]]]:
        """Write pixels among the settings to lossless files, which exist inside the context.

        Returns:
            the settings with files, and what reports say instead of the files' names.
        """
        named = {
            name: value
            for name, value in settings.items()
            if name not in PICTURES or value is None or isinstance(value, (str, Path))
        }
        shown: dict[str, str] = {}
        with tempfile.TemporaryDirectory() as folder:
            for name, given in settings.items():
                if name in named:
                    continue
                pixels = _pixels(name, given, num_axes=4 if name == "video" else 3)
                *num_frames, height, width, _ = pixels.shape
                shown[name] = f"pixels {width}x{height}"
                shown[name] += f", {num_frames[0]} frames" if num_frames else ""
                if name == "video":
                    path = Path(folder) / "video.mp4"
                    fps = given.fps if isinstance(given, Video) else self._fps(named, request)
                    with LiveWriter(path, fps=fps, is_lossless=True) as writer:
                        writer.append(pixels)
                else:
                    path = Path(folder) / f"{name}.png"
                    Image.fromarray(pixels).save(path)
                named[name] = path
            yield named, shown

    def _fps(self, settings: Mapping[str, Any], request: Request) -> int:
        """Return the frame rate of the run, which frames without one are taken to have."""
        overrides = list(overrides_of(settings, keys=self.model.keys))
        config = read_settings(self.model, replace(request, overrides=overrides))
        return operator.attrgetter(self.model.keys["fps"])(config)

    @contextmanager
    def _held(self) -> Generator[None]:
        """Hold the model for one run."""
        if self._holder == threading.get_ident():
            raise RuntimeError("this pipeline makes a video already: finish or close its stream")
        with self._lock:
            self._holder = threading.get_ident()
            try:
                yield
            finally:
                self._holder = None


class _Run:
    """One video in the making."""

    def __init__(self, pipe: Pipeline, job: Job, on_tick: Callable[[Tick], None] | None) -> None:
        self.pipe = pipe
        self.job = job
        self.on_tick = on_tick
        self.stats = RunStats(job.device, records=job.request.record)
        self.loaded: Loaded | None = None
        self.check = DegenerateCheck()
        self.num_frames = 0
        self.first_frames_seconds: float | None = None
        self.traced: Traced | None = None

    def parts(self) -> Generator[Part]:
        """Carry out the run; yield what is finished as soon as it is."""
        with from_python(), self.pipe._held():  # pyright: ignore[reportPrivateUsage]
            job = self.job
            kept = job.ranks.together(lambda: self.pipe.networks.load(job))
            self.loaded = kept.networks
            self.stats = RunStats(job.device, records=job.request.record)
            with job.ranks.in_step() as end_step:
                inputs = encode_inputs(job, stats=self.stats, encoder=kept.encoder)
                if job.before is not None:
                    yield self._part(job.before.numpy(), ())
                end_step()
                waiting: deque[Progress] = deque()
                for progress in self._ticks(inputs):
                    if progress.later is not None:
                        waiting.append(progress)
                    # a decoder that runs concurrently is not waited for while there is more to do
                    while waiting and waiting[0].later is not None and waiting[0].later.done():
                        yield self._finished(waiting.popleft())
                    end_step()
                while waiting:
                    yield self._finished(waiting.popleft())
                end_step()
                self.traced = traced_by_all(self.stats, job.ranks)

    def _ticks(self, inputs: Any) -> Iterator[Progress]:
        job, work = self.job, self.job.work
        assert self.loaded is not None
        with ExitStack() as stack:
            bar = None
            if self.pipe.progress_bar:
                bar = ProgressBar(num_ticks=work.num_ticks, num_chunks=work.num_chunks)
                stack.callback(bar.close)
            shown = stack.enter_context(
                closing(
                    job.model.generate(
                        self.loaded.dit,
                        self.loaded.vae,
                        job.placed,
                        inputs,
                        stats=self.stats,
                        work=work,
                        ranks=job.ranks,
                    )
                )
            )
            num_reported = 0
            for index, progress in enumerate(shown):
                clean = progress.tick.finishing
                if bar is not None:
                    bar.update(self.stats, num_finished=len(clean))
                if self.on_tick is not None:
                    made = self.stats.passes[num_reported:]
                    seconds = self.stats.elapsed_seconds()
                    self.on_tick(Tick(index, work.num_ticks, made, clean, seconds))
                num_reported = len(self.stats.passes)
                yield progress

    def _finished(self, progress: Progress) -> Part:
        assert self.loaded is not None
        frames = finished(progress, modules=self.loaded.modules).numpy()
        self.check.see(frames)
        if self.first_frames_seconds is None:
            self.first_frames_seconds = self.stats.elapsed_seconds()
        return self._part(frames, progress.tick.finishing)

    def _part(self, frames: Frames, chunks: tuple[int, ...]) -> Part:
        part = Part(frames, self.num_frames, chunks)
        self.num_frames += len(frames)
        return part

    def video(self, frames: Frames) -> Video:
        """Return the whole video with its report."""
        job, stats = self.job, self.stats
        assert self.loaded is not None
        name = f"{job.preset}-{job.value('seed')}.mp4"
        report = report_of(job, self.loaded, stats, num_frames=len(frames), video=name)
        report["alarms"] = self.check.alarms()
        report["first_frames_seconds"] = self.first_frames_seconds
        record = None
        if self.traced is not None:
            record = record_of(job, report, stats, self.traced)
        return Video(frames, job.value("fps"), report, record)


# From Python values to settings -------------------------------------------------------------------


def _preset(given: Any) -> str:
    if not isinstance(given, (str, Path)):
        raise UserError(f"preset must be a name or a YAML file, not {given!r:.80}")
    return str(given)


def _check_callable(name: str, given: Any) -> None:
    if given is not None and not callable(given):
        raise UserError(f"{name} must be a function of one argument, not {given!r:.80}")


def _check_flag(name: str, given: Any) -> None:
    if not isinstance(given, (bool, np.bool_)):
        raise UserError(f"{name} must be True or False, not {given!r:.80}")


def _check_path(name: str, given: Any) -> Path:
    if not isinstance(given, (str, Path)):
        raise UserError(f"{name} must be a path, not {given!r:.80}")
    return Path(given)


def _check_text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise UserError(f"{name} must be text, not {given!r:.80}")
    check_prompt(name, given)
    return given


def _pixels(name: str, given: Any, *, num_axes: int) -> Frames:
    if isinstance(given, Video):
        given = given.frames
    if isinstance(given, Image.Image):
        given = given.convert("RGB")
    pixels = given.detach().cpu().numpy() if isinstance(given, Tensor) else np.asarray(given)
    is_whole = pixels.ndim == num_axes and pixels.shape[-1] == 3 and pixels.size > 0
    if pixels.dtype != np.uint8 or not is_whole:
        axes = "[H, W, 3]" if num_axes == 3 else "[T, H, W, 3]"
        raise UserError(
            f"{name} must be a file or uint8 pixels {axes}, got {pixels.dtype} {list(pixels.shape)}"
        )
    return pixels
