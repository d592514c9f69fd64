"""The linear datamodelling score: do summed scores rank retrained models as their outcomes do?

    predicted[q, S] = sum of scores[q, i] over the examples i that S leaves out      removed proponents raise the loss
    LDS_q           = Spearman over S of predicted[q, S] and the mean over seeds of m_q(theta(S, seed))
    LDS             = mean over q

"TRAK: Attributing Model Behavior at Scale" (arXiv 2303.14186), section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bootstrap import Estimate, check_options, estimate_mean
from upweight.evaluate.ceiling import NoiseCeiling, block_weights, noise_ceiling, seeds_for
from upweight.evaluate.outcomes import Outcomes, as_scores
from upweight.evaluate.ranks import spearman
from upweight.scores import Scores

if TYPE_CHECKING:
    import pandas

__all__ = ["LDS", "lds", "lds_difference"]


@dataclass(frozen=True, eq=False)
class LDS:
    """A linear datamodelling score: -1 to 1, higher is better, 0 for random scores.

    Attributes:
        score: Mean over queries, with intervals over queries, over subsets and over both: of one query over subsets
            only, of fewer than five subsets none.
        per_query: [query]; NaN where all predictions or all outcomes are equal.
        ceiling: The noise ceiling, or None with a single seed.
        query_ids: One per query.
        subsets: Subsets used.
        subsets_dropped: Subsets left out because a seed is missing, or labels are changed.
        seeds: Seeds per subset.
        level: Of the intervals.
        method: What was scored.
    """

    score: Estimate
    per_query: np.ndarray
    ceiling: NoiseCeiling | None
    query_ids: list[int | str]
    subsets: int
    subsets_dropped: int
    seeds: int
    level: float
    method: str

    @property
    def value(self) -> float:
        """The mean over queries."""
        return self.score.value

    @property
    def low(self) -> float:
        """Lower end of the widest interval."""
        return self.score.low

    @property
    def high(self) -> float:
        """Upper end of the widest interval."""
        return self.score.high

    @property
    def median(self) -> float:
        """The median over queries."""
        return float(np.nanmedian(self.per_query)) if np.isfinite(self.per_query).any() else math.nan

    @property
    def undefined(self) -> int:
        """Queries without a rank correlation; they are not in the mean."""
        return int(np.isnan(self.per_query).sum())

    @property
    def corrected(self) -> float:
        """The share of the noise ceiling that is reached; to be read beside the raw value, not instead of it."""
        return self.value / self.ceiling.value if self.ceiling and self.ceiling.value > 0 else math.nan

    def subsets_needed(self, width: float) -> float:
        """Subsets that would make the interval this wide (high - low), with the same queries and seeds.

        Infinite if the queries alone leave it wider: then only more queries help.
        """
        if not width > 0:
            raise UpweightError(
                f"width={width}, expected a positive width of the interval -> 0.05 for example"
            )
        spans = {name: high - low for name, (low, high) in self.score.intervals.items() if low == low}
        if "subsets" not in spans:
            raise UpweightError(
                f"the LDS {self.score} has no interval over subsets, expected one to narrow -> more subsets, or scores "
                "that are not constant"
            )
        # The squared width is a part of the queries' own, which stays, and one that shrinks as 1/subsets; of a single
        # query there is only the second.
        from_queries = max(spans.get("both", 0.0), spans.get("queries", 0.0))
        rest = max(0.0, from_queries**2 - spans["subsets"] ** 2)
        from_subsets = max(spans.values()) ** 2 - rest
        if not width**2 > rest:
            return math.inf
        return math.ceil(self.subsets * from_subsets / (width**2 - rest))

    def seeds_needed(self, ceiling: float = 0.95) -> float:
        """Seeds per subset that would bring the noise ceiling to this height."""
        if self.ceiling is None:
            raise UpweightError(
                "one seed cannot tell noise from signal -> retrain with at least 2 seeds per subset"
            )
        return seeds_for(self.ceiling.reliability.value, ceiling)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per query: query_id, lds."""
        return frame({"query_id": self.query_ids, "lds": self.per_query})

    def plot(self, axes: Axes = None) -> Axes:
        """Histogram over queries, with the mean, its interval and the ceiling."""
        axes = axes_or_new(axes)
        axes.hist(self.per_query[np.isfinite(self.per_query)], bins=30, color="0.8")
        axes.axvline(self.value, color="C0", label=f"mean {self.score}")
        axes.axvspan(self.low, self.high, color="C0", alpha=0.2)
        if self.ceiling is not None:
            axes.axvline(
                self.ceiling.value, color="C3", ls="--", label=f"noise ceiling {self.ceiling.value:.3f}"
            )
        axes.set(xlabel="LDS of a query", ylabel="queries", title=self.method)
        axes.legend()
        return axes

    def __str__(self) -> str:
        text = (
            f"LDS {self.score} ({self.subsets} subsets x {self.seeds} seeds, {len(self.per_query)} queries)"
        )
        if self.ceiling is not None:
            text += f", noise ceiling {self.ceiling.value:.3f}, corrected {self.corrected:.3f}"
        return text + (f", {self.undefined} queries undefined" if self.undefined else "")


