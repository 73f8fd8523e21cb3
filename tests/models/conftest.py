"""What the tests of all models need of each: a tiny checkpoint, short settings, names of keys."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowcache.runtime.model import Request, VideoModel, load_model
from flowcache.runtime.video import VideoWriter


@dataclass(frozen=True)
class Short:
    """What a model's tests differ in."""

    checkpoint: str
    """The fixture of the tiny checkpoint."""
    causal: str
    """The preset of chunks that see the ones before, without reuse."""
    num_frames: int
    height: int
    width: int
    num_chunks: int
    chunk_rows: int
    """Decisions for each step of a chunk."""
    long: tuple[str, ...]
    """A video whose first part is finished before the last one begins."""
    uncompressed: str
    """A preset of chunk-wise reuse without compression."""
    passes: tuple[str, ...]
    """What the preset "vanilla" needs to make the same passes."""
    kv_on_host: str
    """What keeps keys and values on the host."""
    for_video: tuple[str, ...]
    """What continuing a video takes."""
    decoder: str
    """What decodes."""
    encoder: str
    """What loads the text encoder."""


SHORT = {
    "skyreels_v2": Short(
        "small",
        "vanilla_causal",
        num_frames=17,
        height=16,
        width=32,
        num_chunks=3,
        chunk_rows=2,
        long=("num_frames=41", "base_num_frames=25", "overlap_history=9", "attention=causal"),
        uncompressed="flowcache_fast",
        passes=("attention=causal",),
        kv_on_host="kv_on_host=true",
        for_video=("overlap_history=9",),
        decoder="flowcache.wan.vae.VAEStream.decode",
        encoder="flowcache.wan.text.load_encoder",
    ),
    "magi1": Short(
        "distilled",
        "vanilla",
        num_frames=24,
        height=32,
        width=48,
        num_chunks=2,
        chunk_rows=1,
        long=("kv.compress=importance", "kv.total_chunks=3", "runtime_config.num_frames=60"),
        uncompressed="flowcache_fast_nocompress",
        passes=("passes.clean_pass=false", "passes.nearly_clean_pass=false"),
        kv_on_host="engine_config.kv_offload=true",
        for_video=(),
        decoder="magi1.vae.VAE.decode",
        encoder="magi1.text.load",
    ),
}


@dataclass(frozen=True)
class Tiny:
    """A model with a tiny checkpoint that makes a short video in a second."""

    model: VideoModel
    folder: Path
    """The checkpoint."""
    short: Short

    def setting(self, argument: str, value: Any) -> str:
        """Return `key=value` by the name of an argument, such as `seed`."""
        return f"{self.model.keys[argument]}={value}"

    def request(self, *settings: str, preset: str = "vanilla", **rest: Any) -> Request:
        """Return a request for a video of the checkpoint."""
        return Request(preset, str(self.folder), ["prompt=a red circle", *settings], **rest)

    def main(self, *arguments: str) -> int:
        """Run the model's command line."""
        return importlib.import_module(f"{self.model.name}.__main__").main([*arguments])


@pytest.fixture(scope="session")
def tiny_of(request: pytest.FixtureRequest) -> Callable[..., Tiny]:
    """Return what gives a model with its tiny checkpoint, or with another one."""

    def make_tiny(name: str, folder: Path | None = None) -> Tiny:
        short = SHORT[name]
        return Tiny(load_model(name), folder or request.getfixturevalue(short.checkpoint), short)

    return make_tiny


@pytest.fixture(scope="session", params=SHORT)
def tiny(request: pytest.FixtureRequest, tiny_of: Callable[..., Tiny]) -> Tiny:
    """Each model with a tiny checkpoint."""
    return tiny_of(request.param)


@pytest.fixture
def make(maker: Callable[..., Any], tiny: Tiny) -> Callable[..., Any]:
    """Return what makes a video in a fresh folder from settings given as `key=value`."""
    return maker(tiny.model, tiny.folder)


@pytest.fixture
def clip(tiny: Tiny, tmp_path: Path) -> Path:
    """A video of 20 frames of random noise at 24 frames per second."""
    return write_noise(tmp_path / "clip.mp4", (tiny.short.height, tiny.short.width))


@pytest.fixture
def noise() -> Callable[[Path, tuple[int, int]], Path]:
    """Return what writes 20 frames of random noise of a size, at 24 frames per second."""
    return write_noise


def write_noise(path: Path, size: tuple[int, int]) -> Path:
    frames = np.random.default_rng(0).integers(0, 255, (20, *size, 3), dtype=np.uint8)
    with VideoWriter(path, fps=24, size=size) as writer:
        writer.append(frames)
    return path
