"""The MAGI-1 video VAE: vision transformers between pixels and latents, in overlapping tiles.

Four frames make one latent; a single frame makes one, too. Axes: B batch, T frames, H/W
rows/columns of pixels, F latents, h/w rows/columns of latents, N tokens (class token first),
E width of the transformer.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import SDPA
from flowcache.errors import UserError
from flowcache.weights import check_files, find_shards, load_files

NORM_EPS = 1e-5
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

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latents, rows and columns for which positions are stored."""
        side = self.video_size // self.patch_size
        return self.video_length // self.patch_length, side, side


_ONLY = {
    "double_z": True,
    "with_cls_token": True,
    "conv_last_layer": True,
    "norm_code": False,
    "use_rope": False,
    "use_final_proj": False,
}
"""Settings that the released VAE has and that no other value is supported for."""


@dataclass(frozen=True)
class Tiling:
    """The tiles in which long or large videos are encoded and decoded.

    Neighbouring tiles overlap in space, not in time. Source: the released pipeline.
    """

    frames: int = 12
    pixels: int = 256
    overlap: float = 0.25


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
        volume = config.patch_length * config.patch_size**2
        channels = config.embed_dim // volume
        self.proj_in = nn.Linear(config.z_chans, config.embed_dim)
        self.last_layer = nn.Conv3d(channels, config.in_chans, 3, padding=1)

    def forward(self, z_BCFhw: Tensor) -> Tensor:
        num_latents, height, width = z_BCFhw.shape[2:]
        tokens = self.run(self.proj_in(z_BCFhw.movedim(1, -1)).movedim(-1, 1))
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


