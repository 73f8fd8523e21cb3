"""A training that is killed and started again ends with the same weights."""

from pathlib import Path

import pytest
import torch
from closeness import assert_close
from torch import Tensor, nn

from flowcache.demo.optim import Muon, orthogonalize, schedule, split_parameters
from flowcache.demo.trainer import StepRandomness, Trainer, TrainPlan

pytestmark = pytest.mark.numeric

PLAN = TrainPlan(num_steps=12, warmup_steps=2, checkpoint_steps=5)


class KilledError(Exception):
    """Stands for a kill in the middle of a training."""


class Loss:
    """Fits a layer to noise; stops the training before the step `kill_at`."""

    def __init__(self, model: nn.Module, kill_at: int | None = None) -> None:
        self.model, self.kill_at = model, kill_at

    def __call__(self, step: int, randomness: StepRandomness) -> Tensor:
        if step == self.kill_at:
            raise KilledError
        x = torch.randn(16, 4, generator=randomness.torch)
        x = x * float(randomness.numpy.uniform(0.5, 2))
        return (self.model(x) - x.roll(1, -1)).square().mean()


def _trainer(checkpoint: Path) -> tuple[nn.Module, Trainer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))
    matrices, rest = split_parameters(model.named_parameters(), matrices_under=("0", "2"))
    optimizers = [Muon(matrices, 0.05), torch.optim.AdamW(rest, 0.01)]
    return model, Trainer(model, optimizers, plan=PLAN, checkpoint=checkpoint)


def test_a_killed_training_ends_as_one_that_never_was(tmp_path: Path):
    whole, trainer = _trainer(tmp_path / "whole.pt")
    trainer.run(Loss(whole))
    killed, trainer = _trainer(tmp_path / "killed.pt")
    with pytest.raises(KilledError):
        trainer.run(Loss(killed, kill_at=8))
    resumed, trainer = _trainer(tmp_path / "killed.pt")
    trainer.run(Loss(resumed))
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    records = [torch.load(tmp_path / f"{name}.pt") for name in ("whole", "killed")]
    assert records[0]["losses"] == records[1]["losses"]


def test_a_rate_scales_every_step(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    plan = TrainPlan(num_steps=1, warmup_steps=0, average_rate=1.0, grad_clip=1e9, rate=0.25)
    trainer = Trainer(model, [optimizer], plan=plan, checkpoint=tmp_path / "a.pt")
    trainer.run(lambda _step, _randomness: model.weight.sum())
    assert_close(model.weight, before - 0.25, ulps=4)


def test_a_finished_training_is_not_repeated(tmp_path: Path):
    first, trainer = _trainer(tmp_path / "done.pt")
    trainer.run(Loss(first))
    second, trainer = _trainer(tmp_path / "done.pt")
    trainer.run(Loss(second, kill_at=0))
    assert torch.equal(first[0].weight, second[0].weight)


def test_training_lowers_the_loss(tmp_path: Path):
    model, trainer = _trainer(tmp_path / "x.pt")
    trainer.run(Loss(model))
    losses = torch.load(tmp_path / "x.pt")["losses"]
    assert len(losses) == PLAN.num_steps
    assert min(losses[-4:]) < min(losses[:4])


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 16), (2, 16, 4)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape: tuple[int, int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.3
    assert values.max() < 1.3
    # the same singular vectors: the product with the original is symmetric
    product = orthogonalize(matrix) @ matrix.mT
    assert_close(product, product.mT, ulps=256)


def test_muon_moves_a_matrix_by_its_learning_rate():
    weight = nn.Parameter(torch.zeros(6, 6))
    weight.grad = 1e-3 * torch.randn(6, 6, generator=torch.Generator().manual_seed(1))
    Muon([weight], 0.1).step()
    values = torch.linalg.svdvals(weight.detach())
    assert values.max() < 0.13


def test_schedule_follows_its_worked_example():
    factors = [
        schedule(step, num_steps=100, warmup_steps=10, decay_share=0.5)
        for step in (0, 9, 50, 75, 99)
    ]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.02])


def test_only_matrices_under_the_prefix_are_given_to_muon():
    model = nn.ModuleDict({"blocks": nn.Linear(3, 2), "head": nn.Linear(2, 2)})
    matrices, rest = split_parameters(model.named_parameters(), matrices_under=("blocks.",))
    assert [tuple(p.shape) for p in matrices] == [(2, 3)]
    assert [tuple(p.shape) for p in rest] == [(2,), (2, 2), (2,)]
