"""Do scores predict what leaving one example out does, and on what scale?

    truth[q, i] = mean over seeds of m_q(theta without i) - m_q(theta of all)       compared with scores[q, i]

A calibrated method has slope 1 and intercept 0 under the convention it predicts: retraining on the mean of n-1 losses
adds a constant per query that retraining on the sum of losses over n does not have.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bootstrap import (
    Estimate,
    check_options,
    draw_counts,
    estimate_mean,
    interaction_once,
    interval,
)
from upweight.evaluate.outcomes import Outcomes, as_scores, check_unit
from upweight.evaluate.ranks import spearman, weighted_pearson
from upweight.scores import Scores

if TYPE_CHECKING:
    import pandas

__all__ = ["LeaveOneOut", "leave_one_out"]


@dataclass(frozen=True, eq=False)
class LeaveOneOut:
    """How scores compare with leaving examples out for real.

    Attributes:
        pearson: Mean over queries of the correlation across examples; higher is better, 1 at most.
        per_query: [query], that correlation; NaN where all scores or all effects are equal, or one was not measured.
        spearman: The same of ranks.
        slope: Of truth on prediction, over all pairs; 1 if the scale is right, above 1 if scores are too small; NaN if
            all scores are equal.
        intercept: Of the same line, in the unit of the measurement.
        noise_sd: Standard deviation between seeds of one measured difference; NaN with a single seed.
        predicted: [query, example].
        truth: [query, example], means over seeds.
        examples: Positions of the examples left out.
        query_ids: One per query.
        seeds: Seeds averaged.
        unit: Of truth, and of calibrated predictions.
    """

    pearson: Estimate
    per_query: np.ndarray
    spearman: Estimate
    slope: Estimate
    intercept: Estimate
    noise_sd: float
    predicted: np.ndarray
    truth: np.ndarray
    examples: np.ndarray
    query_ids: list[int | str]
    seeds: int
    unit: str

    @property
    def undefined(self) -> int:
        """Queries without a correlation; they are not in its mean."""
        return int(np.isnan(self.per_query).sum())

    @property
    def noise_sd_of_means(self) -> float:
        """What seed noise is left in ``truth``; compare it with the spread of ``truth`` itself."""
        return self.noise_sd / np.sqrt(self.seeds)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per pair: query_id, train, predicted, truth."""
        queries, examples = self.truth.shape
        return frame(
            {
                "query_id": np.repeat(np.asarray(self.query_ids, dtype=object), examples),
                "train": np.tile(self.examples, queries),
                "predicted": self.predicted.reshape(-1),
                "truth": self.truth.reshape(-1),
            }
        )

    def plot(self, axes: Axes = None) -> Axes:
        """Truth against prediction, with the fitted line."""
        axes = axes_or_new(axes)
        axes.scatter(self.predicted, self.truth, s=4, alpha=0.4)
        ends = np.array([self.predicted.min(), self.predicted.max()])
        axes.plot(
            ends, self.intercept.value + self.slope.value * ends, color="C3", label=f"slope {self.slope}"
        )
        axes.set(
            xlabel="score", ylabel=f"change when left out [{self.unit}]", title=f"Pearson {self.pearson}"
        )
        axes.legend()
        return axes

    def __str__(self) -> str:
        text = (
            f"leave-one-out of {len(self.examples)} examples x {len(self.query_ids)} queries, {self.seeds} seeds: "
            f"Pearson {self.pearson}, Spearman {self.spearman}, slope {self.slope}, intercept "
            f"{self.intercept.value:.3g}, noise SD {self.noise_sd:.3g} ({self.noise_sd_of_means:.3g} of the means)"
        )
        return text + (f", {self.undefined} queries undefined" if self.undefined else "")


