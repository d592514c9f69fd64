"""Intervals by resampling queries, training sets, or both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from upweight.errors import UpweightError

__all__ = ["Estimate", "check_options", "draw_counts", "estimate_mean", "interval"]


FEWEST = 5
"""Subsets that a rank correlation must be of to be given an interval."""


def check_options(level: float, resamples: int = 2) -> None:
    """Refuse what is no confidence level, or too few resamples to have a spread."""
    if not 0 < level < 1:
        raise UpweightError(f"level={level}, expected between 0 and 1 -> 0.95 for example")
    if not isinstance(resamples, int | np.integer) or resamples < 2:
        raise UpweightError(f"resamples={resamples!r}, expected a whole number from 2 up -> 1000 for example")


@dataclass(frozen=True)
class Estimate:
    """A number and its confidence intervals, by what was resampled; ``low`` and ``high`` are the widest of them.

    An interval is NaN where there is nothing to resample: a single query says nothing of other queries. What is printed
    then names what the interval does cover.

    Attributes:
        value: The number.
        intervals: ``{what was resampled: (low, high)}``.
        undefined: Resamples without a value, which the intervals leave out.

    Example:
        >>> estimate = Estimate(0.5, {"queries": (0.4, 0.6), "subsets": (0.3, 0.65)})
        >>> print(estimate, estimate.low)
        0.500 [0.300, 0.650] 0.3
    """

    value: float
    intervals: Mapping[str, tuple[float, float]]
    undefined: int = 0

    @property
    def _widest(self) -> tuple[float, float]:
        bounds = [pair for pair in self.intervals.values() if np.isfinite(pair).all()]
        return max(bounds, key=lambda pair: pair[1] - pair[0], default=(float("nan"), float("nan")))

    @property
    def low(self) -> float:
        """Lower end of the widest interval."""
        return self._widest[0]

    @property
    def high(self) -> float:
        """Upper end of the widest interval."""
        return self._widest[1]

    def within(self, least: float, most: float) -> Estimate:
        """The same with intervals that end where the number itself must: a correlation's at -1 and 1."""
        ends = {
            name: (min(max(low, least), most), min(max(high, least), most)) if low == low else (low, high)
            for name, (low, high) in self.intervals.items()
        }
        return replace(self, intervals=ends)

    def __str__(self) -> str:
        known = [name for name, pair in self.intervals.items() if np.isfinite(pair).all()]
        if not known:
            return f"{self.value:.3f} (no interval)"
        part = "" if len(known) == len(self.intervals) else f" over {' and '.join(known)} only"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]{part}"


def draw_counts(units: int, resamples: int, generator: np.random.Generator) -> np.ndarray:
    """How often each unit is drawn, [resample, unit]: a bootstrap resample as weights."""
    return generator.multinomial(units, np.full(units, 1 / units), size=resamples).astype(np.float64)


def interval(estimate: float, replicates: np.ndarray, units: int, level: float) -> tuple[float, float]:
    """Percentile interval, centred on the estimate and widened for a small number of units.

    Replicates of a rank correlation are shifted towards zero (a resample has ties), hence the centring; the bootstrap's
    variance is short by ``(units-1)/units``, and its tails are those of a normal variable where Student's are due.
    """
    replicates = replicates[np.isfinite(replicates)]
    if units < 2 or len(replicates) < 2 or not np.isfinite(estimate):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    deviations = np.quantile(replicates - replicates.mean(), [tail, 1 - tail])
    widen = np.sqrt(units / (units - 1)) * stats.t.ppf(1 - tail, units - 1) / stats.norm.ppf(1 - tail)
    low, high = estimate + widen * deviations
    return float(low), float(high)


def interaction_once(one_way: np.ndarray, other_way: np.ndarray, both: np.ndarray) -> np.ndarray:
    """Replicates of two factors resampled at once, scaled about their mean to the variance that they should have.

    They count the interaction of query and subset three times instead of once ("The pigeonhole bootstrap", arXiv
    0712.1111). The variance ``2 (v_one + v_other) - v_both`` counts it once; it is never less than either factor's own.
    """
    known = [replicates[np.isfinite(replicates)] for replicates in (one_way, other_way, both)]
    if min(len(replicates) for replicates in known) < 2:
        return both
    size = float(np.abs(known[2]).max()) or 1.0  # squares of huge or tiny numbers are no numbers
    one, other, v_both = (np.var(replicates / size) for replicates in known)
    scale = np.sqrt(max(one, other, 2 * (one + other) - v_both) / v_both) if v_both > 0 else 1.0
    return known[2].mean() + scale * (both - known[2].mean())


def estimate_mean(
    per_query: np.ndarray,
    by_subsets: np.ndarray | None,
    blocks: int,
    level: float,
    generator: np.random.Generator,
    observations: int | None = None,
) -> Estimate:
    """The mean over queries of a statistic, with intervals.

    Args:
        per_query: [query], NaN where it is not defined.
        by_subsets: The same recomputed on resampled subsets, [resample, query]; None if nothing but the queries varies.
        blocks: How many independent subsets there are.
        level: Of confidence.
        generator: For the draws of queries.
        observations: How many subsets there are, if they come in blocks. Of fewer than five there is no interval: three
            subsets have six orders, and resampling a perfect one gives a perfect one again.
    """
    defined = np.isfinite(per_query)
    queries = int(defined.sum())
    few = by_subsets is not None and (blocks if observations is None else observations) < FEWEST
    if few or not queries:
        return Estimate(float(per_query[defined].mean()) if queries else math.nan, {})
    values = per_query[defined]
    mean = float(values.mean())
    resamples = 2000 if by_subsets is None else len(by_subsets)
    counts = draw_counts(queries, resamples, generator) / queries
    one_way = counts @ values
    intervals, undefined = {"queries": interval(mean, one_way, queries, level)}, 0
    if by_subsets is not None:
        by_subsets = by_subsets[:, defined]
        other_way = _mean_of_known(by_subsets, np.ones_like(counts))
        both = _mean_of_known(by_subsets, counts)
        # A resample in which no query is defined says nothing, and must not take the others with it.
        other_way, both = other_way[np.isfinite(other_way)], both[np.isfinite(both)]
        undefined = len(by_subsets) - len(both)
        intervals |= {"subsets": (math.nan, math.nan), "both": (math.nan, math.nan)}
        if len(other_way) > 1 and len(both) > 1:
            intervals["subsets"] = interval(mean, other_way, blocks, level)
            once = interaction_once(one_way, other_way, both)
            intervals["both"] = interval(mean, once, min(blocks, queries), level)
    return Estimate(mean, intervals, undefined)


def _mean_of_known(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted mean of each row without its NaN; NaN if nothing is left."""
    known = np.isfinite(values)
    total = (weights * known).sum(axis=1)
    sums = (weights * np.where(known, values, 0.0)).sum(axis=1)
    return np.divide(sums, total, out=np.full(len(values), np.nan), where=total > 0)
