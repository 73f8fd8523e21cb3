"""Upstream's command line: flags, environment, the published code's YAML file, and whole runs."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowcache.runtime.run import read_settings
from flowcache.runtime.video import probe
from magi1.config import RunConfig
from magi1.model import MODEL
from magi1.released import PRESETS
from magi1.upstream import TOKENS, environment_lines, main, new_parser, to_request

Settings = Callable[..., RunConfig]
Refused = Callable[..., str]
ENTRY = "inference/pipeline/entry.py"
PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def given(distilled: Path, tmp_path: Path) -> tuple[str, ...]:
    """Flags that every command line has."""
    config, out = str(distilled / "config.json"), str(tmp_path / "x.mp4")
    return ("--config_file", config, "--output_path", out, *PROMPT)


@pytest.fixture
def settings(given: tuple[str, ...], tmp_path: Path) -> Settings:
    """Return what gives the settings that a command line, and a YAML file, mean."""

    def read(*arguments: str, yaml: str | None = None) -> RunConfig:
        more = ["--mode", "t2v", *arguments]
        if yaml is not None:
            path = tmp_path / "config.yaml"
            path.write_text(yaml)
            more += ["--additional_config", str(path)]
        request = to_request(new_parser().parse_intermixed_args([*given, *more]))
        return read_settings(MODEL, request)

    return read


@pytest.fixture
def refused(given: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return what runs a command line that must be refused, and gives its one line."""

    def run(*arguments: str) -> str:
        try:
            code = main([*given, *arguments])
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "x.mp4").exists()
        return err

    return run


def values(config: Any, **expected: Any) -> dict[str, Any]:
    """Return the settings of a section that are expected, as they are."""
    return {name: getattr(config, name) for name in expected}


# Meanings -----------------------------------------------------------------------------------


def test_a_command_line_of_upstream_computes_everything(settings: Settings):
    made = settings()
    assert (made.prompt, made.image, made.video) == ("a red circle", None, None)
    assert (made.reuse.policy, made.kv.compress) == ("vanilla", "none")
    assert (made.passes.clean_pass, made.passes.nearly_clean_pass) == (True, True)
    assert (made.passes.prev_share, made.prefix_frames) == (0.7, 32)


def test_the_config_file_wins_over_our_defaults_and_settings_over_both(settings: Settings):
    run = settings().runtime_config
    assert (run.num_steps, run.video_size_h, run.window_size) == (4, 32, 2)
    changed = settings("runtime_config.num_steps=12", "reuse.policy=flowcache")
    assert (changed.runtime_config.num_steps, changed.reuse.policy) == (12, "flowcache")


@pytest.mark.parametrize(
    ("mode", "image", "video"),
    [("t2v", None, None), ("i2v", "a.png", None), ("v2v", None, "b.mp4")],
)
def test_only_what_the_mode_starts_from_is_used_and_the_rest_is_said(
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    image: str | None,
    video: str | None,
):
    made = settings("--mode", mode, "--image_path", "a.png", "--prefix_video_path", "b.mp4")
    assert (made.image, made.video) == (image, video)
    for flag, used in (("--image_path", image), ("--prefix_video_path", video)):
        line = f"{flag} is left out: --mode {mode} does not start from it"
        assert (line in caplog.text) == (used is None)


def test_every_variable_of_upstream_is_named_with_the_setting_that_replaces_it(settings: Settings):
    variables = {
        "PAD_HQ": "1",
        "PAD_DURATION": "no",
        "NEG_PROMPT": "Enabled",
        "SPECIAL_TOKEN_PATH": "my tokens.npz",
        "OFFLOAD_T5_CACHE": "true",
        "OFFLOAD_VAE_CACHE": "false",
        "prev_chunks_scale": "0.8",
        "PATH": "/usr/bin",
    }
    said = "is set, but no environment variable changes a run: use"
    assert sorted(environment_lines(variables)) == [
        f"NEG_PROMPT {said} tokens.negative=true",
        f"OFFLOAD_T5_CACHE {said} offload=true",
        f"OFFLOAD_VAE_CACHE {said} offload=false",
        f"PAD_DURATION {said} tokens.duration=false",
        f"PAD_HQ {said} tokens.quality=true",
        f"SPECIAL_TOKEN_PATH {said} special_tokens=my tokens.npz",
        f"prev_chunks_scale {said} passes.prev_share=0.8",
    ]
    all_of_them = dict.fromkeys((*TOKENS, "OFFLOAD_T5_CACHE", "OFFLOAD_VAE_CACHE"), "true")
    all_of_them |= {"SPECIAL_TOKEN_PATH": "a.npz", "prev_chunks_scale": "0.5"}
    named = [line.rpartition(" ")[2] for line in environment_lines(all_of_them)]
    assert len(named) == len(all_of_them) == 12
    made = settings(*named)
    assert all(vars(made.tokens).values())
    assert (made.special_tokens, made.passes.prev_share, made.offload) == ("a.npz", 0.5, True)


