"""Which passes a run makes, and over which tokens, as one walk through its ticks."""

import pytest

from flowcache.compress import Recent, TokenLayout
from flowcache.errors import UserError
from flowcache.runtime.model import SegmentWork
from flowcache.runtime.plan import check_compression, most_active, walk
from flowcache.schedule import staggered


def segment_of(num_chunks: int, *, given: int = 0, num_steps: int = 2, lag: int) -> SegmentWork:
    """Chunks of 10 tokens."""
    return SegmentWork(
        ticks=staggered(range(given, num_chunks), num_steps=num_steps, lag=lag),
        tokens=dict.fromkeys(range(num_chunks), 10),
        given=range(given),
        frames=[[0, 0]] * num_chunks,
        kv_tokens=10 * num_chunks,
        cut=None,
    )


def passes(segment: SegmentWork, **options: bool) -> list[list[tuple[int, int | None, int]]]:
    """Return chunk, own step and visible tokens of every pass, nothing compressed."""
    groups = walk(segment, limit=lambda _: None, **options)
    return [[(own.chunk, own.step, own.keys) for own in group] for group in groups]


def test_a_chunk_sees_clean_ones_and_active_ones_before_it():
    made = passes(segment_of(2, lag=1), clean_pass=False, settles_at_once=False)
    assert made == [[(0, 0, 10)], [(0, 1, 10), (1, 0, 20)], [(1, 1, 20)]]


def test_given_chunks_and_those_that_became_clean_are_fed_alone():
    made = passes(segment_of(3, given=1, lag=2), clean_pass=True, settles_at_once=True)
    assert made == [
        [(0, None, 10)],
        [(1, 0, 20)],
        [(1, 1, 20)],
        [(1, None, 20)],
        [(2, 0, 30)],
        [(2, 1, 30)],
    ]


@pytest.mark.parametrize(("settles_at_once", "keys"), [(True, [20, 20]), (False, [20, 30])])
def test_what_settles_at_once_may_be_dropped_within_a_tick(settles_at_once: bool, keys: list[int]):
    # two given chunks; in the second tick chunk 2 takes its last step, and chunk 3 its first one
    segment = segment_of(4, given=2, lag=1)
    groups = list(
        walk(
            segment,
            limit=lambda tick: None if tick is None else (20 if tick.index == 0 else 10),
            clean_pass=False,
            settles_at_once=settles_at_once,
        )
    )
    assert groups[2][0].keys == 30
    assert [own.keys for own in groups[3]] == keys


def test_a_strategy_that_cannot_keep_so_few_tokens_is_refused():
    segment = segment_of(4, num_steps=1, lag=1)
    layout = TokenLayout(frame_tokens=10, chunk_tokens=10)
    check_compression(Recent(), segment, layout=layout, limit=lambda _: 10)
    with pytest.raises(UserError):
        check_compression(Recent(), segment, layout=layout, limit=lambda _: -1)


def test_most_tokens_are_active_where_ticks_overlap_most():
    segment = segment_of(4, num_steps=4, lag=2)
    assert most_active(segment.ticks, segment.tokens) == 20
