"""The objective of a training set at whatever weights the model has now: value, gradient, losses one by one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.l2 import L2, check_l2, l2_vector
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.layers import to_parameters
from upweight.repair.change import selected
from upweight.repair.vectors import Vector
from upweight.task import Task

Values = Mapping[str, Tensor]


class Objective:
    """``J(theta) = (1/N) sum_i w_i l_i(theta) + (1/2) sum_j l2_j theta_j^2`` at the tracked parameters as they are.

    Args:
        tracker: of the model, whose tracked parameters are theta.
        task: gives the losses (times weights, where the data carries them).
        examples: the training data.
        divisor: N.
        l2: {parameter name: coefficients, of its shape}.
        batch_size: examples a pass.
    """

    def __init__(
        self, tracker: Tracker, task: Task, examples: Examples, divisor: float, l2: Values, batch_size: int
    ) -> None:
        self.tracker, self.task, self.examples = tracker, task, examples
        self.divisor, self.l2, self.batch_size = divisor, l2, batch_size

    def value(self) -> float:
        """J."""
        return float(self.losses().sum()) / self.divisor + self.penalty()

    def losses(self) -> Tensor:
        """``w_i l_i`` [n], float64, on the CPU."""
        return losses_of(self.tracker, self.task, self.examples, self.batch_size)

    def penalty(self) -> float:
        """The regulariser."""
        return math.fsum(
            float((c * self.tracker.parameters[name].detach().double().square()).sum()) / 2
            for name, c in self.l2.items()
        )

    def penalty_gradient(self) -> Vector:
        """Its gradient."""
        return {name: c * self.tracker.parameters[name].detach().double() for name, c in self.l2.items()}

    def gradient(self) -> Vector:
        """The gradient of J."""
        return self.value_and_gradient()[1]

    def value_and_gradient(self) -> tuple[float, Vector]:
        """J and its gradient, in one pass."""
        loss, total = summed_gradient(self.tracker, self.task, self.examples, self.batch_size)
        penalty = self.penalty_gradient()
        gradient = {name: g / self.divisor + penalty[name] for name, g in total.items()}
        return loss / self.divisor + self.penalty(), gradient

    def sample(self, most: int, seed: int) -> Objective:
        """The same on at most so many of the examples, drawn by the seed: an estimate of J, without bias."""
        n = self.examples.n
        if n <= most:
            return self
        drawn = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:most].sort().values
        few, share = selected(self.examples, drawn.numpy()), most / n
        return Objective(self.tracker, self.task, few, share * self.divisor, self.l2, self.batch_size)


def summed_gradient(
    tracker: Tracker, task: Task, examples: Examples, batch_size: int
) -> tuple[float, Vector]:
    """``sum_i l_i`` and its gradient: summed in the model's precision within a batch, in float64 over batches."""
    value = 0.0
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in tracker.parameters.items()}
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        losses, found = batch_gradient(tracker, task, rows.batch, examples.ids[rows.start : rows.stop])
        value += float(losses.double().sum())
        for name, g in found.items():
            total[name] += g
    return value, total


@torch.inference_mode(False)
@torch.enable_grad()
def batch_gradient(
    tracker: Tracker, task: Task, batch: Any, ids: Sequence[Any]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses [batch], and the gradient of their sum, for the parameters that they depend on."""
    batch = tracker.move(batch)
    task.check_targets(batch, ids, tracker.output_shape)
    with tracker.quietly():
        losses = task.train_loss(tracker.model, batch)
    parameters = tracker.parameters
    found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
    named = {name: g for name, g in zip(parameters, found) if g is not None}
    for name, g in named.items():
        if not bool(torch.isfinite(g).all()):
            raise UpweightError(
                f"the training objective's gradient in {name} is not finite -> look for exploding losses, or use a "
                "smaller step_size="
            )
    return losses.detach(), named


def losses_of(tracker: Tracker, task: Task, examples: Examples, batch_size: int) -> Tensor:
    """Training losses [n], float64, on the CPU."""
    parts = []
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        with torch.no_grad(), tracker.quietly():
            parts.append(task.train_loss(tracker.model, tracker.move(rows.batch)).double().cpu())
    return torch.cat(parts)


def by_parameter(l2: L2, tracker: Tracker) -> Vector:
    """A regulariser as coefficients {parameter name: tensor of its shape}, float64."""
    check_l2(l2)
    flat = l2_vector(l2, tracker).double()
    return {name: c[0] for name, c in to_parameters(tracker.layers, flat[None]).items()}
