"""Whole runs on a random checkpoint: videos, JSON, processes, upstream's command line."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowcache.errors import UserError
from flowcache.runtime.ending import EXIT_USER_ERROR
from flowcache.runtime.model import Request
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare, run
from flowcache.runtime.stats import RunStats
from flowcache.runtime.video import read_video
from flowcache.wan.vae import VAE, VAEStream
from self_forcing.__main__ import main
from self_forcing.model import MODEL
from self_forcing.pipeline import generate
from self_forcing.released import FOLDER, PRESETS

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]
TINY = ("checkpoint=checkpoints/tiny.pt", "num_frames=33")
RUNS = {
    "self_forcing": (),
    "causal_forcing_2step": ("num_frames=17",),
    "ar_chunkwise": ("num_steps=3",),
    "ar_flowcache_fast": ("num_steps=8", "reuse.rescale=none"),
    "ar_teacache": ("num_steps=8", "reuse.rescale=none"),
    "long": (),
}


@pytest.mark.parametrize("preset", RUNS)
def test_a_run_makes_a_video_that_costs_what_was_planned(make: Make, preset: str):
    made = make(*TINY, *RUNS[preset], preset=preset)
    made.check_costs()
    assert len(made.frames) == made.job.config.num_frames
    assert made.report["config"]["precision"] == "float32"


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("window", ("window=6",)),
        ("importance", ("window=6",)),
        ("deep_forcing", ("window=9", "positions=relative", "kv.recent_frames=2")),
        ("density", ("window=9", "positions=relative")),
    ],
)
def test_what_a_strategy_keeps_costs_what_was_planned(
    make: Make, name: str, settings: tuple[str, ...]
):
    given = (*TINY, "num_frames=69", f"kv.compress={name}", *settings)
    make(*given, preset="self_forcing").check_costs()


def test_blocks_are_reused_in_a_whole_run(make: Make):
    given = (*TINY, "num_frames=45", "reuse_blocks=true", "prompt=a cat || 9: a dog")
    made = make(*given, preset="self_forcing")
    made.check_costs()
    assert made.report["stats"]["flops"]["saving_factor"] >= 1


@pytest.mark.parametrize("how", ["merged", "skipped", "refined"])
def test_another_clean_pass_costs_what_was_planned(make: Make, how: str):
    settings = ("num_frames=45", "window=6", "sink=1", f"clean_pass={how}")
    make(*TINY, *settings, preset="self_forcing").check_costs()


@pytest.mark.parametrize("window", [(), ("window=6", "sink=1", "positions=relative")])
def test_a_switch_of_prompts_changes_what_follows_and_costs_what_was_planned(
    make: Make, window: tuple[str, ...]
):
    given = (*TINY, "num_frames=45", *window)
    alone = make(*given, preset="self_forcing").frames
    prompt = "prompts=[[0, a red circle moving right], [6, a blue square]]"
    switched = make(*given, prompt, preset="self_forcing")
    switched.check_costs()
    assert np.array_equal(switched.frames[:18], alone[:18])
    assert not np.array_equal(switched.frames[24:], alone[24:])
    anew = make(*given, prompt, "recache=true", preset="self_forcing")
    anew.check_costs()
    assert not np.array_equal(anew.frames[24:], switched.frames[24:])


def test_what_is_shown_while_it_is_made_equals_decoding_all_at_the_end(make: Make):
    job = make(*TINY, preset="self_forcing").job
    stats = RunStats(job.device)
    networks, inputs = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    decoded = list[torch.Tensor]()

    class Listening(VAE):
        """Keeps the latents that are decoded."""

        def stream(self, ranks: Ranks | None = None) -> VAEStream:
            stream = super().stream(ranks)
            decode = stream.decode
            stream.decode = lambda latents: decode(decoded.append(latents) or latents)
            return stream

    networks.vae.__class__ = Listening
    shown = [
        progress.frames
        for progress in generate(networks.dit, networks.vae, job.config, inputs, stats=stats)
        if progress.frames is not None
    ]
    assert [part.shape[1] for part in shown] == [9, 12, 12]
    whole = networks.vae.decode(torch.cat(decoded, dim=2))[0]
    assert torch.equal(torch.cat(shown, dim=1), whole)


def test_a_record_replays_to_the_same_video_with_what_it_reused(make: Make, replica: Path):
    settings = (*TINY, "num_steps=8", "reuse.rescale=none", "reuse.threshold=0.4")
    preset, prompt = "ar_flowcache_fast", ["prompt=a cat"]
    out = str(make(*TINY, preset="self_forcing").path.parent)
    first = prepare(
        MODEL, Request(preset, str(replica), [*prompt, *settings], out, stem="first", record=True)
    )
    made = run(first)
    passes = made["stats"]["passes"]
    assert 0 < passes["reused"] < passes["computed"]
    assert made["stats"]["flops"]["saving_factor"] > 1.1
    record = str(Path(out) / "first.record.json")
    given = [*prompt, *TINY, "num_steps=8"]
    second = prepare(
        MODEL, Request("ar_chunkwise", str(replica), given, out, stem="second", replay=record)
    )
    assert run(second)["stats"]["passes"] == passes
    videos = [read_video(Path(out) / f"{name}.mp4")[0] for name in ("first", "second")]
    assert np.array_equal(*videos)


@pytest.mark.parametrize(
    ("settings", "most"),
    [((), 24), (("window=6", "sink=1"), 12), (("window=6", "kv.compress=importance"), 12)],
)
def test_a_record_says_how_many_tokens_of_each_chunk_the_caches_hold(
    replica: Path, tmp_path: Path, settings: tuple[str, ...], most: int
):
    """Frames of 2 tokens: 15 frames, the last chunk of which is never fed."""
    given = ["prompt=a cat", *TINY, "num_frames=57", *settings]
    job = prepare(
        MODEL, Request("self_forcing", str(replica), given, str(tmp_path), stem="a", record=True)
    )
    run(job)
    rows = json.loads((tmp_path / "a.record.json").read_text())["kv"]
    totals = [sum(row["tokens"].values()) for row in rows]
    assert max(totals) == most
    assert totals[0] == 0
    assert len(rows) == 5 * 4


def test_the_same_seed_makes_the_same_video_whatever_ran_before(make: Make):
    first = make(*TINY, "seed=1", preset="self_forcing").frames
    other = make(*TINY, "seed=2", preset="self_forcing").frames
    again = make(*TINY, "seed=1", preset="self_forcing").frames
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_is_kept_on_the_host_changes_nothing(make: Make):
    settings = (*TINY, "window=6", "sink=1")
    plain = make(*settings, preset="self_forcing").frames
    moved = ("offload=true", "kv_on_host=true", "text_on_host=true", "overlap=true")
    assert np.array_equal(make(*settings, *moved, preset="self_forcing").frames, plain)


def test_a_video_starts_from_an_image_or_goes_on_from_a_video(make: Make, picture: Path):
    started = make(*TINY, f"image={picture}", preset="causal_forcing_framewise")
    assert len(started.frames) == 33
    going_on = make(
        *TINY, f"video={started.path}", "overlap_history=9", preset="self_forcing"
    ).frames
    assert len(going_on) == 33 + 33 - 9
    change = np.abs(going_on[:33].astype(int) - started.frames.astype(int)).mean()
    assert change < 8  # the same frames, encoded as mp4 twice


def test_the_command_line_makes_a_video_and_refuses_in_one_line(
    replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--model", str(replica), "--prompt", "a cat", "--out", str(tmp_path / "a.mp4"), *TINY]
    assert main([*given, "--record"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"a.mp4", "a.json", "a.record.json"}
    capsys.readouterr()
    assert main([*given, "--image", "none.png"]) == EXIT_USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


# Upstream's command line ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def inference() -> Any:
    """The module of upstream's script."""
    spec = importlib.util.spec_from_file_location("inference", FOLDER / "inference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FEW_YAML = """
denoising_step_list:
- 1000
- 500
denoising_step_list_first_chunk: [1000, 750, 500, 250]
warp_denoising_step: true
guidance_scale: 3.0
num_frame_per_block: 1
model_kwargs:
  timestep_shift: 5.0
  local_attn_size: 6
  sink_size: 1
lr: 2.0e-06
"""
MANY_YAML = """
num_train_timestep: 1000
timestep_shift: 5.0
guidance_scale: 4.0
negative_prompt: ugly
num_frame_per_block: 3
"""


def settings_of(inference: Any, folder: Path, text: str, *flags: str) -> set[str]:
    path = folder / "config.yaml"
    path.write_text(text)
    paths = ("config_path", "checkpoint_path", "data_path", "output_folder")
    given = [part for name in paths for part in (f"--{name}", "x")]
    options = inference.parser_of().parse_args([*given, *flags])
    return set(inference.settings_of(inference.read_config(path), options))


def test_upstreams_yaml_files_are_translated(inference: Any, tmp_path: Path):
    few = settings_of(inference, tmp_path, FEW_YAML, "--use_ema", "--num_output_frames", "21")
    assert few >= {
        *("step_list=[1000, 500]", "first_chunk_step_list=[1000, 750, 500, 250]", "shift=5.0"),
        *("warp_steps=true", "chunk_frames=1", "window=6", "sink=1", "use_ema=true"),
        *("num_frames=81", "context_noise=0", "first_frame_alone=false", "rolling=false"),
    }
    many = settings_of(inference, tmp_path, MANY_YAML)
    assert many >= {
        *("step_list=null", "guidance=4.0", "negative_prompt=ugly", "shift=5.0"),
        *("chunk_frames=3", "window=null", "use_ema=false"),
    }
    assert "shift=8.0" in settings_of(inference, tmp_path, "denoising_step_list: [1000]\n")


def test_upstreams_command_makes_a_video_for_every_prompt_and_leaves_those_that_are_there(
    inference: Any, replica: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "few.yaml").write_text(FEW_YAML)
    (tmp_path / "prompts.txt").write_text("a cat\na dog / in the rain\n")
    out = tmp_path / "videos"
    given = ["--config_path", str(tmp_path / "few.yaml"), "--output_folder", str(out), "--use_ema"]
    given += ["--checkpoint_path", "checkpoints/tiny.pt", "--data_path"]
    given += [str(tmp_path / "prompts.txt"), "--num_output_frames", "5", "--model", str(replica)]
    sizes = ["height=16", "width=32"]
    assert inference.main([*given, *sizes]) == 0
    names = {"a cat-0.mp4", "a dog  in the rain-0.mp4"}
    assert {path.name for path in out.glob("*.mp4")} == names
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert inference.main([*given, *sizes]) == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    report = json.loads((out / "a cat-0.json").read_text())
    assert report["num_frames"] == 17
    capsys.readouterr()
    elsewhere = ["--output_folder", str(tmp_path / "new"), "--model", "nowhere"]
    assert inference.main([*given, *elsewhere, *sizes]) == EXIT_USER_ERROR
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_an_image_folder_of_upstream_is_read(inference: Any, tmp_path: Path):
    folder = tmp_path / "26-15"
    folder.mkdir()
    rows = [{"file_name": "a.jpg", "caption": "a cat", "target_crop": {}}]
    (tmp_path / "target_crop_info_26-15.json").write_text(json.dumps(rows))
    paths = ("config_path", "checkpoint_path", "output_folder")
    given = [part for name in paths for part in (f"--{name}", "x")]
    options = inference.parser_of().parse_args([*given, "--data_path", str(tmp_path), "--i2v"])
    assert inference.prompts_of(options) == [("a cat", "a cat", str(folder / "a.jpg"))]


def test_every_launcher_names_its_preset(copy_launchers: Callable[..., Any]):
    variables = ("MODEL", "CHECKPOINT", "PROMPT", "IMAGE", "HEIGHT", "WIDTH", "NUM_FRAMES")
    scripts = sorted(path.name for path in FOLDER.glob("run_*.sh"))
    launchers = copy_launchers(
        FOLDER,
        ["scripts/common.sh", *scripts],
        pattern="run_{}.sh",
        package="self_forcing",
        variables=(*variables, "SEED", "GPUS", "OUT"),
    )
    presets = set()
    for script in scripts:
        handed = launchers.handed_on(script[4:-3], "window=9", SEED="7")
        presets.add(handed[handed.index("--preset") + 1])
        assert handed[-1] == "window=9"
        assert "seed=7" in handed
    assert presets <= {path.stem for path in PRESETS.glob("*.yaml")}
    assert len(presets) == len(scripts)


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("self_forcing", ()),
        ("self_forcing", ("positions=relative", "window=6", "sink=1")),
        ("long", ()),
        ("self_forcing", ("clean_pass=merged", "window=6", "sink=1")),
        ("self_forcing", ("clean_pass=skipped",)),
        ("self_forcing", ("clean_pass=refined", "window=6")),
        ("self_forcing", ("reuse_blocks=true",)),
        ("self_forcing", ("recache=true", "prompt=a cat || 6: a dog", "window=6", "sink=1")),
        *(
            ("self_forcing", (f"kv.compress={name}", "window=6", f"positions={positions}", *rest))
            for name, *rest in (
                ("window",),
                ("recent",),
                ("sink_recent",),
                ("importance", "kv.kernel=3"),
                ("deep_forcing", "kv.recent_frames=1"),
                ("density", "kv.recent_frames=1"),
            )
            for positions in ("absolute", "relative")
            if name != "density" or positions == "relative"
        ),
    ],
)
def test_keys_in_eight_bits_are_nearer_than_in_two(
    make: Make, preset: str, settings: tuple[str, ...]
):
    """Rotated when they are put, or when they are read; with frames and tokens that leave."""
    plain = make(*TINY, *settings, preset=preset)
    quantized = ("kv.quantizer=kmeans", "kv.bias_correction=true", "kv.keep_last=true")
    eight, two = (
        make(*TINY, *settings, *quantized, f"kv.dtype={dtype}", preset=preset)
        for dtype in ("int8", "int2")
    )
    near, far = (np.abs(made.frames.astype(float) - plain.frames).mean() for made in (eight, two))
    eight.check_costs()
    # the video's compression adds to both
    assert 0 < near < 0.9 * far


@pytest.mark.parametrize("name", ["dummy_forcing", "forcing_kv"])
def test_classes_of_heads_hold_no_quantised_keys(make: Make, name: str):
    with pytest.raises(UserError, match=f"kv.compress={name} gives each class .* not int4"):
        make(*TINY, f"kv.compress={name}", "kv.dtype=int4", preset="self_forcing")
