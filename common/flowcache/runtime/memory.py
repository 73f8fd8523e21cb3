"""How much memory a run needs, stage by stage, and what must leave the GPU so that it fits.

A stage is a time in which the same large things are in memory: encoding the text, denoising,
decoding. Its parts are counted by arithmetic from the settings; the scratch memory of a network is
counted by running it on the meta device, where tensors have shapes but no values.
"""

import copy
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
)
from torch.utils._pytree import tree_leaves

from flowcache.errors import UserError
from flowcache.kv import PREFETCHED_LAYERS, KVCache, caches_for
from flowcache.runtime.model import Residence, Work
from flowcache.runtime.parallel import Group, Layout, Ranks, branches_per_process
from flowcache.runtime.stats import scaled

RESERVED_SHARE = 0.05
"""Of the limit: holes between tensors, scratch memory inside kernels, the CUDA context."""
PIXEL_BYTES = 3 * 4
"""Of an RGB pixel in float32."""
META = torch.device("meta")
BLOCK_BYTES = 2**28
"""Of pinned memory that are asked for at once: PyTorch rounds what it pins up to a power of two."""
ALIGNMENT = 64
"""Bytes at whose multiples a weight starts in a block."""
SCORING_REMEDY = "set kv.queries=frame"


# Counting -----------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is entered, until they are gone.

    Views and tensors that were there before count nothing, nor does what a kernel allocates for
    itself. Works on every device, the meta device included.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        for tensor in _tensors((args, given)):
            self._know(tensor, counts=False)
        result = func(*args, **given)
        for tensor in _tensors(result):
            self._know(tensor, counts=True)
        return result

    def _know(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)  # the object lives as long as the memory that it stands for
        if key in self._known:
            return
        num_bytes = storage.nbytes() if counts else 0
        self._known[key] = weakref.finalize(storage, self._forget, key, num_bytes)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self.now -= num_bytes


class LeanAttention(TorchFunctionMode):
    """Stands in for attention while shapes are traced: kernels on a GPU make their output alone."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def weight_bytes(model: nn.Module) -> int:
    """Return what the parameters of a network take; on the meta device, what they would."""
    return sum(parameter.nbytes for parameter in model.parameters())


def text_scratch_bytes(encoder: Any, *, batch: int, num_tokens: int, dtype: torch.dtype) -> int:
    """Return what encoding prompts holds in addition to the weights: one layer is as all."""
    ids = torch.empty(batch, num_tokens, dtype=torch.int64, device=META)
    model = one_layer(encoder).to(dtype)
    # without a mask: transformers would look at its values
    return scratch_bytes(lambda: model(input_ids=ids).last_hidden_state)


def one_layer(encoder: Any) -> Any:
    """Return an empty text encoder of one layer, which needs as much scratch memory as all."""
    config = copy.deepcopy(encoder.config)
    config.num_layers = 1
    with torch.device("meta"):
        return type(encoder)(config).train(encoder.training)


@dataclass(frozen=True)
class _TracedGroup(Group):
    """Processes whose exchanges have shapes, as all has on the meta device, and bring nothing."""

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def broadcast(self, x: Tensor, *, source: int) -> Tensor:
        return x

    def all_to_all(self, x: Tensor, *, given: Sequence[int], received: Sequence[int]) -> Tensor:
        return x.contiguous().new_empty(sum(received), *x.shape[1:])


def traced_ranks(layout: Layout) -> Ranks:
    """Return the processes of a layout as one of them sees them whose run is only traced.

    It is one in the middle: its strip of a picture has a margin on both sides.
    """
    branch, sequence = layout.branch, layout.sequence
    return Ranks(
        layout=layout,
        branches=_TracedGroup(branch // 2, branch),
        sequence=_TracedGroup(sequence // 2, sequence),
    )


def scratch_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that some work on meta tensors holds at once, its result included."""
    with torch.no_grad(), LeanAttention(), LiveBytes() as live:
        result = work()
        peak = live.peak
        del result
    return peak


# Planning -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Something large that is in memory during a stage."""

    name: str
    num_bytes: int
    remedy: str
    """What makes it smaller, as an order to the user."""


