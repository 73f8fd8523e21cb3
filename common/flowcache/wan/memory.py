"""What a run of a Wan model keeps in memory, stage by stage."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowcache.kv import cached_attention
from flowcache.runtime.memory import (
    META,
    PIXEL_BYTES,
    Footprint,
    LeanAttention,
    Networks,
    Part,
    Stage,
    scratch_bytes,
    text_scratch_bytes,
)
from flowcache.runtime.model import Residence
from flowcache.runtime.parallel import TokenSplit
from flowcache.runtime.quantize import quantize_empty
from flowcache.wan import text, vae
from flowcache.wan.dit import (
    IMAGE_TOKENS,
    DiTConfig,
    Embedded,
    empty_dit,
    join_contexts,
    whole_window,
)
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


@dataclass(frozen=True)
class Decoding:
    """What decoding takes in some number of strips."""

    peak_bytes: int
    """On the device while a chunk is decoded, its pixels included."""
    state_bytes: int
    """Between two chunks."""
    strip_bytes: Sequence[int]
    """What is kept of each strip."""
    flops: int
    """Of a latent frame."""


class WanMemory(Footprint):
    """Counts what a run of a Wan model needs; all but the VAE in the run's type."""

    text_remedy = "set text_on_host=true"
    strip_choices = (None, 4, 8)

    def __init__(self, sizes: DiTConfig, held: Held, *run: Any, **options: Any) -> None:
        """Count for a transformer of such sizes; see `Footprint`."""
        super().__init__(*run, **options)
        self.sizes, self.held, self.num_layers = sizes, held, sizes.num_layers
        self.kv_remedy = held.kv_remedy
        self._decodings: dict[int, Decoding] = {}
        self.batch = self.num_own if held.is_batched else 1
        self.size = (self.config.height // SPATIAL_STRIDE, self.config.width // SPATIAL_STRIDE)
        self.text_scratch = text_scratch_bytes(
            self.networks.text,
            batch=len(self.work.branches),
            num_tokens=sizes.text_len,
            dtype=self.networks.text_dtype,
            mode=self.config.text_quantize,
        )
        self.dit_scratch = self._dit_scratch()
        self._encodings: dict[int, int] = {}

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        prompts, decoding = self._prompts(), self.decoding(residence.vae_strips or 1)
        dit = self.dit_part(residence)
        latents = Part("latents", self.held.latent_bytes, "lower num_frames")
        vae_part = Part("the VAE", self.vae_bytes, "use a larger GPU")
        own = self.work.stored_bytes * self.num_own // self.work.num_caches
        stored = Part("stored results", own, "set reuse.predict=velocity")
        kept = [prompts, self.kv_part(residence), stored, latents]
        made = [self.text_stage(residence, scratch=self.text_scratch)]
        if self.held.encoded_frames:
            peak = self.encoding(residence.vae_strips or 1)
            scratch = Part("VAE activations", peak, SIZE_REMEDY)
            parts = (dit, prompts, vae_part, scratch, latents)
            made.append(Stage("encode", parts))
        held = Part("VAE state", decoding.state_bytes, SIZE_REMEDY)
        if self.overlaps and not residence.dit_aside:
            held = Part("VAE activations", decoding.peak_bytes, "set overlap=false")
        lower = f"lower {self.held.chunk_key}, or the size"
        denoise = (
            *(self.dit_part(residence, is_at_work=True), *kept),
            Part("activations", self._activations(), lower),
            self.scoring_part(residence),
            *(vae_part, held),
        )
        scratch = Part("VAE activations", decoding.peak_bytes, SIZE_REMEDY)
        decode = (dit, *kept, vae_part, scratch)
        return [*made, Stage("denoise", denoise), Stage("decode", decode)]

    def decode_flops(self, residence: Residence) -> float:
        """Return the FLOPs of decoding the video: from the third latent on all cost the same."""
        return self._num_latents * self.decoding(residence.vae_strips or 1).flops

    def text_flops(self) -> float:
        """Return the FLOPs of encoding the prompts: two per weight and token."""
        tokens = len(self.work.branches) * self.sizes.text_len
        return 2 * tokens * self.text_numbers

    def strip_state_bytes(self, residence: Residence) -> tuple[int, int]:
        """Return what of the VAE's memory of strips is on the host, and what is copied in all."""
        if (residence.vae_strips or 1) == 1:
            return 0, 0
        state = sum(self.decoding(residence.vae_strips or 1).strip_bytes)
        return state, 2 * state * self._num_latents

    @property
    def _num_latents(self) -> int:
        pairs = [ends for part in self.work.segments for ends in part.frames]
        return sum(stop - first for first, stop in pairs) // vae.TEMPORAL_STRIDE

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

    def decoding(self, num_strips: int) -> "Decoding":
        """Return what the decoder needs, which is traced once for each number of strips.

        One of several processes has a strip of the picture, which it divides further.
        """
        if num_strips not in self._decodings:
            self._decodings[num_strips] = self._trace_decoding(num_strips)
        return self._decodings[num_strips]

    def _trace_decoding(self, num_strips: int) -> "Decoding":
        decoder = vae.VAEStream(self.networks.vae, self.ranks, num_strips=num_strips)
        counter = FlopCounterMode(display=False)

        def decode() -> None:
            for num_frames in (1, 2):  # from the third latent on every latent costs the same
                decoder.decode(self._latent(num_frames))

        peak, strips = scratch_bytes(decode), decoder.strip_bytes()
        with LeanAttention(), counter:
            decoder.decode(self._latent(1))
        # of several strips one is here at a time, none between two chunks
        gone = sum(strips) if num_strips > 1 else 0
        largest = max(strips) if num_strips > 1 else 0
        pixels = self.config.height * self.config.width * PIXEL_BYTES
        shown = self.held.shown_frames * pixels
        return Decoding(
            peak - gone + largest + shown,
            decoder.state_bytes() - gone + shown,
            tuple(strips),
            counter.get_total_flops(),
        )

    def encoding(self, num_strips: int) -> int:
        """Return what the encoder holds at most, which is traced once for each number of strips."""
        if num_strips not in self._encodings:
            codec = copy.copy(self.networks.vae)
            codec.num_strips = num_strips
            shape = (1, 3, self.held.encoded_frames, self.config.height, self.config.width)
            self._encodings[num_strips] = scratch_bytes(
                lambda: codec.encode(torch.empty(shape, device=META))  # the pixels are held, too
            )
        return self._encodings[num_strips]

    def _dit_scratch(self) -> int:
        """Return what one forward holds in addition to weights and caches: one layer is as all."""
        sizes, batch = self.sizes, self.batch
        frames = self.work.pass_tokens // self.work.frame_tokens
        tokens = frames * self.work.frame_tokens
        model = empty_dit(replace(sizes, num_layers=1), self.dtype)
        if self.config.quantize is not None:
            quantize_empty(model, model.blocks, self.config.quantize)
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
