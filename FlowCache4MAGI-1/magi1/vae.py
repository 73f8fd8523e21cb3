"""The MAGI-1 video VAE: vision transformers between pixels and latents, in overlapping tiles.

Four frames make one latent; a single frame makes one, too. Axes: B batch, T frames, H/W
rows/columns of pixels, C latent channels, F latents, h/w rows/columns of latents, N tokens (class
token first), E width of the transformer.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from flowcache.attention import SDPA
from flowcache.errors import UserError
from flowcache.runtime.ops import Conv3d, Linear
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.weights import check_files, find_shards, load_files, read_model_config

NORM_EPS = 1e-5
FINAL_CHANNELS = 4
"""Channels that each pixel has before the last convolution, with `use_final_proj`."""

_ONLY = {
    "double_z": True,
    "with_cls_token": True,
    "conv_last_layer": True,
    "norm_code": False,
    "use_rope": False,
}
"""Settings that the released VAE has and that no other value is supported for."""


# The networks -------------------------------------------------------------------------------------


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


RELEASED = VAEConfig(
    z_chans=16,
    embed_dim=1024,
    depth=24,
    num_heads=16,
    qkv_bias=True,
    ln_in_attn=True,
    conv_last_layer=True,
)
"""Sizes of the released VAE, 613,755,239 parameters; source: the tensors of its checkpoint."""


class Attention(nn.Module):
    """Attention of all tokens to all tokens."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width = config.embed_dim
        self.num_heads = config.num_heads
        self.is_normed = config.ln_in_attn
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = Linear(width, width)

    def forward(self, x_BNE: Tensor) -> Tensor:
        qkv = self.qkv(x_BNE).unflatten(-1, (3, self.num_heads, -1))
        if self.is_normed:
            qkv = standardise(qkv)
        q, k, v = qkv.unbind(2)
        return self.proj(SDPA(q, k, v).flatten(2))


def standardise(x: Tensor) -> Tensor:
    """Bring the last axis to mean 0 and standard deviation 1."""
    x32 = x.float()
    deviation, mean = torch.std_mean(x32, dim=-1, correction=0, keepdim=True)
    # the small constant is added to the deviation, not to the variance as in a layer norm
    return ((x32 - mean) / (deviation + NORM_EPS)).to(x.dtype)


class MLP(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, width: int, *, inner: int) -> None:
        super().__init__()
        self.fc1 = Linear(width, inner, gelu="none")
        self.fc2 = Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


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
        first = self.cls_token.expand(len(x_BEFhw), -1, -1)
        tokens = torch.cat([first, x_BEFhw.flatten(2).transpose(1, 2)], dim=1)
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


