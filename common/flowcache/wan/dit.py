"""The Wan 2.1 video transformer, in the parts that caching needs, and what each costs.

A video model on Wan's backbone makes tokens of latent frames (`DiT.embed`), sends them through the
blocks (`DiT.run_blocks`) with a self-attention of its own choice, and reads the velocity out of
what comes back (`DiT.velocity`). Every latent frame has its own timestep. Parameter names are the
keys of the original checkpoints.

Precision follows the released models: weights and matrix products in the weight dtype (bf16 on a
GPU); norms, modulation, rotation and the residual sums inside a block in float32.

Axes: B batch, C latent channels (inside attention: head width), F latent frames, h/w latent
rows/columns, P tokens of one frame (h/2 * w/2), S tokens (F * P: by frame, row, column), D model
width, H heads, L context tokens.

Source: Wan 2.1 (arXiv 2503.20314) and its released code. Some models add the frame rate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import SDPA, Kernel
from flowcache.runtime import ops
from flowcache.runtime.compile import Compilation, compiled
from flowcache.runtime.offload import BlockStream, in_turn
from flowcache.runtime.ops import Linear, linear_in_float32, on_device

PATCH = (1, 2, 2)
"""Latent frames, rows and columns of one token."""
IMAGE_TOKENS = 257
"""Tokens that CLIP makes of a start image: its class token and 16 x 16 patches."""
CLIP_WIDTH = 1280
"""Width of the image features of every released I2V model."""
IMAGE_MLP_EPS = 1e-5
ROPE_THETA = 10000.0

SelfAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""`(layer, q, k, v) -> out`, all `[B, S, H, C]`: what a chunk may see is the caller's choice."""

Around = Callable[[int, Tensor, Callable[[], Tensor]], Tensor]
"""`(layer, x [B, S, D], compute) -> [B, S, D]`: what a block makes of x, computed or not."""


@dataclass(frozen=True)
class DiTConfig:
    """Sizes of one model; the defaults are those of a key missing in `config.json`."""

    model_type: Literal["t2v", "i2v"] = "t2v"
    in_dim: int = 16
    out_dim: int = 16
    dim: int = 2048
    ffn_dim: int = 8192
    freq_dim: int = 256
    num_heads: int = 16
    num_layers: int = 32
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = None
    inject_sample_info: bool = False
    eps: float = 1e-6

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class Embedded:
    """Tokens of some latent frames and what their timesteps make of the blocks."""

    tokens: Tensor
    """`[B, S, D]`, weight dtype."""
    time: Tensor
    """`[B, F, D]` float32, modulates the head."""
    modulation: Tensor
    """`[B, F, 6, D]` float32, modulates the blocks (frame rate included)."""

    def joined(self, others: Sequence["Embedded"]) -> "Embedded":
        """Return these frames and others behind them."""
        if not others:
            return self
        every = [self, *others]
        return Embedded(
            torch.cat([each.tokens for each in every], dim=1),
            torch.cat([each.time for each in every], dim=1),
            torch.cat([each.modulation for each in every], dim=1),
        )

    def frames(self, start: int, stop: int) -> "Embedded":
        """Return the part that belongs to latent frames start..stop-1."""
        per_frame = self.tokens.shape[1] // self.time.shape[1]
        return Embedded(
            self.tokens[:, start * per_frame : stop * per_frame],
            self.time[:, start:stop],
            self.modulation[:, start:stop],
        )


@dataclass(frozen=True)
class ContextKV:
    """Keys and values `[B, L, H, C]` of the prompt and start image for one layer: once per run."""

    k: Tensor
    v: Tensor
    k_img: Tensor | None = None
    v_img: Tensor | None = None


def join_contexts(branches: Sequence[Sequence[ContextKV]]) -> list[ContextKV]:
    """Put the contexts of several branches (one list of layers each) into one batch."""
    return [
        ContextKV(
            torch.cat([c.k for c in layer]),
            torch.cat([c.v for c in layer]),
            _joined([c.k_img for c in layer]),
            _joined([c.v_img for c in layer]),
        )
        for layer in zip(*branches, strict=True)
    ]


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


# Positions and timesteps --------------------------------------------------------------------------


