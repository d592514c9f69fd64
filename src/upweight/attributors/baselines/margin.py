"""The margin of the true class, negated: large for examples that the model would label otherwise."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.baselines.blind import QueryBlind
from upweight.attributors.baselines.forward import Forward, classifier
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import Task


class Margin(QueryBlind):
    """Each training example's negated margin, a baseline.

    ``scores[query, i] = -(z_y - max_{k != y} z_k)`` with logits z and label y, the same for every query; no unit. It is
    positive exactly where the model disagrees with the label. For `BinaryClassification` it is minus the logit, signed
    by the class.

    Args:
        model: a trained classifier in eval mode. Nothing on it is changed.
        task: `Classification` or `BinaryClassification`.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one forward pass over the training data.

    Fails when: the model has memorised its labels.

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.tensor([[2.0, 0.5, 1.0], [0.0, 3.0, 1.0]]), torch.tensor([0, 2])
        >>> uw.Margin(torch.nn.Identity(), uw.Classification()).fit((x, y)).self_influence().values.tolist()
        [-1.0, 2.0]
    """

    _name = "margin"

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        memory: int | str = "auto",
        batch_size: int | None = None,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )
        self._task = classifier(task, "Margin", "the true class's logit with the others'")

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        def negated(model: nn.Module, batch: Any) -> Tensor:
            return -margins(*self._task.forward(model, batch))

        return forward.over(examples, negated, "margin")


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """``z_y - max_{k != y} z_k`` of logits [batch, class] and class numbers, or of single logits [batch] and 0 or 1."""
    if outputs.ndim == 1:
        return outputs * (2 * targets.to(outputs.dtype) - 1)
    if outputs.shape[1] < 2:
        raise UpweightError(
            "the model has one output for classes, expected at least two: a margin compares classes -> use "
            "BinaryClassification for one logit an example"
        )
    true = outputs.gather(1, targets[:, None])[:, 0]
    return true - outputs.scatter(1, targets[:, None], -math.inf).amax(1)
