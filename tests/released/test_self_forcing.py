"""Self-Forcing on a replica of the base model in its original layout, as its users have it."""

from pathlib import Path

import pytest
import torch
from replicas import SkyReels, random_state, skyreels_shapes, write_skyreels, write_spiece

from flowcache.runtime.video import probe
from self_forcing.__main__ import main

BASE = SkyReels("Wan2.1-T2V-1.3B", "diffusion_pytorch_model", 1)
"""Its layout is that of SkyReels-V2, which was made from it."""


@pytest.mark.parametrize("has_transformer", [True, False])
def test_the_base_model_and_one_file_of_weights_make_a_video(tmp_path: Path, has_transformer: bool):
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    write_skyreels(folder, BASE, write_spiece(tmp_path), layout="original")
    if not has_transformer:
        for path in folder.glob("diffusion_pytorch_model*"):
            path.unlink()
    state = random_state(skyreels_shapes(BASE), torch.bfloat16)
    wrapped = {f"model._fsdp_wrapped_module.{key}": value for key, value in state.items()}
    torch.save({"generator_ema": wrapped}, tmp_path / "weights.pt")
    out = tmp_path / "a.mp4"
    given = ["--model", str(folder), "--prompt", "a cat", "--out", str(out)]
    sizes = ["height=16", "width=32", "num_frames=21"]
    assert main([*given, *sizes, f"checkpoint={tmp_path / 'weights.pt'}"]) == 0
    assert probe(out).num_frames == 21