@dataclass(frozen=True)
class Stage:
    """A time of the run with the largest things that are in the device's memory then."""

    name: str
    parts: tuple[Part, ...]

    @property
    def peak_bytes(self) -> int:
        """Return what all parts take together."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def largest(self) -> Part:
        """Return the largest part."""
        return max(self.parts, key=lambda part: part.num_bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept where, and what each stage then takes of the device's memory."""

    residence: Residence
    stages: tuple[Stage, ...]
    limit_bytes: int | None
    """None: nothing is known of how much there is."""

    @property
    def peak_bytes(self) -> int:
        """Return what the largest stage takes."""
        return max(stage.peak_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return {
            "limit_bytes": self.limit_bytes,
            "planned_peak_bytes": self.peak_bytes,
            "residence": self.residence.describe(),
            "stages": {
                stage.name: {part.name: part.num_bytes for part in stage.parts}
                for stage in self.stages
            },
        }

    def lines(self) -> list[str]:
        """Say the plan, one line per stage."""
        limit = "no limit" if self.limit_bytes is None else f"limit {_size(self.limit_bytes)}"
        head = (
            f"memory       {_size(self.peak_bytes)} at most, {limit}: {self.residence.describe()}"
        )
        rows = [head]
        for stage in self.stages:
            parts = ", ".join(f"{p.name} {_size(p.num_bytes)}" for p in stage.parts if p.num_bytes)
            peak = _size(stage.peak_bytes)
            rows.append(f"  {stage.name:<10} {peak}: {parts or 'nothing of this size'}")
        return rows


@dataclass(frozen=True)
class Networks:
    """The networks of a run but the transformer: empty, on the meta device."""

    text: Any
    """A T5 encoder of transformers."""
    text_dtype: torch.dtype
    """In which it runs."""
    vae: Any
    """Its network is `model`."""
    vision_bytes: int | None = None
    """Weights of the image encoder; None: the model has none."""


class Footprint(ABC):
    """Counts what a run keeps in the memory of its device; networks are traced once."""

    text_remedy: str
    """What takes the text encoder off the device."""
    kv_remedy: str
    num_layers: int
    """Of the transformer."""

    def __init__(
        self,
        config: Any,
        work: Work,
        *,
        networks: Networks,
        dtype: torch.dtype,
        layout: Layout | None = None,
        overlaps: bool = False,
    ) -> None:
        """Count for one of the processes that divide a run.

        Args:
            work: of a process, see `plan.per_process`.
        """
        layout = layout or Layout()
        self.config, self.work, self.dtype, self.networks = config, work, dtype, networks
        self.ranks, self.overlaps = traced_ranks(layout), overlaps
        self.vae_bytes = weight_bytes(networks.vae.model)
        self.num_own = branches_per_process(layout, num_branches=work.num_caches)
        """Branches of this process."""

    @abstractmethod
    def stages(self, residence: Residence) -> list[Stage]:
        """Return the stages of the run, given what is kept on the host."""

    def text_stage(self, residence: Residence, *, scratch: int) -> Stage:
        """Return what encoding the prompts and a start image holds."""
        is_here, networks = not residence.text_on_host, self.networks
        numbers = sum(parameter.numel() for parameter in networks.text.parameters())
        size = numbers * networks.text_dtype.itemsize
        parts = [Part("the text encoder", size * is_here, self.text_remedy)]
        if networks.vision_bytes is not None:
            parts.append(Part("the image encoder", networks.vision_bytes, "use a smaller dtype"))
        parts.append(Part("text activations", scratch * is_here, self.text_remedy))
        return Stage("text", tuple(parts))

    def kv_part(self, residence: Residence) -> Part:
        """Return the keys and values; of those on the host, two layers are read at a time."""
        work = self.work
        if not residence.kv_on_host:
            return Part("the KV cache", work.kv_bytes + work.kv_read_bytes, self.kv_remedy)
        if work.kv_read_bytes:
            name = "what is read of the KV cache"
            return Part(name, work.kv_device_bytes + work.kv_read_bytes, self.kv_remedy)
        # the buffers stay from the first tick to the last
        name = f"{PREFETCHED_LAYERS} layers of the KV cache"
        return Part(name, PREFETCHED_LAYERS * self.layer_bytes, self.kv_remedy)

    @property
    def layer_bytes(self) -> int:
        """Return the keys and values of one layer and branch."""
        return self.work.kv_bytes // (self.num_layers * self.num_own)

    def scoring_part(self, residence: Residence) -> Part:
        """Return what compression adds: queries, scores, kept rows; those of the host are read."""
        size = 0
        if self.config.kv.compress != "none":
            halves = 2 if residence.kv_on_host else 1
            size = self.work.scoring_bytes + halves * self.layer_bytes // 2
        return Part("KV scoring", size, SCORING_REMEDY)

    def empty_caches(self, num_layers: int, *, num_tokens: int) -> list[KVCache]:
        """Return the caches of a pass whose keys are all its own, on the meta device."""
        shape = self.work.attention
        return caches_for(
            num_layers,
            capacity=num_tokens,
            num_heads=shape.kv_heads // self.ranks.sequence.size,
            head_width=shape.head_width,
            dtype=self.dtype,
            device=META,
        )


StagesOf = Callable[[Residence], Sequence[Stage]]
"""The stages of a run, given what is kept where."""


def make_memory_plan(
    stages_of: StagesOf, *, wanted: Residence, limit_bytes: int | None, has_host: bool
) -> MemoryPlan:
    """Find the fastest residence whose stages all fit.

    Args:
        wanted: what the settings ask to be on the host; it stays there in any case.
        limit_bytes: memory of the device that the run may use; None: nothing is moved.
        has_host: whether the device is another one than the host, so that moving helps.
    """
    plans = [
        MemoryPlan(residence, tuple(stages_of(residence)), limit_bytes)
        for residence in (_candidates(wanted) if has_host and limit_bytes else [wanted])
    ]
    if limit_bytes is None:
        return plans[0]
    usable = int(limit_bytes * (1 - RESERVED_SHARE))
    for plan in plans:
        if plan.peak_bytes <= usable:
            return plan
    stage = max(plans[-1].stages, key=lambda stage: stage.peak_bytes)
    part = stage.largest
    raise UserError(
        f"memory_limit is {_size(limit_bytes)}, of which {_size(usable)} can be planned, but "
        f"{stage.name} needs {_size(stage.peak_bytes)} with everything on the host that can be; "
        f"most of it, {_size(part.num_bytes)}, is {part.name}: {part.remedy}"
    )


def _candidates(wanted: Residence) -> list[Residence]:
    """List the residences that keep on the host what is wanted there, the fastest first."""
    made: list[Residence] = []
    for kv_on_host in (False, True):
        for dit_aside in (False, True):
            for text_on_host in (False, True):
                made.append(
                    Residence(
                        text_on_host=text_on_host or wanted.text_on_host,
                        dit_aside=dit_aside or wanted.dit_aside,
                        kv_on_host=kv_on_host or wanted.kv_on_host,
                    )
                )
    return list(dict.fromkeys(made))


def _size(num_bytes: int) -> str:
    return scaled(num_bytes, "B")


# On the host --------------------------------------------------------------------------------------


class HostWeights:
    """The weights of a network on the host, from which it comes back to its device.

    A run changes no weight, so that leaving the device copies nothing. Coming back is one copy,
    from pinned memory where the device is CUDA, which keeps the host waiting for nothing.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        """Copy the weights to the host; the network stays where it is.

        Args:
            device: where the network works; on the host itself nothing is copied, now or later.
        """
        self._device = device
        owners = [
            (module, name, parameter)
            for module in network.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        on_host = [parameter.data for *_, parameter in owners]
        if device.type != "cpu":
            on_host = _on_host(on_host, is_pinned=device.type == "cuda")
        self._held = [
            (module, name, nn.Parameter(copy, requires_grad=False))
            for (module, name, _), copy in zip(owners, on_host, strict=True)
        ]

    def leave(self) -> None:
        """Put the network on the host."""
        for module, name, parameter in self._held:
            setattr(module, name, parameter)

    def come(self) -> None:
        """Put the network on its device."""
        for module, name, parameter in self._held:
            moved = parameter.data.to(self._device, non_blocking=True)
            setattr(module, name, nn.Parameter(moved, requires_grad=False))


@contextmanager
def aside(weights: HostWeights | None) -> Generator[None, None, None]:
    """Keep a network off its device while the body runs; None: nothing is moved."""
    if weights is None:
        yield
        return
    weights.leave()
    try:
        yield
    finally:
        weights.come()


def _on_host(tensors: Sequence[Tensor], *, is_pinned: bool) -> list[Tensor]:
    """Return copies in the memory of the host, many in each block of it.

    Tensors that consist of several, as quantised ones, are copied as they are, not pinned.
    """
    copies: list[Tensor] = []
    block, used = torch.empty(0, dtype=torch.uint8), 0
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            copies.append(tensor.to("cpu"))
            continue
        if used + tensor.nbytes > len(block):
            size = max(BLOCK_BYTES, tensor.nbytes)
            block, used = torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned), 0
        view = block[used : used + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        copies.append(view.copy_(tensor))
        used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return copies
