"""Upstream's command line: flags, environment, the published code's YAML file, and whole runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flowcache.runtime.config import load_config
from flowcache.runtime.model import Request
from flowcache.runtime.run import config_layers
from flowcache.runtime.video import probe
from magi1.config import RunConfig
from magi1.released import PRESETS
from magi1.upstream import environment_lines, main, new_parser, to_request

Refused = Callable[..., str]
ENTRY = "inference/pipeline/entry.py"
PROMPT = ("--prompt", "a red circle")


@pytest.fixture
def config_file(distilled: Path) -> Path:
    """The JSON config of a random checkpoint."""
    return distilled / "config.json"


def request(*arguments: str) -> Request:
    return to_request(new_parser().parse_intermixed_args(arguments))


@pytest.fixture
def settings(config_file: Path) -> Callable[..., RunConfig]:
    """Return what gives the settings that a command line means."""

    def read(*arguments: str) -> RunConfig:
        asked = request(
            *("--config_file", str(config_file), "--output_path", "x.mp4", *PROMPT), *arguments
        )
        layers = config_layers(
            PRESETS / "base.yaml",
            PRESETS / "base.yaml",
            checkpoint=config_file.parent,
            model=[config_file],
        )
        return load_config(RunConfig, layers, overrides=asked.overrides)

    return read


@pytest.fixture
def refused(config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Return what runs a command line that must be refused, and gives its one line."""

    def run(*arguments: str, config: Path = config_file) -> str:
        given = ["--config_file", str(config), "--output_path", str(tmp_path / "x.mp4"), *PROMPT]
        try:
            code = main([*given, *arguments])
        except SystemExit as stop:  # argparse's own errors
            code = stop.code
        out, err = capsys.readouterr()
        assert code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not (tmp_path / "x.mp4").exists()
        return err

    return run


# Meanings ---------------------------------------------------------------------------------------


def test_a_command_line_of_upstream_computes_everything(settings: Callable[..., RunConfig]):
    made = settings("--mode", "t2v")
    assert (made.prompt, made.image, made.video) == ("a red circle", None, None)
    assert (made.reuse.policy, made.kv.compress) == ("vanilla", "none")
    assert (made.passes.clean_pass, made.passes.nearly_clean_pass) == (True, True)
    assert made.passes.prev_share == 0.7
    assert made.prefix_frames == 32


def test_the_config_file_wins_over_our_defaults_and_settings_over_both(
    settings: Callable[..., RunConfig], config_file: Path
):
    stored = json.loads(config_file.read_text())["runtime_config"]
    made = settings("--mode", "t2v")
    assert made.runtime_config.num_steps == stored["num_steps"]
    assert made.runtime_config.video_size_h == stored["video_size_h"]
    changed = settings("--mode", "t2v", "runtime_config.num_steps=12", "reuse.policy=flowcache")
    assert (changed.runtime_config.num_steps, changed.reuse.policy) == (12, "flowcache")


@pytest.mark.parametrize(
    ("mode", "image", "video"),
    [("t2v", None, None), ("i2v", "a.png", None), ("v2v", None, "b.mp4")],
)
def test_only_what_the_mode_starts_from_is_used_and_the_rest_is_said(
    settings: Callable[..., RunConfig],
    caplog: pytest.LogCaptureFixture,
    mode: str,
    image: str | None,
    video: str | None,
):
    made = settings("--mode", mode, "--image_path", "a.png", "--prefix_video_path", "b.mp4")
    assert (made.image, made.video) == (image, video)
    left_out = {"--image_path": image is None, "--prefix_video_path": video is None}
    for flag, is_left_out in left_out.items():
        assert (f"{flag} is left out: --mode {mode} does not start from it" in caplog.text) == (
            is_left_out
        )


# The environment --------------------------------------------------------------------------------


def test_every_variable_of_upstream_is_named_with_the_setting_that_replaces_it():
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
    told = "is set, but no environment variable changes a run: use"
    assert sorted(environment_lines(variables)) == [
        f"NEG_PROMPT {told} tokens.negative=true",
        f"OFFLOAD_T5_CACHE {told} offload=true",
        f"OFFLOAD_VAE_CACHE {told} offload=false",
        f"PAD_DURATION {told} tokens.duration=false",
        f"PAD_HQ {told} tokens.quality=true",
        f"SPECIAL_TOKEN_PATH {told} special_tokens=my tokens.npz",
        f"prev_chunks_scale {told} passes.prev_share=0.8",
    ]


