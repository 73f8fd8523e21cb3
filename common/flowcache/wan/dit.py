"""The SkyReels-V2 diffusion transformer (DF, T2V and I2V; every released size).

Parameter names are the keys of the original checkpoints. Source of the architecture: the released
SkyReels-V2 checkpoints and code (arXiv 2504.13074), which follow Wan 2.1.

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, S tokens
(F * h/2 * w/2, frame-major), D model width, L context tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from flowcache.attention import SDPA, Kernel
from flowcache.runtime.ops import linear_in_float32, on_device
from flowcache.wan.layers import (
    Block,
    BlockParts,
    ContextKV,
    SelfAttend,
    modulate,
    rope_table,
    sinusoid,
)

PATCH = (1, 2, 2)
IMAGE_MLP_EPS = 1e-5


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
        return Embedded(
            torch.cat([self.tokens, *(other.tokens for other in others)], dim=1),
            torch.cat([self.time, *(other.time for other in others)], dim=1),
            torch.cat([self.modulation, *(other.modulation for other in others)], dim=1),
        )

    def frames(self, start: int, stop: int) -> "Embedded":
        """Return the part that belongs to latent frames start..stop-1."""
        per_frame = self.tokens.shape[1] // self.time.shape[1]
        return Embedded(
            self.tokens[:, start * per_frame : stop * per_frame],
            self.time[:, start:stop],
            self.modulation[:, start:stop],
        )


class Head(nn.Module):
    """Modulated norm and projection to patches, in float32."""

    def __init__(self, dim: int, *, out_width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(dim, out_width)
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
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            nn.LayerNorm(dim, eps=IMAGE_MLP_EPS),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DiT(nn.Module):
    """The transformer, in the three parts that caching needs: `embed`, `run_blocks`, `head`."""

    def __init__(self, config: DiTConfig, *, kernel: Kernel = SDPA) -> None:
        super().__init__()
        self.config = config
        self.kernel = self.cross_kernel = kernel
        self.parts = BlockParts()
        dim, has_image = config.dim, config.model_type == "i2v"
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, PATCH, stride=PATCH)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if config.inject_sample_info:
            self.fps_embedding = nn.Embedding(2, dim)
            self.fps_projection = nn.Sequential(
                nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 6 * dim)
            )
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
            self.img_emb = ImageMLP(config.image_dim or 1280, dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    def embed(
        self, x_BCFhw: Tensor, t_BF: Tensor, *, fps: Sequence[int], y_BCFhw: Tensor | None = None
    ) -> Embedded:
        """Turn latent frames and their timesteps into tokens and modulation vectors.

        Args:
            t_BF: timesteps, 0 (clean) to 1000 (noise), one per latent frame.
            fps: frames per second of each batch item; read by models with an fps embedding, which
                know 16 and "another".
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
            text_BLD: text encoder output, padded with zeros to `text_len`: the padding is attended
                to, as the model was trained.
            image_BLD: CLIP features `[B, 257, image_dim]`, I2V models only.
        """
        text = self.text_embedding(text_BLD.to(self.dtype))
        image = None if image_BLD is None else self.img_emb(image_BLD.to(self.dtype))
        contexts: list[ContextKV] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            contexts.append(block.cross_attn.encode(text, image))
        return contexts

    def rope(self, frames: Tensor, *, latent_height: int, latent_width: int) -> Tensor:
        """Rotary angles of latent frames at the given positions inside the window."""
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
    ) -> Tensor:
        """Run all blocks on the tokens: `[B, S, D]` in, `[B, S, D]` out.

        Args:
            self_attend: decides what the tokens may see, see `SelfAttend`.
        """
        x, modulation = embedded.tokens, embedded.modulation
        if modulation.shape[1] == 1 and x.shape[1] % 2 == 0:
            # code is compiled apart for lengths of 1: a single frame counts as two halves
            modulation = modulation.expand(-1, 2, -1, -1)
        for layer, block in enumerate(self.blocks):
            x = block(
                x,
                modulation,
                rope,
                context[layer],
                layer=layer,
                self_attend=self_attend,
                kernel=self.cross_kernel,
                parts=self.parts,
            )
        return x

    @torch.no_grad()
    def compile_ahead(self, *, num_frames: int, frame_tokens: int, batches: Sequence[int]) -> None:
        """Send zeros through the parts of a block, so that `run_blocks` finds them compiled.

        Args:
            num_frames: of a large forward; kernels are chosen by the first length that they see.
            frame_tokens: tokens of a latent frame in this process.
            batches: the batch sizes that will be used.
        """
        block, device = self.blocks[0], self.head.modulation.device
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
            causal_chunks: latent frame bounds (start, stop) of the chunks for block-causal
                attention: a chunk sees itself and earlier ones. None: everything sees everything.
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
