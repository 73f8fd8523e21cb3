"""The ViT VAE: the reference's numbers, tiles and their seams, and wrong files."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from safetensors.torch import save_file

from flowcache.errors import UserError
from flowcache.runtime.parallel import Ranks
from magi1.vae import (
    RELEASED,
    VAE,
    Span,
    Tiling,
    ViTVAE,
    check_decoding,
    check_encoding,
    check_weights,
    in_tiles,
    load,
    parse_config,
    standardise,
)

pytestmark = pytest.mark.numeric

DECODE = Path(__file__).with_name("decode_in_ranks.py")

TINY: dict[str, Any] = asdict(RELEASED) | {
    "video_size": 16,
    "patch_size": 2,
    "z_chans": 4,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
}


def tiny_model() -> ViTVAE:
    torch.manual_seed(0)
    return ViTVAE(parse_config(TINY, source="test")).eval().requires_grad_(False)


def tiny_vae(tiling: Tiling, *, scale: float = 1.0) -> VAE:
    return VAE(tiny_model(), scale=scale, tiling=tiling)


def test_a_narrow_decoder_widens_its_tokens_before_it_spreads_them():
    narrow = TINY | {"embed_dim": 6, "num_heads": 2}
    with pytest.raises(UserError, match="embed_dim is 6, no multiple of 16"):
        parse_config(narrow, source="test")
    torch.manual_seed(0)
    decoder = ViTVAE(parse_config(narrow | {"use_final_proj": True}, source="test")).decoder
    assert decoder.last_layer.weight.shape == (3, 4, 3, 3, 3)
    z = torch.randn(1, 4, 2, 8, 8)
    first = decoder(z)
    assert first.shape == (1, 3, 8, 16, 16)
    # the norm behind the projection makes its scale irrelevant
    with torch.no_grad():
        decoder.final_proj.weight *= 2
        decoder.final_proj.bias *= 2
    # up to the epsilon of its variance
    assert torch.allclose(decoder(z), first, atol=1e-4)


@pytest.fixture
def reference(golden: Callable[[str], Any]) -> tuple[Any, VAE]:
    want = golden("vae")
    model = ViTVAE(parse_config(want.case["ddconfig"], source="test"))
    model.load_state_dict(want.under("weights"))
    return want, VAE(
        model.eval(), scale=1.0, tiling=Tiling(frames=12, height=16, width=16, overlap=0.25)
    )


def test_tiled_encoding_gives_the_reference_latents(reference: tuple[Any, VAE]):
    want, vae = reference
    video = want["video"].float() / 127.5 - 1
    assert_close(vae.encode(video), want["latents_tiled"], ulps=256)
    assert_close(vae.encode(video[:, :, :1]), want["latents_image"], ulps=256)


def test_the_encoder_gives_the_reference_moments(reference: tuple[Any, VAE]):
    want, vae = reference
    with torch.no_grad():
        moments = vae.model.encoder(want["moments_small_in"])
    assert_close(moments, want["moments_small"], ulps=256)


def test_tiled_decoding_gives_the_reference_frames(reference: tuple[Any, VAE]):
    want, vae = reference
    # 4 latents are tiles of 3 and 1, hence 12 + 1 frames
    frames = vae.decode(want["z"])[0].movedim(0, 1)
    assert_close(frames, want["decoded"], ulps=256)
    image = vae.decode(want["z"][:, :, :1])[0].movedim(0, 1)
    assert_close(image, want["decoded_image"], ulps=256)
    levels = (frames * 127.5 + 127.5).clamp(0, 255).to(torch.uint8)
    assert (levels.int() - want["decoded_u8"].int()).abs().max() <= 1


def test_a_video_of_one_tile_is_coded_as_a_whole():
    vae = tiny_vae(Tiling(frames=8, height=16, width=16))
    torch.manual_seed(1)
    video, latents = torch.randn(1, 3, 8, 12, 12), torch.randn(1, 4, 2, 6, 6)
    mean = vae.model.means(video)
    assert_close(vae.encode(video), mean, ulps=256)
    assert_close(vae.decode(latents), vae.model.decoder(latents), ulps=256)


def test_the_scale_lies_between_means_and_latents():
    plain, scaled = (tiny_vae(Tiling(height=16, width=16), scale=scale) for scale in (1.0, 0.5))
    torch.manual_seed(1)
    video, latents = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 4, 1, 4, 4)
    assert_close(scaled.encode(video), 0.5 * plain.encode(video), ulps=256)
    assert_close(scaled.decode(0.5 * latents), plain.decode(latents), ulps=256)


@pytest.mark.parametrize("num_shares", [2, 3, 4])
def test_processes_decode_their_tiles_and_no_others(
    lone_shares: Callable[[int], list[Ranks]], num_shares: int
):
    # 2 x 3 tiles of 8 x 8 latents or less, of 2, 2 and 1 latents
    vae = tiny_vae(Tiling(frames=8, height=16, width=16))
    torch.manual_seed(1)
    latents = torch.randn(1, 4, 5, 9, 14)
    whole, together, num_decoded = vae.decode(latents), torch.zeros(()), []
    for ranks in lone_shares(num_shares):
        calls: list[None] = []
        counted = vae.model.decoder.register_forward_hook(
            lambda *_, calls=calls: calls.append(None)
        )
        together = together + vae.decode(latents, ranks)
        counted.remove()
        num_decoded.append(len(calls))
    # results of tiles are blended linearly, so the processes' pictures add up
    assert_close(together, whole, ulps=256)
    assert num_decoded == [len(range(share, 18, num_shares)) for share in range(num_shares)]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("num", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_get_the_frames_of_one_bit_for_bit(
    run_in_ranks: Callable[..., None], tmp_path: Path, num: int
):
    layouts = {2: ("1x2", "2x1"), 4: ("1x4", "2x2")}[num]
    folder = tmp_path / "vae"
    folder.mkdir()
    save(folder)
    vae = load(folder, scale=1.0, dtype=torch.float32, device="cpu")
    vae.tiling = Tiling(frames=8, height=16, width=16)
    latents = torch.randn(1, 4, 5, 9, 14)
    torch.save(latents, tmp_path / "latents.pt")
    run_in_ranks(DECODE, str(folder), str(tmp_path), *layouts, num=num)
    want = vae.decode(latents)
    for rank in range(num):
        made = torch.load(tmp_path / f"{rank}.pt")
        assert tuple(made) == layouts
        assert all(torch.equal(frames, want) for frames in made.values())


@pytest.mark.parametrize("blends_blended", [True, False])
def test_tiles_of_an_unchanged_video_make_the_video_again(blends_blended: bool):
    torch.manual_seed(0)
    video = torch.randn(1, 3, 5, 21, 30)
    joined = in_tiles(
        video,
        lambda tiles: tiles,
        length=2,
        rows=Span(tile=8, stride=6, extent=2, limit=6),
        columns=Span(tile=10, stride=7, extent=3, limit=7),
        blends_blended=blends_blended,
    )
    assert_close(joined, video, ulps=8)


def test_a_seam_fades_linearly_from_one_tile_to_the_next():
    # two tiles of 4 columns at 0 and 2, worth 0 and 1: columns 2 and 3 are 0/2 and 1/2 of the next
    values = iter([0.0, 1.0])
    joined = in_tiles(
        torch.zeros(1, 1, 1, 2, 4),
        lambda tiles: [torch.full_like(tile, next(values)) for tile in tiles],
        length=1,
        rows=Span(tile=4, stride=2, extent=2, limit=2),
        columns=Span(tile=4, stride=2, extent=2, limit=2),
        blends_blended=True,
    )
    assert joined[0, 0, 0, 0].tolist() == [0.0, 0.0, 0.0, 0.5]


def test_the_released_tiles_are_those_of_the_release():
    tiles = Tiling.of_rate(24)
    assert (tiles.frames, tiles.height, tiles.width, tiles.overlap) == (12, 256, 256, 0.25)
    assert Span.encoding(256, patch=8, overlap=0.25) == Span(256, 192, extent=8, limit=24)
    assert Span.decoding(256, patch=8, overlap=0.25) == Span(32, 24, extent=64, limit=192)
    # 22 pixels hold 5 patches of 4: int(5 * 0.3), int(22 * 0.7), and int(5 * 4 * 0.3), int(5 * 0.7)
    assert Span.encoding(22, patch=4, overlap=0.3) == Span(22, 15, extent=1, limit=4)
    assert Span.decoding(22, patch=4, overlap=0.3) == Span(5, 3, extent=6, limit=14)


def test_height_and_width_are_cut_apart():
    """Each axis of its own tiles gives what cutting along that axis alone gives."""
    torch.manual_seed(0)
    picture = torch.randn(1, 4, 1, 9, 14)
    for tiling, axis in (
        (Tiling(frames=4, height=8, width=64), -2),
        (Tiling(frames=4, height=64, width=8), -1),
    ):
        vae = tiny_vae(tiling)
        made = vae.decode(picture)
        # tiles of 4 latents, 3 apart; 6 pixels of each are kept, 2 are blended
        want = []
        size = picture.shape[axis]
        parts = [
            vae.model.decoder(picture.narrow(axis, i, min(4, size - i)))[:, :, :1]
            for i in range(0, size, 3)
        ]
        for number, part in enumerate(parts):
            part = part.clone()
            if number:
                for k in range(min(2, part.shape[axis])):
                    old = parts[number - 1].select(axis, k - 2)
                    part.select(axis, k).mul_(k / 2).add_(old * (1 - k / 2))
            want.append(part.narrow(axis, 0, min(6, part.shape[axis])))
        torch.testing.assert_close(made, torch.cat(want, dim=axis), rtol=0, atol=1e-5)


@pytest.mark.parametrize("fps", [16, 17, 24, 30, 39, 48, 60, 120, 1, 7, 8, 12, 15, 40, 47])
def test_rates_at_which_the_released_tiles_lose_frames_are_refused(fps: int):
    tiling, is_whole = Tiling.of_rate(fps), fps in (16, 17, 24, 30, 39, 48, 60, 120)
    refusal = pytest.raises(UserError, match="decodes 1 frame instead of 4: set fps=24")
    with nullcontext() if is_whole else refusal:
        check_decoding(tiling, chunk_width=6, temporal_stride=4)
    if tiling.frames >= 4:
        vae = tiny_vae(Tiling(frames=tiling.frames, height=16, width=16))
        assert (vae.decode(torch.zeros(1, 4, 6, 2, 2)).shape[2] == 24) == is_whole


def test_a_tile_lasts_half_a_second():
    vae, latents = tiny_vae(Tiling.of_rate(16)), torch.randn(1, 4, 6, 4, 4)
    want = torch.cat([vae.model.decoder(part) for part in latents.split(2, dim=2)], dim=2)
    torch.testing.assert_close(vae.decode(latents), want)
    video = torch.randn(1, 3, 24, 8, 8)
    means = torch.cat([vae.model.means(part) for part in video.split(8, dim=2)], dim=2)
    torch.testing.assert_close(vae.encode(video), means)


@pytest.mark.parametrize(
    ("fps", "num_frames", "fits"),
    [
        (24, 32, True),
        (16, 32, True),
        (30, 12, True),
        (30, 32, False),
        (18, 32, False),
        (50, 24, True),
    ],
)
def test_a_given_clip_is_encoded_in_whole_latents_or_refused(fps: int, num_frames: int, fits: bool):
    tiling = Tiling.of_rate(fps)
    refusal = pytest.raises(UserError, match=rf"drops the last {tiling.frames % 4} of each")
    with nullcontext() if fits else refusal:
        check_encoding(tiling, num_frames=num_frames, temporal_stride=4)


def test_other_grids_get_interpolated_positions():
    encoder = tiny_model().encoder
    stored = encoder.pos_embed[:, 1:].unflatten(1, (4, 8, 8))
    halved = encoder._positions((4, 4, 4))[:, 1:].unflatten(1, (4, 4, 4))
    means = stored.unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5))
    assert_close(halved, means, ulps=16)


def test_standardised_values_have_mean_0_and_deviation_1():
    x = standardise(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
    # up to the epsilon of the variance
    torch.testing.assert_close(x, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(1, 3, 6, 8, 8), (1, 3, 4, 9, 8)])
def test_videos_of_broken_latents_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="multiple"):
        tiny_vae(Tiling(height=16, width=16)).encode(torch.zeros(shape))


def test_the_released_size_has_the_published_tensors():
    with torch.device("meta"):
        state = ViTVAE(RELEASED).state_dict()
    assert len(state) == 496
    assert sum(value.numel() for value in state.values()) == 613_755_239


def save(folder: Path, *, settings: dict[str, Any] | None = None, **changes: Any) -> Path:
    document = {"_class_name": "ViTVAE", "model_type": "vit", "ddconfig": settings or TINY}
    (folder / "config.json").write_text(json.dumps(document | changes))
    state = tiny_model().state_dict()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def test_a_saved_vae_is_loaded_as_it_was(tmp_path: Path):
    folder = save(tmp_path)
    check_weights(folder)
    vae = load(folder, scale=0.5, dtype=torch.float32, device="cpu")
    latents = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        want = tiny_model().decoder(latents / 0.5)
    assert_close(vae.decode(latents), want, ulps=256)
    assert load(folder, scale=1.0, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown setting colour"),
        ({"depth": "two"}, "depth is 'two', expected int"),
        ({"depth": 0}, "depth is 0, but must be positive"),
        ({"use_rope": True}, "use_rope is True, only False is supported"),
        ({"embed_dim": 33}, "embed_dim is 33, no multiple of 2"),
        ({"depth": 2}, "blocks.1"),
        ({"z_chans": 8}, r"has shape \[32, 4\], expected \[32, 8\]"),
    ],
)
def test_a_wrong_setting_is_named(changes: dict[str, Any], message: str, tmp_path: Path):
    # dropout rates are read by training only
    folder = save(tmp_path, settings=TINY | {"attn_drop_rate": 0.0} | changes)
    with pytest.raises(UserError, match=message):
        check_weights(folder)
    with pytest.raises(UserError, match="_class_name is 'AutoencoderKL', only ViTVAE"):
        check_weights(save(tmp_path, _class_name="AutoencoderKL"))
