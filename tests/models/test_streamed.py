"""Blocks that stream and pictures decoded in strips, in whole runs of all models."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowcache
from flowcache.errors import UserError
from flowcache.runtime.model import Request, load_model
from flowcache.runtime.offload import BlockStream, plain_tensors
from flowcache.runtime.run import load_networks, load_text, plan_memory, prepare
from flowcache.runtime.stats import RunStats

pytestmark = pytest.mark.numeric

NUM_LAYERS = 5
"""More than the slots hold, and odd: from pass to pass a block has another slot."""
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "skyreels_v2": ("flowcache_fast", ("num_frames=17", "num_steps=6")),
    "magi1": ("flowcache_fast", ()),
    "self_forcing": ("self_forcing", ("checkpoint=checkpoints/tiny.pt", "num_frames=33")),
}
"""Preset, and settings of a short run."""
WAN = ["skyreels_v2", "self_forcing"]
EIGHT_BITS = {"is_fp8": True}


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return what writes a random checkpoint of a model with some layers, once."""
    written: dict[str, Path] = {}

    def write(name: str, **kind: bool) -> Path:
        key = f"{name}{kind}"
        if key not in written:
            folder = tmp_path_factory.mktemp("deep") / name
            builder = importlib.import_module(f"tiny_{name}")
            written[key] = builder.write_checkpoint(folder, num_layers=NUM_LAYERS, **kind)
        return written[key]

    return write


@pytest.fixture
def make_deep(maker: Callable[..., Any], deep: Callable[..., Path]) -> Callable[..., Any]:
    """Return what makes a short video of a model with some layers."""

    def make(name: str, *settings: str, **kind: bool) -> Any:
        preset, usual = RUNS[name]
        make_video = maker(load_model(name), deep(name, **kind))
        return make_video(*usual, *settings, preset=preset)

    return make


@pytest.mark.parametrize("num_resident", [0, 2])
@pytest.mark.parametrize("name", RUNS)
def test_a_video_whose_blocks_stream_is_the_same(
    make_deep: Callable[..., Any], name: str, num_resident: int
):
    plain = make_deep(name)
    streamed = make_deep(name, f"blocks_on_device={num_resident}")
    assert streamed.path.read_bytes() == plain.path.read_bytes()
    assert streamed.report["config"]["blocks_on_device"] == num_resident
    streamed.check_costs()


@pytest.mark.parametrize(
    "settings",
    [
        ("engine_config.kv_offload=true",),
        ("offload=true",),
        ("kv.dtype=int8",),
    ],
    ids=["keys on the host", "taking turns", "quantised keys"],
)
def test_streaming_composes(make_deep: Callable[..., Any], settings: tuple[str, ...]):
    plain = make_deep("magi1", *settings)
    streamed = make_deep("magi1", *settings, "blocks_on_device=1")
    assert streamed.path.read_bytes() == plain.path.read_bytes()


def test_layers_of_8_bits_stream(make_deep: Callable[..., Any]):
    plain = make_deep("magi1", **EIGHT_BITS)
    streamed = make_deep("magi1", "blocks_on_device=0", **EIGHT_BITS)
    assert streamed.path.read_bytes() == plain.path.read_bytes()


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        *(("skyreels_v2", mode) for mode in ("int8_weight", "fp8_weight", "int8_dynamic")),
        *(("magi1", mode) for mode in ("int8_weight", "fp8_weight", "int8_dynamic")),
        ("self_forcing", "int8_weight"),
    ],
)
def test_quantised_linears_stream(make_deep: Callable[..., Any], name: str, mode: str):
    plain = make_deep(name, f"quantize={mode}")
    streamed = make_deep(name, f"quantize={mode}", "blocks_on_device=1")
    assert streamed.path.read_bytes() == plain.path.read_bytes()
    assert streamed.report["config"]["quantize"] == mode


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("name", RUNS)
def test_8_bit_weights_leave_the_device_and_come_back(make_deep: Callable[..., Any], name: str):
    wide, plain, moved = (
        make_deep(name, *settings)
        for settings in ((), ("quantize=int8_weight",), ("quantize=int8_weight", "offload=true"))
    )
    assert moved.path.read_bytes() == plain.path.read_bytes() != wide.path.read_bytes()


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("name", RUNS)
def test_the_plan_knows_the_bytes_of_8_bit_weights(make_deep: Callable[..., Any], name: str):
    common = ["dtype=bfloat16", *(["runtime_config.t5_device=cuda"] * (name == "magi1"))]
    settings = ("quantize=int8_weight", "text_quantize=int8_weight")
    plain, job = make_deep(name, *common).job, make_deep(name, *common, *settings).job
    loaded = load_networks(job, stats=RunStats(torch.device("cpu")))
    blocks = job.model.blocks(loaded.dit)
    assert list(job.work.block_bytes) == [held_bytes(block) for block in blocks]
    assert job.work.weight_bytes == held_bytes(loaded.dit) < plain.work.weight_bytes
    wide, planned = (
        {part.name: part.num_bytes for part in stage.parts}["the text encoder"]
        for each in (plain, job)
        for stage in plan_memory(each, limit=None).stages
        if stage.name == "text"
    )
    assert planned == held_bytes(load_text(job).model) < wide