def leave_one_out(
    scores: Scores | np.ndarray,
    outcomes: Outcomes,
    *,
    weights: np.ndarray | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LeaveOneOut:
    """Compare scores with leaving examples out for real, one at a time.

    Args:
        scores: [query, train], positive for proponents.
        outcomes: From a bank of ``subsets.leave_one_out(n, positions)``: one training set is the whole.
        weights: [train], how many examples each one that was left out stands for, if they were sampled by their
            scores (those of the others are not looked at); equal, if None.
        level: Of the confidence intervals.
        resamples: Bootstrap resamples of queries and of examples.
        seed: Of the resampling.

    Raises:
        UpweightError: The outcomes are not of leaving one out, or lack the whole set with its own labels; or the scores
            are of other queries or in another unit.

    Example:
        >>> from upweight.evaluate import subsets
        >>> truth = np.array([[1.0, -2.0, 0.5, 3.0]])
        >>> masks = subsets.leave_one_out(4).masks
        >>> losses = 7 + (~masks).astype(float) @ truth.T
        >>> result = leave_one_out(truth / 2, Outcomes(masks, losses[:, None]))
        >>> result.pearson.value, result.slope.value, result.intercept.value
        (1.0, 2.0, 0.0)
    """
    check_options(level, resamples)
    values = as_scores(scores, outcomes)
    check_unit(scores.unit if isinstance(scores, Scores) else None, outcomes)
    outcomes = outcomes.complete()
    truth, examples = removal_effects(outcomes)  # [seed, query, example]
    means = truth.mean(axis=0)
    predicted = values[:, examples]
    given = np.ones(outcomes.n) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.shape != (outcomes.n,):
        raise UpweightError(
            f"weights have shape {given.shape}, expected one for each of {outcomes.n} training examples -> any number "
            "for those that were not left out"
        )
    given = given[examples]
    if not (given > 0).all():
        raise UpweightError(
            "a weight of an example left out is not positive -> how many examples it stands for"
        )
    generator = np.random.default_rng(seed)
    drawn = draw_counts(len(examples), resamples, generator) * given
    once = given[None]

    correlation, ranks = _pearson(predicted, means, once)[0], spearman(predicted.T, means.T, once)[0]
    pearson, rank = (
        _renamed(estimate_mean(one, many, len(examples), level, generator)).within(-1, 1)
        for one, many in (
            (correlation, _pearson(predicted, means, drawn)),
            (ranks, spearman(predicted.T, means.T, drawn)),
        )
    )
    # A query that lacks a measurement is left out of the line, as it is of the correlations.
    whole = np.isfinite(means).all(axis=1)
    if not whole.any():
        raise UpweightError(
            "no query has all its measurements, expected at least one -> run the bank, and look at what failed"
        )
    x, y, count = predicted[whole], means[whole], int(whole.sum())
    queries, each = draw_counts(count, resamples, generator), np.ones((1, count))
    line = [part[0] for part in _line(x, y, each, once)]
    resampled = {
        "queries": (_line(x, y, queries, once), count),
        "examples": (_line(x, y, each, drawn), len(examples)),
        "both": (_line(x, y, queries, drawn), min(count, len(examples))),
    }
    slope, intercept = (_estimate(line[part], part, resampled, level) for part in (0, 1))
    return LeaveOneOut(
        pearson,
        correlation,
        rank,
        slope,
        intercept,
        float(np.sqrt(truth[:, whole].var(axis=0, ddof=1).mean())) if len(truth) > 1 else float("nan"),
        predicted,
        means,
        examples,
        list(outcomes.query_ids or []),
        len(truth),
        outcomes.unit,
    )


def removal_effects(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Change of each measurement when one example is left out, seed by seed.

    Returns:
        [seed, query, example], and the examples' positions.
    """
    missing = (~outcomes.masks).sum(axis=1)
    if not (missing == 0).any():
        raise UpweightError(
            "no model was trained on the whole set -> bank of subsets.leave_one_out(n, positions)"
        )
    if not set(missing.tolist()) <= {0, 1}:
        raise UpweightError(
            f"a subset leaves out {missing.max()} examples, expected 1 -> bank of subsets.leave_one_out(n, positions)"
        )
    left_out = missing == 1
    if left_out.sum() < 2:
        raise UpweightError(
            f"{int(left_out.sum())} examples were left out, expected at least 2: one has no slope and no rank -> bank "
            "of subsets.leave_one_out(n, positions) with more positions"
        )
    # The same seed with and without the example: noise that both share cancels.
    whole = outcomes.values[missing == 0].mean(axis=0)  # [seed, query]
    effects = (outcomes.values[left_out] - whole).transpose(1, 2, 0)
    return effects, np.argmin(outcomes.masks[left_out], axis=1)


def _pearson(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each query's row [query, example] in each resample, [resample, query]."""
    rows = [weighted_pearson(*np.broadcast_arrays(a, b, weights)) for a, b in zip(x, y, strict=True)]
    return np.stack(rows, axis=1)


def _line(
    x: np.ndarray, y: np.ndarray, queries: np.ndarray, examples: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and intercept of y on x [query, example], weighted by both axes, for each resample; NaN for constant x."""

    def total(of: np.ndarray) -> np.ndarray:
        return ((queries @ of) * examples).sum(axis=1)

    # Centred and scaled first: sums of squares about an offset, or of tiny numbers, would lose all their digits.
    size, x_mean, y_mean = float(np.abs(x).max(initial=0.0)) or 1.0, x.mean(), y.mean()
    u, v = (x - x_mean) / size, y - y_mean
    weight, su, sv, suu = total(np.ones_like(u)), total(u), total(v), total(u * u)
    spread, shared = suu - su * su / weight, total(u * v) - su * sv / weight
    # A constant leaves rounding noise, not zero: of the numbers themselves, and of the sum it is what is left of.
    varies = spread > 1e-24 * weight + 1e-13 * suu
    slope = np.divide(shared, spread, out=np.full(len(weight), np.nan), where=varies)
    return slope / size, y_mean + (sv - slope * su) / weight - slope / size * x_mean


def _estimate(value: float, part: int, resampled: dict[str, Any], level: float) -> Estimate:
    """The slope (part 0) or the intercept (part 1), with an interval over queries, examples and both."""
    lines = {name: found[part] for name, (found, _) in resampled.items()}
    lines["both"] = interaction_once(lines["queries"], lines["examples"], lines["both"])
    found = {name: interval(value, lines[name], units, level) for name, (_, units) in resampled.items()}
    return Estimate(float(value), found)


def _renamed(estimate: Estimate) -> Estimate:
    """The same, with what was resampled called examples."""
    return replace(
        estimate, intervals={k.replace("subsets", "examples"): v for k, v in estimate.intervals.items()}
    )
