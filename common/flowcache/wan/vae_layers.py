"""diffusers' layers of a Wan VAE in fewer passes over memory, with the same weights.

The norms of diffusers divide by a norm over channels in three passes, of which the first is slow on
a CPU, then scale in two more, and the activation is another. Here a norm is a sum of squares and
two products, and takes the activation that follows along. The result differs by rounding: about
1e-6 of its size.

Axes: B batch, C channels, T frames, h/w rows/columns.
"""

import copy
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

    def forward(self, x_BCThw: Tensor) -> Tensor:
        x = x_BCThw.float()
        squares = x.square().sum(dim=1, keepdim=True)
        # in place: what is overwritten was made here
        inverse = squares.clamp_(min=LEAST_SQUARES).rsqrt_().mul_(len(self.gamma) ** 0.5)
        y = (x * inverse).mul_(self.gamma)
        return (functional.silu(y, inplace=True) if self.is_activated else y).to(x_BCThw.dtype)


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
