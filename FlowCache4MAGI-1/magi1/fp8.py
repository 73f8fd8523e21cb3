"""Linear layers of the quantised checkpoints: 8-bit weights and activations, bfloat16 out.

Layers 1 to num_layers - 2 of those checkpoints have them; the first and the last layer do not.
Axes: M rows, I input width, O output width.
"""

import torch
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
FP8_MAX = torch.finfo(FP8).max
FP8_CAPABILITY = (8, 9)
"""First CUDA compute capability with 8-bit matrix products (Ada; Hopper is 9.0)."""
GEMM_MULTIPLE = 16
"""Both widths of an 8-bit matrix product on a GPU must divide by this."""


def has_fp8_gemm(device: torch.device) -> bool:
    """Tell whether 8-bit matrix products run natively; elsewhere they are emulated in float32.

    Shapes on the meta device are traced as on a GPU that has them.
    """
    if device.type == "meta":
        return True
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def quantise(x: Tensor, divisor: Tensor) -> Tensor:
    """Divide by `divisor` in float32, clamp to what fits, round to bfloat16 and then to 8 bits.

    The rounding to bfloat16 in between is part of how the checkpoints were made.
    """
    # In one line: the float32 quotient is the largest tensor of a layer, and is gone after it is
    # rounded. A 16-bit x is widened inside the division, without a copy of its own.
    return (x / divisor.float()).clamp_(-FP8_MAX, FP8_MAX).to(torch.bfloat16).to(FP8)


def emulated_product(
    x_MI: Tensor, weight_OI: Tensor, *, x_scale: Tensor, w_scale: Tensor
) -> Tensor:
    """Multiply 8-bit matrices in float32, whose products of 8-bit values are exact: `[M, O]`."""
    return (x_MI.float() @ weight_OI.float().T) * x_scale * w_scale


def product(x_MI: Tensor, weight_OI: Tensor, *, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """Multiply 8-bit matrices, times both scales, in bfloat16: `[M, O]`."""
    is_aligned = all(width % GEMM_MULTIPLE == 0 for width in weight_OI.shape)
    if has_fp8_gemm(x_MI.device) and is_aligned:
        return native_product(x_MI, weight_OI, x_scale=x_scale, w_scale=w_scale)
    return emulated_product(x_MI, weight_OI, x_scale=x_scale, w_scale=w_scale).to(torch.bfloat16)


def native_product(x_MI: Tensor, weight_OI: Tensor, *, x_scale: Tensor, w_scale: Tensor) -> Tensor:
    """Multiply 8-bit matrices with PyTorch's own kernel, accumulating in float32: `[M, O]`."""
    return torch._scaled_mm(  # pyright: ignore[reportPrivateUsage]
        x_MI, weight_OI.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16
    )


class Fp8Linear(nn.Module):
    """A linear layer whose activations are divided by one scale (stored once per channel)."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        weight = torch.zeros(1, width_out, width_in, dtype=FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.input_scale = nn.Parameter(self._input_scale(width_in), requires_grad=False)

    def _input_scale(self, width_in: int) -> Tensor:
        return torch.ones(width_in)

    def quantised(self, x: Tensor) -> Tensor:
        """Return the activations in 8 bits."""
        return quantise(x, self.input_scale)

    def forward(self, x: Tensor) -> Tensor:
        out_MO = product(
            self.quantised(x).flatten(0, -2),
            self.weight[0],
            # the kernel takes one scale; the stored vector holds the same value throughout
            x_scale=self.input_scale[0],
            w_scale=self.weight_scale[0],
        )
        return out_MO.unflatten(0, x.shape[:-1])


class SmoothFp8Linear(Fp8Linear):
    """A linear layer whose activations are divided by a scale of their own per channel.

    The weights hold the ratio of that scale to `input_scale`.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out)
        self.smooth_scale = nn.Parameter(torch.ones(1, width_in), requires_grad=False)

    def _input_scale(self, width_in: int) -> Tensor:
        return torch.ones(1)

    def quantised(self, x: Tensor) -> Tensor:
        return quantise(x, self.smooth_scale)
