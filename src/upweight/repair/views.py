"""What models say, and how far apart that is: of the model before, of the repaired one, and of those retrained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._trees import map_tensors
from upweight.data import Examples
from upweight.repair.change import Change, selected
from upweight.repair.measured import MOST, right
from upweight.repair.membership import membership_auroc
from upweight.task import BinaryClassification, Classification, OutputTask, Task

BATCH = 512


@dataclass(frozen=True)
class View:
    """One model's parameters, its predictions on the test data, and losses and accuracies of groups of examples."""

    parameters: Tensor
    predictions: Tensor
    losses: dict[str, Tensor]
    accuracy: dict[str, float]

    @property
    def loss(self) -> dict[str, float]:
        """Mean losses."""
        return {name: float(losses.mean()) for name, losses in self.losses.items()}


class Views:
    """Looks at models on the test data and on the groups of the training data that a change makes."""

    def __init__(self, task: Task, examples: Examples, test: Examples, change: Change) -> None:
        self.task = task
        self.groups = {"test": test}
        retained = change.untouched
        if retained:
            step = max(1, -(-len(retained) // MOST))
            self.groups["retained"] = selected(examples, retained[::step])
        for name, positions in change.groups.items():
            self.groups[name] = selected(examples, sorted(positions), change.labels)

    @property
    def words(self) -> str:
        """What the distance of predictions is."""
        if isinstance(self.task, (Classification, BinaryClassification)):
            return "mean total variation distance of predicted distributions"
        return (
            "mean absolute difference of outputs"
            if isinstance(self.task, OutputTask)
            else "mean |difference of losses|"
        )

    def gap(self, a: Tensor, b: Tensor) -> float:
        """The mean distance of predictions [test, outputs]."""
        share = 0.5 if isinstance(self.task, Classification) else 1.0
        return float(share * (a - b).abs().flatten(1).sum(1).mean())

    @torch.no_grad()
    def of(self, model: nn.Module) -> View:
        """What a model says, in eval mode."""
        trained = model.training
        model.eval()
        try:
            losses, accuracy, predictions = {}, {}, torch.zeros(0)
            for name, data in self.groups.items():
                found = [
                    self._batch(model, rows.batch)
                    for rows in data.batches(data.preferred_batch_size or BATCH)
                ]
                losses[name] = torch.cat([loss for loss, _, _ in found])
                if found[0][1] is not None:
                    accuracy[name] = float(
                        torch.cat([r for _, r, _ in found if r is not None]).double().mean()
                    )
                if name == "test":
                    predictions = torch.cat([p for _, _, p in found])
        finally:
            model.train(trained)
        flat = torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])
        return View(flat, predictions, losses, accuracy)

    def _batch(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        first = next(model.parameters())
        real = first.dtype in (torch.float32, torch.float64)
        batch = map_tensors(
            batch, lambda t: t.to(first.device, first.dtype if real and t.is_floating_point() else t.dtype)
        )
        if not isinstance(self.task, OutputTask):
            losses = self.task.train_loss(model, batch).double().cpu()
            return losses, None, losses[:, None]
        outputs, targets = self.task.forward(model, batch)
        losses = self.task.loss(outputs, targets).double().cpu()
        if isinstance(self.task, Classification):
            return losses, right(self.task, outputs, targets).cpu(), outputs.double().softmax(1).cpu()
        if isinstance(self.task, BinaryClassification):
            return losses, right(self.task, outputs, targets).cpu(), outputs.double().sigmoid().cpu()[:, None]
        return losses, None, outputs.double().cpu().reshape(len(outputs), -1)


# Figures -------------------------------------------------------------------------------------------------------------


def distances(
    before: Tensor, after: Tensor, theirs: Sequence[Tensor], gap: Callable[[Tensor, Tensor], float]
) -> dict[str, float]:
    """Mean distances to the retrained models, and of those to one another."""
    nothing = float(np.mean([gap(before, one) for one in theirs]))
    repaired = float(np.mean([gap(after, one) for one in theirs]))
    found = {"before": nothing, "after": repaired, "relative": repaired / nothing if nothing else math.nan}
    if len(theirs) > 1:
        pairs = [gap(a, b) for k, a in enumerate(theirs) for b in theirs[:k]]
        found["seeds"] = float(np.mean(pairs))
        found["seeds_relative"] = found["seeds"] / nothing if nothing else math.nan
    return found


def to_mean(
    before: View, after: View, theirs: Sequence[View], gap: Callable[[Tensor, Tensor], float]
) -> dict[str, float] | None:
    """Distances to the mean prediction; "seeds": a retrained model's from the mean of the others."""
    if len(theirs) < 2:
        return None
    stack = torch.stack([v.predictions for v in theirs])
    center = stack.mean(0)
    nothing, repaired = gap(before.predictions, center), gap(after.predictions, center)
    left_out = [gap(one, (stack.sum(0) - one) / (len(stack) - 1)) for one in stack]
    return {
        "before": nothing,
        "after": repaired,
        "relative": repaired / nothing if nothing else math.nan,
        "seeds": float(np.mean(left_out)),
    }


def same_seed(
    before: View, after: View, theirs: View, gap: Callable[[Tensor, Tensor], float]
) -> dict[str, Any]:
    """Distances to the one model that was retrained with the model's own seed."""
    return {
        "parameter_distance": distances(before.parameters, after.parameters, [theirs.parameters], euclidean),
        "prediction_distance": distances(before.predictions, after.predictions, [theirs.predictions], gap),
    }


def beside(
    ours: Mapping[str, Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """{group: {"before", "after", "retrained" (the mean), "spread" (the standard deviation over seeds)}}."""
    found: dict[str, dict[str, float]] = {}
    for name in ours["before"]:
        retrained = [one[name] for one in theirs]
        found[name] = {key: values[name] for key, values in ours.items()}
        found[name]["retrained"] = float(np.mean(retrained))
        if len(retrained) > 1:
            found[name]["spread"] = float(np.std(retrained, ddof=1))
    return found


def membership(before: View, after: View, theirs: Sequence[View]) -> dict[str, float] | None:
    """AUROC of the attack by losses; None where nothing was forgotten."""
    if "forgotten" not in before.losses:
        return None
    area = {
        v: membership_auroc(x.losses["forgotten"], x.losses["test"])
        for v, x in (("before", before), ("after", after))
    }
    area["retrained"] = float(
        np.mean([membership_auroc(x.losses["forgotten"], x.losses["test"]) for x in theirs])
    )
    return area


def euclidean(a: Tensor, b: Tensor) -> float:
    """``|a - b|``."""
    return float((a - b).norm())
