"""One run, for every model: request, settings, checked job, description, video and its JSON."""

import argparse
import logging
import os
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache.attention import Kernel, check_available, choose_kernels, describe_choice
from flowcache.bounds import MAX_NAME_BYTES, MAX_PATH_BYTES, path_fault
from flowcache.errors import UserError
from flowcache.policies import threshold_of
from flowcache.quantization import read_width
from flowcache.runtime.checks import Decoded, DegenerateCheck, Modules, NotFiniteError, all_finite
from flowcache.runtime.cli import ProgressBar, choose_device
from flowcache.runtime.compile import should_compile
from flowcache.runtime.config import find_preset, load_config, parse_limit, to_dict
from flowcache.runtime.embeddings import cached_embedding, check_cache
from flowcache.runtime.ending import check_stopped, undisturbed
from flowcache.runtime.files import check_free, fresh_path, made_folder, write_json
from flowcache.runtime.memory import MemoryPlan, make_memory_plan
from flowcache.runtime.model import Job, Loaded, Progress, Request, Source, VideoModel
from flowcache.runtime.offload import stream_blocks
from flowcache.runtime.ops import release_cache, set_float32_precision, usable_bytes
from flowcache.runtime.overlap import Worker, should_overlap
from flowcache.runtime.parallel import Ranks, ReportedElsewhereError, process_layout
from flowcache.runtime.plan import per_process
from flowcache.runtime.profile import check_tuned_for, load_with_profile, profile_line
from flowcache.runtime.quantize import check_package, quantize
from flowcache.runtime.record import (
    REPLAY,
    Record,
    build_record,
    check_replay,
    read_record,
    replay_policies,
)
from flowcache.runtime.stats import RunStats, Traced, environment, merged
from flowcache.runtime.video import VideoWriter, check_ffmpeg, to_uint8
from flowcache.tokens import check_one_process, unused_settings

logger = logging.getLogger(__name__)

RECORD_SUFFIX = ".record.json"
SPARE_BYTES = 32
"""Of a name, for what unfinished and further files add: `.NAME.record.json.1234567.part`."""


# The command line ---------------------------------------------------------------------------------


def request_of(options: argparse.Namespace, keys: Mapping[str, str]) -> Request:
    """Return what the arguments of a model's command line ask for."""
    given = {key: getattr(options, argument, None) for argument, key in keys.items()}
    named = [f"{key}={value}" for key, value in given.items() if value is not None]
    if options.no_compile:
        named.append("compile=false")
    return Request(
        preset=options.preset,
        model=options.model,
        overrides=[*named, *options.settings],
        out=options.out,
        overwrite=options.overwrite,
        record=options.record,
        replay=options.replay,
        is_dry=options.dry_run,
        download=getattr(options, "download", False),
    )


def execute(model: VideoModel, request: Request, ranks: Ranks) -> None:
    """Check, describe what will be done, and do it unless the run is dry."""
    job = planned(model, request, ranks, lambda: prepare(model, request, ranks))
    if job is not None:
        run(job)


def planned(
    model: VideoModel, request: Request, ranks: Ranks, ready: Callable[[], Job]
) -> Job | None:
    """Check and describe what will be done; return it unless the run is dry."""
    plan = job = None
    if request.is_dry:
        plan = ranks.together(lambda: plan_without_files(model, request, ranks))
    if plan is None:
        job = ranks.together(ready)
        plan = describe(job)
    if ranks.is_first:
        print(plan, flush=True)
    return None if request.is_dry else job


# Settings -----------------------------------------------------------------------------------------


def read_settings(model: VideoModel, request: Request, source: Source | None = None) -> Any:
    """Return all settings of a run, checked against the model."""
    if source is None:
        source = model.find(request.model, is_dry=True)
    path = find_preset(model.presets, request.preset)
    base = model.presets / "base.yaml"
    layers = config_layers(base, path, checkpoint=source.folder, model=source.layers)
    config = load_with_profile(
        partial(load_config, model.schema, layers),
        request.overrides,
        folder=source.folder,
        setting_of=model.setting,
    )
    return model.check(config, source)


