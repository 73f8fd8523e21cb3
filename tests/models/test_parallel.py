"""Several processes make the video that one makes: divided by passes, by tokens, and by both."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import num_ulps

from flowcache.runtime.model import load_model
from flowcache.runtime.record import read_record
from flowcache.runtime.run import prepare

SCRIPT = Path(__file__).with_name("parallel_runs.py")
ULPS = 256
"""Pixels of several processes may differ by this: they add up in another order in every step."""

SKYREELS_FLOWCACHE = ["attention=causal", "reuse.policy=flowcache", "reuse.warmup_steps=1"]
SKYREELS = {
    "checkpoint": "small",
    "common": ["prompt=a red circle moving right", "height=16", "width=80", "num_steps=4"],
    "cases": {
        "vanilla": [],
        "teacache": ["reuse.policy=teacache", "reuse.threshold=0.3", "reuse.warmup_steps=1"],
        "flowcache": [*SKYREELS_FLOWCACHE, "reuse.threshold=0.3"],
        "content": [
            *(*SKYREELS_FLOWCACHE, "reuse.threshold=0.4"),
            *("reuse.signal=content", "reuse.predict=velocity"),
        ],
        "compression": [
            *(*SKYREELS_FLOWCACHE, "reuse.threshold=0.3"),
            *("kv.compress=importance", "kv.kernel=3"),
        ],
        "frames": [
            *(*SKYREELS_FLOWCACHE, "kv.compress=importance"),
            *("kv.granularity=frame", "kv.queries=frame"),
        ],
        "stride": [
            *("attention=causal", "reuse.policy=stride", "reuse.warmup_steps=1"),
            *("clean_pass=true", "reuse.predict=latent_update", "kv.compress=recent"),
            "addnoise_condition=20",
        ],
        "held": [
            *("attention=causal", "reuse.policy=stride", "reuse.warmup_steps=3"),
            *("reuse.predict=velocity", "reuse.guidance_every=2"),
        ],
        "racer": [
            *("attention=causal", "reuse.policy=racer", "reuse.warmup_steps=1"),
            *("num_steps=8", "reuse.threshold=0.5"),
        ],
        "segments": [
            *(*SKYREELS_FLOWCACHE, "reuse.threshold=0.3", "reuse.extrapolate=0.5"),
            *("batch_branches=true", "num_frames=29", "base_num_frames=17", "overlap_history=5"),
        ],
        "quantized": [
            *("attention=causal", "kv.dtype=int4", "kv.quantizer=kmeans", "kv.keep_last=true"),
            "kv.bias_correction=true",
        ],
        "wide": ["num_frames=9", "base_num_frames=9", "width=528", "num_steps=2"],
    },
    "preset": "vanilla",
    "recorded": "compression",
    "has_branches": True,
}
"""Each with 5 tokens per frame, which no number of processes divides.

The picture "wide" has 66 columns of latents, so that the VAE's strips are narrower at every level.
"""

MAGI_FLOWCACHE = ["reuse.policy=flowcache", "reuse.warmup_steps=1", "reuse.threshold=0.3"]
MAGI_COMPRESSED = ["kv.compress=importance", "kv.total_chunks=3", "kv.kernel=3"]
DISTILLED = {
    "checkpoint": "distilled",
    "common": [
        *("prompt=a red circle moving right", "runtime_config.num_frames=60"),
        *("runtime_config.video_size_h=16", "runtime_config.video_size_w=48"),
    ],
    "cases": {
        "vanilla": ["runtime_config.noise2clean_kvrange=[3,2]"],
        "flowcache": [*MAGI_FLOWCACHE, "reuse.predict=velocity", "passes.clean_pass=false"],
        "teacache": [*MAGI_FLOWCACHE, "reuse.policy=teacache", *MAGI_COMPRESSED],
        "racer": [
            *("reuse.policy=racer", "reuse.warmup_steps=1", "reuse.threshold=2"),
            *("runtime_config.num_steps=12", "runtime_config.num_frames=36"),
        ],
        "compression": [
            *(*MAGI_FLOWCACHE, *MAGI_COMPRESSED),
            *("kv.queries=frame", "passes.clean_pass=false"),
        ],
        "frames": [*MAGI_COMPRESSED, "kv.granularity=frame", "reuse.policy=stride"],
        "quantized": [*MAGI_COMPRESSED, "kv.dtype=int4", "kv.bias_correction=true"],
        "wide": ["runtime_config.num_frames=36", "runtime_config.video_size_w=448"],
    },
    "preset": "vanilla",
    "recorded": None,
    "has_branches": False,
}
"""Each with 9 tokens per chunk of 3 latents, "wide" with 84.

