import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from diffusers import AutoencoderKLWan
from refusals import refuses
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowcache.wan import vae
from flowcache.wan.vae import VAE, original_key

pytestmark = pytest.mark.numeric

GOLDEN = Path(__file__).parents[1] / "golden" / "skyreels_v2" / "vae.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def _weights(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "weights."
    return {key[len(prefix) :]: golden[key] for key in golden if key.startswith(prefix)}


@pytest.fixture(scope="module")
def original(golden: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save(_weights(golden), path)
    return path


@pytest.fixture(scope="module")
def model(original: Path) -> VAE:
    return vae.load(original, device="cpu")


def test_encoding_and_decoding_equal_the_reference(golden: dict[str, Tensor], model: VAE):
    assert_close(model.encode(golden["in.video"]), golden["out.latent"], ulps=512)
    assert_close(model.decode(golden["in.latent"]), golden["out.video"], ulps=512)
    assert_close(model.decode(golden["out.latent"]), golden["out.roundtrip"], ulps=512)


def test_pixels_are_clamped_like_the_reference(golden: dict[str, Tensor], model: VAE):
    free = golden["out.video_unclamped"]
    assert free.abs().max() > 1
    assert_close(model.decode(golden["in.latent"]), free.clamp(-1, 1), ulps=512)


def test_reference_drops_a_remainder_of_frames_and_ours_refuses_it(
    golden: dict[str, Tensor], model: VAE
):
    twice = torch.cat([golden["in.video"]] * 2, dim=2)
    assert_close(model.encode(twice[:, :, :9]), golden["out.latent_remainder"], ulps=512)
    with pytest.raises(ValueError, match=r"num_frames must be 4 k \+ 1 .* is 11"):
        model.encode(twice[:, :, :11])
    with pytest.raises(ValueError, match="height and width must be multiples of 8: 15x24"):
        model.encode(golden["in.video"][..., :15, :])


def test_normalisation_is_that_of_the_reference(golden: dict[str, Tensor], model: VAE):
    assert torch.equal(torch.tensor(model.model.config.latents_mean), golden["scale.mean"])
    assert torch.equal(torch.tensor(model.model.config.latents_std), golden["scale.std"])


@pytest.mark.parametrize("portions", [(1, 1, 1, 1, 1, 1), (2, 3, 1), (5, 1)])
def test_a_stream_equals_decoding_at_once_bit_for_bit(model: VAE, portions: tuple[int, ...]):
    latents = torch.randn(2, 16, 6, 3, 2, generator=torch.Generator().manual_seed(0))
    stream = model.stream()
    parts = [stream.decode(part) for part in latents.split(portions, dim=2)]
    assert [part.shape[2] for part in parts] == [
        4 * portion - 3 * (index == 0) for index, portion in enumerate(portions)
    ]
    assert torch.equal(torch.cat(parts, dim=2), model.decode(latents))


def test_two_streams_do_not_see_each_other(model: VAE):
    latents = torch.randn(2, 16, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    expected = [model.decode(latents[i : i + 1]) for i in range(2)]
    streams = [model.stream(), model.stream()]
    parts: list[list[Tensor]] = [[], []]
    for frame in range(3):
        for i, stream in enumerate(streams):
            parts[i].append(stream.decode(latents[i : i + 1, :, frame : frame + 1]))
            model.encode(torch.zeros(1, 3, 5, 16, 16))
    assert all(torch.equal(torch.cat(parts[i], dim=2), expected[i]) for i in range(2))


def test_a_diffusers_folder_holds_the_same_vae(
    golden: dict[str, Tensor], model: VAE, tmp_path: Path
):
    model.model.save_pretrained(tmp_path)
    loaded = vae.load(tmp_path, device="cpu")
    assert loaded.spatial_stride == 8
    assert not loaded.encode(golden["in.video"]).requires_grad
    assert torch.equal(loaded.encode(golden["in.video"]), model.encode(golden["in.video"]))
    vae.check(tmp_path)


def test_statistics_come_from_the_folder_of_the_vae(
    golden: dict[str, Tensor], model: VAE, tmp_path: Path
):
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    path.write_text(
        json.dumps(config | {"latents_mean": mean.tolist(), "latents_std": std.tolist()})
    )
    loaded = vae.load(tmp_path, device="cpu")
    with torch.no_grad():
        mu = model.network.encode(golden["in.video"]).latent_dist.mean
    expected = (mu - mean.view(1, 16, 1, 1, 1)) / std.view(1, 16, 1, 1, 1)
    assert torch.equal(loaded.encode(golden["in.video"]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_results_have_the_asked_dtype(
    golden: dict[str, Tensor], original: Path, dtype: torch.dtype
):
    loaded = vae.load(original, dtype=dtype, device="cpu")
    assert loaded.dtype == dtype
    latents = loaded.encode(golden["in.video"])
    assert latents.dtype == dtype
    assert loaded.decode(latents).dtype == dtype


def test_the_released_size_has_194_tensors_of_126892531_values_under_the_published_keys():
    state = vae.released().model.state_dict()
    keys = {name: original_key(name, num_res_blocks=2) for name in state}
    assert len(set(keys.values())) == len(state) == 194
    assert sum(value.numel() for value in state.values()) == 126_892_531
    published = {
        "post_quant_conv.weight": "conv2.weight",
        "encoder.down_blocks.3.conv_shortcut.bias": "encoder.downsamples.3.shortcut.bias",
        "encoder.mid_block.resnets.1.conv2.bias": "encoder.middle.2.residual.6.bias",
        "decoder.mid_block.attentions.0.to_qkv.weight": "decoder.middle.1.to_qkv.weight",
        "decoder.up_blocks.1.resnets.0.norm1.gamma": "decoder.upsamples.4.residual.0.gamma",
        "decoder.up_blocks.1.upsamplers.0.resample.1.bias": "decoder.upsamples.7.resample.1.bias",
        "decoder.up_blocks.3.resnets.2.norm2.gamma": "decoder.upsamples.14.residual.3.gamma",
        "decoder.conv_out.bias": "decoder.head.2.bias",
    }
    assert keys.items() >= published.items()


@pytest.mark.parametrize("num_res_blocks", [1, 3])
def test_the_config_of_an_original_file_follows_from_its_shapes(
    tmp_path: Path, num_res_blocks: int
):
    settings = {
        "base_dim": 4,
        "decoder_base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 2, 4],
        "num_res_blocks": num_res_blocks,
        "temperal_downsample": [True, False, True],
    }
    made = AutoencoderKLWan(**settings)
    state = made.state_dict()
    path = tmp_path / "vae.pth"
    torch.save(
        {original_key(name, num_res_blocks=num_res_blocks): state[name] for name in state}, path
    )
    loaded = vae.load(path, device="cpu")
    assert {name: loaded.model.config[name] for name in settings} == settings
    assert all(torch.equal(state[name], value) for name, value in loaded.model.state_dict().items())


def _refuses(path: Path, *parts: str) -> None:
    """Require one line of error that names the file, from a check and from a load."""
    refuses(lambda: vae.check(path), str(path), *parts)
    refuses(lambda: vae.load(path, device="cpu"), str(path), *parts)


KEY = "decoder.upsamples.7.time_conv.bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (None, ["key encoder.conv1.weight is missing"]),
        ({KEY: None}, [f"key {KEY} is missing"]),
        (
            {KEY: (3,)},
            [f"key {KEY} has shape [3]", "up_blocks.1.upsamplers.0.time_conv.bias"],
        ),
        ({"extra": (3,)}, ["key extra is unexpected"]),
    ],
)
def test_a_misfit_of_the_original_file_names_file_and_key(
    golden: dict[str, Tensor], tmp_path: Path, change: dict[str, Any] | None, words: list[str]
):
    path = tmp_path / "Wan2.1_VAE.pth"
    _refuses(path, "no such file")
    weights = {"model": torch.ones(1)} if change is None else _weights(golden)
    for key, shape in (change or {}).items():
        weights.pop(key, None)
        if shape is not None:
            weights[key] = torch.ones(shape)
    torch.save(weights, path)
    _refuses(path, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch_size": 2, "in_channels": 12, "out_channels": 12}, "no Wan 2.1 VAE"),
        ({"temperal_downsample": [True, True, True]}, "no Wan 2.1 VAE"),
        ({"latents_mean": [0.0] * 8}, "latents_mean has 8 and latents_std 16 entries"),
        ({"base_dim": "wide"}, "makes no Wan VAE"),
        (None, "not a readable JSON file"),
    ],
)
def test_a_folder_that_is_no_wan_2_1_vae_is_refused(
    model: VAE, tmp_path: Path, change: dict[str, Any] | None, words: str
):
    _refuses(tmp_path, "config.json")
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text("{" if change is None else json.dumps(config | change))
    _refuses(tmp_path, words)


def test_a_vae_that_does_not_fit_its_config_names_file_and_key(model: VAE, tmp_path: Path):
    model.model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file(state | {"quant_conv.bias": torch.ones(5)}, path)
    _refuses(tmp_path, path.name, "key quant_conv.bias has shape [5], expected [32]")


def test_an_empty_vae_is_converted_without_a_word(original: Path, caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        assert vae.empty(original, torch.bfloat16).dtype == torch.bfloat16
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