def lds(
    scores: Scores | np.ndarray,
    outcomes: Outcomes,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    ceiling: NoiseCeiling | None = None,
) -> LDS:
    """The linear datamodelling score of `scores` against retrained models.

    Args:
        scores: [query, train], positive for proponents, in any unit: ranks are compared, and scores of a margin may
            well be held against a loss.
        outcomes: From a `RetrainingBank` of random subsets, in loss orientation.
        level: Of the confidence intervals.
        resamples: Bootstrap resamples.
        seed: Of the resampling: the same one draws the same resamples for every method.
        ceiling: From `noise_ceiling`, to compute it once for several methods.

    Raises:
        UpweightError: Shapes or ids do not match, the queries are not those that were measured, or fewer than three
            subsets have all their seeds.

    Example:
        >>> masks = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
        >>> truth = np.array([[2.0, 1.0, 4.0, 3.0]])  # what each example's removal adds to the loss
        >>> losses = (~masks).astype(float) @ truth.T
        >>> lds(truth, Outcomes(masks, losses[:, None])).value
        1.0
    """
    check_options(level, resamples)
    kept = outcomes.complete()
    predicted, truth = predict(scores, kept), kept.means
    per_query = spearman(predicted, truth)
    generator = np.random.default_rng(seed)
    weights, blocks = block_weights(kept, resamples, generator)
    score = estimate_mean(
        per_query, spearman(predicted, truth, weights), blocks, level, generator, len(kept.masks)
    )
    return LDS(
        score.within(-1, 1),
        per_query,
        ceiling or noise_ceiling(outcomes, level=level, seed=seed),
        list(kept.query_ids or []),
        len(kept.masks),
        len(outcomes.masks) - len(kept.masks),
        kept.values.shape[1],
        level,
        str(scores.info.get("method", "scores")) if isinstance(scores, Scores) else "scores",
    )


def lds_difference(
    scores: Scores | np.ndarray,
    others: Scores | np.ndarray,
    outcomes: Outcomes,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """How much higher the LDS of `scores` is than that of `others`, compared on the same resamples.

    Noise that both share (hard queries, noisy subsets) cancels, so this may be certain where two intervals overlap.
    Queries for which either is undefined are left out.
    """
    check_options(level, resamples)
    outcomes = outcomes.complete()
    a, b, truth = predict(scores, outcomes), predict(others, outcomes), outcomes.means
    generator = np.random.default_rng(seed)
    weights, blocks = block_weights(outcomes, resamples, generator)
    per_query = spearman(a, truth) - spearman(b, truth)
    resampled = spearman(a, truth, weights) - spearman(b, truth, weights)
    return estimate_mean(per_query, resampled, blocks, level, generator, len(outcomes.masks)).within(-2, 2)


def predict(scores: Any, outcomes: Outcomes) -> np.ndarray:
    """Summed scores of the examples each subset leaves out, [subset, query]: the predicted rise of the loss."""
    values = as_scores(scores, outcomes)
    sums = (~outcomes.masks).astype(np.float64) @ values.T
    # Sums that are equal but for rounding are ties: constant scores must not rank subsets by their last digits.
    scale = np.maximum(np.abs(values).sum(axis=1), np.finfo(np.float64).tiny)
    return np.round(sums / scale, 12) * scale
