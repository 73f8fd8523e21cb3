"""Memory of the host from which a GPU copies, in large pieces.

PyTorch rounds what it pins up to a power of two: 564 MB take 1,074 MB. Many tensors in one piece
lose little of it.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

PINNED_BYTES = 2**30
"""That are asked for at once."""
MAX_WASTE = 1 / 8
"""Of a piece that holds tensors of one size: a smaller piece would leave more unused."""
ALIGNMENT = 64
"""Bytes at whose multiples a tensor starts in a piece."""


class Packer:
    """Lays tensors next to each other in large pieces of memory.

    Example: of pieces of 100 bytes, tensors of 60, 30 and 50 bytes take two: 60 and 30 (which
    starts at 64), and 50 in a piece of what is left.
    """

    def __init__(
        self,
        new: Callable[[int], Tensor],
        *,
        total_bytes: int | None,
        piece_bytes: int = PINNED_BYTES,
    ) -> None:
        """Begin without memory.

        Args:
            new: returns so many bytes, uint8.
            total_bytes: of all tensors, each `aligned`; None: not known.
            piece_bytes: that are asked for at once, at most; a larger tensor has its own piece.
        """
        self._new, self._left, self._piece_bytes = new, total_bytes, piece_bytes
        self._piece, self._used = torch.empty(0, dtype=torch.uint8), 0

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the same shape and type in the memory; its values are not set.

        The given one may be on the meta device.
        """
        if self._used + tensor.nbytes > len(self._piece):
            left = self._piece_bytes if self._left is None else self._left
            size = max(min(self._piece_bytes, left), tensor.nbytes)
            self._piece, self._used = self._new(size), 0
        own = self._piece[self._used : self._used + tensor.nbytes]
        self._used += aligned(tensor.nbytes)
        if self._left is not None:
            self._left -= aligned(tensor.nbytes)
        return own.view(tensor.dtype).view(tensor.shape)


def aligned(num_bytes: int) -> int:
    """Return how many bytes a tensor takes in a piece of memory."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def pinned_bytes(num_bytes: int) -> int:
    """Return what PyTorch takes of the host's memory to pin so many bytes: a power of two."""
    return 1 << max(num_bytes - 1, 0).bit_length()


def host_memory(*, is_pinned: bool) -> Callable[[int], Tensor]:
    """Return what gives memory of the host to a `Packer`."""

    def new(num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_pinned)

    return new


def piece_for(num_bytes: int) -> int:
    """Return the size of pieces for tensors of one size: powers of two, of which little is lost.

    Example: of 2**30 bytes a tensor of 564 MB leaves 510 MB, of 2**32 seven leave 347 MB.
    """
    piece = PINNED_BYTES
    while piece < aligned(num_bytes) or piece % aligned(num_bytes) > MAX_WASTE * piece:
        piece *= 2
    return piece


def packed_pinned_bytes(sizes: Iterable[int], *, piece_bytes: int = PINNED_BYTES) -> int:
    """Return what PyTorch takes of the host's memory to pin tensors of some bytes in pieces."""
    sizes, asked = list(sizes), list[int]()

    def new(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    packer = Packer(new, total_bytes=sum(map(aligned, sizes)), piece_bytes=piece_bytes)
    for size in sizes:
        packer.like(torch.empty(size, dtype=torch.uint8, device="meta"))
    return sum(map(pinned_bytes, asked))
