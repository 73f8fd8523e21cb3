"""Weights that lie in the memory of the host: networks that leave their device, blocks that stream.

A run changes no weight. So what is on the host stays there, leaving the device copies nothing, and
coming back is a copy from pinned memory, for which the host does not wait.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from flowcache.pinned import Packer, aligned, host_memory

NUM_SLOTS = 2
"""Blocks whose weights are on the device while blocks stream: the one at work, and the next."""

Block = TypeVar("Block", bound=nn.Module)


class Held(NamedTuple):
    """A parameter of a network, with the place where it is set."""

    module: nn.Module
    name: str
    value: nn.Parameter

    def set(self) -> None:
        """Give the network this parameter."""
        setattr(self.module, self.name, self.value)


def parameters_of(network: nn.Module) -> list[Held]:
    """List all parameters, each where it is set."""
    return [
        Held(module, name, parameter)
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def modules_of(networks: Iterable[nn.Module]) -> set[int]:
    """Return the identities of all modules of some networks."""
    return {id(module) for network in networks for module in network.modules()}


# Copies ------------------------------------------------------------------------------------------


def host_packer(tensors: Iterable[Tensor], *, is_pinned: bool) -> Packer:
    """Return what lays such tensors into the memory of the host."""

    return Packer(host_memory(is_pinned=is_pinned), total_bytes=packed_bytes(tensors))


def packed_bytes(tensors: Iterable[Tensor]) -> int:
    """Return what tensors take next to each other."""
    return sum(aligned(plain.nbytes) for tensor in tensors for plain in plain_tensors(tensor))


def copied(tensor: Tensor, packer: Packer) -> Tensor:
    """Return a copy in the memory of a packer."""
    return _mapped(tensor, lambda plain: packer.like(plain).copy_(plain))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a quantised one consists of, or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))


def _mapped(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a tensor with something else in place of each of the tensors it consists of."""
    if not is_traceable_wrapper_subclass(tensor):
        return change(tensor)
    names, context = tensor.__tensor_flatten__()
    inner = {name: _mapped(getattr(tensor, name), change) for name in names}
    return type(tensor).__tensor_unflatten__(inner, context, tensor.shape, tensor.stride())


# Blocks that stream -------------------------------------------------------------------------------


def streamed_places(num_blocks: int, *, num_resident: int) -> list[int]:
    """Return which blocks stream, as evenly spread as can be: each is copied while others compute.

    Example: of 6 blocks 3 stay, the first, third and fifth: 1, 3 and 5 stream.
    """
    num_streamed = num_blocks - num_resident
    return [
        place
        for place in range(num_blocks)
        if (place + 1) * num_streamed // num_blocks > place * num_streamed // num_blocks
    ]


def slots_bytes(streamed: Collection[int]) -> int:
    """Return what the slots on the device take.

    Args:
        streamed: bytes of each block that streams.
    """
    return NUM_SLOTS * max(streamed, default=0)


