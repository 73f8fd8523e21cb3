"""MAGI-1 as a subject of tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.policies import Observe
from flowcache.runtime.model import Job, Loaded, Request
from flowcache.runtime.profile import Setting
from flowcache.runtime.run import (
    Clip,
    collect,
    encode_inputs,
    load_networks,
    prepare,
    read_settings,
)
from flowcache.runtime.stats import RunStats
from flowcache.tune.gram import most_active
from magi1.model import MODEL
from magi1.pipeline import Conditioning
from magi1.released import DEMOS
from magi1.schedule import Clock
from magi1.work import latent_size
from tuning.subject import Words, Work

DEMO_FRAMES = 96
"""Pixel frames of a tuning clip on the demo: four chunks."""


class Magi:
    """A checkpoint with its preset; see `Subject`."""

    words = Words(content=(), published="latent_update", whole_window="teacache_no_passes")

    def __init__(
        self,
        checkpoint: str,
        preset: str,
        settings: Sequence[str],
        *,
        folder: Path,
        holds_guidance: bool = False,
    ) -> None:
        self.checkpoint = checkpoint
        self.preset = preset
        short = [f"runtime_config.num_frames={DEMO_FRAMES}"] if checkpoint in DEMOS else []
        self.settings = [*short, *settings]
        self.folder = folder
        self.holds_guidance = holds_guidance
        self._run: tuple[Job, Loaded] | None = None
        self._conditioning: dict[str, Conditioning] = {}

    def work(self) -> Work:
        """Return the size of one clip; no weights are needed for that."""
        source = MODEL.find(self.checkpoint)
        config = read_settings(MODEL, self._request([]), source)
        dtype = MODEL.dtype(config, torch.device("cuda"))
        work = MODEL.work(config, source, MODEL.media(config, source), dtype)
        clip, clock, model = work.segments[0].cut, Clock.of(config), config.model_config
        height, width = latent_size(config)
        return Work(
            num_steps=clock.num_steps,
            warmup_steps=config.reuse.warmup_steps,
            compute_last_step=config.reuse.compute_last_step,
            num_elements=model.latent_channels * clip.chunk_width * height * width,
            num_active=most_active(clip.num_chunks, num_steps=clock.num_steps, lag=clock.stage),
            flops=work.flops,
            num_passes=len(work.passes),
            compresses_kv=config.kv.compress != "none",
            holds_guidance=self.holds_guidance,
        )

    def load(self) -> None:
        """Load transformer and VAE."""
        job = prepare(MODEL, self._request([]))
        self._run = job, load_networks(job, stats=RunStats(job.device))

    def setting(self) -> Setting:
        """Return what a profile must fit."""
        return MODEL.setting(self._loaded()[0].config)

    def fingerprint(self) -> str:
        """Return the hash of the model that a profile must fit."""
        return MODEL.fingerprint(self._loaded()[0].source)

    def render(
        self,
        settings: Sequence[str],
        *,
        prompt: str,
        seed: int,
        preset: str | None = None,
        observe: Observe | None = None,
    ) -> Clip:
        """Make a clip; see `Subject.render`."""
        job, models = self._loaded()
        config = read_settings(MODEL, self._request(settings, preset=preset))
        runtime = replace(config.runtime_config, seed=seed)
        stats = RunStats(job.device)
        shown = MODEL.generate(
            models.dit,
            models.vae,
            replace(config, prompt=prompt, runtime_config=runtime),
            self._encoded(prompt),
            stats=stats,
            observe=observe,
        )
        return collect(shown, stats)

    def _encoded(self, prompt: str) -> Conditioning:
        """Return what a prompt's clips are made from; its text goes through the encoder once."""
        if prompt not in self._conditioning:
            job, _ = self._loaded()
            job = replace(job, config=replace(job.config, prompt=prompt))
            self._conditioning[prompt] = encode_inputs(job, stats=RunStats(job.device))
        return self._conditioning[prompt]

    def _request(self, settings: Sequence[str], *, preset: str | None = None) -> Request:
        given = [*self.settings, *settings, "prompt=-"]
        return Request(preset or self.preset, self.checkpoint, given, str(self.folder))

    def _loaded(self) -> tuple[Job, Loaded]:
        assert self._run is not None, "load() comes first"
        return self._run
