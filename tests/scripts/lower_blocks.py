"""Print as JSON how many kernels Inductor makes of the parts of a block on an H100, without one.

    python lower_blocks.py MODEL

The code is generated and not compiled. What Inductor asks of the device is answered by numbers.
"""

import json
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from flowcache.gpu.fake_cuda import CAPABILITY, CUDA, Forgetful, device_guard
from flowcache.wan import dit as skyreels_dit
from magi1 import dit as magi_dit
from magi1.config import read_config
from magi1.dit import is_float32
from magi1.released import CONFIGS
from skyreels_v2.model import released_sizes

H100 = SimpleNamespace(
    name="H100",
    major=CAPABILITY[0],
    minor=CAPABILITY[1],
    total_memory=80 * 10**9,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=48 * 2**10,
    shared_memory_per_block_optin=227 * 2**10,
    shared_memory_per_multiprocessor=228 * 2**10,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
HALF = torch.bfloat16

Parts = dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]
"""Name -> a part of a block, and what it gets after the block."""


class Part(nn.Module):
    """A function that takes a block, as a module that has the block's parameters."""

    def __init__(self, block: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.function = block, function

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        made = self.function(self.block, *tensors)
        return list(made) if isinstance(made, tuple) else [made]


def empty(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=CUDA)


def skyreels_parts() -> tuple[nn.Module, Parts]:
    """Return a block of the 1.3B model and its parts, for a chunk of 5 frames of 544 x 960."""
    sizes = released_sizes("df-1.3b-540p")
    tokens, frames, wide = 5 * 34 * 60, 5, torch.float32
    with torch.device("meta"):
        block = skyreels_dit.Block(
            sizes.dim,
            ffn_dim=sizes.ffn_dim,
            num_heads=sizes.num_heads,
            eps=sizes.eps,
            has_image=False,
        ).to(HALF)
    x, x32 = empty(1, tokens, sizes.dim), empty(1, tokens, sizes.dim, dtype=wide)
    heads = empty(1, tokens, sizes.num_heads, sizes.head_width)
    e = empty(1, frames, 6, sizes.dim, dtype=wide)
    rope = empty(tokens, sizes.head_width // 2, 2, dtype=wide)
    return block, {
        "before": (skyreels_dit.before_attention, (x, e, rope)),
        "between": (skyreels_dit.between_attentions, (x, heads, e)),
        "after": (skyreels_dit.after_attention, (x32, heads, e)),
    }


def magi1_parts() -> tuple[nn.Module, Parts]:
    """Return a layer of the 4.5B model and its parts, for a chunk of 6 latents of 720 x 720."""
    sizes = read_config(CONFIGS / "4.5B_distill.json").model_config
    tokens = 6 * 45 * 45
    with torch.device("meta"):
        layer = magi_dit.Layer(sizes)
    for name, parameter in layer.named_parameters():
        wide = is_float32(f"videodit_blocks.layers.0.{name}")
        parameter.data = parameter.data.to(torch.float32 if wide else HALF)
    x = empty(1, tokens, sizes.hidden_size)
    heads = empty(1, tokens, sizes.num_attention_heads, sizes.kv_channels)
    bands = sizes.kv_channels // 8
    rope = empty(tokens, magi_dit.ROPE_AXES * bands, 2, dtype=torch.float32)
    condition = empty(1, 1, sizes.condition_width)
    return layer, {
        "before": (magi_dit.before_attention, (x, rope)),
        "after": (magi_dit.after_attention, (x, heads, heads, condition)),
    }


def lowered(
    block: nn.Module, function: Callable[..., Any], tensors: tuple[Tensor, ...], fake: Any
) -> str:
    """Return the code that Inductor makes of a part."""
    part = Part(block, function)
    names, parameters = zip(*part.named_parameters(), strict=True)

    def flat(*given: Tensor) -> Any:
        own = dict(zip(names, given[: len(names)], strict=True))
        return functional_call(part, own, given[len(names) :])

    inputs = [*parameters, *tensors]
    graph = GraphLowering(
        make_fx(flat, decomposition_table=select_decomp_table())(*inputs),
        example_inputs=inputs,
        is_inference=True,
    )
    with V.set_fake_mode(fake), V.set_graph_handler(graph), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        return graph.codegen()[0].value


def count(code: str) -> dict[str, int]:
    """Return how many kernels of Triton, and of libraries, some code starts."""
    made = re.findall(r"^(triton_\w+) = async_compile", code, re.MULTILINE)
    return {
        "triton": sum(len(re.findall(rf"\b{name}\.run\(", code)) for name in made),
        "library": len(re.findall(r"extern_kernels\.\w+\(|torch\.ops\.aten\.\w+\.\w+\(", code)),
    }


def main(model: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], H100.warp_size)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _device=0: 0,
            get_active_torch_device=lambda: CUDA,
            is_active=lambda: True,
        )
    )
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_properties": lambda _device=None: H100,
        "get_device_capability": lambda _device=None: CAPABILITY,
    }
    worker = {
        "get_device_properties": staticmethod(lambda _device=None: H100),
        "current_device": staticmethod(lambda: 0),
    }
    interface = {
        "get_device_properties": staticmethod(lambda _device=None: H100),
        "get_compute_capability": staticmethod(lambda _device=None: str(target.arch)),
    }
    with ExitStack() as stack:
        stack.enter_context(device_guard())
        fake = FakeTensorMode()
        fake.fake_tensor_converter = Forgetful()
        stack.enter_context(patch.multiple(torch.cuda, **cuda))
        stack.enter_context(patch.multiple(CudaInterface.Worker, **worker))
        stack.enter_context(patch.multiple(CudaInterface, **interface))
        stack.enter_context(config.patch({"fx_graph_cache": False}))
        # what is traced here is what torch.compile sees
        stack.enter_context(patch("torch.compiler.is_compiling", return_value=True))
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake)
        block, parts = (skyreels_parts if model == "skyreels_v2" else magi1_parts)()
        block.to_empty(device=CUDA).requires_grad_(False)
        counts = {name: count(lowered(block, *part, fake)) for name, part in parts.items()}
        sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(sys.argv[1])
