"""Runs of several segments that are decoded and written while the next one is denoised."""

from collections.abc import Callable
from typing import Any

import pytest

from flowcache.runtime.stats import Period

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]

LONG = ("num_frames=41", "base_num_frames=25", "overlap_history=9", "attention=causal")
"""Two segments, the second of which begins with decoded frames of the first."""


def test_decoding_segments_while_denoising_gives_the_same_video(make: Make):
    plain = make(*LONG, "overlap=false")
    overlapped = make(*LONG, "overlap=true")
    assert plain.path.read_bytes() == overlapped.path.read_bytes()
    stages = overlapped.report["stats"]["stages"]
    assert 0 < stages["vae"]["overlapped_seconds"] < stages["vae"]["seconds"]  # encoding waits
    assert stages["write"]["overlapped_seconds"] == stages["write"]["seconds"]
    assert stages["vae"]["within"] is None
    assert "overlapped_seconds" not in plain.report["stats"]["stages"]["vae"]
    assert overlapped.report["first_frames_seconds"] > 0


def test_the_time_line_shows_the_decoder_at_work_while_the_denoising_goes_on(make: Make):
    def overlapping(report: dict[str, Any]) -> int:
        rows = [Period(*row) for row in report["stats"]["timeline"]]
        return sum(
            vae.start_seconds < dit.stop_seconds and dit.start_seconds < vae.stop_seconds
            for vae in rows
            for dit in rows
            if (vae.stage, vae.is_concurrent, dit.stage, dit.is_concurrent)
            == ("vae", True, "dit", False)
        )

    overlapped = make(*LONG, "overlap=true").report
    assert overlapping(overlapped) > 0
    assert overlapping(make(*LONG, "overlap=false").report) == 0
    rows = [Period(*row) for row in overlapped["stats"]["timeline"]]
    assert {row.stage for row in rows} == {"text", "load", "dit", "vae", "write"}
    assert rows == sorted(rows, key=lambda row: row.start_seconds)
    assert rows[0].start_seconds >= 0
    assert max(row.stop_seconds for row in rows) <= overlapped["stats"]["total_seconds"]


def test_networks_that_take_turns_do_not_overlap(make: Make):
    made = make("overlap=true", "offload=true")
    assert "overlapped_seconds" not in made.report["stats"]["stages"]["vae"]
