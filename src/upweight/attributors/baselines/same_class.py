"""Whether two examples have the same label: what counting classes explains, without any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.base import Attributor
from upweight.attributors.baselines.forward import Forward, classifier
from upweight.attributors.baselines.labels import class_labels
from upweight.attributors.evidence import shared_info
from upweight.data import Examples
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

CONTROL = "labels alone"


class SameClass(Attributor):
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
        super().__init__(model, task, None, memory, batch_size, autocast, progress)
        self._forward: Forward | None = None
        self._labels = torch.zeros(0)

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> SameClass:
        """Read the labels, and check the data.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model or the data, in one line.
        """
        examples = Examples(train, ids)
        self._forward = Forward(self, self.model, examples)
        self._forward.check(examples)
        self._labels = self._labels_of(examples)
        self._remember(examples)
        return self

    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """One or zero for every query and training example.

        Args:
            query: queries in the form of the training data.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, _ = self._ready()
        assert self._forward is not None
        queries = Examples(query, ids)
        self._forward.check(queries)
        same = self._labels_of(queries)[:, None] == self._labels
        info = self._info() | {"queries": queries.fingerprint()}
        return Scores(same.to(self._forward.dtype), queries.ids, examples.ids, None, info)

    def self_influence(self) -> SelfInfluence:
        """One for every training example: its score for itself."""
        examples, _ = self._ready()
        assert self._forward is not None
        ones = torch.ones(examples.n, dtype=self._forward.dtype)
        return SelfInfluence(ones, examples.ids, None, self._info())

    def _labels_of(self, examples: Examples) -> Tensor:
        assert self._forward is not None
        return class_labels(self.task, examples, self._forward.batch_size, "SameClass compares them")

    def _info(self) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        forward = self._forward
        assert forward is not None
        size, dtype = forward.batch_size, forward.dtype
        shared = shared_info("same-class", self, None, fingerprints, examples.n, size, dtype)
        return shared | {"control": CONTROL}