def test_every_named_setting_exists(settings: Callable[..., RunConfig]):
    names = ("PAD_STATIC", "PAD_DYNAMIC", "PAD_BORDERNESS", "PAD_HQ", "PAD_THREE_D_MODEL")
    names += ("PAD_TWO_D_ANIME", "PAD_DURATION", "NEG_PROMPT", "OFFLOAD_T5_CACHE")
    variables = dict.fromkeys((*names, "OFFLOAD_VAE_CACHE"), "true")
    variables |= {"SPECIAL_TOKEN_PATH": "a.npz", "prev_chunks_scale": "0.5"}
    told = [line.rpartition(" ")[2] for line in environment_lines(variables)]
    assert len(told) == len(variables)
    made = settings("--mode", "t2v", *told)
    assert all(vars(made.tokens).values())
    assert (made.special_tokens, made.passes.prev_share, made.offload) == ("a.npz", 0.5, True)


# The published FlowCache code's YAML file -------------------------------------------------------


def test_the_keys_of_the_published_code_are_told_in_our_settings(
    settings: Callable[..., RunConfig], tmp_path: Path
):
    path = tmp_path / "config.yaml"
    path.write_text(
        "rel_l1_thresh: 0.015\nwarmup_steps: 5\ndiscard_nearly_clean_chunk: true\n"
        "compress_kv_cache: true\ntotal_cache_chunk_nums: 6\nbudget_cache_chunk_nums: 1\n"
        "compress_strategy: token\nmix_lambda: 0.2\nquery_granularity: frame\n"
        "score_weighting_method: polynomial\npower: 2\nlog: true\nprint_peak_memory: true\n"
        "debug: false\n"
    )
    made = settings("--mode", "t2v", "--additional_config", str(path))
    assert (made.reuse.policy, made.reuse.threshold, made.reuse.warmup_steps) == (
        "flowcache",
        0.015,
        5,
    )
    assert (made.reuse.predict, made.reuse.extrapolate) == ("latent_update", 0.0)
    assert (made.passes.clean_pass, made.passes.nearly_clean_pass) == (False, False)
    assert made.prefix_frames is None
    assert (made.kv.compress, made.kv.total_chunks) == ("importance", 6)
    assert (made.kv.granularity, made.kv.queries, made.kv.mix) == ("token", "frame", 0.2)
    assert (made.kv.weighting, made.kv.power, made.kv.order) == ("polynomial", 2.0, "score")


def test_keys_that_are_left_out_have_the_published_codes_defaults(
    settings: Callable[..., RunConfig], tmp_path: Path
):
    path = tmp_path / "config.yaml"
    path.write_text("")
    made = settings("--mode", "t2v", "--additional_config", str(path))
    # its warm-up of 0 steps computes a chunk's first step, too
    assert (made.reuse.threshold, made.reuse.warmup_steps) == (0.01, 1)
    assert made.passes.nearly_clean_pass
    assert (made.kv.compress, made.kv.total_chunks, made.kv.mix) == ("importance", 5, 0.07)
    assert (made.kv.granularity, made.kv.queries, made.kv.power) == ("token", "chunk", 3.0)


def test_whole_chunks_are_scored_without_weights(
    settings: Callable[..., RunConfig], tmp_path: Path
):
    path = tmp_path / "config.yaml"
    path.write_text("compress_strategy: chunk\nscore_weighting_method: gaussian\n")
    made = settings("--mode", "t2v", "--additional_config", str(path))
    assert (made.kv.granularity, made.kv.weighting) == ("chunk", "none")


