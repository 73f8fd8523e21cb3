"""Pixels to latents and back while a transformer is at work: concurrently, or taking turns.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from flowcache.runtime.checks import Decoded, all_finite
from flowcache.runtime.memory import HostWeights, aside
from flowcache.runtime.overlap import Worker
from flowcache.runtime.stats import RunStats
from flowcache.wan.vae import VAE, VAEStream


@dataclass(frozen=True)
class Codec:
    """The VAE of a run, which may decode concurrently with the denoising."""

    vae: VAE
    decoder: VAEStream
    stats: RunStats
    worker: Worker
    device: torch.device
    """Of the latents."""
    dit_weights: HostWeights | None = None
    """On the host, if the transformer leaves the device while the VAE works."""

    def encode(self, pixels_3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to latents `[C, F, h, w]`."""
        with self.stats.stage("vae"), aside(self.dit_weights):
            return self.vae.encode(pixels_3THW.unsqueeze(0).to(self.device))[0].to(self.device)

    def decode(self, parts: Sequence[tuple[Tensor, int]]) -> Future[Decoded]:
        """Have the next latents decoded to one piece of the video.

        Args:
            parts: latents `[C, F, h, w]`, which may change afterwards, and how many of their
                frames are not shown.
        """
        is_concurrent = self.worker.is_concurrent
        own = [(latents.unsqueeze(0).clone(), skipped) for latents, skipped in parts]

        def decoded() -> Decoded:
            with self.stats.stage("vae", is_concurrent=is_concurrent), aside(self.dit_weights):
                made: list[Decoded] = []
                for latents, skipped in own:
                    frames = self.decoder.decode(latents)[0].float()[:, skipped:]
                    made.append(Decoded(frames, all_finite(latents)))
                return Decoded.concatenated(made)

        return self.worker.submit(decoded)
