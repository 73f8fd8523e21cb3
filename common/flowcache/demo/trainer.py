"""A training loop that can be killed at any moment and then goes on as if nothing had happened.

Everything random in a step is drawn from (seed, step), so the only state is what the checkpoint
holds: weights, averaged weights, optimizers, step, seconds, and the record of losses.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowcache.demo.optim import schedule

logger = logging.getLogger(__name__)
_LOG_EVERY = 20


@dataclass(frozen=True)
class TrainPlan:
    """How long and how carefully to train.

    Attributes:
        num_steps: optimizer steps in all.
        warmup_steps: steps over which the learning rates rise.
        decay_share: share of the steps, at the end, over which they fall to zero.
        average_rate: share of the new weights in the running average, per step.
        grad_clip: largest norm of all gradients together.
        checkpoint_steps: steps between two checkpoints.
        rate: factor on the learning rates.
        seed: what the randomness of every step is drawn from.
    """

    num_steps: int
    warmup_steps: int = 50
    decay_share: float = 0.4
    average_rate: float = 0.01
    grad_clip: float = 1.0
    checkpoint_steps: int = 100
    rate: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class StepRandomness:
    """The random streams of one step: numpy for clips and choices, torch for noise."""

    numpy: np.random.Generator
    torch: torch.Generator


Loss = Callable[[int, StepRandomness], Tensor]


def step_randomness(seed: int, step: int) -> StepRandomness:
    """Make the streams of a step; the same (seed, step) gives the same numbers."""
    rng = np.random.default_rng((seed, step))
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    return StepRandomness(rng, generator)


class Trainer:
    """One training: what it changes, what it has reached, and where it keeps that.

    Args:
        module: everything that is trained.
        optimizers: they share the plan's schedule, each group from its own learning rate.
        plan: see `TrainPlan`.
        checkpoint: file to go on from, if it exists, and to write.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        plan: TrainPlan,
        checkpoint: Path,
    ) -> None:
        self._module, self._optimizers = module, optimizers
        self._plan, self._checkpoint = plan, checkpoint
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self._rates = [group["lr"] for group in groups]
        self._average = {name: value.clone() for name, value in module.state_dict().items()}
        self._step, self._seconds = 0, 0.0
        self._losses: list[float] = []
        if checkpoint.exists():
            self._load()

    def run(self, loss: Loss) -> None:
        """Train to the plan's last step; then the module holds the averaged weights.

        Args:
            loss: the loss of a step, from the step's number and its random streams.
        """
        while self._step < self._plan.num_steps:
            start = time.monotonic()
            self._train_step(loss)
            self._seconds += time.monotonic() - start
            if self._step % _LOG_EVERY == 0:
                self._log()
            is_last = self._step == self._plan.num_steps
            if is_last or self._step % self._plan.checkpoint_steps == 0:
                self._save()
        self._module.load_state_dict(self._average)

    def _train_step(self, loss: Loss) -> None:
        factor = schedule(
            self._step,
            num_steps=self._plan.num_steps,
            warmup_steps=self._plan.warmup_steps,
            decay_share=self._plan.decay_share,
        )
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self._rates, strict=True):
            group["lr"] = rate * self._plan.rate * factor
        value = loss(self._step, step_randomness(self._plan.seed, self._step))
        self._module.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(self._module.parameters(), self._plan.grad_clip)
        for optimizer in self._optimizers:
            optimizer.step()
        self._step += 1
        # At first a plain mean, so that the untrained weights are soon forgotten.
        self._update_average(max(self._plan.average_rate, 1 / self._step))
        self._losses.append(float(value.detach()))

    @torch.no_grad()
    def _update_average(self, rate: float) -> None:
        for name, value in self._module.state_dict().items():
            if value.is_floating_point():
                self._average[name].lerp_(value, rate)
            else:
                self._average[name].copy_(value)

    def _save(self) -> None:
        state = {
            "module": self._module.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "average": self._average,
            "step": self._step,
            "seconds": self._seconds,
            "losses": self._losses,
        }
        save_atomically(state, self._checkpoint)

    def _load(self) -> None:
        saved = torch.load(self._checkpoint, weights_only=True)
        self._module.load_state_dict(saved["module"])
        for optimizer, state in zip(self._optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._average, self._step = saved["average"], saved["step"]
        self._seconds, self._losses = saved["seconds"], saved["losses"]
        logger.info("%s: going on from step %d", self._checkpoint.name, self._step)

    def _log(self) -> None:
        recent = self._losses[-_LOG_EVERY:]
        logger.info(
            "%s step %d/%d loss %.4f, %.0f s (%.2f s per step)",
            self._checkpoint.stem,
            self._step,
            self._plan.num_steps,
            sum(recent) / len(recent),
            self._seconds,
            self._seconds / self._step,
        )


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write a file in one step, so that a kill leaves the old one or the new."""
    temporary = path.with_name(path.name + ".part")
    torch.save(state, temporary)
    temporary.replace(path)
