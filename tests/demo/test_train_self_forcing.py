"""The Self-Forcing recipe: its passes are those of a video, and it exports the released layout."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from closeness import assert_close
from torch import Tensor

from flowcache.demo.causal_wan import CausalPlan, CleanFrames, StudentLoss, TeacherLoss
from flowcache.demo.latents import LatentBank
from flowcache.demo.recipe import Training
from flowcache.demo.trainer import TrainPlan, step_randomness
from flowcache.runtime.model import Request
from flowcache.runtime.parallel import Ranks
from flowcache.runtime.run import encode_inputs, load_networks, prepare
from flowcache.runtime.stats import RunStats
from flowcache.wan import text, vae
from flowcache.wan.cached import CachedDiT, open_branches
from flowcache.wan.dit import DiT
from flowcache.wan.unipc import UniPC
from self_forcing import demo
from self_forcing.model import MODEL

pytestmark = pytest.mark.numeric

CAPTIONS = ["a red circle moving right on a black background", "a blue square moving up on a gray"]
SMALL = CausalPlan(num_frames=6, batch_frames=12, solver_steps=4)
CHUNKS = [range(3), range(3, 6)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dit() -> DiT:
    return demo.new_dit().requires_grad_(False)


@pytest.fixture(scope="module")
def words() -> Tensor:
    return demo.load_encoder().encode(CAPTIONS)


@pytest.fixture(scope="module")
def bank() -> LatentBank:
    generator = torch.Generator().manual_seed(0)
    return LatentBank(
        torch.randn(8, 16, 7, 8, 8, generator=generator).half(), CAPTIONS * 4, torch.arange(8) < 6
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_loss(dit: DiT, bank: LatentBank, plan: CausalPlan = SMALL) -> StudentLoss:
    return StudentLoss(dit, dit, bank, demo.load_encoder().encode, plan=plan)


# Passes -------------------------------------------------------------------------------------------


def test_training_starts_from_what_the_base_computes_at_its_frame_rate(dit: DiT, words: Tensor):
    base = demo.find_base().dit.load(dtype=torch.float32, device="cpu")
    x, t = noise(2, 16, 6, 8, 8), torch.tensor([[0.0, 0, 0, 700, 700, 700]] * 2)
    bounds = [(0, 3), (3, 6)]
    with torch.no_grad():
        expected = base(x, t, words, fps=[24, 24], causal_chunks=bounds)
        found = dit(x, t, words, causal_chunks=bounds)
    assert expected.std() > 0.1
    assert_close(found, expected, ulps=64)


def test_all_chunks_at_once_are_the_chunks_of_a_video(dit: DiT, words: Tensor):
    """The teacher-forcing mask against the cache that videos are made with."""
    clean, x = noise(2, 16, 6, 8, 8), noise(2, 16, 6, 8, 8, seed=1)
    sigma = torch.tensor([[0.9] * 3 + [0.4] * 3] * 2)
    with torch.no_grad():
        frames = CleanFrames(dit, words)
        frames.feed(clean, CHUNKS)
        found = frames.velocity(x, sigma, CHUNKS)
        for clip, own_words in enumerate(words.split(1)):
            cached = cached_of(dit, own_words)
            for number, chunk in enumerate(CHUNKS):
                own = slice(chunk.start, chunk.stop)
                times = [1000 * float(sigma[clip, chunk.start])] * 3
                made = cached.velocities(x[clip, :, own], times, frames=chunk)["cond"]
                assert_close(found[clip, :, own], made, ulps=64)
                cached.feed(clean[clip, :, own], [0] * 3, frames=chunk, chunk=number)


def cached_of(dit: DiT, words: Tensor) -> CachedDiT:
    stats, ranks = RunStats(CPU), Ranks()
    branches = open_branches(
        dit, {"cond": words}, stats=stats, ranks=ranks, kv_tokens=96, on_host=False
    )
    return CachedDiT(dit, branches, stats=stats, ranks=ranks, size=(8, 8), num_chunks=2)


def test_the_students_clips_are_the_videos_of_its_loop(bank: LatentBank, self_forcing_demo: Path):
    """The same noise through training's roll-out and through the model's own loop."""
    settings = ["num_frames=21", f"prompt={CAPTIONS[0]}", "precision=float32"]
    job = prepare(MODEL, Request("self_forcing", str(self_forcing_demo), settings, "x.mp4"))
    stats = RunStats(CPU)
    networks, inputs = load_networks(job, stats=stats), encode_inputs(job, stats=stats)
    generator = torch.Generator().manual_seed(5)
    steps = [torch.randn(1, 16, 3, 8, 8, generator=generator) for _ in range(8)]

    # the first noise of both chunks, then that of each later step
    order = iter([torch.cat([steps[0], steps[4]], dim=2), *steps[1:4], *steps[5:]])

    def draw(_shape: tuple[int, ...], _dtype: torch.dtype) -> Tensor:
        return next(order)[0].movedim(0, 1)

    shown = MODEL.generate(
        networks.dit, networks.vae, job.config, inputs, stats=stats, work=job.work, draw=draw
    )
    pixels = torch.cat([p.frames for p in shown if p.frames is not None], dim=1)
    assert next(order, None) is None, "all noise was drawn"
    with torch.no_grad():
        made = student_loss(networks.dit, bank).roll_out(
            torch.zeros(1, 16, 6, 8, 8),
            demo.load_encoder().encode(CAPTIONS[:1]),
            CHUNKS,
            num_given=0,
            generator=torch.Generator().manual_seed(5),
        )
        expected = networks.vae.decode(made)[0]
    assert expected.std() > 0.1
    assert (pixels - expected).abs().max() < 1e-3


def test_given_chunks_stay_in_a_roll_out(dit: DiT, bank: LatentBank, words: Tensor):
    data = noise(2, 16, 6, 8, 8)
    with torch.no_grad():
        made = student_loss(dit, bank).roll_out(
            data, words, CHUNKS, num_given=1, generator=torch.Generator().manual_seed(0)
        )
    assert torch.equal(made[:, :, :3], data[:, :, :3])
    assert not torch.equal(made[:, :, 3:], data[:, :, 3:])


def test_the_teachers_ends_are_those_of_its_guided_solver(dit: DiT, bank: LatentBank):
    """By the product's cache, a clip and a chunk at a time."""
    loss, encode = student_loss(dit, bank), demo.load_encoder().encode
    clean, start = noise(2, 16, 6, 8, 8), noise(2, 16, 6, 8, 8, seed=1)
    with torch.no_grad():
        states, ends = loss.solve(clean, start, CAPTIONS, CHUNKS)
        passes = [cached_of(dit, encode([text])) for text in (CAPTIONS[1], "")]
        for number, chunk in enumerate(CHUNKS):
            own, solver = slice(chunk.start, chunk.stop), UniPC(4, shift=5.0)
            x = start[1, :, own]
            for step, sigma in enumerate(solver.grid.sigmas[:-1]):
                assert_close(states[step][1][1, :, own], x, ulps=512)
                cond, uncond = (
                    each.velocities(x, [1000 * sigma] * 3, frames=chunk)["cond"] for each in passes
                )
                x = solver.step(uncond + SMALL.guidance * (cond - uncond), sample=x)
            assert_close(ends[1, :, own], x, ulps=2048)
            for each in passes:
                each.feed(clean[1, :, own], [0] * 3, frames=chunk, chunk=number)
    assert [sigma for sigma, _ in states] == pytest.approx([1, 0.9375, 0.8333, 0.625], abs=1e-3)