def sinusoid(t: Tensor, *, width: int) -> Tensor:
    """Embed timesteps as `[cos(t f_j)..., sin(t f_j)...]`, f_j = 10000^(-j / (width/2)).

    Returns: float64, `t.shape + [width]`.
    """
    half = width // 2
    j = torch.arange(half, dtype=torch.float64, device=t.device)
    angle = t.to(torch.float64).unsqueeze(-1) * ROPE_THETA ** (-j / half)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rope_table(frames: Tensor, *, height: int, width: int, head_width: int) -> Tensor:
    """Rotation angles of the tokens of latent frames at positions `[F]`, by frame, row, column.

    The head's channel pairs are divided among frame, row and column: `head_width // 6` pairs each
    for row and column, the rest for the frame (22, 21, 21 of 64 at the released head width 128).

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
    """Rotate neighbouring channel pairs (2j, 2j+1) by the angles of `rope_table`, in float32.

    Args:
        rope: of every token, `[S, C/2, 2]`, or of every token and head, `[S, H, C/2, 2]`.
    """
    pairs, turns = x_BSHC.float().unflatten(-1, (-1, 2)), rope if rope.ndim == 4 else rope[:, None]
    if not torch.compiler.is_compiling():
        product = torch.view_as_complex(pairs) * torch.view_as_complex(turns)
        return torch.view_as_real(product).flatten(-2)
    # the same written out: complex numbers would not be fused with what is around
    even, odd = pairs.unbind(-1)
    cos, sin = turns.unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


# A block ------------------------------------------------------------------------------------------


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
        self.q, self.k, self.v, self.o = (Linear(dim, dim) for _ in range(4))
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
            self.k_img, self.v_img = Linear(dim, dim), Linear(dim, dim)
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
            # the numbers in the keys of checkpoints count an activation
            Linear(dim, ffn_dim, gelu="tanh"),
            nn.Identity(),
            Linear(ffn_dim, dim),
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

    def modulators(self, e0_BF6D: Tensor, first: int, stop: int) -> tuple[Tensor, ...]:
        """Return some of shift, scale and gate of attention, then of the MLP: `[B, F, 1, D]`."""
        own = self.modulation[:, first:stop].float() + e0_BF6D[:, :, first:stop]
        return own.unsqueeze(3).unbind(2)


def before_attention(
    block: Block, x_BSD: Tensor, e0_BF6D: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Make a block's queries, keys and values."""
    shift, scale = block.modulators(e0_BF6D, 0, 2)
    a = modulate(x_BSD, shift, scale, num_frames=e0_BF6D.shape[1], eps=block.eps)
    return block.self_attn.project(a.to(x_BSD.dtype), rope)


