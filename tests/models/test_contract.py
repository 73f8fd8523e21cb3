"""What every model keeps of the contract that runs and tools rely on."""

import subprocess
import sys
from pathlib import Path

import pytest

from flowcache.runtime.model import MODELS, Job, Request, Residence, VideoModel, load_model
from flowcache.runtime.run import plan_by_sizes, prepare

RELEASED = {"skyreels_v2": "df-1.3b-540p", "magi1": "4.5B_distill"}
SHARED = (
    *("prompt", "device", "compile", "overlap", "offload", "memory_limit", "embedding_cache"),
    *("attention_kernel", "reuse.policy", "kv.compress", "parallel.branch", "parallel.sequence"),
)


@pytest.fixture(params=RELEASED)
def model(request: pytest.FixtureRequest) -> VideoModel:
    return load_model(request.param)


def job_of(model: VideoModel, folder: Path, *settings: str) -> Job:
    overrides = ["prompt=a red circle", "device=cpu", *settings]
    return prepare(model, Request("vanilla", "demo", overrides, str(folder), is_dry=True))


def test_every_key_is_a_setting(model: VideoModel, tmp_path: Path):
    lines = job_of(model, tmp_path).config.lines()
    settings = {line.partition(":")[0] for line in lines}
    assert {*model.keys.values(), *SHARED} <= settings
    assert len(lines) == len(settings)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_the_flat_names(name: str):
    flat = {"prompt", "seed", "num_steps", "num_frames", "height", "width", "fps", "guidance"}
    assert flat <= {*load_model(name).keys}


def test_a_job_reads_settings_by_the_names_of_arguments(model: VideoModel, tmp_path: Path):
    job = job_of(model, tmp_path, f"{model.keys['seed']}=7", f"{model.keys['num_steps']}=8")
    assert (job.value("seed"), job.value("num_steps")) == (7, 8)
    assert job.path == tmp_path / "vanilla-7.mp4"


def test_the_work_of_a_run_fits_together(model: VideoModel, tmp_path: Path):
    job = job_of(model, tmp_path)
    work = job.work
    assert work.num_chunks > 0
    assert work.num_ticks >= job.value("num_steps")
    for segment in work.segments:
        assert set(segment.generated) == {chunk for tick in segment.ticks for chunk in tick.steps}
        assert len(segment.frames) == len(segment.tokens)
    assert work.segments[-1].frames[-1][1] == job.value("num_frames")
    assert job.memory is not None
    assert {"text", "denoise", "decode"} <= {stage.name for stage in job.memory.stages}


def test_what_is_placed_is_what_a_plan_wants(model: VideoModel, tmp_path: Path):
    job = job_of(model, tmp_path, "offload=true")
    assert model.residence(job.config).dit_aside
    assert len({key for key, _ in model.on_host.values()}) == 3
    for moved in (model.residence(job.config), Residence(True, True, True)):
        assert model.residence(model.placed(job.config, moved)) == moved


def test_a_released_model_is_planned_by_its_sizes_alone(model: VideoModel):
    request = Request("vanilla", RELEASED[model.name], ["prompt=a red circle"], is_dry=True)
    plan = plan_by_sizes(model, request)
    for word in ("PFLOP", "KV cache", "  denoise"):
        assert word in plan
    assert "output" not in plan


@pytest.mark.parametrize("name", MODELS)
def test_help_answers_without_pytorch(name: str):
    code = (
        f"import sys; from {name}.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
