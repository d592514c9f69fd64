"""``damping="auto"`` for an exact curvature: the damping whose predicted step lowers the real objective the most.

Influence predicts where training on a part S of the data would have led: from theta by the step

    delta(damping) = -(H + damping I)^-1 grad J_S(theta),       J_S = mean loss over S + the regulariser.

With too little damping the step leaves the region in which the quadratic model holds and J_S rises; with too much it
hardly moves. J_S needs no retraining to be evaluated at theta + delta, so the best damping is looked up: the one with
the lowest J_S(theta + delta(damping)), in the mean over random halves S of the training data. Source: the damping of
Levenberg (1944) and Marquardt (1963), by the objective itself instead of a rule for its ratio to the model's.

Where training stopped before the minimum, such a step is mostly further training, and too little damping lets it. What
stopping early left is a regulariser of its own, so the damping is at least that (see `upweight.curvature.implicit_l2`).

All dampings share one Krylov space (see `upweight.curvature.krylov`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.curvature.exact import ExactCurvature
from upweight.curvature.implicit_l2 import implicit_l2_beside
from upweight.curvature.krylov import KrylovSteps
from upweight.errors import UpweightError
from upweight.gradients.layers import from_parameters, to_parameters
from upweight.task import Task

PAIRS = 2
"""Random halves and their complements that the objective is evaluated on."""
GRID = 10**0.5
"""Ratio of one damping that is tried to the next."""
SPAN = 1e-6, 10.0
"""The least and the largest damping that is tried, as shares of the top eigenvalue."""
LEAST_OF_L2 = 1e-3
"""The damping is at least this share of the regulariser beside it."""
INDEFINITE_MARGIN = 2.0
"""The damping of an indefinite Hessian is at least this many times its most negative eigenvalue."""
DIGITS = 2
"""Significant digits of the result: more would be rounding, and would change with the batch size."""


@dataclass(frozen=True)
class AutoDamping:
    """What was chosen and from what.

    Attributes:
        value: the damping.
        before: the halves' mean objective at the trained parameters.
        tried: {damping: the same after the step}.
        smallest: the smallest eigenvalue met.
        implicit: the regulariser that the trained parameters betray; the damping is at least this.
        examples: training examples in a half.
    """

    value: float
    before: float
    tried: Mapping[float, float]
    smallest: float
    implicit: float
    examples: int

    def summary(self) -> dict[str, Any]:
        """JSON-able, for a result's evidence."""
        return {
            "criterion": f"lowest objective of {2 * PAIRS} random halves after the damped step",
            "damping": self.value,
            "objective_before": self.before,
            "objective_after": {f"{d:.3g}": value for d, value in self.tried.items()},
            "examples_of_a_half": self.examples,
            "smallest_eigenvalue": self.smallest,
            "implicit_l2": self.implicit,
        }


def auto_damping(operator: ExactCurvature) -> AutoDamping:
    """The damping with the lowest objective after the step, on a grid, refined by a parabola in log damping.

    Cost: 32 products of H with four vectors and with two, a forward and backward pass over the training data, and some
    ten forward passes for each half and its complement together.
    """
    implicit = implicit_l2_beside(operator)  # first: two Krylov spaces at a time would be the peak of memory
    objective = Halves(operator)
    steps = KrylovSteps.of(operator, objective.gradients())
    indefinite = -INDEFINITE_MARGIN * min(steps.smallest, 0.0)
    low = max(SPAN[0] * steps.top, LEAST_OF_L2 * operator.l2, indefinite, implicit)
    low = low or 1e-12  # no curvature at all
    if not math.isfinite(steps.top):
        raise UpweightError(
            "damping='auto' finds no curvature, expected losses that are not all zero to rounding -> name a damping"
        )
    tried: dict[float, float] = {}
    for damping in [*_descending(max(SPAN[1] * steps.top, low), low), low]:
        tried[damping] = objective.after(steps.at(damping))
        if min(list(tried.values())[-2:]) > min(tried.values()):  # twice in a row worse than the best
            break
    best = min(tried, key=tried.__getitem__)
    for damping in (best * GRID**0.5, best / GRID**0.5):
        if damping >= low:
            tried[damping] = objective.after(steps.at(damping))
    value = rounded(_refined(tried), low)
    return AutoDamping(value, objective.before, tried, steps.smallest, implicit, objective.size)


def rounded(damping: float, least: float) -> float:
    """To `DIGITS` significant digits, and upwards where it would be less than `least`."""
    found = float(f"{damping:.{DIGITS - 1}e}")
    if found >= least:
        return found
    unit = 10.0 ** (math.floor(math.log10(least)) - DIGITS + 1)
    return float(f"{math.ceil(least / unit) * unit:.{DIGITS - 1}e}")


