"""The networks of the MAGI-1 VAE: two vision transformers, between pixels and latents.

Axes: B batch, T frames, H/W rows/columns of pixels, C latent channels, F latents, h/w rows/columns
of latents, N tokens (class token first), E width of the transformer.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import SDPA

NORM_EPS = 1e-5
FINAL_CHANNELS = 4
"""Channels that each pixel has before the last convolution, with `use_final_proj`."""
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE: `ddconfig` of its `config.json`, with the defaults of absent keys."""

    video_size: int = 256
    """Rows and columns of pixels for which positions are stored."""
    video_length: int = 16
    """Frames for which positions are stored."""
    patch_size: int = 8
    """Pixels of a latent's side."""
    patch_length: int = 4
    """Frames of a latent."""
    in_chans: int = 3
    z_chans: int = 4
    double_z: bool = True
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    with_cls_token: bool = True
    ln_in_attn: bool = False
    conv_last_layer: bool = False
    norm_code: bool = False
    use_rope: bool = False
    use_final_proj: bool = False
    """Whether the decoder widens its tokens before it spreads them (narrow models)."""

    @property
    def patch_volume(self) -> int:
        """Pixels of a latent, frames included."""
        return self.patch_length * self.patch_size**2

    @property
    def decoded_width(self) -> int:
        """Features of a token that the decoder spreads over its patch."""
        return FINAL_CHANNELS * self.patch_volume if self.use_final_proj else self.embed_dim

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latents, rows and columns for which positions are stored."""
        side = self.video_size // self.patch_size
        return self.video_length // self.patch_length, side, side


class Attention(nn.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.is_normed = config.ln_in_attn
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BNE: Tensor) -> Tensor:
        qkv = self.qkv(x_BNE).unflatten(-1, (3, self.num_heads, -1))
        if self.is_normed:
            qkv = standardise(qkv)
        q, k, v = qkv.unbind(2)
        return self.proj(SDPA(q, k, v).flatten(2))


def standardise(x: Tensor) -> Tensor:
    """Bring the last axis to mean 0 and standard deviation 1.

    The small constant is added to the deviation, not to the variance as in a layer norm.
    """
    x32 = x.float()
    deviation, mean = torch.std_mean(x32, dim=-1, correction=0, keepdim=True)
    return ((x32 - mean) / (deviation + NORM_EPS)).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, *, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """One transformer layer; the norm before attention may lie inside it instead."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.norm1 = nn.Identity() if config.ln_in_attn else nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = MLP(width, inner=int(width * config.mlp_ratio))

    def forward(self, x_BNE: Tensor) -> Tensor:
        x_BNE = x_BNE + self.attn(self.norm1(x_BNE))
        return x_BNE + self.mlp(self.norm2(x_BNE))


class Transformer(nn.Module):
    """What encoder and decoder have in common: class token, positions, layers, norm."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        width = config.embed_dim
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        num_positions = math.prod(config.grid) + 1
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, num_positions, width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def run(self, x_BEFhw: Tensor) -> Tensor:
        """Run all layers; returns the tokens `[B, F h w, E]` without the class token."""
        grid = x_BEFhw.shape[2:]
        tokens = torch.cat(
            [self.cls_token.expand(len(x_BEFhw), -1, -1), x_BEFhw.flatten(2).transpose(1, 2)], dim=1
        )
        x_BNE = tokens + self._positions((grid[0], grid[1], grid[2]))
        for block in self.blocks:
            x_BNE = block(x_BNE)
        return self.norm(x_BNE)[:, 1:]

    def _positions(self, grid: tuple[int, int, int]) -> Tensor:
        """Return the stored positions, interpolated to another grid where it is another."""
        if grid == self.config.grid:
            return self.pos_embed
        first, rest = self.pos_embed[:, :1], self.pos_embed[:, 1:].float()
        table = rest.transpose(1, 2).unflatten(-1, self.config.grid)
        table = functional.interpolate(table, size=grid, mode="trilinear", align_corners=False)
        return torch.cat([first, table.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


class PatchEmbed(nn.Module):
    """Cuts a video into patches of frames, rows and columns."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        patch = (config.patch_length, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.in_chans, config.embed_dim, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Encoder(Transformer):
    """Pixels to the mean and the logarithmic variance of latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        self.patch_embed = PatchEmbed(config)
        self.last_layer = nn.Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, x_B3THW: Tensor) -> Tensor:
        patches = self.patch_embed(x_B3THW)
        moments = self.last_layer(self.run(patches))
        return moments.transpose(1, 2).unflatten(-1, patches.shape[2:])


class Decoder(Transformer):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        channels = config.decoded_width // config.patch_volume
        self.proj_in = nn.Linear(config.z_chans, config.embed_dim)
        self.final_proj, self.final_norm = nn.Identity(), nn.Identity()
        if config.use_final_proj:
            self.final_proj = nn.Linear(config.embed_dim, config.decoded_width)
            self.final_norm = nn.LayerNorm(config.decoded_width, eps=NORM_EPS)
        self.last_layer = nn.Conv3d(channels, config.in_chans, 3, padding=1)

    def forward(self, z_BCFhw: Tensor) -> Tensor:
        num_latents, height, width = z_BCFhw.shape[2:]
        tokens = self.run(self.proj_in(z_BCFhw.movedim(1, -1)).movedim(-1, 1))
        tokens = self.final_norm(self.final_proj(tokens))
        video = rearrange(
            tokens,
            "B (F h w) (t p q C) -> B C (F t) (h p) (w q)",
            F=num_latents,
            h=height,
            w=width,
            t=self.config.patch_length,
            p=self.config.patch_size,
            q=self.config.patch_size,
        )
        return self.last_layer(video)


class ViTVAE(nn.Module):
    """The two networks, whole videos at a time; parameter names are the keys of the release."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def moments(self, pixels_B3THW: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logarithmic variance, `[B, C, F, h, w]` each."""
        mean, logvar = self.encoder(pixels_B3THW).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR_RANGE)
