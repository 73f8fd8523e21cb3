"""The demo's VAE passes the picture on before it is trained, and learns."""

import numpy as np
import torch
from diffusers import AutoencoderKLWan

from flowcache.demo.clips import draw_crowd
from flowcache.demo.vae import to_signed
from flowcache.demo.wan_vae import WanCodec, new_vae, vae_optimizers


def _explained(vae: AutoencoderKLWan) -> float:
    """Return the share of the pictures' variance that a linear map of the latents gives."""
    rng = np.random.default_rng(0)
    video = torch.stack([to_signed(draw_crowd(rng, num_frames=5)) for _ in range(6)])
    with torch.inference_mode():
        codec = WanCodec(vae)
        latents = codec.encode(video)
        assert codec.decode(latents).shape == video.shape
    assert latents.shape == (6, 16, 2, 8, 8)
    # every latent stands for 8 x 8 pixels, and for one frame or four
    spread = latents[:, :, [0, 1, 1, 1, 1]].repeat_interleave(8, 3).repeat_interleave(8, 4)
    wanted, given = (x.transpose(0, 1).flatten(1).T for x in (video, spread))
    given = torch.cat([given, torch.ones(len(given), 1)], dim=1)
    left = wanted - given @ torch.linalg.lstsq(given, wanted).solution
    return float(1 - left.var(0).sum() / wanted.var(0).sum())


def test_an_untrained_vae_already_keeps_the_picture():
    torch.manual_seed(0)
    ours = _explained(new_vae())
    usual = _explained(AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1))
    assert ours > 0.5
    assert ours > 2 * usual


def test_frozen_parameters_are_given_to_no_optimizer():
    vae = new_vae()
    vae.encoder.requires_grad_(False)
    trained = [
        param
        for optimizer in vae_optimizers(vae)
        for group in optimizer.param_groups
        for param in group["params"]
    ]
    wanted = [param for param in vae.parameters() if param.requires_grad]
    assert {id(param) for param in trained} == {id(param) for param in wanted}
    assert len(trained) == len(wanted)


def test_pixels_become_minus_one_to_one():
    frames = np.zeros((1, 2, 2, 3), np.uint8)
    frames[..., 0] = 255
    signed = to_signed(frames)
    assert signed.shape == (3, 1, 2, 2)
    assert signed[0].eq(1).all()
    assert signed[1:].eq(-1).all()
