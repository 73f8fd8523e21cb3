"""Runs of the demos with damaged weights: one line, exit code 2, nothing under the wanted name."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).parents[2]
HOMES = {
    "skyreels_v2": REPOSITORY / "FlowCache4SkyReels-V2" / "demo",
    "magi1": REPOSITORY / "FlowCache4MAGI-1" / "demo",
}
FILES = {
    ("skyreels_v2", "transformer"): "transformer/diffusion_pytorch_model.safetensors",
    ("skyreels_v2", "VAE"): "vae/diffusion_pytorch_model.safetensors",
    ("skyreels_v2", "text encoder"): "text_encoder/model.safetensors",
    ("magi1", "transformer"): "ckpt/magi/distill/inference_weight.distill/model.safetensors",
    ("magi1", "VAE"): "ckpt/vae/diffusion_pytorch_model.safetensors",
    ("magi1", "text encoder"): "ckpt/t5/t5-v1_1-xxl/model.safetensors",
}
KEYS = {
    ("skyreels_v2", "transformer"): "proj_out.weight",
    ("skyreels_v2", "VAE"): "decoder.conv_out.weight",
    ("skyreels_v2", "text encoder"): "encoder.final_layer_norm.weight",
    ("magi1", "transformer"): "final_linear.linear.weight",
    ("magi1", "VAE"): "decoder.last_layer.weight",
    ("magi1", "text encoder"): "encoder.final_layer_norm.weight",
}
SHORT = {
    "skyreels_v2": ("num_frames=17", "base_num_frames=17", "overlap_history=null", "num_steps=4"),
    "magi1": ("runtime_config.num_frames=48", "runtime_config.num_steps=8"),
}
PLACES = {
    "transformer": "the latents of chunk",
    "VAE": "the decoded frames of chunk",
    "text encoder": "the embeddings of the prompt",
}


def damaged(folder: Path, family: str, part: str, value: float = float("nan")) -> str:
    """Copy a demo with one weight replaced; return what --model takes."""
    shutil.copytree(HOMES[family], folder)
    path = folder / FILES[family, part]
    weights = {name: weight.clone() for name, weight in load_file(path).items()}
    weights[KEYS[family, part]].view(-1)[0] = value
    save_file(weights, path)
    return str(folder / "distill_config.json" if family == "magi1" else folder)


def run(family: str, *arguments: str) -> int:
    return importlib.import_module(f"{family}.__main__").main(list(arguments))


def check_refused(capfd: pytest.CaptureFixture[str], out: Path, *said: str) -> None:
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    for words in said:
        assert words in errors[0]
    left = {path.name for path in out.parent.iterdir() if path.suffix in (".mp4", ".json")}
    assert left <= {"a.partial.mp4"}


@pytest.mark.parametrize(("family", "part"), KEYS)
def test_a_damaged_weight_is_named_with_the_stage_that_shows_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], family: str, part: str
):
    model, out = damaged(tmp_path / "model", family, part), tmp_path / "out" / "a.mp4"
    arguments = ("--model", model, "--prompt", "a red circle", "--out", str(out), "--record")
    assert run(family, *arguments, *SHORT[family]) == 2
    cause = f"of the {part}: the file is damaged, download it again"
    check_refused(capfd, out, PLACES[part], "not finite; so does its weight", cause)


@pytest.mark.parametrize("family", HOMES)
@pytest.mark.parametrize(
    ("preset", "value", "settings"),
    [
        ("flowcache_fast", float("inf"), ("overlap=true",)),
        ("flowcache_slow", float("nan"), ("overlap=true",)),
        ("vanilla", float("-inf"), ("memory_limit=none",)),
    ],
)
def test_it_is_found_with_reuse_compression_and_overlapped_decoding(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    family: str,
    preset: str,
    value: float,
    settings: tuple[str, ...],
):
    model = damaged(tmp_path / "model", family, "transformer", value)
    out = tmp_path / "out" / "a.mp4"
    arguments = ("--model", model, "--preset", preset, "--prompt", "a red circle")
    assert run(family, *arguments, "--out", str(out), *SHORT[family], *settings) == 2
    check_refused(capfd, out, "the latents of chunk", "transformer")


@pytest.mark.parametrize("family", HOMES)
def test_a_replayed_run_finds_it_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], family: str
):
    good, out = tmp_path / "good.mp4", tmp_path / "out" / "a.mp4"
    common = ("--prompt", "a red circle", *SHORT[family])
    assert run(family, "--model", "demo", "--record", "--out", str(good), *common) == 0
    model = damaged(tmp_path / "model", family, "transformer")
    capfd.readouterr()
    replay = ("--replay", str(tmp_path / "good.record.json"))
    assert run(family, "--model", model, *replay, "--out", str(out), *common) == 2
    check_refused(capfd, out, "the latents of chunk")


def test_embeddings_that_are_not_finite_are_neither_kept_nor_read(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    cache, out = tmp_path / "cache", tmp_path / "out" / "a.mp4"
    model = damaged(tmp_path / "model", "skyreels_v2", "text encoder")
    common = ("--prompt", "x", "--embedding-cache", str(cache), *SHORT["skyreels_v2"])
    assert run("skyreels_v2", "--model", model, "--out", str(out), *common) == 2
    check_refused(capfd, out, "the embeddings of the prompts")
    assert not list(cache.glob("*.safetensors"))


def test_special_tokens_that_are_not_finite_are_refused_before_anything_is_loaded(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    numpy = importlib.import_module("numpy")
    path = tmp_path / "special_tokens.npz"
    tokens = dict(numpy.load(HOMES["magi1"] / "special_tokens.npz"))
    tokens["logo_token"] = numpy.full_like(tokens["logo_token"], numpy.nan)
    numpy.savez(path, **tokens)
    arguments = ("--model", "demo", "--prompt", "x", "--dry-run", f"special_tokens={path}")
    assert run("magi1", *arguments, *SHORT["magi1"]) == 2
    said = f"error: {path}: logo_token holds numbers that are not finite in float16; "
    assert said in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "part"),
    [("skyreels_v2", "transformer"), ("skyreels_v2", "text encoder"), ("magi1", "VAE")],
)
def test_of_two_processes_one_says_it_and_both_end(tmp_path: Path, family: str, part: str):
    model, out = damaged(tmp_path / "model", family, part), tmp_path / "out" / "a.mp4"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", model, "--prompt", "a red circle", "--out", str(out), *SHORT[family]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", family, *arguments],
            env=os.environ
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            | {"PYTHONPATH": os.pathsep.join(str(home.parent) for home in HOMES.values())},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 0]
    assert [text.count("error:") for text in told] == [1, 0], told
    assert PLACES[part] in told[0]
    assert "Traceback" not in "".join(told)
    assert not out.exists()


@pytest.mark.parametrize("family", HOMES)
def test_a_black_video_is_an_alarm_of_the_summary_and_the_report(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
):
    folder, out = tmp_path / "model", tmp_path / "a.mp4"
    model = damaged(folder, family, "VAE", 0.0)
    path = folder / FILES[family, "VAE"]
    weights = load_file(path)
    ends = ("decoder.conv_out.", "decoder.last_layer.")
    save_file(
        {k: torch.zeros_like(w) if k.startswith(ends) else w for k, w in weights.items()}, path
    )
    with caplog.at_level("INFO"):
        arguments = ("--model", model, "--prompt", "a red circle", "--out", str(out))
        assert run(family, *arguments, *SHORT[family]) == 0
    [alarm] = [line for line in caplog.messages if line.startswith("ALARM")]
    assert "constant: all" in alarm
    report = importlib.import_module("json").loads(out.with_suffix(".json").read_text())
    assert report["alarms"] == [alarm.split(maxsplit=1)[1]]