def list_settings(model: VideoModel, request: Request) -> None:
    """Print every setting, with its value under the request's model and preset."""
    try:
        config = read_settings(model, request)
    except UserError:  # that there is no prompt, or another mistake, which is reported then
        overrides = ["prompt=...", *request.overrides]
        config = read_settings(model, replace(request, overrides=overrides))
    print("\n".join(config.lines()), flush=True)


def config_layers(
    base: Path, preset: Path, *, checkpoint: Path | None, model: Sequence[Path] = ()
) -> list[Path]:
    """Return the YAML files of a run, lowest first.

    A checkpoint may bring its own values, in `presets/base.yaml` and `presets/PRESET.yaml`.
    """
    layers = [base, *model]
    for layer in dict.fromkeys([base, preset]):
        if layer != base:
            layers.append(layer)
        own = None if checkpoint is None else checkpoint / "presets" / layer.name
        if own is not None and own.is_file():
            layers.append(own)
    return layers


# From a request to a job --------------------------------------------------------------------------


def prepare(
    model: VideoModel, request: Request, ranks: Ranks | None = None, *, writes: bool = True
) -> Job:
    """Check everything that can be checked before anything large is loaded.

    Args:
        ranks: the processes that make the video; None: this one.
        writes: whether the video goes to a file.
    """
    ranks = Ranks() if ranks is None else ranks
    source = model.find(request.model, download=request.download)
    config = read_settings(model, request, source)  # a mistake is reported before a download
    device = choose_device(config.device, local_rank=ranks.place.shared_rank)
    dtype = model.dtype(config, device)
    check_available(config.attention_kernel, device, dtype=dtype)
    if config.compile:
        should_compile(config.compile, device)
    if config.embedding_cache is not None:
        check_cache(config.embedding_cache)
    media = model.media(config, source)
    config, found = model.fetch(config, source)
    if found.folder != source.folder:
        config = read_settings(model, request, found)  # it may bring presets of its own
    model.check_device(config, found, device, dtype)
    job = job_of(model, request, config, found, media, device=device, dtype=dtype, ranks=ranks)
    if writes:
        path = claim_output(request, stem=f"{job.preset}-{job.value('seed')}")
        folder = path.parent
        if request.is_dry:  # which makes nothing
            folder = next(each for each in (folder, *folder.parents) if each.exists())
        with made_folder(folder):
            check_ffmpeg()
            return _with_memory(replace(job, path=path))
    return _with_memory(job)


def _with_memory(job: Job) -> Job:
    """Check the files of a run, and plan its memory."""
    config, device = job.config, job.device
    job.model.check_files(config, job.source)
    if config.reuse.needs_profile:
        check_tuned_for(config.reuse, partial(job.model.fingerprint, job.source))
    limit = parse_limit(config.memory_limit)
    if config.memory_limit.lower() == "auto" and device.type == "cuda":
        limit = usable_bytes(device)
    if config.memory_limit == "none" or not (limit or job.request.is_dry):
        return job
    return replace(job, memory=plan_memory(job, limit=limit, has_host=device.type != "cpu"))


