"""Many MAGI-1 videos by two processes, with a random checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "sample.py"


@pytest.mark.slow
def test_two_processes_make_bitwise_what_one_makes(distilled: Path, tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na cat moving left\n")
    arguments = [
        *("magi1", "--model", str(distilled), "--preset", "flowcache_fast_nocompress"),
        *("--prompts", str(tmp_path / "prompts.txt"), "reuse.warmup_steps=1"),
    ]
    launch = [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--main_process_port", "29541"),
        *("--mixed_precision", "no", "--dynamo_backend", "no"),
    ]
    made: dict[str, dict[str, bytes]] = {}
    for name, start in (("one", []), ("two", launch)):
        out = tmp_path / name
        run = subprocess.run(
            [sys.executable, *start, str(SCRIPT), *arguments, "--out", str(out)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert "3 of 3 videos are complete" in run.stdout
        made[name] = {path.name: path.read_bytes() for path in out.glob("*.mp4")}
        assert not (out / ".claims").exists()
        for path in out.glob("*.json"):
            receipt = json.loads(path.read_text())
            assert receipt["stats"]["passes"]["computed_share"] < 1
            assert set(receipt["made_from"]) == {
                *("resolved_settings", "checkpoint", "vae", "text_encoder", "special_tokens")
            }
    assert made["one"] == made["two"]
    assert len(set(made["one"].values())) == 3