The VAE decodes each chunk in one tile, those of "wide" in three.
"""
BASE = {
    "checkpoint": "base",
    "common": DISTILLED["common"],
    "cases": {
        **DISTILLED["cases"],
        "held": ["reuse.guidance_every=2"],
        "held_flowcache": [*MAGI_FLOWCACHE, *MAGI_COMPRESSED, "reuse.guidance_every=2"],
    },
    "preset": "vanilla",
    "recorded": "held_flowcache",
    "has_branches": True,
}
FEW_STEPS = {
    "checkpoint": "replica",
    "common": [
        *("prompt=a cat || 6: a dog", "checkpoint=checkpoints/tiny.pt"),
        *("num_frames=33", "height=16", "width=32"),
    ],
    "cases": {
        "window": ["window=6"],
        "merged": ["window=6", "clean_pass=merged"],
        "relative": ["window=6", "kv.compress=window", "positions=relative"],
    },
    "preset": "self_forcing",
    "recorded": None,
    "has_branches": False,
}
"""Each with 2 tokens per frame."""
ROLLING = FEW_STEPS | {
    "common": ["prompt=a cat", *FEW_STEPS["common"][1:]],
    "cases": {"rolling": ["rolling=true", "window=21"]},
}
MANY_STEPS = {
    "checkpoint": "replica",
    "common": FEW_STEPS["common"],
    "cases": {
        "vanilla": ["num_steps=3"],
        "flowcache": [
            *("num_steps=8", "reuse.policy=flowcache", "reuse.threshold=0.4"),
            "reuse.rescale=none",
        ],
    },
    "preset": "ar_chunkwise",
    "recorded": "flowcache",
    "has_branches": True,
}
KINDS = {
    "skyreels_v2": {"small": SKYREELS},
    "magi1": {"distilled": DISTILLED, "base": BASE},
    "self_forcing": {"few_steps": FEW_STEPS, "rolling": ROLLING, "many_steps": MANY_STEPS},
}
"""Model -> kind of run -> its cases, on the checkpoint of a fixture"""
REUSING = {
    "small": ("teacache", "flowcache", "content", "compression", "stride", "racer", "segments"),
    "distilled": ("teacache", "flowcache", "racer", "compression"),
    "base": ("teacache", "flowcache", "racer", "compression"),
}
LAYOUTS = {
    "skyreels_v2": {1: ("1x1",), 2: ("1x2", "2x1"), 4: ("1x4", "2x2")},
    "magi1": {1: ("1x1",), 2: ("1x2", "2x1"), 3: ("3x1",), 4: ("2x2",)},
    "self_forcing": {1: ("1x1",), 2: ("1x2", "2x1")},
}

Results = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""Checkpoint and layout -> case -> what came out"""
Make = Callable[[str, int], list[Results]]

DIVIDED = [
    pytest.param(model, num, marks=[] if (model, num) == ("skyreels_v2", 2) else pytest.mark.slow)
    for model, layouts in LAYOUTS.items()
    for num in layouts
    if num > 1
]


@pytest.fixture(scope="module")
def made(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    run_in_ranks: Callable[..., None],
) -> Make:
    """Return what makes the videos of all cases of a model in so many processes, once."""
    known: dict[tuple[str, int], list[Results]] = {}

    def make(model: str, num: int) -> list[Results]:
        if (model, num) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            kinds = {
                name: kind | {"checkpoint": str(request.getfixturevalue(kind["checkpoint"]))}
                for name, kind in KINDS[model].items()
            }
            path = folder / "cases.json"
            path.write_text(json.dumps({"model": model, "kinds": kinds}))
            run_in_ranks(SCRIPT, str(path), str(folder), *LAYOUTS[model][num], num=num)
            known[model, num] = [
                torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num)
            ]
        return known[model, num]

    return make


