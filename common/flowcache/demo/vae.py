"""Train a small Wan VAE on the demo's clips and measure its latents.

Axes: B batch, T frames, H rows, W columns, C latent channels, F latent frames.
"""

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from flowcache.demo.clips import Attributes, draw, draw_scene
from flowcache.demo.optim import Muon, split_parameters
from flowcache.demo.trainer import Loss, StepRandomness

# (batch, frames); frames are 1 + 4 k. Long ones teach that a clip goes on as it began.
_BATCH_SHAPES = ((2, 9), (2, 17), (4, 5), (2, 17), (2, 9), (2, 17), (4, 5), (2, 33))
_KL_WEIGHT = 1e-4
_SQUARE_WEIGHT = 3.0
_BRANCH_GAIN = 0.3
_TAP_NOISE = 0.1
# The spread of the posterior is fixed: a learned one starts at 1 and drowns the picture for long.
# Generation uses the posterior's mean only.
_POSTERIOR_STD = 0.05
_TEST_SEED = 2


def new_vae() -> AutoencoderKLWan:
    """Make the demo's untrained VAE: 0.7 M parameters, strides 4 x 8 x 8, 16 channels."""
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    for name, part in vae.named_modules():
        if isinstance(part, nn.Conv3d | nn.Conv2d):
            _initialize(name, part)
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
    matrices, rest = split_parameters(trained, matrices_under=inside)
    return [
        Muon(matrices, 0.01 * rate),
        torch.optim.AdamW(rest, 1.5e-3 * rate, betas=(0.9, 0.95), weight_decay=0),
    ]


def to_signed(frames: np.ndarray) -> Tensor:
    """Turn uint8 `[T, H, W, 3]` into float `[3, T, H, W]` in -1..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def encode(vae: AutoencoderKLWan, video_B3THW: Tensor) -> Tensor:
    """Encode pixels in -1..1 to latents `[B, C, F, h, w]`, the posterior's mean, not normalised."""
    (posterior,) = vae.encode(video_B3THW, return_dict=False)
    return posterior.mode()


def decode(vae: AutoencoderKLWan, latents_BCFhw: Tensor) -> Tensor:
    """Decode latents that are not normalised to pixels `[B, 3, T, H, W]` in -1..1."""
    (video_B3THW,) = vae.decode(latents_BCFhw, return_dict=False)
    return video_B3THW


def vae_loss(vae: AutoencoderKLWan, pool: list[Attributes], *, scene_share: float) -> Loss:
    """Make the loss of a training step: absolute and squared error, and a little KL divergence.

    Args:
        vae: model to train.
        pool: attributes that clips are drawn from.
        scene_share: share of `draw_scene` among the clips.
    """

    def loss(step: int, randomness: StepRandomness) -> Tensor:
        batch, num_frames = _BATCH_SHAPES[step % len(_BATCH_SHAPES)]
        rng = randomness.numpy
        clips = [
            draw_scene(rng, num_frames=num_frames)
            if rng.random() < scene_share
            else draw(rng, pool, num_frames=num_frames)[1]
            for _ in range(batch)
        ]
        video_B3THW = torch.stack([to_signed(clip) for clip in clips])
        mean_BCFhw = encode(vae, video_B3THW)
        noise = torch.randn(mean_BCFhw.shape, generator=randomness.torch)
        decoded_B3THW = decode(vae, mean_BCFhw + _POSTERIOR_STD * noise)
        error = decoded_B3THW - video_B3THW
        kl = mean_BCFhw.square().mean() / 2
        return error.abs().mean() + _SQUARE_WEIGHT * error.square().mean() + _KL_WEIGHT * kl

    return loss


def vae_psnr(
    vae: AutoencoderKLWan, pool: list[Attributes], *, num_clips: int, num_frames: int
) -> float:
    """Measure the mean PSNR in dB of drawn clips that were encoded (posterior mean) and decoded."""
    values = []
    for index in range(num_clips):
        rng = np.random.default_rng((_TEST_SEED, index))
        video_B3THW = to_signed(draw(rng, pool, num_frames=num_frames)[1])[None]
        with torch.inference_mode():
            decoded_B3THW = decode(vae, encode(vae, video_B3THW))
        # the range -1..1 is 2 wide: a peak's square is 4
        values.append(10 * np.log10(4 / float((decoded_B3THW - video_B3THW).square().mean())))
    return float(np.mean(values))
