"""How much memory a run needs, stage by stage, and what must leave the GPU so that it fits.

A stage is a time in which the same large things are in memory: encoding the text, denoising,
decoding. Its parts are counted by arithmetic from the settings; the scratch memory of a network is
counted by running it on the meta device, where tensors have shapes but no values.
"""

import copy
import math
import weakref
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowcache.errors import UserError
from flowcache.kv import PREFETCHED_LAYERS, KVCache, caches_for
from flowcache.pinned import PINNED_BYTES, packed_pinned_bytes, piece_for
from flowcache.runtime.config import QuantizeName
from flowcache.runtime.model import Residence, Work
from flowcache.runtime.offload import NUM_SLOTS, slots_bytes, streamed_places
from flowcache.runtime.parallel import Group, Layout, Ranks, branches_per_process
from flowcache.runtime.quantize import quantize_empty, saved_bytes
from flowcache.runtime.stats import scaled

RESERVED_SHARE = 0.05
"""Of the limit: holes between tensors, scratch memory inside kernels, the CUDA context."""
LIMIT_STEP = 10**8
"""Bytes to which the smallest limit that fits is rounded up, or else to two digits."""
PIXEL_BYTES = 3 * 4
"""Of an RGB pixel in float32."""
META = torch.device("meta")
SCORING_REMEDY = "set kv.queries=frame"

PCIE_RATE = 25e9
"""Bytes per second from pinned memory of the host to a GPU, or back; assumed.

Source: PCIe 4.0 x16 carries 31.5 GB/s in each direction, of which copies reach about 80 %."""
MATMUL_RATE = 1e14
"""FLOPs per second of a transformer on a card with 12 to 24 GB; assumed.

Source: 165 TFLOP/s in bfloat16 of a GeForce RTX 4090 (NVIDIA, Ada whitepaper), of which about 60 %
is reached."""
VAE_RATE = 4e13
"""The same of a VAE, whose products are in TF32: half as fast, and with more work in between."""
HOST_RATE = 5e11
"""The same of the host, on which a text encoder may run: 16 cores; assumed."""


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


def text_scratch_bytes(
    encoder: Any,
    *,
    batch: int,
    num_tokens: int,
    dtype: torch.dtype,
    mode: QuantizeName | None = None,
) -> int:
    """Return what encoding prompts holds in addition to the weights: one layer is as all.

    Args:
        mode: of 8-bit weights.
    """
    ids = torch.empty(batch, num_tokens, dtype=torch.int64, device=META)
    model = one_layer(encoder).to(dtype)
    if mode is not None:
        quantize_empty(model, model.encoder.block, mode)
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
class Cost:
    """What a run takes by arithmetic if every step is computed: assumed rates, nothing measured."""

    seconds: float = 0.0
    """Of denoising and decoding with everything on the device."""
    added_seconds: float = 0.0
    """Because something is not."""
    host_bytes: int = 0
    """Of the host's memory: pinned weights, keys and values, states of the VAE; text encoder."""


