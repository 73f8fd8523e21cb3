"""Weights on the host: networks that leave, blocks that stream."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from flowcache.pinned import Packer, packed_pinned_bytes, piece_for, pinned_bytes
from flowcache.runtime.offload import (
    BlockStream,
    HostWeights,
    aside,
    in_turn,
    packed_bytes,
    stream_blocks,
    streamed_places,
)

CPU = torch.device("cpu")
ELSEWHERE = torch.device("meta")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Sequential(nn.Linear(7, 3).to(torch.bfloat16)))


# Networks that leave ------------------------------------------------------------------------------


def test_a_network_off_its_device_has_the_weights_it_had(monkeypatch: pytest.MonkeyPatch):
    # some weights share a piece, one has its own
    monkeypatch.setattr(Packer.__init__, "__kwdefaults__", {"piece_bytes": 100})
    made = network()
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    weights = HostWeights(made, ELSEWHERE)
    weights.come()
    assert {p.device for p in made.parameters()} == {ELSEWHERE}
    weights.leave()
    after = dict(made.named_parameters())
    assert list(after) == list(before)
    for name, parameter in after.items():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])


def test_leaving_copies_nothing():
    made = network()
    weights = HostWeights(made, ELSEWHERE)
    weights.leave()
    places = [p.data_ptr() for p in made.parameters()]
    weights.come()
    weights.leave()
    assert [p.data_ptr() for p in made.parameters()] == places


def test_on_the_host_itself_nothing_is_copied():
    made = network()
    places = [p.data_ptr() for p in made.parameters()]
    weights = HostWeights(made, CPU)
    weights.leave()
    weights.come()
    assert [p.data_ptr() for p in made.parameters()] == places


def test_a_network_is_back_after_an_error():
    made = network()
    weights = HostWeights(made, ELSEWHERE)
    weights.come()
    with pytest.raises(ZeroDivisionError), aside(weights):
        assert made[0].weight.device.type == "cpu"
        _ = 1 / 0
    assert made[0].weight.device == ELSEWHERE


# In pieces ----------------------------------------------------------------------------------------


def test_tensors_lie_in_pieces_as_in_the_example():
    asked: list[int] = []

    def new(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    given = [torch.full((size,), size, dtype=torch.uint8) for size in (60, 30, 50)]
    packer = Packer(new, total_bytes=packed_bytes(given), piece_bytes=100)
    made = [packer.like(x).copy_(x) for x in given]
    assert asked == [100, 64]
    assert made[1].data_ptr() - made[0].data_ptr() == 64
    assert all(torch.equal(*pair) for pair in zip(made, given, strict=True))


def test_a_large_tensor_has_a_piece_of_its_own():
    asked: list[int] = []

    def new(num_bytes: int) -> Tensor:
        asked.append(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8)

    packer = Packer(new, total_bytes=1000, piece_bytes=100)
    made = packer.like(torch.zeros(50, 3, dtype=torch.bfloat16))
    assert asked == [300]
    assert (made.shape, made.dtype) == ((50, 3), torch.bfloat16)


def test_what_is_pinned_takes_a_power_of_two():
    assert [pinned_bytes(n) for n in (1, 2, 3, 4096, 4097)] == [1, 2, 4, 4096, 8192]


def test_pieces_for_one_size_lose_little():
    size = 564_019_200  # keys and values of a layer, 91,800 tokens of 1.3B
    assert (piece_for(size), 2**32 // size) == (2**32, 7)
    apart = 30 * pinned_bytes(size)
    packed = packed_pinned_bytes([size] * 30, piece_bytes=piece_for(size))
    assert packed == 4 * 2**32 + 2**31  # 28 in four pieces, and two
    assert 30 * size < packed < 1.15 * 30 * size < 0.65 * apart


# Blocks that stream -------------------------------------------------------------------------------


class Block(nn.Module):
    """A block of a width of its own, as the first and last of 8-bit models."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, inner), nn.Linear(inner, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu().double()).float()


def made_of(num_blocks: int) -> nn.ModuleList:
    torch.manual_seed(0)
    blocks = nn.ModuleList(Block(3 + place % 3) for place in range(num_blocks))
    return blocks.requires_grad_(False)


def run(blocks: nn.ModuleList, stream: BlockStream | None, x: Tensor) -> Tensor:
    for block in in_turn(blocks, stream):
        x = block(x)
    return x


def test_those_that_stream_are_spread():
    assert streamed_places(6, num_resident=3) == [1, 3, 5]
    assert streamed_places(5, num_resident=0) == [0, 1, 2, 3, 4]
    assert streamed_places(5, num_resident=5) == []
    assert len(streamed_places(40, num_resident=17)) == 23


@pytest.mark.parametrize("num_resident", [0, 1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("num_blocks", [5, 6])
def test_streamed_blocks_compute_what_resident_ones_do(num_blocks: int, num_resident: int):
    if num_resident > num_blocks:
        pytest.skip("more than there are")
    blocks, x = made_of(num_blocks), torch.randn(4, 6)
    streaming = copy.deepcopy(blocks)
    stream = stream_blocks(streaming, list(streaming), CPU, num_resident=num_resident)
    assert len(stream.streamed) == num_blocks - num_resident
    for _ in range(3):
        wanted = run(blocks, None, x)
        x_streamed = run(streaming, stream, x)
        assert torch.equal(x_streamed, wanted)
        x = wanted


def test_an_odd_order_and_an_abandoned_pass_do_no_harm():
    blocks, x = made_of(6), torch.randn(4, 6)
    streaming = copy.deepcopy(blocks)
    stream = stream_blocks(streaming, list(streaming), CPU, num_resident=1)
    order = [3, 0, 5, 5, 2, 1]
    for place in order:
        (block,) = in_turn([streaming[place]], stream)
        assert torch.equal(block(x), blocks[place](x))
    passing: Iterator[nn.Module] = iter(in_turn(streaming, stream))
    next(passing)
    assert torch.equal(run(streaming, stream, x), run(blocks, None, x))


def test_only_two_blocks_are_off_the_host_at_a_time():
    blocks = made_of(6)
    own = [block.up.weight.data_ptr() for block in blocks]
    stream = stream_blocks(blocks, list(blocks), CPU, num_resident=0)
    for _ in range(2):
        for _ in in_turn(blocks, stream):
            away = [b.up.weight.data_ptr() != at for b, at in zip(blocks, own, strict=True)]
            assert sum(away) == 2


def test_blocks_that_stream_are_not_where_the_others_are():
    blocks, others = made_of(4), made_of(4)
    stream_blocks(blocks, list(blocks), ELSEWHERE, num_resident=2)
    stream = BlockStream(list(others), CPU, num_resident=2)
    HostWeights(others, ELSEWHERE, stream=stream).come()  # those that leave and come are others
    for each in (blocks, others):
        places = [block.up.weight.device for block in each]
        assert places == [ELSEWHERE, CPU, ELSEWHERE, CPU]


def test_the_slots_take_two_of_the_largest_block():
    blocks = made_of(6)
    stream = BlockStream(list(blocks), CPU, num_resident=0)
    largest = max(packed_bytes(block.parameters()) for block in blocks)
    assert [len(slot) for slot in stream._slots] == [largest, largest]
