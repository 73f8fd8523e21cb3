"""Optimizers of the demo's training: Muon for matrices, and a schedule for all of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

# Coefficients of the quintic iteration. Source: K. Jordan, "Muon", 2024.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_NUM_ITERATIONS = 5


def orthogonalize(matrix_NRC: Tensor) -> Tensor:
    """Move the singular values of each matrix near 1 (0.7 to 1.2) and keep its singular vectors.

    Five Newton-Schulz steps X <- a X + (b A + c A^2) X with A = X X^T. Works in the dtype given:
    float32 on a CPU without bfloat16 arithmetic is several times faster than bfloat16.

    Args:
        matrix_NRC: a batch of matrices, `[N, rows, columns]`.

    Source: K. Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = _QUINTIC
    is_tall = matrix_NRC.shape[-2] > matrix_NRC.shape[-1]
    x = matrix_NRC.mT if is_tall else matrix_NRC
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised; convolution kernels count as matrices out x rest.

    Matrices of the same shape are orthogonalised in one batch, which is what makes it cheap for the
    many small matrices of a tiny model (torch.optim.Muon takes them one by one, in bfloat16).

    Args:
        params: parameters with at least two axes.
        lr: length of a step; the update of an `[R, C]` matrix is scaled by sqrt(max(1, R / C)).
        momentum: share of the running gradient kept per step (Nesterov).
        weight_decay: share of the weight removed per step and unit of `lr`.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    by_shape[param.shape[0], param[0].numel()].append(param)
            for shape, params in by_shape.items():
                self._step_shape(shape, params, group)

    def _step_shape(self, shape: tuple[int, int], params: list[Tensor], group: dict) -> None:
        directions = []
        for param in params:
            assert param.grad is not None
            state = self.state[param]
            if not state:
                state["running"] = torch.zeros_like(param)
            running = state["running"].lerp_(param.grad, 1 - group["momentum"])
            directions.append(param.grad.lerp(running, group["momentum"]).reshape(shape))
        updates = orthogonalize(torch.stack(directions))
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        for param, update in zip(params, updates, strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"])
            param.add_(update.reshape(param.shape), alpha=-group["lr"] * scale)


def split_parameters(
    named: Iterable[tuple[str, nn.Parameter]], *, matrices_under: tuple[str, ...]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Sort parameters into matrices (weights under one of the given prefixes) and the rest."""
    matrices, rest = [], []
    for name, param in named:
        is_matrix = name.endswith("weight") and param.ndim >= 2 and min(param.shape[:2]) > 1
        (matrices if is_matrix and name.startswith(matrices_under) else rest).append(param)
    return matrices, rest


def new_optimizers(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    matrices_under: tuple[str, ...],
    matrix_rate: float,
    rate: float,
    others: Sequence[tuple[list[nn.Parameter], float]] = (),
) -> list[torch.optim.Optimizer]:
    """Make Muon for matrices and AdamW for everything else, in this order.

    Args:
        named: parameters by name.
        matrices_under: prefixes of the matrices' names, see `split_parameters`.
        matrix_rate: learning rate of the matrices.
        rate: learning rate of the rest.
        others: further groups for AdamW, each with its learning rate.
    """
    matrices, rest = split_parameters(named, matrices_under=matrices_under)
    groups = [{"params": params, "lr": each} for params, each in [(rest, rate), *others]]
    return [
        Muon(matrices, matrix_rate),
        torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0),
    ]


def schedule(step: int, *, num_steps: int, warmup_steps: int, decay_share: float) -> float:
    """Give the factor on the learning rates: up linearly, flat, then linearly down to near zero.

    Example: with 100 steps, 10 of warm-up and a decay share of 0.5 the factor is 0.1 at step 0,
    1 at steps 9 to 50, 0.5 at step 75 and 0.02 at step 99.
    """
    up = (step + 1) / max(1, warmup_steps)
    down = (num_steps - step) / max(1.0, decay_share * num_steps)
    return min(1.0, up, down)
