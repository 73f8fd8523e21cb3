"""What a plan will cost and how good it will be; which plan meets a target."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from flowcache.errors import UserError
from flowcache.runtime.metrics import PIXEL_MAX

TargetName = Literal["speedup", "flops", "psnr", "seconds"]
EXAMPLES = {"speedup": 3, "flops": 0.35, "psnr": 32, "seconds": 60}


@dataclass(frozen=True)
class Target:
    """What a user asks for.

    speedup: at least so many times faster than with every step computed; flops: at most this share
    of the FLOPs with every step computed; psnr: at least so many dB against the same run with every
    step computed; seconds: at most so many seconds in the transformer.
    """

    name: TargetName
    value: float

    def is_met(self, forecast: "Forecast") -> bool:
        """Return whether a forecast is good enough."""
        found = getattr(forecast, self.name)
        return found >= self.value if self.name in ("speedup", "psnr") else found <= self.value


@dataclass(frozen=True)
class Forecast:
    """What is expected of a run that computes some of the own steps of every chunk."""

    cost: float
    """Computed steps; one that runs fewer passes counts by its share."""
    speedup: float
    flops: float
    """Share of the FLOPs with every step computed."""
    psnr: float
    """dB against the same run with every step computed."""
    seconds: float
    """In the transformer."""


@dataclass(frozen=True)
class Costs:
    """FLOPs share and seconds of a run as straight lines over the number of computed steps.

    Attributes:
        num_steps: own steps of a chunk.
        flops: intercept and slope of the share of FLOPs.
        seconds: intercept and slope of the seconds in the transformer.
    """

    num_steps: int
    flops: tuple[float, float]
    seconds: tuple[float, float]

    def forecast(self, cost: float, *, psnr: float) -> Forecast:
        """Return what is expected of a plan."""

        def at(line: tuple[float, float], count: float) -> float:
            return line[0] + line[1] * count

        seconds = at(self.seconds, cost)
        return Forecast(
            cost=cost,
            speedup=at(self.seconds, self.num_steps) / seconds,
            flops=at(self.flops, cost),
            psnr=psnr,
            seconds=seconds,
        )


def fit_costs(measured: Mapping[float, tuple[float, float]], *, num_steps: int) -> Costs:
    """Fit the costs of runs.

    Args:
        measured: number of computed steps -> (share of FLOPs, seconds); two numbers or more.
    """
    if len(measured) < 2:
        raise ValueError(f"two runs with different costs are needed, not {len(measured)}")
    counts = list(measured)
    lines: list[tuple[float, float]] = []
    for column in range(2):
        values = [measured[count][column] for count in counts]
        slope, intercept = np.polyfit(counts, values, 1).tolist()
        lines.append((intercept, slope))
    return Costs(num_steps, lines[0], lines[1])


def fit_pixel_scale(measured: Sequence[tuple[float, float]]) -> float:
    """Return squared pixel levels per predicted squared latent error: a geometric mean.

    Args:
        measured: (predicted error, measured mean squared error in pixel levels) of some clips, all
            above 0.
    """
    return math.exp(np.mean([math.log(mse / error) for error, mse in measured]))


def to_psnr(error: float, *, scale: float) -> float:
    """Return the PSNR in dB that a predicted error stands for; inf for no error."""
    return math.inf if error <= 0 else 10 * math.log10(PIXEL_MAX**2 / (scale * error))


def parse_target(text: str) -> Target:
    """Read `flops=0.35`.

    Raises:
        UserError: the name is unknown, or the value is no positive number, or means nothing.
    """
    name, _, raw = text.partition("=")
    if name not in get_args(TargetName):
        known = ", ".join(f"{key}={value}" for key, value in EXAMPLES.items())
        raise UserError(f"the target is {text!r}, but must be one of the kinds {known}")
    try:
        value = float(raw)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise UserError(
            f"the target is {text!r}: its value must be a number above 0, as in "
            f"{name}={EXAMPLES[name]}"
        )
    if name == "flops" and value > 1:
        raise UserError(f"flops={value:g} is a share and must be at most 1, as in flops=0.35")
    if name == "speedup" and value < 1:
        raise UserError(f"speedup={value:g} must be 1 or more, as in speedup=3")
    return Target(cast(TargetName, name), value)


def choose(target: Target, forecasts: Sequence[Forecast]) -> Forecast:
    """Return the best forecast that meets a target.

    With a PSNR as target that is the one with the fewest computed steps, else the one with the
    highest PSNR.

    Raises:
        UserError: none does; the best value within reach is named.
    """
    good = [forecast for forecast in forecasts if target.is_met(forecast)]
    if not good:
        values = [float(getattr(forecast, target.name)) for forecast in forecasts]
        is_least = target.name in ("speedup", "psnr")
        reach = max(values) if is_least else min(values)
        raise UserError(
            f"the target {target.name}={target.value:g} cannot be reached: "
            f"{'at most' if is_least else 'at least'} {reach:.3g} can be had with "
            f"{min(f.cost for f in forecasts):g} to "
            f"{max(f.cost for f in forecasts):g} computed steps; ask for less"
        )
    if target.name == "psnr":
        return min(good, key=lambda forecast: forecast.cost)
    return max(good, key=lambda forecast: forecast.psnr)
