"""The MAGI-1 diffusion transformer (4.5B and 24B; base, distilled and quantised).

Parameter names are the keys of the official checkpoints. Source of the architecture: the released
MAGI-1 code and checkpoints (arXiv 2505.13211).

Axes: B batch, C latent channels, F latent frames, h/w latent rows/columns, N chunks, S tokens
(F * h/2 * w/2, frame-major), D model width, E condition width, R text rows (B * N), L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from flowcache.attention import SDPA, Kernel
from magi1.config import ModelConfig
from magi1.fp8 import Fp8Linear
from magi1.layers import (
    ROPE_AXES,
    ContextKV,
    F32Linear,
    Layer,
    LayerParts,
    SelfAttend,
    ZeroCentredLayerNorm,
    rope_table,
    sinusoid,
)

SINUSOID_WIDTH = 256
BANDS_PER_HEAD_CHANNEL = 1 / 8
"""Rotary frequencies per axis and channel of a head (16 at the released head width 128)."""
BAND_BASE = 10000.0
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


@dataclass(frozen=True)
class Embedded:
    """Tokens of some chunks and the condition that gates them."""

    tokens: Tensor
    """`[B, S, D]`, weight dtype."""
    condition: Tensor
    """`[B, N, E]`, weight dtype."""

    def chunks(self, start: int, stop: int) -> "Embedded":
        """Return the part that belongs to chunks start..stop-1."""
        per_chunk = self.tokens.shape[1] // self.condition.shape[1]
        return Embedded(
            self.tokens[:, start * per_chunk : stop * per_chunk], self.condition[:, start:stop]
        )


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
    """The text for cross-attention, and the learned vectors that stand for no text."""

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
        """The learned text that stands for no text, `[L, caption_channels]` float32."""
        return self.y_embedder.null_caption_embedding.float()

    def embed(
        self,
        x_BCFhw: Tensor,
        t_BN: Tensor,
        *,
        is_null: bool,
        step_width: float | None = None,
    ) -> Embedded:
        """Turn latent frames and their chunks' timesteps into tokens and gate conditions.

        Args:
            t_BN: timesteps, 0 (noise) to 1 (clean), one per chunk.
            is_null: whether the caption counts as dropped.
            step_width: what distilled models are told of the step size, see
                `magi1.schedule.step_width`.
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
        return [layer.self_attention.encode(text_RLD, mask_RL) for layer in self._layers]

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
        self_attend: SelfAttend,
    ) -> Tensor:
        """Run all layers on the tokens: `[B, S, D]` in, `[B, S, D]` out.

        Args:
            rope: angles of these tokens, from `rope_table`.
            self_attend: decides what the tokens may see, see `SelfAttend`.
        """
        x = embedded.tokens
        for index, layer in enumerate(self._layers):
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
        for layer in self._layers[:2]:
            q, _, _, qx = self.parts.before(layer, x, rope)
            self.parts.after(layer, x, q, qx, condition)

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
        self_attend: SelfAttend | None = None,
    ) -> Tensor:
        """Predict the velocity of neighbouring chunks in one pass (training, tests).

        Args:
            text_RLC: text of every chunk of every batch item, or one row for all.
            self_attend: default: a chunk sees itself and those before it.
        """
        num_frames, height, width = x_BCFhw.shape[2:]
        embedded = self.embed(x_BCFhw, t_BN, is_null=is_null, step_width=step_width)
        rope = self.rope_table(
            first_frame=first_frame,
            num_frames=num_frames,
            latent_height=height,
            latent_width=width,
        )
        attend = self_attend or block_causal(self.kernel, num_chunks=t_BN.shape[1])
        context = self.encode_context(text_RLC, mask_RL)
        hidden = self.run_blocks(embedded, rope, context, self_attend=attend)
        return self.velocity(hidden, latent_height=height, latent_width=width)


def block_causal(kernel: Kernel, *, num_chunks: int) -> SelfAttend:
    """Let every chunk attend to itself and to all chunks before it."""

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size = q.shape[1] // num_chunks
        stops = range(size, q.shape[1] + 1, size)
        parts = [kernel(q[:, stop - size : stop], k[:, :stop], v[:, :stop]) for stop in stops]
        return torch.cat(parts, dim=1)

    return attend


def is_float32(name: str) -> bool:
    """Tell whether a parameter is kept in float32 whatever the weight dtype is.

    These are the embedders, the output and the norms but for those of cross-attention.
    """
    if name.split(".")[0] in _FLOAT32_PARTS:
        return True
    owner = name.split(".")[-2]
    return owner in _FLOAT32_NORMS


def set_precision(dit: DiT, dtype: torch.dtype) -> None:
    """Convert all parameters to the released model's mix of float32 and `dtype`, in place.

    8-bit weights and their scales stay as they are.
    """
    for name, parameter in dit.named_parameters():
        if _is_fp8_part(dit, name):
            continue
        parameter.data = parameter.data.to(torch.float32 if is_float32(name) else dtype)


def _is_fp8_part(dit: DiT, name: str) -> bool:
    return isinstance(dit.get_submodule(name.rpartition(".")[0]), Fp8Linear)
