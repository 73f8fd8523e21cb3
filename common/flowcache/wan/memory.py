"""What a run of a Wan model keeps in memory that goes chunk by chunk through a KV cache."""

from dataclasses import replace
from typing import Any

import torch

from flowcache.kv import cached_attention
from flowcache.runtime.memory import (
    META,
    PIXEL_BYTES,
    Footprint,
    Networks,
    Part,
    Stage,
    scratch_bytes,
    text_scratch_bytes,
)
from flowcache.runtime.model import Residence
from flowcache.runtime.parallel import TokenSplit
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, DiTConfig, Embedded
from flowcache.wan.folder import WanFolder
from flowcache.wan.vae import SPATIAL_STRIDE

LATENT_COPIES = 6
"""Float32 arrays of the video's size or less: noise, latents, velocities, solver's history."""
SIZE_REMEDY = "lower height and width"


def networks_of(
    folder: WanFolder | None, *, dtype: torch.dtype, vae_dtype: torch.dtype
) -> Networks:
    """Build those of a base model; None: those that all released models share."""
    if folder is None:
        return Networks(text.released_encoder(), dtype, vae.released(vae_dtype))
    encoder = text.empty_encoder(folder.text_encoder)
    return Networks(encoder, dtype, vae.empty(folder.vae, vae_dtype))


class ChunkMemory(Footprint):
    """Counts what a run needs; all but the VAE in the run's type."""

    text_remedy = "set text_on_host=true"
    kv_remedy = "set window, or fewer num_frames"

    def __init__(self, sizes: DiTConfig, *run: Any, given_pixels: int, **options: Any) -> None:
        """Count for a transformer of such sizes; see `Footprint`.

        Args:
            given_pixels: frames that are encoded at once, and decoded with the first chunk.
        """
        self.given_pixels = given_pixels
        super().__init__(*run, **options)
        self.sizes, self.num_layers = sizes, sizes.num_layers
        self.size = (self.config.height // SPATIAL_STRIDE, self.config.width // SPATIAL_STRIDE)
        self.pixel_bytes = self.config.height * self.config.width * PIXEL_BYTES
        (self.part,) = self.work.segments
        self.decode_scratch, self.decoder_state = self._decoding()

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        sizes, numbers = self.sizes, self.networks
        scratch = text_scratch_bytes(
            numbers.text,
            batch=len(self.work.branches),
            num_tokens=sizes.text_len,
            dtype=numbers.text_dtype,
        )
        prompt = 2 * sizes.text_len * sizes.dim * sizes.num_layers * self.dtype.itemsize
        num_frames = self.part.cut[-1].stop
        latents = LATENT_COPIES * 4 * sizes.out_dim * num_frames * self.size[0] * self.size[1]
        kept = (
            Part("prompts", self.num_own * prompt, "use a smaller model"),
            self.kv_part(residence),
            Part("latents", latents, "lower num_frames"),
            Part("the VAE", self.vae_bytes, "use a larger GPU"),
        )
        model = Part("the transformer", self.work.weight_bytes, "use a smaller dtype")
        away = replace(model, num_bytes=0) if residence.dit_aside else model
        decoding = Part("VAE activations", self.decode_scratch, SIZE_REMEDY)
        state = Part("VAE state", self.decoder_state, SIZE_REMEDY)
        behind = decoding if self.overlaps and not residence.dit_aside else state
        activations = Part("activations", self._dit_scratch(), "lower chunk_frames, or the size")
        stages = [
            self.text_stage(residence, scratch=scratch),
            Stage("denoise", (model, *kept, activations, behind)),
            Stage("decode", (away, *kept, decoding)),
        ]
        if encoding := self._encoding():
            part = Part("VAE activations", encoding, SIZE_REMEDY)
            stages.insert(1, Stage("encode", (away, *kept, part)))
        return stages

    def _decoding(self) -> tuple[int, int]:
        """Return what the decoder holds at most, and between two chunks."""
        decoder = self.networks.vae.stream(self.ranks)

        def decode() -> None:
            for num_frames in (1, 2):  # from the third latent on every latent costs the same
                shape = (1, self.sizes.out_dim, num_frames, *self.size)
                decoder.decode(torch.empty(shape, device=META))

        peak, state = scratch_bytes(decode), decoder.state_bytes()
        largest = max(len(chunk) for chunk in self.part.cut)
        shown = (vae.TEMPORAL_STRIDE * largest + self.given_pixels) * self.pixel_bytes
        return peak + shown, state + shown

    def _encoding(self) -> int:
        """Return what the encoder holds at most, 0 if nothing is encoded."""
        if not self.given_pixels:
            return 0
        shape = (1, 3, self.given_pixels, self.config.height, self.config.width)
        return scratch_bytes(lambda: self.networks.vae.encode(torch.empty(shape, device=META)))

    def _dit_scratch(self) -> int:
        """Return what one forward holds in addition to weights and caches: one layer is as all."""
        sizes, work = self.sizes, self.work
        frames, tokens = work.pass_tokens // work.frame_tokens, work.pass_tokens
        with META:
            model = DiT(replace(sizes, num_layers=1)).to(self.dtype)
        caches = self.empty_caches(1, num_tokens=tokens)
        attend = cached_attention([caches], active=[range(tokens)], kernel=model.kernel)
        text_BLD = torch.empty(1, sizes.text_len, sizes.text_dim, device=META)
        context = model.encode_context(text_BLD)
        rope = torch.empty(tokens, sizes.head_width // 2, 2, device=META)
        split = TokenSplit(self.ranks.sequence, frames, work.frame_tokens)

        def forward() -> object:
            x = torch.empty(1, sizes.in_dim, frames, *self.size, device=META)
            embedded = model.embed(x, torch.empty(1, frames, device=META), fps=[16])
            own = Embedded(
                split.scatter(embedded.tokens, axis=1), embedded.time, embedded.modulation
            )
            hidden = model.run_blocks(
                own, split.scatter(rope, axis=0), context, self_attend=split.over_heads(attend)
            )
            height, width = self.size
            whole = split.gather(hidden)
            return model.velocity(whole, embedded, latent_height=height, latent_width=width)

        return scratch_bytes(forward)
