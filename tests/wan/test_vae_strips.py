"""Strips of a picture against the whole, and how far a strip looks beyond its edges."""

from collections.abc import Callable

import pytest
import torch
from closeness import assert_close
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from flowcache.runtime.memory import META, scratch_bytes
from flowcache.runtime.parallel import Ranks
from flowcache.wan import vae
from flowcache.wan.vae import (
    VAE,
    Seen,
    Strip,
    decode_hidden,
    decode_latent,
    encode_in_strips,
    encode_strip,
    encoder_margins,
    margins_of,
)

pytestmark = pytest.mark.numeric

NUM_CONVS = 64
"""At least as many as the decoders here have."""


def tiny_vae(**settings: object) -> VAE:
    sizes = {"base_dim": 4, "z_dim": 16, "num_res_blocks": 1} | settings
    torch.manual_seed(0)
    return VAE(AutoencoderKLWan(**sizes).eval().requires_grad_(False))


def latents_of(height: int, width: int, *, num_frames: int = 4) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return 3 * torch.randn(1, 16, num_frames, height, width, generator=draw)


@pytest.mark.parametrize("num_shares", [2, 3, 4])
@pytest.mark.parametrize(
    "size", [(2, 37), (41, 3), (3, 2)], ids=lambda size: f"{size[0]}x{size[1]}"
)
def test_strips_put_together_are_the_whole_picture(
    lone_shares: Callable[[int], list[Ranks]], num_shares: int, size: tuple[int, int]
):
    model, latents = tiny_vae(), latents_of(*size)
    whole = model.decode(latents)
    assert whole.std(dim=(-2, -1)).min() > 0.05
    together = torch.zeros_like(whole)
    for ranks in lone_shares(num_shares):
        stream = model.stream(ranks)
        parts = [stream.decode(part) for part in latents.split((2, 1, 1), dim=2)]
        together += torch.cat(parts, dim=2)
    assert_close(together, whole, ulps=512)


@pytest.mark.parametrize("num_shares", [1, 2])
@pytest.mark.parametrize("num_strips", [2, 3])
def test_strips_decoded_one_after_the_other_are_the_whole_picture(
    lone_shares: Callable[[int], list[Ranks]], num_strips: int, num_shares: int
):
    model, latents = tiny_vae(), latents_of(2, 37)
    whole = model.decode(latents)
    model.num_strips = num_strips
    together = torch.zeros_like(whole)
    for ranks in lone_shares(num_shares):
        stream = model.stream(ranks)
        parts = [stream.decode(part) for part in latents.split((2, 1, 1), dim=2)]
        together += torch.cat(parts, dim=2)
        assert len(stream.strip_bytes()) == num_strips
        assert 0 < sum(stream.strip_bytes()) < stream.state_bytes()
    assert_close(together, whole, ulps=512)


def test_a_strip_keeps_less_than_the_whole_picture(lone_shares: Callable[[int], list[Ranks]]):
    model, latents = tiny_vae(), latents_of(2, 60, num_frames=2)
    streams = [model.stream(ranks) for ranks in lone_shares(3)]
    alone = model.stream()
    for stream in (*streams, alone):
        stream.decode(latents)
    # 20 of 60 columns, 18 more at the latents' size, 4 to 17 of 480 more where most is kept
    assert max(stream.state_bytes() for stream in streams) < 0.45 * alone.state_bytes()


def test_the_whole_picture_is_decoded_as_by_diffusers_bit_for_bit():
    model = tiny_vae().model
    strip = Strip.of(height=3, width=4, share=0, num_shares=1)
    ours: Seen = [None] * NUM_CONVS
    theirs: Seen = [None] * NUM_CONVS
    for z_BC1hw in latents_of(3, 4).split(1, dim=2):
        want = model.decoder(model.post_quant_conv(z_BC1hw), feat_cache=theirs, feat_idx=[0])
        assert torch.equal(decode_latent(model, z_BC1hw, ours, strip=strip), want)


def test_the_longer_side_is_divided_without_gaps():
    strips = [Strip.of(height=7, width=5, share=share, num_shares=3) for share in range(3)]
    assert [(s.axis, s.start, s.stop) for s in strips] == [(-2, 0, 2), (-2, 2, 4), (-2, 4, 7)]
    assert Strip.of(height=5, width=5, share=0, num_shares=2) == Strip(-1, 0, 2, 5)
    assert strips[1].span(scale=2, margin=3) == range(1, 11)
    assert strips[2].span(scale=2, margin=3) == range(5, 14)


def test_the_released_decoder_looks_13_latents_beyond_a_strip():
    for axis in (-1, -2):
        assert margins_of(vae.released().model.decoder, axis=axis) == [13, 12, 10, 7, 1]


