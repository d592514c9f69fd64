"""Checks that need no retraining: are top lists stable, of the right class, and about the trained model at all?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upweight._ranking import extremes
from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bootstrap import Estimate, estimate_mean
from upweight.evaluate.given import aligned, finite_table
from upweight.evaluate.ranks import spearman
from upweight.scores import Scores

if TYPE_CHECKING:
    import pandas

__all__ = ["Check", "class_detection", "model_randomisation", "top_k_overlap"]


@dataclass(frozen=True, eq=False)
class Check:
    """A number per query, its mean, and what chance alone would give.

    Attributes:
        name: What was measured.
        mean: With its interval over queries.
        per_query: [query].
        chance: What random scores would get.
        higher_is_better: The direction.
    """

    name: str
    mean: Estimate
    per_query: np.ndarray
    chance: float
    higher_is_better: bool

    @property
    def value(self) -> float:
        """The mean over queries."""
        return self.mean.value

    def to_pandas(self) -> pandas.DataFrame:
        """One row per query: query, value."""
        return frame({"query": np.arange(len(self.per_query)), "value": self.per_query})

    def plot(self, axes: Axes = None) -> Axes:
        """Histogram over queries, with the mean and chance."""
        axes = axes_or_new(axes)
        axes.hist(self.per_query[np.isfinite(self.per_query)], bins=20, color="0.8")
        axes.axvline(self.value, color="C0", label=f"mean {self.mean}")
        axes.axvline(self.chance, color="0.4", ls="--", label=f"chance {self.chance:.3f}")
        axes.set(xlabel=self.name, ylabel="queries")
        axes.legend()
        return axes

    def __str__(self) -> str:
        better = "higher" if self.higher_is_better else "nearer to chance"
        return f"{self.name}: {self.mean}, chance {self.chance:.3f} ({better} is better)"


def top_k_overlap(runs: Sequence[Scores | np.ndarray | Tensor], k: int = 10) -> Check:
    """Share of the k first proponents that two runs (seeds, checkpoints) have in common, mean over pairs of runs.

    Range 0 to 1, higher is stabler; chance is k/n. `Scores` are compared example by example, by their ids.

    Example:
        >>> top_k_overlap([np.array([[3.0, 2.0, 1.0, 0.0]]), np.array([[3.0, 0.0, 1.0, 2.0]])], k=2).value
        0.5
    """
    if len(runs) < 2:
        raise UpweightError(f"scores of {len(runs)} runs, expected at least two tables -> one per seed")
    tables = aligned(runs)
    queries, n = tables[0].shape
    chosen = torch.zeros(len(tables), queries, n, dtype=torch.bool)
    for row, table in zip(chosen, tables):
        row.scatter_(1, extremes(table, k, largest=True), True)
    k = min(k, n)
    shared = [
        (chosen[a] & chosen[b]).sum(1).double().numpy() / k for a, b in combinations(range(len(tables)), 2)
    ]
    return _check(f"overlap of top {k}", np.mean(shared, axis=0), k / n, True)


def class_detection(
    scores: Scores | np.ndarray | Tensor,
    query_classes: Sequence[Any] | np.ndarray | Tensor,
    train_classes: Sequence[Any] | np.ndarray | Tensor,
    k: int = 10,
) -> Check:
    """Share of a query's k first proponents that are of its class (or subclass, source, ...).

    Range 0 to 1, higher is better; chance is the mean share of the query's class in the training set. Subclasses tell
    more than the classes the model was trained on: similarity alone finds those.

    Example:
        >>> class_detection(np.array([[0.9, 0.1, 0.5]]), ["cat"], ["cat", "dog", "cat"], k=2).value
        1.0
    """
    values = finite_table(scores)
    asked, have = (
        np.asarray(c.cpu() if isinstance(c, Tensor) else c) for c in (query_classes, train_classes)
    )
    if (len(asked), len(have)) != tuple(values.shape):
        raise UpweightError(
            f"{len(asked)} query classes and {len(have)} train classes for scores {tuple(values.shape)} -> give one "
            "for each query and each training example"
        )
    if len({classes.dtype.kind in "US" for classes in (asked, have) if classes.dtype.kind != "O"}) > 1:
        raise UpweightError(
            f"query classes are {asked.dtype} and train classes {have.dtype}, expected one kind: a number is never a "
            "name -> give both as names, or both as numbers"
        )
    top = extremes(values, k, largest=True).numpy()
    same = have[top] == asked[:, None]
    chance = float((have[None] == asked[:, None]).mean())
    return _check(f"same class in top {top.shape[1]}", same.mean(axis=1), chance, True)


def model_randomisation(
    scores: Scores | np.ndarray | Tensor, randomised: Scores | np.ndarray | Tensor
) -> Check:
    """Rank correlation of each query's scores with those for a model whose weights were drawn anew.

    Range -1 to 1. Near 0 is right: scores that survive randomisation are about the data alone, not about the model
    ("Sanity Checks for Saliency Maps", arXiv 1810.03292). `Scores` are compared example by example, by their ids.

    Example:
        >>> model_randomisation(np.array([[1.0, 2.0, 3.0]]), np.array([[2.0, 4.0, 6.0]])).value
        1.0
    """
    ours, theirs = aligned([scores, randomised])
    correlation = spearman(ours.double().numpy().T, theirs.double().numpy().T)
    return _check("rank correlation with a randomised model", correlation, 0.0, False)


def _check(name: str, per_query: np.ndarray, chance: float, higher: bool) -> Check:
    mean = estimate_mean(per_query, None, 0, 0.95, np.random.default_rng(0))
    return Check(name, mean, per_query, chance, higher)
