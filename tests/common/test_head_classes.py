"""Classes of attention heads: what they look at, which class that is, what a class keeps."""

import math

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.compress import TokenLayout
from flowcache.errors import UserError
from flowcache.head_classes import DummyForcing, ForcingKV, frame_mass

pytestmark = pytest.mark.numeric

LAYOUT = TokenLayout(frame_tokens=6, chunk_tokens=18)
NOTHING = torch.empty(0, 1, 1)


def test_the_mass_of_frames_is_that_worked_by_hand():
    """Of 3 queries in frames of one token every one counts; logits 0 and log 3: 1/4 and 3/4."""
    keys = torch.tensor([0.0, math.log(3)]).view(2, 1, 1)
    queries = torch.ones(3, 1, 1)
    assert_close(frame_mass(queries, keys, frame_tokens=1), torch.tensor([[0.25, 0.75]]), ulps=4)
    two = torch.cat([keys, keys])  # the same in two frames of two tokens: each an eighth, and 3/8
    assert_close(frame_mass(queries, two, frame_tokens=2), torch.tensor([[0.5, 0.5]]), ulps=4)


def test_a_third_of_a_frames_queries_is_looked_at():
    """9 queries in frames of 9: three, evenly spaced, the first of each three."""
    queries = torch.tensor([0.0, 9, 9] * 3).view(9, 1, 1)
    keys = torch.linspace(0, 5, 18).view(18, 1, 1)
    found = frame_mass(queries, keys, frame_tokens=9)
    assert_close(found, torch.tensor([[0.5, 0.5]]), ulps=8)


def test_dummy_heads_are_those_worked_by_hand():
    first, between = torch.tensor([0.1, 0.6, 0.2, 0.1]), torch.tensor([0.1, 0.1, 0.1, 0.7])
    own = 1 - first - between
    mass = torch.stack([first, between, own], dim=-1)
    assert DummyForcing().sort(mass[None], own_frames=1).tolist() == [[0, 1, 0, 2]]
    # over two layers: the least costs are all in the second one
    layers = torch.stack([mass[[1, 3]], mass[[0, 2]]])
    assert DummyForcing().sort(layers, own_frames=1).tolist() == [[1, 2], [0, 0]]


def test_dummy_classes_keep_one_frame_or_one_chunk():
    def kept(kind: int) -> list[range]:
        return DummyForcing().kept(kind, NOTHING, num_keys=36, layout=LAYOUT)

    assert [kept(kind) for kind in range(3)] == [[range(30, 36)], [range(6)], [range(18, 36)]]
    assert [DummyForcing().frames(kind, chunk_frames=3) for kind in range(3)] == [1, 1, 3]


def test_static_heads_are_those_worked_by_hand():
    just = [0.5, 0.05, 0.05, 0.1, 0.1, 0.1, 0.1]
    below = [0.5, 0.06, 0.05, 0.1, 0.1, 0.1, 0.09]
    found = ForcingKV(threshold=0.79999).sort(torch.tensor([[just, below]]), own_frames=3)
    assert found.tolist() == [[0, 1]]


def patterned(*frames: list[list[float]]) -> Tensor:
    """Return keys of one head, [F * tokens, 1, D]."""
    return torch.tensor(frames).flatten(0, 1).unsqueeze(1)


def test_the_patch_that_changed_stays():
    a, b = [1.0, 0.0], [0.0, 1.0]
    strategy = ForcingKV(patches=2, retention=0.5)
    assert strategy.changed(patterned([a, b], [a, a]), frame_tokens=2) == [1]
    # the first patch changes from the second frame to the third
    assert strategy.changed(patterned([a, b], [a, b], [b, b]), frame_tokens=2) == [0, 2]


def test_dynamic_heads_keep_what_changed_before_the_newest_frame():
    """Six frames of two tokens; of the frames 2, 3 and 4 two of six patches, a third, stay."""
    a, b = [1.0, 0.0], [0.0, 1.0]
    keys = patterned([a, a], [a, a], [a, b], [b, b], [b, b], [b, a])
    strategy, layout = ForcingKV(patches=2), TokenLayout(2, 6)

    def kept(kind: int) -> list[range]:
        return strategy.kept(kind, keys[4:], num_keys=12, layout=layout)

    assert kept(0) == [range(2), range(10, 12)]
    assert kept(1) == [range(2), range(4, 5), range(9, 10), range(10, 12)]
    assert [strategy.frames(kind, chunk_frames=3) for kind in (0, 1)] == [2, 3]


def test_without_frames_between_first_and_newest_both_classes_are_alike():
    strategy, layout = ForcingKV(patches=2), TokenLayout(2, 2)
    keys = torch.ones(4, 1, 2)
    kept = [strategy.kept(kind, keys, num_keys=4, layout=layout) for kind in (0, 1)]
    assert kept == [[range(2), range(2, 4)]] * 2


def test_patches_that_do_not_divide_a_frame_are_refused():
    with pytest.raises(UserError, match="4 tokens, which 6 patches do not divide"):
        ForcingKV().changed(torch.ones(8, 1, 2), frame_tokens=4)