ALL_KEYS = """
rel_l1_thresh: 0.015
warmup_steps: 5
discard_nearly_clean_chunk: true
compress_kv_cache: true
total_cache_chunk_nums: 6
budget_cache_chunk_nums: 1
compress_strategy: token
mix_lambda: 0.2
query_granularity: frame
score_weighting_method: polynomial
power: 2
log: true
print_peak_memory: true
debug: false
"""
PUBLISHED = [
    pytest.param(
        ALL_KEYS,
        {
            "policy": "flowcache",
            "threshold": 0.015,
            "warmup_steps": 5,
            "predict": "latent_update",
            "extrapolate": 0.0,
            "compute_last_step": False,
        },
        {
            "compress": "importance",
            "total_chunks": 6,
            "granularity": "token",
            "mix": 0.2,
            "queries": "frame",
            "weighting": "polynomial",
            "power": 2.0,
            "order": "score",
        },
        False,
        id="all keys",
    ),
    # its warm-up of 0 steps computes a chunk's first step, too
    pytest.param(
        "",
        {"policy": "flowcache", "threshold": 0.01, "warmup_steps": 1},
        {
            "compress": "importance",
            "total_chunks": 5,
            "granularity": "token",
            "mix": 0.07,
            "queries": "chunk",
            "power": 3.0,
        },
        True,
        id="the published code's defaults",
    ),
    pytest.param(
        "compress_strategy: chunk\nscore_weighting_method: gaussian\n",
        {},
        {"granularity": "chunk", "weighting": "none"},
        True,
        id="whole chunks are scored without weights",
    ),
    ("reuse_strategy: all", {"policy": "teacache"}, {"compress": "none"}, True),
    (
        "reuse_strategy: all\ncompress_kv_cache: true",
        {"policy": "teacache"},
        {"compress": "importance"},
        True,
    ),
    (
        "reuse_strategy: chunkwise\ncompress_kv_cache: false",
        {"policy": "flowcache"},
        {"compress": "none"},
        True,
    ),
]


@pytest.mark.parametrize(("yaml", "reuse", "kv", "nearly_clean"), PUBLISHED)
def test_the_keys_of_the_published_code_become_our_settings(
    settings: Settings, yaml: str, reuse: dict[str, Any], kv: dict[str, Any], nearly_clean: bool
):
    made = settings(yaml=yaml)
    assert values(made.reuse, **reuse) == reuse
    assert values(made.kv, **kv) == kv
    assert (made.passes.clean_pass, made.passes.nearly_clean_pass) == (False, nearly_clean)
    assert made.prefix_frames is None


# What is refused ----------------------------------------------------------------------------

WRONG = [
    (("--mode", "i2v"), "--mode i2v needs --image_path"),
    (("--mode", "v2v"), "--mode v2v needs --prefix_video_path"),
    (("--mode", "i2v", "--image_path", "missing.png"), "missing.png: no such file"),
    (("--mode", "v2v", "--prefix_video_path", "missing.mp4"), "missing.mp4: no such file"),
    (("--mode", "t3v"), "invalid choice: 't3v'"),
    ((), "the following arguments are required: --mode"),
    (("--mode", "t2v", "runtime_config.num_step=8"), "unknown key"),
    (("--mode", "t2v", "--additional_config", "missing.yaml"), "missing.yaml: no such file"),
    (("--mode", "t2v", "--config_file", "missing.json"), "missing.json: no such file"),
    (("--mode", "t2v", "runtime_config.num_steps=9"), "num_steps"),
    *(
        (("--mode", "t2v", "--additional_config", text), message)
        for text, message in (
            ("rel_l1_tresh: 0.1", "unknown key 'rel_l1_tresh', did you mean rel_l1_thresh?"),
            ("warmup_steps: many", "warmup_steps is 'many', but must be a whole number"),
            ("reuse_strategy: none", "is 'none', but must be one of chunkwise, all"),
        )
    ),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_a_mistake_is_one_line(
    refused: Refused, tmp_path: Path, arguments: tuple[str, ...], message: str
):
    if arguments and ": " in arguments[-1]:  # the text of a YAML file
        path = tmp_path / "config.yaml"
        path.write_text(arguments[-1])
        line = refused(*arguments[:-1], str(path))
        assert f"{path}: " in line
    else:
        line = refused(*arguments)
    assert message in line


def test_an_existing_video_is_kept_unless_overwrite_is_given(
    refused: Refused,
    given: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    path = tmp_path / "kept.mp4"
    path.write_bytes(b"a film")
    own = ("--mode", "t2v", "--output_path", str(path))
    assert f"{path} exists and is kept" in refused(*own)
    assert main([*given, *own, "--overwrite", "--dry-run"]) == 0
    assert f"output       {path}" in capsys.readouterr().out
    assert path.read_bytes() == b"a film"


# Whole runs ---------------------------------------------------------------------------------


def test_upstreams_line_makes_a_video_whatever_the_environment_says(
    given: tuple[str, ...], tmp_path: Path
):
    assert main([*given, "--mode", "t2v"]) == 0
    out = tmp_path / "padded.mp4"
    padded = subprocess.run(
        [sys.executable, ENTRY, *given, "--mode", "t2v", "--output_path", str(out)],
        cwd=PRESETS.parent,  # as upstream's users do
        env=os.environ | {"OMP_NUM_THREADS": "1", "PAD_HQ": "0", "prev_chunks_scale": "0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert padded.returncode == 0, padded.stderr
    assert "PAD_HQ is set, but no environment variable changes a run" in padded.stderr
    assert probe(out).num_frames == 24
    assert out.read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_a_picture_and_a_video_are_continued(given: tuple[str, ...], clip: Path, tmp_path: Path):
    picture, image = str(PRESETS.parent / "assets" / "blue_circle.png"), tmp_path / "image.mp4"
    start = ("--mode", "i2v", "--image_path", picture, "--output_path", str(image))
    assert main([*given, *start]) == 0
    # 6 latents and that of the picture are 3 chunks of 3 latents of 4 frames
    assert probe(image).num_frames == 36
    assert main([*given, "--mode", "v2v", "--prefix_video_path", str(clip)]) == 0
    # 8 given latents and 6 are 5 chunks: two given, a new latent in the third, two new ones
    assert probe(tmp_path / "x.mp4").num_frames == 28
