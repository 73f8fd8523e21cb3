"""SkyReels-V2 as a subject of tuning."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from flowcache.config import find_preset, load_config
from flowcache.errors import UserError
from flowcache.job import config_layers
from flowcache.reuse import Observe
from flowcache.stats import RunStats
from flowcache.tune.gram import most_active
from flowcache.tune.profile import Setting
from flowcache.video import to_uint8
from skyreels_v2 import checkpoint as checkpoints
from skyreels_v2.build import VAE_STRIDE, segments_of, setting_of, window_of
from skyreels_v2.config import RunConfig
from skyreels_v2.pipeline import LATENT_CHANNELS, generate
from skyreels_v2.plan import make_plan
from skyreels_v2.released import RELEASED
from skyreels_v2.run import (
    BASE,
    PRESETS,
    Job,
    Models,
    Request,
    encode_inputs,
    load_models,
    prepare,
)
from tuning.subject import Clip, Words, Work

DEMO_FRAMES = 77
"""Pixel frames of a tuning clip on the demo: one window of four chunks."""


class SkyReels:
    """A checkpoint with its preset; see `Subject`."""

    words = Words(
        content=("reuse.signal=content",), published="residual", whole_window="teacache_causal"
    )

    def __init__(
        self, checkpoint: str, preset: str, settings: Sequence[str], *, folder: Path
    ) -> None:
        self.checkpoint = checkpoint
        self.preset = preset
        short = [f"num_frames={DEMO_FRAMES}"] if checkpoint == "demo" else []
        self.settings = [*short, *settings]
        self.folder = folder
        self._models: Models | None = None

    def work(self) -> Work:
        """Return the size of one clip; a released model needs no files for that."""
        name = self.checkpoint.rpartition("/")[2].lower()
        if name in RELEASED:
            preset = find_preset(PRESETS, self.preset)
            config = load_config(
                RunConfig,
                config_layers(BASE, preset, checkpoint=None),
                overrides=[*self.settings, "prompt=-"],
            )
            dit = RELEASED[name]
        else:
            job = self._job([])
            config, dit = job.config, job.checkpoint.config
        segments = segments_of(config)
        window = window_of(
            config, segments[0], num_segments=len(segments), is_i2v=dit.model_type == "i2v"
        )
        frames = max(len(window.chunks[chunk]) for chunk in window.generated)
        pixels = config.height * config.width
        return Work(
            num_steps=config.num_steps,
            warmup_steps=config.reuse.warmup_steps,
            num_elements=LATENT_CHANNELS * frames * pixels // VAE_STRIDE**2,
            num_active=most_active(
                len(window.generated), num_steps=config.num_steps, lag=config.ar_step
            ),
            flops=make_plan(config, dit, dtype=torch.bfloat16).flops,
        )

    def load(self) -> None:
        """Load transformer and VAE."""
        job = self._job([])
        if job.config.attention != "causal":
            raise UserError(
                f"preset {self.preset} has attention={job.config.attention}: chunks are reused "
                "one by one only with attention=causal; choose such a preset, as flowcache_fast"
            )
        self._models = load_models(job, stats=RunStats(job.device))

    def setting(self) -> Setting:
        """Return what a profile must fit."""
        return setting_of(self._job([]).config)

    def fingerprint(self) -> str:
        """Return the hash of the model that a profile must fit."""
        return checkpoints.fingerprint(self._job([]).checkpoint)

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
        models, job = self._loaded(), self._job(settings, preset=preset)
        config = replace(job.config, prompt=prompt, seed=seed)
        stats = RunStats(job.device)
        conditioning = encode_inputs(replace(job, config=config), stats=stats)
        parts = [
            to_uint8(progress.frames).cpu()
            for progress in generate(
                models.dit, models.vae, config, conditioning, stats=stats, observe=observe
            )
            if progress.frames is not None
        ]
        return Clip(torch.cat(parts), stats)

    def _job(self, settings: Sequence[str], *, preset: str | None = None) -> Job:
        return prepare(
            Request(
                preset or self.preset,
                self.checkpoint,
                [*self.settings, *settings, "prompt=-"],
                str(self.folder),
            )
        )

    def _loaded(self) -> Models:
        assert self._models is not None, "load() comes first"
        return self._models
