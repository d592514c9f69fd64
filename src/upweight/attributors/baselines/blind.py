"""Scores of training examples that do not look at the query."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.attributors.baselines.baseline import Baseline
from upweight.attributors.baselines.forward import Forward
from upweight.data import Examples


class QueryBlind(Baseline):
    """A baseline with one score per training example: its self score, and its score for every query alike.

    Queries are measured, so that what any method would refuse is refused here too. A subclass says in `_score` what the
    score is.
    """

    _control = "the same scores for every query"
    _scores = torch.zeros(0)

    def _score(self, examples: Examples, forward: Forward) -> Tensor:
        """One score a training example, [train]."""
        raise NotImplementedError

    def _learn(self, examples: Examples) -> None:
        self._scores = self._score(examples, self._forward)

    def _compare(self, queries: Examples) -> Tensor:
        self._forward.check(queries)
        return self._scores.expand(queries.n, -1).clone()

    def _own(self) -> Tensor:
        return self._scores.clone()
