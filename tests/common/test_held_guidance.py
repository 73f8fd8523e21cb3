import pytest
import torch

from flowcache.errors import UserError
from flowcache.policies import ReuseRule, check_guidance, check_reuse, guidance_of
from flowcache.predict import HeldGuidance


def full_steps(guidance: HeldGuidance, computed: list[int], *, num_steps: int = 8) -> list[int]:
    """Return the computed steps that run all passes."""
    full: list[int] = []
    for step in computed:
        if guidance.is_held(0, step, num_steps=num_steps):
            guidance.take(0)
        else:
            guidance.put(0, torch.zeros(1))
            full.append(step)
    return full


def test_every_third_computed_step_runs_all_passes_as_in_the_example():
    assert full_steps(HeldGuidance(every=3), [0, 1, 2, 4, 5, 7]) == [0, 4, 7]


def test_listed_steps_run_all_passes_and_the_first_and_the_last_anyway():
    assert full_steps(HeldGuidance([3, 5]), [0, 1, 3, 4, 7]) == [0, 3, 7]


def test_without_settings_every_step_runs_all_passes_and_nothing_is_kept():
    guidance = guidance_of(ReuseRule())
    assert not guidance.is_on
    assert full_steps(guidance, list(range(8))) == list(range(8))
    assert not guidance.differences


def test_a_difference_made_with_other_scales_is_not_held():
    guidance = HeldGuidance(every=9)
    guidance.put(0, torch.ones(1), scales=(1.5, 7.5))
    assert guidance.is_held(0, 3, num_steps=8, scales=(1.5, 7.5))
    assert not guidance.is_held(0, 3, num_steps=8, scales=(1.0, 0.0))
    assert not guidance.is_held(1, 3, num_steps=8, scales=(1.5, 7.5))
    guidance.drop(0)
    guidance.drop(0)
    assert not guidance.is_held(0, 3, num_steps=8, scales=(1.5, 7.5))


def test_guidance_that_is_not_there_cannot_be_held():
    for rule in (ReuseRule(guidance_every=2), ReuseRule(guidance_steps=[0])):
        check_guidance(rule, num_passes=2)
        with pytest.raises(UserError, match=r"this run has that one pass only .*leave them out"):
            check_guidance(rule, num_passes=1)
    check_guidance(ReuseRule(), num_passes=1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            ReuseRule(guidance_steps=[0, 8]),
            r"guidance_steps are own steps .*: 8 is none",
        ),
        (ReuseRule(guidance_every=2, guidance_steps=[0]), r"both say .*: give one of them"),
    ],
)
def test_values_that_mean_nothing_are_refused(rule: ReuseRule, message: str):
    with pytest.raises(UserError, match=message):
        check_reuse(rule, num_steps=8, least_warmup=1)