@pytest.mark.parametrize(
    ("text", "policy", "compress"),
    [
        ("reuse_strategy: all", "teacache", "none"),
        ("reuse_strategy: all\ncompress_kv_cache: true", "teacache", "importance"),
        ("reuse_strategy: chunkwise\ncompress_kv_cache: false", "flowcache", "none"),
    ],
)
def test_the_published_teacache_does_not_compress(
    settings: Callable[..., RunConfig], tmp_path: Path, text: str, policy: str, compress: str
):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    made = settings("--mode", "t2v", "--additional_config", str(path))
    assert (made.reuse.policy, made.kv.compress) == (policy, compress)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rel_l1_tresh: 0.1", "unknown key 'rel_l1_tresh', did you mean rel_l1_thresh?"),
        ("warmup_steps: many", "warmup_steps is 'many', but must be int"),
        ("reuse_strategy: none", "reuse_strategy is 'none', but must be one of chunkwise, all"),
    ],
)
def test_a_wrong_key_of_the_yaml_file_is_named(
    refused: Refused, tmp_path: Path, text: str, told: str
):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    line = refused("--mode", "t2v", "--additional_config", str(path))
    assert f"{path}: {told}" in line


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--mode", "i2v"], "--mode i2v needs --image_path"),
        (["--mode", "v2v"], "--mode v2v needs --prefix_video_path"),
        (["--mode", "i2v", "--image_path", "missing.png"], "missing.png: no such file"),
        (["--mode", "v2v", "--prefix_video_path", "missing.mp4"], "missing.mp4: no such file"),
        (["--mode", "t3v"], "invalid choice: 't3v'"),
        ([], "the following arguments are required: --mode"),
        (["--mode", "t2v", "runtime_config.num_step=8"], "unknown key"),
        (["--mode", "t2v", "--additional_config", "missing.yaml"], "missing.yaml: no such file"),
        (["--mode", "t2v", "runtime_config.num_steps=9"], "num_steps"),
    ],
)
def test_a_mistake_is_one_line(refused: Refused, arguments: list[str], told: str):
    assert told in refused(*arguments)


def test_an_unknown_and_a_missing_field_of_the_json_are_named(
    refused: Refused, config_file: Path, tmp_path: Path
):
    stored = json.loads(config_file.read_text())
    path = tmp_path / "other.json"
    del stored["runtime_config"]["window_size"]
    path.write_text(json.dumps(stored))
    assert "runtime_config.window_size has no value" in refused("--mode", "t2v", config=path)
    stored["runtime_config"]["windowsize"] = 4
    path.write_text(json.dumps(stored))
    line = refused("--mode", "t2v", config=path)
    assert f"{path}: unknown key 'runtime_config.windowsize'" in line
    missing = tmp_path / "missing.json"
    assert f"{missing}: no such file" in refused("--mode", "t2v", config=missing)


def test_an_existing_video_is_kept_unless_overwrite_is_given(
    refused: Refused, config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "kept.mp4"
    path.write_bytes(b"a film")
    line = refused("--mode", "t2v", "--output_path", str(path))
    assert f"{path} exists and is kept" in line
    assert path.read_bytes() == b"a film"
    given = ["--config_file", str(config_file), "--mode", "t2v", "--output_path", str(path)]
    assert main([*given, *PROMPT, "--overwrite", "--dry-run"]) == 0
    assert f"output       {path}" in capsys.readouterr().out
    assert path.read_bytes() == b"a film"


# Whole runs -------------------------------------------------------------------------------------


def run_entry(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as upstream's users do, from the model's folder."""
    return subprocess.run(
        [sys.executable, ENTRY, *arguments],
        cwd=PRESETS.parent,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def test_upstreams_line_makes_a_video_whatever_the_environment_says(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ("--config_file", str(config_file), "--mode", "t2v", *PROMPT)
    plain = [*given, "--output_path", str(tmp_path / "plain.mp4")]
    assert main(plain) == 0
    padded = run_entry(
        *given, "--output_path", str(tmp_path / "padded.mp4"), PAD_HQ="0", prev_chunks_scale="0.1"
    )
    assert padded.returncode == 0, padded.stderr
    assert "PAD_HQ is set, but no environment variable changes a run" in padded.stderr
    assert probe(tmp_path / "plain.mp4").num_frames == 24
    same = (tmp_path / "plain.mp4").read_bytes() == (tmp_path / "padded.mp4").read_bytes()
    assert same
    capsys.readouterr()
    assert main(plain) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_picture_and_a_video_are_continued(config_file: Path, clip: Path, tmp_path: Path):
    given = ("--config_file", str(config_file), *PROMPT)
    picture = str(PRESETS.parent / "assets" / "blue_circle.png")
    out = tmp_path / "image.mp4"
    assert main([*given, "--mode", "i2v", "--image_path", picture, "--output_path", str(out)]) == 0
    # 6 latents and that of the picture are 3 chunks of 3 latents of 4 frames
    assert probe(out).num_frames == 36
    out = tmp_path / "more.mp4"
    start = ("--mode", "v2v", "--prefix_video_path", str(clip))
    assert main([*given, *start, "--output_path", str(out)]) == 0
    # 8 given latents and 6 are 5 chunks: two given, a new latent in the third, two new ones
    assert probe(out).num_frames == 28
