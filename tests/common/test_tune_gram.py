import itertools
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flowcache.errors import UserError
from flowcache.tuning.gap import Predictor
from flowcache.tuning.gram import (
    Calibration,
    GramCollector,
    Sketch,
    calibration_bytes,
    guidance_risks,
    merge,
    propagation_gains,
)

pytestmark = pytest.mark.numeric

NUM_STEPS = 6
SIGMAS = [1.0, 0.85, 0.7, 0.5, 0.3, 0.1]
WEIGHTS = {"cond": 4.0, "uncond": -3.0}


def velocities(seed: int, size: tuple[int, ...] = (4, 3, 8, 8)) -> dict[str, Tensor]:
    """Return the velocities of all steps of a chunk, which change little: `[N, C, F, h, w]`."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for branch in WEIGHTS:
        changes = 0.05 * torch.randn(NUM_STEPS, *size, generator=generator)
        result[branch] = torch.randn(size, generator=generator) + changes.cumsum(0)
    return result


def observe(collector: GramCollector, chunk: int, step: int, seen: dict[str, Tensor]) -> None:
    for branch, values in seen.items():
        collector.observe(
            segment=0,
            tick=step,
            chunk=chunk,
            step=step,
            branch=branch,
            velocity=values[step],
            sigma=SIGMAS[step],
        )


def calibrated(
    chunks: Mapping[int, dict[str, Tensor]],
    branches: Collection[str] = tuple(WEIGHTS),
    sketch: Sketch | None = None,
) -> Calibration:
    """Return the calibration of chunks that were denoised one after the other."""
    collector = GramCollector(NUM_STEPS, branches, sketch=sketch)
    for chunk, seen in chunks.items():
        for step in range(NUM_STEPS):
            observe(collector, chunk, step, seen)
    assert not collector._active, "finished chunks are let go"
    return collector.finish()


def direct_error(seen: dict[str, Tensor], computed: list[int], factor: float) -> float:
    """Return the squared error per element that reuse leaves, from the velocities themselves."""
    guided = sum(weight * seen[branch].double() for branch, weight in WEIGHTS.items())
    assert isinstance(guided, Tensor)
    sigmas, total = [*SIGMAS, 0.0], 0.0
    for i, stop in enumerate(computed[1:], start=1):
        error = torch.zeros_like(guided[0])
        for k in range(computed[i - 1] + 1, stop):
            last = guided[computed[i - 1]]
            predicted = last
            if i > 1:
                s0, s1 = computed[i - 2], computed[i - 1]
                share = (sigmas[k] - sigmas[s1]) / (sigmas[s1] - sigmas[s0])
                predicted = last + factor * share * (last - guided[s0])
            error += (sigmas[k + 1] - sigmas[k]) * (guided[k] - predicted)
        total += error.square().mean().item()
    return total


def test_the_gram_matrix_gives_the_direct_error_of_the_guided_velocity():
    clips = [velocities(seed) for seed in range(3)]
    model = merge([calibrated({0: seen}) for seen in clips]).error_model(WEIGHTS)
    for computed, factor in (([0, 2, 5], 0.0), ([0, 1, 4, 5], 0.5), ([0, 2, 3, 5], 1.0)):
        expected = np.mean([direct_error(seen, computed, factor) for seen in clips])
        found = model.plan(computed, Predictor(1, factor))
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_joint_matrix_gives_the_direct_error_of_held_guidance():
    """Step 2 runs the conditional branch alone, step 3 is reused, step 4 runs both."""
    seen = velocities(5)
    model = calibrated({0: seen}).error_model(WEIGHTS, conditional="cond")
    guided = sum(weight * seen[branch].double() for branch, weight in WEIGHTS.items())
    assert isinstance(guided, Tensor)
    stand_in = seen["cond"][2].double() + guided[1] - seen["cond"][1].double()
    sizes = [after - before for before, after in itertools.pairwise([*SIGMAS, 0.0])]
    error = sizes[2] * (guided[2] - stand_in) + sizes[3] * (guided[3] - stand_in)
    found = model.plan([0, 1, 2, 4, 5], Predictor(), conditional=[2])
    assert found == pytest.approx(error.square().mean().item(), rel=1e-5)


def test_chunks_that_are_active_at_once_are_kept_apart():
    seen = {0: velocities(0), 1: velocities(1)}
    together = GramCollector(NUM_STEPS, WEIGHTS)
    for tick in range(NUM_STEPS + 2):
        for chunk, values in seen.items():
            if 0 <= tick - 2 * chunk < NUM_STEPS:
                observe(together, chunk, tick - 2 * chunk, values)
    one, other = together.finish(), calibrated(seen)
    for chunk in seen:
        np.testing.assert_allclose(one.gram[chunk], other.gram[chunk])
    assert one.num_clips == {0: 1, 1: 1}


def test_a_sketch_gives_nearly_the_same_errors_and_the_same_ones_for_a_seed():
    seen = {0: velocities(0, size=(16, 5, 16, 16))}
    sketches = (None, Sketch(8192, seed=0), Sketch(8192, seed=0), Sketch(8192, seed=1))
    models = [calibrated(seen, sketch=sketch).error_model(WEIGHTS) for sketch in sketches]
    exact, first, again, other = (m.plan([0, 1, 4, 5], Predictor(1, 0.5)) for m in models)
    assert first == pytest.approx(exact, rel=5 * (2 / 8192) ** 0.5)
    assert first == again
    assert first != other


def test_a_sketch_keeps_inner_products_on_average():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 500, generator=generator)
    products = [
        torch.dot(sketch(a), sketch(b)).item()
        for sketch in (Sketch(64, seed=s) for s in range(400))
    ]
    spread = np.std(products) / 400**0.5
    assert np.mean(products) == pytest.approx(torch.dot(a, b).item(), abs=4 * spread)


def test_a_calibration_comes_back_from_its_file(tmp_path: Path):
    saved = calibrated({chunk: velocities(chunk) for chunk in (0, 2)})
    saved.save(tmp_path / "c.npz")
    loaded = Calibration.load(tmp_path / "c.npz")
    assert loaded.branches == ("cond", "uncond")
    assert loaded.num_clips == {0: 1, 2: 1}
    np.testing.assert_array_equal(loaded.sigmas, saved.sigmas)
    np.testing.assert_array_equal(loaded.gram[2], saved.gram[2])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"text"])
def test_a_damaged_calibration_is_refused_in_one_line(tmp_path: Path, content: bytes):
    path = tmp_path / "c.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        Calibration.load(path)


def test_calibrations_of_single_clips_add_up_to_one_of_all():
    together = GramCollector(NUM_STEPS, WEIGHTS)
    single = []
    for seed in range(3):
        chunks = dict.fromkeys(range(1 + seed % 2), velocities(seed))
        single.append(calibrated(chunks))
        for chunk, seen in chunks.items():
            for step in range(NUM_STEPS):
                observe(together, chunk, step, seen)
    expected = together.finish()
    for merged in (merge(single), merge([merge(single[:2]), single[2]])):
        assert merged.num_clips == expected.num_clips == {0: 3, 1: 1}
        for chunk in (0, 1):
            np.testing.assert_allclose(merged.gram[chunk], expected.gram[chunk])


def test_calibrations_of_different_schedules_are_not_merged():
    calibration = calibrated({0: velocities(0)})
    with pytest.raises(ValueError, match="merged"):
        merge([calibration, replace(calibration, sigmas=calibration.sigmas * 0.9)])


def test_a_branch_that_was_not_asked_for_is_passed_over():
    assert calibrated({0: velocities(0)}, ["cond"]).gram[0].shape == (NUM_STEPS, NUM_STEPS)


def test_a_step_that_was_not_observed_is_an_error():
    collector = GramCollector(NUM_STEPS, WEIGHTS)
    with pytest.raises(ValueError, match="no chunk"):
        collector.finish()
    observe(collector, 3, 0, velocities(0))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        collector.finish()


def test_the_collector_holds_no_more_than_the_arithmetic_says():
    # a chunk of the 1.3B model at 540P: [16, 5, 68, 120]
    size = {"num_elements": 652_800, "num_steps": 50, "num_branches": 2, "num_active": 5}
    exact, sketched = (calibration_bytes(**size, width=width) for width in (None, 16384))
    assert exact > 1e9 > 100e6 > sketched
    assert sketched == 5 * 100 * 16384 * 4 + 2 * 16384 * 8 + 652_800 * 20 + 5 * 100**2 * 8


# Risks of guidance --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "cosine", "want"),
    [
        # (1-s)^2 r_u^2 + s^2 r_c^2 + 2 s (1-s) rho r_u r_c with r_u = 1, r_c = 2
        (3.0, 0.5, 4 + 36 - 12),
        (3.0, 1.0, 4 + 36 - 24),
        (3.0, -1.0, 4 + 36 + 24),
        (1.0, 0.5, 4),
        (0.0, 0.5, 1),
    ],
)
def test_the_joint_risk_is_that_of_the_formula(scale: float, cosine: float, want: float):
    """Both branches begin at 0: their changes are their velocities in step 1."""
    uncond, cond = np.zeros((2, 2)), np.zeros((2, 2))
    uncond[1], cond[1] = (1, 0), (2 * cosine, 2 * np.sqrt(1 - cosine**2))
    rows = np.concatenate([uncond, cond])
    calibration = Calibration(
        np.array([1.0, 0.5, 0.0]), ("uncond", "cond"), {0: rows @ rows.T}, {0: 1}
    )
    model = calibration.error_model({"uncond": 1 - scale, "cond": scale})
    first, (risk,) = guidance_risks(model.gram, np.array([7.0, 2.0]))
    assert first == []
    assert risk == pytest.approx(2 * np.sqrt(want))


def test_older_results_have_risks_of_their_own_up_to_an_age():
    """A velocity of step k is k: reusing one that is a steps old changes a, times the gain."""
    steps = np.arange(12.0)
    risks = guidance_risks(np.outer(steps, steps), np.full(12, 0.5))
    assert [len(row) for row in risks] == [*range(9), 8, 8, 8]
    assert risks[11] == pytest.approx([0.5 * age for age in range(1, 9)])


@pytest.mark.parametrize(("scale", "exponent", "floor"), [(5.0, 2.0, 0.5), (0.3, 0.75, 0.0)])
def test_gains_find_the_law_that_they_follow(scale: float, exponent: float, floor: float):
    left = 1 - np.arange(30) / 30
    assert propagation_gains(scale * left**exponent + floor) == pytest.approx(
        scale * left**exponent + floor
    )


def test_gains_are_never_below_zero():
    assert (propagation_gains(np.linspace(0, 1, 30) ** 4) >= 0).all()
