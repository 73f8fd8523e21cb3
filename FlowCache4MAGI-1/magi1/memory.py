"""What a MAGI-1 run keeps in memory, stage by stage."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowcache.kv import cached_attention
from flowcache.runtime.memory import (
    META,
    PIXEL_BYTES,
    SCORING_REMEDY,
    Footprint,
    Networks,
    Part,
    Stage,
    scratch_bytes,
    text_scratch_bytes,
)
from flowcache.runtime.model import Residence
from flowcache.runtime.parallel import Ranks, TokenSplit
from flowcache.runtime.quantize import quantize_empty
from magi1 import text, vae
from magi1.checkpoint import Checkpoint
from magi1.config import ModelConfig, RunConfig
from magi1.dit import DiT, Embedded, quantised_parts, set_precision
from magi1.schedule import Clip
from magi1.text import NULL_TOKENS
from magi1.vae import ViTVAE
from magi1.work import latent_size, tiling_of

CHUNK_COPIES = 4
"""Float32 latents of a chunk that its pass or its step needs in addition to the velocities that are
kept: the noisy ones, the pass of the chunk alone, two terms of a sum."""


def networks_for(files: Checkpoint | None, config: RunConfig, *, dtype: torch.dtype) -> Networks:
    """Build those of a checkpoint; None: those that all released models share."""
    codec = vae.empty(
        None if files is None else files.vae,
        scale=config.runtime_config.scale_factor,
        tiling=tiling_of(config),
        dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
    )
    encoder = text.released() if files is None else text.empty(files.text_encoder)
    return Networks(encoder, torch.float32, codec)


class TracedVAE(vae.VAE):
    """A VAE that is faster to trace where it decodes many tiles, and holds as much.

    While a tile is decoded, the results of those before it are held. So of the tiles of one shape
    the last one decides; the others only leave their result.
    """

    def _decode_tiles(self, tiles_BCFhw: Sequence[Tensor], *, ranks: Ranks) -> Iterator[Tensor]:
        last = {tile.shape: number for number, tile in enumerate(tiles_BCFhw)}
        for number, tile in enumerate(tiles_BCFhw):
            if last[tile.shape] == number:
                yield self._decode_tile(tile)
                continue
            batch, _, frames, height, width = tile.shape
            stride = self.spatial_stride
            num_frames = frames * self.temporal_stride
            shape = (batch, self.model.config.in_chans, num_frames, height * stride, width * stride)
            pixels = tile.new_empty(shape)
            yield pixels[:, :, :1] if frames == 1 else pixels


class ClipMemory(Footprint):
    """Counts what a MAGI-1 run needs; the text encoder is float32."""

    text_remedy = "set runtime_config.t5_device=cpu"
    kv_remedy = "set kv.compress=importance and a smaller kv.total_chunks"

    def __init__(self, *run: Any, **options: Any) -> None:
        """Count for a clip; see `Footprint`."""
        super().__init__(*run, **options)
        self.size = latent_size(self.config)
        model: ModelConfig = self.config.model_config
        self.model = replace(model, params_dtype=str(self.dtype))
        self.num_layers = self.model.num_layers
        self.clip: Clip = self.work.segments[0].cut
        self.text_scratch = text_scratch_bytes(
            self.networks.text,
            batch=1,
            num_tokens=max(self.work.text_tokens, 1),
            dtype=self.networks.text_dtype,
            mode=self.config.text_quantize,
        )
        self.dit_scratch = self._dit_scratch()
        self.decode_scratch = self._decode_scratch()
        self.encode_scratch = self._encode_scratch() if self.clip.num_prefix else 0

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        is_dit_here = not residence.dit_aside
        dit, codec = self.dit_part(residence), self._vae(is_here=True)
        size_remedy = "lower video_size_h and video_size_w"
        made = [self.text_stage(residence, scratch=self.text_scratch)]
        if self.encode_scratch:
            scratch = Part("VAE activations", self.encode_scratch, size_remedy)
            made.append(Stage("encode", (dit, codec, scratch)))
        kept = [self.kv_part(residence), *self._held()]
        decoding = self.decode_scratch * (self.overlaps and is_dit_here)
        denoise = (
            *(self.dit_part(residence, is_at_work=True), *kept, self._shown(is_held=True)),
            Part("activations", self.dit_scratch, "lower runtime_config.chunk_width"),
            self.scoring_part(residence),
            self._vae(is_here=is_dit_here),
            Part("VAE activations", decoding, "set overlap=false"),
        )
        decode = (
            *(dit, *kept),
            Part("kept queries", self.work.query_bytes, SCORING_REMEDY),
            # neighbours that become clean in successive ticks: one is shown, the next decoded
            self._shown(is_held=self.work.loop.clock.stage == 1),
            codec,
            Part("VAE activations", self.decode_scratch, size_remedy),
        )
        return [*made, Stage("denoise", denoise), Stage("decode", decode)]

    def decode_flops(self, residence: Residence) -> float:
        """Return the FLOPs of decoding: two per weight of the decoder, which has half of all, and
        latent position; where tiles overlap, once.
        """
        parameters = sum(parameter.numel() for parameter in self.networks.vae.model.parameters())
        latents = self.clip.num_latents * self.size[0] * self.size[1]
        return parameters * latents

    def text_flops(self) -> float:
        """Return the FLOPs of encoding the prompt: two per weight and token."""
        return 2 * self.work.text_tokens * self.text_numbers

    def _vae(self, *, is_here: bool) -> Part:
        return Part("the VAE", self.vae_bytes * is_here, "set offload=true")

    def _held(self) -> list[Part]:
        """Return what stays from the first tick to the last, weights and keys aside."""
        clip, model, run = self.clip, self.model, self.config.runtime_config
        head = model.num_query_groups * model.kv_channels
        active = min(run.window_size, len(clip.generated))
        tokens = active * self.work.text_tokens + min(NULL_TOKENS, model.caption_max_length)
        prompts = 2 * tokens * head * model.num_layers * self.dtype.itemsize
        captions = 4 * len(clip.generated) * self.work.text_tokens * model.caption_channels
        latent = 4 * model.latent_channels * self.size[0] * self.size[1]
        # each pass, their guided sum, and the sum of the tick before
        velocities = self.work.num_caches + (self.work.num_caches > 1) + 1
        frames = clip.num_latents + clip.num_prefix
        frames += run.chunk_width * (velocities * active + CHUNK_COPIES)
        return [
            Part("prompts", prompts + captions, "shorten the prompt"),
            Part("stored results", self.work.stored_bytes, "set reuse.extrapolate=0"),
            Part("latents", frames * latent, "lower runtime_config.num_frames"),
        ]

    def _shown(self, *, is_held: bool) -> Part:
        """Return the pixel frames of a chunk, which are held for a tick after it was decoded."""
        run = self.config.runtime_config
        frames = run.chunk_width * run.temporal_downsample_factor
        size = frames * run.video_size_h * run.video_size_w * PIXEL_BYTES
        return Part("a chunk's frames", size * is_held, "lower runtime_config.chunk_width")

    def _dit_scratch(self) -> int:
        """Return what the pass of a chunk holds in addition to weights and caches: a layer is as
        all.

        An 8-bit layer needs more than a plain one, and stands between two of those.
        """
        is_fp8 = self.config.engine_config.fp8_quant
        model = replace(self.model, num_layers=3 if is_fp8 else 1)
        with META:
            dit = DiT(model, is_fp8=is_fp8)
        set_precision(dit, self.dtype)
        if self.config.quantize is not None:
            layers = dit.videodit_blocks.layers
            quantize_empty(dit, quantised_parts(layers), self.config.quantize)
        width = self.config.runtime_config.chunk_width
        tokens = self.work.pass_tokens
        caches = self.empty_caches(model.num_layers, num_tokens=tokens)
        words = torch.empty(1, max(self.work.text_tokens, 1), self.model.caption_channels)
        context = dit.encode_context(words.to(META))
        attend = cached_attention([caches], active=[range(tokens)], kernel=dit.kernel)
        split = TokenSplit(self.ranks.sequence, 1, tokens)

        def forward() -> Tensor:
            latents = torch.empty(1, self.model.latent_channels, width, *self.size, device=META)
            embedded = dit.embed(latents, torch.empty(1, 1, device=META), is_null=False)
            rope = dit.rope_table(
                first_frame=0,
                num_frames=width,
                latent_height=self.size[0],
                latent_width=self.size[1],
            )
            own = Embedded(split.scatter(embedded.tokens, axis=1), embedded.condition)
            hidden = split.gather(
                dit.run_blocks(
                    own, split.scatter(rope, axis=0), context, self_attend=split.over_heads(attend)
                )
            )
            return dit.velocity(hidden, latent_height=self.size[0], latent_width=self.size[1])

        return scratch_bytes(forward)

    def _decode_scratch(self) -> int:
        """Return what decoding a chunk holds; one of several processes decodes some tiles."""
        frames = self.config.runtime_config.chunk_width
        latents = torch.empty(1, self.model.latent_channels, frames, *self.size, device=META)
        codec = self._one_layer()
        return scratch_bytes(lambda: codec.decode(latents, self.ranks))

    def _encode_scratch(self) -> int:
        """Return what encoding the given frames holds."""
        run, codec = self.config.runtime_config, self._one_layer()
        frames = self.clip.num_prefix * run.temporal_downsample_factor
        frames = 1 if self.clip.is_image else frames
        shape = (1, 3, frames, run.video_size_h, run.video_size_w)
        return scratch_bytes(lambda: codec.encode(torch.empty(shape, device=META)))

    def _one_layer(self) -> vae.VAE:
        """Return the VAE with one layer, which needs as much scratch memory as with all."""
        codec = self.networks.vae
        with META:
            model = ViTVAE(replace(codec.model.config, depth=1)).to(codec.dtype)
        return TracedVAE(model, scale=codec.scale, tiling=codec.tiling)
