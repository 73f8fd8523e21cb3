"""The VAE's own layers against those of diffusers, whose parameters they have."""

import copy

import pytest
import torch
from closeness import assert_close
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from flowcache.gpu.paths import relative_error
from flowcache.wan.vae import VAE
from flowcache.wan.vae_layers import CausalConv3d, ChannelNorm, normed_rows, with_own_layers

pytestmark = pytest.mark.numeric

HALF_ERROR = 0.02
"""Of pixels decoded in bfloat16, relative, by the Euclidean norm; 0.004 found."""


@pytest.fixture(scope="module")
def model() -> AutoencoderKLWan:
    torch.manual_seed(0)
    made = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    for name, parameter in made.named_parameters():
        if name.endswith(("gamma", "bias")):
            nn.init.uniform_(parameter, 0.5, 1.5)
    return made


def latents() -> Tensor:
    return torch.randn(1, 16, 3, 4, 3, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_own_layers_compute_what_diffusers_computes(model: AutoencoderKLWan):
    own = with_own_layers(model)
    kinds = [type(part) for part in own.modules()]
    assert kinds.count(CausalConv3d) == sum(isinstance(part, nn.Conv3d) for part in model.modules())
    assert not any(kind.__name__ in ("WanRMS_norm", "SiLU") for kind in kinds)
    wanted = model.decode(latents()).sample
    assert_close(own.decode(latents()).sample, wanted, ulps=256)
    pixels = wanted.clamp(-1, 1)
    assert_close(
        own.encode(pixels).latent_dist.mean, model.encode(pixels).latent_dist.mean, ulps=256
    )


def test_nothing_of_the_given_model_changes_and_parameters_are_the_same(model: AutoencoderKLWan):
    given = copy.deepcopy(model)
    before = [type(part) for part in given.modules()]
    vae = VAE(given)
    assert [type(part) for part in given.modules()] == before
    theirs = dict(given.named_parameters())
    assert all(parameter is theirs[name] for name, parameter in vae.network.named_parameters())
    vae.to(dtype=torch.bfloat16)
    assert vae.network.decoder.conv_in.weight.dtype == vae.mean.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("is_activated", [True, False])
def test_a_norm_of_zeros_is_zero_and_rows_equal_channels(is_activated: bool):
    torch.manual_seed(0)
    (theirs,) = [
        part
        for name, part in AutoencoderKLWan(base_dim=8, num_res_blocks=1).named_modules()
        if name == "decoder.norm_out"
    ]
    nn.init.uniform_(theirs.gamma, 0.5, 1.5)
    norm = ChannelNorm(theirs, is_activated=is_activated)
    x = torch.randn(1, len(theirs.gamma), 2, 3, 4)
    x[0, :, 0, 0] = 0
    wanted = nn.functional.silu(theirs(x)) if is_activated else theirs(x)
    by_channels = norm(x)
    norm.of_rows = normed_rows
    for found in (by_channels, norm(x)):
        assert found.shape == x.shape
        assert not found[0, :, 0, 0].any()
        assert_close(found, wanted, ulps=16)


def test_channels_next_to_each_other_and_16_bits_are_close(model: AutoencoderKLWan):
    wanted = VAE(copy.deepcopy(model)).decode(latents())
    half = VAE(copy.deepcopy(model)).to(dtype=torch.bfloat16)
    errors = {
        "channels last": VAE(copy.deepcopy(model)).quicken(compiles=False).decode(latents()),
        "bfloat16": half.quicken(compiles=False).decode(latents()),
    }
    errors = {name: relative_error(found, wanted) for name, found in errors.items()}
    assert errors["channels last"] < 2e-6
    assert 1e-4 < errors["bfloat16"] < HALF_ERROR


@torch.no_grad()
def test_pytorch_counts_the_same_flops(model: AutoencoderKLWan):
    counts: list[int] = []
    for decode in (model.decode, with_own_layers(model).decode):
        with FlopCounterMode(display=False) as counter:
            decode(latents())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