def _descending(top: float, low: float) -> list[float]:
    """Powers of `GRID` from about `top` down to `low`, the same ones whatever the two are."""
    last = math.ceil(math.log(low, GRID))
    first = max(last, round(math.log(top, GRID)))
    return [GRID**k for k in range(first, last - 1, -1)]


def _refined(tried: Mapping[float, float]) -> float:
    """The minimum, in log damping, of the parabola through the best point and its neighbours; itself at an end."""
    points = sorted(tried)
    k = min(range(len(points)), key=lambda j: tried[points[j]])
    if not 0 < k < len(points) - 1:
        return points[k]
    x, (a, b, c) = [math.log(d) for d in points[k - 1 : k + 2]], [tried[d] for d in points[k - 1 : k + 2]]
    if not (math.isfinite(a) and math.isfinite(c)):
        return points[k]
    left, right = (b - a) / (x[1] - x[0]), (c - b) / (x[2] - x[1])
    bend = (right - left) / (x[2] - x[0])
    return math.exp((x[0] + x[1]) / 2 - left / (2 * bend)) if bend > 0 else points[k]


# The objective of the halves -------------------------------------------------------------------------------------


class Halves:
    """``J_S(theta) = mean loss over S + (1/2) sum_j l2_j theta_j^2`` of random halves S and their complements.

    Attributes:
        size: examples of a half.
        before: the mean of J_S over the halves at the trained parameters.
    """

    def __init__(self, operator: ExactCurvature) -> None:
        self.operator, self.tracker = operator, operator.tracker
        n = operator.examples
        self.size = max(1, n // 2)
        generator = torch.Generator().manual_seed(0)
        weights = torch.zeros(2 * PAIRS, n, dtype=torch.float64)
        for row in range(0, 2 * PAIRS, 2):
            order = torch.randperm(n, generator=generator)
            weights[row, order[: self.size]] = 1
            weights[row + 1, order[-self.size :]] = 1
        self.weights = weights / self.size  # [half, example]
        theta = {name: p.detach()[None] for name, p in self.tracker.parameters.items()}
        self.theta = from_parameters(self.tracker.layers, theta)[0]
        self.losses = PerExampleLoss(self.tracker.task, self.tracker.model)
        self.before = self.after(torch.zeros(self.theta.numel(), 2 * PAIRS))

    def gradients(self) -> Tensor:
        """``grad J_S(theta)`` [p, half], float64."""
        parameters = self.tracker.parameters
        total = torch.zeros(2 * PAIRS, self.theta.numel(), dtype=torch.float64, device=self.theta.device)
        with torch.inference_mode(False), torch.enable_grad():
            for start, stop, batch in self._batches():
                with self.tracker.quietly():
                    losses = self.losses(batch)
                found = []
                for weights in self.weights[:, start:stop].to(losses):
                    g = torch.autograd.grad(
                        losses @ weights, list(parameters.values()), retain_graph=True, allow_unused=True
                    )
                    found.append(
                        [p.new_zeros(p.shape) if x is None else x for x, p in zip(g, parameters.values())]
                    )
                named = {name: torch.stack(rows) for name, rows in zip(parameters, zip(*found, strict=True))}
                total += from_parameters(self.tracker.layers, named)
        return total.T + (self.operator.ridge * self.theta).double()[:, None]

    @torch.no_grad()
    def after(self, steps: Tensor) -> float:
        """The mean of ``J_S(theta - step_S)`` over the halves, for steps [p, half]; infinite where it overflows."""
        total = 0.0
        moved = self.theta - steps.T.to(self.theta)  # [half, p]
        named = to_parameters(self.tracker.layers, moved)
        for start, stop, batch in self._batches():
            for half in range(2 * PAIRS):
                parameters = {f"model.{name}": rows[half] for name, rows in named.items()}
                with self.tracker.quietly():
                    losses = torch.func.functional_call(self.losses, parameters, (batch,))
                total += float(losses.double().cpu() @ self.weights[half, start:stop])
        total += float((moved.double().square() @ self.operator.ridge.double()).sum()) / 2
        return total / (2 * PAIRS) if math.isfinite(total) else math.inf

    def _batches(self) -> Any:
        for rows in self.operator.data.batches(self.operator.batch_size):
            yield rows.start, rows.stop, self.tracker.move(rows.batch)


class PerExampleLoss(nn.Module):
    """A task's training loss as a module of the model, so that it can be evaluated at other parameters."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model
        self.training = model.training

    def forward(self, batch: Any) -> Tensor:
        return self.task.train_loss(self.model, batch)
