"""How many kernels a compiled block is on an H100: Inductor generates the code without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("lower_blocks.py")
KERNELS = {
    "skyreels_v2": {
        "before": {"triton": 3, "library": 3},
        "between": {"triton": 2, "library": 2},
        "after": {"triton": 3, "library": 3},
    },
    "magi1": {
        "before": {"triton": 6, "library": 4},
        "after": {"triton": 5, "library": 4},
    },
}
"""Of the pinned PyTorch. More: something is no longer fused. Fewer: progress, to be kept here."""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="needs triton, which only PyTorch's builds for CUDA bring",
)
@pytest.mark.parametrize("model", KERNELS)
def test_a_block_is_as_few_kernels_as_it_was(model: str):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), model], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert json.loads(run.stdout) == KERNELS[model]
