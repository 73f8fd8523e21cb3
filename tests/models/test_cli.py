"""The command line: what it takes, and one clear line for everything it can't take."""

import json
import operator
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowcache.runtime.config import load_config
from flowcache.runtime.run import read_settings
from flowcache.runtime.video import VideoWriter, probe

Refused = Callable[..., str]
Arguments = list[str]


def only(name: str) -> pytest.MarkDecorator:
    """Run a test with one of the models."""
    return pytest.mark.parametrize("tiny", [name], indirect=True)


@pytest.fixture
def arguments(tiny: Any, tmp_path: Path) -> Arguments:
    """Arguments that are in order."""
    out = str(tmp_path / "videos")
    return ["--model", str(tiny.folder), "--prompt", "a red circle", "--out", out]


@pytest.fixture
def refused(
    tiny: Any, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Return what runs the command line and gives its one line of error.

    Nothing may be printed or made before: the plan is printed before any weights are loaded.
    """

    def run(*more: str) -> str:
        assert tiny.main(*arguments, *more) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        line = captured.err.removesuffix("\n")
        assert line.startswith("error: ")
        assert "\n" not in line
        assert "Traceback" not in line
        assert not (tmp_path / "videos").exists()
        return line

    return run


@pytest.fixture
def edited(tiny: Any, tmp_path: Path) -> Callable[..., str]:
    """Return what writes the checkpoint's JSON config with one field changed or left out."""

    def edit(section: str, **changes: Any) -> str:
        document = json.loads((tiny.folder / "config.json").read_text())
        for name in ("load", "t5_pretrained", "vae_pretrained"):
            document["runtime_config"][name] = str(tiny.folder / document["runtime_config"][name])
        for name, value in changes.items():
            document[section].pop(name, None)
            if value is not None:
                document[section][name] = value
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(document))
        return str(path)

    return edit


# Mistakes in settings -----------------------------------------------------------------------


