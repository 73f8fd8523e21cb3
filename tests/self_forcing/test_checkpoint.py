"""Weights as the trainings of both repositories save them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flowcache.errors import UserError
from flowcache.wan.dit import DiT
from flowcache.wan.folder import WanFolder
from flowcache.wan.rounded import RoundedDiT
from self_forcing.checkpoint import FOLDERS, with_weights
from self_forcing.config import RunConfig

Weights = dict[str, Tensor]


def found_in(folder: Path, file: Path | str, *, use_ema: bool = True) -> WanFolder:
    config = RunConfig(prompt="a cat", checkpoint=str(file), use_ema=use_ema)
    return with_weights(config, FOLDERS.find(folder))


def loaded(found: WanFolder, *, is_rounded: bool = False) -> Weights:
    found.check()
    kind = RoundedDiT if is_rounded else DiT
    return found.dit.load(dtype=torch.float32, device="cpu", kind=kind).state_dict()


@pytest.fixture(scope="module")
def copies(replica: Path) -> dict[str, Weights]:
    """What the replica's checkpoint holds, by copy, under the transformer's own names."""
    stored = torch.load(replica / "checkpoints/tiny.pt", weights_only=True)
    return {
        copy: {key.removeprefix("model."): value for key, value in weights.items()}
        for copy, weights in stored.items()
    }


def same(found: Weights, expected: Weights) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[key].float(), expected[key].float()) for key in found
    )


@pytest.mark.parametrize("copy", ["generator_ema", "generator"])
def test_the_averaged_weights_are_taken_where_they_are_wanted(
    replica: Path, copies: dict[str, Weights], copy: str
):
    found = found_in(replica, "checkpoints/tiny.pt", use_ema=copy == "generator_ema")
    assert same(loaded(found), copies[copy])
    assert same(loaded(found, is_rounded=True), copies[copy])


def sharded(key: str) -> str:
    return "model._fsdp_wrapped_module." + key.replace(
        "blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module."
    )


WAYS: dict[str, Callable[[Weights], Any]] = {
    "the other copy": lambda w: {"generator": {f"model.{k}": v for k, v in w.items()}},
    "a dictionary under model": lambda w: {"model": w, "step": {"x": torch.zeros(1)}},
    "the dictionary itself": lambda w: {f"model.{k}": v for k, v in w.items()},
    "bfloat16": lambda w: {"generator_ema": {k: v.bfloat16() for k, v in w.items()}},
    "sharded": lambda w: {"generator_ema": {sharded(k): v for k, v in w.items()}},
    "compiled": lambda w: {"generator_ema": {f"_orig_mod.model.{k}": v for k, v in w.items()}},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_is_read(
    replica: Path, copies: dict[str, Weights], tmp_path: Path, way: str
):
    weights = copies["generator"]
    torch.save(WAYS[way](weights), tmp_path / "weights.pt")
    if way == "bfloat16":
        weights = {key: value.bfloat16() for key, value in weights.items()}
    assert same(loaded(found_in(replica, tmp_path / "weights.pt")), weights)


def test_safetensors_are_read_under_the_same_names(
    replica: Path, copies: dict[str, Weights], tmp_path: Path
):
    path, weights = tmp_path / "weights.safetensors", copies["generator"]
    save_file({sharded(key): value.contiguous() for key, value in weights.items()}, path)
    assert same(loaded(found_in(replica, path)), weights)


def test_a_missing_or_strange_weight_is_named(
    replica: Path, copies: dict[str, Weights], tmp_path: Path
):
    weights, path = copies["generator"], tmp_path / "weights.pt"
    torch.save({"generator": {k: v for k, v in weights.items() if "blocks.1" not in k}}, path)
    with pytest.raises(UserError, match=r"key blocks.1.modulation \(and 26 more\) is missing"):
        found_in(replica, path).check()
    torch.save({"generator": {**weights, "lora.weight": torch.zeros(1)}}, path)
    with pytest.raises(UserError, match=r"key lora\.weight is unexpected"):
        found_in(replica, path).check()


def test_a_file_that_is_not_there_is_refused(replica: Path):
    with pytest.raises(UserError, match=r"missing.pt: no such file; give its path, or ORG/NAME"):
        found_in(replica, "missing.pt")