@pytest.mark.numeric
@pytest.mark.parametrize(("model", "num"), DIVIDED)
def test_processes_make_the_video_of_one(made: Make, model: str, num: int):
    [alone] = made(model, 1)
    for of_rank in made(model, num):
        assert {layout for _, layout in of_rank} == {*LAYOUTS[model][num]}
        for (kind, layout), cases in of_rank.items():
            assert cases.keys() == alone[kind, "1x1"].keys()
            for name, case in cases.items():
                expected = alone[kind, "1x1"][name]["frames"]
                # the frames of the Wan models are compared with white, 1.0
                size = {"size": 1.0} if model != "magi1" else {}
                difference = num_ulps(case["frames"], expected, **size)
                assert difference < ULPS, f"{name}, {kind}, {layout}: {difference} ulps"


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(("model", "checkpoint"), [("skyreels_v2", "small"), ("magi1", "base")])
def test_processes_with_8_bit_weights_make_the_video_of_one(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    run_in_ranks: Callable[..., None],
    model: str,
    checkpoint: str,
):
    paths = [str(Path(sys.prefix) / "quantize"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    case = {
        "checkpoint": str(request.getfixturevalue(checkpoint)),
        "common": [*KINDS[model][checkpoint]["common"], "quantize=int8_weight"],
        "cases": {"vanilla": []},
        "preset": "vanilla",
        "recorded": None,
        "has_branches": True,
    }
    (tmp_path / "cases.json").write_text(json.dumps({"model": model, "kinds": {"8-bit": case}}))
    made: dict[str, torch.Tensor] = {}
    for num in (1, 2):
        layouts = LAYOUTS[model][num]
        run_in_ranks(SCRIPT, str(tmp_path / "cases.json"), str(tmp_path), *layouts, num=num)
        found = torch.load(tmp_path / f"{num - 1}.pt", weights_only=False)
        made |= {layout: found["8-bit", layout]["vanilla"]["frames"] for layout in layouts}
    alone = made.pop("1x1")
    for layout, frames in made.items():
        assert num_ulps(frames, alone, size=1.0) < ULPS, layout


@pytest.mark.parametrize(("model", "num"), DIVIDED)
def test_processes_decide_and_count_as_one(made: Make, model: str, num: int):
    [alone] = made(model, 1)
    for of_rank in made(model, num):
        for (kind, _), cases in of_rank.items():
            for name, case in cases.items():
                expected = alone[kind, "1x1"][name]
                assert case["computed"] == expected["computed"], name
                assert case["flops"] == expected["flops"], name


@pytest.mark.parametrize(("model", "num"), DIVIDED)
def test_processes_record_what_one_records(
    made: Make, model: str, num: int, same_record: Callable[[Path, Path], None]
):
    [alone], [first, *_] = made(model, 1), made(model, num)
    recorded = {kind: each["recorded"] for kind, each in KINDS[model].items() if each["recorded"]}
    for (kind, _), cases in first.items():
        if kind not in recorded:
            continue
        request = cases[recorded[kind]]["request"]
        same_record(Path(request.out), Path(alone[kind, "1x1"][recorded[kind]]["request"].out))
        # one process makes the decisions again
        again = [*request.overrides, "parallel.branch=null", "parallel.sequence=null"]
        path = str(Path(request.out).with_suffix(".record.json"))
        asked = replace(request, overrides=again, replay=path, overwrite=True)
        assert prepare(load_model(model), asked).replay == read_record(Path(path))


@pytest.mark.parametrize("model", ["skyreels_v2", pytest.param("magi1", marks=pytest.mark.slow)])
def test_the_cases_reuse_and_compress(made: Make, model: str):
    [alone] = made(model, 1)
    for (kind, _), cases in alone.items():
        for name in REUSING[kind]:
            computed, without_reuse = cases[name]["flops"]
            assert computed < without_reuse, f"{name}, {kind}"
        frames = (cases[name]["frames"] for name in ("flowcache", "compression"))
        assert num_ulps(*frames, size=1.0) > 100 * ULPS
        if model == "magi1":
            assert cases["flowcache"]["flops"][1] > cases["compression"]["flops"][1]


def launch(model: Path, out: Path, *arguments: str, num: int) -> list[str]:
    return [
        *(sys.executable, "-m", "flowcache.launch", str(num)),
        *("-m", "skyreels_v2", "--preset", "vanilla"),
        *("--model", str(model), "--prompt", "a cat", "--out", str(out), *arguments),
    ]


def processes_of(launcher: int) -> dict[str, int]:
    """Return the processes that a launcher started, by rank."""
    found = {}
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks = [entry[5:] for entry in environment if entry.startswith("RANK=")]
        found |= dict.fromkeys(ranks, int(child))
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_all_processes_end_within_a_minute_when_one_dies(small: Path, tmp_path: Path):
    out, told = tmp_path / "a.mp4", tmp_path / "told"
    command = launch(small, out, "num_steps=900", num=2)
    with told.open("w") as stream:
        launcher = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        while "tick" not in told.read_text().partition("output")[2]:
            assert launcher.poll() is None, told.read_text()
            time.sleep(0.2)
        processes = processes_of(launcher.pid)
        os.kill(processes["1"], signal.SIGKILL)
        assert launcher.wait(timeout=60) != 0
    assert processes.keys() == {"0", "1"}
    assert not any(Path(f"/proc/{process}").exists() for process in processes.values())
    assert told.read_text().count("error: ") <= 1
    assert list(tmp_path.iterdir()) == [told]


@pytest.mark.parametrize(
    ("num", "settings", "error"),
    [
        (
            3,
            ["parallel.branch=1"],
            "parallel.sequence=3 does not divide the 4 key/value heads of the model: "
            "start 1 or 2 processes instead of 3 (a launcher: GPUS=1 or 2)",
        ),
        (
            2,
            [*SKYREELS_FLOWCACHE, "reuse.tokens.choice=motion"],
            "reuse.tokens.choice=motion needs all tokens of a chunk in one process, but 2 run: "
            "start one, or set reuse.tokens.choice=all",
        ),
    ],
)
def test_what_can_not_be_divided_is_told_once_before_anything_is_loaded(
    small: Path, tmp_path: Path, num: int, settings: list[str], error: str
):
    command = launch(small, tmp_path / "a.mp4", *settings, num=num)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {error}\n"
    assert not list(tmp_path.iterdir())
