"""The official layout: found, checked by headers, loaded strictly, packed shards included."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor

from flowcache.errors import UserError
from flowcache.runtime.weights import find_shards
from magi1.checkpoint import PACKED, Checkpoint, check_dit, read_shards
from magi1.config import ModelConfig, ReleaseConfig
from magi1.dit import DiT, is_float32


@pytest.fixture
def config(golden: Callable[[str], Any], model_tiny: ModelConfig, tmp_path: Path) -> ReleaseConfig:
    base = golden("dit_24b_style").config()
    paths = {
        "load": str(tmp_path / "4.5B"),
        "t5_pretrained": str(tmp_path / "t5"),
        "vae_pretrained": str(tmp_path / "vae"),
    }
    run = replace(base.runtime_config, **paths)
    return replace(
        base, model_config=replace(model_tiny, params_dtype="torch.bfloat16"), runtime_config=run
    )


def released_state(config: ReleaseConfig) -> dict[str, Tensor]:
    """Random weights in the types of the release."""
    torch.manual_seed(0)
    state = DiT(config.model_config, is_fp8=config.engine_config.fp8_quant).state_dict()
    fp8 = torch.float8_e4m3fn
    return {
        key: torch.randn(value.shape).to(fp8)
        if value.dtype == fp8
        else value.float()
        if is_float32(key) or "scale" in key
        else value.bfloat16()
        for key, value in state.items()
    }


def write_shards(folder: Path, state: dict[str, Tensor]) -> Path:
    """Store weights as two shards with an index."""
    folder.mkdir(parents=True)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weight_map = {key: names[place % 2] for place, key in enumerate(state)}
    for name in names:
        save_file({k: v for k, v in state.items() if weight_map[k] == name}, folder / name)
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    return folder


def write_checkpoint(config: ReleaseConfig, state: dict[str, Tensor], *, suffix: str = "") -> Path:
    run = config.runtime_config
    (Path(run.t5_pretrained) / "t5-v1_1-xxl").mkdir(parents=True)
    Path(run.vae_pretrained).mkdir()
    return write_shards(Path(run.load) / f"inference_weight{suffix}", state)


def pack(path: Path) -> None:
    packed = path.with_name(f"{path.name}.zst")
    packed.write_bytes(zstandard.compress(path.read_bytes()))
    path.unlink()


def assert_loaded(dit: DiT, state: dict[str, Tensor]) -> None:
    loaded = dit.state_dict()
    assert loaded.keys() == state.keys()
    for key, value in state.items():
        assert loaded[key].dtype == value.dtype, key
        assert torch.equal(loaded[key].float(), value.float()), key


def test_shards_are_loaded_in_the_released_types_or_as_asked(config: ReleaseConfig):
    state = released_state(config)
    write_checkpoint(config, state)
    found = Checkpoint.find(config)
    assert_loaded(found.load_dit(device="cpu"), state)
    dit = found.load_dit(device="cpu", dtype=torch.float32)
    assert {value.dtype for value in dit.state_dict().values()} == {torch.float32}


def test_packed_shards_are_loaded_as_plain_ones(config: ReleaseConfig):
    state = released_state(config)
    folder = write_checkpoint(config, state)
    plain_bytes = check_dit(config, find_shards(folder, packing=PACKED))
    pack(folder / "model-00002-of-00002.safetensors")
    checkpoint = Checkpoint.find(config)
    assert [path.suffix for path in checkpoint.dit_files] == [".safetensors", ".zst"]
    assert check_dit(config, checkpoint.dit_files) == plain_bytes
    assert_loaded(checkpoint.load_dit(device="cpu"), state)


def test_a_packed_file_without_index_is_loaded(config: ReleaseConfig, tmp_path: Path):
    state = released_state(config)
    save_file(state, tmp_path / "model.safetensors")
    pack(tmp_path / "model.safetensors")
    stored = {
        each.key: each.tensor.clone() for each in read_shards(find_shards(tmp_path, packing=PACKED))
    }
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key].float(), state[key].float()) for key in state)


def test_a_damaged_packed_shard_is_named(config: ReleaseConfig):
    folder = write_checkpoint(config, released_state(config))
    pack(folder / "model-00001-of-00002.safetensors")
    packed = folder / "model-00001-of-00002.safetensors.zst"
    content = packed.read_bytes()
    packed.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors\.zst: "):
        Checkpoint.find(config).load_dit(device="cpu")
    packed.write_bytes(b"nothing like it")
    with pytest.raises(UserError, match=r"\.zst: cut short or corrupt"):
        check_dit(config, Checkpoint.find(config).dit_files)


def test_packed_shards_need_room_on_the_disk_and_leave_nothing_there(
    config: ReleaseConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = write_checkpoint(config, released_state(config))
    pack(folder / "model-00001-of-00002.safetensors")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    Checkpoint.find(config).load_dit(device="cpu")
    shards = read_shards(Checkpoint.find(config).dit_files)
    next(shards)
    assert len(list(temporary.iterdir())) == 1  # unpacked while it is read
    shards.close()  # as an exception does
    assert list(temporary.iterdir()) == []
    header = zstandard.ZstdCompressor().compressobj(size=10**18).compress(b"a" * 2**20)
    (folder / "model-00001-of-00002.safetensors.zst").write_bytes(header)
    with pytest.raises(UserError, match=r"unpacks to 1 EB, but .* free: set TMPDIR"):
        list(read_shards(Checkpoint.find(config).dit_files))
    assert list(temporary.iterdir()) == []


def test_quantised_checkpoints_are_loaded_as_stored(config: ReleaseConfig):
    quantised = replace(
        config,
        engine_config=replace(config.engine_config, fp8_quant=True, distill=True),
        runtime_config=replace(config.runtime_config, cfg_number=1),
    )
    state = released_state(quantised)
    folder = write_checkpoint(quantised, state, suffix=".fp8.distill")
    assert folder.name == "inference_weight.fp8.distill"
    assert_loaded(Checkpoint.find(quantised).load_dit(device="cpu"), state)


BANDS, FC1 = "rope.bands", "videodit_blocks.layers.1.mlp.linear_fc1.weight"
MISFITS: list[tuple[dict[str, Any], str]] = [
    ({BANDS: None}, r"key rope\.bands is missing"),
    ({"rope.extra": torch.ones(1)}, "key rope.extra is unexpected"),
    ({BANDS: torch.ones(2)}, r"key rope\.bands has shape \[2\], expected \[1\]"),
    (
        {FC1: torch.zeros(1, 48, 32, dtype=torch.bfloat16)},
        rf"key {FC1} is stored as torch\.bfloat16, expected 8",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS)
def test_weights_that_do_not_fit_are_named(
    changes: dict[str, Any], message: str, config: ReleaseConfig, tmp_path: Path
):
    config = replace(config, engine_config=replace(config.engine_config, fp8_quant=True))
    state = {
        key: value for key, value in (released_state(config) | changes).items() if value is not None
    }
    folder = write_shards(tmp_path / "x", state)
    with pytest.raises(UserError, match=message):
        check_dit(config, find_shards(folder))


@pytest.mark.parametrize("part", ["load", "t5_pretrained", "vae_pretrained"])
def test_a_missing_shard_or_folder_is_named(part: str, config: ReleaseConfig):
    weights = write_checkpoint(config, released_state(config))
    (weights / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors: no such file"):
        Checkpoint.find(config)
    shutil.rmtree(getattr(config.runtime_config, part))
    what, advice = (
        f"no such folder, but the config's {part} asks for it",
        f"set runtime_config.{part}",
    )
    with pytest.raises(UserError, match=f"{what}: {advice}, or use --download"):
        Checkpoint.find(config)