def test_the_released_decoder_repeats_little_of_its_work():
    """The shares of docs/speed.md, at 544x960: the largest is that of a strip in the middle."""

    def flops(*, share: int, num_shares: int) -> int:
        strip = Strip.of(height=68, width=120, share=share, num_shares=num_shares)
        model, seen = vae.released().model, [None] * NUM_CONVS
        z_BC1hw = torch.empty(1, 16, 1, 68, 120, device="meta")
        for _ in range(2):  # from the third latent on every latent costs the same
            decode_latent(model, z_BC1hw, seen, strip=strip)
        with FlopCounterMode(display=False) as counter:
            decode_latent(model, z_BC1hw, seen, strip=strip)
        return counter.get_total_flops()

    whole = flops(share=0, num_shares=1)
    for num_shares, expected in {2: 0.53, 4: 0.31, 8: 0.19}.items():
        largest = flops(share=num_shares // 2, num_shares=num_shares)
        assert largest / whole == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_res_blocks": 1},
        {"num_res_blocks": 2},
        {"dim_mult": [1, 2, 2], "temperal_downsample": [True, True], "num_res_blocks": 1},
    ],
    ids=["one block", "released depth", "three levels"],
)
def test_a_strip_depends_on_its_margin_and_on_nothing_else(settings: dict[str, object], axis: int):
    """Gradients show which places of the attention's output a strip's outermost pixels look at."""
    model = tiny_vae(**settings)
    decoder = model.model.decoder.double()
    margin = margins_of(decoder, axis=axis)[0]
    start, stop = margin + 2, margin + 5
    size = [2, 2]
    size[axis] = stop + margin + 2
    whole = Strip.of(height=size[0], width=size[1], share=0, num_shares=1)
    hidden = torch.randn(1, decoder.conv_in.out_channels, 1, *size, dtype=torch.float64)
    hidden.requires_grad_(True)
    with torch.enable_grad():
        pixels = decode_hidden(decoder, hidden, [None] * NUM_CONVS, [0], strip=whole)
        edges = [start * model.spatial_stride, stop * model.spatial_stride - 1]
        seen = [
            torch.autograd.grad(pixels.select(axis, edge).sum(), hidden, retain_graph=True)[0]
            .movedim(axis, 0)
            .flatten(1)
            .any(dim=1)
            .nonzero()
            for edge in edges
        ]
    assert seen[0].min() == start - margin
    assert seen[1].max() == stop + margin - 1


# Frames to latents --------------------------------------------------------------------------------


def pixels_of(height: int, width: int, *, num_frames: int = 9) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return 2 * torch.rand(1, 3, num_frames, 8 * height, 8 * width, generator=draw) - 1


@pytest.mark.parametrize("num_strips", [2, 3, 4])
@pytest.mark.parametrize(
    "size", [(2, 37), (41, 3), (3, 2)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@pytest.mark.parametrize("num_frames", [1, 5, 13])
def test_strips_encoded_one_after_the_other_are_the_whole_picture(
    num_frames: int, size: tuple[int, int], num_strips: int
):
    model, pixels = tiny_vae(), pixels_of(*size, num_frames=num_frames)
    whole = model.encode(pixels)
    assert whole.std(dim=(-2, -1)).min() > 0.001
    model.num_strips = num_strips
    assert_close(model.encode(pixels), whole, ulps=512)


def test_a_single_strip_is_encoded_as_by_diffusers_bit_for_bit():
    model, pixels = tiny_vae().model, pixels_of(3, 4)
    hidden = encode_in_strips(model.encoder, pixels, num_strips=1, stride=8)
    want = model.encode(pixels).latent_dist.mode()
    assert torch.equal(model.quant_conv(hidden).chunk(2, dim=1)[0], want)


def test_the_released_encoder_looks_75_pixels_beyond_a_strip():
    for axis in (-1, -2):
        found = encoder_margins(vae.released().model.encoder, axis=axis)
        assert found == [75, 74, 72, 70, 34, 32, 30, 14, 12, 10, 4, 2]


@pytest.mark.parametrize("axis", [-1, -2])
def test_a_strip_is_encoded_from_its_margin_and_from_nothing_else(axis: int):
    encoder = tiny_vae(num_res_blocks=2).model.encoder.double()
    margin, size, column = encoder_margins(encoder, axis=axis)[0], [1, 1], 10
    size[axis] = 2 * column + 1
    whole = Strip.of(height=size[0], width=size[1], share=0, num_shares=1)
    shape = (1, 3, 1, 8 * size[0], 8 * size[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        hidden = encode_strip(encoder, x, [None] * NUM_CONVS, strip=whole, stride=8)
        (seen,) = torch.autograd.grad(hidden.select(axis, column).sum(), x)
    places = seen.movedim(axis, 0).flatten(1).any(dim=1).nonzero()
    beyond = (8 * column - int(places.min()), int(places.max()) - (8 * column + 7))
    # halvings look further to the right by 1, and are even: 2 + 4 + 8 pixels of the margin
    assert beyond[0] == margin - 14
    assert beyond[1] == margin - 7


def test_strips_take_much_less_memory_to_encode():
    model = vae.released()
    peaks = dict[int, int]()
    for model.num_strips in (1, 4, 8):
        pixels = torch.empty(1, 3, 17, 544, 960, device=META)
        peaks[model.num_strips] = scratch_bytes(lambda pixels=pixels: model.encode(pixels))
    # 240 and 120 of 960 columns, 150 more
    assert peaks[4] < 0.5 * peaks[1]
    assert peaks[8] < 0.38 * peaks[1]