WRONG_IN_ALL = [
    ("reuse.polcy=vanilla", "did you mean reuse.policy?"),
    ("reuse.policy=magic", "must be one of vanilla, teacache, flowcache, stride"),
    ("num_steps", "is not an override: write key=value"),
    ("device=gpu", "device=gpu"),
]
WRONG_IN_SKYREELS = [
    ("treshold=1", "unknown key 'treshold', did you mean reuse.threshold?"),
    ("reuse.predict=future", "must be one of"),
    ("attention=sparse", "must be one of full, causal"),
    ("attention_kernel=flash", "attention_kernel=flash is not available on cpu with float32"),
    ("num_steps=many", "num_steps is 'many', but must be a whole number"),
    ("num_steps=2.5", "num_steps"),
    ("offload=maybe", "must be true or false"),
    ("=3", "is not an override"),
    ("num_frames=18", "num_frames must be 4 n + 1"),
    ("num_frames=0", "num_frames must be in 1..1000000"),
    ("num_frames=-3", "num_frames must be in 1..1000000"),
    ("base_num_frames=20", "base_num_frames must be 4 n + 1"),
    ("num_frames=41", "give overlap_history"),
    ("causal_block_size=0", "causal_block_size must be in 1..1000000"),
    ("causal_block_size=-2", "causal_block_size must be in 1..1000000"),
    ("height=20", "height must be a multiple of 16 pixels, not 20; use 16 or 32"),
    ("width=0", "width must be in 16..4096"),
    ("width=-16", "width must be in 16..4096"),
    ("num_steps=0", "num_steps must be in 1..1000, not 0"),
    ("num_steps=-5", "num_steps must be in 1..1000, not -5"),
    ("num_steps=1001", "num_steps must be in 1..1000, not 1001"),
    ("reuse.threshold=-0.1", "reuse.threshold must be in 0..1000000000, not -0.1"),
    ("reuse.threshold=nan", "reuse.threshold"),
    ("reuse.threshold=.inf", "reuse.threshold must be a finite number"),
    ("reuse.warmup_steps=0", "reuse.warmup_steps must be 1 or more"),
    ("reuse.every=0", "reuse.every must be in 1..1000"),
    ("reuse.steps=[0,99]", "99 is none"),
    ("reuse.rescale=cubic", "reuse.rescale=cubic is unknown"),
    ("reuse.extrapolate=.inf", "reuse.extrapolate must be a finite number"),
    ("seed=-1", "seed must be in 0.."),
    ("seed=9223372036854775808", "seed"),
    ("seed=1.5", "seed"),
    ("ar_step=-1", "ar_step must be in 0..1000"),
    ("guidance=-1", "guidance must be in 0..1000"),
    ("guidance=.inf", "guidance must be a finite number"),
    ("shift=0", "shift must be above 0 and at most 1000"),
    ("shift=.inf", "shift must be a finite number"),
    ("shift=.nan", "shift"),
    ("fps=0", "fps must be in 1..1000"),
    ("addnoise_condition=61", "addnoise_condition must be in 0..60"),
    ("addnoise_condition=-1", "addnoise_condition must be in 0..60"),
    ("prompt=", "prompt is empty"),
    ("prompt= \t ", "prompt is empty"),
    ("prompt=caf\udce9", "prompt is not valid UTF-8 text"),
    ("device=mps", "device=mps is not supported"),
    ("dtype=int8", "must be one of auto, bfloat16, float16, float32"),
    ("clean_pass=true", "clean_pass=true needs a KV cache: set attention=causal"),
    ("kv.compress=importance", "needs a KV cache"),
    ("kv.compress=zip", "must be one of"),
    ("kv.mix=2", "kv.mix must be in 0..1, not 2"),
    ("kv.budget_chunks=-1", "kv.budget_chunks must be in 0..1000000"),
]
WRONG_IN_MAGI = [
    ("runtime_config.num_steps=5", "num_steps is 5, but must divide by 2"),
    ("runtime_config.noise2clean_kvrange=[3,2,1]", "must divide by the 3 entries"),
    ("runtime_config.video_size_w=40", "video_size_w is 40, but must be a positive multiple"),
    (
        "runtime_config.num_frames=3",
        "num_frames must be at least 4, which make one latent frame, not 3: use 12",
    ),
    ("runtime_config.cfg_number=3", "must be 1 for a distilled model"),
    ("kv.total_chunks=2", "kv.total_chunks must be above runtime_config.window_size 2"),
    ("seedd=3", "unknown key 'seedd', did you mean runtime_config.seed?"),
]
WRONG = {
    "skyreels_v2": ("teacache_fast", [*WRONG_IN_ALL, *WRONG_IN_SKYREELS]),
    "magi1": ("flowcache_fast", [*WRONG_IN_ALL, *WRONG_IN_MAGI]),
}
"""Model -> preset, and settings with what the error says."""


@pytest.mark.parametrize(
    ("tiny", "preset", "setting", "message"),
    [(model, preset, *row) for model, (preset, rows) in WRONG.items() for row in rows],
    indirect=["tiny"],
)
def test_a_wrong_setting_is_one_line(refused: Refused, preset: str, setting: str, message: str):
    assert message in refused("--preset", preset, setting)


