"""Clips of one checkpoint and preset with any reuse policy, made by a model that is loaded once."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from flowcache.bounds import annotated_hints, names_of
from flowcache.demo.clips import split_attributes
from flowcache.errors import UserError
from flowcache.policies import Observe
from flowcache.predict import Quantity
from flowcache.runtime.model import Job, Loaded, Request, VideoModel, load_bench
from flowcache.runtime.profile import Setting
from flowcache.runtime.run import (
    Clip,
    KeptNetworks,
    collect,
    encode_inputs,
    load_networks,
    prepare,
    read_settings,
)
from flowcache.runtime.stats import RunStats
from flowcache.runtime.text_files import read_lines
from flowcache.tuning.gram import calibration_bytes

DEMOS = ("demo", "demo-base")
"""Checkpoints that were trained on the captions of `flowcache.demo.clips`."""
EXACT_BYTES = 256_000_000
"""Up to this much memory, velocities are held as they are; above, as sketches."""
GUIDED, CONDITIONAL = "guided", "cond"
"""Branches as the samplers name them."""
SKETCH_WIDTH = 16_384
"""Numbers of a sketch: squared errors are right to about 1 %."""
CALIBRATION_SEED, CHECK_SEED, ORDER_SEED = 7000, 8000, 0


@dataclass(frozen=True)
class Words:
    """What the settings and presets of a model call what all models have.

    Each model's package has them as `bench.WORDS`.
    """

    content: tuple[str, ...]
    """Settings that make the content of a chunk the signal of its policy."""
    published: Quantity
    """What the published method reuses."""
    whole_window: str
    """Preset of TeaCache, with the attention of the tuned one."""
    demo_frames: int
    """Pixel frames of a tuning clip on the demo: four chunks."""
    token_elements: int
    """Numbers of the latent in a token of the transformer."""
    preset: str = "flowcache_fast"
    """Preset that is tuned where none is named."""


def words_of(model: VideoModel) -> Words:
    """Return the words of a model."""
    return cast("Words", load_bench(model.name).WORDS)


@dataclass(frozen=True)
class Size:
    """The size of one clip, by arithmetic."""

    num_steps: int
    warmup_steps: int
    """First own steps that an adaptive policy of the preset always computes."""
    compute_last_step: bool
    """Whether FlowCache computes a chunk's own last step in any case."""
    num_elements: int
    """Numbers in the latent of the largest chunk."""
    num_active: int
    """Chunks that are active at once at most."""
    flops: int
    """Of a clip with every step computed."""
    num_passes: int = 1
    """Guidance passes of a step."""
    compresses_kv: bool = False
    """Whether the KV cache drops clean tokens."""
    holds_guidance: bool = False
    """Whether plans may run the conditional pass alone: its velocities are recorded, too."""
    quantities: tuple[str, ...] = ("velocity", "clean")
    """What the model can reuse."""

    @property
    def branches(self) -> tuple[str, ...]:
        """The velocities that are recorded; the guided one is what moves the latent."""
        return (GUIDED, CONDITIONAL) if self.holds_guidance else (GUIDED,)

    @property
    def sketch_width(self) -> int | None:
        """How wide sketches must be; None: velocities fit as they are."""
        return None if self._bytes(None) <= EXACT_BYTES else SKETCH_WIDTH

    @property
    def calibration_bytes(self) -> int:
        """The memory that calibrating needs in addition to the run."""
        return self._bytes(self.sketch_width)

    def _bytes(self, width: int | None) -> int:
        return calibration_bytes(
            num_elements=self.num_elements,
            num_steps=self.num_steps,
            num_branches=len(self.branches),
            num_active=self.num_active,
            width=width,
        )


