"""What a MAGI-1 run keeps in the memory of the GPU, stage by stage. Nothing is loaded.

Axes: B batch, C latent channels, F latent frames, T pixel frames, H/W pixels, L text tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowcache.kv import PREFETCHED_LAYERS, cached_attention, caches_for
from flowcache.runtime.memory import (
    MemoryPlan,
    Part,
    Residence,
    Stage,
    make_memory_plan,
    one_layer,
    scratch_bytes,
    traced_ranks,
    weight_bytes,
)
from flowcache.runtime.parallel import own_branches
from flowcache.runtime.ranks import Layout, Ranks
from flowcache.runtime.ulysses import TokenSplit
from magi1 import text, vae
from magi1.build import budget_of, latent_size, layout_of, tiling_of
from magi1.checkpoint import Checkpoint
from magi1.config import RunConfig
from magi1.dit import DiT, Embedded, set_precision
from magi1.plan import Plan
from magi1.schedule import Clock
from magi1.text import NULL_TOKENS
from magi1.vae import ViTVAE

META = torch.device("meta")
CHUNK_COPIES = 4
"""Float32 latents of a chunk that its pass or its step needs beside the velocities that are kept:
the noisy ones, the pass of the chunk alone, two terms of a sum."""
PIXEL_BYTES = 3 * 4
"""Of an RGB pixel in float32."""


@dataclass(frozen=True)
class Networks:
    """Networks beside the transformer: empty, on the meta device, in the run's types."""

    text: Any
    vae: vae.VAE


def networks_of(
    checkpoint: Checkpoint | None, config: RunConfig, *, dtype: torch.dtype
) -> Networks:
    """Build the empty networks of a checkpoint; None: those that all released models share."""
    kind = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    codec = vae.empty(
        None if checkpoint is None else checkpoint.vae,
        scale=config.runtime_config.scale_factor,
        tiling=tiling_of(config),
        dtype=kind,
    )
    words = text.released() if checkpoint is None else text.empty(checkpoint.text_encoder)
    return Networks(words, codec)


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


