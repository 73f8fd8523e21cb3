"""Pixels to latents and back while a transformer is at work: concurrently, or taking turns.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, T frames, H/W pixels.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flowcache.runtime.checks import Decoded, all_finite
from flowcache.runtime.offload import HostWeights, aside
from flowcache.runtime.overlap import Worker
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.stats import RunStats


class LatentDecoder(Protocol):
    """Turns the latents of one segment into pixels `[B, 3, T, H, W]` in -1..1, bit by bit."""

    def decode(self, latents_BCFhw: Tensor, /) -> Tensor:
        """Return the pixels of the next latents."""
        ...


class LatentCodec(Protocol):
    """What a pipeline needs of a VAE."""

    def encode(self, pixels_B3THW: Tensor, /) -> Tensor:
        """Return normalised latents `[B, C, F, h, w]`."""
        ...

    def stream(self, ranks: Ranks, /) -> LatentDecoder:
        """Begin to decode one segment; the processes may divide the work."""
        ...


@dataclass(frozen=True)
class Codec:
    """The VAE of a run, which may decode concurrently with the denoising."""

    vae: LatentCodec
    decoder: LatentDecoder
    """Of the segment at work."""
    stats: RunStats
    worker: Worker
    device: torch.device
    """Of the latents."""
    dit_weights: HostWeights | None = None
    """On the host, if the transformer leaves the device while the VAE works."""

    def encode(self, pixels_3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to latents `[C, F, h, w]`, float32."""
        with self.stats.stage("vae"), aside(self.dit_weights):
            latents = self.vae.encode(pixels_3THW.unsqueeze(0).to(self.device))
        return latents[0].to(device=self.device, dtype=torch.float32)

    def decode(self, parts: Sequence[tuple[Tensor, int]]) -> Future[Decoded]:
        """Have the next latents decoded to one piece of the video.

        Args:
            parts: latents `[C, F, h, w]`, which may change afterwards, and how many of their
                frames are not shown.
        """
        is_concurrent = self.worker.is_concurrent
        own = [
            (x.unsqueeze(0).clone() if is_concurrent else x.unsqueeze(0), skipped)
            for x, skipped in parts
        ]

        def decoded() -> Decoded:
            with self.stats.stage("vae", is_concurrent=is_concurrent), aside(self.dit_weights):
                made: list[Decoded] = []
                for latents, skipped in own:
                    frames = self.decoder.decode(latents)[0].float()[:, skipped:]
                    made.append(Decoded(frames, all_finite(latents)))
                return Decoded.concatenated(made)

        return self.worker.submit(decoded)
