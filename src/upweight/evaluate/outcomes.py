"""What retrained models measured: the truth that scores are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate.given import finite_table
from upweight.scores import Scores

__all__ = ["Outcomes", "as_scores", "check_queries", "check_unit"]


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Measurements of queries by models retrained on subsets, **lower is better** whatever the measurement was.

    Attributes:
        masks: bool, [subset, train]: True where the example was trained on.
        values: float, [subset, seed, query], in loss orientation; NaN where there is no model (a failed run).
        query_ids: One per query.
        seeds: One per seed. A seed is shared by all subsets (common random numbers).
        blocks: int, [subset]: subsets that were drawn together share a number.
        unit: Of the measurement.
        higher_is_better: Whether the measurement was negated to get ``values``.
        info: Evidence; ``info["queries"]`` is the fingerprint of the queries.
        relabelled: bool, [subset]: True where some examples were trained on with other labels. What no mask can say no
            sum of scores predicts: evaluation leaves these subsets out.

    Example:
        >>> masks = np.array([[True, False], [False, True]])
        >>> Outcomes(masks, np.array([[[0.1], [0.3]], [[0.5], [0.7]]])).means.round(3).tolist()
        [[0.2], [0.6]]
    """

    masks: np.ndarray
    values: np.ndarray
    query_ids: Sequence[int | str] | None = None
    seeds: Sequence[int] | None = None
    blocks: np.ndarray | None = None
    unit: str = "loss"
    higher_is_better: bool = False
    info: dict[str, Any] = field(default_factory=dict)
    relabelled: np.ndarray | None = None

    def __post_init__(self) -> None:
        masks, values = np.asarray(self.masks), np.asarray(self.values, dtype=np.float64)
        if masks.ndim != 2 or masks.dtype != bool or values.ndim != 3 or len(masks) != len(values):
            raise UpweightError(
                f"masks are {masks.dtype} {masks.shape} and values {values.shape}, expected bool [subset, train] and "
                "[subset, seed, query] -> a single seed still has its axis"
            )
        subsets, seeds, queries = values.shape
        defaults = {
            "query_ids": list(range(queries)),
            "seeds": list(range(seeds)),
            "blocks": np.arange(subsets),
            "relabelled": np.zeros(subsets, dtype=bool),
        }
        for name, default in defaults.items():
            given = getattr(self, name)
            if given is not None and len(given) != len(default):
                raise UpweightError(f"{len(given)} {name} for {len(default)} -> give one for each")
            object.__setattr__(self, name, default if given is None else given)
        object.__setattr__(self, "masks", masks)
        object.__setattr__(self, "values", values)

    @property
    def n(self) -> int:
        """Training examples."""
        return self.masks.shape[1]

    @property
    def means(self) -> np.ndarray:
        """Mean over seeds, [subset, query]; NaN where a seed is missing."""
        return self.values.mean(axis=1)

    def complete(self) -> Outcomes:
        """Without the subsets that lack a seed, since a mean over other seeds would be biased, or have changed labels.

        Raises:
            UpweightError: Fewer than three subsets are left.
        """
        changed = np.asarray(self.relabelled, dtype=bool)
        seeded = np.isfinite(self.values).any(axis=2).sum(axis=1) == self.values.shape[1]
        whole = np.asarray(seeded & ~changed)
        if whole.sum() < 3:
            but = f" (besides {int(changed.sum())} with changed labels)" if changed.any() else ""
            raise UpweightError(
                f"{int(whole.sum())} of {len(whole)} subsets have all their seeds{but}, expected at least 3 -> run the "
                "bank and look at the runs that failed, or retrain on more subsets"
            )
        return self if whole.all() else self.select(whole)

    def select(self, subsets: np.ndarray) -> Outcomes:
        """Only these subsets (a mask, or positions)."""
        info = {**self.info, "subsets_dropped": len(self.masks) - len(self.masks[subsets])}
        return replace(
            self,
            masks=self.masks[subsets],
            values=self.values[subsets],
            blocks=np.asarray(self.blocks)[subsets],
            relabelled=np.asarray(self.relabelled)[subsets],
            info=info,
        )

    def for_queries(self, positions: Sequence[int] | np.ndarray) -> Outcomes:
        """Only these queries, for example those that nothing was tuned on."""
        positions = np.arange(self.values.shape[2])[np.asarray(positions)]
        ids = [self.query_ids[q] for q in positions]  # type: ignore[index]
        info = {key: value for key, value in self.info.items() if key != "queries"}  # that of all of them
        return replace(self, values=self.values[:, :, positions], query_ids=ids, info=info)


def as_scores(scores: Any, outcomes: Outcomes) -> np.ndarray:
    """Finite float64 scores [query, train] that fit the outcomes, whatever they came in."""
    if isinstance(scores, Scores):
        check_queries(scores.query_ids, scores.info.get("queries"), outcomes)
    values = finite_table(scores).double().numpy()
    expected = (outcomes.values.shape[2], outcomes.n)
    if values.shape != expected:
        turned = " (they look transposed)" if values.shape == expected[::-1] else ""
        raise UpweightError(
            f"scores have shape {values.shape}, expected [query, train] = {expected}{turned} -> score the queries "
            "and the training set of the bank"
        )
    return values


def check_queries(ids: Sequence[int | str], fingerprint: object, outcomes: Outcomes) -> None:
    """Refuse scores of other queries than those of the outcomes, by their ids and, where both are known, their content.

    Positions are the same numbers whatever they number, which is why the fingerprints are compared too.
    """
    theirs, ours = list(ids), list(outcomes.query_ids or [])
    if theirs != ours:
        first = next((pair for pair in zip(theirs, ours) if pair[0] != pair[1]), (len(theirs), len(ours)))
        raise UpweightError(
            f"the scores are of other queries than the bank measured (first difference: {first[0]!r} and "
            f"{first[1]!r}) -> attribute the queries that were given to bank.measure, in that order"
        )
    known = outcomes.info.get("queries")
    if isinstance(fingerprint, str) and isinstance(known, str) and fingerprint != known:
        raise UpweightError(
            f"the scores are of other queries than the bank measured (fingerprint {fingerprint[:8]}, not {known[:8]}) "
            "-> attribute what was given to bank.measure; if it is the same data in another form, give scores.values"
        )


def check_unit(unit: str | None, outcomes: Outcomes) -> None:
    """Refuse to compare the size of scores in one unit with outcomes in another; scores that only rank have none."""
    if unit is not None and unit != outcomes.unit:
        raise UpweightError(
            f"the scores are in {unit!r} and the outcomes in {outcomes.unit!r}, expected one unit for a slope -> "
            "attribute with the task of the bank (uw.lds compares ranks, whatever the unit)"
        )
