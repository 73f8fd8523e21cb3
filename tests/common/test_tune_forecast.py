import math

import pytest

from flowcache.errors import UserError
from flowcache.tune.plan import (
    Forecast,
    Target,
    choose,
    fit_costs,
    fit_pixel_scale,
    parse_target,
    to_psnr,
)

FORECASTS = [
    Forecast(count, speedup=20 / count, flops=count / 20, psnr=20.0 + count, seconds=count / 10)
    for count in range(4, 21)
]


@pytest.mark.parametrize(
    ("text", "count"),
    [("flops=0.36", 7), ("speedup=3", 6), ("seconds=1.25", 12), ("psnr=32", 12), ("flops=1", 20)],
)
def test_the_target_decides_how_many_steps_are_computed(text: str, count: int):
    assert choose(parse_target(text), FORECASTS).cost == count


def test_a_longer_plan_that_is_worse_is_not_chosen():
    worse = [*FORECASTS, Forecast(8, 20 / 8, 0.35, 10.0, 0.8)]
    assert choose(Target("flops", 0.36), worse).psnr == 27.0


@pytest.mark.parametrize(
    ("text", "reach"),
    [("speedup=9", "at most 5"), ("flops=0.1", "at least 0.2"), ("psnr=99", "at most 40")],
)
def test_an_impossible_target_is_one_line_that_names_what_can_be_had(text: str, reach: str):
    with pytest.raises(UserError, match=reach) as caught:
        choose(parse_target(text), FORECASTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "fast", "psnr", "psnr=", "psnr=nan", "flops=-1", "flops=35", "speedup=0.5", "a=1"]
)
def test_a_target_that_means_nothing_is_refused_in_one_line(text: str):
    with pytest.raises(UserError) as caught:
        parse_target(text)
    assert "\n" not in str(caught.value)


def test_costs_between_two_measured_runs_lie_on_a_line():
    costs = fit_costs({30: (1.0, 6.0), 10: (0.4, 3.0)}, num_steps=30)
    forecast = costs.forecast(20, psnr=33.0)
    assert forecast.flops == pytest.approx(0.7)
    assert forecast.seconds == pytest.approx(4.5)
    assert forecast.speedup == pytest.approx(6 / 4.5)
    assert forecast.psnr == 33.0


def test_one_run_tells_no_costs():
    with pytest.raises(ValueError, match="two runs"):
        fit_costs({30: (1.0, 6.0)}, num_steps=30)


def test_the_scale_turns_the_predicted_error_into_the_measured_psnr():
    scale = fit_pixel_scale([(0.5, 50.0), (0.5, 200.0)])
    assert scale == pytest.approx(200.0)
    assert to_psnr(255**2 / 200 / 1000, scale=scale) == pytest.approx(30.0)
    assert to_psnr(0.0, scale=scale) == math.inf