class Runs:
    """Makes clips of a checkpoint with a preset; settings of a clip come after the given ones."""

    def __init__(
        self,
        model: VideoModel,
        checkpoint: str,
        preset: str,
        settings: Sequence[str],
        *,
        folder: Path,
        holds_guidance: bool = False,
    ) -> None:
        """Load nothing yet.

        Args:
            folder: where a run may write.
            holds_guidance: whether plans may run the conditional pass alone.
        """
        self.model = model
        self.words = words_of(model)
        self.checkpoint = checkpoint
        self.preset = preset
        short = [f"{model.keys['num_frames']}={self.words.demo_frames}"]
        self.settings = [*(short if checkpoint in DEMOS else []), *settings]
        self.folder = folder
        self.holds_guidance = holds_guidance
        self._run: tuple[Job, Loaded] | None = None
        self._encoder: Any = None
        self._inputs: dict[str, Any] = {}

    def size(self) -> Size:
        """Return the size of one clip; no weights are needed."""
        model = self.model
        source = model.find(self.checkpoint, is_dry=True)
        if source.folder is None and not source.plans_by_sizes:
            _, source = model.fetch(None, source)
        config = read_settings(model, self._request([]), source)
        dtype = model.dtype(config, torch.device("cuda"))
        work = model.work(config, source, model.media(config, source), dtype)
        segment = work.segments[0]
        tokens = max(segment.tokens[chunk] for chunk in segment.generated)
        return Size(
            num_steps=model.setting(config).num_steps,
            warmup_steps=config.reuse.warmup_steps,
            compute_last_step=config.reuse.compute_last_step,
            num_elements=tokens * self.words.token_elements,
            num_active=max(len(tick.steps) for tick in segment.ticks),
            flops=work.flops,
            num_passes=len(work.passes),
            compresses_kv=config.kv.compress != "none",
            holds_guidance=self.holds_guidance,
            quantities=names_of(annotated_hints(type(config.reuse))["predict"]) or (),
        )

    def load(self, kept: KeptNetworks | None = None) -> None:
        """Load transformer and VAE; nothing of them is needed before.

        Args:
            kept: where they may be loaded already.
        """
        job = prepare(self.model, self._request([]))
        if job.work.is_whole:
            raise UserError(
                f"preset {self.preset} has attention=full: chunks are reused one by one only with "
                "attention=causal; choose such a preset, as flowcache_fast"
            )
        if kept is None:
            self._run = job, load_networks(job, stats=RunStats(job.device))
            return
        found = kept.load(job)
        self._run, self._encoder = (job, found.networks), found.encoder

    def setting(self) -> Setting:
        """Return what a profile must fit."""
        return self.model.setting(self._loaded()[0].config)

    def fingerprint(self) -> str:
        """Return the hash of the model that a profile must fit."""
        return self.model.fingerprint(self._loaded()[0].source)

    def render(
        self,
        settings: Sequence[str],
        *,
        prompt: str,
        seed: int,
        preset: str | None = None,
        observe: Observe | None = None,
    ) -> Clip:
        """Make a clip with some settings more; `preset` replaces the own one."""
        job, networks = self._loaded()
        config = read_settings(self.model, self._request(settings, preset=preset), job.source)
        stats = RunStats(job.device)
        progress = self.model.generate(
            networks.dit,
            networks.vae,
            replace(job, config=config).changed(prompt=prompt, seed=seed).config,
            self._inputs_of(prompt),
            stats=stats,
            observe=observe,
        )
        return collect(progress, stats)

    def _inputs_of(self, prompt: str) -> Any:
        """Return what a prompt's clips are made from; its text goes through the encoder once."""
        if prompt not in self._inputs:
            job = self._loaded()[0].changed(prompt=prompt)
            stats = RunStats(job.device)
            self._inputs[prompt] = encode_inputs(job, stats=stats, encoder=self._encoder)
        return self._inputs[prompt]

    def _request(self, settings: Sequence[str], *, preset: str | None = None) -> Request:
        given = [*self.settings, *settings, "prompt=-"]
        return Request(preset or self.preset, self.checkpoint, given, str(self.folder))

    def _loaded(self) -> tuple[Job, Loaded]:
        assert self._run is not None, "load() comes first"
        return self._run


# Prompts ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What one clip shows, with its noise."""

    index: int
    text: str
    seed: int


def choose_prompts(
    path: Path | None, *, checkpoint: str, num_clips: int, num_checks: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Return the prompts to calibrate on and those to check with.

    Args:
        path: a text file with a prompt per line; None: the demo's captions, those to check with
            from the combinations that it was not trained on.
    """
    for name, count, least in (("--clips", num_clips, 1), ("--check-prompts", num_checks, 0)):
        if count < least:
            raise UserError(f"{name} must be {least} or more, not {count}")
    if path is not None:
        texts, needed = read_lines(path), num_clips + num_checks
        if len(texts) < needed:
            raise UserError(
                f"{path} holds {len(texts)} prompts, but {needed} are needed: add some, or lower "
                "--clips or --check-prompts"
            )
        seen, unseen = texts[:num_clips], texts[num_clips:]
    elif checkpoint in DEMOS:
        seen, unseen = ([attributes.caption for attributes in part] for part in split_attributes())
        random.Random(ORDER_SEED).shuffle(seen)
        random.Random(ORDER_SEED).shuffle(unseen)
    else:
        raise UserError(
            f"{checkpoint} needs prompts to be tuned on: give --prompts FILE, one per line"
        )
    return numbered(seen, num_clips), numbered(unseen, num_checks, first_seed=CHECK_SEED)


def numbered(
    texts: Sequence[str], count: int, *, first_seed: int = CALIBRATION_SEED
) -> list[Prompt]:
    """Return so many prompts, repeated with other seeds if there are fewer texts."""
    return [Prompt(i, texts[i % len(texts)], first_seed + i) for i in range(count)]