IN_BOTH = [
    ("--preset flowcach_fast", "did you mean flowcache_fast?"),
    ("--preset mine.yaml", "no such file"),
    ("--prompt {long}", "prompt has 100000 characters, at most 10000"),
    ("--out {picture}/videos", "cannot write in folder"),
    ("--out {picture}/videos/a.mp4", "cannot write in folder"),
    ("--out /proc/flowcache", "cannot write in folder /proc"),
    ("--out {tmp}/a.avi", "written as .mp4"),
    ("--out {empty}", "--out is empty"),
    ("memory_limit=1MB", "memory_limit"),
    *([] if torch.cuda.is_available() else [("device=cuda", "PyTorch sees 0 CUDA devices")]),
    *([] if torch.cuda.is_available() else [("device=cuda:3", "PyTorch sees 0 CUDA devices")]),
]
IN_SKYREELS = [
    ("num_frames=41 overlap_history=8", "overlap_history must be 4 n + 1"),
    ("num_frames=41 overlap_history=17", "overlap_history 17 must be below"),
    ("attention=causal kv.kernel=4 kv.compress=importance", "kernel must be odd"),
    ("attention=causal kv.weighting=heavy kv.compress=importance", "heavy"),
    (
        "attention=causal kv.power=-1 kv.weighting=polynomial kv.compress=importance",
        "power",
    ),
    (
        "attention=causal kv.compress=recent kv.budget_chunks=-0.5",
        "kv.budget_chunks must be in 0..1000000",
    ),
    ("--video {clip}", "give overlap_history"),
    (
        "--video {clip} overlap_history=21 num_frames=41 base_num_frames=41",
        "has 20 frames at 24 fps, fewer than overlap_history 21",
    ),
    ("--video {clip} overlap_history=13 num_frames=13", "must be above it"),
    (
        "--video {clip} --image {picture} overlap_history=9",
        "video cannot be combined with image",
    ),
    ("--model {tmp}/missing", "no such folder"),
    ("--model {picture}", "is a file"),
    ("--model {tmp}", "no SkyReels-V2 checkpoint"),
    ("--model nobody/nothing", "HF_HUB_OFFLINE forbids a download"),
    # before anything is fetched
    ("--model nobody/nothing --prompt {empty}", "prompt is empty"),
    ("--model nobody/nothing --seed -1", "seed must be"),
    ("--model df-1.3b-540p", "df-1.3b-540p names sizes, for --dry-run"),
    ("--model df-1.3b-540p", "Skywork/SkyReels-V2-DF-1.3B-540P-Diffusers"),
]
IN_MAGI = [
    ("--model 4.5B", "4.5B: no such file or folder"),
    ("--model 4.5B", "4.5B_distill"),
    ("special_tokens={tmp}/missing.npz", "missing.npz: no such file"),
]
REFUSED = {"skyreels_v2": [*IN_BOTH, *IN_SKYREELS], "magi1": [*IN_BOTH, *IN_MAGI]}
"""Model -> arguments, and what the error says."""


@pytest.mark.parametrize(
    ("tiny", "arguments_of", "message"),
    [(model, *row) for model, rows in REFUSED.items() for row in rows],
    indirect=["tiny"],
)
def test_arguments_that_do_not_fit_are_one_line(
    refused: Refused, arguments_of: str, message: str, clip: Path, picture: Path, tmp_path: Path
):
    places = {"clip": clip, "picture": picture, "tmp": tmp_path, "empty": "", "long": "a" * 100_000}
    preset = () if "--preset" in arguments_of else ("--preset", "vanilla")
    line = refused(*preset, *(each.format(**places) for each in arguments_of.split()))
    assert message in line
    assert len(line) < 400


@only("magi1")
def test_a_missing_or_unknown_field_is_named(refused: Refused, edited: Callable[..., str]):
    line = refused("--model", edited("runtime_config", num_steps=None))
    assert "runtime_config.num_steps has no value" in line
    line = refused("--model", edited("engine_config", distil=True))
    assert "edited.json: unknown key 'engine_config.distil'" in line
    assert "did you mean engine_config.distill?" in line
    line = refused("--model", edited("model_config", num_layers="many"))
    assert "model_config.num_layers is 'many', but must be a whole number" in line


