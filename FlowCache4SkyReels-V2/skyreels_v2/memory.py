"""What a SkyReels-V2 run keeps in memory, stage by stage."""

from dataclasses import replace
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
from skyreels_v2.checkpoint import Checkpoint
from skyreels_v2.window import Window, pixel_frames
from skyreels_v2.work import VAE_STRIDE

LATENT_COPIES = 9
"""Float32 arrays of a window's size: noise, latents, the tick's copy, the solver's two velocities
and last sample, the velocities of two branches and their guided sum."""
SIZE_REMEDY = "lower height and width"


def networks_of(
    files: Checkpoint | None,
    sizes: DiTConfig,
    *,
    dtype: torch.dtype,
    vae_dtype: torch.dtype = torch.float32,
) -> Networks:
    """Build those of a checkpoint; None: those that all released models share."""
    if files is None:
        vision = text.RELEASED_VISION_WEIGHTS if sizes.model_type == "i2v" else 0
        encoder, codec = text.released_encoder(), vae.released(vae_dtype)
    else:
        part = files.image_encoder
        vision = 0 if part is None else text.vision_weights(part)
        encoder, codec = text.empty_encoder(files.text_encoder), vae.empty(files.vae, vae_dtype)
    return Networks(encoder, dtype, codec, vision * dtype.itemsize)


class WindowMemory(Footprint):
    """Counts what a SkyReels-V2 run needs; all but the VAE in the run's type."""

    text_remedy = "set text_on_host=true"
    kv_remedy = "set kv.compress=importance, or fewer num_frames"

    def __init__(self, sizes: DiTConfig, *run: Any, **options: Any) -> None:
        """Count for a transformer of such sizes; see `Footprint`."""
        super().__init__(*run, **options)
        self.sizes, self.num_layers = sizes, sizes.num_layers
        self.largest: Window = max(
            (part.cut for part in self.work.segments), key=lambda window: window.num_frames
        )
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
        is_dit_here = not residence.dit_aside
        vae_part, latents = Part("the VAE", self.vae_bytes, "use a larger GPU"), self._latents()
        kept = [self._prompts(), self.kv_part(residence), self._stored(), latents]
        made = [self.text_stage(residence, scratch=self.text_scratch)]
        if self.encode_scratch:
            scratch = Part("VAE activations", self.encode_scratch, SIZE_REMEDY)
            parts = (self._dit(is_dit_here), self._prompts(), vae_part, scratch, latents)
            made.append(Stage("encode", parts))
        decoding = Part("VAE state", self.decoder_state, SIZE_REMEDY)
        if self.overlaps and is_dit_here:
            decoding = Part("VAE activations", self.decode_scratch, "set overlap=false")
        denoise = (
            *(self._dit(True), *kept),
            Part("activations", self._activations(), "lower causal_block_size, or the size"),
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
        copies = 2 if self.work.loop.sampling.batch_branches and self.num_own > 1 else 1
        return Part("prompts", copies * self.num_own * one, "use a smaller model")

    def _stored(self) -> Part:
        own = self.work.stored_bytes * self.num_own // self.work.num_caches
        return Part("stored results", own, "set reuse.predict=velocity")

    def _latents(self) -> Part:
        pixels, num_frames = self.config.height * self.config.width, self.largest.num_frames
        latents = LATENT_COPIES * 4 * self.sizes.out_dim * num_frames * pixels // VAE_STRIDE**2
        rope = self.work.frame_tokens * num_frames * self.sizes.head_width * 4
        shown = (self.config.overlap_history or 0) * pixels * PIXEL_BYTES
        return Part("latents", latents + rope + shown, "lower num_frames")

    def _activations(self) -> int:
        """Return what a tick holds: all embedded tokens, their modulation, one forward."""
        num_frames, dim = self.largest.num_frames, self.sizes.dim
        embedded = num_frames * self.work.frame_tokens * dim * self.dtype.itemsize
        return embedded + 4 * 7 * dim * num_frames + self.dit_scratch

    def _latent(self, num_frames: int) -> Tensor:
        height, width = self.config.height // VAE_STRIDE, self.config.width // VAE_STRIDE
        return torch.empty(1, self.sizes.out_dim, num_frames, height, width, device=META)

    def _decoding(self) -> tuple[int, int]:
        """Return what the decoder holds at most, and between two chunks.

        One of several processes has a strip of the picture.
        """
        decoder = self.networks.vae.stream(self.ranks)

        def decode() -> None:
            for num_frames in (1, 2):  # from the third latent on every latent costs the same
                decoder.decode(self._latent(num_frames))

        peak, state = scratch_bytes(decode), decoder.state_bytes()
        # the frames of all chunks that become clean together
        part = next(part for part in self.work.segments if part.cut is self.largest)
        latents = max(
            sum(len(self.largest.chunks[chunk]) for chunk in tick.finishing) for tick in part.ticks
        )
        pixels = self.config.height * self.config.width * PIXEL_BYTES
        shown = vae.TEMPORAL_STRIDE * latents * pixels
        return peak + shown, state + shown

    def _encoding(self) -> int:
        """Return what the encoder holds at most, 0 if nothing is encoded."""
        config = self.config
        frames = [1] if config.image is not None or config.end_image is not None else []
        if self.sizes.model_type == "i2v" and config.image is not None:
            frames.append(pixel_frames(self.largest.num_frames))
        if config.video is not None or len(self.work.segments) > 1:
            frames.append(config.overlap_history or 1)
        if not frames:
            return 0
        shape = (1, 3, max(frames), config.height, config.width)
        return scratch_bytes(lambda: self.networks.vae.encode(torch.empty(shape, device=META)))

    def _dit_scratch(self) -> int:
        """Return what one forward holds in addition to weights and caches: one layer is as all."""
        config, sizes, ranks = self.config, self.sizes, self.ranks
        batch = self.num_own if self.work.loop.sampling.batch_branches else 1
        frames = self.work.pass_tokens // self.work.frame_tokens
        with META:
            model = DiT(replace(sizes, num_layers=1)).to(self.dtype)
        tokens = frames * self.work.frame_tokens
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
        split = TokenSplit(ranks.sequence, frames, self.work.frame_tokens)
        size = (config.height // VAE_STRIDE, config.width // VAE_STRIDE)

        def forward() -> object:
            latents = torch.empty(batch, sizes.in_dim, frames, *size, device=META)
            embedded = model.embed(
                latents, torch.empty(batch, frames, device=META), fps=[config.fps] * batch
            )
            own = Embedded(
                split.scatter(embedded.tokens, axis=1), embedded.time, embedded.modulation
            )
            hidden = split.gather(
                model.run_blocks(
                    own, split.scatter(rope, axis=0), contexts, self_attend=split.over_heads(attend)
                )
            )
            velocity = model.velocity(hidden, embedded, latent_height=size[0], latent_width=size[1])
            return velocity, hidden - embedded.tokens

        return scratch_bytes(forward)
