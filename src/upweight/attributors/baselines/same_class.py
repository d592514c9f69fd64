"""Whether two examples have the same label: what counting classes explains, without any model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from upweight.attributors.baselines.baseline import Baseline
from upweight.attributors.baselines.forward import classifier
from upweight.attributors.baselines.labels import class_labels
from upweight.data import Examples
from upweight.task import Task


class SameClass(Baseline):
    """One for training examples of the query's class, zero for the others, a baseline.

    ``scores[query, i] = 1 if y_i = y_query else 0``; no unit. A network that has learned little yet, or that is
    retrained on subsets that hold a class more or less often, answers to the number of examples of each class before
    anything else: a method that is no better than this control has shown no more than that.

    Args:
        model: a trained classifier in eval mode, which queries must fit.
        task: `Classification` or `BinaryClassification`.
        memory: unused; accepted so that all attributors can be made alike.
        batch_size: examples per forward pass of the queries; 256 if None. Scores do not depend on it.
        autocast: dtype for `torch.autocast` in that pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: one forward pass over the training data, to check it as any method would.

    Fails when: the task has no classes (it is refused).

    Example:
        >>> import torch, upweight as uw
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 0])
        >>> uw.SameClass(torch.nn.Identity(), uw.Classification()).fit((x, y)).attribute(
        ...     (x[:1], y[:1])
        ... ).values
        tensor([[1., 0., 1.]])
    """

    _name = "same-class"
    _control = "labels alone"
    _labels = torch.zeros(0)

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
        classifier(task, "SameClass", "class labels")
        super().__init__(
            model, task, memory=memory, batch_size=batch_size, autocast=autocast, progress=progress
        )

    def _learn(self, examples: Examples) -> None:
        self._labels = self._labels_of(examples)

    def _compare(self, queries: Examples) -> Tensor:
        return (self._labels_of(queries)[:, None] == self._labels).to(self._forward.dtype)

    def _own(self) -> Tensor:
        return torch.ones(len(self._labels), dtype=self._forward.dtype)

    def _labels_of(self, examples: Examples) -> Tensor:
        self._forward.check(examples)
        return class_labels(self.task, examples, self._forward.batch_size, "SameClass compares them")
