"""Removal curves: take away the top proponents of a query, retrain, and see its loss rise.

    change[kind, k, q] = mean over seeds of m_q(theta without the k examples) - m_q(theta of all)

Kinds: the query's own top k proponents; as many examples drawn at random with the same classes; its opponents, whose
removal should lower the loss. Three steps: `plan_removals`, a `RetrainingBank` of the plan's subsets, `removal_curve`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upweight._ranking import extremes
from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bootstrap import Estimate, check_options, estimate_mean
from upweight.evaluate.given import finite_table
from upweight.evaluate.outcomes import Outcomes, check_queries
from upweight.evaluate.subsets import Subsets, full, removals
from upweight.scores import Scores

if TYPE_CHECKING:
    import pandas

__all__ = ["RemovalCurve", "RemovalPlan", "plan_removals", "removal_curve"]


@dataclass(frozen=True, eq=False)
class RemovalPlan:
    """Which examples to remove for which query.

    Attributes:
        subsets: What to retrain on: the whole set first, then every removal.
        kinds: "proponents", "random" and, if asked for, "opponents" and the baselines' names.
        sizes: Numbers of examples removed.
        rows: [kind, size, query]: the subset of each removal.
        predicted: [kind, size, query]: the sum of the removed examples' scores.
        unit: Of ``predicted``; None if scores only rank.
        query_ids: Of the scores; None if they came without.
        queries: Fingerprint of the queries, if the scores know it.
    """

    subsets: Subsets
    kinds: list[str]
    sizes: list[int]
    rows: np.ndarray
    predicted: np.ndarray
    unit: str | None
    query_ids: Sequence[int | str] | None = None
    queries: str | None = None


def plan_removals(
    scores: Scores | np.ndarray,
    sizes: Sequence[int],
    *,
    classes: Sequence[Any] | np.ndarray | Tensor | None = None,
    opponents: bool = False,
    baselines: Mapping[str, Scores | np.ndarray] | None = None,
    seed: int = 0,
) -> RemovalPlan:
    """Choose what to remove for each query.

    Args:
        scores: [query, train], positive for proponents.
        sizes: Numbers of examples to remove, for example .5, 1, 2, 5 and 10 % of the training set.
        classes: [train]: the random removals have as many of each class as the proponents; any, if None.
        opponents: Remove the top opponents as well.
        baselines: {name: scores [query, train]} whose top proponents are removed, too, for comparison: "same class",
            say, or another method.
        seed: Of the random removals.

    Cost: kinds x sizes x queries subsets to retrain on, for each seed.

    Example:
        >>> plan = plan_removals(np.array([[3.0, 1.0, 2.0, 0.0]]), [1, 2])
        >>> len(plan.subsets), plan.subsets.masks[plan.rows[0, 1, 0]].tolist(), plan.predicted[0].tolist()
        (5, [False, True, False, True], [[3.0], [5.0]])
    """
    table = finite_table(scores).double()
    queries, n = table.shape
    sizes = sorted({int(size) for size in sizes})
    if not sizes or not 0 < sizes[0] <= sizes[-1] < n:
        raise UpweightError(
            f"sizes={sizes}, expected numbers from 1 to {n - 1} -> leave something to train on"
        )
    groups = np.zeros(n, dtype=int)
    if classes is not None:
        groups = np.unique(
            np.asarray(classes.cpu() if isinstance(classes, Tensor) else classes), return_inverse=True
        )[1]
        if groups.shape != (n,):
            raise UpweightError(
                f"classes have shape {groups.shape}, expected one for each of {n} training examples"
            )
    generator = np.random.default_rng(seed)
    proponents = extremes(table, sizes[-1], largest=True).numpy()
    lists = {
        "proponents": proponents,
        "random": np.stack([_alike(row, groups, generator) for row in proponents]),
    }
    if opponents:
        lists["opponents"] = extremes(table, sizes[-1], largest=False).numpy()
    tables = dict.fromkeys(lists, table.numpy())
    for name, other in (baselines or {}).items():
        tables[name] = _like(finite_table(other).double(), table, name, lists).numpy()
        lists[name] = extremes(torch.from_numpy(tables[name]), sizes[-1], largest=True).numpy()
    members = [list(chosen[q, :size]) for chosen in lists.values() for size in sizes for q in range(queries)]
    shape = (len(lists), len(sizes), queries)
    predicted = [
        tables[kind][q, chosen[q, :k]].sum()
        for kind, chosen in lists.items()
        for k in sizes
        for q in range(queries)
    ]
    return RemovalPlan(
        full(n) + removals(n, members),
        list(lists),
        sizes,
        1 + np.arange(len(members)).reshape(shape),
        np.reshape(predicted, shape),
        scores.unit if isinstance(scores, Scores) else None,
        list(scores.query_ids) if isinstance(scores, Scores) else None,
        scores.info.get("queries") if isinstance(scores, Scores) else None,
    )


def _like(other: Tensor, table: Tensor, name: str, lists: Mapping[str, Any]) -> Tensor:
    if other.shape != table.shape:
        raise UpweightError(
            f"the baseline {name!r} has scores {list(other.shape)}, expected {list(table.shape)} like the method's -> "
            "attribute the same queries to the same training examples"
        )
    if name in lists:
        raise UpweightError(f"the baseline's name {name!r} is taken -> another one")
    return other


def _alike(chosen: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Random examples, each of the same class as the one at its place in `chosen`, none twice."""
    drawn = np.empty_like(chosen)
    for group in np.unique(groups[chosen]):
        places = np.flatnonzero(groups[chosen] == group)
        drawn[places] = generator.choice(np.flatnonzero(groups == group), len(places), replace=False)
    return drawn


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """What removals did to the loss of the query they were chosen for.

    Attributes:
        kinds: What was removed.
        sizes: How many examples.
        changes: [kind][size]: mean over queries, with an interval; positive: the loss rose.
        above_random: [size]: proponents less random removals, paired by query; positive is good.
        areas: For each kind, the mean of its curve over the removed share, by the trapezoid rule from no removal.
        per_query: [kind, size, query].
        predicted: The same, by the scores.
        unit: Of the changes.
        predicted_unit: Of ``predicted``; None if scores only rank.
    """

    kinds: list[str]
    sizes: list[int]
    changes: list[list[Estimate]]
    above_random: list[Estimate]
    areas: dict[str, Estimate]
    per_query: np.ndarray
    predicted: np.ndarray
    unit: str
    predicted_unit: str | None = None

    @property
    def slope(self) -> float:
        """Of the measured on the predicted change of removing proponents, through zero; 1 if the scale is right.

        Removals that were not measured, because a run failed, take no part; NaN if nothing is predicted to change.

        Raises:
            UpweightError: The scores are in another unit than the changes.
        """
        if self.predicted_unit not in (None, self.unit):
            raise UpweightError(
                f"the scores are in {self.predicted_unit!r} and the changes in {self.unit!r}, expected one unit for a "
                "slope -> attribute with the task of the bank"
            )
        known = np.isfinite(self.per_query[0])
        predicted, measured = self.predicted[0][known], self.per_query[0][known]
        square = float((predicted * predicted).sum())
        return float((predicted * measured).sum()) / square if square > 0 else math.nan

    def to_pandas(self) -> pandas.DataFrame:
        """One row per kind and size: kind, removed, change, low, high."""
        rows = [(kind, k, e) for kind, row in zip(self.kinds, self.changes) for k, e in zip(self.sizes, row)]
        return frame(
            {
                "kind": [kind for kind, _, _ in rows],
                "removed": [k for _, k, _ in rows],
                "change": [e.value for _, _, e in rows],
                "low": [e.low for _, _, e in rows],
                "high": [e.high for _, _, e in rows],
            }
        )

    def plot(self, axes: Axes = None) -> Axes:
        """Change of the loss against the number removed, one line per kind, intervals shaded."""
        axes = axes_or_new(axes)
        for kind, row in zip(self.kinds, self.changes):
            axes.plot(self.sizes, [e.value for e in row], marker="o", label=kind)
            axes.fill_between(self.sizes, [e.low for e in row], [e.high for e in row], alpha=0.2)
        axes.axhline(0, color="0.6", lw=0.8)
        axes.set(xlabel="examples removed", ylabel=f"change of the query's loss [{self.unit}]")
        axes.legend()
        return axes

    def __str__(self) -> str:
        lines = [
            f"{kind}: " + ", ".join(f"{k}: {e}" for k, e in zip(self.sizes, row))
            for kind, row in zip(self.kinds, self.changes)
        ]
        return "\n".join(lines)


