"""LPIPS against a plain computation in numpy, and how its weights are found and checked."""

import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from closeness import assert_close
from scipy.ndimage import maximum_filter
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.lpips import BACKBONE_FILE, LPIPS, Weights, find_weights, load_lpips
from flowcache.runtime.metrics import lpips_per_frame

pytestmark = pytest.mark.numeric

Array = npt.NDArray[np.float64]

SHAPES = {
    "features.0": (64, 3, 11, 11),
    "features.3": (192, 64, 5, 5),
    "features.6": (384, 192, 3, 3),
    "features.8": (256, 384, 3, 3),
    "features.10": (256, 256, 3, 3),
}


def random_backbone() -> dict[str, Tensor]:
    """Return weights in the released layout, the classifier included."""
    generator = torch.Generator().manual_seed(5)
    tensors = {"classifier.1.weight": torch.zeros(2, 2)}
    for name, shape in SHAPES.items():
        scale = (2 / np.prod(shape[1:])) ** 0.5
        tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * scale
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
    return tensors


def random_heads() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return {
        f"lin{index}.model.1.weight": torch.rand(1, shape[0], 1, 1, generator=generator)
        for index, shape in enumerate(SHAPES.values())
    }


@pytest.fixture(name="folder")
def _folder(tmp_path: Path) -> Path:
    torch.save(random_backbone(), tmp_path / BACKBONE_FILE)
    torch.save(random_heads(), tmp_path / "alex.pth")
    return tmp_path


@pytest.fixture(name="network")
def _network(folder: Path) -> LPIPS:
    return load_lpips(find_weights(folder), device=torch.device("cpu"))


def clips() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    clip = torch.randint(0, 256, (2, 35, 47, 3), generator=generator, dtype=torch.uint8)
    return clip, clip.roll(3, dims=2) // 2


def convolved(x: Array, weight: Array, bias: Array, *, stride: int, padding: int) -> Array:
    """Correlate `[C, H, W]` with `[D, C, k, k]` by one sum over cut-out patches."""
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[2:], axis=(1, 2))
    maps = np.tensordot(weight, patches[:, ::stride, ::stride], axes=([1, 2, 3], [0, 3, 4]))
    return maps + bias[:, None, None]


def pooled(x: Array) -> Array:
    """Take the largest of every 3 x 3 pixels, every second one."""
    largest = maximum_filter(x, size=(1, 3, 3), mode="constant", cval=-np.inf)
    return largest[:, 1:-1:2, 1:-1:2]


def interpolation(small: int, large: int) -> Array:
    """Return the matrix of linear interpolation whose pixels are areas, edges held."""
    matrix = np.zeros((large, small))
    for row in range(large):
        place = min(max((row + 0.5) * small / large - 0.5, 0), small - 1)
        below = int(place)
        matrix[row, below] += 1 - (place - below)
        matrix[row, min(below + 1, small - 1)] += place - below
    return matrix


def plain_features(frame_HW3: npt.NDArray[np.uint8], weights: dict[str, Tensor]) -> list[Array]:
    colours = frame_HW3.astype(np.float64) * 2 / 255 - 1
    x = ((colours - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]).transpose(2, 0, 1)
    features: list[Array] = []
    for name in SHAPES:
        x = pooled(x) if name in ("features.3", "features.6") else x
        weight, bias = (weights[f"{name}.{part}"].double().numpy() for part in ("weight", "bias"))
        stride, padding = {"features.0": (4, 2), "features.3": (1, 2)}.get(name, (1, 1))
        x = np.maximum(convolved(x, weight, bias, stride=stride, padding=padding), 0)
        features.append(x / np.maximum(np.linalg.norm(x, axis=0), 1e-12))
    return features


def plain_lpips(clip: Tensor, reference: Tensor) -> list[float]:
    backbone, heads = random_backbone(), random_heads()
    values: list[float] = []
    for frame, other in zip(clip.numpy(), reference.numpy(), strict=True):
        total = np.zeros(frame.shape[:2])
        pairs = zip(plain_features(frame, backbone), plain_features(other, backbone), strict=True)
        for index, (x, y) in enumerate(pairs):
            head = heads[f"lin{index}.model.1.weight"].double().numpy().reshape(-1)
            small = np.einsum("c,chw->hw", head, (x - y) ** 2)
            rows, columns = (
                interpolation(a, b) for a, b in zip(small.shape, total.shape, strict=True)
            )
            total += rows @ small @ columns.T
        values.append(float(total.mean()))
    return values