class BlockStream:
    """Brings the weights of blocks to the device, the next ones while one computes.

    Two slots on the device take turns. On CUDA copies have a stream of their own: a copy waits for
    all that was queued before, the block that last worked in its slot included, and a block waits
    for its copy. Elsewhere a copy is done when it is begun.

    Example: blocks 1, 3 and 5 of 6 stream. Before block 1 works its copy is waited for, and that of
    3 begins, which goes on while 1 and 2 work. Before block 5 works that of 1 begins, for the next
    pass.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device, *, num_resident: int
    ) -> None:
        """Take the weights of all but some blocks, which may be anywhere, to the host.

        Args:
            blocks: all of a network, in the order in which they are run.
            device: where they work.
        """
        self._device = device
        places = streamed_places(len(blocks), num_resident=num_resident)
        self.streamed = [blocks[place] for place in places]
        self._number = {id(block): number for number, block in enumerate(self.streamed)}
        self._held = _held_on_host(self.streamed, is_pinned=device.type == "cuda")
        sizes = [packed_bytes(own.value.data for own in held) for held in self._held]
        size = max(sizes, default=0)
        self._slots = [
            torch.empty(size, dtype=torch.uint8, device=device) for _ in range(NUM_SLOTS)
        ]
        self._in_slot: list[int | None] = [None] * NUM_SLOTS
        self._turn = 0
        self._begun: int | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield blocks, each with its weights on the device until the next but one is taken."""
        for block in blocks:
            number = self._number.get(id(block))
            if number is not None:
                self._take(number)
            yield block

    def _take(self, number: int) -> None:
        """Give a block its weights, and begin to copy those of the next one that streams."""
        if self._begun != number:
            self._begin(number)
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        self._begin((number + 1) % len(self.streamed))

    def _begin(self, number: int) -> None:
        """Begin to copy a block to the slot that was at work longest ago, unless it is in one."""
        self._begun = number
        if number in self._in_slot:
            return
        slot, self._turn = self._turn, (self._turn + 1) % NUM_SLOTS
        left = self._in_slot[slot]
        if left is not None:
            for own in self._held[left]:
                own.set()
        self._in_slot[slot] = number
        packer = Packer(lambda _: self._slots[slot], total_bytes=0)
        with self._in_stream():
            for module, name, value in self._held[number]:
                placed = _mapped(
                    value.data,
                    lambda plain: packer.like(plain).copy_(plain, non_blocking=True),
                )
                Held(module, name, nn.Parameter(placed, requires_grad=False)).set()

    def _in_stream(self) -> AbstractContextManager[object]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._stream)


def _held_on_host(blocks: Iterable[nn.Module], *, is_pinned: bool) -> list[list[Held]]:
    """Put the weights of blocks on the host, one after the other, and list those of each."""
    held = [parameters_of(block) for block in blocks]
    weights = [own.value.data for block in held for own in block]
    if not is_pinned and all(weight.device.type == "cpu" for weight in weights):
        return held
    packer = host_packer(weights, is_pinned=is_pinned)
    del weights  # else none would be gone before all are copied
    for block in held:
        for place, (module, name, value) in enumerate(block):
            copy = nn.Parameter(copied(value.data, packer), requires_grad=False)
            block[place] = Held(module, name, copy)
            block[place].set()
    return held


def in_turn(blocks: Iterable[Block], stream: BlockStream | None) -> Iterable[Block]:
    """Return blocks to be run one after the other, with their weights on the device."""
    return blocks if stream is None else stream(blocks)


def stream_blocks(
    network: nn.Module, blocks: Sequence[nn.Module], device: torch.device, *, num_resident: int
) -> BlockStream:
    """Put a network on a device but for the blocks that stream, and return what streams these."""
    stream = BlockStream(blocks, device, num_resident=num_resident)
    away = modules_of(stream.streamed)
    for module, name, parameter in parameters_of(network):
        if id(module) not in away:
            moved = parameter.data.to(device)
            Held(module, name, nn.Parameter(moved, requires_grad=False)).set()
    return stream


# Networks that leave ------------------------------------------------------------------------------


class HostWeights:
    """The weights of a network on the host, from which it comes back to its device."""

    def __init__(
        self, network: nn.Module, device: torch.device, *, stream: BlockStream | None = None
    ) -> None:
        """Copy the weights to the host; the network stays where it is.

        Args:
            device: where the network works; on the host itself nothing is copied, now or later.
            stream: has weights of the network on the host, which stay with it.
        """
        self._device = device
        away = set[int]() if stream is None else modules_of(stream.streamed)
        owners = [own for own in parameters_of(network) if id(own.module) not in away]
        if device.type != "cpu":
            weights = [own.value.data for own in owners]
            packer = host_packer(weights, is_pinned=device.type == "cuda")
            owners = [
                Held(
                    module,
                    name,
                    nn.Parameter(copied(parameter.data, packer), requires_grad=False),
                )
                for module, name, parameter in owners
            ]
        self._held = owners

    def leave(self) -> None:
        """Put the network on the host."""
        for own in self._held:
            own.set()

    def come(self) -> None:
        """Put the network on its device."""
        for module, name, parameter in self._held:
            moved = parameter.data.to(self._device, non_blocking=True)
            Held(module, name, nn.Parameter(moved, requires_grad=False)).set()


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
