"""The pieces of a MAGI-1 layer: self- and cross-attention side by side, norms after each branch.

Precision follows the released model. Weights and matrix products in the weight dtype (bf16 on a
GPU); rotation, gates times branch, the norms after a branch and the residual sums in float32.

Axes: B batch, N chunks, S tokens (N * tokens of a chunk), D model width, E condition width,
H query heads, G key/value heads, C head width, R text rows (B * N), L text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import Kernel
from flowcache.runtime.compile import Compilation, compiled
from flowcache.runtime.ops import linear_in_float32
from magi1.config import PROJECTION_GROUPS, ModelConfig
from magi1.fp8 import Fp8Linear, SmoothFp8Linear

SelfAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q, k, v) -> out`: q and out `[B, S, H, C]`, k and v `[B, S, G, C]`.

What a chunk may see is the caller's choice.
"""

GATE_CAP = 1.0
"""Gates are softly bounded by it, with tanh."""
ROPE_AXES = 3
REFERENCE_GRID = 256
"""Tokens of the latent frame to whose area rows and columns are scaled. Source: the release."""
SINUSOID_BASE = 10000.0
TIMESTEP_FACTOR = 1000.0


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of the text for one layer's cross-attention, one row per chunk.

    They don't depend on the timestep, so one run computes them once. `[R, L, G, C]`.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    """Which tokens count, `[R, L]` bool; None: all."""


def sinusoid(t: Tensor, *, width: int) -> Tensor:
    """Embed timesteps as `[cos(1000 t f_k)..., sin(1000 t f_k)...]`, f_k = 10000^(-k / (width/2)).

    Args:
        t: timesteps, 0 (noise) to 1 (clean), or the step width of a distilled model; any shape.
        width: size of the embedding, even.

    Returns: float32, `t.shape + [width]`.
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
    r = sqrt(height * width / 256) row i stands at
    (i - (height-1)/2) / (height-1) * (height/r - 1). A single row stands at 0.

    Args:
        bands: learned frequencies, `[K]` float32, used for every axis.
        height: token rows. width: token columns.

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
    """A linear layer that computes and returns float32 whatever its weights are stored in."""

    def __init__(self, width_in: int, width_out: int, *, bias: bool = False) -> None:
        super().__init__(width_in, width_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return linear_in_float32(self, x)


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
        """Project the text once; `forward` uses the result at every step.

        Each key/value head has its key's channels before its value's.
        """
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
        make = Fp8Linear if is_fp8 else _plain_linear
        self.linear_fc1 = make(width, 2 * inner if self.is_gated else inner)
        self.linear_fc2 = (SmoothFp8Linear if is_fp8 else _plain_linear)(inner, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        y = self.linear_fc1(self.layer_norm(x_BSD))
        if self.is_gated:
            gate, value = y.chunk(2, dim=-1)
            y = functional.silu(gate) * value
        else:
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
        self_attend: SelfAttend,
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
    """A layer's work before and after its attention, each part as it is or compiled."""

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


def _plain_linear(width_in: int, width_out: int) -> nn.Linear:
    return nn.Linear(width_in, width_out, bias=False)


def attend_to_text(q_BSHC: Tensor, context: ContextKV, *, kernel: Kernel) -> Tensor:
    """Let every chunk's queries attend to that chunk's text; a chunk without text gets zeros.

    One row of text serves all chunks.
    """
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
