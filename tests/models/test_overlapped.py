"""Runs whose decoding and writing go on while chunks, and the next segment, are denoised."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from flowcache.runtime.stats import Period

pytestmark = pytest.mark.numeric

Make = Callable[..., Any]


@pytest.mark.parametrize("is_long", [False, True])
def test_decoding_while_denoising_gives_the_same_video(make: Make, tiny: Any, is_long: bool):
    settings = tiny.short.long if is_long else ()
    plain, overlapped = (make(*settings, f"overlap={value}") for value in ("false", "true"))
    assert plain.path.read_bytes() == overlapped.path.read_bytes()
    stages = overlapped.report["stats"]["stages"]
    assert stages["write"]["overlapped_seconds"] == stages["write"]["seconds"] > 0
    assert 0 < stages["vae"]["overlapped_seconds"] <= stages["vae"]["seconds"]
    # encoding the frames between two segments waits
    has_segments = len(overlapped.job.work.segments) > 1
    assert has_segments == (stages["vae"]["overlapped_seconds"] < stages["vae"]["seconds"])
    assert stages["vae"]["within"] is None
    assert "overlapped_seconds" not in plain.report["stats"]["stages"]["vae"]
    assert overlapped.report["first_frames_seconds"] > 0


def test_the_time_line_shows_the_decoder_at_work_while_the_denoising_goes_on(make: Make, tiny: Any):
    def periods(report: dict[str, Any]) -> list[Period]:
        return [Period(*row) for row in report["stats"]["timeline"]]

    def overlapping(rows: list[Period]) -> int:
        decoding = [row for row in rows if (row.stage, row.is_concurrent) == ("vae", True)]
        denoising = [row for row in rows if (row.stage, row.is_concurrent) == ("dit", False)]
        return sum(
            vae.start_seconds < dit.stop_seconds and dit.start_seconds < vae.stop_seconds
            for vae in decoding
            for dit in denoising
        )

    overlapped = make(*tiny.short.long, "overlap=true").report
    rows = periods(overlapped)
    assert overlapping(rows) > 0
    assert overlapping(periods(make(*tiny.short.long, "overlap=false").report)) == 0
    assert {"text", "load", "dit", "vae", "write"} <= {row.stage for row in rows}
    assert rows == sorted(rows, key=lambda row: row.start_seconds)
    assert rows[0].start_seconds >= 0
    assert max(row.stop_seconds for row in rows) <= overlapped["stats"]["total_seconds"]


def test_networks_that_take_turns_do_not_overlap(make: Make):
    made = make("overlap=true", "offload=true")
    assert "overlapped_seconds" not in made.report["stats"]["stages"]["vae"]


def test_an_error_in_the_decoder_ends_the_run_with_its_message(
    make: Make, tiny: Any, monkeypatch: pytest.MonkeyPatch
):
    def broken(*_: Tensor) -> Tensor:
        raise RuntimeError("the decoder broke")

    before = threading.active_count()
    monkeypatch.setattr(tiny.short.decoder, broken)
    with pytest.raises(RuntimeError, match="the decoder broke"):
        make("overlap=true")
    assert threading.active_count() == before
