"""The pieces of a SkyReels-V2 block.

Precision follows the released model: weights and matrix products in the weight dtype (bf16 on a
GPU); norms, modulation, rotation and the residual sums inside a block in float32.

Axes: B batch, S tokens, F latent frames, P tokens of one frame (S = F * P), D model width,
H heads, C head width, L context tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import Kernel
from flowcache.runtime.compile import Compilation, compiled

SelfAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q, k, v) -> out`, all `[B, S, H, C]`: what a chunk may see is the caller's choice."""

ROPE_THETA = 10000.0


@dataclass(frozen=True)
class ContextKV:
    """Keys and values of the prompt (and the start image) for one layer's cross-attention.

    They don't depend on the timestep, so one run computes them once. `[B, L, H, C]`.
    """

    k: Tensor
    v: Tensor
    k_img: Tensor | None = None
    v_img: Tensor | None = None


def join_contexts(branches: Sequence[Sequence[ContextKV]]) -> list[ContextKV]:
    """Put the contexts of several branches (one list of layers each) into one batch."""

    def join(parts: Sequence[Tensor | None]) -> Tensor | None:
        present = [part for part in parts if part is not None]
        return torch.cat(present) if present else None

    return [
        ContextKV(
            torch.cat([c.k for c in layer]),
            torch.cat([c.v for c in layer]),
            join([c.k_img for c in layer]),
            join([c.v_img for c in layer]),
        )
        for layer in zip(*branches, strict=True)
    ]


