"""Scores of training examples that do not look at the query."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upweight.attributors.base import Attributor
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.evidence import shared_info
from upweight.data import Examples
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

if TYPE_CHECKING:
    from typing_extensions import Self

CONTROL = "the same scores for every query"


class QueryBlind(Attributor):
    """A baseline with one score per training example: its self score, and its score for every query alike.

    A subclass says in `_own` what the score is.
    """

    _name = ""

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
        super().__init__(model, task, None, memory, batch_size, autocast, progress)
        self._scores: Tensor | None = None
        self._forward: Forward | None = None

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Self:
        """Score the training examples: one pass over them.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model, the task or the data, in one line.
        """
        examples = Examples(train, ids)
        started = time.perf_counter()
        self._forward = Forward(self, self.model, examples)
        self._scores = self._own(examples, self._forward)
        self._seconds = round(time.perf_counter() - started, 3)
        self._remember(examples)
        return self

    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """The training examples' own scores, as the same row for every query.

        Args:
            query: queries in the form of the training data. They are measured, so that what any method would refuse is
                refused here too; the scores do not depend on them.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit; all rows are equal.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, _ = self._ready()
        assert self._scores is not None and self._forward is not None
        queries = Examples(query, ids)
        self._forward.check(queries)
        info = self._info() | {"queries": queries.fingerprint()}
        return Scores(self._scores.expand(queries.n, -1).clone(), queries.ids, examples.ids, None, info)

    def self_influence(self) -> SelfInfluence:
        """The training examples' own scores, large for suspicious ones."""
        examples, _ = self._ready()
        assert self._scores is not None
        return SelfInfluence(self._scores.clone(), examples.ids, None, self._info())

    def _own(self, examples: Examples, forward: Forward) -> Tensor:
        """One score a training example, [train]."""
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Further evidence."""
        return {}

    def _info(self) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        forward = self._forward
        assert forward is not None
        shared = shared_info(
            self._name, self, None, fingerprints, examples.n, forward.batch_size, forward.dtype
        )
        return shared | {"control": CONTROL, "fit_seconds": self._seconds, **self._facts()}
