"""The Wan transformer with the roundings of a model that is cast to bfloat16 as a whole.

`flowcache.wan.dit` keeps norms, modulation, rotation and residual sums in float32, which is more
exact. Some released models were made, and are run by their authors, without that: every operation
takes and gives the weights' type, and only what happens inside one is float32. This gives their
bits, up to what kernels of attention and products differ in.

Axes: as in `flowcache.wan.dit`.

Source: precision of the released Self-Forcing code.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from flowcache.wan.dit import Block, BlockParts, DiT, DiTConfig, Head, RMSNorm, rotate, sinusoid


class RoundedRMSNorm(RMSNorm):
    """Root-mean-square norm, rounded before and after the product with its weight."""

    def forward(self, x: Tensor) -> Tensor:
        normed = functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return normed.to(x.dtype) * self.weight


class RoundedHead(Head):
    """Modulated norm and projection to patches, in the weights' type."""

    def forward(self, x_BSD: Tensor, e_BFD: Tensor) -> Tensor:
        shift, scale = (self.modulation + e_BFD.unsqueeze(2)).unsqueeze(3).unbind(2)
        return self.head(_modulated(x_BSD, shift, scale, eps=self.eps))


class RoundedDiT(DiT):
    """The transformer in the weights' type throughout."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config)
        dim, eps = config.dim, config.eps
        self.parts = BlockParts(_before_attention, _between_attentions, _after_attention)
        self.head = RoundedHead(dim, out_width=self.head.head.out_features, eps=eps)
        for block in self.blocks:
            assert isinstance(block, Block)
            for attention in (block.self_attn, block.cross_attn):
                attention.norm_q = RoundedRMSNorm(dim, eps=eps)
                attention.norm_k = RoundedRMSNorm(dim, eps=eps)

    def _embed_time(self, t_BF: Tensor, fps: Sequence[int]) -> tuple[Tensor, Tensor]:
        s = sinusoid(t_BF, width=self.config.freq_dim).to(self.dtype)
        e_BFD = self.time_embedding(s)
        return e_BFD, self.time_projection(e_BFD).unflatten(-1, (6, -1))


def _before_attention(
    block: Block, x_BSD: Tensor, e0_BF6D: Tensor, rope: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    shift, scale, *_ = _modulators(block, e0_BF6D)
    a, attention = _modulated(x_BSD, shift, scale, eps=block.eps), block.self_attn
    q, k = attention.norm_q(attention.q(a)), attention.norm_k(attention.k(a))
    q, k = (rotate(attention.split(x), rope).to(x.dtype) for x in (q, k))
    return q, k, attention.split(attention.v(a))


def _between_attentions(
    block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    x = _gated_sum(x_BSD, block.self_attn.o(out_BSHC.flatten(2)), _modulators(block, e0_BF6D)[2])
    return x, block.cross_attn.query(block.norm3(x).to(x.dtype))


def _after_attention(block: Block, x_BSD: Tensor, out_BSHC: Tensor, e0_BF6D: Tensor) -> Tensor:
    shift, scale, gate = _modulators(block, e0_BF6D)[3:]
    x = x_BSD + block.cross_attn.o(out_BSHC.flatten(2))
    return _gated_sum(x, block.ffn(_modulated(x, shift, scale, eps=block.eps)), gate)


def _modulators(block: Block, e0_BF6D: Tensor) -> tuple[Tensor, ...]:
    return (block.modulation + e0_BF6D).unsqueeze(3).unbind(2)


def _modulated(x_BSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, *, eps: float) -> Tensor:
    normed = functional.layer_norm(x_BSD, x_BSD.shape[-1:], eps=eps)  # float32 in the kernel
    frames = normed.unflatten(1, (shift_BF1D.shape[1], -1))
    return (frames * (1 + scale_BF1D) + shift_BF1D).flatten(1, 2)


def _gated_sum(x_BSD: Tensor, y_BSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    y = y_BSD.unflatten(1, (gate_BF1D.shape[1], -1)) * gate_BF1D
    return x_BSD + y.flatten(1, 2)
