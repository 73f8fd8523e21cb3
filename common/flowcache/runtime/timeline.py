"""When each stage of a run was at work."""

from collections.abc import Sequence
from typing import Any, NamedTuple

MIN_GAP_SECONDS = 0.001
MIN_GAP_SHARE = 0.001
"""Of the time line's length. A shorter gap between two uses of a stage is not told."""


class Period(NamedTuple):
    """A stage at work without a break, in seconds since the start of the run."""

    stage: str
    start_seconds: float
    stop_seconds: float
    is_beside: bool
    """In a thread of its own, beside the other stages."""

    def to_row(self) -> list[Any]:
        """Return plain values for JSON, with times to a microsecond."""
        start, stop = round(self.start_seconds, 6), round(self.stop_seconds, 6)
        return [self.stage, start, stop, self.is_beside]


def merged_periods(periods: Sequence[Period]) -> list[Period]:
    """Return periods in order of their starts, each joined with the one that it follows at once.

    What the run does itself is one row of periods, and what a stage does beside it is another one.
    Neighbours in a row are joined if they are of one stage, and if the gap between them is below a
    millisecond or a thousandth of the whole time line, which no chart would show. In seconds:

        text  0    to 1                      text  0 to 1
        dit   1    to 2                      dit   1 to 4
        dit   2    to 4              ->      vae   3 to 6, beside
        vae   3    to 6, beside              dit   5 to 6
        dit   5    to 6

    The ticks of `dit` from 1 to 4 are joined, and 5 to 6 is not: something was waited for.
    """
    if not periods:
        return []
    ordered = sorted(periods, key=lambda each: (each.start_seconds, each.stop_seconds))
    length = max(each.stop_seconds for each in ordered) - ordered[0].start_seconds
    gap = max(MIN_GAP_SECONDS, MIN_GAP_SHARE * length)
    merged: list[Period] = []
    last: dict[str | None, int] = {}  # of what is beside, by its stage; None: of the run itself
    for each in ordered:
        row = each.stage if each.is_beside else None
        place = last.get(row)
        before = None if place is None else merged[place]
        if (
            place is not None
            and before is not None
            and before.stage == each.stage
            and each.start_seconds - before.stop_seconds < gap
        ):
            stop = max(before.stop_seconds, each.stop_seconds)
            merged[place] = before._replace(stop_seconds=stop)
        else:
            last[row] = len(merged)
            merged.append(each)
    return merged
