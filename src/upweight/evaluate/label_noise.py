"""Do scores find the examples whose label is wrong?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.bootstrap import Estimate, check_options, draw_counts, interval
from upweight.scores import Scores, SelfInfluence

if TYPE_CHECKING:
    import pandas

__all__ = ["LabelNoise", "label_noise"]

AT_A_TIME = 4_000_000
"""Resampled numbers held at a time."""


@dataclass(frozen=True, eq=False)
class LabelNoise:
    """How well wrong labels were found.

    Attributes:
        auroc: Chance that a wrong label is ranked above a right one: .5 for random scores, 1 at best.
        average_precision: Precision averaged over the wrong labels found: the noise rate for random scores, 1 at best.
        recall: Share of the wrong labels among the first ``inspected`` examples, for each of these counts.
        inspected: [train]: 1, 2, ..., n.
        found: [train]: expected number of wrong labels among so many; ties are in random order.
        wrong: Wrong labels in all.
    """

    auroc: Estimate
    average_precision: Estimate
    recall: dict[int, Estimate]
    inspected: np.ndarray
    found: np.ndarray
    wrong: int

    @property
    def area(self) -> float:
        """Area under recall against the inspected share (from 1/n); below 1 even for a perfect ranking."""
        recall = self.found / self.wrong
        return float(((recall[1:] + recall[:-1]) / 2).sum() / len(recall))

    def to_pandas(self) -> pandas.DataFrame:
        """One row per number of inspected examples: inspected, found, recall."""
        return frame({"inspected": self.inspected, "found": self.found, "recall": self.found / self.wrong})

    def plot(self, axes: Axes = None) -> Axes:
        """Found against inspected, between a perfect and a random order."""
        axes = axes_or_new(axes)
        n = len(self.inspected)
        axes.plot(self.inspected, self.found, label=f"AUROC {self.auroc}")
        axes.plot([0, self.wrong, n], [0, self.wrong, self.wrong], color="0.6", ls=":", label="perfect")
        axes.plot([0, n], [0, self.wrong], color="0.6", ls="--", label="random")
        axes.set(xlabel="examples inspected", ylabel="wrong labels found")
        axes.legend()
        return axes

    def __str__(self) -> str:
        recalls = ", ".join(f"recall@{k} {value}" for k, value in self.recall.items())
        return f"AUROC {self.auroc}, average precision {self.average_precision}, {recalls}"


def label_noise(
    suspicion: SelfInfluence | Tensor | np.ndarray | Sequence[float],
    wrong: Sequence[bool] | np.ndarray | Tensor,
    *,
    inspect: Sequence[int] | None = None,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> LabelNoise:
    """How well scores find wrong labels.

    Args:
        suspicion: [train], higher is more suspicious: self-influence, a loss, a negated margin.
        wrong: [train], True where the label is known to be wrong.
        inspect: Numbers of examples at which to report the recall; as many as are wrong and twice as many, if None.
        level: Of the confidence intervals, over examples.
        resamples: Bootstrap resamples.
        seed: Of the resampling.

    Raises:
        UpweightError: Shapes do not match, a score is not finite, all labels are right, or all wrong, or more examples
            are to be inspected than there are.

    Example:
        >>> result = label_noise([0.9, 0.2, 0.8, 0.1], [True, False, False, False], resamples=50)
        >>> result.auroc.value, result.found.tolist(), result.area
        (1.0, [1.0, 1.0, 1.0, 1.0], 0.75)
    """
    check_options(level, resamples)
    if isinstance(suspicion, Scores):
        raise UpweightError(
            "suspicion is Scores [query, train], expected one number for each training example -> "
            "method.self_influence(), or a sum over queries: -scores.values.sum(0)"
        )
    values = suspicion.values if isinstance(suspicion, SelfInfluence) else suspicion
    values = (
        values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, float)
    )
    truth = np.asarray(wrong.cpu() if isinstance(wrong, Tensor) else wrong)
    n = len(truth)
    if values.shape != (n,) or truth.ndim != 1 or truth.dtype != bool:
        raise UpweightError(
            f"suspicion has shape {values.shape} and wrong is {truth.dtype} {truth.shape}, expected one number and one "
            "bool for each training example -> wrong = given_labels != true_labels"
        )
    if not np.isfinite(values).all():
        raise UpweightError(f"{int((~np.isfinite(values)).sum())} scores are not finite -> a NaN has no rank")
    if not 0 < truth.sum() < n:
        raise UpweightError(
            f"{int(truth.sum())} of {n} labels are wrong, expected some of both -> nothing to tell apart"
        )
    count = int(truth.sum())
    counts = _counts(inspect, n) if inspect is not None else [k for k in (count, 2 * count) if k <= n]
    generator = np.random.default_rng(seed)
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))  # last of each run of ties
    resampled: list[np.ndarray] = []
    step = max(1, AT_A_TIME // n)
    for start in range(0, resamples, step):
        drawn = draw_counts(n, min(step, resamples - start), generator)[:, order]
        resampled.append(_statistics(drawn, truth[order], ends, [k / n for k in counts]))
    replicates = np.concatenate(resampled)
    found = _found(np.ones((1, n)), truth[order], ends)
    curve = np.interp(np.arange(1, n + 1), found[0][0], found[1][0])

    def estimate(value: float, column: int) -> Estimate:
        return Estimate(float(value), {"examples": interval(value, replicates[:, column], n, level)}).within(
            0, 1
        )

    return LabelNoise(
        estimate(roc_auc_score(truth, values), 0),
        estimate(average_precision_score(truth, values), 1),
        {k: estimate(curve[k - 1] / count, 2 + j) for j, k in enumerate(counts)},
        np.arange(1, n + 1),
        curve,
        count,
    )


def _counts(inspect: Sequence[int], n: int) -> list[int]:
    for k in inspect:
        if not isinstance(k, int | np.integer) or not 0 < k <= n:
            raise UpweightError(
                f"inspect={[*inspect]}, expected whole numbers from 1 to {n} -> how many examples are looked at, not "
                "their share"
            )
    return [int(k) for k in dict.fromkeys(inspect)]


def _found(weights: np.ndarray, wrong: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Examples inspected and wrong ones found after each run of ties, [resample, runs + 1] from zero."""
    both = (np.cumsum(weights, axis=1)[:, ends], np.cumsum(weights * wrong, axis=1)[:, ends])
    inspected, found = (np.pad(part, ((0, 0), (1, 0))) for part in both)
    return inspected, found


def _statistics(
    weights: np.ndarray, wrong: np.ndarray, ends: np.ndarray, shares: Sequence[float]
) -> np.ndarray:
    """AUROC, average precision and recalls of each resample, [resample, 2 + shares]; NaN if all labels are alike."""
    inspected, found = _found(weights, wrong, ends)
    n, total = inspected[:, -1:], found[:, -1:]
    right = inspected - found
    with np.errstate(divide="ignore", invalid="ignore"):
        auroc = (np.diff(right) * (found[:, 1:] + found[:, :-1])).sum(axis=1) / (2 * total * (n - total))[
            :, 0
        ]
        precision = np.where(inspected[:, 1:] > 0, found[:, 1:] / inspected[:, 1:], 0)
        average = (np.diff(found) * precision).sum(axis=1) / total[:, 0]
        recalls = [
            [np.interp(share * i[-1], i, f) / f[-1] for share in shares]
            for i, f in zip(inspected, found, strict=True)
        ]
    return np.column_stack([auroc, average, np.asarray(recalls).reshape(len(weights), len(shares))])