class RunMemory:
    """Counts what a run needs; the slow part, tracing the networks' scratch memory, once.

    Args:
        plan: of a process, see `per_process`.
        networks: what runs beside the transformer; the text encoder is float32.
        dtype: type of the weights inside the blocks.
        overlaps: whether chunks are decoded while others are denoised, if both networks are there.
        layout: how processes divide the run; default: it is not divided.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        *,
        networks: Networks,
        dtype: torch.dtype,
        overlaps: bool,
        layout: Layout | None = None,
    ) -> None:
        self.overlaps = overlaps
        self.ranks = traced_ranks(layout or Layout())
        self.config, self.plan, self.dtype = config, plan, dtype
        self.networks = networks
        self.model = replace(config.model_config, params_dtype=str(dtype))
        self.size = latent_size(config)
        self.text_bytes = 4 * sum(p.numel() for p in networks.text.parameters())
        self.vae_bytes = weight_bytes(networks.vae.model)
        self.text_scratch = self._text_scratch()
        self.dit_scratch = self._dit_scratch()
        self.decode_scratch = self._decode_scratch()
        self.encode_scratch = self._encode_scratch() if plan.clip.num_prefix else 0

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        is_text_here = not residence.text_on_host
        made = [
            Stage(
                "text",
                (
                    Part("the text encoder", self.text_bytes * is_text_here, _T5_REMEDY),
                    Part("text activations", self.text_scratch * is_text_here, _T5_REMEDY),
                ),
            )
        ]
        if self.encode_scratch:
            made.append(self._codec("encode", self.encode_scratch, residence, after=[]))
        made.append(self._denoise(residence))
        kept = [
            self._kv(residence),
            *self._held(),
            Part("kept queries", self.plan.query_bytes, _SCORING_REMEDY),
            # neighbours that become clean in successive ticks: one is shown, the next decoded
            self._shown(is_held=Clock.of(self.config).stage == 1),
        ]
        return [*made, self._codec("decode", self.decode_scratch, residence, after=kept)]

    def _codec(self, name: str, scratch: int, residence: Residence, *, after: list[Part]) -> Stage:
        """Return a stage in which the VAE works, alone if the transformer is aside."""
        return Stage(
            name,
            (
                self._dit(is_here=not residence.dit_aside),
                *after,
                self._vae(is_here=True),
                Part("VAE activations", scratch, "lower video_size_h and video_size_w"),
            ),
        )

    def _denoise(self, residence: Residence) -> Stage:
        return Stage(
            "denoise",
            (
                self._dit(is_here=True),
                self._kv(residence),
                *self._held(),
                self._shown(is_held=True),
                Part("activations", self.dit_scratch, "lower runtime_config.chunk_width"),
                Part("KV scoring", self._scoring(residence), _SCORING_REMEDY),
                self._vae(is_here=not residence.dit_aside),
                Part(
                    "VAE activations",
                    self.decode_scratch * (self.overlaps and not residence.dit_aside),
                    "set overlap=false",
                ),
            ),
        )

    # Parts ------------------------------------------------------------------------------------

    def _dit(self, *, is_here: bool) -> Part:
        return Part("the transformer", self.plan.weight_bytes * is_here, "use a smaller model")

    def _vae(self, *, is_here: bool) -> Part:
        return Part("the VAE", self.vae_bytes * is_here, "set offload=true")

    @property
    def _layer_bytes(self) -> int:
        """Return the keys and values of one layer and branch."""
        num_own = own_branches(self.ranks.layout, num_branches=self.plan.num_branches)
        return self.plan.kv_bytes // (self.model.num_layers * num_own)

    def _kv(self, residence: Residence) -> Part:
        remedy = "set kv.compress=importance and a smaller kv.total_chunks"
        if not residence.kv_on_host:
            return Part("the KV cache", self.plan.kv_bytes, remedy)
        # the buffers stay from the first tick to the last
        name = f"{PREFETCHED_LAYERS} layers of the KV cache"
        return Part(name, PREFETCHED_LAYERS * self._layer_bytes, remedy)

    def _scoring(self, residence: Residence) -> int:
        """Return what compression adds: queries, scores, kept rows; those of the host are read."""
        if budget_of(self.config) is None:
            return 0
        halves = 2 if residence.kv_on_host else 1
        return self.plan.scoring_bytes + halves * self._layer_bytes // 2

    def _held(self) -> list[Part]:
        """Return what stays from the first tick to the last, beside weights and keys."""
        clip, model, run = self.plan.clip, self.model, self.config.runtime_config
        head = model.num_query_groups * model.kv_channels
        active = min(run.window_size, len(clip.generated))
        tokens = active * self.plan.text_tokens + min(NULL_TOKENS, model.caption_max_length)
        prompts = 2 * tokens * head * model.num_layers * self.dtype.itemsize
        captions = 4 * len(clip.generated) * self.plan.text_tokens * model.caption_channels
        latent = 4 * model.latent_channels * self.size[0] * self.size[1]
        # each pass, their guided sum, and the sum of the tick before
        velocities = self.plan.num_branches + (self.plan.num_branches > 1) + 1
        frames = clip.num_latents + clip.num_prefix
        frames += run.chunk_width * (velocities * active + CHUNK_COPIES)
        return [
            Part("prompts", prompts + captions, "shorten the prompt"),
            Part("stored results", self.plan.stored_bytes, "set reuse.extrapolate=0"),
            Part("latents", frames * latent, "lower runtime_config.num_frames"),
        ]

    def _shown(self, *, is_held: bool) -> Part:
        """Return the pixel frames of a chunk, which are held for a tick after it was decoded."""
        run = self.config.runtime_config
        frames = run.chunk_width * run.temporal_downsample_factor
        size = frames * run.video_size_h * run.video_size_w * PIXEL_BYTES
        return Part("a chunk's frames", size * is_held, "lower runtime_config.chunk_width")

    # Traced -----------------------------------------------------------------------------------

    def _text_scratch(self) -> int:
        ids = torch.empty(1, max(self.plan.text_tokens, 1), dtype=torch.int64, device=META)
        model = one_layer(self.networks.text)
        return scratch_bytes(lambda: model(input_ids=ids).last_hidden_state)

    def _dit_scratch(self) -> int:
        """Return what the pass of a chunk holds beside weights and caches: a layer is as all.

        An 8-bit layer needs more than a plain one, and stands between two of those.
        """
        is_fp8 = self.config.engine_config.fp8_quant
        model = replace(self.model, num_layers=3 if is_fp8 else 1)
        with META:
            dit = DiT(model, is_fp8=is_fp8)
        set_precision(dit, self.dtype)
        width = self.config.runtime_config.chunk_width
        tokens = layout_of(self.config).chunk_tokens
        caches = caches_for(
            model.num_layers,
            capacity=tokens,
            num_heads=self.model.num_query_groups // self.ranks.sequence.size,
            head_width=self.model.kv_channels,
            dtype=self.dtype,
            device=META,
        )
        words = torch.empty(1, max(self.plan.text_tokens, 1), self.model.caption_channels)
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
            own = Embedded(split.own(embedded.tokens, axis=1), embedded.condition)
            hidden = split.whole(
                dit.run_blocks(
                    own, split.own(rope, axis=0), context, self_attend=split.over_heads(attend)
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
        frames = self.plan.clip.num_prefix * run.temporal_downsample_factor
        frames = 1 if self.plan.clip.is_image else frames
        shape = (1, 3, frames, run.video_size_h, run.video_size_w)
        return scratch_bytes(lambda: codec.encode(torch.empty(shape, device=META)))

    def _one_layer(self) -> vae.VAE:
        """Return the VAE with one layer, which needs as much scratch memory as with all."""
        codec = self.networks.vae
        with META:
            model = ViTVAE(replace(codec.model.config, depth=1)).to(codec.dtype)
        return TracedVAE(model, scale=codec.scale, tiling=codec.tiling)


_SCORING_REMEDY = "set kv.queries=frame"
_T5_REMEDY = "set runtime_config.t5_device=cpu"


def plan_memory(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    plan: Plan,
    *,
    dtype: torch.dtype,
    limit: int | None,
    has_host: bool,
    layout: Layout | None = None,
) -> MemoryPlan:
    """Find what must be kept on the host so that the run fits.

    Args:
        plan: of a process, see `per_process`.
        checkpoint: None: a released model that isn't here.
        limit: bytes of the device that may be used; None: not known.
        has_host: whether the device is not the host itself.
        layout: how processes divide the run; default: it is not divided.

    Raises:
        UserError: it can't be made to fit.
    """
    networks = networks_of(checkpoint, config, dtype=dtype)
    layout = layout or Layout()
    overlaps = (has_host if config.overlap is None else config.overlap) and layout.size == 1
    needs = RunMemory(
        config, plan, networks=networks, dtype=dtype, overlaps=overlaps, layout=layout
    )
    return make_memory_plan(
        needs.stages, wanted=wanted_residence(config), limit_bytes=limit, has_host=has_host
    )


def wanted_residence(config: RunConfig) -> Residence:
    """Return what the settings ask to be on the host."""
    return Residence(
        text_on_host=config.runtime_config.t5_device == "cpu",
        dit_aside=config.offload,
        kv_on_host=config.engine_config.kv_offload,
    )


def placed(config: RunConfig, residence: Residence) -> RunConfig:
    """Return the settings with things where a plan puts them."""
    run, engine = config.runtime_config, config.engine_config
    return replace(
        config,
        runtime_config=replace(run, t5_device="cpu" if residence.text_on_host else run.t5_device),
        engine_config=replace(engine, kv_offload=residence.kv_on_host),
        offload=residence.dit_aside,
    )
