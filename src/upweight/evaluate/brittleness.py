"""Brittleness: how few removals flip a prediction, found by bisection with real retraining."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats

from upweight._ranking import extremes
from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bank import RetrainingBank
from upweight.evaluate.bootstrap import Estimate, check_options
from upweight.evaluate.given import finite_table
from upweight.evaluate.subsets import Subsets, full, removals
from upweight.scores import Scores
from upweight.task import Task

if TYPE_CHECKING:
    import pandas

__all__ = ["Brittleness", "Retrain", "brittleness", "retrain_in"]

Retrain = Callable[[Subsets], np.ndarray]
"""Trains on each subset with several seeds and says which predictions are wrong: bool [subset, seed, query]."""


@dataclass(frozen=True, eq=False)
class Brittleness:
    """The smallest number of proponents whose removal flips each query's prediction.

    Attributes:
        smallest: [query]; infinite if removing ``largest`` does not flip it, NaN if it was not judged.
        largest: Most examples removed.
        judged: Queries that every seed of the whole set predicts right; the others are left out.
        trained: Subsets retrained on, the whole set included.
    """

    smallest: np.ndarray
    largest: int
    judged: int
    trained: int

    def flipped(self, k: int, level: float = 0.95) -> Estimate:
        """Share of the judged queries that at most k removals flip, with Wilson's interval over queries.

        Other removals might flip more: the scores need not find the smallest ones.
        """
        check_options(level)
        if not self.judged:
            return Estimate(math.nan, {})
        found = stats.binomtest(int((self.smallest <= k).sum()), self.judged)
        low, high = found.proportion_ci(level, method="wilson")
        return Estimate(float(found.statistic), {"queries": (float(low), float(high))})

    def to_pandas(self) -> pandas.DataFrame:
        """One row per query: query, smallest."""
        return frame({"query": np.arange(len(self.smallest)), "smallest": self.smallest})

    def plot(self, axes: Axes = None) -> Axes:
        """Share of queries flipped against the number removed."""
        axes = axes_or_new(axes)
        sizes = np.arange(self.largest + 1)
        found = [self.flipped(k) for k in sizes.tolist()]
        axes.step(sizes, [e.value for e in found], where="post")
        axes.fill_between(sizes, [e.low for e in found], [e.high for e in found], alpha=0.2, step="post")
        axes.set(xlabel="proponents removed", ylabel="predictions flipped", ylim=(0, 1))
        return axes

    def __str__(self) -> str:
        return (
            f"share of {self.judged} predictions that flip within {self.largest} removals: "
            f"{self.flipped(self.largest)} ({len(self.smallest) - self.judged} queries not judged, "
            f"{self.trained} subsets retrained)"
        )


def brittleness(scores: Scores | np.ndarray, retrain: Retrain, largest: int) -> Brittleness:
    """How few removals of top proponents flip each query's prediction, by the majority of seeds.

    Bisection takes it that a prediction once flipped stays so as more proponents go; where that fails it still gives a
    number that flips it, though not always the smallest. All queries of a round are retrained together.

    Args:
        scores: [query, train], positive for proponents.
        retrain: From `retrain_in`, or any function ``(Subsets) -> wrong [subset, seed, query]``. It is called with all
            subsets so far and the new ones after them.
        largest: Most examples to remove.

    Raises:
        UpweightError: The scores are no finite table, or nothing would be left to train on.

    Cost: about ``1 + queries * (1 + log2(largest))`` subsets, for each seed.

    Example:
        >>> def retrain(subsets):  # wrong as soon as two of examples 0, 1 and 2 are gone
        ...     return ((~subsets.masks[:, :3]).sum(1) >= 2)[:, None, None]
        >>> brittleness(np.array([[3.0, 2.0, 1.0, 0.0, 0.0]]), retrain, largest=4).smallest
        array([2.])
    """
    values = finite_table(scores)
    queries, n = values.shape
    if not 0 < largest < n:
        raise UpweightError(f"largest={largest}, expected 1 to {n - 1} -> leave something to train on")
    order = extremes(values, largest, largest=True).numpy()
    subsets = full(n)
    wrong = _wrong(retrain, subsets, queries)[0]  # [seed, query]
    judged = np.flatnonzero(~wrong.any(axis=0))
    smallest = np.full(queries, np.nan)
    smallest[judged] = np.inf
    low, high = np.zeros(queries, int), np.full(queries, largest)  # not flipped at low; at high, if at all
    asked = {int(q): largest for q in judged}
    while asked:
        first = len(subsets)
        subsets = subsets + removals(n, [list(order[q, :k]) for q, k in asked.items()])
        wrong = _wrong(retrain, subsets, queries)
        for row, (q, k) in enumerate(asked.items(), start=first):
            if wrong[row, :, q].mean() > 0.5:
                smallest[q] = high[q] = k
            else:
                low[q] = k
        asked = {
            q: (low[q] + high[q]) // 2 for q in asked if np.isfinite(smallest[q]) and high[q] - low[q] > 1
        }
    return Brittleness(smallest, largest, len(judged), len(subsets))


def retrain_in(
    folder: str | os.PathLike[str],
    train_fn: Callable[..., Any],
    wrong: Task,
    n: int,
    query: Any,
    **options: Any,
) -> Retrain:
    """A `Retrain` by a `RetrainingBank` that grows round by round, and resumes if it is killed.

    Args:
        folder: Of the bank.
        train_fn: As for the bank.
        wrong: A task whose measurement, lower being better, is above 0 where the prediction is wrong: for example
            ``Classification(measurement=lambda model, batch: (model(batch[0]).argmax(1) != batch[1]).float())``.
        n: Training examples.
        query: The queries of the scores.
        options: Of the bank: seeds (5 by default), n_jobs, backend, progress.
    """

    def retrain(subsets: Subsets) -> np.ndarray:
        bank = RetrainingBank(folder, train_fn, wrong, n, subsets=subsets, **{"seeds": 5, **options})
        bank.measure(query, "wrong")
        bank.run()
        values = bank.outcomes("wrong").values
        if np.isnan(values).any():
            raise UpweightError(
                "a run failed, and its subset decides the bisection -> see bank.run(), repair train_fn and run it again"
            )
        return values > 0

    return retrain


def _wrong(retrain: Retrain, subsets: Subsets, queries: int) -> np.ndarray:
    wrong = np.asarray(retrain(subsets))
    if wrong.dtype != bool or wrong.ndim != 3 or wrong.shape[::2] != (len(subsets), queries):
        raise UpweightError(
            f"retrain gave {wrong.dtype} of shape {wrong.shape}, expected bool [subset, seed, query] with "
            f"{len(subsets)} subsets and {queries} queries -> use retrain_in(...)"
        )
    return wrong
