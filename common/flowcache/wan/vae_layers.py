"""diffusers' layers of a Wan VAE in fewer passes over memory, with the same weights.

The norms of diffusers divide by a norm over channels in three passes, of which the first is slow on
a CPU, then scale in two more, and the activation is another. Here a norm is a sum of squares and
two products, and takes the activation that follows along. The result differs by rounding: about
1e-6 of its size.

Axes: B batch, C channels, T frames, h/w rows/columns.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanCausalConv3d,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn import functional

from flowcache.runtime.ops import conv3d

LEAST_SQUARES = 1e-24
"""Below it a sum of squares counts as this: the square of the least norm of diffusers."""


class ChannelNorm(nn.Module):
    """Root-mean-square norm over channels, computed in float32; SiLU after it where asked.

    Args:
        norm: whose weights it shares.
        is_activated: whether SiLU follows.
    """

    def __init__(self, norm: WanRMS_norm, *, is_activated: bool) -> None:
        super().__init__()
        assert norm.channel_first, "no norm of Wan 2.1"
        assert not isinstance(norm.bias, Tensor), "no norm of Wan 2.1"
        self.gamma, self.is_activated = norm.gamma, is_activated
        self.of_rows: Callable[..., Tensor] | None = None
        """`normed_rows`, compiled: for activations whose channels lie next to each other."""

    def forward(self, x_BCThw: Tensor) -> Tensor:
        if self.of_rows is None:
            return normed(self, x_BCThw, self.gamma, axis=1)
        rows = x_BCThw.movedim(1, -1)
        return self.of_rows(self, rows.flatten(0, -2)).view(rows.shape).movedim(-1, 1)


def normed(norm: ChannelNorm, x: Tensor, gamma: Tensor, *, axis: int) -> Tensor:
    """Apply a norm, and SiLU if it has one, to channels along an axis."""
    wide = x.float()
    squares = wide.square().sum(dim=axis, keepdim=True)
    # in place: what is overwritten was made here
    inverse = squares.clamp_(min=LEAST_SQUARES).rsqrt_().mul_(gamma.numel() ** 0.5)
    y = (wide * inverse).mul_(gamma)
    return (functional.silu(y, inplace=True) if norm.is_activated else y).to(x.dtype)


def normed_rows(norm: nn.Module, x_NC: Tensor) -> Tensor:
    """Apply a norm to rows of channels; the form that is compiled, once per number of channels."""
    assert isinstance(norm, ChannelNorm)
    return normed(norm, x_NC, norm.gamma.flatten(), axis=-1)


def channels_last(model: nn.Module, *, of_rows: Callable[..., Tensor] | None) -> None:
    """Have a VAE keep channels next to each other, in place: tensor cores read them so.

    Args:
        of_rows: `normed_rows`, compiled; None: norms are not.
    """
    for part in model.modules():
        if isinstance(part, CausalConv3d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(part, nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
        elif isinstance(part, ChannelNorm):
            part.of_rows = of_rows


class CausalConv3d(WanCausalConv3d):
    """diffusers' causal convolution; zeros around the picture are not written out.

    Args:
        conv: whose weights it shares.
    """

    def __init__(self, conv: WanCausalConv3d) -> None:
        left, _, top, _, before, _ = (int(size) for size in conv._padding)
        sizes: Any = (conv.kernel_size, conv.stride, (before // 2, top, left))
        with torch.device("meta"):
            super().__init__(conv.in_channels, conv.out_channels, *sizes)
        self.weight, self.bias = conv.weight, conv.bias
        self.before, self.around = before, (0, top, left)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        before = self.before
        if cache_x is not None and before:
            x, before = torch.cat([cache_x, x], dim=2), before - cache_x.shape[2]
        if before:
            x = functional.pad(x, (0, 0, 0, 0, before, 0))
        return conv3d(x, self.weight, self.bias, stride=self.stride, padding=self.around)


def with_own_layers(model: AutoencoderKLWan) -> AutoencoderKLWan:
    """Return a VAE of the same parameters, not copied, with the layers above."""
    own = copy.deepcopy(model, {id(each): each for each in (*model.parameters(), *model.buffers())})
    for part in list(own.modules()):
        # in all of diffusers' parts that have an activation, it follows each of their own norms
        activation = getattr(part, "nonlinearity", None)
        assert activation is None or isinstance(activation, nn.SiLU), f"{activation} is no SiLU"
        for name, child in list(part.named_children()):
            if isinstance(child, WanCausalConv3d):
                part.register_module(name, CausalConv3d(child))
            elif isinstance(child, WanRMS_norm):
                is_activated = activation is not None
                part.register_module(name, ChannelNorm(child, is_activated=is_activated))
            elif child is activation:
                part.register_module(name, nn.Identity())
    return own
