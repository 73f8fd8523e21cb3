"""Timesteps, ticks and windows against the reference's tables."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.errors import UserError
from magi1.schedule import (
    Clip,
    Clock,
    interval_table,
    step_width,
    timestep_table,
    visible,
)

pytestmark = pytest.mark.numeric

PADDING = -1


def test_timesteps_and_intervals_are_the_reference_ones(golden: Callable[[str], Any]):
    want = golden("timesteps")
    for num_steps, mode in want.case["rows"]:
        key = f"{num_steps}.{mode.replace(',', '_')}"
        table = timestep_table(num_steps, shortcut_mode=mode)
        assert_close(table, want[f"t.{key}"], ulps=8)
        intervals = torch.tensor(interval_table(num_steps, shortcut_mode=mode))
        assert torch.equal(intervals, want[f"interval.{key}"])


@pytest.mark.parametrize("warp", ["identity", "square", "piecewise", "sd3_shift"])
def test_the_other_warps_are_the_reference_ones(warp: Any, golden: Callable[[str], Any]):
    want = golden("timesteps")
    shift = want.case["other"]["shift_of_sd3_shift"]
    table = timestep_table(16, warp=warp, shift=shift)
    assert_close(table, want[f"other.{warp}.16"], ulps=8)


SETTINGS = (
    *("t2v_4c", "t2v_5c_full_range", "t2v_3c", "t2v_window1", "t2v_window2_cleanauto"),
    *("t2v_12steps", "t2v_64steps", "i2v_4c"),
    *("v2v_8lat", "v2v_14lat_cleanauto", "v2v_12lat_full_range"),
)


def reference_setting(golden: Callable[[str], Any], name: str) -> tuple[Any, dict, Clock, Clip]:
    want = golden("schedule")
    (setting,) = [each for each in want.case["settings"] if each["name"] == name]
    clock = Clock(
        num_steps=setting["num_steps"],
        window=setting["window_size"],
        reaches=tuple(setting["noise2clean_kvrange"]),
        clean_reach=setting["clean_chunk_kvrange"],
        shortcut_mode=setting["shortcut_mode"],
        nearly_clean=setting["nearly_clean_threshold"],
    )
    num_prefix = setting["prefix_latents"]
    clip = Clip(setting["num_frames"], num_prefix, is_image=num_prefix == 1)
    return want.under(name), setting, clock, clip


def unpadded(values: Tensor) -> list:
    return [value for value in values.tolist() if value not in (PADDING, [PADDING, PADDING])]


@pytest.mark.parametrize("name", SETTINGS)
def test_every_tick_is_the_reference_one(name: str, golden: Callable[[str], Any]):
    want, setting, clock, clip = reference_setting(golden, name)
    assert (clip.num_chunks, clip.num_given) == (setting["chunk_num"], setting["chunk_offset"])
    assert clip.num_latents == setting["latent_frames"]
    ticks, table = clock.ticks(clip), clock.timesteps()
    assert len(ticks) == setting["total_steps"] == len(want["step_scalars"])
    size = setting["chunk_tokens"]
    for tick in ticks:
        row = want["step_scalars"][tick.index].tolist()
        oldest, newest = min(tick.steps), max(tick.steps)
        feeds_clean = oldest > clip.num_given and tick.index % clock.stage == 0
        first = oldest - feeds_clean
        assert row[:3] == [tick.index // clock.stage, tick.index % clock.stage, first]
        assert row[3:6] == [newest + 1, newest + 1 - first, int(feeds_clean)]
        assert row[6] == clock.is_nearly_clean(tick.steps[oldest])

        steps = list(tick.steps.values())
        assert unpadded(want["timestep_index"][tick.index]) == steps
        times = [setting["clean_t"]] * feeds_clean + table[steps].tolist()
        assert_close(unpadded(want["t"][tick.index]), times, ulps=8, size=1.0, dtype=torch.float32)

        seen = [visible(first, clock.reach_clean())] * feeds_clean
        seen += [visible(chunk, clock.reach(step)) for chunk, step in tick.steps.items()]
        bounds = [[chunks.start * size, chunks.stop * size] for chunks in seen]
        assert unpadded(want["kv_range"][tick.index]) == bounds


@pytest.mark.parametrize("name", SETTINGS)
def test_clean_chunks_are_shown_without_the_given_video(name: str, golden: Callable[[str], Any]):
    want, _, clock, clip = reference_setting(golden, name)
    shown = [
        [tick.index, chunk, chunk - clip.num_given, len(clip.shown(chunk))]
        for tick in clock.ticks(clip)
        for chunk in tick.finishing
    ]
    assert shown == want["emitted"].tolist()


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("v2v")])
def test_given_chunks_see_what_they_see_in_the_reference(name: str, golden: Callable[[str], Any]):
    want, setting, clock, clip = reference_setting(golden, name)
    size = setting["chunk_tokens"]
    seen = [visible(chunk, clock.reach_given()) for chunk in range(clip.num_given)]
    bounds = [[chunks.start * size, chunks.stop * size] for chunks in seen]
    assert bounds == want["prefix_kv_range"].tolist()


@pytest.mark.parametrize(
    ("reaches", "clean_reach", "want"),
    [
        # chunks 0 and 1 have no more before them; from chunk 2 on two are seen, itself included
        ((5, 4, 3, 2), 2, [(0, 24), (0, 48), (24, 72), (48, 96)]),
        ((5, 4, 3, 2), 1, [(0, 24), (24, 48), (48, 72), (72, 96)]),
        ((5, 4, 3), -1, [(0, 24), (0, 48), (0, 72), (24, 96)]),
        ((), 3, [(0, 24), (0, 48), (0, 72), (24, 96)]),
    ],
)
@pytest.mark.parametrize("window", [1, 4])
def test_a_given_chunk_sees_as_many_chunks_as_configured_itself_included(
    reaches: tuple[int, ...], clean_reach: int, want: list[tuple[int, int]], window: int
):
    clock = Clock(num_steps=60, window=window, reaches=reaches, clean_reach=clean_reach)
    seen = [visible(chunk, clock.reach_given()) for chunk in range(4)]
    assert [(chunks.start * 24, chunks.stop * 24) for chunks in seen] == want


def test_a_given_chunk_sees_eight_chunks_where_nothing_is_configured():
    reach = Clock(num_steps=8, window=4).reach_given()
    assert [visible(chunk, reach) for chunk in (6, 7, 8)] == [range(7), range(8), range(1, 9)]


def test_frames_come_in_whole_chunks():
    assert Clip(96).num_frames_out == 96
    assert Clip(97).num_frames_out == 96
    assert Clip(100).num_frames_out == 120
    assert Clip(96, num_prefix=1, is_image=True).num_frames_out == 120
    assert Clip(72, num_prefix=8).num_frames_out == 88
    with pytest.raises(
        UserError, match="num_frames must be at least 4, which make one latent frame, not 3"
    ):
        Clip(3)


def test_the_step_width_follows_the_step_count():
    widths = [step_width(num_steps, interval=1) for num_steps in (64, 16, 8, 12)]
    assert widths == [32, 8, 4, 8]
    assert step_width(12, interval=2) == 4


def test_the_step_width_of_twelve_steps_depends_on_the_tick():
    clock = Clock(num_steps=12, window=4, shortcut_mode="8,16,16")
    widths = [clock.step_width(tick) for tick in clock.ticks(Clip(24))]
    assert widths == [4.0, 8.0, 8.0] * 4


def test_given_latents_of_a_chunk_are_counted():
    clip = Clip(72, num_prefix=8)
    assert [clip.num_fixed(chunk) for chunk in range(3)] == [6, 2, 0]
    assert clip.shown(1) == range(8, 12)


def test_a_given_image_is_shown_but_never_a_given_latent_of_a_video():
    assert Clip(96, num_prefix=1, is_image=True).shown(0) == range(6)
    video = Clip(96, num_prefix=1)
    assert video.shown(0) == range(1, 6)
    assert video.num_frames_out == 116
