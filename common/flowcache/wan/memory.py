"""What a run of a Wan model keeps in memory, stage by stage."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

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
from flowcache.wan.dit import IMAGE_TOKENS, DiT, DiTConfig, Embedded, join_contexts, whole_window
from flowcache.wan.folder import WanFolder
from flowcache.wan.vae import SPATIAL_STRIDE

SIZE_REMEDY = "lower height and width"


def networks_of(
    folder: WanFolder | None,
    sizes: DiTConfig,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> Networks:
    """Build those of a model; None: those that all released models share."""
    if folder is None:
        vision = text.RELEASED_VISION_WEIGHTS if sizes.model_type == "i2v" else 0
        encoder, codec = text.released_encoder(), vae.released(vae_dtype)
    else:
        part = folder.image_encoder
        vision = 0 if part is None else text.vision_weights(part)
        encoder, codec = text.empty_encoder(folder.text_encoder), vae.empty(folder.vae, vae_dtype)
    return Networks(encoder, dtype, codec, vision * dtype.itemsize)


@dataclass(frozen=True)
class Held:
    """What the loop of a model keeps that others do not.

    Attributes:
        latent_bytes: noise, latents, velocities, the solver's history, rotations.
        encoded_frames: pixel frames that are encoded at once, at most; 0: none.
        shown_frames: pixel frames that are decoded at once, at most.
        window_frames: latent frames whose tokens are embedded together with those of a pass.
        is_batched: whether guidance branches go through the blocks in one batch.
        kv_remedy: what makes the KV cache smaller.
        chunk_key: setting that says how large a chunk is.
    """

    latent_bytes: int
    encoded_frames: int
    shown_frames: int
    kv_remedy: str
    chunk_key: str
    window_frames: int = 0
    is_batched: bool = False


class WanMemory(Footprint):
    """Counts what a run of a Wan model needs; all but the VAE in the run's type."""

    text_remedy = "set text_on_host=true"

    def __init__(self, sizes: DiTConfig, held: Held, *run: Any, **options: Any) -> None:
        """Count for a transformer of such sizes; see `Footprint`."""
        super().__init__(*run, **options)
        self.sizes, self.held, self.num_layers = sizes, held, sizes.num_layers
        self.kv_remedy = held.kv_remedy
        self.batch = self.num_own if held.is_batched else 1
        self.size = (self.config.height // SPATIAL_STRIDE, self.config.width // SPATIAL_STRIDE)
        self.text_scratch = text_scratch_bytes(
            self.networks.text,
            batch=len(self.work.branches),
            num_tokens=sizes.text_len,
            dtype=self.networks.text_dtype,
        )
        self.dit_scratch = self._dit_scratch()
        self.decode_scratch, self.decoder_state = self._decoding()
        self.encode_scratch = self._encoding()

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        is_dit_here, prompts = not residence.dit_aside, self._prompts()
        latents = Part("latents", self.held.latent_bytes, "lower num_frames")
        vae_part = Part("the VAE", self.vae_bytes, "use a larger GPU")
        own = self.work.stored_bytes * self.num_own // self.work.num_caches
        stored = Part("stored results", own, "set reuse.predict=velocity")
        kept = [prompts, self.kv_part(residence), stored, latents]
        made = [self.text_stage(residence, scratch=self.text_scratch)]
        if self.encode_scratch:
            scratch = Part("VAE activations", self.encode_scratch, SIZE_REMEDY)
            parts = (self._dit(is_dit_here), prompts, vae_part, scratch, latents)
            made.append(Stage("encode", parts))
        decoding = Part("VAE state", self.decoder_state, SIZE_REMEDY)
        if self.overlaps and is_dit_here:
            decoding = Part("VAE activations", self.decode_scratch, "set overlap=false")
        lower = f"lower {self.held.chunk_key}, or the size"
        denoise = (
            *(self._dit(True), *kept),
            Part("activations", self._activations(), lower),
            self.scoring_part(residence),
            *(vae_part, decoding),
        )
        scratch = Part("VAE activations", self.decode_scratch, SIZE_REMEDY)
        decode = (self._dit(is_dit_here), *kept, vae_part, scratch)
        return [*made, Stage("denoise", denoise), Stage("decode", decode)]

    def _dit(self, is_here: bool) -> Part:
        size = self.work.weight_bytes * is_here
        return Part("the transformer", size, "use a smaller model or dtype")

    def _prompts(self) -> Part:
        """Return the keys and values of the prompts in all layers, and of the start image."""
        sizes = self.sizes
        tokens = sizes.text_len + (IMAGE_TOKENS if sizes.model_type == "i2v" else 0)
        one = 2 * tokens * sizes.dim * sizes.num_layers * self.dtype.itemsize
        copies = 2 if self.batch > 1 else 1
        return Part("prompts", copies * self.num_own * one, "use a smaller model")

    def _activations(self) -> int:
        """Return what a tick holds: tokens embedded together, their modulation, one forward."""
        num_frames, dim = self.held.window_frames, self.sizes.dim
        embedded = num_frames * self.work.frame_tokens * dim * self.dtype.itemsize
        return embedded + 4 * 7 * dim * num_frames + self.dit_scratch

    def _latent(self, num_frames: int) -> Tensor:
        return torch.empty(1, self.sizes.out_dim, num_frames, *self.size, device=META)

    def _decoding(self) -> tuple[int, int]:
        """Return what the decoder holds at most, and between two chunks.

        One of several processes has a strip of the picture.
        """
        decoder = self.networks.vae.stream(self.ranks)

        def decode() -> None:
            for num_frames in (1, 2):  # from the third latent on every latent costs the same
                decoder.decode(self._latent(num_frames))

        peak, state = scratch_bytes(decode), decoder.state_bytes()
        pixels = self.config.height * self.config.width * PIXEL_BYTES
        shown = self.held.shown_frames * pixels
        return peak + shown, state + shown

    def _encoding(self) -> int:
        """Return what the encoder holds at most, 0 if nothing is encoded."""
        if not self.held.encoded_frames:
            return 0
        shape = (1, 3, self.held.encoded_frames, self.config.height, self.config.width)
        return scratch_bytes(lambda: self.networks.vae.encode(torch.empty(shape, device=META)))

    def _dit_scratch(self) -> int:
        """Return what one forward holds in addition to weights and caches: one layer is as all."""
        sizes, batch = self.sizes, self.batch
        frames = self.work.pass_tokens // self.work.frame_tokens
        tokens = frames * self.work.frame_tokens
        with META:
            model = DiT(replace(sizes, num_layers=1)).to(self.dtype)
        caches = [self.empty_caches(1, num_tokens=tokens) for _ in range(batch)]
        attend = whole_window(model.kernel)
        if not self.work.is_whole:
            attend = cached_attention(caches, active=[range(tokens)], kernel=model.kernel)
        image = None
        if sizes.model_type == "i2v":
            image = torch.empty(1, IMAGE_TOKENS, sizes.image_dim or 0, device=META)
        prompt = torch.empty(1, sizes.text_len, sizes.text_dim, device=META)
        contexts = join_contexts([model.encode_context(prompt, image)] * batch)
        rope = torch.empty(tokens, sizes.head_width // 2, 2, device=META)
        split = TokenSplit(self.ranks.sequence, frames, self.work.frame_tokens)
        height, width = self.size

        def forward() -> object:
            latents = torch.empty(batch, sizes.in_dim, frames, height, width, device=META)
            embedded = model.embed(
                latents, torch.empty(batch, frames, device=META), fps=[self.config.fps] * batch
            )
            part = split.scatter(embedded.tokens, axis=1)
            own = Embedded(part, embedded.time, embedded.modulation)
            hidden = split.gather(
                model.run_blocks(
                    own, split.scatter(rope, axis=0), contexts, self_attend=split.over_heads(attend)
                )
            )
            return model.velocity(hidden, embedded, latent_height=height, latent_width=width)

        return scratch_bytes(forward)
