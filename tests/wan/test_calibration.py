import itertools

import pytest

from flowcache.policies import polynomial
from flowcache.wan.calibration import COEFFICIENTS, Signal, coefficients_for
from flowcache.wan.dit import DiTConfig


@pytest.mark.parametrize(
    ("name", "at_zero", "roots"),
    [
        ("t2v-1.3b-ret", -0.050, [0.0043, 0.102]),
        ("t2v-14b-ret", -0.316, [0.0077, 0.082]),
        ("t2v-1.3b", 0.138, [0.185, 0.310]),
        ("t2v-14b", -13.02, [0.130, 0.406]),
        ("i2v-540p-ret", 0.133, []),
        ("i2v-720p-ret", -0.042, [0.0027]),
        ("i2v-540p", -0.202, [0.057, 0.436]),
        ("i2v-720p", -0.234, [0.058, 0.396]),
    ],
)
def test_every_polynomial_has_its_published_value_at_zero_and_changes_of_sign(
    name: str, at_zero: float, roots: list[float]
):
    value = polynomial(COEFFICIENTS[name])
    assert value(0.0) == pytest.approx(at_zero, abs=5e-3)
    grid = [step / 100_000 for step in range(50_000)]
    crossings = [at for at, after in itertools.pairwise(grid) if value(at) * value(after) <= 0]
    assert crossings == pytest.approx(roots, abs=1e-3)


@pytest.mark.parametrize(
    ("dim", "model_type", "signal", "size", "name"),
    [
        (1536, "t2v", "timestep", (544, 960), "t2v-1.3b-ret"),
        (1536, "t2v", "timestep_embedding", (720, 1280), "t2v-1.3b"),
        (5120, "t2v", "timestep", (720, 1280), "t2v-14b-ret"),
        (5120, "t2v", "timestep_embedding", (544, 960), "t2v-14b"),
        (1536, "i2v", "timestep", (544, 960), "i2v-540p-ret"),
        (5120, "i2v", "timestep", (720, 1280), "i2v-720p-ret"),
        (5120, "i2v", "timestep_embedding", (1280, 720), "i2v-720p"),
        (5120, "i2v", "timestep_embedding", (960, 544), "i2v-540p"),
        (5120, "t2v", "content", (544, 960), None),
        (64, "t2v", "timestep", (544, 960), None),
        (64, "i2v", "timestep", (544, 960), None),
    ],
)
def test_the_polynomial_follows_from_the_model_the_signal_and_the_resolution(
    dim: int, model_type: str, signal: Signal, size: tuple[int, int], name: str | None
):
    config = DiTConfig(model_type=model_type, dim=dim)
    assert coefficients_for(config, signal=signal, height=size[0], width=size[1]) == name
