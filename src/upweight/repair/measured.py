"""What a repair is judged by: the losses it was predicted to change, and what they really did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.second_order import bend
from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.repair.certificate import Certificate, bend_bound, gamma_of
from upweight.repair.change import weights_of, without_weights
from upweight.repair.descent import Descent
from upweight.repair.head import linear_head
from upweight.repair.objective import batch_gradient, losses_of
from upweight.repair.vectors import Vector, combine, dot, norm
from upweight.task import BinaryClassification, Classification, OutputTask, Task

MOST = 2048
"""Examples of a group that are measured: evenly spread, if it has more."""


@dataclass(frozen=True)
class Measured:
    """Losses [n] of a group of examples, and whether each is predicted right, where that means something."""

    losses: Tensor
    correct: Tensor | None


def measure(tracker: Tracker, task: Task, examples: Examples, batch_size: int) -> Measured:
    """The training losses, and which examples are predicted right, at the model's weights."""
    if not isinstance(task, (Classification, BinaryClassification)):
        return Measured(losses_of(tracker, task, examples, batch_size), None)
    losses, correct = [], []
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        with torch.no_grad(), tracker.quietly():
            outputs, targets = task.forward(tracker.model, tracker.move(rows.batch))
            losses.append(task.loss(outputs, targets).double().cpu())
            correct.append(right(task, outputs, targets).cpu())
    return Measured(torch.cat(losses), torch.cat(correct))


def right(task: Task, outputs: Tensor, targets: Tensor) -> Tensor:
    """Whether the most likely class is the target, bool [batch]."""
    if isinstance(task, BinaryClassification):
        return (outputs > 0) == (targets > 0.5)
    return outputs.argmax(1) == targets


def predicted_change(
    tracker: Tracker, task: Task, examples: Examples, u: Mapping[str, Tensor], batch_size: int
) -> dict[str, float | None]:
    """The mean loss's change along u, from the model's weights: first order, and with its own bend.

    ``bend`` is None for a model that cannot be differentiated twice.
    """
    first, second = 0.0, 0.0
    bends = True
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        _, found = batch_gradient(tracker, task, rows.batch, examples.ids[rows.start : rows.stop])
        first += dot(found, {name: u[name] for name in found})
        if not bends:
            continue
        batch = tracker.move(rows.batch)

        def total(model: nn.Module, batch: Any = batch) -> Tensor:
            return task.train_loss(model, batch).sum()[None]

        try:
            second += float(bend(tracker, total, dict(u)))
        except RuntimeError:  # an operation without a second derivative
            bends = False
    n = examples.n
    return {"first_order": first / n, "predicted": (first + second) / n if bends else None}


def group_evidence(before: Measured, after: Measured, predicted: Mapping[str, float | None], of: int) -> dict:
    """Losses and accuracies of one group of examples before and after, and what was predicted."""
    n = len(before.losses)
    found: dict[str, Any] = {
        "n": n,
        "of": of,
        "loss_before": float(before.losses.mean()),
        "loss_after": float(after.losses.mean()),
        "actual": float((after.losses - before.losses).mean()),
        **predicted,
    }
    if before.correct is not None and after.correct is not None:
        found["accuracy_before"] = float(before.correct.double().mean())
        found["accuracy_after"] = float(after.correct.double().mean())
    return found


def parameter_evidence(start: Vector, end: Vector) -> dict[str, float]:
    """How far the parameters moved."""
    moved, size = norm(combine(end, start, -1)), norm(start)
    return {"moved": moved, "norm": size, "relative": moved / size if size else float("nan")}


def kept_buffers(model: nn.Module) -> list[str]:
    """Buffers, such as BatchNorm's statistics, which a repair keeps as training left them."""
    return [name for name, b in model.named_buffers() if b.is_floating_point()]


def certificate(descent: Descent, task: Task, batch_size: int) -> Certificate | None:
    """The bound on the changed objective's gradient, where the model is one linear layer; else None.

    Args:
        descent: after its last step.
        task: of the data without weights.
        batch_size: examples a pass.
    """
    objective = descent.objective
    tracker, gamma = objective.tracker, gamma_of(task)
    if gamma is None or not isinstance(task, OutputTask):
        return None
    after, examples = descent.here(), without_weights(objective.examples)
    found = linear_head(tracker, task, examples, batch_size, (descent.last, after))
    if found is None:
        return None
    measured = norm(objective.gradient())
    descent.place(descent.last)
    try:
        gradient = objective.gradient()
        u = combine(after, descent.last, -1)
        inputs, targets = found.examples.take(range(examples.n))
        named = {found.parameter(name): v for name, v in u.items()}
        with torch.no_grad():
            outputs, _ = task.check_outputs(found.module(inputs), targets)
        x = inputs.double()
        moved = x @ named["weight"].mT if "weight" in named else x.new_zeros(len(x), len(named["bias"]))
        if "bias" in named:
            moved = moved + named["bias"]
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        weights = weights_of(objective.examples)
        w = torch.ones_like(x[:, 0]) if weights is None else weights.to(x)
        root = task.hessian_root(outputs).double()  # [n, outputs, columns]
        terms = float((w * _slopes(task, outputs, targets).norm(dim=1) * x.norm(dim=1)).sum())
        penalty = objective.penalty_gradient()
        bent = torch.einsum("noc,nc->no", root, torch.einsum("noc,no->nc", root, moved)) * w[:, None]
        product = {"weight": bent.mT @ inputs.double(), "bias": bent.sum(0)}
        left = {
            name: gradient[name]
            + product[found.parameter(name)] / objective.divisor
            + objective.l2[name] * u[name]
            for name in u
        }
        solved, curved = norm(left), bend_bound(x, moved, w, gamma, objective.divisor)
    finally:
        descent.place(after)
    # Sums of n gradients in the model's precision, before and after: the formula is of exact arithmetic.
    rounding = 16 * torch.finfo(tracker.dtype).eps * (terms / objective.divisor + norm(penalty))
    return Certificate(solved + curved + rounding, measured, solved, curved, gamma, objective.divisor)


@torch.inference_mode(False)
@torch.enable_grad()
def _slopes(task: OutputTask, outputs: Tensor, targets: Tensor) -> Tensor:
    """``dl/dz`` [n, outputs] of every example, float64."""
    z = outputs.detach().double().requires_grad_(True)
    outputs, targets = task.check_outputs(z, targets)
    return torch.autograd.grad(task.loss(outputs, targets).sum(), z)[0].reshape(len(z), -1)
