import pytest

from flowcache.runtime.units import scaled


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.6, "1 kB"),
        (1234, "1.23 kB"),
        (-5_600_000, "-5.6 MB"),
        (113e15, "113 PB"),
        (2e21, "2e+03 EB"),
    ],
)
def test_a_count_has_three_digits_and_a_decimal_prefix(value: float, text: str):
    assert scaled(value, "B") == text