def job_of(
    model: VideoModel,
    request: Request,
    config: Any,
    source: Source,
    media: Any,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Job:
    """Derive what the run does, and how the processes divide it."""
    check_package("quantize", config.quantize)
    check_package("text_quantize", config.text_quantize)
    work = model.work(config, source, media, dtype)
    if (config.blocks_on_device or 0) > len(work.block_bytes):
        raise UserError(
            f"blocks_on_device is {config.blocks_on_device}, but the transformer has "
            f"{len(work.block_bytes)} blocks: lower it, or leave it out to keep all on the GPU"
        )
    check_one_process(config.reuse.tokens, num_processes=ranks.place.size)
    unused = unused_settings(config.reuse.tokens, type(config.reuse)().tokens)
    if unused is not None and ranks.is_first:
        logger.warning("%s", unused)
    layout = process_layout(
        config.parallel,
        ranks.place.size,
        num_branches=len(work.passes),
        num_heads=work.attention.kv_heads,
        num_tokens=work.divided_tokens,
    )
    replay = None
    if request.replay is not None:
        replay = read_record(Path(request.replay))
        check_replay(
            replay,
            chooses_tokens=config.reuse.tokens.is_on,
            ticks={number: segment.ticks for number, segment in enumerate(work.segments)},
            branches=work.branches,
            is_whole_window=work.is_whole,
        )
    return Job(
        model=model,
        request=request,
        preset=find_preset(model.presets, request.preset).stem,
        config=config,
        source=source,
        media=media,
        before=model.before(media),
        device=device,
        dtype=dtype,
        work=work if layout.size == 1 else per_process(work, layout),
        replay=replay,
        ranks=replace(ranks, layout=layout),
    )


def plan_memory(job: Job, *, limit: int | None, has_host: bool = True) -> MemoryPlan:
    """Find what must be kept on the host so that the run fits.

    Args:
        limit: bytes of the device that may be used; None: not known.
        has_host: whether the device is not the host itself.
    """
    wanted = has_host if job.config.overlap is None else job.config.overlap
    footprint = job.model.footprint(job, overlaps=wanted and job.ranks.layout.size == 1)
    return make_memory_plan(
        footprint,
        wanted=job.model.residence(job.config),
        limit_bytes=limit,
        has_host=has_host,
    )


def plan_without_files(
    model: VideoModel, request: Request, ranks: Ranks | None = None
) -> str | None:
    """Return the plan of a dry run that has no files to look at; None: it has."""
    source = model.find(request.model, is_dry=True, download=request.download)
    config = read_settings(model, request, source)
    missing = model.missing(config, source)
    if missing is None and not source.plans_by_sizes:
        return None
    plan = _plan_of(model, request, config, source, ranks)
    return plan if missing is None else f"{plan}\ndownload     {missing.describe()}"


def plan_by_sizes(model: VideoModel, request: Request, ranks: Ranks | None = None) -> str:
    """Describe what a run of a released model would do on a CUDA device, by its sizes alone."""
    source = model.find(request.model, is_dry=True, download=request.download)
    return _plan_of(model, request, read_settings(model, request, source), source, ranks)


def _plan_of(
    model: VideoModel, request: Request, config: Any, source: Source, ranks: Ranks | None
) -> str:
    device = torch.device("cuda")
    job = job_of(
        model,
        request,
        config,
        source,
        model.media(config, source),
        device=device,
        dtype=model.dtype(config, device),
        ranks=Ranks() if ranks is None else ranks,
    )
    logger.info("planning the memory: some seconds")
    return describe(replace(job, memory=plan_memory(job, limit=parse_limit(config.memory_limit))))


def describe(job: Job) -> str:
    """Describe what the run will do."""
    lines, layout = [*job.model.title(job)], job.ranks.layout
    if job.config.reuse.needs_profile:
        lines.append(profile_line(job.config.reuse))
    if job.replay is not None:
        video, policy = job.replay["video"], job.replay["policy"]
        lines.append(f"replay       the decisions of {video} ({policy})")
    if layout.size > 1:
        lines.append(
            f"processes    {layout.size}: {layout.branch} branch groups x {layout.sequence} "
            "sequence ranks; weights and KV cache below are those of each"
        )
    lines += job.model.lines(job.config, job.work)
    lines += [] if job.memory is None else job.memory.lines()
    return "\n".join(lines if job.path is None else [*lines, f"output       {job.path}"])


def claim_output(request: Request, *, stem: str) -> Path:
    """Return where the video goes: never over a file that is to be kept.

    Args:
        stem: name in a folder, if the request has none; a number is added if it is taken.
    """
    out, stem = request.out, request.stem or stem
    for text in (out or "", stem, str(request.folder)):
        # with room for the names of what is written next to the video
        fault = path_fault(text)
        if fault is None and len(os.path.abspath(text).encode()) > MAX_PATH_BYTES - SPARE_BYTES:
            fault = f"is a path of over {MAX_PATH_BYTES - SPARE_BYTES} bytes from the root"
        if fault is None and len(Path(text).name.encode()) > MAX_NAME_BYTES - SPARE_BYTES:
            fault = f"has a file name of over {MAX_NAME_BYTES - SPARE_BYTES} bytes: shorten it"
        if fault is not None:
            raise UserError(f"out {fault}")
    if out is not None and not out.strip():
        raise UserError("--out is empty: give an .mp4 file or a folder, or leave it out")
    path = request.folder if out is None else Path(out)
    # a name as results/4.5B is a folder's: no file type starts with a digit
    if out is None or not re.match(r"\.[A-Za-z]", path.suffix) or path.is_dir():
        path = fresh_path(path, stem, ".mp4")
    elif path.suffix.lower() != ".mp4":
        raise UserError(f"{path}: the video is written as .mp4, not {path.suffix}: change the name")
    for suffix in (path.suffix, ".json", *([RECORD_SUFFIX] if request.record else [])):
        check_free(path.with_suffix(suffix), overwrite=request.overwrite)
    return path


# From a job to a video ----------------------------------------------------------------------------


def run(job: Job) -> dict[str, Any]:
    """Make the video, write it and its JSON, and return what the JSON holds.

    With several processes the first one writes; the others return nothing.
    """
    if job.ranks.place.size > 1:
        job = replace(job, ranks=job.ranks.divided(job.device))
    stats = RunStats(job.device, records=job.request.record)
    inputs = encode_inputs(job, stats=stats)
    release_cache(job.device)
    loaded = load_networks(job, stats=stats)
    release_cache(job.device)
    if job.ranks.place.size > 1:
        job.ranks.wait()
    return render(job, loaded, inputs, stats=stats)


def encode_inputs(job: Job, *, stats: RunStats, encoder: Any = None) -> Any:
    """Encode the prompts and given pictures; what is loaded for it is gone when this returns."""

    def encode() -> Tensor:
        return job.model.encode_text(job, encoder or load_text(job)).cpu()

    def known_or_encoded() -> Tensor:
        facts = {**job.model.text_facts(job), "device": job.text_device.type}
        if job.config.text_quantize is not None:
            facts["quantize"] = job.config.text_quantize
        return cached_embedding(job.config.embedding_cache, facts, encode)

    make = encode if job.config.embedding_cache is None else known_or_encoded
    with stats.stage("text"):
        return job.model.inputs(job, job.ranks.from_first(make))


def load_networks(job: Job, *, stats: RunStats) -> Loaded:
    """Load the transformer, choose its attention, compile its blocks, load the VAE."""
    set_float32_precision(job.dtype)
    with stats.stage("load", is_on_host=True):
        dit = job.model.load_dit(job)
        bring_to_device(job, dit)
        logger.info("%s", describe_choice(*choose_attention(dit, job)))
        if should_compile(job.config.compile, job.device):
            # here, where processes may differ by minutes; in the first tick they may not
            job.model.compile(job, dit)
        return Loaded(dit, job.model.load_vae(job))


def load_text(job: Job) -> Any:
    """Load the text encoder, in 8 bits where asked."""
    encoder, mode = job.model.load_text(job), job.config.text_quantize
    if mode is not None:
        quantize(encoder.model, encoder.model.encoder.block, mode, device=job.text_device)
    return encoder


def bring_to_device(job: Job, dit: Any) -> None:
    """Bring a loaded transformer to its device, in 8 bits where asked, but for what streams."""
    num_resident, blocks = job.residence.blocks_on_device, job.model.blocks(dit)
    mode, parts = job.config.quantize, job.model.quantised(dit)
    if mode is not None:
        quantize(dit, parts, mode, device=job.device, rest=job.dit_device)
    if num_resident is not None and dit.stream is None:
        dit.stream = stream_blocks(dit, blocks, job.device, num_resident=num_resident)


def choose_attention(dit: Any, job: Job) -> tuple[Kernel, Kernel]:
    """Take the fastest attention kernels for a run, the second of attention to the prompt."""
    shape = job.work.attention
    width = read_width(job.config.kv, head_width=shape.head_width)
    dit.kernel, dit.cross_kernel = choose_kernels(
        job.device,
        dtype=job.dtype,
        shape=replace(shape, head_width=width),
        num_text=job.work.text_tokens,
        wanted=job.config.attention_kernel,
    )
    return dit.kernel, dit.cross_kernel


@dataclass(frozen=True)
class Kept:
    """What stays loaded from one job to the next."""

    identity: Hashable
    """What it depends on; neither prompt nor seed is part of it."""
    networks: Loaded
    encoder: Any
    """The text encoder; None: it is loaded for every prompt, as with `offload`."""


class KeptNetworks:
    """Networks and text encoder of one model, loaded anew when a job needs others."""

    def __init__(self) -> None:
        """Start with nothing loaded."""
        self._kept: Kept | None = None

    def load(self, job: Job) -> Kept:
        """Return what the job needs, loaded now unless the last job needed the same."""
        model, config, offload = job.model, job.config, job.config.offload
        # what is free, without an explicit limit, depends on what is kept
        asked = job.residence if parse_limit(config.memory_limit) else model.residence(config)
        amounts = (asked.blocks_on_device, asked.vae_strips)
        # several processes compile for the tokens that each of them has
        layout = job.ranks.layout
        choices = (offload, config.attention_kernel, config.compile, amounts, layout)
        identity = (model.name, job.device, job.dtype, choices, model.identity(job))
        if self._kept is None or self._kept.identity != identity:
            self._kept = None  # frees the memory first
            networks = load_networks(job, stats=RunStats(job.device))
            keeps_text = job.ranks.is_first and not offload
            self._kept = Kept(identity, networks, load_text(job) if keeps_text else None)
        return self._kept


def render(job: Job, loaded: Loaded, inputs: Any, *, stats: RunStats) -> dict[str, Any]:
    """Denoise and write with networks that are loaded already."""
    shown = job.model.generate(
        loaded.dit,
        loaded.vae,
        job.placed,
        inputs,
        stats=stats,
        work=job.work,
        policies=None if job.replay is None else partial(replay_policies, job.replay),
        ranks=job.ranks,
    )
    if not job.ranks.is_first:
        return follow(shown, stats=stats, ranks=job.ranks)
    return write_run(job, loaded, shown, stats=stats)


def follow(shown: Iterable[Progress], *, stats: RunStats, ranks: Ranks) -> dict[str, Any]:
    """Carry out a pipeline in a process that writes nothing; return nothing."""
    for progress in shown:
        check_stopped()
        try:
            finished(progress)
        except NotFiniteError as error:
            raise ReportedElsewhereError(str(error)) from None
    traced_by_all(stats, ranks)
    return {}


def write_run(
    job: Job, loaded: Loaded, shown: Iterable[Progress], *, stats: RunStats
) -> dict[str, Any]:
    """Carry out a pipeline, write its frames as they come, and the JSON; return what that holds."""
    overlaps = should_overlap(job.placed.overlap, job.device, takes_turns=job.ranks.place.size > 1)
    assert job.path is not None, "a run has a place for its video"
    bar = ProgressBar(num_ticks=job.work.num_ticks, num_chunks=job.work.num_chunks)
    check = DegenerateCheck()
    writer = VideoWriter(
        job.path,
        fps=job.value("fps"),
        size=(job.value("height"), job.value("width")),
        overwrite=job.request.overwrite,
        publishes=False,
        keeps_partial=job.keeps_partial,
    )
    first: list[float] = []

    def write(progress: Progress, later: Future[Decoded]) -> None:
        later.result()  # waiting for the decoder is not writing
        with stats.stage("write", is_concurrent=overlaps):
            frames = finished(progress, modules=loaded.modules)
            check.see(frames.numpy())
            writer.append(frames)
        first.append(stats.elapsed_seconds())

    try:
        with writer, Worker("write", device=stats.device, is_concurrent=overlaps) as written:
            if job.before is not None:
                writer.append(job.before)
            for progress in shown:
                check_stopped()
                bar.update(stats, num_finished=len(progress.tick.finishing))
                if progress.later is not None:
                    written.submit(partial(write, progress, progress.later))
            traced = traced_by_all(stats, job.ranks)
    finally:
        bar.close()
    report = report_of(job, loaded, stats, num_frames=writer.num_frames, video=writer.path.name)
    report |= {"alarms": check.alarms(), "first_frames_seconds": first[0] if first else None}
    publish(writer, report, None if traced is None else record_of(job, report, stats, traced))
    logger.info("%s", stats.summary())
    for alarm in check.alarms():
        logger.warning("ALARM         %s", alarm)
    if job.keeps_partial:
        logger.info(
            "wrote         %s: %d frames of %dx%d at %d fps, and %s",
            writer.path,
            writer.num_frames,
            job.value("width"),
            job.value("height"),
            job.value("fps"),
            writer.path.with_suffix(".json").name,
        )
    return report


def publish(writer: VideoWriter, report: Mapping[str, Any], record: Record | None) -> None:
    """Write the JSON and the record of a complete video, and give the video its name."""
    with undisturbed():  # the video goes last: one that has its name has its JSON, too
        write_json(writer.path.with_suffix(".json"), report)
        if record is not None:
            write_json(writer.path.with_suffix(RECORD_SUFFIX), record)
        writer.publish()


def report_of(
    job: Job, loaded: Loaded, stats: RunStats, *, num_frames: int, video: str
) -> dict[str, Any]:
    """Return what the JSON of a video holds."""
    dit = loaded.dit
    compilation = dit.parts.compilation
    return {
        "video": video,
        "num_frames": num_frames,
        "alarms": [],
        "first_frames_seconds": None,
        "preset": job.preset,
        "model": job.source.name,
        "attention_kernel": dit.kernel.name,
        "attention_probe": dict(dit.kernel.probed),
        "cross_attention_kernel": dit.cross_kernel.name,
        "cross_attention_probe": dict(dit.cross_kernel.probed),
        "compilation": None if compilation is None else compilation.to_dict(),
        "config": to_dict(job.config),
        "memory": None if job.memory is None else job.memory.to_dict(),
        "processes": asdict(job.ranks.layout),
        "replay": None if job.replay is None else job.replay["video"],
        "environment": environment(stats.device),
        "stats": stats.to_dict(),
    }


def record_of(job: Job, report: dict[str, Any], stats: RunStats, traced: Traced) -> Record:
    """Return what the record of a video holds."""
    rule, num_before = job.config.reuse, 0 if job.before is None else len(job.before)
    return build_record(
        stats,
        traced,
        video=report["video"],
        model=job.source.name,
        preset=job.preset,
        policy=rule.policy if job.replay is None else REPLAY,
        threshold=threshold_of(rule) if job.replay is None else None,
        num_steps=job.value("num_steps"),
        config=report["config"],
        environment=report["environment"],
        chunk_frames={
            number: [[num_before + frame for frame in ends] for ends in segment.frames]
            for number, segment in enumerate(job.work.segments)
        },
    )


def traced_by_all(stats: RunStats, ranks: Ranks) -> Traced | None:
    """Exchange what the processes of a run traced; None: nothing was. All must ask for it."""
    ranks.confirm()
    if stats.trace is None:
        return None
    # the sequence ranks of a group make the same passes together: the first one's are enough
    return merged(ranks.world.all_gather(stats.traced())[:: ranks.layout.sequence])


# Frames -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """One video that was made, and what it cost."""

    frames: Tensor
    """uint8 `[T, H, W, 3]`."""
    stats: RunStats


def collect(shown: Iterable[Progress], stats: RunStats) -> Clip:
    """Carry out a pipeline and keep its frames in memory."""
    parts: list[Tensor] = []
    for progress in shown:
        check_stopped()
        if progress.later is not None:
            parts.append(finished(progress))
    return Clip(torch.cat(parts), stats)


def finished(progress: Progress, *, modules: Modules | None = None) -> Tensor:
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
    """Bring frames to the host, uint8 `[T, H, W, 3]`, and look whether they are numbers."""
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
