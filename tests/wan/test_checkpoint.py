"""The files of a Wan transformer: sizes, names, and that it is the transformer of the library."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from tiny_skyreels_v2 import diffusers_json
from torch import Tensor

from flowcache.wan.checkpoint import (
    DiTFiles,
    diffusers_key,
    read_diffusers,
    read_original,
)
from flowcache.wan.dit import DiT, DiTConfig

pytestmark = pytest.mark.numeric

TINY = DiTConfig(
    dim=32, num_heads=2, num_layers=2, ffn_dim=48, freq_dim=16, text_dim=32, text_len=7
)
WAN_1_3B: dict[str, Any] = {"_class_name": "WanModel", "dim": 1536, "eps": 1e-06, "ffn_dim": 8960}
WAN_1_3B |= {"freq_dim": 256, "in_dim": 16, "model_type": "t2v", "num_heads": 12, "num_layers": 30}
WAN_1_3B |= {"out_dim": 16, "text_len": 512}
"""`config.json` of the released Wan2.1-T2V-1.3B."""


def write(folder: Path, *, layout: str) -> tuple[DiT, tuple[Path, ...]]:
    """Write the weights of a tiny transformer, named as in a layout."""
    torch.manual_seed(0)
    dit, path = DiT(TINY), folder / "model.safetensors"
    rename = diffusers_key if layout == "diffusers" else str
    save_file({rename(name): value for name, value in dit.state_dict().items()}, path)
    return dit, (path,)


def test_the_released_wan_1_3b_is_read_from_its_config(tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(WAN_1_3B))
    sizes = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    assert read_original(path) == sizes
    path.write_text(json.dumps(diffusers_json(sizes)))
    assert read_diffusers(path, text_len=512) == sizes
    with torch.device("meta"):
        ours, wan = DiT(sizes), WanTransformer3DModel.from_config(diffusers_json(sizes))
    renamed = {diffusers_key(name): value.shape for name, value in ours.state_dict().items()}
    assert renamed == {name: value.shape for name, value in wan.state_dict().items()}


def test_a_forward_equals_that_of_diffusers(tmp_path: Path):
    """With one timestep for all frames, which is all that Wan 2.1 itself knows."""
    dit, _ = write(tmp_path, layout="diffusers")
    wan: Any = WanTransformer3DModel.from_config(diffusers_json(TINY))
    wan.load_state_dict({diffusers_key(name): value for name, value in dit.state_dict().items()})
    draw = torch.Generator().manual_seed(1)
    x_BCFhw = torch.randn(2, 16, 3, 4, 6, generator=draw)
    text_BLD = torch.randn(2, TINY.text_len, TINY.text_dim, generator=draw)
    t_B = torch.tensor([700, 30])
    expected: Tensor = wan(x_BCFhw, t_B, text_BLD, return_dict=False)[0]
    assert_close(dit(x_BCFhw, t_B.unsqueeze(1).expand(-1, 3), text_BLD), expected, ulps=512)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_layouts_hold_the_same_weights(tmp_path: Path, layout: Any):
    dit, files = write(tmp_path, layout=layout)
    stored = DiTFiles(TINY, files, layout)
    stored.check()
    loaded = stored.load(dtype=None, device="cpu").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in dit.state_dict().items())
    (tmp_path / "original").mkdir()
    _, original = write(tmp_path / "original", layout="original")
    assert stored.fingerprint() == DiTFiles(TINY, original, "original").fingerprint()