def between_attentions(
    block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    """Add self-attention to the residual stream (float32); make queries for the context."""
    (gate,) = block.modulators(e0_BF6D, 2, 3)
    y = block.self_attn.o(out_BSHC.flatten(2))
    x = add_gated(x_BSD.float(), y, gate, num_frames=e0_BF6D.shape[1])
    return x, block.cross_attn.query(block.norm3(x).to(x_BSD.dtype))


def after_attention(block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor) -> Tensor:
    """Add cross-attention and the MLP to the residual stream, float32."""
    shift, scale, gate = block.modulators(e0_BF6D, 3, 6)
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


# The transformer ----------------------------------------------------------------------------------


class Head(nn.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, dim: int, *, out_width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = Linear(dim, out_width)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x_BSD: Tensor, e_BFD: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e_BFD.unsqueeze(2)).unsqueeze(3).unbind(2)
        x = modulate(x_BSD, shift, scale, num_frames=e_BFD.shape[1], eps=self.eps)
        return linear_in_float32(self.head, x)


class ImageMLP(nn.Module):
    """Projection of CLIP image features to the model width (I2V models)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.LayerNorm(image_dim, eps=IMAGE_MLP_EPS),
            Linear(image_dim, image_dim),
            nn.GELU(),
            Linear(image_dim, dim),
            nn.LayerNorm(dim, eps=IMAGE_MLP_EPS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def empty_dit(config: DiTConfig, dtype: torch.dtype) -> "DiT":
    """Build a transformer without values, whose weights have a type."""
    with torch.device("meta"):
        return DiT(config).to(dtype)


class DiT(nn.Module):
    """The transformer: a reused chunk skips `run_blocks`, which the caller gives self-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.kernel = self.cross_kernel = SDPA
        self.parts = BlockParts()
        self.stream: BlockStream | None = None
        """Brings the blocks that do not stay on the device; None: all stay."""
        dim, has_image = config.dim, config.model_type == "i2v"
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(Linear(dim, dim), nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            Block(
                dim,
                ffn_dim=config.ffn_dim,
                num_heads=config.num_heads,
                eps=config.eps,
                has_image=has_image,
            )
            for _ in range(config.num_layers)
        )
        self.head = Head(dim, out_width=config.out_dim * PATCH[1] * PATCH[2], eps=config.eps)
        if has_image:
            self.img_emb = ImageMLP(config.image_dim or CLIP_WIDTH, dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed(
        self, x_BCFhw: Tensor, t_BF: Tensor, *, fps: Sequence[int], y_BCFhw: Tensor | None = None
    ) -> Embedded:
        """Turn latent frames and their timesteps into tokens and modulation vectors.

        Args:
            t_BF: timesteps, 0 (clean) to 1000 (noise).
            fps: frames per second of each batch item, for models with an fps embedding, which know
                16 and "another".
            y_BCFhw: the start image's condition, I2V models only.
        """
        x = x_BCFhw if y_BCFhw is None else torch.cat([x_BCFhw, y_BCFhw], dim=1)
        tokens = rearrange(self.patch_embedding(x.to(self.dtype)), "B D F h w -> B (F h w) D")
        time, modulation = self._embed_time(t_BF, fps)
        return Embedded(tokens, time, modulation)

    def _embed_time(self, t_BF: Tensor, fps: Sequence[int]) -> tuple[Tensor, Tensor]:
        # The released model rounds the sinusoid to the weight dtype, then goes on in float32.
        s = sinusoid(t_BF, width=self.config.freq_dim).to(self.dtype)
        first, act, second = self.time_embedding
        e_BFD = linear_in_float32(second, act(linear_in_float32(first, s)))
        act, project = self.time_projection
        e0 = linear_in_float32(project, act(e_BFD)).unflatten(-1, (6, -1))
        if self.config.inject_sample_info:
            kinds = [0 if rate == 16 else 1 for rate in fps]
            row = on_device(kinds, dtype=torch.int64, device=e0.device)
            first, act, second = self.fps_projection
            by_rate = linear_in_float32(
                second, act(linear_in_float32(first, self.fps_embedding(row)))
            )
            e0 = e0 + by_rate.unflatten(-1, (6, -1)).unsqueeze(1)
        return e_BFD, e0

    def encode_context(self, text_BLD: Tensor, image_BLD: Tensor | None = None) -> list[ContextKV]:
        """Compute every layer's cross-attention keys and values of one prompt, once per run.

        Args:
            text_BLD: text encoder output, padded with zeros to `text_len`, which are attended to.
            image_BLD: CLIP features `[B, 257, image_dim]`, I2V models only.
        """
        text = self.text_embedding(text_BLD.to(self.dtype))
        image = None if image_BLD is None else self.img_emb(image_BLD.to(self.dtype))
        contexts: list[ContextKV] = []
        for block in in_turn(self.blocks, self.stream):
            assert isinstance(block, Block)
            contexts.append(block.cross_attn.encode(text, image))
        return contexts

    def rope(self, frames: Tensor, *, latent_height: int, latent_width: int) -> Tensor:
        """Return the rotary angles of latent frames at some positions in the window."""
        return rope_table(
            frames,
            height=latent_height // PATCH[1],
            width=latent_width // PATCH[2],
            head_width=self.config.head_width,
        )

    def run_blocks(
        self,
        embedded: Embedded,
        rope: Tensor,
        context: Sequence[ContextKV],
        *,
        self_attend: SelfAttend,
        around: Around | None = None,
    ) -> Tensor:
        """Run all blocks on the tokens: `[B, S, D]`.

        Args:
            around: is asked for what each block makes of its input; None: all are computed.
        """
        x, modulation = embedded.tokens, embedded.modulation
        if modulation.shape[1] == 1 and x.shape[1] % 2 == 0:
            # code is compiled apart for lengths of 1: a single frame counts as two halves
            modulation = modulation.expand(-1, 2, -1, -1)
        for layer, block in enumerate(in_turn(self.blocks, self.stream)):
            compute = partial(
                block,
                x,
                modulation,
                rope,
                context[layer],
                layer=layer,
                self_attend=self_attend,
                kernel=self.cross_kernel,
                parts=self.parts,
            )
            x = compute() if around is None else around(layer, x, compute)
        return x

    @torch.no_grad()
    def compile_ahead(self, *, num_frames: int, frame_tokens: int, batches: Sequence[int]) -> None:
        """Send zeros through the parts of a block, so that `run_blocks` finds them compiled.

        Args:
            num_frames: of a large forward; kernels are chosen by the first length that they see.
            frame_tokens: of this process.
        """
        device = self.head.modulation.device
        (block,) = in_turn(self.blocks[:1], self.stream)
        assert isinstance(block, Block)
        frames = max(num_frames, 2)  # as in `run_blocks`
        tokens, dim = frames * frame_tokens, self.config.dim
        rope = torch.zeros(tokens, self.config.head_width // 2, 2, device=device)
        for batch in batches:
            x = torch.zeros(batch, tokens, dim, dtype=self.dtype, device=device)
            modulation = torch.zeros(batch, frames, 6, dim, device=device)
            q, _, _ = self.parts.before(block, x, modulation, rope)
            x, q = self.parts.between(block, x, q, modulation)
            self.parts.after(block, x, q, modulation)

    def velocity(
        self, hidden_BSD: Tensor, embedded: Embedded, *, latent_height: int, latent_width: int
    ) -> Tensor:
        """Read the velocity (noise minus data) out of the last block: float32 `[B, C, F, h, w]`."""
        patches = self.head(hidden_BSD, embedded.time)
        return rearrange(
            patches,
            "B (F h w) (p q C) -> B C F (h p) (w q)",
            F=embedded.time.shape[1],
            h=latent_height // PATCH[1],
            w=latent_width // PATCH[2],
            p=PATCH[1],
            q=PATCH[2],
        )

    def forward(
        self,
        x_BCFhw: Tensor,
        t_BF: Tensor,
        text_BLD: Tensor,
        *,
        fps: Sequence[int] | None = None,
        y_BCFhw: Tensor | None = None,
        image_BLD: Tensor | None = None,
        causal_chunks: Sequence[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Predict the velocity of a whole window in one pass (training, tests).

        Args:
            fps: frame rate of each batch item, default 24.
            causal_chunks: latent frames (start, stop) of chunks that see themselves and earlier
                ones; None: everything sees everything.
        """
        num_frames, height, width = x_BCFhw.shape[2:]
        rates = [24] * len(x_BCFhw) if fps is None else fps
        embedded = self.embed(x_BCFhw, t_BF, fps=rates, y_BCFhw=y_BCFhw)
        positions = torch.arange(num_frames, device=x_BCFhw.device)
        rope = self.rope(positions, latent_height=height, latent_width=width)
        context = self.encode_context(text_BLD, image_BLD)
        per_frame = rope.shape[0] // num_frames
        bounds = None
        if causal_chunks is not None:
            bounds = [(a * per_frame, b * per_frame) for a, b in causal_chunks]
        hidden = self.run_blocks(
            embedded, rope, context, self_attend=whole_window(self.kernel, bounds)
        )
        return self.velocity(hidden, embedded, latent_height=height, latent_width=width)


def whole_window(kernel: Kernel, bounds: Sequence[tuple[int, int]] | None = None) -> SelfAttend:
    """Attend within one window: everything to everything, or block-causally without a mask.

    Args:
        bounds: token bounds (start, stop) of the chunks in ascending order, or None.
    """

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if bounds is None:
            return kernel(q, k, v)
        parts = [kernel(q[:, a:b], k[:, :b], v[:, :b]) for a, b in bounds]
        return torch.cat(parts, dim=1)

    return attend


# FLOPs, as torch counts them ----------------------------------------------------------------------


def embed_flops(config: DiTConfig, *, num_frames: int, frame_tokens: int) -> int:
    """FLOPs of the patch, time and frame-rate embeddings of some latent frames."""
    dim = config.dim
    patch = config.in_dim * PATCH[0] * PATCH[1] * PATCH[2]
    total = ops.linear_flops(num_frames * frame_tokens, d_in=patch, d_out=dim)
    total += ops.linear_flops(num_frames, d_in=config.freq_dim, d_out=dim)
    total += ops.linear_flops(num_frames, d_in=dim, d_out=dim + 6 * dim)
    if config.inject_sample_info:
        total += ops.linear_flops(1, d_in=dim, d_out=dim + 6 * dim)
    return total


def context_flops(config: DiTConfig) -> int:
    """FLOPs of one prompt's projection to every layer's cross-attention keys and values."""
    dim, rows = config.dim, config.text_len
    total = ops.linear_flops(rows, d_in=config.text_dim, d_out=dim)
    total += ops.linear_flops(rows, d_in=dim, d_out=dim)
    total += config.num_layers * ops.linear_flops(rows, d_in=dim, d_out=2 * dim)
    if config.model_type == "i2v":
        image = config.image_dim or CLIP_WIDTH
        total += ops.linear_flops(IMAGE_TOKENS, d_in=image, d_out=image + dim)
        total += config.num_layers * ops.linear_flops(IMAGE_TOKENS, d_in=dim, d_out=2 * dim)
    return total


def blocks_flops(config: DiTConfig, *, queries: int, keys: int) -> int:
    """FLOPs of all blocks for `queries` tokens that attend to `keys` tokens (own ones included)."""
    dim = config.dim
    context_tokens = config.text_len + (IMAGE_TOKENS if config.model_type == "i2v" else 0)
    per_block = ops.linear_flops(queries, d_in=dim, d_out=4 * dim)  # q, k, v, o of self-attention
    per_block += ops.attention_flops(queries, keys=keys, width=dim)
    per_block += ops.linear_flops(queries, d_in=dim, d_out=2 * dim)  # q, o of cross-attention
    per_block += ops.attention_flops(queries, keys=context_tokens, width=dim)
    per_block += 2 * ops.linear_flops(queries, d_in=dim, d_out=config.ffn_dim)
    return config.num_layers * per_block


def head_flops(config: DiTConfig, *, queries: int) -> int:
    """FLOPs of the projection of tokens to latent patches."""
    return ops.linear_flops(queries, d_in=config.dim, d_out=config.out_dim * PATCH[1] * PATCH[2])
