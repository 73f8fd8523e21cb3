"""When blocks are compiled, and what a user is told where that fails."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from flowcache.errors import UserError
from flowcache.runtime.compile import Compilation, compiled, compiled_scoring, should_compile
from flowcache.scores import (
    attention_received,
)

pytestmark = pytest.mark.numeric

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def doubled_sum(module: nn.Module, x: Tensor) -> Tensor:
    return (module(x) * 2).sum(1)


@pytest.mark.slow
@needs_compiler
def test_lengths_views_and_strides_share_the_code():
    torch.manual_seed(0)
    module, whole = nn.Linear(4, 4).requires_grad_(False), torch.randn(2, 9, 4)
    once = compiled(doubled_sum, lengths=(1,))
    torch.compiler.reset()
    once(module, whole[:1, :5])
    others = [whole[1:, 2:4], whole[:1], whole.transpose(1, 2)[:1, :, :4], whole[1:, 3:]]
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in others:
            assert_close(once(module, x), doubled_sum(module, x), ulps=64)


def broken_compile(error: Exception, calls: list[str]) -> Any:
    """Return what stands in for torch.compile and makes functions that raise."""

    def compile_to_failure(function: Any, **_: Any) -> Any:
        def fail(*_: Any) -> Any:
            calls.append(function.__name__)
            raise error

        return fail

    return compile_to_failure


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("no C++ compiler\nat line 3"),
        subprocess.CalledProcessError(1, "cc"),
        ImportError("triton is broken"),
        FileNotFoundError("/nonexistent"),
    ],
)
def test_what_can_not_be_compiled_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
):
    tried: list[str] = []
    monkeypatch.setattr("torch.compile", broken_compile(error, tried))
    together = Compilation()
    first, second = (compiled(doubled_sum, lengths=(1,), together=together) for _ in range(2))
    module, x = nn.Linear(4, 4).requires_grad_(False), torch.randn(1, 7, 4)
    for function in (first, first, second):
        assert torch.equal(function(module, x), doubled_sum(module, x))
    assert len(tried) == 1
    (line,) = caplog.messages
    reason = str(error).splitlines()[0]
    assert line.endswith(f"run as they are, which is slower: {reason}")
    assert together.to_dict() == {"is_compiled": False, "failure": reason}


def test_running_out_of_memory_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    error = torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr("torch.compile", broken_compile(error, []))
    function = compiled(doubled_sum, lengths=(1,))
    with pytest.raises(torch.OutOfMemoryError):
        function(nn.Linear(4, 4).requires_grad_(False), torch.randn(1, 7, 4))


def test_an_error_of_the_function_itself_is_raised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.compile", broken_compile(RuntimeError("shapes differ"), []))
    function = compiled(doubled_sum, lengths=(1,))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        function(nn.Linear(4, 4).requires_grad_(False), torch.randn(1, 7, 5))


WITHOUT_COMPILER = """
import json, logging, torch
from flowcache.runtime.compile import Compilation, compiled
def double(module, x):
    return module(x) * 2
logging.basicConfig()
module, state = torch.nn.Linear(4, 4).requires_grad_(False), Compilation()
function, x = compiled(double, lengths=(1,), together=state), torch.randn(1, 7, 4)
print(json.dumps([torch.equal(function(module, x), double(module, x)), state.to_dict()]))
"""


@pytest.mark.slow
def test_a_machine_whose_compiler_is_missing_computes_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], capture_output=True, text=True, check=True
    )
    is_equal, state = json.loads(done.stdout)
    assert is_equal
    assert state["is_compiled"] is False
    assert len([line for line in done.stderr.splitlines() if "can't be compiled" in line]) == 1


def test_blocks_are_compiled_on_cuda_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr("shutil.which", lambda _: "a compiler")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    assert not should_compile(None, cpu)
    assert should_compile(None, cuda)
    assert should_compile(True, cpu)
    assert not should_compile(False, cuda)


def test_a_missing_compiler_is_an_error_only_where_compiling_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(UserError, match=r"compile=true needs a C\+\+ compiler.*give compile=false"):
        should_compile(True, torch.device("cpu"))
    assert not should_compile(None, torch.device("cuda"))
    assert "a C++ compiler is missing" in caplog.text


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_scores_of_a_cache_are_traced_as_one_graph_for_all_lengths(
    monkeypatch: pytest.MonkeyPatch,
):
    """Code for a CPU has no sums of attention: the graph is run as traced, not compiled."""
    graphs: list[str] = []
    torch.compiler.reset()

    def as_traced(module: torch.fx.GraphModule, _example: object) -> object:
        graphs.append(module.print_readable(print_output=False))
        return module.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=as_traced))
    received = compiled_scoring()
    torch.manual_seed(0)
    for num_queries, num_keys in ((24, 48), (30, 96), (12, 66)):
        q, k = torch.randn(num_queries, 3, 16), torch.randn(num_keys, 3, 16)
        assert_close(received(q, k), attention_received(q, k), ulps=64)
    (graph,) = graphs
    assert graph.count("flex_attention(") >= 2