def removal_curve(
    plan: RemovalPlan, outcomes: Outcomes, *, level: float = 0.95, seed: int = 0
) -> RemovalCurve:
    """The curves of a plan's removals, as retrained models measured them.

    Args:
        plan: From `plan_removals`.
        outcomes: From a bank of ``plan.subsets``, on the queries of the plan's scores, in their order.
        level: Of the confidence intervals, over queries.
        seed: Of the resampling.

    Raises:
        UpweightError: The outcomes are of another plan or of other queries, or the model of the whole set is missing.
    """
    check_options(level)
    if (
        not np.array_equal(outcomes.masks, plan.subsets.masks)
        or outcomes.values.shape[2] != plan.rows.shape[2]
    ):
        raise UpweightError(
            f"the outcomes are of {outcomes.masks.shape[0]} subsets and {outcomes.values.shape[2]} queries, the plan "
            f"of {len(plan.subsets)} and {plan.rows.shape[2]} -> RetrainingBank(..., subsets=plan.subsets)"
        )
    if plan.query_ids is not None:
        check_queries(plan.query_ids, plan.queries, outcomes)
    changed = np.asarray(outcomes.relabelled, dtype=bool)
    if changed.any():
        raise UpweightError(
            f"{int(changed.sum())} subsets of the outcomes change labels, which no removal does -> "
            "RetrainingBank(..., subsets=plan.subsets)"
        )
    # The same seed with and without the examples: noise that both share cancels. A missing seed leaves a NaN.
    effects = (outcomes.values - outcomes.values[:1]).mean(axis=1)  # [subset, query]
    if not np.isfinite(effects[0]).all():
        raise UpweightError(
            "a model of the whole set is missing, which changes are measured from -> run the bank"
        )
    per_query = np.take_along_axis(effects, plan.rows.reshape(-1, plan.rows.shape[2]), axis=0).reshape(
        plan.rows.shape
    )
    generator = np.random.default_rng(seed)

    def mean(values: np.ndarray) -> Estimate:
        return estimate_mean(values, None, 0, level, generator)

    steps = np.array([0, *plan.sizes]) / plan.subsets.n
    padded = np.pad(per_query, ((0, 0), (1, 0), (0, 0)))
    middles = (padded[:, 1:] + padded[:, :-1]) / 2
    areas = np.einsum("ksq,s->kq", middles, np.diff(steps)) / steps[-1]
    return RemovalCurve(
        plan.kinds,
        plan.sizes,
        [[mean(values) for values in row] for row in per_query],
        [mean(a - b) for a, b in zip(per_query[0], per_query[1])],
        {kind: mean(area) for kind, area in zip(plan.kinds, areas)},
        per_query,
        plan.predicted,
        outcomes.unit,
        plan.unit,
    )
