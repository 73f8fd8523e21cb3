"""What a SkyReels-V2 run keeps in the memory of the GPU, stage by stage. Nothing is loaded.

Axes: B batch, C latent channels, F latent frames, T pixel frames, H/W pixels, L prompt tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

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
from flowcache.wan import text, vae
from flowcache.wan.dit import DiT, DiTConfig, Embedded, join_contexts, whole_window
from skyreels_v2.build import VAE_STRIDE, batches_branches, sampling_of
from skyreels_v2.checkpoint import Checkpoint
from skyreels_v2.config import RunConfig
from skyreels_v2.plan import Plan
from skyreels_v2.window import pixel_frames

META = torch.device("meta")
LATENT_COPIES = 9
"""Float32 arrays of a window's size: noise, latents, the tick's copy, the solver's two velocities
and last sample, the velocities of two branches and their guided sum."""
IMAGE_TOKENS = 257
PIXEL_BYTES = 3 * 4
"""Of an RGB pixel in float32."""


@dataclass(frozen=True)
class Networks:
    """Networks beside the transformer: empty, on the meta device."""

    text: Any
    vae: vae.VAE
    vision_bytes: int = 0
    """Weights of the image encoder."""


def networks_of(checkpoint: Checkpoint, *, dtype: torch.dtype) -> Networks:
    """Build the empty networks of a checkpoint."""
    vision = 0
    if checkpoint.image_encoder is not None:
        vision = text.vision_weights(checkpoint.image_encoder) * dtype.itemsize
    return Networks(text.empty_encoder(checkpoint.text_encoder), vae.empty(checkpoint.vae), vision)


def released_networks(*, dtype: torch.dtype, is_i2v: bool) -> Networks:
    """Build the empty networks that all released models share."""
    vision = text.RELEASED_VISION_WEIGHTS * dtype.itemsize if is_i2v else 0
    return Networks(text.released_encoder(), vae.released(), vision)


class RunMemory:
    """Counts what a run needs; the slow part, tracing the networks' scratch memory, once.

    Args:
        plan: of a process, see `per_process`.
        networks: what runs beside the transformer.
        dtype: of the transformer's and the text encoder's weights; the VAE is float32.
        overlaps: whether chunks are decoded while others are denoised, if both networks are there.
        layout: how processes divide the run; default: it is not divided.
    """

    def __init__(
        self,
        config: RunConfig,
        dit: DiTConfig,
        plan: Plan,
        *,
        networks: Networks,
        dtype: torch.dtype,
        overlaps: bool,
        layout: Layout | None = None,
    ) -> None:
        self.overlaps = overlaps
        self.ranks = traced_ranks(layout or Layout())
        self.num_own = own_branches(self.ranks.layout, num_branches=plan.num_branches)
        """Branches of this process."""
        self.config, self.dit, self.plan, self.dtype = config, dit, plan, dtype
        self.networks = networks
        self.largest = max(
            (segment.window for segment in plan.segments), key=lambda window: window.num_frames
        )
        self.vae_bytes = weight_bytes(networks.vae.model)
        self.text_bytes = sum(p.numel() for p in networks.text.parameters()) * dtype.itemsize
        self.text_scratch = self._text_scratch()
        self.dit_scratch = _dit_scratch(
            config,
            dit,
            plan,
            dtype=dtype,
            batch=self.num_own if batches_branches(config) else 1,
            ranks=self.ranks,
        )
        self.decode_scratch, self.decoder_state = self._decoding()
        self.encode_scratch = self._encoding()

    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""
        made = [self._text(residence)]
        if self.encode_scratch:
            made.append(self._encode(residence))
        return [*made, self._denoise(residence), self._decode(residence)]

    def _text(self, residence: Residence) -> Stage:
        is_here = not residence.text_on_host
        return Stage(
            "text",
            (
                Part(
                    "the text encoder",
                    self.text_bytes * is_here,
                    "set text_on_host=true",
                ),
                Part("the image encoder", self.networks.vision_bytes, "use a smaller dtype"),
                Part("text activations", self.text_scratch * is_here, "set text_on_host=true"),
            ),
        )

    def _encode(self, residence: Residence) -> Stage:
        return Stage(
            "encode",
            (
                self._dit_weights(is_here=not residence.dit_aside),
                self._prompts(),
                Part("the VAE", self.vae_bytes, "use a larger GPU"),
                Part("VAE activations", self.encode_scratch, "lower height and width"),
                self._latents(),
            ),
        )

    def _denoise(self, residence: Residence) -> Stage:
        return Stage(
            "denoise",
            (
                self._dit_weights(is_here=True),
                self._prompts(),
                self._kv(residence),
                self._stored(),
                self._latents(),
                Part("activations", self._activations(), "lower causal_block_size, or the size"),
                self._scoring(residence),
                Part("the VAE", self.vae_bytes, "use a larger GPU"),
                self._decoder_meanwhile(residence),
            ),
        )

    def _decode(self, residence: Residence) -> Stage:
        return Stage(
            "decode",
            (
                self._dit_weights(is_here=not residence.dit_aside),
                self._prompts(),
                self._kv(residence),
                self._stored(),
                self._latents(),
                Part("the VAE", self.vae_bytes, "use a larger GPU"),
                Part("VAE activations", self.decode_scratch, "lower height and width"),
            ),
        )

    def _decoder_meanwhile(self, residence: Residence) -> Part:
        """Return what decoding needs while others are denoised: all, or what it keeps."""
        if self.overlaps and not residence.dit_aside:
            return Part("VAE activations", self.decode_scratch, "set overlap=false")
        return Part("VAE state", self.decoder_state, "lower height and width")

    # Parts ------------------------------------------------------------------------------------

    def _dit_weights(self, *, is_here: bool) -> Part:
        return Part(
            "the transformer", self.plan.weight_bytes * is_here, "use a smaller model or dtype"
        )

    def _prompts(self) -> Part:
        """Return the keys and values of the prompts in all layers, and of the start image."""
        dit = self.dit
        tokens = dit.text_len + (IMAGE_TOKENS if dit.model_type == "i2v" else 0)
        one = 2 * tokens * dit.dim * dit.num_layers * self.dtype.itemsize
        copies = 2 if batches_branches(self.config) and self.num_own > 1 else 1
        return Part("prompts", copies * self.num_own * one, "use a smaller model")

    def _kv(self, residence: Residence) -> Part:
        remedy = "set kv.compress=importance, or fewer num_frames"
        if not residence.kv_on_host:
            return Part("the KV cache", self.plan.kv_bytes, remedy)
        # the buffers stay as long as the window
        name = f"{PREFETCHED_LAYERS} layers of the KV cache"
        return Part(name, PREFETCHED_LAYERS * self._layer_bytes, remedy)

    @property
    def _layer_bytes(self) -> int:
        """Return the keys and values of one layer and branch."""
        return self.plan.kv_bytes // (self.dit.num_layers * self.num_own)

    def _scoring(self, residence: Residence) -> Part:
        """Return what compression adds: scores, kept rows; those of the host are read."""
        rows = 0
        if self.config.kv.compress != "none":
            rows = self._layer_bytes if residence.kv_on_host else self._layer_bytes // 2
        return Part("KV scoring", self.plan.scoring_bytes + rows, "set kv.queries=frame")

    def _stored(self) -> Part:
        own = self.plan.stored_bytes * self.num_own // self.plan.num_branches
        return Part("stored results", own, "set reuse.predict=velocity")

    def _latents(self) -> Part:
        config = self.config
        pixels = config.height * config.width
        latents = LATENT_COPIES * 4 * self.dit.out_dim * self.largest.num_frames
        rope = self.plan.frame_tokens * self.largest.num_frames * self.dit.head_width * 4
        shown = config.overlap_history or 0
        size = latents * pixels // VAE_STRIDE**2 + rope + shown * pixels * PIXEL_BYTES
        return Part("latents", size, "lower num_frames")

    def _activations(self) -> int:
        """Return what a tick holds beside weights and caches: all embedded tokens, one forward."""
        tokens = self.largest.num_frames * self.plan.frame_tokens
        embedded = tokens * self.dit.dim * self.dtype.itemsize
        modulation = 4 * 7 * self.dit.dim * self.largest.num_frames
        return embedded + modulation + self.dit_scratch

    # Traced -----------------------------------------------------------------------------------

    def _text_scratch(self) -> int:
        ids = torch.empty(
            2 if self.config.guidance > 1 else 1, self.dit.text_len, dtype=torch.int64, device=META
        )
        model = one_layer(self.networks.text).to(self.dtype)
        # without a mask: transformers would look at its values
        return scratch_bytes(lambda: model(input_ids=ids).last_hidden_state)

    def _latent(self, num_frames: int) -> torch.Tensor:
        height, width = self.config.height // VAE_STRIDE, self.config.width // VAE_STRIDE
        return torch.empty(1, self.dit.out_dim, num_frames, height, width, device=META)

    def _decoding(self) -> tuple[int, int]:
        """Return what the decoder holds at most, and between two chunks.

        One of several processes has a strip of the picture.
        """
        pixels = self.config.height * self.config.width * PIXEL_BYTES
        traced = 3  # from the third latent on every latent costs the same
        decoder = self.networks.vae.stream(self.ranks)

        def decode() -> None:
            for num_frames in (1, traced - 1):
                decoder.decode(self._latent(num_frames))

        peak = scratch_bytes(decode)
        state = decoder.state_bytes()
        # the frames of all chunks that become clean together
        ticks = sampling_of(self.config).ticks(self.largest)
        latents = max(sum(len(self.largest.chunks[c]) for c in t.finishing) for t in ticks)
        shown = vae.TEMPORAL_STRIDE * latents * pixels
        return peak + shown, state + shown

    def _encoding(self) -> int:
        """Return what the encoder holds at most, 0 if nothing is encoded."""
        config = self.config
        frames = [1] if config.image is not None or config.end_image is not None else []
        if self.dit.model_type == "i2v" and config.image is not None:
            frames.append(pixel_frames(self.largest.num_frames))
        if config.video is not None or len(self.plan.segments) > 1:
            frames.append(config.overlap_history or 1)
        if not frames:
            return 0
        shape = (1, 3, max(frames), config.height, config.width)
        return scratch_bytes(lambda: self.networks.vae.encode(torch.empty(shape, device=META)))


def _dit_scratch(
    config: RunConfig, dit: DiTConfig, plan: Plan, *, dtype: torch.dtype, batch: int, ranks: Ranks
) -> int:
    """Return what one forward holds beside weights and caches: one layer is as all.

    Args:
        batch: branches that go through the blocks together.
        ranks: the processes that divide the tokens.
    """
    frames = plan.forward_tokens // plan.frame_tokens
    size = (config.height // VAE_STRIDE, config.width // VAE_STRIDE)
    with META:
        model = DiT(replace(dit, num_layers=1)).to(dtype)
    tokens = frames * plan.frame_tokens
    caches = [
        caches_for(
            1,
            capacity=tokens,
            num_heads=dit.num_heads // ranks.sequence.size,
            head_width=dit.head_width,
            dtype=dtype,
            device=META,
        )
        for _ in range(batch)
    ]
    attend = whole_window(model.kernel)
    if config.attention != "full":
        attend = cached_attention(caches, active=[range(tokens)], kernel=model.kernel)
    image = None
    if dit.model_type == "i2v":
        image = torch.empty(1, IMAGE_TOKENS, dit.image_dim or 0, device=META)
    context = model.encode_context(torch.empty(1, dit.text_len, dit.text_dim, device=META), image)
    contexts = join_contexts([context] * batch)
    rope = torch.empty(tokens, dit.head_width // 2, 2, device=META)
    split = TokenSplit(ranks.sequence, frames, plan.frame_tokens)

    def forward() -> object:
        latents = torch.empty(batch, dit.in_dim, frames, *size, device=META)
        embedded = model.embed(
            latents, torch.empty(batch, frames, device=META), fps=[config.fps] * batch
        )
        own = Embedded(split.own(embedded.tokens, axis=1), embedded.time, embedded.modulation)
        hidden = split.whole(
            model.run_blocks(
                own, split.own(rope, axis=0), contexts, self_attend=split.over_heads(attend)
            )
        )
        velocity = model.velocity(hidden, embedded, latent_height=size[0], latent_width=size[1])
        return velocity, hidden - embedded.tokens

    return scratch_bytes(forward)


def plan_memory(
    config: RunConfig,
    dit: DiTConfig,
    plan: Plan,
    *,
    checkpoint: Checkpoint | None,
    dtype: torch.dtype,
    limit: int | None,
    has_host: bool = True,
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
    if checkpoint is None:
        networks = released_networks(dtype=dtype, is_i2v=dit.model_type == "i2v")
    else:
        networks = networks_of(checkpoint, dtype=dtype)
    layout = layout or Layout()
    overlaps = (has_host if config.overlap is None else config.overlap) and layout.size == 1
    needs = RunMemory(
        config, dit, plan, networks=networks, dtype=dtype, overlaps=overlaps, layout=layout
    )
    return make_memory_plan(
        needs.stages, wanted=wanted_residence(config), limit_bytes=limit, has_host=has_host
    )


def wanted_residence(config: RunConfig) -> Residence:
    """Return what the settings ask to be on the host."""
    return Residence(
        text_on_host=config.text_on_host,
        dit_aside=config.offload,
        kv_on_host=config.kv_on_host,
    )


def placed(config: RunConfig, residence: Residence) -> RunConfig:
    """Return the settings with things where a plan puts them."""
    return replace(
        config,
        text_on_host=residence.text_on_host,
        offload=residence.dit_aside,
        kv_on_host=residence.kv_on_host,
    )
