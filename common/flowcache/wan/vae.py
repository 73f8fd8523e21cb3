"""The Wan 2.1 video VAE: pixels to latents and back, all at once or as the latents come.

The first frame makes one latent, every four more make another: T frames, (T - 1) / 4 + 1 latents.
The network is diffusers' `AutoencoderKLWan`. Its decoder is called one latent at a time, for the
whole picture or a strip of it. Up to its attention, which sees all positions, it works at the
latents' size and takes little: 2 % of the FLOPs at 544x960. What follows is local, so a strip
needs only what lies close to it.

Axes: B batch, C channels, T frames, H/W rows/columns of pixels, F latents, h/w rows/columns of
latents or of a level between the two.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowcache.errors import UserError, first_line
from flowcache.runtime.compile import compiled
from flowcache.runtime.offload import host_packer
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.weights import (
    Origin,
    check_files,
    find_shards,
    load_files,
    read,
    read_model_config,
    rename,
)

# Seconds to import: where nothing is decoded, as for --help, it is never loaded.
if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

TEMPORAL_STRIDE = 4
"""Frames per latent, after the first."""
SPATIAL_STRIDE = 8
"""Pixels per latent of the released VAE, in both directions."""
MEMORY_FRAMES = 2
"""Frames that a causal convolution over three of them remembers."""

Seen = list[Tensor | str | None]
"""What each convolution of the decoder has seen so far, in the order of their calls."""

# Key of diffusers -> key of the original file, except for the decoder's blocks.
# diffusers' own `convert_wan_vae_to_diffusers` goes the other way, and for two residual blocks on
# four levels only: with it a missing key could not be named as the file spells it.
# Source: the two published layouts of the same weights.
_ORIGINAL_KEYS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.", ".residual.0."),
    (r"((?:samples|middle)\.\d+)\.conv1\.", r"\1.residual.2."),
    (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
_UP_BLOCK = re.compile(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")


def latent_frames(pixel_frames: int) -> int:
    """Return the number of latent frames of a clip."""
    return (pixel_frames - 1) // TEMPORAL_STRIDE + 1


def pixel_frames(latents: int) -> int:
    """Return the number of pixel frames that so many latent frames decode to."""
    return (latents - 1) * TEMPORAL_STRIDE + 1


class VAE:
    """A Wan VAE with the statistics that normalise its latents."""

    def __init__(self, model: AutoencoderKLWan) -> None:
        from flowcache.wan.vae_layers import with_own_layers

        # Any: diffusers types its config as a dict, and its methods as untyped wrappers
        self.model: Any = model
        self.network: Any = with_own_layers(model)
        """What is computed with: it has the parameters of `model`."""
        shape = (1, -1, 1, 1, 1)
        like = self.model.quant_conv.weight
        self.mean = like.new_tensor(self.model.config.latents_mean).view(shape)
        self.std = like.new_tensor(self.model.config.latents_std).view(shape)
        self.num_strips = 1
        """In which a picture is decoded, one after the other."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.model.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are now."""
        return self.model.quant_conv.weight.device

    @property
    def spatial_stride(self) -> int:
        """Pixels per latent, in both directions."""
        return 2 ** (len(self.model.config.dim_mult) - 1)

    def to(
        self, device: torch.device | str | None = None, *, dtype: torch.dtype | None = None
    ) -> VAE:
        """Move or convert the weights; returns the VAE itself."""
        # that of diffusers warns of layers to keep in float32, of which there are none
        torch.nn.Module.to(self.model, device=device, dtype=dtype)
        self.mean, self.std = (x.to(device=device, dtype=dtype) for x in (self.mean, self.std))
        return self

    def quicken(self, *, compiles: bool) -> VAE:
        """Lay channels next to each other and, if asked, compile norms; returns the VAE itself."""
        from flowcache.wan.vae_layers import channels_last, normed_rows

        of_rows = None
        if compiles:
            of_rows = compiled(normed_rows, lengths=(0,), name="the norms of the VAE")
        channels_last(self.network, of_rows=of_rows)
        return self

    @torch.no_grad()
    def encode(self, pixels_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to normalised latents `[B, 16, F, h, w]`, the posterior's mean."""
        num_frames, height, width = pixels_B3THW.shape[2:]
        if num_frames % TEMPORAL_STRIDE != 1:
            raise ValueError(f"num_frames must be 4 k + 1 to fill the last latent, is {num_frames}")
        stride = self.spatial_stride
        if height % stride or width % stride:
            raise ValueError(f"height and width must be multiples of {stride}: {height}x{width}")
        pixels = pixels_B3THW.to(device=self.device, dtype=self.dtype)
        mu_BCFhw = self.network.encode(pixels).latent_dist.mode()
        return (mu_BCFhw - self.mean) / self.std

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode normalised latents to pixels `[B, 3, T, H, W]` in -1..1."""
        return self.stream().decode(latents_BCFhw)

    def stream(self, ranks: Ranks | None = None) -> VAEStream:
        """Begin to decode one video whose latents come bit by bit, divided among processes."""
        return VAEStream(self, Ranks() if ranks is None else ranks, num_strips=self.num_strips)


class VAEStream:
    """The decoder of one video: what its causal convolutions have seen so far.

    Feeding latents in any portions gives the same pixels, bit for bit, as feeding them at once.
    Example: 5 latents fed as 2 + 3 come out as 5 + 12 = 17 frames. Each of several processes, which
    feed the same, decodes a strip of the picture and gets the others' pixels. A process may decode
    its own in several strips, one after the other: what was seen of the others is on the host.
    """

    def __init__(self, vae: VAE, ranks: Ranks, *, num_strips: int = 1) -> None:
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

        self._vae, self._ranks, self._num_strips = vae, ranks, num_strips
        decoder = vae.network.decoder
        num_convs = sum(isinstance(part, WanCausalConv3d) for part in decoder.modules())
        self._seen: Seen = [None] * num_convs
        """Of the whole picture."""
        self._strips: list[Seen] = [[None] * num_convs for _ in range(num_strips)]
        """Of each strip."""

    def state_bytes(self) -> int:
        """Return what the decoder keeps until the next latents come, in bytes."""
        return _bytes_of(self._seen) + sum(self.strip_bytes())

    def strip_bytes(self) -> list[int]:
        """Return what it keeps of each strip, in bytes."""
        return [_bytes_of(seen) for seen in self._strips]

    @torch.no_grad()
    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode the next normalised latents to their pixels `[B, 3, T, H, W]` in -1..1."""
        vae, ranks = self._vae, self._ranks
        latents = latents_BCFhw.to(device=vae.device, dtype=vae.dtype)
        z_BCFhw = latents * vae.std + vae.mean
        pixels = torch.cat([self._decode(z_BC1hw) for z_BC1hw in z_BCFhw.split(1, dim=2)], dim=2)
        if ranks.num_shares == 1:
            return pixels
        (own,) = self._cut(latents, num_strips=1)
        return ranks.all_reduce(own.placed(pixels, scale=vae.spatial_stride))

    def _decode(self, z_BC1hw: Tensor) -> Tensor:
        """Decode the next latent to the pixels of this process."""
        network = self._vae.network
        hidden, place = decode_middle(network, z_BC1hw, self._seen)
        strips = self._cut(z_BC1hw, num_strips=self._num_strips)
        parts: list[Tensor] = []
        for number, strip in enumerate(strips):
            if self._num_strips > 1:
                self._come(number)
            seen = self._strips[number]
            parts.append(decode_hidden(network.decoder, hidden, seen, [place], strip=strip))
            if self._num_strips > 1:
                self._leave(number)
        return torch.cat(parts, dim=strips[0].axis).clamp_(-1, 1)

    def _cut(self, latents: Tensor, *, num_strips: int) -> list[Strip]:
        """Return the strips of this process."""
        height, width = latents.shape[-2:]
        first, num_shares = self._ranks.share * num_strips, self._ranks.num_shares * num_strips
        return [
            Strip.of(height=height, width=width, share=share, num_shares=num_shares)
            for share in range(first, first + num_strips)
        ]

    def _leave(self, number: int) -> None:
        """Put what was seen of a strip on the host; nothing is copied where it is there anyway."""
        seen, device = self._strips[number], self._vae.device
        if device.type != "cuda":
            return
        packer = host_packer([x for x in seen if isinstance(x, Tensor)], is_pinned=True)
        self._strips[number] = [
            packer.like(x).copy_(x, non_blocking=True) if isinstance(x, Tensor) else x for x in seen
        ]

    def _come(self, number: int) -> None:
        """Put what was seen of a strip on the device."""
        self._strips[number] = [
            x.to(self._vae.device, non_blocking=True) if isinstance(x, Tensor) else x
            for x in self._strips[number]
        ]


def _bytes_of(seen: Seen) -> int:
    return sum(part.nbytes for part in seen if isinstance(part, Tensor))


# One latent, for a strip of the picture -----------------------------------------------------------


@dataclass(frozen=True)
class Strip:
    """Neighbouring columns (or rows) of latents."""

    axis: int
    """-1 for columns, -2 for rows."""
    start: int
    stop: int
    size: int
    """How many the whole picture has."""

    @classmethod
    def of(cls, *, height: int, width: int, share: int, num_shares: int) -> Strip:
        """Return one of the strips into which the longer side of some latents is divided."""
        size = max(height, width)
        start, stop = (size * number // num_shares for number in (share, share + 1))
        return cls(-1 if width == size else -2, start, stop, size)

    def span(self, *, scale: int, margin: int) -> range:
        """Return its places at a level, with a margin where the picture goes on.

        Args:
            scale: places of that level per latent.
        """
        start, stop = self.start * scale - margin, self.stop * scale + margin
        return range(max(start, 0), min(stop, self.size * scale))

    def placed(self, pixels_BCTHW: Tensor, *, scale: int) -> Tensor:
        """Return a whole picture that has the pixels of the strip in their places, else zeros."""
        shape = list(pixels_BCTHW.shape)
        shape[self.axis] = self.size * scale
        whole = pixels_BCTHW.new_zeros(shape)
        own = whole.narrow(self.axis, self.start * scale, pixels_BCTHW.shape[self.axis])
        own.copy_(pixels_BCTHW)
        return whole


def decode_latent(model: Any, z_BC1hw: Tensor, seen: Seen, *, strip: Strip) -> Tensor:
    """Decode the next latent of the whole picture to the pixels of a strip, `[B, 3, T, H, W]`."""
    hidden, place = decode_middle(model, z_BC1hw, seen)
    return decode_hidden(model.decoder, hidden, seen, [place], strip=strip)


def decode_middle(model: Any, z_BC1hw: Tensor, seen: Seen) -> tuple[Tensor, int]:
    """Decode the next latent up to the attention, which sees all of it.

    Returns:
        What the attention returns, and how many of the decoder's convolutions have been called.
    """
    decoder, place = model.decoder, [0]
    hidden = _convolve(decoder.conv_in, model.post_quant_conv(z_BC1hw), seen, place)
    return decoder.mid_block(hidden, feat_cache=seen, feat_idx=place), place[0]


def decode_hidden(
    decoder: Any, hidden_BCThw: Tensor, seen: Seen, place: list[int], *, strip: Strip
) -> Tensor:
    """Turn what the attention returned for the whole picture into the pixels of a strip.

    No level keeps more of the picture than the remaining layers look at. The zeros that
    convolutions put beyond that reach only what is cut off later.
    """
    x, held, scale = hidden_BCThw, range(strip.size), 1
    *margins, last = margins_of(decoder, axis=strip.axis)
    for block, margin in zip(decoder.up_blocks, margins, strict=True):
        needed = strip.span(scale=scale, margin=margin)
        x = block(_cut(x, held, needed, strip.axis), feat_cache=seen, feat_idx=place)
        factor = _factor(block, strip.axis)
        scale, held = scale * factor, range(needed.start * factor, needed.stop * factor)
    needed = strip.span(scale=scale, margin=last)
    x = decoder.nonlinearity(decoder.norm_out(_cut(x, held, needed, strip.axis)))
    x = _convolve(decoder.conv_out, x, seen, place)
    return _cut(x, needed, strip.span(scale=scale, margin=0), strip.axis)


def margins_of(decoder: Any, *, axis: int) -> list[int]:
    """Return how far beyond a strip its pixels depend on the input of each up block and the head.

    Counted from the pixels back, in places of the level: a convolution over k places looks k // 2
    further. A place before doubling is two after it, so a margin is halved there, rounded up.
    Norms, activations and convolutions over time stay in their place.

    Example: the released VAE has three residual blocks of two convolutions in each of four up
    blocks, a doubling and a convolution after the first three, and a convolution at the end, all
    over three places. Head: 1; block 3: 1 + 6 = 7; block 2: (7 + 1) / 2 + 6 = 10; block 1:
    (10 + 1) / 2 rounded up + 6 = 12; block 0: 13. That is [13, 12, 10, 7, 1].
    """
    margins = [_reach(decoder.conv_out, axis)]
    for block in reversed(decoder.up_blocks):
        margin = margins[-1]
        if block.upsamplers is not None:
            margin += _reach(block.upsamplers[0].resample[1], axis)
        margin = math.ceil(margin / _factor(block, axis))
        convs = [conv for resnet in block.resnets for conv in (resnet.conv1, resnet.conv2)]
        margins.append(margin + sum(_reach(conv, axis) for conv in convs))
    return margins[::-1]


def _reach(conv: Any, axis: int) -> int:
    return conv.kernel_size[axis] // 2


def _factor(block: Any, axis: int) -> int:
    """Return how many places an up block makes of one."""
    samplers = block.upsamplers
    return 1 if samplers is None else int(samplers[0].resample[0].scale_factor[axis])


def _cut(x: Tensor, held: range, needed: range, axis: int) -> Tensor:
    """Return some of the places that a tensor has along an axis."""
    return x.narrow(axis, needed.start - held.start, len(needed))


def _convolve(conv: Any, x_BCThw: Tensor, seen: Seen, place: list[int]) -> Tensor:
    """Apply a causal convolution to new frames after those it has seen, and remember the last."""
    before = seen[place[0]]
    last = x_BCThw[:, :, -MEMORY_FRAMES:].clone()
    if isinstance(before, Tensor) and last.shape[2] < MEMORY_FRAMES:
        last = torch.cat([before[:, :, -1:], last], dim=2)
    seen[place[0]] = last
    place[0] += 1
    return conv(x_BCThw, before)


# Files --------------------------------------------------------------------------------------------


def original_key(name: str, *, num_res_blocks: int) -> str:
    """Translate a diffusers name of the VAE to the key in `Wan2.1_VAE.pth`.

    The original decoder counts residual blocks and upsamplers through, num_res_blocks + 2 a level:
    with 2, `decoder.up_blocks.1.upsamplers.0.` is `decoder.upsamples.7.`.
    """

    def flat(found: re.Match[str]) -> str:
        level, kind, index = int(found[1]), found[2], int(found[3])
        place = num_res_blocks + 1 if kind == "upsamplers" else index
        return f".upsamples.{level * (num_res_blocks + 2) + place}."

    return rename(_UP_BLOCK.sub(flat, name), _ORIGINAL_KEYS)


def _original_config(path: Path) -> dict[str, Any]:
    """Derive the constructor arguments of diffusers from the shapes in an original file."""
    shapes = {stored.key: stored.tensor.shape for stored in read([path])}
    try:
        base = shapes["encoder.conv1.weight"][0]
        config = {
            "base_dim": base,
            "decoder_base_dim": shapes["decoder.head.0.gamma"][0],
            "z_dim": shapes["conv2.weight"][0],
        }
        return config | _original_levels(shapes, base=base)
    except (KeyError, IndexError) as error:
        raise UserError(f"{path}: key {error.args[0]} is missing; not a Wan 2.1 VAE") from error


def _original_levels(shapes: Mapping[str, torch.Size], *, base: int) -> dict[str, Any]:
    """Read the encoder's levels: residual blocks of one width, then a downsampler, but at the end.

    Example: widths 4, 4, down, 8, 8, down in time too, 8, 8 with base 4 are dim_mult [1, 2, 2],
    num_res_blocks 2, temperal_downsample [False, True].
    """
    dim_mult: list[int] = []
    in_time: list[bool] = []
    num_blocks, index = 0, 0
    while True:
        prefix = f"encoder.downsamples.{index}"
        if f"{prefix}.residual.2.weight" in shapes:
            num_blocks += 1
            width = shapes[f"{prefix}.residual.2.weight"][0] // base
            if len(dim_mult) == len(in_time):
                dim_mult.append(width)
        elif f"{prefix}.resample.1.weight" in shapes:
            in_time.append(f"{prefix}.time_conv.weight" in shapes)
        else:
            break
        index += 1
    if not dim_mult:
        raise KeyError("encoder.downsamples.0.residual.2.weight")
    return {
        "dim_mult": dim_mult,
        "num_res_blocks": num_blocks // len(dim_mult),
        "temperal_downsample": in_time,
    }


def _build(path: Path) -> tuple[AutoencoderKLWan, tuple[Path, ...], Callable[[str], Origin]]:
    """Build an empty VAE for a folder of diffusers or an original file; say how to fill it."""
    if path.is_dir():
        return _empty(path, read_model_config(path / "config.json")), find_shards(path), Origin
    config = _original_config(path)
    key = partial(original_key, num_res_blocks=config["num_res_blocks"])
    return _empty(path, config), (path,), lambda name: Origin(key(name))


def _empty(path: Path, settings: dict[str, Any]) -> AutoencoderKLWan:
    """Build a VAE on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    try:
        with torch.device("meta"):
            model: Any = AutoencoderKLWan.from_config(settings)
        config = model.config
        is_wan_2_1 = (
            config.patch_size is None
            and not config.is_residual
            and 2 ** sum(config.temperal_downsample) == TEMPORAL_STRIDE
        )
        num_means, num_stds = len(config.latents_mean), len(config.latents_std)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        raise UserError(f"{path}: the config makes no Wan VAE ({first_line(error)})") from error
    if not is_wan_2_1:
        raise UserError(f"{path}: no Wan 2.1 VAE (4 frames per latent, no patches, no shortcuts)")
    if not num_means == num_stds == config.z_dim:
        raise UserError(
            f"{path}: latents_mean has {num_means} and latents_std {num_stds} entries, expected"
            f" one per latent channel ({config.z_dim})"
        )
    return model


def released(dtype: torch.dtype = torch.float32) -> VAE:
    """Build an empty VAE of the released size, on the meta device."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.device("meta"):
        return VAE(AutoencoderKLWan()).to(dtype=dtype)


def empty(path: Path, dtype: torch.dtype = torch.float32) -> VAE:
    """Build an empty VAE for a folder or an original file, on the meta device."""
    return VAE(_build(path)[0]).to(dtype=dtype)


def check(path: Path) -> None:
    """Check that the weights are there, whole, and fit; reads headers only."""
    model, files, origin = _build(path)
    check_files(model, files, origin=origin)


def load(
    path: Path, *, dtype: torch.dtype | None = torch.float32, device: torch.device | str
) -> VAE:
    """Load a VAE from a folder of diffusers or from an original file (`Wan2.1_VAE.pth`).

    Args:
        dtype: type of the weights; None keeps each as stored.
    """
    model, files, origin = _build(path)
    load_files(model, files, origin=origin, dtype=dtype, device=device)
    return VAE(model)