class VAE:
    """A ViT VAE that works in tiles and scales its latents.

    Args:
        scale: factor from the encoder's means to the latents that the transformer takes.
    """

    def __init__(self, model: ViTVAE, *, scale: float, tiling: Tiling | None = None) -> None:
        self.model = model
        self.scale = scale
        self.tiling = Tiling() if tiling is None else tiling

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.decoder.proj_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return self.model.decoder.proj_in.weight.device

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, in both directions."""
        return self.model.config.patch_size

    @property
    def temporal_stride(self) -> int:
        """Frames per latent."""
        return self.model.config.patch_length

    def to(self, device: torch.device | str) -> "VAE":
        """Move the weights; returns the VAE itself."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to latents `[B, C, F, h, w]` float32 (the posterior's mean).

        Raises:
            ValueError: the frames are neither one nor whole latents, or height or width is no
                multiple of the stride.
        """
        num_frames, height, width = pixels_B3THW.shape[2:]
        if num_frames != 1 and num_frames % self.temporal_stride:
            raise ValueError(
                f"num_frames must be 1 or a multiple of {self.temporal_stride}, is {num_frames}"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            rule = f"multiples of {self.spatial_stride}"
            raise ValueError(f"height and width must be {rule}: {height}x{width}")
        tiling = self.tiling
        extent = int(tiling.pixels // self.spatial_stride * tiling.overlap)
        means = in_tiles(
            pixels_B3THW.to(device=self.device, dtype=self.dtype),
            self._encode_tile,
            tile=(tiling.frames, tiling.pixels),
            stride=int(tiling.pixels * (1 - tiling.overlap)),
            extent=extent,
            limit=tiling.pixels // self.spatial_stride - extent,
            blends_blended=True,
        )
        return means.float() * self.scale

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` float32, about -1..1.

        A tile that holds a single latent gives a single frame, as in the released decoder: with
        tiles of 3 latents, 4 latents give 12 + 1 frames.
        """
        tiling, side = self.tiling, self.tiling.pixels // self.spatial_stride
        extent = int(tiling.pixels * tiling.overlap)
        latents = latents_BCFhw.to(device=self.device).float() / self.scale
        return in_tiles(
            latents.to(self.dtype),
            self._decode_tile,
            tile=(tiling.frames // self.temporal_stride, side),
            stride=int(side * (1 - tiling.overlap)),
            extent=extent,
            limit=tiling.pixels - extent,
            blends_blended=False,
        ).float()

    def _encode_tile(self, pixels_B3THW: Tensor) -> Tensor:
        if pixels_B3THW.shape[2] == 1:
            pixels_B3THW = pixels_B3THW.expand(-1, -1, self.temporal_stride, -1, -1)
        return self.model.moments(pixels_B3THW)[0]

    def _decode_tile(self, z_BCFhw: Tensor) -> Tensor:
        pixels = self.model.decoder(z_BCFhw)
        return pixels[:, :, :1] if z_BCFhw.shape[2] == 1 else pixels


def in_tiles(
    x: Tensor,
    run: Callable[[Tensor], Tensor],
    *,
    tile: tuple[int, int],
    stride: int,
    extent: int,
    limit: int,
    blends_blended: bool,
) -> Tensor:
    """Apply `run` to overlapping tiles of a video and blend the results.

    Args:
        x: `[B, C, T, H, W]`.
        tile: size of a tile of x in time, and in height and width.
        stride: distance of neighbouring tiles of x, in height and width.
        extent: rows and columns of a result that are blended with the neighbour's.
        limit: rows and columns of a result that are kept (the last tile may have fewer).
        blends_blended: whether a tile is blended with its neighbours as they are after their own
            blending (released encoder) or before (released decoder); it shows where four meet.
    """
    length, side = tile
    num_frames, height, width = x.shape[2:]
    parts: list[Tensor] = []
    for start in range(0, num_frames, length):
        clip = x[:, :, start : start + length]
        results = [
            [run(clip[..., i : i + side, j : j + side]) for j in range(0, width, stride)]
            for i in range(0, height, stride)
        ]
        parts.append(_stitch(results, extent=extent, limit=limit, blends_blended=blends_blended))
    return torch.cat(parts, dim=2)


def _stitch(
    results: list[list[Tensor]], *, extent: int, limit: int, blends_blended: bool
) -> Tensor:
    """Blend every tile with the one above, then with the one to the left, and join them."""
    blended = [list(row) for row in results]
    seen = blended if blends_blended else results
    for i, row in enumerate(results):
        for j in range(len(row)):
            if i:
                blended[i][j] = _blend(seen[i - 1][j], blended[i][j], extent=extent, axis=-2)
            if j:
                blended[i][j] = _blend(seen[i][j - 1], blended[i][j], extent=extent, axis=-1)
    rows = [torch.cat([part[..., :limit, :limit] for part in row], dim=-1) for row in blended]
    return torch.cat(rows, dim=-2)


def _blend(before: Tensor, after: Tensor, *, extent: int, axis: int) -> Tensor:
    """Fade from the end of one tile to the start of the next, linearly.

    The first of the `extent` places is all `before`; the last is 1/extent short of all `after`.
    """
    extent = min(before.shape[axis], after.shape[axis], extent)
    share = torch.arange(extent, device=after.device, dtype=after.dtype) / max(extent, 1)
    share = share if axis == -1 else share.unsqueeze(-1)
    old = before.narrow(axis, before.shape[axis] - extent, extent)
    new = after.narrow(axis, 0, extent)
    rest = after.narrow(axis, extent, after.shape[axis] - extent)
    return torch.cat([old * (1 - share) + new * share, rest], dim=axis)


# Files --------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> VAEConfig:
    """Read `config.json` of a VAE folder.

    Raises:
        UserError: the file is not readable, describes another model, or has an unknown setting.
    """
    path = Path(folder) / "config.json"
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable JSON file; download it again") from error
    if not isinstance(values, dict) or not isinstance(values.get("ddconfig"), dict):
        raise UserError(f"{path}: has no section ddconfig; it must describe a ViTVAE")
    for key, wanted in (("_class_name", "ViTVAE"), ("model_type", "vit")):
        if values.get(key) != wanted:
            raise UserError(f"{path}: {key} is {values.get(key)!r}, only {wanted} is supported")
    return parse_config(values["ddconfig"], source=str(path))


def parse_config(values: dict[str, Any], *, source: str) -> VAEConfig:
    """Turn a `ddconfig` section into sizes; dropout rates, which only training reads, are skipped.

    Raises:
        UserError: a setting is unknown, unsupported, or sizes do not fit together.
    """
    known = {field.name: field.type for field in fields(VAEConfig)}
    given = {key: value for key, value in values.items() if not key.endswith("drop_rate")}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{source}: unknown setting {key}; not the released VAE")
        expected = {int: int, bool: bool, float: (int, float)}[known[key]]
        if not isinstance(value, expected) or isinstance(value, bool) != (known[key] is bool):
            raise UserError(f"{source}: {key} is {value!r}, expected {known[key].__name__}")
        if known[key] is not bool and value <= 0:
            raise UserError(f"{source}: {key} is {value!r}, but must be positive")
    config = VAEConfig(**given)
    for key, wanted in _ONLY.items():
        if getattr(config, key) != wanted:
            raise UserError(f"{source}: {key} is {not wanted}, only {wanted} is supported")
    volume = config.patch_length * config.patch_size**2
    for key, divisor in (
        ("embed_dim", config.num_heads),
        ("embed_dim", volume),
        ("video_size", config.patch_size),
        ("video_length", config.patch_length),
    ):
        if getattr(config, key) % divisor:
            raise UserError(f"{source}: {key} is {getattr(config, key)}, no multiple of {divisor}")
    return config


def _empty(folder: Path) -> ViTVAE:
    config = read_config(folder)
    with torch.device("meta"):
        return ViTVAE(config)


def check(folder: str | Path) -> None:
    """Check that the weights are there, whole, and fit; reads headers only.

    Raises:
        UserError: naming the file and the key.
    """
    check_files(_empty(Path(folder)), find_shards(folder))


def load(
    folder: str | Path, *, scale: float, dtype: torch.dtype | None, device: torch.device | str
) -> VAE:
    """Load a VAE from its folder.

    Args:
        scale: see `VAE`.
        dtype: type of the weights (the release runs in bf16); None keeps each as stored.

    Raises:
        UserError: naming the file and the key, if the files do not fit.
    """
    model = _empty(Path(folder))
    load_files(model, find_shards(folder), dtype=dtype, device=device)
    return VAE(model, scale=scale)