def test_a_preset_file_with_an_unknown_key_is_named(refused: Refused, tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("reuse:\n  treshold: 1\n")
    line = refused("--preset", str(mine))
    assert str(mine) in line
    assert "reuse.threshold" in line


def test_arguments_that_no_flag_takes_are_one_line(tiny: Any, capsys: pytest.CaptureFixture[str]):
    for arguments in (["--frobnicate"], ["--preset"], ["--prompt", "a", "--seed"]):
        with pytest.raises(SystemExit) as ended:
            tiny.main(*arguments)
        assert ended.value.code == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


# Mistakes in files --------------------------------------------------------------------------


FLAGS = {"skyreels_v2": ("--image", "--end-image", "--video"), "magi1": ("--image", "--video")}


@pytest.mark.parametrize(
    ("tiny", "flag"),
    [(model, flag) for model, flags in FLAGS.items() for flag in flags],
    indirect=["tiny"],
)
def test_a_given_file_that_is_none_is_named(refused: Refused, tiny: Any, tmp_path: Path, flag: str):
    settings = tiny.short.for_video if flag == "--video" else ()
    missing, folder = tmp_path / "missing.png", tmp_path / "folder"
    empty, text = tmp_path / "empty.png", tmp_path / "text.png"
    folder.mkdir()
    empty.touch()
    text.write_text("no picture at all\n" * 20)
    kind = "not a video" if flag == "--video" else "not an image"
    for path, message in (
        (missing, "no such file"),
        (folder, "a folder, not a file"),
        (empty, "the file is empty"),
        (text, kind),
    ):
        line = refused(flag, str(path), *settings)
        assert str(path) in line
        assert message in line


@only("skyreels_v2")
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_damaged_shard_is_named(refused: Refused, tiny: Any, tmp_path: Path, part: str):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny.folder, damaged)
    (shard,) = (damaged / part).glob("*.safetensors")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert shard.name in refused("--model", str(damaged))
    shard.write_bytes(b"no weights" * 100)
    assert shard.name in refused("--model", str(damaged))
    shard.unlink()
    assert part in refused("--model", str(damaged))
    shard.write_bytes(whole)
    shutil.rmtree(damaged / "vae")
    assert "vae: is missing" in refused("--model", str(damaged))


@only("magi1")
def test_a_missing_part_of_the_checkpoint_is_named(
    refused: Refused, edited: Callable[..., str], tmp_path: Path
):
    for name in ("load", "t5_pretrained", "vae_pretrained"):
        missing = str(tmp_path / "missing")
        line = refused("--model", edited("runtime_config", **{name: missing}))
        assert missing in line
        assert f"the config's {name} asks for it" in line


@only("magi1")
def test_weights_of_another_size_are_refused(refused: Refused, edited: Callable[..., str]):
    line = refused("--model", edited("model_config", ffn_hidden_size=64))
    assert "mlp.linear_fc1.weight" in line


@only("magi1")
def test_a_video_that_is_too_short_is_refused(refused: Refused, tmp_path: Path):
    path = tmp_path / "short.mp4"
    with VideoWriter(path, fps=24, size=(32, 48)) as writer:
        writer.append(np.zeros((6, 32, 48, 3), np.uint8))
    assert "has 6 frames at 24 fps, fewer than prefix_frames 32" in refused("--video", str(path))


@only("magi1")
def test_special_tokens_that_do_not_fit_are_refused(refused: Refused, tmp_path: Path):
    path = tmp_path / "tokens.npz"
    np.savez(
        path,
        caption_token=np.zeros((1, 12)),
        logo_token=np.zeros((1, 12)),
        other_tokens=np.zeros((100, 16)),
    )
    line = refused(f"special_tokens={path}")
    assert "other_tokens has shape [100, 16], expected [100, 12]" in line


# The output ---------------------------------------------------------------------------------


