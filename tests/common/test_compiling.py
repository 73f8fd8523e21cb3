"""When blocks are compiled, and what a user is told where that fails."""

import shutil

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from flowcache.compiling import compiled, should_compile
from flowcache.errors import UserError

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


@pytest.mark.slow
@needs_compiler
def test_a_failing_compiler_is_one_line_that_names_the_way_out():
    from torch._inductor import config
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    broken = compiled(doubled_sum, lengths=(1,))
    with (
        fresh_cache(),
        config.patch({"cpp.cxx": (None, "false")}),
        pytest.raises(
            UserError, match=r"can't be compiled \(.*\): give --no-compile, or compile=false"
        ) as raised,
    ):
        broken(nn.Linear(4, 4).requires_grad_(False), torch.randn(1, 7, 4))
    assert "\n" not in str(raised.value)


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
    with pytest.raises(
        UserError, match=r"compile=true needs a C\+\+ compiler.*--no-compile, or compile=false"
    ):
        should_compile(True, torch.device("cpu"))
    assert not should_compile(None, torch.device("cuda"))
    assert "a C++ compiler is missing" in caplog.text
