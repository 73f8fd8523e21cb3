"""The MAGI-1 video VAE: vision transformers between pixels and latents, in overlapping tiles.

Four frames make one latent; a single frame makes one, too. Axes: B batch, T frames, H/W
rows/columns of pixels, C latent channels, F latents, h/w rows/columns of latents.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.weights import check_files, find_shards, load_files, read_model_config
from magi1.vit import VAEConfig, ViTVAE

_ONLY = {
    "double_z": True,
    "with_cls_token": True,
    "conv_last_layer": True,
    "norm_code": False,
    "use_rope": False,
}
"""Settings that the released VAE has and that no other value is supported for."""


@dataclass(frozen=True)
class Tiling:
    """The tiles in which long or large videos are encoded and decoded.

    Neighbouring tiles overlap in space, not in time. Source: the released pipeline, where a tile
    lasts half a second.

    Attributes:
        frames: length of a tile.
        height: rows of pixels of a tile.
        width: columns of pixels of a tile.
        overlap: share of a tile's height and width that its neighbour also covers.
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
        span = partial(Span.encoding, patch=self.spatial_stride, overlap=tiling.overlap)
        means = in_tiles(
            pixels_B3THW.to(device=self.device, dtype=self.dtype),
            partial(map, self._encode_tile),
            length=tiling.frames,
            rows=span(tiling.height),
            columns=span(tiling.width),
            blends_blended=True,
        )
        return means.float() * self.scale

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor, ranks: Ranks | None = None) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` float32, about -1..1.

        A tile that holds a single latent gives a single frame, as in the released decoder: with
        tiles of 3 latents, 4 latents give 12 + 1 frames. See
        `check_decoding`.

        Args:
            ranks: the processes that divide the tiles; each gives the same latents and gets all
                pixels. Default: one.
        """
        tiling = self.tiling
        span = partial(Span.decoding, patch=self.spatial_stride, overlap=tiling.overlap)
        latents = latents_BCFhw.to(device=self.device).float() / self.scale
        return in_tiles(
            latents.to(self.dtype),
            partial(self._decode_tiles, ranks=Ranks() if ranks is None else ranks),
            length=tiling.frames // self.temporal_stride,
            rows=span(tiling.height),
            columns=span(tiling.width),
            blends_blended=False,
        ).float()

    def _encode_tile(self, pixels_B3THW: Tensor) -> Tensor:
        if pixels_B3THW.shape[2] == 1:
            pixels_B3THW = pixels_B3THW.expand(-1, -1, self.temporal_stride, -1, -1)
        return self.model.moments(pixels_B3THW)[0]

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
    num_frames, height, width = x.shape[2:]
    times = range(0, num_frames, length)
    tops, lefts = range(0, height, rows.stride), range(0, width, columns.stride)
    tiles = [
        x[:, :, t : t + length, i : i + rows.tile, j : j + columns.tile]
        for t in times
        for i in tops
        for j in lefts
    ]
    results = iter(run(tiles))
    parts = [
        _stitch(
            [[next(results) for _ in lefts] for _ in tops],
            rows=rows,
            columns=columns,
            blends_blended=blends_blended,
        )
        for _ in times
    ]
    return torch.cat(parts, dim=2)


def _stitch(
    results: list[list[Tensor]], *, rows: Span, columns: Span, blends_blended: bool
) -> Tensor:
    """Blend every tile with the one above, then with the one to the left, and join them."""
    blended = [list(row) for row in results]
    seen = blended if blends_blended else results
    for i, row in enumerate(results):
        for j in range(len(row)):
            if i:
                blended[i][j] = _blend(seen[i - 1][j], blended[i][j], extent=rows.extent, axis=-2)
            if j:
                blended[i][j] = _blend(
                    seen[i][j - 1], blended[i][j], extent=columns.extent, axis=-1
                )
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
    40 they would hold 5 and 1.

    Raises:
        UserError: the last tile holds a single latent, of which the released VAE decodes one frame.
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
    """Check that tiles cut a clip of `num_frames` into whole latents.

    Raises:
        UserError: the released VAE drops frames at the end of each tile, or refuses the last one.
    """
    if num_frames > tiling.frames and tiling.frames % temporal_stride:
        raise UserError(
            f"runtime_config.fps: the released VAE encodes a video in tiles of fps // 2 = "
            f"{tiling.frames} frames and drops the last {tiling.frames % temporal_stride} of each, "
            f"as they make no latent of {temporal_stride}: set fps=24, or prefix_frames="
            f"{tiling.frames // temporal_stride * temporal_stride} or less"
        )


# Files --------------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> VAEConfig:
    """Read `config.json` of a VAE folder.

    Raises:
        UserError: the file is not readable, describes another model, or has an unknown setting.
    """
    path = Path(folder) / "config.json"
    values = read_model_config(path)
    if not isinstance(values.get("ddconfig"), dict):
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


def _empty(folder: Path) -> ViTVAE:
    config = read_config(folder)
    try:
        with torch.device("meta"):
            return ViTVAE(config)
    except (RuntimeError, TypeError) as error:  # sizes whose product no tensor can have
        raise UserError(f"{folder}: the config makes no VAE ({error})") from error


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


def empty(folder: str | Path | None, *, scale: float, tiling: Tiling, dtype: torch.dtype) -> VAE:
    """Build an empty VAE of the size of a folder, on the meta device; None: the released size."""
    with torch.device("meta"):
        model = ViTVAE(RELEASED if folder is None else read_config(folder))
    return VAE(model.to(dtype), scale=scale, tiling=tiling)


def check(folder: str | Path) -> None:
    """Check that the weights are there, whole, and fit; reads headers only.

    Raises:
        UserError: naming the file and the key.
    """
    check_files(_empty(Path(folder)), find_shards(folder))


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
        scale: see `VAE`.
        tiling: see `VAE`.
        dtype: type of the weights (the release runs in bf16); None keeps each as stored.

    Raises:
        UserError: naming the file and the key, if the files do not fit.
    """
    model = _empty(Path(folder))
    load_files(model, find_shards(folder), dtype=dtype, device=device)
    return VAE(model, scale=scale, tiling=tiling)
