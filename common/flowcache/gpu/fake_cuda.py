"""Run the CUDA paths where there is no GPU: tensors have a device, a shape and a dtype, no values.

PyTorch's `FakeTensorMode` works out what every operation would give. Here is what it lacks on a
machine without CUDA: a device guard, the classes of `torch.cuda`, pinned memory, random generators,
and answers where the host reads a value. Tensors on the CPU stay real, so that schedules and
decisions are those of a real run. A `Ledger` writes down what each operation would cost.

What no fake can show: values, times, the order of streams, what a library allocates for itself.
"""

import ctypes
import inspect
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorConverter,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda:0")
CAPABILITY = (9, 0)
"""Compute capability of the pretended device: an H100's."""
LARGE_BYTES = 2**20
"""From here on a tensor is large: no vector of one value per channel is."""
FLASH_WIDTH = 256
"""Widest attention head of the flash kernel, which also wants 16-bit numbers."""
CUDA_SLOT, META_SLOT, NUM_SLOTS = 1, 14, 22
"""Numbers of device types in PyTorch, and how many there are. Source: c10/core/DeviceType.h."""
ROOT = Path(__file__).resolve().parents[3]
HERE = str(Path(__file__).resolve().parent)
OWN_FOLDERS = tuple(
    str(ROOT / name) for name in ("common", "FlowCache4MAGI-1", "FlowCache4SkyReels-V2")
)
NO_KERNEL = frozenset(
    (
        *("view", "_unsafe_view", "_reshape_alias", "unflatten", "squeeze", "unsqueeze", "expand"),
        *("t", "transpose", "permute", "slice", "select", "narrow", "diagonal", "unfold"),
        *("split", "split_with_sizes", "unbind", "as_strided", "alias", "detach", "lift_fresh"),
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    )
)
"""Operations that start nothing on a device: views, and memory without values."""
READS = frozenset(["_local_scalar_dense", "is_nonzero", "nonzero", "equal"])
"""Operations for whose result the host waits."""


# Written down -------------------------------------------------------------------------------------


class Site(NamedTuple):
    """Where something happened: stage of the run, and line of our code."""

    stage: str
    place: str


@dataclass
class Cost:
    """What some operations would do on the device."""

    launches: int = 0
    """Operations that start at least one kernel, uncompiled."""
    num_bytes: int = 0
    """Read and written, each tensor once per operation."""
    flops: int = 0
    """Of products and attention, by PyTorch's own formulas."""

    def add(self, other: "Cost") -> None:
        """Add what others do."""
        self.launches += other.launches
        self.num_bytes += other.num_bytes
        self.flops += other.flops


class Product(NamedTuple):
    """A kind of matrix product, convolution or attention."""

    stage: str
    name: str
    dtype: torch.dtype


@dataclass
class Ledger:
    """What a run on fake CUDA tensors would do, by stage, product and line."""

    costs: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    """By stage."""
    products: dict[Product, Cost] = field(default_factory=lambda: defaultdict(Cost))
    """By kind; all but bytes."""
    reads: Counter[Site] = field(default_factory=Counter)
    """Times that the host waits for a value of the device."""
    waits: Counter[Site] = field(default_factory=Counter)
    """Copies between host and device that keep the host waiting: not pinned, or blocking."""
    copies: Counter[Site] = field(default_factory=Counter)
    """The others."""
    upcasts: Counter[Site] = field(default_factory=Counter)
    """Large 16-bit tensors that are written once more in float32."""
    live_bytes: int = 0
    """In tensors on the device, now."""
    peak_bytes: int = 0
    """The same, at most."""
    peak_stage: str = ""
    stages: list[str] = field(default_factory=lambda: ["other"])
    """Those that are under way, the innermost last."""

    @contextmanager
    def stage(self, name: str) -> Generator[None, None, None]:
        """Write what happens in the body down under a stage."""
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()

    def total(self, *stages: str) -> Cost:
        """Return the cost of some stages; without names, of all."""
        total = Cost()
        for name, cost in self.costs.items():
            if not stages or name in stages:
                total.add(cost)
        return total

    def waits_in(self, stage: str) -> int:
        """Return how many copies keep the host waiting in a stage."""
        return sum(count for site, count in self.waits.items() if site.stage == stage)

    def site(self) -> Site:
        """Return where our code is now."""
        frame, place = inspect.currentframe(), "elsewhere"
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(OWN_FOLDERS) and not name.startswith(HERE):
                place = f"{Path(name).parent.name}/{Path(name).name}:{frame.f_code.co_name}"
                break
            frame = frame.f_back
        return Site(self.stages[-1], place)


