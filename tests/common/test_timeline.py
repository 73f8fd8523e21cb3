"""When each stage was at work: what is told as one."""

from flowcache.runtime.timeline import Period, merged_periods


def test_the_worked_example():
    found = merged_periods(
        [
            Period("text", 0, 1, False),
            Period("dit", 1, 2, False),
            Period("dit", 2, 4, False),
            Period("vae", 3, 6, True),
            Period("dit", 5, 6, False),
        ]
    )
    assert found == [
        Period("text", 0, 1, False),
        Period("dit", 1, 4, False),
        Period("vae", 3, 6, True),
        Period("dit", 5, 6, False),
    ]


def test_periods_are_joined_over_a_gap_below_a_millisecond_or_a_thousandth_of_all():
    def joined(*, gap: float, length: float) -> bool:
        first = Period("dit", 0.0, 0.1, False)
        second = Period("dit", 0.1 + gap, length, False)
        return len(merged_periods([first, second])) == 1

    assert joined(gap=0.0009, length=0.2)
    assert not joined(gap=0.0011, length=0.2)
    assert joined(gap=0.009, length=10.0)
    assert not joined(gap=0.011, length=10.0)


def test_periods_with_another_stage_between_them_stay_apart():
    ticks_and_decoding = [
        Period("dit", 0, 1, False),
        Period("vae", 1, 1.0001, False),
        Period("dit", 1.0001, 2, False),
    ]
    assert merged_periods(ticks_and_decoding) == ticks_and_decoding


def test_a_stage_beside_the_others_is_a_row_of_its_own():
    encoding, decoding = Period("vae", 0, 1, False), Period("vae", 1, 2, True)
    assert merged_periods([encoding, decoding]) == [encoding, decoding]
    writing = Period("write", 2, 2.5, True)
    following = [decoding, Period("vae", 2, 3, True), writing]
    assert merged_periods(following) == [Period("vae", 1, 3, True), writing]


def test_periods_come_in_the_order_of_their_starts():
    # A stage is noted when it ends: what ran beside it may have started before.
    ticks = [Period("dit", at, at + 1, False) for at in range(3)]
    found = merged_periods([ticks[1], ticks[0], Period("vae", 0.5, 2.5, True), ticks[2]])
    assert found == [Period("dit", 0, 3, False), Period("vae", 0.5, 2.5, True)]


def test_no_periods_are_none():
    assert merged_periods([]) == []


def test_a_row_of_the_report_tells_microseconds():
    assert Period("dit", 0.12345678, 2.0, True).to_row() == ["dit", 0.123457, 2.0, True]
