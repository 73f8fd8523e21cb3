"""The MAGI-1 diffusion transformer (4.5B and 24B; base, distilled and quantised), and its FLOPs.

Parameter names are the keys of the official checkpoints. Source of the architecture: the released
MAGI-1 code and checkpoints (arXiv 2505.13211).

Precision follows the released model. Weights and matrix products in the weight dtype (bf16 on a
GPU); embedders, rotation, gates times branch, the norms after a branch, the residual sums and the
output in float32.

Axes: B batch, C latent channels or head width, F latent frames, h/w latent rows/columns, N chunks,
S tokens (F * h/2 * w/2, frame-major), D model width, E condition width, H query heads,
G key/value heads, R text rows (B * N), L text tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import SDPA, Kernel
from flowcache.kv import Attend
from flowcache.runtime.compile import Compilation, compiled
from flowcache.runtime.offload import BlockStream, in_turn
from flowcache.runtime.ops import Linear, attention_flops, linear_flops, linear_in_float32
from flowcache.runtime.parallel import TokenSplit
from magi1.config import PROJECTION_GROUPS, ModelConfig
from magi1.fp8 import Fp8Linear, SmoothFp8Linear
from magi1.schedule import Clip, Clock, visible

GATE_CAP = 1.0
"""Gates are softly bounded by it, with tanh."""
ROPE_AXES = 3
REFERENCE_GRID = 256
"""Tokens of the latent frame to whose area rows and columns are scaled. Source: the release."""
BANDS_PER_HEAD_CHANNEL = 1 / 8
"""Rotary frequencies per axis and channel of a head (16 at the released head width 128)."""
BAND_BASE = 10000.0
SINUSOID_WIDTH = 256
SINUSOID_BASE = 10000.0
TIMESTEP_FACTOR = 1000.0
DROPPED_ROW, GIVEN_ROW = -1, -2
"""Rows of the null caption that tell the blocks whether the caption was dropped or given."""

_FLOAT32_PARTS = ("x_embedder", "t_embedder", "y_embedder", "rope", "final_linear")
_FLOAT32_NORMS = (
    "q_layernorm",
    "k_layernorm",
    "self_attn_post_norm",
    "mlp_post_norm",
    "final_layernorm",
)


# Layers -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of the text for one layer's cross-attention, `[R, L, G, C]`, made once."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    """Which tokens count, `[R, L]` bool; None: all."""


def sinusoid(t: Tensor, *, width: int) -> Tensor:
    """Embed timesteps as `[cos(1000 t f_k)..., sin(1000 t f_k)...]`, f_k = 10000^(-k / (width/2)).

    Args:
        t: timesteps, 0 (noise) to 1 (clean), or the step width of a distilled model; any shape.
        width: size of the embedding, even; the result is float32, `t.shape + [width]`.
    """
    half = width // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-torch.log(k.new_full((), SINUSOID_BASE)) * k / half)
    angle = t.float().unsqueeze(-1) * frequency * TIMESTEP_FACTOR
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_table(
    bands: Tensor, *, first_frame: int, num_frames: int, height: int, width: int
) -> Tensor:
    """Rotation angles of a grid of tokens, frame-major, then row, then column.

    Frames count from the start of the video. Rows and columns are centred and scaled so that a
    frame of any size and shape covers the area of a 16 x 16 one: with
    r = sqrt(height * width / 256) row i is at
    (i - (height-1)/2) / (height-1) * (height/r - 1). A single row is at 0.

    Args:
        bands: learned frequencies, `[K]` float32, used for every axis.
        height: token rows.
        width: token columns.

    Returns: float32 `[num_frames * height * width, 3 K, 2]`, cosine and sine.
    """
    ratio = (height * width / REFERENCE_GRID) ** 0.5

    def centred(size: int) -> Tensor:
        place = torch.arange(size, dtype=torch.float32, device=bands.device) - (size - 1) / 2
        return place if size == 1 else place / (size - 1) * (size / ratio - 1)

    frames = torch.arange(first_frame, first_frame + num_frames, device=bands.device).float()
    grid = torch.meshgrid(frames, centred(height), centred(width), indexing="ij")
    angles = torch.stack(grid, dim=-1).unsqueeze(-1) * bands.float()
    table = angles.flatten(-2).flatten(0, 2)
    return torch.stack([table.cos(), table.sin()], dim=-1)


def rotate(x_BSHC: Tensor, rope: Tensor) -> Tensor:
    """Rotate channel j with channel j + 3 K by the angles of `rope_table`; the rest stays as is."""
    pairs = rope.shape[1]
    first, second, rest = x_BSHC.split([pairs, pairs, x_BSHC.shape[-1] - 2 * pairs], dim=-1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], dim=-1)


class F32Linear(nn.Linear):
    """A linear layer that computes and returns float32 for weights of any type."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool = False) -> None:
        super().__init__(width_in, width_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear_in_float32(self, x)


def _plain_linear(width_in: int, width_out: int) -> nn.Linear:
    return Linear(width_in, width_out, bias=False)


class ZeroCentredLayerNorm(nn.Module):
    """Layer norm whose scale is stored less one; computed and returned in the weights' dtype."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        # the sum is rounded to the weights' dtype, as in the released model
        scale = self.weight + 1
        return functional.layer_norm(x.to(scale.dtype), scale.shape, scale, self.bias, self.eps)


class JointProjection(nn.Module):
    """The norm before attention and the queries, keys, values and text queries made of it."""

    def __init__(self, config: ModelConfig, *, is_fp8: bool) -> None:
        super().__init__()
        width, kv_width = config.hidden_size, config.num_query_groups * config.kv_channels
        make = Fp8Linear if is_fp8 else _plain_linear
        self.layer_norm = nn.LayerNorm(width, eps=config.layernorm_epsilon)
        self.q, self.qx = make(width, width), make(width, width)
        self.k, self.v = make(width, kv_width), make(width, kv_width)


class Attention(nn.Module):
    """Self-attention and cross-attention of the same tokens, joined by one projection."""

    def __init__(self, config: ModelConfig, *, is_fp8: bool) -> None:
        super().__init__()
        width, head, eps = config.hidden_size, config.kv_channels, config.layernorm_epsilon
        self.num_heads, self.num_groups = config.num_attention_heads, config.num_query_groups
        self.linear_qkv = JointProjection(config, is_fp8=is_fp8)
        self.linear_kv_xattn = _plain_linear(width, 2 * self.num_groups * head)
        self.linear_proj = (
            SmoothFp8Linear(2 * width, width) if is_fp8 else F32Linear(2 * width, width)
        )
        self.q_layernorm = ZeroCentredLayerNorm(head, eps=eps)
        self.k_layernorm = ZeroCentredLayerNorm(head, eps=eps)
        self.q_layernorm_xattn = ZeroCentredLayerNorm(head, eps=eps)
        self.k_layernorm_xattn = ZeroCentredLayerNorm(head, eps=eps)

    def encode(self, text_RLD: Tensor, mask_RL: Tensor | None) -> ContextKV:
        """Project the text; each key/value head has its key's channels before its value's."""
        k, v = self.linear_kv_xattn(text_RLD).unflatten(-1, (self.num_groups, -1)).chunk(2, dim=-1)
        return ContextKV(self.k_layernorm_xattn(k).to(v.dtype), v, mask_RL)

    def project(self, x_BSD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Make rotated queries and keys, values, and the queries for the text."""
        dtype, make = x_BSD.dtype, self.linear_qkv
        u = make.layer_norm(x_BSD)
        q = self.q_layernorm(make.q(u).unflatten(-1, (self.num_heads, -1)).float())
        k = self.k_layernorm(make.k(u).unflatten(-1, (self.num_groups, -1)).float())
        v = make.v(u).unflatten(-1, (self.num_groups, -1))
        qx = self.q_layernorm_xattn(make.qx(u).unflatten(-1, (self.num_heads, -1))).to(dtype)
        return rotate(q, rope).to(dtype), rotate(k, rope).to(dtype), v, qx


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them, or the gated form of the 24B models."""

    def __init__(self, config: ModelConfig, *, is_fp8: bool) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.ffn_hidden_size
        self.is_gated = config.gated_linear_unit
        self.layer_norm = nn.LayerNorm(width, eps=config.layernorm_epsilon)
        wide = 2 * inner if self.is_gated else inner
        self.has_gelu = is_fp8 and not self.is_gated  # else it is part of the first layer
        first = Linear(width, wide, bias=False, gelu=None if self.is_gated else "none")
        self.linear_fc1 = Fp8Linear(width, wide) if is_fp8 else first
        self.linear_fc2 = (SmoothFp8Linear if is_fp8 else _plain_linear)(inner, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y = self.linear_fc1(self.layer_norm(x_BSD))
        if self.is_gated:
            gate, value = y.chunk(2, dim=-1)
            y = functional.silu(gate) * value
        elif self.has_gelu:
            y = functional.gelu(y)
        return self.linear_fc2(y)


class Gates(nn.Module):
    """One gate vector per chunk for each of the two branches of a layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.proj = nn.Sequential(nn.Linear(config.condition_width, 2 * config.hidden_size))

    def forward(self, condition_BNE: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.proj(functional.silu(condition_BNE))
        gates = (GATE_CAP * torch.tanh(raw.float() / GATE_CAP)).to(raw.dtype)
        attention, mlp = gates.chunk(2, dim=-1)
        return attention, mlp


class Layer(nn.Module):
    """One transformer layer: joint attention, then MLP, each gated, normed and added."""

    def __init__(self, config: ModelConfig, *, is_fp8: bool = False) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layernorm_epsilon
        self.ada_modulate_layer = Gates(config)
        self.self_attention = Attention(config, is_fp8=is_fp8)
        self.self_attn_post_norm = ZeroCentredLayerNorm(width, eps=eps)
        self.mlp = MLP(config, is_fp8=is_fp8)
        self.mlp_post_norm = ZeroCentredLayerNorm(width, eps=eps)

    def forward(
        self,
        x_BSD: Tensor,
        condition_BNE: Tensor,
        rope: Tensor,
        context: ContextKV,
        *,
        layer: int,
        self_attend: Attend,
        kernel: Kernel,
        parts: "LayerParts",
    ) -> Tensor:
        q, k, v, qx = parts.before(self, x_BSD, rope)
        core = self_attend(layer, q, k, v)
        cross = attend_to_text(qx, context, kernel=kernel)
        return parts.after(self, x_BSD, core, cross, condition_BNE)


def before_attention(
    layer: Layer, x_BSD: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Make a layer's queries, keys and values, and its queries for the text."""
    return layer.self_attention.project(x_BSD, rope)


def after_attention(
    layer: Layer, x_BSD: Tensor, core_BSHC: Tensor, cross_BSHC: Tensor, condition_BNE: Tensor
) -> Tensor:
    """Join both attentions, then the MLP; each is gated, normed and added."""
    gate_attention, gate_mlp = layer.ada_modulate_layer(condition_BNE)
    joined = interleave(core_BSHC.flatten(2), cross_BSHC.flatten(2))
    y = layer.self_attention.linear_proj(joined)
    x_BSD = add_gated(x_BSD, y, gate_attention, norm=layer.self_attn_post_norm)
    return add_gated(x_BSD, layer.mlp(x_BSD), gate_mlp, norm=layer.mlp_post_norm)


@dataclass(frozen=True)
class LayerParts:
    """A layer's work before and after its attention, each part plain or compiled."""

    before: Callable[[Layer, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]] = (
        before_attention
    )
    after: Callable[[Layer, Tensor, Tensor, Tensor, Tensor], Tensor] = after_attention
    compilation: Compilation | None = None
    """How compiling went; None: nothing is compiled."""


def compiled_parts() -> LayerParts:
    """Return the parts of a layer, compiled once for all layers of a kind and all lengths."""
    together = Compilation()
    return LayerParts(
        compiled(before_attention, lengths=(1, 0), together=together),
        compiled(after_attention, lengths=(1, 1, 1, None), together=together),
        together,
    )


def attend_to_text(q_BSHC: Tensor, context: ContextKV, *, kernel: Kernel) -> Tensor:
    """Let every chunk's queries attend to its text, or to the only one; without text: zeros."""
    rows = max(len(context.k), len(q_BSHC))
    q_RSHC = q_BSHC.reshape(rows, -1, *q_BSHC.shape[2:])
    k, v = (kv.expand(rows, -1, -1, -1) for kv in (context.k, context.v))
    if k.shape[1] == 0:
        return torch.zeros_like(q_BSHC)
    if context.mask is None:
        return kernel(q_RSHC, k, v).reshape(q_BSHC.shape)
    out_RHSC = functional.scaled_dot_product_attention(
        q_RSHC.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=context.mask[:, None, None],
        enable_gqa=True,
    )
    is_empty_R111 = ~context.mask.any(dim=1)[:, None, None, None]
    return out_RHSC.masked_fill(is_empty_R111, 0).transpose(1, 2).reshape(q_BSHC.shape)


def interleave(core_BSD: Tensor, cross_BSD: Tensor) -> Tensor:
    """Join the outputs of self- and cross-attention, group by group: `[B, S, 2 D]`.

    With 2 groups instead of 8, `[a b c d]` and `[e f g h]` become `[a b e f c d g h]`.
    """
    parts = [x.unflatten(-1, (PROJECTION_GROUPS, -1)) for x in (core_BSD, cross_BSD)]
    return torch.stack(parts, dim=-2).flatten(-3)


def add_gated(
    x_BSD: Tensor, y_BSD: Tensor, gate_BND: Tensor, *, norm: ZeroCentredLayerNorm
) -> Tensor:
    """Return `x + norm(y * gate)`, computed in float32, in the dtype of x."""
    y_BNPD = y_BSD.float().unflatten(1, (gate_BND.shape[1], -1))
    normed = norm((y_BNPD * gate_BND.float().unsqueeze(2)).flatten(1, 2))
    return (x_BSD.float() + normed).to(x_BSD.dtype)


# The transformer ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """Tokens of some chunks and the condition that gates them."""

    tokens: Tensor
    """`[B, S, D]`, weight dtype."""
    condition: Tensor
    """`[B, N, E]`, weight dtype."""


class TimestepEmbedder(nn.Module):
    """Sinusoid and two linear layers, in float32 from a sinusoid rounded to the weight dtype."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            F32Linear(SINUSOID_WIDTH, width, bias=True),
            nn.SiLU(),
            F32Linear(width, width, bias=True),
        )

    def forward(self, t: Tensor, *, dtype: torch.dtype) -> Tensor:
        return self.mlp(sinusoid(t, width=SINUSOID_WIDTH).to(dtype))


class CaptionEmbedder(nn.Module):
    """The text for cross-attention, and the learned null caption."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.caption_channels
        self.null_caption_embedding = nn.Parameter(
            torch.randn(config.caption_max_length, channels) / channels**0.5
        )
        self.y_proj_xattn = nn.Sequential(
            F32Linear(channels, config.hidden_size, bias=True), nn.SiLU()
        )
        self.y_proj_adaln = nn.Sequential(F32Linear(channels, config.condition_width, bias=True))


class Rope(nn.Module):
    """The learned rotary frequencies, one set for all axes."""

    def __init__(self, head_width: int) -> None:
        super().__init__()
        num_bands = int(head_width * BANDS_PER_HEAD_CHANNEL)
        self.bands = nn.Parameter(BAND_BASE ** (-torch.arange(num_bands) / num_bands))


class Layers(nn.Module):
    """All transformer layers and the norm behind them."""

    def __init__(self, config: ModelConfig, *, is_fp8: bool) -> None:
        super().__init__()
        last = config.num_layers - 1
        self.layers = nn.ModuleList(
            Layer(config, is_fp8=is_fp8 and 0 < index < last) for index in range(config.num_layers)
        )
        self.final_layernorm = ZeroCentredLayerNorm(
            config.hidden_size, eps=config.layernorm_epsilon
        )


class FinalLinear(nn.Module):
    """Projection of tokens to patches of the velocity."""

    def __init__(self, width: int, *, out_width: int) -> None:
        super().__init__()
        self.linear = F32Linear(width, out_width)


class DiT(nn.Module):
    """The transformer, in the three parts that caching needs: `embed`, `run_blocks`, `velocity`.

    Args:
        is_fp8: whether all layers but the first and the last are 8-bit (quantised checkpoints).
    """

    def __init__(self, config: ModelConfig, *, is_fp8: bool = False, kernel: Kernel = SDPA) -> None:
        super().__init__()
        self.config = config
        self.kernel = self.cross_kernel = kernel
        self.parts = LayerParts()
        self.stream: BlockStream | None = None
        """Brings the layers that do not stay on the device; None: all stay."""
        self.patch = (config.t_patch_size, config.patch_size, config.patch_size)
        volume = config.t_patch_size * config.patch_size**2
        self.x_embedder = nn.Conv3d(
            config.in_channels, config.hidden_size, self.patch, stride=self.patch, bias=False
        )
        self.t_embedder = TimestepEmbedder(config.condition_width)
        self.y_embedder = CaptionEmbedder(config)
        self.rope = Rope(config.kv_channels)
        self.videodit_blocks = Layers(config, is_fp8=is_fp8)
        self.final_linear = FinalLinear(config.hidden_size, out_width=volume * config.out_channels)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights inside the blocks (8-bit ones aside)."""
        return self._layers[0].self_attention.linear_kv_xattn.weight.dtype

    @property
    def _layers(self) -> list[Layer]:
        return cast("list[Layer]", list(self.videodit_blocks.layers))

    @property
    def null_caption(self) -> Tensor:
        """The learned text without content, `[L, caption_channels]` float32."""
        return self.y_embedder.null_caption_embedding.float()

    def embed(
        self, x_BCFhw: Tensor, t_BN: Tensor, *, is_null: bool, step_width: float | None = None
    ) -> Embedded:
        """Turn latent frames and their chunks' timesteps into tokens and gate conditions.

        Args:
            t_BN: timesteps, 0 (noise) to 1 (clean), one per chunk.
            is_null: whether the caption counts as dropped.
            step_width: step size of a distilled model, see `magi1.schedule.step_width`.
        """
        x = x_BCFhw.float() * self.config.x_rescale_factor
        if self.config.half_channel_vae:
            x = torch.cat([x, x], dim=1)
        patches = nn.functional.conv3d(x, self.x_embedder.weight.float(), stride=self.patch)
        tokens = rearrange(patches.to(self.dtype), "B D F h w -> B (F h w) D")
        condition = self.t_embedder(t_BN, dtype=self.dtype)
        if step_width is not None:
            width = torch.full((), step_width, device=t_BN.device)
            condition = condition + self.t_embedder(width, dtype=self.dtype)
        row = self.null_caption[DROPPED_ROW if is_null else GIVEN_ROW]
        condition = condition + self.y_embedder.y_proj_adaln(row)
        return Embedded(tokens, condition.to(self.dtype))

    def encode_context(self, text_RLC: Tensor, mask_RL: Tensor | None = None) -> list[ContextKV]:
        """Compute every layer's cross-attention keys and values, once per text.

        Args:
            text_RLC: text features, one row per chunk, or one for all chunks of the batch.
            mask_RL: which tokens count (bool); None: all.
        """
        text_RLD = self.y_embedder.y_proj_xattn(text_RLC).to(self.dtype)
        layers = in_turn(self._layers, self.stream)
        return [layer.self_attention.encode(text_RLD, mask_RL) for layer in layers]

    def rope_table(
        self, *, first_frame: int, num_frames: int, latent_height: int, latent_width: int
    ) -> Tensor:
        """Rotary angles of latent frames counted from the start of the video."""
        return rope_table(
            self.rope.bands,
            first_frame=first_frame,
            num_frames=num_frames,
            height=latent_height // self.patch[1],
            width=latent_width // self.patch[2],
        )

    def run_blocks(
        self,
        embedded: Embedded,
        rope: Tensor,
        context: Sequence[ContextKV],
        *,
        self_attend: Attend,
    ) -> Tensor:
        """Run all layers on the tokens: `[B, S, D]` in, `[B, S, D]` out.

        Args:
            rope: angles of these tokens, from `rope_table`.
            self_attend: decides what the tokens may see.
        """
        x = embedded.tokens
        for index, layer in enumerate(in_turn(self._layers, self.stream)):
            x = layer(
                x,
                embedded.condition,
                rope,
                context[index],
                layer=index,
                self_attend=self_attend,
                kernel=self.cross_kernel,
                parts=self.parts,
            )
        return x

    def hidden(
        self,
        x_BCFhw: Tensor,
        t_BN: Tensor,
        context: Sequence[ContextKV],
        *,
        first_frame: int,
        self_attend: Attend,
        is_null: bool = False,
        step_width: float | None = None,
        split: TokenSplit | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Send neighbouring chunks through the embedding and all layers: `[B, S, D]`.

        Args:
            t_BN: see `embed`, as are `is_null` and `step_width`.
            first_frame: where they start, in latent frames from the start of the video.
            split: which tokens this process computes; None: all.
            rows: tokens that go through the layers, the others stay as embedded; None: all.
        """
        num_frames, height, width = x_BCFhw.shape[2:]
        embedded = self.embed(x_BCFhw, t_BN, is_null=is_null, step_width=step_width)
        rope = self.rope_table(
            first_frame=first_frame,
            num_frames=num_frames,
            latent_height=height,
            latent_width=width,
        )
        if rows is not None:
            some = Embedded(embedded.tokens[:, rows], embedded.condition)
            made = self.run_blocks(some, rope[rows], context, self_attend=self_attend)
            return embedded.tokens.index_copy(1, rows, made)
        if split is None:
            return self.run_blocks(embedded, rope, context, self_attend=self_attend)
        hidden = self.run_blocks(
            Embedded(split.scatter(embedded.tokens, axis=1), embedded.condition),
            split.scatter(rope, axis=0),
            context,
            self_attend=split.over_heads(self_attend),
        )
        return split.gather(hidden)

    def velocity(self, hidden_BSD: Tensor, *, latent_height: int, latent_width: int) -> Tensor:
        """Read the velocity (data minus noise) out of the last layer: float32 `[B, C, F, h, w]`."""
        patches = self.final_linear.linear(self.videodit_blocks.final_layernorm(hidden_BSD))
        out = rearrange(
            patches,
            "B (F h w) (r p q C) -> B C (F r) (h p) (w q)",
            h=latent_height // self.patch[1],
            w=latent_width // self.patch[2],
            r=self.patch[0],
            p=self.patch[1],
            q=self.patch[2],
        )
        return out[:, : self.config.latent_channels] / self.config.x_rescale_factor

    def forward(
        self,
        x_BCFhw: Tensor,
        t_BN: Tensor,
        text_RLC: Tensor,
        *,
        mask_RL: Tensor | None = None,
        is_null: bool = False,
        step_width: float | None = None,
        first_frame: int = 0,
        self_attend: Attend | None = None,
    ) -> Tensor:
        """Predict the velocity of neighbouring chunks in one pass (training, tests).

        Args:
            text_RLC: text of every chunk of every batch item, or one row for all.
            self_attend: default: a chunk sees itself and those before it.
        """
        hidden = self.hidden(
            x_BCFhw,
            t_BN,
            self.encode_context(text_RLC, mask_RL),
            first_frame=first_frame,
            self_attend=self_attend or block_causal(self.kernel, num_chunks=t_BN.shape[1]),
            is_null=is_null,
            step_width=step_width,
        )
        height, width = x_BCFhw.shape[-2:]
        return self.velocity(hidden, latent_height=height, latent_width=width)

    @torch.no_grad()
    def compile_ahead(self, *, num_tokens: int) -> None:
        """Send zeros through the parts of a layer, so that `run_blocks` finds them compiled.

        Args:
            num_tokens: of a chunk, in this process; kernels are chosen by the first length that
                they see.
        """
        config, bands = self.config, self.rope.bands
        x = torch.zeros(1, num_tokens, config.hidden_size, dtype=self.dtype, device=bands.device)
        condition = x.new_zeros(1, 1, config.condition_width)
        rope = torch.zeros(num_tokens, ROPE_AXES * len(bands), 2, device=bands.device)
        # the first layer is never 8-bit, the second is if any is
        for layer in in_turn(self._layers[:2], self.stream):
            q, _, _, qx = self.parts.before(layer, x, rope)
            self.parts.after(layer, x, q, qx, condition)


def block_causal(kernel: Kernel, *, num_chunks: int) -> Attend:
    """Let every chunk attend to itself and to all chunks before it."""

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // num_chunks
        stops = range(size, q.shape[1] + 1, size)
        parts = [kernel(q[:, stop - size : stop], k[:, :stop], v[:, :stop]) for stop in stops]
        return torch.cat(parts, dim=1)

    return attend


def is_float32(name: str) -> bool:
    """Tell whether a parameter is kept in float32: embedders, output, norms (but text's)."""
    parts = name.split(".")
    return parts[0] in _FLOAT32_PARTS or parts[-2] in _FLOAT32_NORMS


def set_precision(dit: DiT, dtype: torch.dtype) -> None:
    """Convert all parameters to the released model's mix of float32 and `dtype`, in place.

    8-bit weights and their scales stay as they are.
    """
    for name, parameter in dit.named_parameters():
        if not isinstance(dit.get_submodule(name.rpartition(".")[0]), Fp8Linear):
            parameter.data = parameter.data.to(torch.float32 if is_float32(name) else dtype)


def quantised_parts(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the parts of layers whose linear layers can be 8-bit: attention and MLP.

    Gates multiply all that a branch adds, and are small; the released 8-bit checkpoints leave them
    as they are, too.
    """
    whole = cast("Iterable[Layer]", layers)
    return [part for layer in whole for part in (layer.self_attention, layer.mlp)]


# FLOPs, equal to what torch's counter counts ------------------------------------------------------


def embed_flops(config: ModelConfig, *, tokens: int, is_distilled: bool) -> int:
    """FLOPs of the patch, timestep and caption embeddings of one chunk.

    Args:
        is_distilled: whether the step size is embedded, too.
    """
    width = config.condition_width
    patch = config.in_channels * config.t_patch_size * config.patch_size**2
    timestep = linear_flops(1, d_in=SINUSOID_WIDTH, d_out=width) + linear_flops(
        1, d_in=width, d_out=width
    )
    return (
        linear_flops(tokens, d_in=patch, d_out=config.hidden_size)
        + timestep * (2 if is_distilled else 1)
        + linear_flops(1, d_in=config.caption_channels, d_out=width)
    )


def context_flops(config: ModelConfig, *, text: int) -> int:
    """FLOPs of one text's projection to every layer's cross-attention keys and values."""
    width, kv_width = config.hidden_size, config.num_query_groups * config.kv_channels
    flops = linear_flops(text, d_in=config.caption_channels, d_out=width)
    return flops + config.num_layers * linear_flops(text, d_in=width, d_out=2 * kv_width)


def block_flops(config: ModelConfig, *, queries: int, keys: int, text: int) -> int:
    """FLOPs of all layers for one chunk of `queries` tokens.

    Args:
        keys: tokens that self-attention sees, own ones included.
        text: tokens that cross-attention sees.
    """
    width = config.hidden_size
    gates = linear_flops(1, d_in=config.condition_width, d_out=2 * width)
    cross = attention_flops(queries, keys=text, width=width)
    published = published_block_flops(config, queries=queries, keys=keys)
    return published + config.num_layers * (gates + cross)


def head_flops(config: ModelConfig, *, queries: int) -> int:
    """FLOPs of the projection of tokens to latent patches."""
    patch = config.out_channels * config.t_patch_size * config.patch_size**2
    return linear_flops(queries, d_in=config.hidden_size, d_out=patch)


def published_block_flops(config: ModelConfig, *, queries: int, keys: int) -> int:
    """FLOPs of all layers as published: without cross-attention's products and the gates.

    A chunk of 12,150 tokens of the 4.5B model: 98.76 TFLOPs and 61.68 per chunk that it sees.
    """
    width, kv_width = config.hidden_size, config.num_query_groups * config.kv_channels
    inner = config.ffn_hidden_size
    per_layer = linear_flops(queries, d_in=width, d_out=2 * width + 2 * kv_width)
    per_layer += attention_flops(queries, keys=keys, width=width)
    per_layer += linear_flops(queries, d_in=2 * width, d_out=width)
    per_layer += linear_flops(
        queries, d_in=width, d_out=inner * (2 if config.gated_linear_unit else 1)
    )
    per_layer += linear_flops(queries, d_in=inner, d_out=width)
    return config.num_layers * per_layer


def published_clip_flops(
    config: ModelConfig, *, clip: Clip, clock: Clock, chunk_tokens: int, nearly_clean_pass: bool
) -> int:
    """FLOPs of one clip by a distilled model as the FlowCache paper counts its baselines.

    Clean passes are left out. 240 frames of 720 x 720 in 64 steps: 306.0 PFLOPs where all chunks
    are seen, 280.3 without the nearly-clean pass, 181.6 also with windows of 5, 4, 3 and 2 chunks.
    """
    flops = 0
    for tick in clock.ticks(clip):
        for chunk, step in tick.steps.items():
            keys = len(visible(chunk, clock.reach(step))) * chunk_tokens
            flops += published_block_flops(config, queries=chunk_tokens, keys=keys)
        if nearly_clean_pass and clock.is_nearly_clean(tick.steps[min(tick.steps)]):
            flops += published_block_flops(config, queries=chunk_tokens, keys=chunk_tokens)
    return flops
