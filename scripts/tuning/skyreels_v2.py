"""SkyReels-V2 as a subject of tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.errors import UserError
from flowcache.policies import Observe
from flowcache.runtime.model import Job, Loaded, Request, Source
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
from skyreels_v2.config import RunConfig
from skyreels_v2.model import MODEL
from skyreels_v2.pipeline import LATENT_CHANNELS, Conditioning
from skyreels_v2.released import RELEASED
from skyreels_v2.work import VAE_STRIDE
from tuning.subject import Words, Work

DEMO_FRAMES = 77
"""Pixel frames of a tuning clip on the demo: one window of four chunks."""


class SkyReels:
    """A checkpoint with its preset; see `Subject`."""

    words = Words(
        content=("reuse.signal=content",), published="residual", whole_window="teacache_causal"
    )

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
        short = [f"num_frames={DEMO_FRAMES}"] if checkpoint == "demo" else []
        self.settings = [*short, *settings]
        self.folder = folder
        self.holds_guidance = holds_guidance
        self._run: tuple[Job, Loaded] | None = None
        self._conditioning: dict[str, Conditioning] = {}

    def work(self) -> Work:
        """Return the size of one clip; a released model needs no files for that."""
        name = self.checkpoint.rpartition("/")[2].lower()
        if name in RELEASED:
            source = MODEL.find(name, is_dry=True)
        else:
            _, source = MODEL.fetch(None, MODEL.find(self.checkpoint))
        config = self._read([], source)
        work = MODEL.work(config, source, MODEL.media(config, source), torch.bfloat16)
        window = work.segments[0].cut
        frames = max(len(window.chunks[chunk]) for chunk in window.generated)
        pixels = config.height * config.width
        return Work(
            num_steps=config.num_steps,
            warmup_steps=config.reuse.warmup_steps,
            compute_last_step=config.reuse.compute_last_step,
            num_elements=LATENT_CHANNELS * frames * pixels // VAE_STRIDE**2,
            num_active=most_active(
                len(window.generated), num_steps=config.num_steps, lag=config.ar_step
            ),
            flops=work.flops,
            num_passes=len(work.passes),
            compresses_kv=config.kv.compress != "none",
            holds_guidance=self.holds_guidance,
        )

    def load(self) -> None:
        """Load transformer and VAE."""
        job = prepare(MODEL, self._request([]))
        if job.config.attention != "causal":
            raise UserError(
                f"preset {self.preset} has attention={job.config.attention}: chunks are reused "
                "one by one only with attention=causal; choose such a preset, as flowcache_fast"
            )
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
        config = self._read(settings, job.source, preset=preset)
        stats = RunStats(job.device)
        shown = MODEL.generate(
            models.dit,
            models.vae,
            replace(config, prompt=prompt, seed=seed),
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

    def _read(
        self, settings: Sequence[str], source: Source, *, preset: str | None = None
    ) -> RunConfig:
        return read_settings(MODEL, self._request(settings, preset=preset), source)

    def _request(self, settings: Sequence[str], *, preset: str | None = None) -> Request:
        given = [*self.settings, *settings, "prompt=-"]
        return Request(preset or self.preset, self.checkpoint, given, str(self.folder))

    def _loaded(self) -> tuple[Job, Loaded]:
        assert self._run is not None, "load() comes first"
        return self._run