def test_every_frame_has_the_distance_of_a_plain_computation(network: LPIPS):
    clip, reference = clips()
    expected = plain_lpips(clip, reference)
    assert abs(expected[0] - expected[1]) > 1e-3
    found = lpips_per_frame(network, clip, reference)
    assert_close(found, expected, ulps=64, dtype=torch.float32)


def test_equal_frames_have_distance_zero_and_more_noise_is_farther(network: LPIPS):
    clip, _ = clips()
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(1))
    levels = [
        lpips_per_frame(network, (clip + noise * level).clamp(0, 255).to(torch.uint8), clip).mean()
        for level in (0, 8, 64)
    ]
    assert levels[0] == 0
    assert levels[0] < levels[1] < levels[2]


def test_clips_that_cannot_be_compared_are_named(network: LPIPS):
    clip, reference = clips()
    with pytest.raises(UserError, match=r"got \[2, 35, 47, 3\] and reference \[1, 35, 47, 3\]"):
        lpips_per_frame(network, clip, reference[:1])
    with pytest.raises(UserError, match="at least 31 x 31 pixels, got 47 x 30"):
        lpips_per_frame(network, clip[:, :30], reference[:, :30])
    assert lpips_per_frame(network, clip[:, :31, :31], reference[:, :31, :31]).isfinite().all()


def test_the_backbone_is_found_in_the_cache_of_torch_and_the_heads_in_torchmetrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"download https://\S+ to there") as caught:
        find_weights(None)
    assert "\n" not in str(caught.value)
    path = tmp_path / "hub" / "checkpoints" / BACKBONE_FILE
    assert str(path) in str(caught.value)
    path.parent.mkdir(parents=True)
    torch.save(random_backbone(), path)
    weights = find_weights(None)
    assert weights.backbone == path
    assert weights.heads.name == "alex.pth"
    assert "torchmetrics" in weights.heads.parts
    network = load_lpips(weights, device=torch.device("cpu"))
    clip, reference = clips()
    assert (lpips_per_frame(network, clip, reference) > 0).all()
    assert all((head.weight >= 0).all() for head in network.heads)


def test_a_given_file_is_used_and_its_digest_told(folder: Path):
    weights = find_weights(folder / BACKBONE_FILE)
    assert weights == Weights(folder / BACKBONE_FILE, folder / "alex.pth")
    content = (folder / BACKBONE_FILE).read_bytes()
    assert weights.digests()["backbone"] == hashlib.sha256(content).hexdigest()


def test_files_that_are_no_such_weights_are_named_in_one_line(folder: Path):
    backbone, heads = random_backbone(), random_heads()
    path = folder / BACKBONE_FILE
    cases: list[tuple[object, str]] = [
        ({k: v for k, v in backbone.items() if k != "features.6.bias"}, "features.6.bias must be"),
        (backbone | {"features.0.weight": torch.zeros(64, 3, 7, 7)}, r"found \[64, 3, 7, 7\]"),
        ([1, 2], "holds no named tensors"),
    ]
    for content, words in cases:
        torch.save(content, path)
        with pytest.raises(UserError, match=words) as caught:
            load_lpips(find_weights(path), device=torch.device("cpu"))
        assert "\n" not in str(caught.value)
    torch.save(backbone, path)
    torch.save(heads | {"lin4.model.1.weight": torch.zeros(1, 3, 1, 1)}, folder / "alex.pth")
    with pytest.raises(UserError, match=r"alex\.pth: lin4\.model\.1\.weight must be"):
        load_lpips(find_weights(path), device=torch.device("cpu"))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a weights file"):
        load_lpips(find_weights(path), device=torch.device("cpu"))
    path.write_text("<html>not found</html>")
    with pytest.raises(UserError, match="not a weights file"):
        load_lpips(find_weights(path), device=torch.device("cpu"))