@dataclass(frozen=True)
class MemoryPlan:
    """What is kept where, and what each stage then takes of the device's memory."""

    residence: Residence
    stages: tuple[Stage, ...]
    limit_bytes: int | None
    """None: nothing is known of how much there is."""
    cost: "Cost"

    @property
    def peak_bytes(self) -> int:
        """Return what the largest stage takes."""
        return max(stage.peak_bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return {
            "limit_bytes": self.limit_bytes,
            "planned_peak_bytes": self.peak_bytes,
            "planned_host_bytes": self.cost.host_bytes,
            "planned_seconds": self.cost.seconds,
            "planned_added_seconds": self.cost.added_seconds,
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
        return [*rows, *self._cost_lines()]

    def _cost_lines(self) -> list[str]:
        """Say what it costs that something is not on the device."""
        cost, rows = self.cost, list[str]()
        amounts = (self.residence.blocks_on_device, self.residence.vae_strips)
        is_chosen = self.limit_bytes is not None or amounts != (None, None)
        if not (is_chosen and self.residence.moved):
            return rows
        rows.append(
            f"  host       {_size(cost.host_bytes)} pinned, or of the text encoder, in each process"
        )
        rows.append(
            f"  seconds    about {cost.seconds + cost.added_seconds:,.0f} of denoising and "
            f"decoding, {cost.added_seconds:,.0f} more than with all on the device: arithmetic for "
            f"{MATMUL_RATE / 1e12:.0f} TFLOP/s and {PCIE_RATE / 1e9:.0f} GB/s, every step computed"
        )
        if self.residence.rounds_otherwise:
            what = " and ".join(self.residence.rounds_otherwise)
            rows.append(f"  rounding   sums of the {what} are made in another order")
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
    strip_choices: Sequence[int | None] = (None,)
    """In how many strips pictures may be decoded, see `Residence`."""

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

    @abstractmethod
    def decode_flops(self, residence: Residence) -> float:
        """Return the FLOPs of decoding the video."""

    @abstractmethod
    def text_flops(self) -> float:
        """Return the FLOPs of encoding the prompts."""

    def strip_state_bytes(self, residence: Residence) -> tuple[int, int]:
        """Return what of the VAE's memory of strips is on the host, and what is copied in all."""
        return 0, 0

    @property
    def block_bytes(self) -> Sequence[int]:
        """Return the weights of each block of the transformer."""
        return self.work.block_bytes

    def dit_part(self, residence: Residence, *, is_at_work: bool = False) -> Part:
        """Return what of the transformer is on the device, at work or while the VAE is."""
        work, streamed = self.work, self.streamed_bytes(residence)
        size = 0 if residence.dit_aside and not is_at_work else work.weight_bytes - sum(streamed)
        remedy = "use a smaller model, or dtype=bfloat16"
        return Part("the transformer", size + slots_bytes(streamed), remedy)

    def streamed_bytes(self, residence: Residence) -> list[int]:
        """Return the weights of each block that streams."""
        if residence.blocks_on_device is None:
            return []
        sizes, num_resident = self.work.block_bytes, residence.blocks_on_device
        return [sizes[at] for at in streamed_places(len(sizes), num_resident=num_resident)]

    def cost(self, residence: Residence) -> Cost:
        """Return what a run takes of time and of the host's memory."""
        work, streamed = self.work, sum(self.streamed_bytes(residence))
        share = self.num_own / work.num_caches
        computing = work.flops * share / self.ranks.layout.sequence / MATMUL_RATE
        copied = work.num_passes * share * streamed
        if residence.kv_on_host:
            copied += work.read_tokens * share * self._token_bytes
        added = max(0.0, copied / PCIE_RATE - computing)  # what does not hide behind products
        decoding = self.decode_flops(replace(residence, vae_strips=None)) / VAE_RATE
        added += self.decode_flops(residence) / VAE_RATE - decoding
        state_bytes, state_copies = self.strip_state_bytes(residence)
        added += state_copies / PCIE_RATE
        if residence.dit_aside:
            finishing = sum(bool(tick.finishing) for part in work.segments for tick in part.ticks)
            added += finishing * (work.weight_bytes - streamed) / PCIE_RATE
            added += decoding * self.overlaps  # no more concurrently with denoising
        if residence.text_on_host:
            added += self.text_flops() / HOST_RATE
        return Cost(
            computing + decoding * (not self.overlaps), added, state_bytes + self._host(residence)
        )

    def _host(self, residence: Residence) -> int:
        """Return what of weights, keys and values is on the host."""
        size = packed_pinned_bytes(self.streamed_bytes(residence))
        if residence.dit_aside:
            blocks = self.work.block_bytes
            size = packed_pinned_bytes([*blocks, self.work.weight_bytes - sum(blocks)])
        if residence.text_on_host:
            size += self._text_bytes
        if residence.kv_on_host:
            size += self.num_own * self._pinned_kv_bytes
        return size

    @property
    def _pinned_kv_bytes(self) -> int:
        """Return what the caches of a branch take of the host's memory."""
        piece = piece_for(self.layer_bytes) if not self.work.kv_read_bytes else PINNED_BYTES
        return packed_pinned_bytes([self.layer_bytes] * self.num_layers, piece_bytes=piece)

    @property
    def _token_bytes(self) -> float:
        """Return the keys and values of a token in all layers of a branch."""
        kv_tokens = max(part.kv_tokens for part in self.work.segments)
        return self.work.kv_bytes / (max(kv_tokens, 1) * self.num_own)

    @property
    def text_numbers(self) -> int:
        """Return the parameters of the text encoder."""
        return sum(parameter.numel() for parameter in self.networks.text.parameters())

    @property
    def _text_bytes(self) -> int:
        dtype, blocks = self.networks.text_dtype, self.networks.text.encoder.block
        saved = saved_bytes(blocks, self.config.text_quantize, dtype=dtype)
        return self.text_numbers * dtype.itemsize - saved

    def text_stage(self, residence: Residence, *, scratch: int) -> Stage:
        """Return what encoding the prompts and a start image holds."""
        is_here, networks = not residence.text_on_host, self.networks
        parts = [Part("the text encoder", self._text_bytes * is_here, self.text_remedy)]
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


class Planned(Protocol):
    """What a memory plan is made from; see `Footprint`."""

    strip_choices: Sequence[int | None]

    @property
    def block_bytes(self) -> Sequence[int]:
        """Return the weights of each block of the transformer."""
        ...

    def stages(self, residence: Residence, /) -> Sequence[Stage]:
        """Return the stages of the run, given what is kept where."""
        ...

    def cost(self, residence: Residence, /) -> Cost:
        """Return what a run takes of time and of the host's memory."""
        ...


def make_memory_plan(
    needs: Planned, *, wanted: Residence, limit_bytes: int | None, has_host: bool
) -> MemoryPlan:
    """Find the fastest residence whose stages all fit, by arithmetic.

    Of blocks as many stay on the device as fit. What changes numbers beyond rounding (8-bit weights
    or keys, a VAE in 16 bits) is never chosen here: that is up to the settings.

    Args:
        wanted: what the settings ask to be on the host, and in which amounts; it stays so.
        limit_bytes: memory of the device that the run may use; None: nothing is moved.
        has_host: whether the device is another one than the host, so that moving helps.
    """

    def plan(residence: Residence) -> MemoryPlan:
        stages = tuple(needs.stages(residence))
        return MemoryPlan(residence, stages, limit_bytes, needs.cost(residence))

    if limit_bytes is None:
        return plan(wanted)
    usable, smallest = int(limit_bytes * (1 - RESERVED_SHARE)), list[MemoryPlan]()
    fitting: list[MemoryPlan] = []
    for choice in _choices(wanted, needs.strip_choices) if has_host else [wanted]:
        if fitting and not fitting[0].cost.added_seconds:
            break  # the first that fits with nothing lost: others move more
        amounts = [choice.blocks_on_device]
        if has_host and wanted.blocks_on_device is None:
            # fewer than two that stream would take as much in the slots
            amounts += reversed(range(max(0, len(needs.block_bytes) - NUM_SLOTS)))
        found = _first_that_fits(
            [replace(choice, blocks_on_device=amount) for amount in amounts], plan, usable
        )
        (fitting if found.peak_bytes <= usable else smallest).append(found)
    if fitting:
        return min(fitting, key=lambda made: made.cost.added_seconds)
    raise _no_plan(
        min(reversed(smallest), key=lambda made: made.peak_bytes),
        wanted=wanted,
        usable=usable,
        has_host=has_host,
    )


def _first_that_fits(
    residences: Sequence[Residence], plan: Callable[[Residence], MemoryPlan], usable: int
) -> MemoryPlan:
    """Return the plan of the first residence that fits, or else of the last.

    Args:
        residences: each takes less than the one before it.
    """
    place = bisect_left(residences, True, key=lambda each: plan(each).peak_bytes <= usable)
    return plan(residences[min(place, len(residences) - 1)])


def _choices(wanted: Residence, strips: Sequence[int | None]) -> Iterator[Residence]:
    """Yield the residences that keep on the host what is wanted there, those that move less first.

    The number of blocks is the wanted one.
    """
    made: list[Residence] = []
    for num_strips in strips if wanted.vae_strips is None else (wanted.vae_strips,):
        for kv_on_host, dit_aside, text_on_host in product((False, True), repeat=3):
            made.append(
                replace(
                    wanted,
                    text_on_host=text_on_host or wanted.text_on_host,
                    dit_aside=dit_aside or wanted.dit_aside,
                    kv_on_host=kv_on_host or wanted.kv_on_host,
                    vae_strips=num_strips,
                )
            )
    yield from dict.fromkeys(made)


def _no_plan(least: MemoryPlan, *, wanted: Residence, usable: int, has_host: bool) -> UserError:
    """Say why nothing fits, and what would."""
    stage = max(least.stages, key=lambda stage: stage.peak_bytes)
    part = stage.largest
    amounts = {"blocks_on_device": wanted.blocks_on_device, "vae_strips": wanted.vae_strips}
    given = [f"{name}={value}" for name, value in amounts.items() if value is not None]
    fixed = f" by {', '.join(given)} (leave that out to have it chosen)" if given else ""
    tried = "with everything on the host that can be" if has_host else "as it is set"
    needed = math.ceil(least.peak_bytes / (1 - RESERVED_SHARE))
    step = min(LIMIT_STEP, 10 ** max(len(str(needed)) - 2, 0))
    needed = math.ceil(needed / step) * step
    return UserError(
        f"memory_limit is {_size(least.limit_bytes or 0)}, of which {_size(usable)} can be "
        f"planned, but {stage.name} needs {_size(stage.peak_bytes)} {tried}"
        f"{fixed}: the smallest limit that fits is {_size(needed)}; most of it, "
        f"{_size(part.num_bytes)}, is {part.name}: {part.remedy}"
    )


def _size(num_bytes: int) -> str:
    return scaled(num_bytes, "B")