def held_bytes(network: torch.nn.Module) -> int:
    """Return what the weights of a network take."""
    return sum(
        tensor.nbytes
        for parameter in network.parameters()
        for tensor in plain_tensors(parameter.data)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skyreels_v2", "magi1"])
def test_compiled_blocks_stream_and_are_compiled_once(make_deep: Callable[..., Any], name: str):
    from torch._dynamo.utils import counters

    def made(*settings: str) -> tuple[bytes, int]:
        torch._dynamo.reset()
        counters.clear()
        found = make_deep(name, "compile=true", *settings)
        assert found.report["compilation"]["failure"] is None
        return found.path.read_bytes(), counters["stats"]["unique_graphs"]

    plain, num_graphs = made()
    assert made("blocks_on_device=1") == (plain, num_graphs)


@pytest.mark.parametrize("name", WAN)
def test_pictures_decoded_in_strips_are_those_decoded_whole(deep: Callable[..., Path], name: str):
    """Compared before the lossy mp4, in which one other level can move a whole block."""
    preset, usual = RUNS[name]
    settings = dict(each.split("=") for each in usual) | {"seed": 7}
    pipe = flowcache.load(
        deep(name), architecture=name, preset=preset, device="cpu", progress_bar=False, **settings
    )
    plain, strips = (
        pipe("a red circle moving right", vae_strips=strips).frames.astype(int) for strips in (1, 3)
    )
    assert np.ptp(plain) > 50
    # a convolution over another width rounds otherwise
    assert np.abs(strips - plain).max() <= 1


@pytest.mark.parametrize("name", RUNS)
def test_more_blocks_than_there_are_is_one_line(deep: Callable[..., Path], name: str):
    preset, usual = RUNS[name]
    settings = ["prompt=a red circle", *usual, f"blocks_on_device={NUM_LAYERS + 1}"]
    with pytest.raises(UserError, match=r"blocks_on_device is 6, but the transformer has 5 blocks"):
        prepare(load_model(name), Request(preset, str(deep(name)), settings), writes=False)


@pytest.mark.parametrize("name", RUNS)
def test_the_plan_knows_the_bytes_and_passes_of_blocks(
    deep: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, maker: Any, name: str
):
    """A run with every step computed takes each streamed block as often as planned."""
    taken: list[int] = []
    take = BlockStream._take

    def counted(stream: BlockStream, number: int) -> None:
        taken.append(number)
        take(stream, number)

    monkeypatch.setattr(BlockStream, "_take", counted)
    model, (_, usual) = load_model(name), RUNS[name]
    preset = "self_forcing" if name == "self_forcing" else "vanilla"
    made = maker(model, deep(name))(*usual, "blocks_on_device=0", preset=preset)
    assert len(taken) == NUM_LAYERS * made.job.work.num_passes
    loaded = load_networks(made.job, stats=RunStats(torch.device("cpu")))
    sizes = [sum(p.nbytes for p in block.parameters()) for block in model.blocks(loaded.dit)]
    assert list(made.job.work.block_bytes) == sizes
