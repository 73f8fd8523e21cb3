"""The check of a GPU: what is right or wrong, what is written when, and its rehearsal on a CPU."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flowcache.gpu import check, paths
from flowcache.gpu.benchmark import load_benchmark, load_benchmarks
from flowcache.gpu.fake_cuda import CUDA, pretended_cuda
from flowcache.predict import ResultStore
from flowcache.wan.vae import released

ROOT = Path(__file__).parents[2]
LEAN = ("torch", "transformers", "einops", "accelerate", "safetensors")
"""What a lent GPU machine has, with what these need themselves."""
HIDE = """
import sys
from importlib.machinery import PathFinder

class Hide(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in {names}
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path = [Hide if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""As if packages were not installed: neither imported nor found."""


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


def document_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "gpu_check.json").read_text())


# Paths --------------------------------------------------------------------------------------------


def test_an_error_is_relative_and_never_right_if_it_is_no_number():
    wanted = torch.tensor([3.0, 4.0])
    assert paths.relative_error(wanted + torch.tensor([0.5, 0.0]), wanted) == pytest.approx(0.1)
    assert paths.relative_error(wanted[:1], wanted) == float("inf")
    nan = paths.relative_error(wanted * float("nan"), wanted)
    assert not paths.Outcome(nan, 1.0).is_right
    assert paths.Outcome(0.1, 0.1).is_right


@pytest.mark.parametrize(
    ("broken", "is_right"), [(lambda x: x, True), (lambda x: x * 1.1, False), (torch.sin, False)]
)
def test_a_wrong_attention_kernel_is_found(
    broken: Callable[[torch.Tensor], torch.Tensor], is_right: bool
):
    kernel = paths.Kernel("x", lambda q, k, v: broken(paths.SDPA(q, k, v)))
    for dtype in (torch.float32, torch.bfloat16):
        assert paths.attention(kernel, torch.device("cpu"), dtype).is_right is is_right


def test_a_kernel_that_can_do_no_shape_is_absent_and_one_that_can_do_some_says_which_not():
    cpu, dtype = torch.device("cpu"), torch.float32
    kernel = paths.Kernel("x", paths.SDPA.run, lambda *_: False)
    with pytest.raises(paths.AbsentError):
        paths.attention(kernel, cpu, dtype)
    kernel = paths.Kernel("x", paths.SDPA.run, lambda q, k, _v: q.shape[2] == k.shape[2])
    assert paths.attention(kernel, cpu, dtype).note == "refuses grouped"


def test_a_demo_whose_noise_or_reuse_went_wrong_is_found(monkeypatch: pytest.MonkeyPatch):
    benchmark, cpu = load_benchmark("magi1"), torch.device("cpu")
    half = paths.Way(benchmark.demo.fast, dtype=torch.bfloat16)
    found = paths.compare(half, cpu, benchmark)
    assert found.is_right
    assert found.error > 1e-4  # another precision was really used
    predict = ResultStore.predict
    monkeypatch.setattr(
        ResultStore, "predict", lambda self, unit, **given: 0 * predict(self, unit, **given)
    )
    assert not paths.compare(half, cpu, benchmark).is_right


# Rows ---------------------------------------------------------------------------------------------


Start = Callable[..., tuple[int, dict[str, Any]]]
"""Checks made-up paths, given their outcomes by name; returns the exit code and the document."""


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    def run(outcome: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def start(**outcomes: Any) -> tuple[int, dict[str, Any]]:
        checks = [paths.Check(name, partial(run, found)) for name, found in outcomes.items()]
        monkeypatch.setattr(paths, "all_checks", lambda _device: checks)
        arguments = ["--device", "cpu", "--only", "paths", "--out", str(tmp_path)]
        return check.main(arguments), document_of(tmp_path)

    return start


@pytest.mark.parametrize(
    ("outcome", "state", "code"),
    [
        (paths.Outcome(0.1, 0.2), "right", 0),
        (paths.Outcome(0.3, 0.2), "wrong", 1),
        (paths.Outcome(float("nan"), 0.2), "wrong", 1),
        (RuntimeError("CUDA error: no kernel image\nfor line 2"), "error", 1),
        (torch.OutOfMemoryError("CUDA out of memory"), "error", 1),
    ],
)
def test_a_row_that_fails_is_named_the_others_go_on_and_the_exit_code_says_so(
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    outcome: Any,
    state: str,
    code: int,
):
    absent, right = paths.AbsentError("no such thing here"), paths.Outcome(0.0, 1.0)
    found, document = start(first=outcome, second=absent, third=right)
    assert found == code
    assert [row["state"] for row in document["paths"]] == [state, "absent", "right"]
    assert document["state"] == "complete"
    page = (tmp_path / "gpu_check.md").read_text()
    assert "REHEARSAL ON A CPU" in page
    assert re.search(rf"\| first \| {state} \|", page)
    shown = capsys.readouterr().out
    assert len([line for line in shown.splitlines() if " first " in line]) == 1
    assert "for line 2" not in shown


def test_an_interruption_keeps_the_rows_before_it(start: Start):
    code, document = start(first=paths.Outcome(0.0, 1.0), second=KeyboardInterrupt())
    assert code == 130
    assert [row["path"] for row in document["paths"]] == ["first"]
    assert document["state"] == "interrupted during: second"


def test_rows_that_no_longer_fit_are_named_and_not_called_right(
    start: Start, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(check.Report, "left", lambda _self: 0.0)
    code, document = start(first=paths.Outcome(0.0, 1.0))
    assert (code, document["paths"][0]["state"]) == (1, "skipped")


def test_a_second_check_keeps_the_file_of_the_first(start: Start, tmp_path: Path):
    assert start()[0] == start()[0] == 0
    assert len(list(tmp_path.glob("gpu_check*.json"))) == 2


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "x", "1e9"])
def test_a_time_that_is_none_is_refused_in_one_line(
    minutes: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        check.main(["--minutes", minutes])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# The whole of it ----------------------------------------------------------------------------------


def hidden_modules() -> set[str]:
    """Return the modules of all installed packages that the lean ones don't need."""
    kept, waiting = set[str](), list(LEAN)
    while waiting:
        name = re.split(r"[^\w.-]", waiting.pop())[0].lower().replace("_", "-")
        if name in kept:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        kept.add(name)
        waiting += [need for need in needs if "extra ==" not in need]
    owners = importlib.metadata.packages_distributions()
    return {
        module
        for module, names in owners.items()
        if not module.startswith("_")
        and not {name.lower().replace("_", "-") for name in names} & {*kept, "flowcache"}
    }


@pytest.mark.slow
def test_the_rehearsal_runs_with_nothing_but_what_a_lent_machine_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # setuptools, once imported, puts its own copies of packages on the path: they are not installed
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "_vendor" not in place])
    names = hidden_modules()
    assert {"diffusers", "ftfy", "imageio_ffmpeg", "PIL", "av"} <= names
    assert not {"torch", "numpy", "yaml", "tqdm", "einops"} & names
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HIDE.format(names=names))
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--out", str(out)],
        env=os.environ
        | {
            "PYTHONPATH": str(tmp_path / "hook"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),  # as on a machine lent anew
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document = document_of(out)
    states = {row["path"]: row["state"] for row in document["paths"]}
    absent = {path for path, state in states.items() if state == "absent"}
    assert {"SkyReels-V2: decoded, float32"} < absent
    assert set(states.values()) == {"right", "absent"}
    assert len(states) - len(absent) >= 15
    for model, benchmark in load_benchmarks().items():
        assert list(document["speed"]["models"][model]) == list(benchmark.checked)
        assert document["before"][model]["kinds"] is not None
    assert document["speed"]["models"]["skyreels_v2"]["vanilla"]["vae_seconds"] is None
    assert document["speed"]["models"]["magi1"]["vanilla"]["vae_seconds"] > 0
    assert "skyreels_v2: the VAE is left out: diffusers is not installed" in done.stdout


@pytest.mark.parametrize("command", ["skyreels_v2", "magi1", "flowcache.gpu.check", "bench_gpu"])
def test_help_loads_neither_transformers_nor_diffusers(command: str):
    script = (
        "import runpy, sys\n"
        f"sys.argv = [{command!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_module({command!r}, run_name='__main__')\n"
        "except SystemExit:\n"
        "    pass\n"
        "slow = ('transformers', 'diffusers', 'scipy', 'torchmetrics', 'ftfy', 'torch._dynamo')\n"
        "print([name for name in slow if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "scripts"), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_memory_limit_is_measured_where_there_is_cuda():
    """On fake tensors; the text encoder is that of the released models, all else is tiny."""
    benchmark = load_benchmark("skyreels_v2")
    with pytest.raises(paths.AbsentError):
        paths.limit_holds(torch.device("cpu"), benchmark)
    released()  # imports what can't be imported while CUDA is pretended
    with pretended_cuda():
        found = paths.limit_holds(CUDA, benchmark, size="tiny", limit_bytes=10**9)
    assert 0 < found.error < 1
    assert found.is_right
    for words in ("limit 1 GB, planned", "allocated", "reserved", "text encoder runs on the host"):
        assert words in found.note
