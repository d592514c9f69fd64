"""What the baselines have in common: they run the model forward, and never differentiate it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight.attributors.base import Attributor
from upweight.attributors.baselines.forward import Forward
from upweight.attributors.evidence import shared_info
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

if TYPE_CHECKING:
    from typing_extensions import Self


class Baseline(Attributor):
    """A method that needs no gradients.

    A subclass says what it keeps of the training data (`_learn`), how queries score them (`_compare`), what the self
    score is (`_own`), and what else a result should say (`_control`: why it is one of those that a method must beat;
    `_facts`).
    """

    _name = ""
    _control = ""

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
        self._fitted_forward: Forward | None = None
        self._seconds = 0.0

    @without_autocast()
    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Self:
        """Learn from the training data what the scores are made of.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model, the task or the data, in one line.
        """
        started = time.perf_counter()
        examples = Examples(train, ids)
        self._fitted_forward = Forward(self, self.model, examples)
        self._learn(examples)
        self._seconds = round(time.perf_counter() - started, 3)
        self._remember(examples)
        return self

    @without_autocast()
    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """Score every training example for every query.

        Args:
            query: queries in the form of the training data.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train], without a unit.

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        examples, _ = self._ready()
        queries = Examples(query, ids)
        values = self._compare(queries)
        info = self._info() | {"queries": queries.fingerprint()}
        return Scores(values, queries.ids, examples.ids, None, info)

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """The self score of every training example, without a unit.

        Raises:
            UpweightError: not fitted, or the training data cannot have one.
        """
        examples, _ = self._ready()
        return SelfInfluence(self._own(), examples.ids, None, self._info())

    def _learn(self, examples: Examples) -> None:
        """Keep of the training data what scores are made of."""
        raise NotImplementedError

    def _compare(self, queries: Examples) -> Tensor:
        """Scores [query, train]; raise if the model cannot take the queries."""
        raise NotImplementedError

    def _own(self) -> Tensor:
        """Self scores [train]."""
        raise NotImplementedError

    def _facts(self) -> dict[str, Any]:
        """Further evidence."""
        return {}

    @property
    def _forward(self) -> Forward:
        if self._fitted_forward is None:
            raise UpweightError("not fitted yet -> call fit(train) first")
        return self._fitted_forward

    def _info(self) -> dict[str, Any]:
        examples, fingerprints = self._ready()
        size, dtype = self._forward.batch_size, self._forward.dtype
        shared = shared_info(self._name, self, None, fingerprints, examples.n, size, dtype)
        control = {"control": self._control} if self._control else {}
        return shared | control | {"fit_seconds": self._seconds} | self._facts()