class Encoder(Transformer):
    """Pixels to the mean and the logarithmic variance of latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        patch = (config.patch_length, config.patch_size, config.patch_size)
        proj = nn.Conv3d(config.in_chans, config.embed_dim, patch, stride=patch)
        self.patch_embed = nn.ModuleDict({"proj": proj})
        self.last_layer = Linear(config.embed_dim, 2 * config.z_chans)

    def forward(self, x_B3THW: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](x_B3THW)
        moments = self.last_layer(self.run(patches))
        return moments.transpose(1, 2).unflatten(-1, patches.shape[2:])


class Decoder(Transformer):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config)
        channels = config.decoded_width // config.patch_volume
        self.proj_in = Linear(config.z_chans, config.embed_dim)
        self.final_proj, self.final_norm = nn.Identity(), nn.Identity()
        if config.use_final_proj:
            self.final_proj = Linear(config.embed_dim, config.decoded_width)
            self.final_norm = nn.LayerNorm(config.decoded_width, eps=NORM_EPS)
        self.last_layer = Conv3d(channels, config.in_chans, 3, padding=1)

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

    def means(self, pixels_B3THW: Tensor) -> Tensor:
        """Return the means of the latents, `[B, C, F, h, w]`; nothing is drawn from them."""
        return self.encoder(pixels_B3THW).chunk(2, dim=1)[0]


# Tiles --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """The tiles in which long or large videos are encoded and decoded.

    Neighbouring tiles overlap in space, not in time, by that share of their height and width.
    Source: the released pipeline, where a tile lasts half a second.
    """

    frames: int = 12
    height: int = 256
    width: int = 256
    overlap: float = 0.25

    @classmethod
    def of_rate(cls, fps: int) -> "Tiling":
        """Return the released tiles at a frame rate."""
        return cls(frames=fps // 2)


@dataclass(frozen=True)
class Span:
    """The tiles along one axis of a picture.

    Attributes:
        tile: size of a tile of the input.
        stride: distance of neighbouring tiles of the input.
        extent: places of a tile's result that are blended with the neighbour's.
        limit: places of a tile's result that are kept (the last tile may have fewer).
    """

    tile: int
    stride: int
    extent: int
    limit: int

    @classmethod
    def encoding(cls, pixels: int, *, patch: int, overlap: float) -> "Span":
        """Return the tiles of `pixels` places that the encoder makes latents of.

        With 256 pixels, patches of 8 and an overlap of a quarter: 192 pixels apart, 24 of 32
        latents are kept, 8 are blended.
        """
        extent = int(pixels // patch * overlap)
        return cls(pixels, int(pixels * (1 - overlap)), extent, pixels // patch - extent)

    @classmethod
    def decoding(cls, pixels: int, *, patch: int, overlap: float) -> "Span":
        """Return the tiles of latents that the decoder makes `pixels` places of.

        With 256 pixels, patches of 8 and an overlap of a quarter: 24 of 32 latents apart, 192
        pixels are kept, 64 are blended.
        """
        side = pixels // patch
        extent = int(side * patch * overlap)
        return cls(side, int(side * (1 - overlap)), extent, side * patch - extent)


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

    @torch.no_grad()
    def encode(self, pixels_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to latents `[B, C, F, h, w]` float32 (the posterior's mean)."""
        num_frames, height, width = pixels_B3THW.shape[2:]
        if num_frames != 1 and num_frames % self.temporal_stride:
            raise ValueError(
                f"num_frames must be 1 or a multiple of {self.temporal_stride}, is {num_frames}"
            )
        if height % self.spatial_stride or width % self.spatial_stride:
            rule = f"multiples of {self.spatial_stride}"
            raise ValueError(f"height and width must be {rule}: {height}x{width}")
        span = partial(Span.encoding, patch=self.spatial_stride, overlap=self.tiling.overlap)
        means = in_tiles(
            pixels_B3THW.to(device=self.device, dtype=self.dtype),
            partial(map, self._encode_tile),
            length=self.tiling.frames,
            rows=span(self.tiling.height),
            columns=span(self.tiling.width),
            blends_blended=True,
        )
        return means.float() * self.scale

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` float32, about -1..1.

        A tile that holds a single latent gives a single frame, as in the released decoder: with
        tiles of 3 latents, 4 latents give 12 + 1 frames. See `check_decoding`.

        Args:
            ranks: the processes that divide the tiles; each gives the same latents and gets all
                pixels. Default: one.
        """
        span = partial(Span.decoding, patch=self.spatial_stride, overlap=self.tiling.overlap)
        latents = latents_BCFhw.to(device=self.device).float() / self.scale
        return in_tiles(
            latents.to(self.dtype),
            partial(self._decode_tiles, ranks=Ranks() if ranks is None else ranks),
            length=self.tiling.frames // self.temporal_stride,
            rows=span(self.tiling.height),
            columns=span(self.tiling.width),
            blends_blended=False,
        ).float()

    def _encode_tile(self, pixels_B3THW: Tensor) -> Tensor:
        if pixels_B3THW.shape[2] == 1:
            pixels_B3THW = pixels_B3THW.expand(-1, -1, self.temporal_stride, -1, -1)
        return self.model.means(pixels_B3THW)

    def _decode_tiles(self, tiles_BCFhw: Sequence[Tensor], *, ranks: Ranks) -> Iterator[Tensor]:
        """Decode tiles and those of other processes: number 0 is that of share 0, 1 of 1, ...

        Example: with 3 processes the second one decodes tiles 1, 4, 7, ... before any is exchanged.
        """
        if ranks.num_shares == 1:
            yield from map(self._decode_tile, tiles_BCFhw)
            return
        numbers = range(ranks.share, len(tiles_BCFhw), ranks.num_shares)
        own = {number: self._decode_tile(tiles_BCFhw[number]) for number in numbers}
        for number, tile in enumerate(tiles_BCFhw):
            is_own = number in own
            yield ranks.all_reduce(
                own.pop(number) if is_own else tile.new_zeros(self._decoded_shape(tile))
            )

    def _decode_tile(self, z_BCFhw: Tensor) -> Tensor:
        pixels = self.model.decoder(z_BCFhw)
        return pixels[:, :, :1] if z_BCFhw.shape[2] == 1 else pixels

    def _decoded_shape(self, z_BCFhw: Tensor) -> tuple[int, ...]:
        """Return the shape of a decoded tile."""
        batch, _, num_latents, height, width = z_BCFhw.shape
        num_frames = 1 if num_latents == 1 else num_latents * self.temporal_stride
        stride = self.spatial_stride
        return (batch, self.model.config.in_chans, num_frames, height * stride, width * stride)


def in_tiles(
    x: Tensor,
    run: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    *,
    length: int,
    rows: Span,
    columns: Span,
    blends_blended: bool,
) -> Tensor:
    """Apply `run` to overlapping tiles of a video and blend the results.

    Args:
        x: `[B, C, T, H, W]`.
        run: takes all tiles, in the order of time, rows, columns, and returns their results.
        length: size of a tile of x in time.
        rows: the tiles along the height of x.
        columns: the tiles along its width.
        blends_blended: whether a tile is blended with its neighbours as they are after their own
            blending (released encoder) or before (released decoder); it shows where four meet.
    """
    spans = zip(x.shape[2:], (length, rows.stride, columns.stride), strict=True)
    times, tops, lefts = (range(0, size, stride) for size, stride in spans)
    tiles = [
        x[:, :, t : t + length, i : i + rows.tile, j : j + columns.tile]
        for t in times
        for i in tops
        for j in lefts
    ]
    results = iter(run(tiles))
    stitch = partial(_stitch, rows=rows, columns=columns, blends_blended=blends_blended)
    pictures = [stitch([[next(results) for _ in lefts] for _ in tops]) for _ in times]
    return torch.cat(pictures, dim=2)


def _stitch(
    results: list[list[Tensor]], *, rows: Span, columns: Span, blends_blended: bool
) -> Tensor:
    """Blend every tile with the one above, then with the one to the left, and join them."""
    blended = [list(row) for row in results]
    seen = blended if blends_blended else results
    for i, row in enumerate(results):
        for j, tile in enumerate(row):
            if i:
                tile = _blend(seen[i - 1][j], tile, extent=rows.extent, axis=-2)
            if j:
                tile = _blend(seen[i][j - 1], tile, extent=columns.extent, axis=-1)
            blended[i][j] = tile
    joined = [
        torch.cat([part[..., : rows.limit, : columns.limit] for part in row], dim=-1)
        for row in blended
    ]
    return torch.cat(joined, dim=-2)


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


def check_decoding(tiling: Tiling, *, chunk_width: int, temporal_stride: int) -> None:
    """Check that tiles cut a chunk of `chunk_width` latents so that all its frames are decoded.

    With 24 frames per second and 6 latents they hold 3 and 3; with 12 they would hold 1 each, with
    40 they would hold 5 and 1: of a single latent the released VAE decodes one frame.
    """
    length = tiling.frames // temporal_stride
    if length == 0 or (chunk_width - 1) % length == 0:
        raise UserError(
            f"runtime_config.fps: VAE tiles of fps // 2 = {tiling.frames} frames hold {length} "
            f"latents and cut a chunk of runtime_config.chunk_width={chunk_width} so that a single "
            f"one remains, of which the released VAE decodes 1 frame instead of {temporal_stride}: "
            "set fps=24 and chunk_width=6, as released"
        )


def check_encoding(tiling: Tiling, *, num_frames: int, temporal_stride: int) -> None:
    """Check that tiles cut a clip of `num_frames` into whole latents."""
    if num_frames > tiling.frames and tiling.frames % temporal_stride:
        raise UserError(
            f"runtime_config.fps: the released VAE encodes a video in tiles of fps // 2 = "
            f"{tiling.frames} frames and drops the last {tiling.frames % temporal_stride} of each, "
            f"as they make no latent of {temporal_stride}: set fps=24, or prefix_frames="
            f"{tiling.frames // temporal_stride * temporal_stride} or less"
        )


# Files --------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> VAEConfig:
    """Read `config.json` of a VAE folder."""
    path = Path(folder) / "config.json"
    values = read_model_config(path)
    if not isinstance(values.get("ddconfig"), dict):
        raise UserError(f"{path}: has no section ddconfig; it must describe a ViTVAE")
    for key, wanted in (("_class_name", "ViTVAE"), ("model_type", "vit")):
        if values.get(key) != wanted:
            raise UserError(f"{path}: {key} is {values.get(key)!r}, only {wanted} is supported")
    return parse_config(values["ddconfig"], source=str(path))


def parse_config(values: dict[str, Any], *, source: str) -> VAEConfig:
    """Turn a `ddconfig` section into sizes, without dropout rates, which only training reads."""
    known = {field.name: type(field.default) for field in fields(VAEConfig)}
    given = {key: value for key, value in values.items() if not key.endswith("drop_rate")}
    for key, value in given.items():
        if key not in known:
            raise UserError(f"{source}: unknown setting {key}; not the released VAE")
        is_number = isinstance(value, int | float if known[key] is float else known[key])
        if not is_number or isinstance(value, bool) != (known[key] is bool):
            raise UserError(f"{source}: {key} is {value!r}, expected {known[key].__name__}")
        if known[key] is not bool and value <= 0:
            raise UserError(f"{source}: {key} is {value!r}, but must be positive")
    config = VAEConfig(**given)
    for key, wanted in _ONLY.items():
        if getattr(config, key) != wanted:
            raise UserError(f"{source}: {key} is {not wanted}, only {wanted} is supported")
    for key, divisor in (
        ("embed_dim", config.num_heads),
        *(() if config.use_final_proj else (("embed_dim", config.patch_volume),)),
        ("video_size", config.patch_size),
        ("video_length", config.patch_length),
    ):
        if getattr(config, key) % divisor:
            raise UserError(f"{source}: {key} is {getattr(config, key)}, no multiple of {divisor}")
    return config


def empty(folder: str | Path | None, *, scale: float, tiling: Tiling, dtype: torch.dtype) -> VAE:
    """Build an empty VAE of the size of a folder, on the meta device; None: the released size."""
    return VAE(_network(folder).to(dtype), scale=scale, tiling=tiling)


def check_weights(folder: str | Path) -> None:
    """Check that the weights are there, whole, and fit; reads headers only."""
    check_files(_network(folder), find_shards(folder))


def _network(folder: str | Path | None) -> ViTVAE:
    config = RELEASED if folder is None else read_config(folder)
    try:
        with torch.device("meta"):
            return ViTVAE(config)
    except (RuntimeError, TypeError) as error:  # sizes whose product no tensor can have
        raise UserError(f"{folder}: the config makes no VAE ({error})") from error


def load(
    folder: str | Path,
    *,
    scale: float,
    dtype: torch.dtype | None,
    device: torch.device | str,
    tiling: Tiling | None = None,
) -> VAE:
    """Load a VAE from its folder.

    Args:
        dtype: type of the weights (the release runs in bf16); None keeps each as stored.
        scale: see `VAE`, as is `tiling`.
    """
    model = _network(folder)
    load_files(model, find_shards(folder), dtype=dtype, device=device)
    return VAE(model, scale=scale, tiling=tiling)
