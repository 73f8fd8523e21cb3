"""What is said of a process and its machine: GPUs, warnings, parts of a checkpoint."""

import importlib
import logging
import os
from pathlib import Path

import pytest


def test_the_clocks_of_every_gpu_are_read_with_their_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    render = importlib.import_module("flowcache.bench.render")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert render.describe_gpus() == []
    tool = tmp_path / "nvidia-smi"
    line = "NVIDIA A800, 550.54, 81920 MiB, 1410 MHz, 1410 MHz, 1593 MHz, 61, 400.00 W"
    tool.write_text(f'#!/bin/sh\n[ "$2" = --format=csv,noheader ] && echo "{line}\n{line}"\n')
    tool.chmod(0o755)
    found = render.describe_gpus()
    assert len(found) == 2
    assert list(found[0]) == list(render.GPU_FIELDS)
    assert found[1]["clocks.sm"] == "1410 MHz"
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert render.describe_gpus() == []


def test_a_warning_is_said_once_per_process_and_every_summary(caplog: pytest.LogCaptureFixture):
    worker = importlib.import_module("flowcache.bench.worker")
    logger = logging.getLogger("magi1.run")
    caplog.set_level(logging.INFO)
    with worker.warned_once(["magi1.run"]):
        for name in "ab":
            logger.warning("no special tokens")
            logger.warning("of %s", name)
            logger.info("wrote a video")
    logger.warning("no special tokens")
    assert [record.getMessage() for record in caplog.records] == [
        *("no special tokens", "of a", "wrote a video", "of b", "wrote a video"),
        "no special tokens",
    ]


def test_a_sketch_tells_names_sizes_and_contents_apart(tmp_path: Path):
    sketch_of = importlib.import_module("flowcache.bench.tasks").sketch_of
    folder = tmp_path / "encoder"
    folder.mkdir()
    path = folder / "model.bin"
    path.write_bytes(os.urandom(3 * 2**20))
    (folder / "config.json").write_text("{}")
    first = sketch_of(folder)
    path.rename(folder / "other.bin")
    assert sketch_of(folder) != first
    (folder / "other.bin").rename(path)
    assert sketch_of(folder) == first
    content = bytearray(path.read_bytes())
    content[2**20 + 5] ^= 1  # of so small a file every byte counts
    path.write_bytes(content)
    assert sketch_of(folder) != first
    assert sketch_of(path) != sketch_of(folder / "config.json")