def test_a_student_that_says_the_teachers_ends_has_no_loss(dit: DiT, bank: LatentBank):
    """With one solver step the end is what the first velocity points to."""
    plan = replace(SMALL, solver_steps=1, student_steps=1, guidance=1.0)
    loss = student_loss(dit, bank, plan)
    assert float(loss(0, step_randomness(0, 0))) < 1e-9
    assert float(student_loss(dit, bank)(0, step_randomness(0, 0))) > 1e-4


def test_windows_are_whole_chunks_of_either_size(bank: LatentBank):
    plan = replace(SMALL, late_share=1.0)
    rng = np.random.default_rng(0)
    drawn = [plan.draw(rng) for _ in range(60)]
    assert {len(chunks[0]) for chunks in drawn} == {1, 3}
    assert all(len(chunks) >= 2 and chunks[-1].stop <= 6 for chunks in drawn)
    x, captions = plan.batch(bank, rng, CHUNKS)
    assert x.shape == (2, 16, 6, 8, 8)
    assert captions == ["", ""], "nothing is said of what has turned since"
    assert set(replace(plan, late_share=0.0).batch(bank, rng, CHUNKS)[1]) <= {*CAPTIONS}
    firsts = {plan.batch(bank, rng, CHUNKS)[0][0, 0, 0, 0, 0].item() for _ in range(40)}
    assert len(firsts & {*bank.latents[:, 0, 1, 0, 0].float().tolist()}) > 0