# Modes --------------------------------------------------------------------------------------------


class Forgetful(FakeTensorConverter):
    """Keeps no references to fake tensors, which would forbid `Module.to` to swap parameters."""

    def set_tensor_memo(self, t: Tensor, v: FakeTensor) -> None:
        """Keep nothing."""


class _Pinned:
    """Which memory of the host counts as pinned."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.finalize] = {}

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._known:
            self._known[key] = weakref.finalize(storage, self._known.pop, key, None)

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._known


class _Functions(TorchFunctionMode):
    """Replaces what fake tensors can't do at the level of Python functions."""

    def __init__(self, pinned: _Pinned) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.tensor and given.pop("pin_memory", False):
            made = func(*args, **given)
            self.pinned.add(made)
            return made
        if func is functional.scaled_dot_product_attention and args[0].is_cuda:
            return _attention(*args, **given)
        return func(*args, **given)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, enable_gqa: bool = False
) -> Tensor:
    """Attend as PyTorch's choice on a Hopper GPU does where cuDNN is left aside."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    if attn_mask is None and is_half and q.shape[-1] <= FLASH_WIDTH:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    assert not enable_gqa or q.shape[1] == k.shape[1], "the efficient kernel knows no groups"
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, False)[0]


class _Operations(TorchDispatchMode):
    """Keeps what concerns the host alone real, and writes down all else."""

    supports_higher_order_operators = True
    """Those of torchao, which come back as the operations that they consist of."""

    def __init__(self, ledger: Ledger, pinned: _Pinned) -> None:
        super().__init__()
        self.ledger, self.pinned = ledger, pinned
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if isinstance(func, HigherOrderOperator):
            return func(*args, **given)
        tensors = [leaf for leaf in tree_leaves((args, given)) if isinstance(leaf, Tensor)]
        is_pinned = bool(given.pop("pin_memory", False))
        wanted = given.get("device")
        is_elsewhere = wanted is not None and torch.device(wanted).type == "cuda"
        if not (is_pinned or is_elsewhere or any(isinstance(x, FakeTensor) for x in tensors)):
            with unset_fake_temporarily():
                return func(*args, **given)
        name = func._schema.name.partition("::")[2]
        if name in READS and tensors[0].is_cuda:
            self.ledger.reads[self.ledger.site()] += 1
            return 0.0
        result = func(*args, **given)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in results:
            if is_pinned:
                self.pinned.add(tensor)
            self._keep(tensor)
        if name in ("copy_", "_to_copy"):
            is_free = given.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
            self._note_copy(name, tensors[-1], results[0], is_free=is_free)
        if name not in NO_KERNEL and any(x.is_cuda for x in results):
            flops = self._flops(func, name, args, given, tensors, results[0])
            read = tensors[1:] if name == "copy_" else tensors
            num_bytes = sum(_touched_bytes(x) for x in (*read, *results) if x.is_cuda)
            self.ledger.costs[self.ledger.stages[-1]].add(Cost(1, num_bytes, flops))
        return result

    def _keep(self, tensor: Tensor) -> None:
        """Count the memory of a tensor on the device until it is gone."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if not tensor.is_cuda or key in self._known:
            return
        ledger, num_bytes = self.ledger, storage.nbytes()
        self._known[key] = weakref.finalize(storage, self._drop, key, num_bytes)
        ledger.live_bytes += num_bytes
        if ledger.live_bytes > ledger.peak_bytes:
            ledger.peak_bytes, ledger.peak_stage = ledger.live_bytes, ledger.stages[-1]

    def _drop(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self.ledger.live_bytes -= num_bytes

    def _flops(
        self,
        func: Any,
        name: str,
        args: tuple[Any, ...],
        given: Mapping[str, Any],
        tensors: Sequence[Tensor],
        result: Tensor,
    ) -> int:
        """Count the FLOPs of a product or attention, by kind too; other operations have none."""
        if func._overloadpacket not in flop_registry:
            return 0
        _check_types(name, tensors)
        flops = flop_registry[func._overloadpacket](*args, **given, out_val=result)
        kind = Product(self.ledger.stages[-1], name, tensors[0].dtype)
        self.ledger.products[kind].add(Cost(1, 0, flops))
        return flops

    def _note_copy(self, name: str, source: Tensor, result: Tensor, *, is_free: bool) -> None:
        """Write down a copy between host and device, and what is widened on the device."""
        ledger = self.ledger
        if source.is_cuda != result.is_cuda:
            is_pinned = self.pinned.holds(result if source.is_cuda else source)
            (ledger.copies if is_free and is_pinned else ledger.waits)[ledger.site()] += 1
        elif (
            name == "_to_copy"
            and result.dtype == torch.float32
            and source.dtype in (torch.bfloat16, torch.float16)
            and _touched_bytes(result) >= LARGE_BYTES
        ):
            ledger.upcasts[ledger.site()] += 1


def _check_types(name: str, tensors: Sequence[Tensor]) -> None:
    """Check that the factors of a product have one type, as kernels ask and fake tensors do not."""
    found = {x.dtype for x in tensors}
    if len(found) > 1 and name != "_scaled_mm":  # whose scales are float32
        raise RuntimeError(f"{name} of tensors of one dtype, not {sorted(map(str, found))}")


def _touched_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; what is expanded counts once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


# torch.cuda ---------------------------------------------------------------------------------------


class _Queue:
    """Replaces `torch.cuda.Event` and `torch.cuda.Stream`: all is done at once, in no time."""

    device = CUDA

    def __init__(self, *_given: object, **_options: object) -> None:
        """Take what events and streams take."""

    def _done(self, *_given: object) -> None:
        """Wait for nothing."""

    record = synchronize = wait_stream = wait_event = _done

    def elapsed_time(self, _end: "_Queue") -> float:
        """Return milliseconds."""
        return 0.0


@contextmanager
def device_guard() -> Generator[None, None, None]:
    """Give PyTorch a device guard for CUDA, as operations on fake tensors ask for one.

    A build without CUDA has none. That of the meta device does nothing, which is right here.
    """
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libc10.{suffix}"))
    table = (ctypes.c_void_p * NUM_SLOTS).in_dll(
        library, "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = table[CUDA_SLOT]
    if before is None:
        table[CUDA_SLOT] = table[META_SLOT]
    try:
        yield
    finally:
        table[CUDA_SLOT] = before


@contextmanager
def pretended_cuda() -> Generator[Ledger, None, None]:
    """Pretend that there is a CUDA device in this thread, and write down what is done on it.

    All is as before afterwards. Models must be made inside.
    """
    ledger, pinned, real_generator = Ledger(), _Pinned(), torch.Generator
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    fake.fake_tensor_converter = Forgetful()
    cuda: dict[str, Any] = {
        "Event": _Queue,
        "Stream": _Queue,
        "current_stream": lambda _device=None: _Queue(),
        "stream": lambda _stream: nullcontext(),
        "init": lambda: None,
        "synchronize": lambda _device=None: None,
        "set_device": lambda _device: None,
        "get_device_capability": lambda _device=None: CAPABILITY,
        "reset_peak_memory_stats": lambda _device=None: None,
        "max_memory_allocated": lambda _device=None: ledger.peak_bytes,
        "max_memory_reserved": lambda _device=None: ledger.peak_bytes,
        "memory_reserved": lambda _device=None: ledger.live_bytes,
        "empty_cache": lambda: None,
    }

    def tolist(tensor: FakeTensor) -> Any:
        if not tensor.is_cuda:
            raise NotImplementedError("the values of a fake tensor on the host are not known")
        ledger.reads[ledger.site()] += 1
        return torch.zeros(tensor.shape).tolist()

    with ExitStack() as stack:
        stack.enter_context(device_guard())
        stack.enter_context(patch.object(FakeTensor, "tolist", tolist))
        stack.enter_context(patch.multiple(torch.cuda, **cuda))
        stack.enter_context(
            patch.object(torch, "Generator", lambda _device="cpu": real_generator("cpu"))
        )
        stack.enter_context(torch.no_grad())
        stack.enter_context(fake)
        stack.enter_context(_Operations(ledger, pinned))
        stack.enter_context(_Functions(pinned))
        yield ledger
