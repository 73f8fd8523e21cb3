"""What is not finite is found and named; nothing else is."""

import pytest
import torch
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.finite import Decoded, broken_weight, check_finite
from flowcache.runtime.run import finished_frames

BROKEN = [float("nan"), float("inf"), float("-inf")]


def decoded(latents: Tensor, frames: Tensor) -> Decoded:
    return Decoded(frames, latents.isfinite().all())


def test_finite_frames_come_to_the_host_as_bytes():
    frames = torch.linspace(-1, 1, 3 * 2 * 4 * 4).view(3, 2, 4, 4)
    read = finished_frames(decoded(torch.zeros(2), frames), chunks=[0], tick=3)
    assert read.dtype == torch.uint8
    assert read.shape == (2, 4, 4, 3)
    assert (read.min(), read.max()) == (0, 255)


@pytest.mark.parametrize("value", BROKEN)
def test_the_stage_the_chunks_and_the_tick_are_named(value: float):
    good, bad = torch.zeros(3, 1, 4, 4), torch.zeros(3, 1, 4, 4)
    bad[1, 0, 2, 3] = value
    with pytest.raises(UserError, match=r"^the latents of chunk 2 \(clean after tick 7\) hold val"):
        finished_frames(decoded(bad, bad), chunks=(2,), tick=7)
    # even where the decoder hides it
    with pytest.raises(UserError, match=r"^the latents of chunks 0 to 4 \(clean after tick 7\)"):
        finished_frames(decoded(bad, good), chunks=range(5), tick=7)
    with pytest.raises(UserError, match=r"^the decoded frames of chunk 2 \(clean after tick 7\)"):
        finished_frames(decoded(good, bad), chunks=(2,), tick=7)


def test_joined_parts_are_finite_if_all_are():
    good, bad = torch.zeros(3, 1, 4, 4), torch.full((3, 2, 4, 4), float("nan"))
    parts = [decoded(good, good), decoded(bad, bad), decoded(good, good)]
    assert Decoded.joined(parts).frames.shape == (3, 4, 4, 4)
    assert not Decoded.joined(parts).is_latent_finite
    assert Decoded.joined([parts[0], parts[2]]).is_latent_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_the_first_broken_weight_is_named(dtype: torch.dtype):
    first, second = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    modules = {"transformer": first, "VAE": second}
    for parameter in (*first.parameters(), *second.parameters()):
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(dtype)
    assert broken_weight(modules) is None
    second[1].bias.data[1:] = float("nan")
    assert broken_weight(modules) == "1.bias of the VAE"


@pytest.mark.parametrize("value", BROKEN)
def test_a_result_is_returned_or_its_cause_is_said(value: float):
    x = torch.ones(2, 2)
    model = nn.Linear(2, 2)
    assert check_finite(x, "the embeddings", modules={"text encoder": model}) is x
    x[1, 1] = value
    with pytest.raises(UserError, match="though all weights of text encoder are finite: a number"):
        check_finite(x, "the embeddings", modules={"text encoder": model})
    model.weight.data[0, 0] = value
    with pytest.raises(UserError, match=r"^the embeddings .* so does its weight weight of"):
        check_finite(x, "the embeddings", modules={"text encoder": model})
