"""The decoder of the Wan VAE, one latent at a time: for the whole picture, or a strip of it.

Up to its attention, which sees all positions, the decoder works at the latents' size and takes
little: 2 % of the FLOPs at 544x960. What follows is local, so a strip needs what lies close to it.

Axes: B batch, C channels, T frames, H/W rows/columns of pixels, h/w rows/columns of latents or of a
level between the two.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MEMORY_FRAMES = 2
"""Frames that a causal convolution over three of them remembers."""

Seen = list[Tensor | str | None]
"""What each convolution of the decoder has seen so far, in the order of their calls."""


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
    def of(cls, *, height: int, width: int, share: int, num_shares: int) -> "Strip":
        """Return one of the strips into which the longer side is divided; it may be empty.

        Args:
            height: of the picture, in latents.
            width: the same.
        """
        size = max(height, width)
        start, stop = (size * number // num_shares for number in (share, share + 1))
        return cls(-1 if width == size else -2, start, stop, size)

    def span(self, *, scale: int, margin: int) -> range:
        """Return its places at a level, with a margin where the picture goes on.

        Args:
            scale: places of that level per latent.
            margin: places of that level.
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
    """Decode the next latent to the pixels of a strip, `[B, 3, T, H, W]`.

    Args:
        model: an `AutoencoderKLWan` of Wan 2.1.
        z_BC1hw: the latent of the whole picture.
        seen: by the earlier latents of this video, for this strip; it is updated.
    """
    decoder = model.decoder
    # the decoder's parts count its convolutions in the list's only entry
    place = [0]
    hidden = _convolve(decoder.conv_in, model.post_quant_conv(z_BC1hw), seen, place)
    hidden = decoder.mid_block(hidden, feat_cache=seen, feat_idx=place)
    return decode_hidden(decoder, hidden, seen, place, strip=strip)


def decode_hidden(
    decoder: Any, hidden_BCThw: Tensor, seen: Seen, place: list[int], *, strip: Strip
) -> Tensor:
    """Turn what the attention returned for the whole picture into the pixels of a strip.

    At every level, no more of the picture is kept than the remaining layers look at. The
    zeros that convolutions put beyond the edge of that reach only what is cut off later.
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
    over three places:

        head     1                             1
        block 3  1 + 6                         7
        block 2  (7 + 1) / 2 + 6              10
        block 1  (10 + 1) / 2 rounded up + 6  12
        block 0  (12 + 1) / 2 rounded up + 6  13

    which is returned as [13, 12, 10, 7, 1]: 13 latents, or 6, 2.5, 0.9 and 0.1 at the later levels.
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
    return (
        1 if block.upsamplers is None else int(block.upsamplers[0].resample[0].scale_factor[axis])
    )


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