# Stages -------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path, bank: LatentBank, monkeypatch: pytest.MonkeyPatch) -> Training:
    """A training whose clips are encoded: random latents; its plan is small."""
    monkeypatch.setattr(demo, "PLAN", SMALL)
    return begun(tmp_path / "a", bank, steps=4)


def begun(out: Path, bank: LatentBank, *, steps: int) -> Training:
    (out / "latents").mkdir(parents=True)
    shard = {
        "latents": bank.latents,
        "captions": bank.captions,
        "is_beginning": bank.is_beginning,
    }
    torch.save(shard, out / "latents/latents-0000.pt")
    (out / "statistics.json").write_text(json.dumps({"mean": [0.0] * 16, "std": [1.0] * 16}))
    return Training(out, 1, len(bank.captions), {"dit": steps, "distill": steps})


class StoppedError(Exception):
    """A training was killed."""


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_weights(
    training: Training, tmp_path: Path, bank: LatentBank, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(demo, "TrainPlan", partial(TrainPlan, checkpoint_steps=2))
    whole = demo.distill(training)
    other = begun(tmp_path / "b", bank, steps=4)
    for stage, kind in (("dit", TeacherLoss), ("distill", StudentLoss)):
        run = kind.__call__

        def stop(self: Any, step: int, randomness: Any, run: Any = run) -> Tensor:
            if step == 3:
                raise StoppedError
            return run(self, step, randomness)

        monkeypatch.setattr(kind, "__call__", stop)
        with pytest.raises(StoppedError):
            demo.distill(other)
        assert torch.load(other.checkpoint(stage), weights_only=True)["step"] == 2
        monkeypatch.setattr(kind, "__call__", run)
    again = demo.distill(other).state_dict()
    assert all(torch.equal(value, again[key]) for key, value in whole.state_dict().items())
    key, start = "blocks.0.ffn.0.weight", demo.new_dit().state_dict()
    assert not torch.equal(again[key], start[key])


@pytest.mark.slow
def test_teacher_and_student_learn(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a bank that holds one clip; the loss is that of one step, before and after."""
    monkeypatch.setattr(demo, "TrainPlan", partial(TrainPlan, average_rate=0.3))
    clip = noise(1, 16, 1, 8, 8, seed=7).expand(8, -1, 7, -1, -1).half()
    bank = LatentBank(clip, CAPTIONS * 4, torch.ones(8, dtype=torch.bool))
    encode = demo.load_encoder().encode
    training = begun(tmp_path / "b", bank, steps=25)

    def of(loss: Any) -> float:
        with torch.no_grad():
            return float(loss(0, step_randomness(9, 9)))

    before, teacher, student = demo.new_dit(), demo.train_teacher(training), demo.distill(training)
    taught, untaught = (of(TeacherLoss(dit, bank, encode, plan=SMALL)) for dit in (teacher, before))
    assert taught < 0.8 * untaught
    distilled, copied = (
        of(StudentLoss(dit, teacher, bank, encode, plan=SMALL)) for dit in (student, teacher)
    )
    assert distilled < 0.9 * copied


def test_a_training_can_begin_with_the_weights_of_a_checkpoint(
    training: Training, self_forcing_demo: Path
):
    training = replace(training, start=self_forcing_demo, steps={"dit": 0, "distill": 0})
    for made, path, name in (
        (demo.train_teacher(training), demo.TEACHER, "generator"),
        (demo.distill(training), demo.STUDENT, "generator_ema"),
    ):
        kept = torch.load(self_forcing_demo / path, weights_only=True)[name]
        assert all(
            torch.equal(value, kept[f"model.{key}"].float())
            for key, value in made.state_dict().items()
        )


def test_a_training_does_not_go_on_with_another_base(
    training: Training, capsys: pytest.CaptureFixture[str], load_script: Callable[..., ModuleType]
):
    (training.out / "base.json").write_text('{"vae": "another"}')
    line = [
        "--model",
        "self_forcing",
        "--out",
        str(training.out),
        "--stage",
        "dit",
        "--dit-steps",
        "1",
    ]
    assert load_script("train_demo").main(line) == 2
    assert "was begun with another demo" in capsys.readouterr().err


# Files --------------------------------------------------------------------------------------------


def test_the_export_is_the_released_layout(self_forcing_demo: Path):
    wanted = {
        *("config.json", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"),
        *("checkpoints/self_forcing_dmd.pt", "checkpoints/ar_diffusion.pt"),
        *("google/umt5-xxl/tokenizer.json", "google/umt5-xxl/tokenizer_config.json"),
    }
    files = [path for path in self_forcing_demo.rglob("*") if path.is_file()]
    names = {path.relative_to(self_forcing_demo).as_posix() for path in files}
    assert {name for name in names if not name.startswith("presets/")} == wanted
    assert sum(path.stat().st_size for path in files) < 12e6
    for path, copy in ((demo.STUDENT, "generator_ema"), (demo.TEACHER, "generator")):
        (held,) = torch.load(self_forcing_demo / path, weights_only=True).items()
        assert held[0] == copy
        assert all(key.startswith("model.") for key in held[1])
        assert {value.dtype for value in held[1].values()} == {torch.float16}


def test_the_exported_vae_and_text_encoder_are_the_bases(self_forcing_demo: Path):
    base = demo.find_base()
    theirs = vae.load(base.vae, device="cpu")
    ours = vae.load(self_forcing_demo / "Wan2.1_VAE.pth", device="cpu")
    assert not torch.equal(ours.mean, theirs.mean)
    x = noise(1, 3, 9, 64, 64).clamp(-1, 1)
    latents = theirs.encode(x)
    assert (ours.encode(x) - latents).abs().max() < 0.02
    assert (ours.decode(latents) - theirs.decode(latents)).abs().max() < 0.02
    encoder = text.load_encoder(
        self_forcing_demo / "models_t5_umt5-xxl-enc-bf16.pth",
        tokenizer=self_forcing_demo / "google/umt5-xxl",
        text_len=24,
        dtype=torch.float32,
        device="cpu",
    )
    expected = demo.load_encoder().encode(CAPTIONS)
    assert (encoder.encode(CAPTIONS) - expected).abs().max() < 0.01


def test_presets_of_many_steps_take_the_teacher_and_kept_ones_stay(self_forcing_demo: Path):
    chosen = {
        preset: prepare(
            MODEL, Request(preset, str(self_forcing_demo), ["prompt=a"], "x.mp4")
        ).config
        for preset in ("self_forcing", "ar_teacache", "causal_forcing_framewise", "long")
    }
    assert {name: config.checkpoint for name, config in chosen.items()} == {
        "self_forcing": demo.STUDENT,
        "ar_teacache": demo.TEACHER,
        "causal_forcing_framewise": demo.STUDENT,
        "long": demo.STUDENT,
    }
    assert (chosen["ar_teacache"].scale, chosen["ar_teacache"].num_steps) == (4, 30)
    kept = self_forcing_demo / "presets/base.yaml"
    before = kept.read_text()
    try:
        kept.write_text(before + "seed: 1\n")
        demo.write_presets(self_forcing_demo)
        assert kept.read_text().endswith("seed: 1\n")
    finally:
        kept.write_text(before)