def test_existing_results_are_kept(
    tiny: Any,
    arguments: Arguments,
    refused: Refused,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    video, report = tmp_path / "mine.mp4", tmp_path / "other.json"
    for path in (video, report):
        path.write_text("mine")
    for out, kept in ((video, video), (tmp_path / "other.mp4", report)):
        for more in ((), ("--dry-run",)):
            assert f"{kept} exists and is kept" in refused("--out", str(out), *more)
        assert kept.read_text() == "mine"
        assert tiny.main(*arguments, "--out", str(out), "--dry-run", "--overwrite") == 0
        capsys.readouterr()
        assert kept.read_text() == "mine"


def test_overwrite_replaces_an_existing_output(tiny: Any, arguments: Arguments, tmp_path: Path):
    video = tmp_path / "mine.mp4"
    video.write_bytes(b"old")
    more = ["--preset", "vanilla", "--out", str(video), "--overwrite"]
    assert tiny.main(*arguments, *more) == 0
    assert probe(video).num_frames == tiny.short.num_frames


# What works ---------------------------------------------------------------------------------


@only("skyreels_v2")
def test_a_preset_run_twice_gets_fresh_names_and_any_prompt_works(
    tiny: Any, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prompts = (
        "eine Möwe, 一只红色的鸟, красный круг, دائرة, 🎩",
        "-- \"quotes\" & 'more' $HOME `x`",
    )
    for prompt in prompts:
        more = ["num_steps=1", "--preset", "vanilla_causal", f"--prompt={prompt}", "guidance=1"]
        assert tiny.main(*arguments, *more) == 0
    out = tmp_path / "videos"
    stems = ["vanilla_causal-3", "vanilla_causal-3-001"]
    assert sorted(path.stem for path in out.glob("*.mp4")) == stems
    for stem, prompt in zip(stems, prompts, strict=True):
        report = json.loads((out / f"{stem}.json").read_text(encoding="utf-8"))
        assert report["config"]["prompt"] == prompt
    assert "causal attention, vanilla reuse" in capsys.readouterr().out


@only("skyreels_v2")
def test_a_dry_run_of_skyreels_prints_the_plan_and_writes_nothing(
    tiny: Any, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert tiny.main(*arguments, "--dry-run", "num_frames=13", "--seed", "9", "guidance=1") == 0
    out = capsys.readouterr().out
    assert "small, diffusers layout" in out
    assert "13 frames of 32x16 at 24 fps, seed 9" in out
    assert "flowcache_fast-9.mp4" in out
    assert not (tmp_path / "videos").exists()


@only("skyreels_v2")
def test_settings_may_stand_before_and_after_flags(
    tiny: Any, arguments: Arguments, capsys: pytest.CaptureFixture[str]
):
    arguments = ["num_frames=5", *arguments, "fps=8", "--dry-run", "num_frames=9"]
    assert tiny.main(*arguments) == 0
    assert "9 frames of 32x16 at 8 fps" in capsys.readouterr().out


@only("magi1")
def test_a_dry_run_of_magi_prints_the_plan_and_writes_nothing(
    tiny: Any, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert tiny.main(*arguments, "--dry-run", "runtime_config.num_frames=30") == 0
    out = capsys.readouterr().out
    assert "distilled (distilled), float32 on" in out
    assert "36 frames of 48x32 at 24 fps (30 asked, 36 made: whole chunks), seed 3" in out
    assert "flowcache reuse, importance KV compression, extra passes: none" in out
    # "a", "red", "circle" and the end token, after the tokens of quality and duration
    assert "text 6" in out
    assert not (tmp_path / "videos").exists()


def test_a_preset_may_be_a_file(
    tiny: Any, arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    mine = tmp_path / "mine.yaml"
    key = tiny.model.keys["num_steps"]
    section, _, name = key.rpartition(".")
    mine.write_text(f"{section}:\n  {name}: 8\n" if section else f"{name}: 8\n")
    assert tiny.main(*arguments, "--preset", str(mine), "--dry-run") == 0
    out = capsys.readouterr().out
    assert " of 8 steps" in out
    assert "mine-3.mp4" in out


@only("magi1")
def test_a_run_from_the_command_line(tiny: Any, arguments: Arguments, tmp_path: Path):
    assert tiny.main(*arguments, "--preset", "flowcache_slow", "--seed", "9") == 0
    assert (tmp_path / "videos/flowcache_slow-9.mp4").is_file()


@only("magi1")
def test_released_models_are_planned_without_files(tiny: Any, capsys: pytest.CaptureFixture[str]):
    asked = ["--prompt", "a cat", "--dry-run", "--preset", "vanilla"]
    assert tiny.main("--model", "4.5B_distill", *asked) == 0
    out = capsys.readouterr().out
    assert "240 frames of 720x720" in out
    assert "310.1 PFLOP" in out
    assert tiny.main("--model", "24B_base", *asked) == 0
    assert "1280x720" in capsys.readouterr().out


SETTINGS = {
    "skyreels_v2": ("reuse.threshold", "kv.budget_chunks", "addnoise_condition"),
    "magi1": ("runtime_config.num_frames", "kv.total_chunks", "tokens.quality"),
}
WORDS = ("--dry-run", "--overwrite", "--model", "flowcache_fast", "key=value", "examples")
HELP = {"skyreels_v2": WORDS, "magi1": (*WORDS, "--download", "demo-base")}


def test_help_and_the_list_of_settings_name_everything(
    tiny: Any, capsys: pytest.CaptureFixture[str]
):
    assert tiny.main("--list-settings") == 0
    listed = capsys.readouterr().out
    for key in ("prompt", "reuse.threshold", *SETTINGS[tiny.model.name]):
        assert f"\n{key}: " in f"\n{listed}"
    assert "accumulated distance" in listed
    lines = listed.splitlines()
    if tiny.model.name == "magi1":
        assert all("  # " in line for line in lines)
    assert len({line.partition(":")[0] for line in lines}) == len(lines)
    with pytest.raises(SystemExit) as ended:
        tiny.main("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    for word in HELP[tiny.model.name]:
        assert word in text


def test_the_list_of_settings_shows_the_values_of_preset_model_and_command_line(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    preset = tmp_path / "mine.yaml"
    preset.write_text("reuse: {policy: flowcache, threshold: 0.375}\nfps: 48\n")
    where = ["--list-settings", "--preset", str(preset), "--model", str(tiny.folder)]
    assert tiny.main(*where, "--seed", "77", f"num_frames={tiny.short.num_frames}") == 0
    listed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    keys = tiny.model.keys
    config = read_settings(tiny.model, tiny.request())
    for key, value in (
        ("reuse.threshold", "0.375"),
        (keys["fps"], "48"),
        (keys["seed"], "77"),
        (keys["num_frames"], str(tiny.short.num_frames)),
        (keys["height"], str(operator.attrgetter(keys["height"])(config))),
        ("prompt", "..."),
    ):
        assert f" = {value}" in listed[key].partition("  #")[0], key
    assert tiny.main(*where, "kv.mix=2") == 2
    assert capsys.readouterr().err.startswith("error: kv.mix must be in 0..1")


def test_a_reader_that_has_seen_enough_gets_no_traceback(tiny: Any):
    command = f'"{sys.executable}" -m {tiny.model.name} --list-settings | head -1'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


@pytest.mark.parametrize("name", ["seed", "num_steps", "num_frames", "fps", "height", "width"])
def test_a_setting_of_all_models_has_one_name_in_presets_and_on_the_command_line(
    tiny: Any, name: str, tmp_path: Path
):
    model, preset = tiny.model, tmp_path / "a.yaml"
    preset.write_text(f"{name}: 48")
    layers = [model.presets / "base.yaml", *model.find(str(tiny.folder)).layers]
    fixed = ["prompt=x"]
    for given in (
        load_config(model.schema, [*layers, preset], overrides=fixed),
        load_config(model.schema, layers, overrides=[*fixed, f"{name}=48"]),
    ):
        assert operator.attrgetter(model.keys[name])(given) == 48


@pytest.mark.parametrize(
    ("flag", "form"), [("--num_frames", "num_frames=VALUE"), ("--num_frames=97", "num_frames=97")]
)
def test_a_setting_written_as_a_flag_is_answered_with_the_right_form(
    tiny: Any, flag: str, form: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        tiny.main(flag)
    assert ended.value.code == 2
    assert f"settings are given as {form}" in capsys.readouterr().err


@only("skyreels_v2")
def test_a_refusal_names_no_predictor_that_nobody_set(refused: Refused):
    tokens = ["attention=causal", "reuse.policy=flowcache", "reuse.tokens.choice=motion"]
    line = refused(*tokens, "kv.compress=importance")
    assert "set kv.compress=none, or reuse.tokens.choice=all" in line
    assert "reuse.predict" not in line
