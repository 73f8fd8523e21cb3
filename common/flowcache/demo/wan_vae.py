"""The demo's Wan VAE: how it begins, and what trains it.

Axes: B batch, T frames, H rows, W columns, C latent channels, F latent frames.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file
from torch import Tensor, nn

from flowcache.demo.optim import new_optimizers
from flowcache.demo.vae import BatchShape
from flowcache.wan.vae import original_key

# Frames are 1 + 4 k. Long clips teach that a clip goes on as it began.
BATCH_SHAPES = tuple(
    BatchShape(*shape)
    for shape in ((2, 9), (2, 17), (4, 5), (2, 17), (2, 9), (2, 17), (4, 5), (2, 33))
)
_BRANCH_GAIN = 0.3
_TAP_NOISE = 0.1


def new_vae(start: Path | None = None) -> AutoencoderKLWan:
    """Make a VAE to train, 0.7 M parameters, strides 4 x 8 x 8.

    Args:
        start: checkpoint folder with its weights; None: untrained, the same every time.
    """
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    for name, part in vae.named_modules():
        if isinstance(part, nn.Conv3d | nn.Conv2d):
            _initialize(name, part)
    if start is not None:
        vae.load_state_dict(load_file(start / "vae" / "diffusion_pytorch_model.safetensors"))
    return vae


def _initialize(name: str, conv: nn.Conv3d | nn.Conv2d) -> None:
    """Make the whole VAE pass the picture on, averaged, from the start.

    PyTorch's own initialization loses a part of the picture in each of the many layers: an hour of
    training then goes into finding it again. Outside the residual branches a convolution begins as
    an orthogonal map of the channels; inside, it begins small.
    """
    # The norms run over channels: half the time of a forward pass on a CPU.
    is_3d = isinstance(conv, nn.Conv3d)
    layout = torch.channels_last_3d if is_3d else torch.channels_last
    conv.weight.data = weight = conv.weight.data.contiguous(memory_format=layout)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    if name.endswith((".conv1", ".conv2")):
        nn.init.kaiming_normal_(weight)
        weight.mul_(_BRANCH_GAIN if name.endswith("conv2") else 1.0)
        return
    nn.init.kaiming_normal_(weight)
    weight.mul_(_TAP_NOISE)
    if name.endswith((".proj", ".to_qkv")):
        return
    num_out, num_in = weight.shape[:2]
    if name.endswith("up_blocks") or (".up_blocks." in name and name.endswith("time_conv")):
        channels = torch.eye(num_in).repeat(2, 1)
    elif num_out == num_in and ("resample" in name or name.endswith("time_conv")):
        channels = torch.eye(num_in)
    else:
        channels = nn.init.orthogonal_(torch.empty(num_out, num_in))
    if ".down_blocks." in name and ".resample." in name:
        weight[:, :, :2, :2] += channels[:, :, None, None] / 4
    elif ".down_blocks." in name and name.endswith("time_conv"):
        weight[:, :, 1:, 0, 0] += channels[:, :, None] / 2
    else:
        # the last tap in time is the present, the middle ones in space are the place itself
        place = [-1] * is_3d + [size // 2 for size in weight.shape[-2:]]
        weight[(slice(None), slice(None), *place)] += channels


def vae_optimizers(vae: AutoencoderKLWan, *, rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """Make Muon for the convolutions inside the blocks and AdamW for the rest.

    Args:
        vae: its parameters that are not frozen are trained.
        rate: factor on the learning rates.
    """
    inside = tuple(
        f"{half}.{part}"
        for half in ("encoder", "decoder")
        for part in ("down_blocks", "mid_block", "up_blocks")
    )
    trained = [(name, param) for name, param in vae.named_parameters() if param.requires_grad]
    return new_optimizers(
        trained, matrices_under=inside, matrix_rate=0.01 * rate, rate=1.5e-3 * rate
    )


def original_weights(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """Return the weights under the names of `Wan2.1_VAE.pth`, which has no statistics.

    All that read such a file take those of the released VAE. So the convolutions next to the
    latents are changed: latents that are normalised with these are what they were.
    """
    config: Any = vae.config
    with torch.device("meta"):
        released: Any = AutoencoderKLWan().config
    scale = torch.tensor(config.latents_std) / torch.tensor(released.latents_std)
    mean, shown = torch.tensor(config.latents_mean), torch.tensor(released.latents_mean)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    weight, bias = (weights[f"quant_conv.{name}"][: len(scale)] for name in ("weight", "bias"))
    bias.sub_(mean).div_(scale).add_(shown)
    weight.div_(scale.view(-1, 1, 1, 1, 1))
    weight, bias = (weights[f"post_quant_conv.{name}"] for name in ("weight", "bias"))
    bias.add_(weight[..., 0, 0, 0] @ (mean - scale * shown))
    weight.mul_(scale.view(1, -1, 1, 1, 1))
    num_blocks = config.num_res_blocks
    return {original_key(key, num_res_blocks=num_blocks): x for key, x in weights.items()}


class WanCodec:
    """The VAE's two directions, with latents that are not normalised."""

    def __init__(self, vae: AutoencoderKLWan) -> None:
        self.vae = vae

    def encode(self, video_B3THW: Tensor) -> Tensor:
        """Encode pixels in -1..1 to the posterior's mean, `[B, C, F, h, w]`."""
        (posterior,) = self.vae.encode(video_B3THW, return_dict=False)
        return posterior.mode()

    def decode(self, latents_BCFhw: Tensor) -> Tensor:
        """Decode latents to pixels `[B, 3, T, H, W]` in -1..1."""
        (video_B3THW,) = self.vae.decode(latents_BCFhw, return_dict=False)
        return video_B3THW