def sinusoid(t: Tensor, *, width: int) -> Tensor:
    """Embed timesteps as `[cos(t f_j)..., sin(t f_j)...]`, f_j = 10000^(-j / (width/2)).

    Args:
        t: timesteps in 0..1000, any shape.
        width: size of the embedding, even.

    Returns: float64, `t.shape + [width]`.
    """
    half = width // 2
    j = torch.arange(half, dtype=torch.float64, device=t.device)
    angle = t.to(torch.float64).unsqueeze(-1) * ROPE_THETA ** (-j / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_table(frames: Tensor, *, height: int, width: int, head_width: int) -> Tensor:
    """Rotation angles of a grid of tokens, frame-major, then row, then column.

    The head's channel pairs are divided among frame, row and column: `head_width // 6` pairs each
    for row and column, the rest for the frame (22, 21, 21 of 64 at the released head width 128).

    Args:
        frames: positions of the latent frames inside the window, `[F]`.
        height: token rows. width: token columns.

    Returns: float32 `[F * height * width, head_width // 2, 2]`, cosine and sine.
    """
    pairs_hw = head_width // 6
    pairs_f = head_width // 2 - 2 * pairs_hw
    device = frames.device

    def angles(position: Tensor, pairs: int) -> Tensor:
        j = torch.arange(pairs, dtype=torch.float64, device=device)
        return position.to(torch.float64).unsqueeze(-1) * ROPE_THETA ** (-j / pairs)

    num = len(frames)
    by_frame = angles(frames, pairs_f)[:, None, None].expand(num, height, width, -1)
    rows = angles(torch.arange(height, device=device), pairs_hw)[None, :, None]
    columns = angles(torch.arange(width, device=device), pairs_hw)[None, None, :]
    shape = (num, height, width, -1)
    table = torch.cat([by_frame, rows.expand(shape), columns.expand(shape)], dim=-1).flatten(0, 2)
    return torch.stack([table.cos(), table.sin()], dim=-1).float()


def rotate(x_BSHC: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs (2j, 2j+1) by the angles of `rope_table`, in float32."""
    even, odd = x_BSHC.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None, :, 0], rope[:, None, :, 1]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed and returned in float32."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)


class LayerNormF32(nn.LayerNorm):
    """Affine layer norm, computed and returned in float32."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return functional.layer_norm(
            input.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )


class SelfAttention(nn.Module):
    """Self-attention: RMS norm of q and k over the whole width, then rotary positions."""

    def __init__(self, dim: int, *, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, eps=eps), RMSNorm(dim, eps=eps)

    def split(self, x_BSD: Tensor) -> Tensor:
        """Divide the width among the heads: `[B, S, H, C]`."""
        return x_BSD.unflatten(-1, (self.num_heads, -1))

    def project(self, x_BSD: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Make rotated queries and keys, and values, `[B, S, H, C]`."""
        dtype = x_BSD.dtype
        q = rotate(self.split(self.norm_q(self.q(x_BSD))), rope).to(dtype)
        k = rotate(self.split(self.norm_k(self.k(x_BSD))), rope).to(dtype)
        return q, k, self.split(self.v(x_BSD))


class CrossAttention(SelfAttention):
    """Attention to the prompt's tokens and, for I2V models, to the start image's tokens."""

    def __init__(self, dim: int, *, num_heads: int, eps: float, has_image: bool) -> None:
        super().__init__(dim, num_heads=num_heads, eps=eps)
        if has_image:
            self.k_img, self.v_img = nn.Linear(dim, dim), nn.Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps=eps)

    def encode(self, text_BLD: Tensor, image_BLD: Tensor | None) -> ContextKV:
        """Project the context once; `forward` uses the result at every step."""
        dtype = text_BLD.dtype
        k = self.split(self.norm_k(self.k(text_BLD))).to(dtype)
        v = self.split(self.v(text_BLD))
        if image_BLD is None:
            return ContextKV(k, v)
        k_img = self.split(self.norm_k_img(self.k_img(image_BLD))).to(dtype)
        return ContextKV(k, v, k_img, self.split(self.v_img(image_BLD)))

    def query(self, x_BSD: Tensor) -> Tensor:
        """Make queries `[B, S, H, C]`."""
        return self.split(self.norm_q(self.q(x_BSD))).to(x_BSD.dtype)


def attend_to_context(q_BSHC: Tensor, context: ContextKV, *, kernel: Kernel) -> Tensor:
    """Attend to the prompt and, where there is one, to the start image."""
    out = kernel(q_BSHC, context.k, context.v)
    if context.k_img is not None and context.v_img is not None:
        out = out + kernel(q_BSHC, context.k_img, context.v_img)
    return out


class Block(nn.Module):
    """One transformer layer: modulated self-attention, cross-attention, modulated MLP."""

    def __init__(
        self, dim: int, *, ffn_dim: int, num_heads: int, eps: float, has_image: bool
    ) -> None:
        super().__init__()
        self.eps = eps
        self.self_attn = SelfAttention(dim, num_heads=num_heads, eps=eps)
        self.norm3 = LayerNormF32(dim, eps=eps)
        self.cross_attn = CrossAttention(dim, num_heads=num_heads, eps=eps, has_image=has_image)
        self.ffn = nn.Sequential(
            nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x_BSD: Tensor,
        e0_BF6D: Tensor,
        rope: Tensor,
        context: ContextKV,
        *,
        layer: int,
        self_attend: SelfAttend,
        kernel: Kernel,
        parts: "BlockParts",
    ) -> Tensor:
        q, k, v = parts.before(self, x_BSD, e0_BF6D, rope)
        x, q = parts.between(self, x_BSD, self_attend(layer, q, k, v), e0_BF6D)
        out = attend_to_context(q, context, kernel=kernel)
        return parts.after(self, x, out, e0_BF6D).to(x_BSD.dtype)

    def modulators(self, e0_BF6D: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of attention, then of the MLP: `[B, F, 1, D]` each."""
        return (self.modulation.float() + e0_BF6D).unsqueeze(3).unbind(2)


def before_attention(
    block: Block, x_BSD: Tensor, e0_BF6D: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make a block's queries, keys and values."""
    shift, scale, *_ = block.modulators(e0_BF6D)
    a = modulate(x_BSD, shift, scale, num_frames=e0_BF6D.shape[1], eps=block.eps)
    return block.self_attn.project(a.to(x_BSD.dtype), rope)


def between_attentions(
    block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    """Add self-attention to the residual stream (float32); make queries for the context."""
    gate = block.modulators(e0_BF6D)[2]
    y = block.self_attn.o(out_BSHC.flatten(2))
    x = add_gated(x_BSD.float(), y, gate, num_frames=e0_BF6D.shape[1])
    return x, block.cross_attn.query(block.norm3(x).to(x_BSD.dtype))


def after_attention(block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor) -> Tensor:
    """Add cross-attention and the MLP to the residual stream, float32."""
    shift, scale, gate = block.modulators(e0_BF6D)[3:]
    num_frames = e0_BF6D.shape[1]
    x = x_BSD + block.cross_attn.o(out_BSHC.flatten(2)).float()
    a = modulate(x, shift, scale, num_frames=num_frames, eps=block.eps).to(out_BSHC.dtype)
    return add_gated(x, block.ffn(a), gate, num_frames=num_frames)


@dataclass(frozen=True)
class BlockParts:
    """A block's work around its two attentions, each part as it is or compiled."""

    before: Callable[[Block, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = (
        before_attention
    )
    between: Callable[[Block, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = between_attentions
    after: Callable[[Block, Tensor, Tensor, Tensor], Tensor] = after_attention
    compilation: Compilation | None = None
    """How compiling went; None: nothing is compiled."""


def compiled_parts() -> BlockParts:
    """Return the parts of a block, compiled once for all blocks and lengths."""
    together = Compilation()
    return BlockParts(
        compiled(before_attention, lengths=(1, 1, 0), together=together),
        compiled(between_attentions, lengths=(1, 1, 1), together=together),
        compiled(after_attention, lengths=(1, 1, 1), together=together),
        together,
    )


def modulate(
    x_BSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, *, num_frames: int, eps: float
) -> Tensor:
    """Layer-normalise, then scale by `1 + scale` and shift, one pair of vectors per frame."""
    normed = functional.layer_norm(x_BSD.float(), x_BSD.shape[-1:], eps=eps)
    normed_BFPD = normed.unflatten(1, (num_frames, -1))
    return torch.addcmul(shift_BF1D, normed_BFPD, 1 + scale_BF1D).flatten(1, 2)


def add_gated(x_BSD: Tensor, y_BSD: Tensor, gate_BF1D: Tensor, *, num_frames: int) -> Tensor:
    """Add `y * gate` to the float32 residual stream, one gate per frame."""
    y_BFPD = y_BSD.float().unflatten(1, (num_frames, -1))
    return torch.addcmul(x_BSD.unflatten(1, (num_frames, -1)), y_BFPD, gate_BF1D).flatten(1, 2)
