"""LPIPS: how different two frames look, as the distance of AlexNet's features; 0 for equal frames.

Axes: T frames, H rows, W columns, 3 colours, C channels.

Written here since the package `lpips` imports torchvision, which a run does not need. The
backbone's weights are a file that is never downloaded here; the five learned heads come with
torchmetrics.

Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric;
version 0.1 of the released weights, `net="alex"`, `spatial=True`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

from flowcache.errors import UserError

BACKBONE_FILE = "alexnet-owt-7be5be79.pth"
"""Name that torch's hub gives the file; its SHA-256 starts with the last part."""
BACKBONE_DIGEST = "7be5be79"
BACKBONE_URL = f"https://download.pytorch.org/models/{BACKBONE_FILE}"
HEADS_FILE = "alex.pth"

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and deviation of ImageNet's colours in -1..1. Source: the released implementation."""
NORM_OFFSET = 1e-10
"""Added to a feature's length before it is divided by it. Source: as above."""
MIN_SIDE = 31
"""Fewest pixels of a side that leave the last layers one feature."""


@dataclass(frozen=True)
class Layer:
    """A convolution of AlexNet: its name in the weights, channels in and out, kernel, padding."""

    name: str
    d_in: int
    d_out: int
    kernel: int
    padding: int
    stride: int = 1
    is_pooled: bool = False
    """Whether a max-pool of 3 x 3 with stride 2 goes before it."""


# Source: Krizhevsky 2014, One weird trick for parallelizing convolutional neural networks.
LAYERS = (
    Layer("features.0", 3, 64, kernel=11, padding=2, stride=4),
    Layer("features.3", 64, 192, kernel=5, padding=2, is_pooled=True),
    Layer("features.6", 192, 384, kernel=3, padding=1, is_pooled=True),
    Layer("features.8", 384, 256, kernel=3, padding=1),
    Layer("features.10", 256, 256, kernel=3, padding=1),
)


class LPIPS(nn.Module):
    """The network: five convolutions and a weight per channel of each."""

    shift_311: Tensor
    scale_311: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(
                layer.d_in, layer.d_out, layer.kernel, stride=layer.stride, padding=layer.padding
            )
            for layer in LAYERS
        )
        self.heads = nn.ModuleList(
            nn.Conv2d(layer.d_out, 1, kernel_size=1, bias=False) for layer in LAYERS
        )
        self.register_buffer("shift_311", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale_311", torch.tensor(SCALE).view(3, 1, 1))

    def forward(self, clip_T3HW: Tensor, reference_T3HW: Tensor) -> Tensor:
        """Return the distance at every pixel, `[T, H, W]`, of float pixels in -1..1."""
        size = clip_T3HW.shape[-2:]
        total_T1HW = torch.zeros_like(clip_T3HW[:, :1])
        pairs = zip(self._features(clip_T3HW), self._features(reference_T3HW), strict=True)
        for head, (features, reference) in zip(self.heads, pairs, strict=True):
            distance_T1HW = head((features - reference).square())
            total_T1HW += interpolate(distance_T1HW, size=size, mode="bilinear")
        return total_T1HW[:, 0]

    def _features(self, pixels_T3HW: Tensor) -> list[Tensor]:
        """Return the features after each convolution, every pixel's vector of length 1."""
        x_TCHW = (pixels_T3HW - self.shift_311) / self.scale_311
        features: list[Tensor] = []
        for layer, convolution in zip(LAYERS, self.convolutions, strict=True):
            if layer.is_pooled:
                x_TCHW = max_pool2d(x_TCHW, kernel_size=3, stride=2)
            x_TCHW = relu(convolution(x_TCHW))
            length_T1HW = x_TCHW.square().sum(1, keepdim=True).sqrt()
            features.append(x_TCHW / (length_T1HW + NORM_OFFSET))
        return features


@dataclass(frozen=True)
class Weights:
    """The two files."""

    backbone: Path
    heads: Path

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of both files, as hexadecimal text."""
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in (("backbone", self.backbone), ("heads", self.heads))
        }


def find_weights(given: Path | None) -> Weights:
    """Find the weights where they were said to be, or in torch's cache.

    Args:
        given: AlexNet's file, or a folder that holds it under its released name; heads next to
            it as `alex.pth` are used instead of those of torchmetrics.
    """
    place = given or Path(torch.hub.get_dir()) / "checkpoints"
    backbone = place if place.is_file() else place / BACKBONE_FILE
    if not backbone.is_file():
        raise UserError(
            f"LPIPS needs the weights of AlexNet, which are not at {backbone}: download "
            f"{BACKBONE_URL} to there, or say with --lpips-weights where they are"
        )
    given_heads = backbone.with_name(HEADS_FILE)
    shipped = Path(str(files("torchmetrics") / "functional" / "image" / "lpips_models"))
    return Weights(backbone, given_heads if given_heads.is_file() else shipped / HEADS_FILE)


def load_lpips(weights: Weights, *, device: torch.device) -> LPIPS:
    """Load the network, ready to use."""
    network = LPIPS()
    backbone, heads = _read(weights.backbone), _read(weights.heads)
    wanted: dict[str, tuple[Path, Mapping[str, Tensor], str]] = {}
    for index, layer in enumerate(LAYERS):
        for part in ("weight", "bias"):
            key = f"convolutions.{index}.{part}"
            wanted[key] = (weights.backbone, backbone, f"{layer.name}.{part}")
        wanted[f"heads.{index}.weight"] = (weights.heads, heads, f"lin{index}.model.1.weight")
    state = network.state_dict()
    for key, (path, tensors, name) in wanted.items():
        shape = list(state[key].shape)
        if name not in tensors or list(tensors[name].shape) != shape:
            found = list(tensors[name].shape) if name in tensors else "nothing"
            raise UserError(f"{path}: {name} must be {shape}, found {found}: is it the right file?")
        state[key] = tensors[name].float()
    network.load_state_dict(state)
    return network.to(device).eval().requires_grad_(False)


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, EOFError, ValueError):
        raise UserError(f"{path}: not a weights file of torch: download it again") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path}: holds no named tensors: is it the right file?")
    return content
