"""The command that tunes: on a made-up model whose clips are an Euler sum of drawn velocities."""

import importlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from flowcache.errors import UserError
from flowcache.policies import Decision, Observe
from flowcache.predict import HeldGuidance, ResultStore, clean_estimate, velocity_to
from flowcache.runtime.profile import Setting, read_profile
from flowcache.runtime.run import Clip
from flowcache.runtime.stats import RunStats
from flowcache.schedule import Tick
from flowcache.tuning.gap import ErrorModel, Predictor
from flowcache.tuning.gram import Calibration
from flowcache.tuning.methods import closest_magcache, closest_threshold
from flowcache.tuning.plan import Constraints, parse_target
from flowcache.tuning.runs import Size, Words
from flowcache.tuning.study import Choice, check_possible

GOLDEN = Path(__file__).parents[1] / "golden" / "tune"
"""Random plans measured on two clips of the demo; `tune.py --store-check` makes such files anew."""
NUM_STEPS = 12
SIGMAS = np.linspace(1, 0, NUM_STEPS + 1)


class Toy:
    """A model with one chunk, whose velocity changes fast in its last steps."""

    def __init__(self) -> None:
        self.preset = "toy"
        self.words = Words(
            content=("reuse.signal=content",),
            published="residual",
            whole_window="teacache_causal",
            demo_frames=77,
            token_elements=64,
        )
        self.num_renders = 0
        self.num_passes = 1
        self.compresses_kv = False
        self.holds_guidance = False
        self.needed: int | None = None
        """A step that plans of few steps must compute, which no sum of local errors shows."""
        self.spoiled = ""
        """What had better not be reused, which no sum of local errors shows."""

    def load(self) -> None:
        """Nothing to load."""

    def size(self) -> Size:
        return Size(
            num_steps=NUM_STEPS,
            warmup_steps=2,
            compute_last_step=True,
            num_elements=48,
            num_active=1,
            flops=120,
            num_passes=self.num_passes,
            compresses_kv=self.compresses_kv,
            holds_guidance=self.holds_guidance,
        )

    def setting(self) -> Setting:
        return Setting(num_steps=NUM_STEPS, shift=1.0, lag=5, guidance=[])

    def fingerprint(self) -> str:
        return "toy"

    def render(
        self,
        settings: Sequence[str],
        *,
        prompt: str,
        seed: int,
        preset: str | None = None,
        observe: Observe | None = None,
    ) -> Any:
        self.num_renders += 1
        values = dict(setting.split("=", 1) for setting in settings)
        computed = set(range(NUM_STEPS))
        if values.get("reuse.policy") == "stride":
            computed = set(json.loads(values["reuse.steps"]))
        elif preset == "teacache_causal" or float(values.get("reuse.threshold", 0)) > 0:
            computed = {0, 1, 3, 6, 9, NUM_STEPS - 1}
        store = ResultStore(
            float(values.get("reuse.extrapolate", 0)), order=int(values.get("reuse.order", 1))
        )
        is_clean = values.get("reuse.predict") == "clean"
        guidance = HeldGuidance(json.loads(values.get("reuse.guidance_steps", "null")))
        stats = RunStats(torch.device("cpu"))
        latent, spent = torch.zeros(4, 1, 4, 3), 0
        shown = {"guided": self._velocities(seed), "cond": self._velocities(seed)}
        shown["cond"] -= self._velocities(seed + 100).flip(0) / 10
        for step in range(NUM_STEPS):
            decision = Decision(step in computed, 0.1 if step else None, 0.1 if step else None)
            stats.record(Tick(step, NUM_STEPS, NUM_STEPS, {0: step}), 0, "cond", decision)
            at = torch.full((4,), SIGMAS[step]).float()
            if step in computed:
                velocity = shown["guided"][step]
                if guidance.is_held(0, step, num_steps=NUM_STEPS):
                    velocity, spent = shown["cond"][step] + guidance.take(0), spent + 5
                else:
                    guidance.put(0, velocity - shown["cond"][step])
                    spent += 10
                value = clean_estimate(latent, velocity, sigma=at) if is_clean else velocity
                store.put(0, value, sigma=at)
                for branch, velocities in shown.items() if observe is not None else ():
                    observe(
                        segment=0,
                        tick=step,
                        chunk=0,
                        step=step,
                        branch=branch,
                        velocity=velocities[step],
                        sigma=float(SIGMAS[step]),
                    )
            else:
                velocity = store.predict(0, sigma=at)
                if is_clean:
                    velocity = velocity_to(velocity, latent, sigma=at)
            latent = latent + float(SIGMAS[step + 1] - SIGMAS[step]) * velocity
        with stats.stage("dit"):
            stats.add_flops(computed=spent, without_reuse=10 * NUM_STEPS)
            whole = values.get("kv.compress") == "none"
            stats.add_flops(computed=10 * NUM_STEPS if whole else 0, without_reuse=0)
        is_poor = self.needed is not None and self.needed not in computed and len(computed) < 6
        is_poor |= len(computed) < NUM_STEPS and values.get("reuse.predict") == self.spoiled
        latent = latent + 0.1 * whole + 0.5 * is_poor
        pixels = (128 + 40 * latent).clamp(0, 255).to(torch.uint8)
        return Clip(pixels.permute(1, 2, 3, 0)[..., :3], stats)

    def _velocities(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        growth = torch.linspace(0.1, 1.0, NUM_STEPS).view(-1, 1, 1, 1, 1) ** 2
        return (growth * torch.randn(NUM_STEPS, 4, 1, 4, 3, generator=generator)).cumsum(0)


@pytest.fixture(name="toy")
def _toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    toy = Toy()

    def choose(*_: Any, holds_guidance: bool, **__: Any) -> Toy:
        toy.holds_guidance = holds_guidance
        return toy

    monkeypatch.setattr(importlib.import_module("tune"), "Runs", choose)
    return toy


Tune = Callable[..., str]
"""`(*arguments, code=0) -> what is printed`, or the one line of an error."""


@pytest.fixture(name="tune")
def _tune(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Tune:
    assert toy.num_renders == 0

    def run(*arguments: str, code: int = 0) -> str:
        given = ["--architecture", "skyreels_v2", "--work", str(tmp_path / "work"), "--clips", "3"]
        assert importlib.import_module("tune").main([*given, *arguments]) == code
        captured = capsys.readouterr()
        if code == 0:
            return captured.out
        (error,) = [line for line in captured.err.splitlines() if line.startswith("error")]
        return error

    return run


def test_a_target_in_flops_gives_a_profile_that_meets_it(tune: Tune, tmp_path: Path):
    tune("--target", "flops=0.5", "--check-prompts", "0")
    profile = read_profile(tmp_path / "work" / "profile.yaml")
    (plan,) = profile.reuse.plans
    assert 2 < len(plan) <= NUM_STEPS / 2
    # written with six decimals
    assert profile.predicted.flops == pytest.approx(len(plan) / NUM_STEPS, abs=1e-6)
    assert profile.fingerprint == "toy"
    assert profile.setting == Setting(num_steps=NUM_STEPS, shift=1.0, lag=5, guidance=[])
    assert profile.source.seeds == [7000, 7001, 7002]
    # the velocity changes most in the last steps: more of them are computed
    assert sum(step >= NUM_STEPS // 2 for step in plan) > len(plan) / 2


def test_plans_that_hold_guidance_cost_their_share_and_are_written(
    tune: Tune, toy: Toy, tmp_path: Path
):
    toy.num_passes = 2
    printed = tune("--target", "flops=0.5", "--check-prompts", "2", "--hold-guidance")
    reuse = read_profile(tmp_path / "work" / "profile.yaml").reuse
    (plan,) = reuse.plans
    assert reuse.guidance_steps is not None
    alone = [step for step in plan if step not in reuse.guidance_steps]
    assert alone
    assert len(plan) - len(alone) / 2 <= NUM_STEPS / 2
    # where a guard computes a step off the plan, it runs all passes
    assert set(range(NUM_STEPS)) - set(alone) == set(reuse.guidance_steps)
    assert f"conditional  {' '.join(map(str, alone))} run that pass alone" in printed
    table = json.loads((tmp_path / "work" / "table.json").read_text())["table"]
    own = next(row for row in table if f"{len(alone)} with one pass" in row["method"])
    assert own["flops"] == pytest.approx((len(plan) - len(alone) / 2) / NUM_STEPS)
    assert own["psnr"] == pytest.approx(own["predicted_psnr"], abs=4)


def test_the_effect_of_kv_compression_is_printed(tune: Tune, toy: Toy):
    """Without it a clip differs by 4 levels, 10 lg(255^2 / 16) = 36.1 dB, and costs twice."""
    assert "KV cache" not in tune("--check-prompts", "0")
    toy.compresses_kv = True
    line = "KV cache     with compression clips are 36.1 dB like those without, at 0.5 of the FLOPs"
    assert line in tune("--check-prompts", "0", "--overwrite")


def test_the_table_holds_every_policy_and_predicts_what_it_measures(tune: Tune, tmp_path: Path):
    printed = tune("--target", "flops=0.5", "--check-prompts", "3")
    for name in ("planned", "even", "FlowCache", "TeaCache", "MagCache", "guarded"):
        assert f"| {name}" in printed
    assert "threshold" in printed
    plot = ElementTree.parse(tmp_path / "work" / "pareto.svg")
    tips = [tip for tip in plot.iter("{http://www.w3.org/2000/svg}title") if tip.text]
    rows = printed.split("|---|---|---|---|---|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(tips) == len(rows) - printed.count("| equal |")
    report = json.loads((tmp_path / "work" / "table.json").read_text())
    predicted = [row for row in report["table"] if row["predicted_psnr"] is not None]
    assert len(predicted) >= 2
    for row in predicted:
        assert row["num_clips"] == 3
        assert row["psnr"] == pytest.approx(row["predicted_psnr"], abs=4)


def test_a_second_start_measures_nothing_again(tune: Tune, toy: Toy):
    tune("--check-prompts", "1")
    count = toy.num_renders
    assert "--overwrite" in tune("--check-prompts", "1", code=2)
    tune("--check-prompts", "1", "--overwrite")
    assert toy.num_renders == count
    tune("--check-prompts", "2", "--overwrite")
    assert toy.num_renders > count
    assert "other settings" in tune("--check-prompts", "0", "--overwrite", "seed=3", code=2)


def test_a_search_finds_a_plan_with_less_error_and_goes_on_where_it_stopped(
    tune: Tune, toy: Toy, tmp_path: Path
):
    toy.needed = 1
    tune("--target", "flops=0.4", "--check-prompts", "0")
    ((before,),) = (read_profile(tmp_path / "work" / "profile.yaml").reuse.plans,)
    few = ("--target", "flops=0.4", "--check-prompts", "2", "--overwrite", "--search")
    printed = tune(*few, "40")
    line = next(line for line in printed.splitlines() if line.startswith("search"))
    tried, clips, first, last = map(float, re.findall(r"(?<= )[\d.]+", line))
    assert (0 < tried <= 40, clips) == (True, 3)
    ((after,),) = (read_profile(tmp_path / "work" / "profile.yaml").reuse.plans,)
    assert len(after) == len(before)
    assert (after != before) == (last < first)
    assert last < first
    assert (1 in before, 1 in after) == (False, True)
    assert f"| searched {len(after)}" in printed
    count = toy.num_renders
    tune(*few, "40")
    assert toy.num_renders == count


@pytest.mark.parametrize(("spoiled", "best"), [("velocity", "clean"), ("clean", "velocity")])
def test_what_is_reused_is_chosen_by_the_error_of_finished_clips(
    tune: Tune, toy: Toy, tmp_path: Path, spoiled: str, best: str
):
    toy.spoiled = spoiled
    printed = tune("--target", "flops=0.4", "--check-prompts", "2", "--choose-predictor")
    (line,) = [line for line in printed.splitlines() if line.startswith("predictor")]
    errors = {name: float(re.findall(rf"{name} ([\d.]+)", line)[0]) for name in (spoiled, best)}
    ratio = float(re.findall(rf"{best} is best by ([\d.]+), taken", line)[0])
    assert ratio == pytest.approx(errors[spoiled] / errors[best], rel=0.01)
    profile = read_profile(tmp_path / "work" / "profile.yaml")
    assert profile.reuse.predict == best
    decibel = 10 * np.log10(255**2 / errors[best])
    assert profile.predicted.psnr == pytest.approx(decibel, abs=0.01)
    assert f", {best} by its error | " in printed
    count = toy.num_renders
    tune("--target", "flops=0.4", "--check-prompts", "2", "--choose-predictor", "--overwrite")
    assert toy.num_renders == count


@pytest.mark.parametrize(
    ("errors", "quantity", "is_clear"),
    [
        ({"a": 4.0, "b": 2.0, "c": 2.1}, "b", False),
        ({"a": 4.0, "b": 2.0, "c": 2.2}, "b", True),
        ({"a": 0.0, "b": 2.0}, "a", True),
        ({"a": 1.0}, "a", True),
    ],
)
def test_a_choice_is_clear_from_a_tenth_more_on(
    errors: dict[str, float], quantity: str, is_clear: bool
):
    assert Choice(quantity, errors).is_clear is is_clear


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "-1"], "--search must be 0 or more"),
        (["--search", "3", "--spread", "-1"], "--spread must be 0 or more"),
        (["--spread", "1"], "give --search TRIALS"),
        (["--target", "psnr=500"], "cannot be reached"),
        (["--target", "flops=0.001", "--dry-run"], "cannot be reached: at least "),
        (["--target", "speedup=300", "--dry-run"], "cannot be reached: at least "),
        (["--target", "quality=3"], "must be one of the kinds"),
        (["--hold-guidance"], "--hold-guidance needs a model with guidance, but this run has one"),
        (["--clips", "0"], "--clips must be 1 or more"),
        (["--model", "some/model"], "--prompts FILE"),
        (["--prompts", "missing.txt"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_one_line(tune: Tune, arguments: list[str], words: str):
    assert words in tune("--check-prompts", "0", *arguments, code=2)


def test_a_run_of_two_steps_leaves_nothing_to_reuse(toy: Toy):
    size = replace(toy.size(), num_steps=2)
    with pytest.raises(UserError, match="nothing can be reused in 2 steps"):
        check_possible(parse_target("flops=0.5"), size, Constraints())


def test_random_plans_are_kept_for_the_test(tune: Tune, tmp_path: Path):
    tune("--store-check", str(tmp_path / "kept"))
    assert rank_correlation(tmp_path / "kept") > 0.9


@pytest.mark.parametrize(
    ("arguments", "before"),
    [
        ("--model df-14b-720p", "--model skyreels_v2 --checkpoint df-14b-720p"),
        ("--model 24B_base", "--model magi1 --checkpoint 24B_base"),
        ("--model demo", "--model skyreels_v2"),
        ("--model demo --architecture magi1", "--model magi1"),
    ],
)
def test_the_dry_run_needs_no_weights_and_takes_commands_as_they_were_recorded(
    arguments: str, before: str, capsys: pytest.CaptureFixture[str]
):
    printed: list[str] = []
    for line in (arguments, before):
        assert importlib.import_module("tune").main(["--dry-run", *line.split()]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert re.search(r"memory +[\d.e-]+ [MG]B", printed[0])


def test_the_threshold_of_magcache_computes_as_many_steps_as_asked_for():
    threshold, computed = closest_magcache([1.0] + 7 * [0.9], num_computed=5, warmup_steps=1)
    assert computed == 5, "0, 2, 4, 6 and the last one"
    assert 0.1 < threshold <= 0.1 + 0.19


@pytest.mark.parametrize(("compute_last_step", "want"), [(True, 6), (False, 5)])
def test_the_threshold_that_computes_a_number_of_steps_is_found(compute_last_step: bool, want: int):
    threshold, computed = closest_threshold(
        [[0.1] * 11, [0.1] * 11],
        num_computed=want,
        warmup_steps=2,
        compute_last_step=compute_last_step,
    )
    # of 12 steps 0 1 4 7 10 and perhaps 11: computed where 3 steps have added up
    assert computed == want
    assert 0.2 < threshold <= 0.31


def rank_correlation(folder: Path) -> float:
    """Compare the order of predicted errors with that of the measured ones."""
    kept = json.loads((folder / "measured.json").read_text())
    plain = Calibration.load(folder / "calibration.npz").error_model({"guided": 1.0})
    model = ErrorModel(plain.gram, plain.sigmas, np.array(kept["gains"]))
    predicted = [
        model.plan(row["steps"], Predictor(row["order"], row["factor"])) for row in kept["plans"]
    ]
    measured = [float(np.mean(np.log(row["mse"]))) for row in kept["plans"]]
    assert len(predicted) >= 20
    return float(spearmanr(predicted, measured).statistic)


def test_predicted_errors_are_in_the_order_of_those_measured_on_the_demo():
    assert rank_correlation(GOLDEN / "skyreels_v2") >= 0.9
