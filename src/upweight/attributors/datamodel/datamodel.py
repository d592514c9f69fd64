"""Datamodel: what retrained models measured, regressed on what they were trained on.

    min_w  |Y_q - b - Z w|^2 / 2J + penalty |w|_1        scores[q, i] = -w_i

with masks Z [subset, train], which examples a model was trained on, and Y [subset, query], what it measured, lower
being better. Positive: a *proponent*; models trained without it measured worse. The scores are removal effects at the
subsets' size, in the measurement's unit. "Datamodels: Predicting Predictions from Training Data" (arXiv 2202.00622).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from upweight._ids import some
from upweight.attributors.datamodel.regression import (
    LEVELS,
    Estimator,
    centred,
    chosen,
    fitted,
    groups_of,
    least_squares,
    scale_of,
    spearman,
    split,
)
from upweight.attributors.evidence import library_versions
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

LEAST_SPREAD = 0.2
"""Standard deviation of the subsets' sizes, as a share of n, that Shapley values take, if twice that of coin tosses,
1 / sqrt(n), is not less: .29 of all sizes alike, .12 of those from three to seven tenths."""
INNER_FOLDS = 3
"""Folds by which the penalty is chosen again inside each fold of the held-out score."""


class OutcomesLike(Protocol):
    """What `Datamodel` reads of the outcomes of retrained models."""

    @property
    def masks(self) -> np.ndarray: ...
    @property
    def values(self) -> np.ndarray: ...


class Datamodel:
    """Linear regression of retrained models' measurements on their training sets.

    ``scores[query, i]`` is the weight of training example i in the prediction of the query's measurement from the
    subset trained on, negated: the predicted change on removal, in the measurement's unit, at the fraction of the data
    that the subsets hold (``info["subset_fraction"]``). Positive for proponents.

    Where all subsets have one size, no regression can tell a constant that all examples share: scores are then relative
    to removing an average example (``info["identified"]`` says so). Their ranks are not affected.

    Args:
        model: accepted so that all attributors can be made alike, and not looked at: the scores are about the training
            recipe.
        task: the task whose measurement the outcomes are of.
        outcomes: ``bank.outcomes(name)`` of a retraining bank; or ``(masks, values)`` with masks [subset, train] and
            values [subset, query] or [subset, seed, query], **lower is better** (negate a margin).
        estimator: ``"lasso"`` (sparse), ``"ridge"`` (better where subsets are few and every example counts a little),
            or ``"difference"``: the mean outcome without the example minus the mean with it (subsampled influence; of
            half-subsets, the Data Banzhaf value by maximum sample reuse), which has no penalty; or ``"shapley"``: the
            Data Shapley value, up to a constant, of a bank of `evaluate.subsets.any_size` (with `least` and `most`, the
            mean over these sizes alone).
        alpha: ``"cv"`` chooses each query's penalty on held-out masks; a number is the penalty of the objective
            ``|Y - b - Z w|^2 / 2J + alpha |w|_1`` (ridge: ``+ alpha |w|^2 / 2``); 0 is least squares, which needs more
            subsets than training examples.
        folds: for the choice of the penalty and for the held-out score. Copies and complements of a mask, and subsets
            that were drawn together, are never on both sides.
        seed: of the folds.

    Cost: no training beyond the bank's; about 25 regressions a query (0.05 s each with 100 subsets of 6,144 examples).

    Fails when: there are few subsets for the number of examples. ``info["held_out_lds"]`` says how well the regression
    ranks subsets that it has not seen, each fold with a penalty chosen without it; near 0, the scores mean nothing.

    Raises:
        UpweightError: the outcomes do not fit each other or the task, or the arguments are not known.

    Source: *Datamodels: Predicting Predictions from Training Data* (arXiv 2202.00622); ``"difference"``: *What Neural
    Networks Memorize and Why* (arXiv 2008.03703), *Data Banzhaf* (arXiv 2205.15466), *Data Shapley* (arXiv 1904.02868).

    Example:
        >>> import numpy as np, torch, upweight as uw
        >>> rng = np.random.default_rng(0)
        >>> masks = rng.random((60, 6)) < 0.5
        >>> helps = np.array([[0.5], [0.0], [-0.25], [0.0], [0.0], [0.0]])  # by how much each lowers the loss
        >>> method = uw.Datamodel(None, uw.Classification(), outcomes=(masks, 2 - masks @ helps), alpha=0)
        >>> scores = method.fit(torch.zeros(6, 1)).attribute(torch.zeros(1, 1))
        >>> torch.allclose(scores.values, torch.tensor(helps.T)), scores.unit
        (True, 'nats')
    """

    def __init__(
        self,
        model: nn.Module | None,
        task: Task,
        *,
        outcomes: OutcomesLike | tuple[Any, Any],
        estimator: Estimator = "lasso",
        alpha: float | str = "cv",
        folds: int = 5,
        seed: int = 0,
    ) -> None:
        if estimator not in LEVELS:
            raise UpweightError(f"estimator={estimator!r} is unknown -> use one of {sorted(LEVELS)}")
        number = isinstance(alpha, (int, float)) and math.isfinite(alpha) and alpha >= 0
        if alpha != "cv" and not number:
            raise UpweightError(f"alpha={alpha!r}, expected 'cv' or a finite number >= 0 -> 'cv'")
        if estimator in ("difference", "shapley") and alpha != "cv":
            raise UpweightError(
                f"alpha={alpha!r} with estimator={estimator!r}, which has no penalty -> leave it out"
            )
        self.model, self.task, self.alpha = model, task, alpha
        self.estimator: Estimator = estimator
        self.folds, self.seed = folds, seed
        self._masks, self._values, self._query_ids, self._blocks, self._dropped = _read(outcomes, task)
        sizes = self._masks.sum(1)
        n = self._masks.shape[1]
        least = min(LEAST_SPREAD, n**-0.5) * n
        if estimator == "shapley" and (sizes.std() < least or sizes.max() == n):
            raise UpweightError(
                f"subsets of {sizes.min()} to {sizes.max()} of {n} examples, with a standard deviation of "
                f"{sizes.std():.3g}, expected all sizes below the whole alike -> a bank of "
                "evaluate.subsets.any_size(n, count)"
            )
        known = (getattr(outcomes, "info", None) or {}).get("queries")
        self._queries = known if isinstance(known, str) else None
        self._groups = groups_of(self._masks, self._blocks)
        most = len(np.unique(self._groups)) // 3
        if not 2 <= folds <= most:
            raise UpweightError(
                f"folds={folds} with {len(np.unique(self._groups))} independent subsets (complements and copies count "
                f"once), expected 2 to {most}: at least 3 in each -> fewer folds, or more subsets"
            )
        if alpha == 0 and len(self._masks) <= self._masks.shape[1]:
            raise UpweightError(
                f"alpha=0 with {len(self._masks)} subsets for {self._masks.shape[1]} training examples, expected more "
                "subsets than examples: many weights fit exactly -> alpha='cv'"
            )
        self._examples: Examples | None = None
        self._weights = np.zeros((0, 0))
        self._facts: dict[str, Any] = {}

    def fit(self, train: Any, *, ids: Sequence[int | str] | None = None) -> Datamodel:
        """Regress the outcomes on the masks, query by query.

        Args:
            train: the training data whose positions the masks are about.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: the masks are of another number of examples.
        """
        examples = Examples(train, ids)
        if examples.n != self._masks.shape[1]:
            raise UpweightError(
                f"the masks are of {self._masks.shape[1]} training examples but the data holds {examples.n} -> fit on "
                "the data that the bank was trained on"
            )
        started = time.perf_counter()
        Z, Y = self._masks.astype(np.float64), self._values
        folds = split(self._groups, self.folds, self.seed)
        self._weights, self._facts = self._regress(Z, Y, folds)
        held_out = self._held_out(Z, Y, folds)
        sizes = self._masks.sum(1)
        one_size = bool((sizes == sizes[0]).all()) or self.estimator == "shapley"
        self._facts |= {
            "fingerprints": {"train": examples.fingerprint()},
            "held_out_lds": float(held_out.mean()),
            "held_out_lds_by_query": held_out.tolist(),
            "subset_sizes": [int(sizes.min()), int(sizes.max())],
            "subset_fraction": float(self._masks.mean()),
            "identified": "up to a constant per query: relative to removing an average example"
            if one_size
            else "fully",
            "fit_seconds": round(time.perf_counter() - started, 3),
        }
        self._examples = examples
        return self

    def attribute(self, query: Any, *, ids: Sequence[int | str] | None = None) -> Scores:
        """Score every training example for the queries that the bank measured.

        Args:
            query: the queries of the outcomes, all of them in their order; or some of them in any order, with ids.
            ids: one id per query, those of the outcomes; needed only if they are not all.

        Returns:
            `Scores` [query, train], in the measurement's unit at the subsets' fraction of the data.

        Raises:
            UpweightError: not fitted, or the queries are not those that the bank measured.
        """
        examples = self._ready()
        queries = Examples(query, ids)
        rows = self._rows(queries)
        info = self._info() | {"queries": queries.fingerprint()}
        values = torch.from_numpy(-self._weights[rows])
        return Scores(values, queries.ids, examples.ids, self.task.unit, info)

    def self_influence(self) -> SelfInfluence:
        """Refused: nothing says that the outcomes are of the training examples themselves.

        Raises:
            UpweightError: always.
        """
        self._ready()
        raise UpweightError(
            "Datamodel has no self-influence by itself: the bank measured queries -> measure the training data as "
            "queries, and take attribute(train).values.diagonal()"
        )

    def _regress(self, Z: np.ndarray, Y: np.ndarray, folds: Sequence[np.ndarray]) -> tuple[np.ndarray, dict]:
        """Weights [query, train], and how they came about."""
        if self.estimator in ("difference", "shapley"):
            return fitted(self.estimator, Z, Y, LEVELS[self.estimator])[0], {}
        if self.alpha == 0:
            rank = int(np.linalg.matrix_rank(Z - Z.mean(0)))
            return least_squares(Z, Y), {"penalty": 0.0, "rank": rank}
        if self.alpha == "cv":
            found = chosen(self.estimator, Z, Y, folds)
            facts = {
                "penalties": found.penalties.tolist(),
                "held_out_error": float(found.errors.mean()),
                "nonzero": float((found.weights != 0).sum(1).mean()),
            }
            return found.weights, facts
        return self._at_alpha(Z, Y), {"penalty": float(self.alpha)}

    def _at_alpha(self, Z: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """Weights at the penalty that the user gave."""
        scale = scale_of(self.estimator, *centred(Z, Y))
        weights = np.zeros((Y.shape[1], Z.shape[1]))
        for query in np.flatnonzero(scale > 0):
            level = np.array([float(self.alpha) / scale[query]])
            weights[query] = fitted(self.estimator, Z, Y[:, [query]], level)[0, 0]
        return weights

    def _held_out(self, Z: np.ndarray, Y: np.ndarray, folds: Sequence[np.ndarray]) -> np.ndarray:
        """LDS of every query on masks that took no part, not even in the choice of the penalty; mean over folds."""
        found = []
        for held_out in folds:
            rest = np.setdiff1d(np.arange(len(Z)), held_out)
            count = min(INNER_FOLDS, len(np.unique(self._groups[rest])))
            inner = split(self._groups[rest], count, self.seed)
            weights, _ = self._regress(Z[rest], Y[rest], inner)
            removed = (1 - Z[held_out]) @ -weights.T  # sum of the scores of what was left out
            found.append(spearman(removed.T, Y[held_out].T))
        return np.mean(found, axis=0)

    def _rows(self, queries: Examples) -> list[int]:
        """Which of the outcomes' queries these are."""
        count = self._values.shape[1]
        # Positions do not say which queries they are of.
        if self._query_ids is None or isinstance(queries.ids, range):
            if queries.n != count:
                if self._query_ids is None:
                    have, some_of_them = f"for outcomes of {count} that have no ids", ""
                else:
                    have, some_of_them = (
                        f"without ids for outcomes of {count}",
                        ", or some with the ids they had there",
                    )
                raise UpweightError(
                    f"{queries.n} queries {have} -> give all of them, in their order{some_of_them}"
                )
            if self._queries is not None and queries.fingerprint() != self._queries:
                raise UpweightError(
                    f"the queries are not those that the bank measured (fingerprint {queries.fingerprint()[:8]}, not "
                    f"{self._queries[:8]}) -> give what was given to bank.measure, or name them by ids="
                )
            return list(range(count))
        number = {name: row for row, name in enumerate(self._query_ids)}
        if unknown := [name for name in queries.ids if name not in number]:
            raise UpweightError(
                f"the bank did not measure the queries {some(unknown)} (but {some(self._query_ids)}) -> give its "
                f"{count} queries, with the ids they had in bank.measure"
            )
        return [number[name] for name in queries.ids]

    def _ready(self) -> Examples:
        if self._examples is None:
            raise UpweightError("not fitted yet -> call fit(train) first")
        return self._examples

    def _info(self) -> dict[str, Any]:
        examples = self._ready()
        return {
            "method": "datamodel",
            "estimator": self.estimator,
            "alpha": self.alpha,
            "higher_is_better": self.task.higher_is_better,
            "convention": "positive = proponent: models trained without the example measured worse",
            "n": examples.n,
            "subsets": len(self._masks),
            "subsets_dropped": self._dropped,
            "folds": self.folds,
            "seed": self.seed,
            "versions": library_versions(),
            **self._facts,
        }


def _read(
    outcomes: Any, task: Task
) -> tuple[np.ndarray, np.ndarray, list[Any] | None, np.ndarray | None, int]:
    """Masks, mean values over seeds, query ids, blocks, and how many subsets without a value were dropped."""
    blocks, query_ids = getattr(outcomes, "blocks", None), getattr(outcomes, "query_ids", None)
    if hasattr(outcomes, "masks") and hasattr(outcomes, "values") and not callable(outcomes.values):
        masks, values = outcomes.masks, outcomes.values
        theirs = (
            getattr(outcomes, "unit", task.unit),
            getattr(outcomes, "higher_is_better", task.higher_is_better),
        )
        if theirs != (task.unit, task.higher_is_better):
            raise UpweightError(
                f"the outcomes are in {theirs[0]!r} and the task measures {task.unit!r} (higher is better: {theirs[1]} "
                f"and {task.higher_is_better}) -> give the task of the bank"
            )
    elif isinstance(outcomes, tuple) and len(outcomes) == 2:
        masks, values = outcomes
    else:
        raise UpweightError(
            f"outcomes is {type(outcomes).__name__}, expected bank.outcomes(name) or (masks, values) -> give one of "
            "them"
        )
    masks, values = _array(masks), _array(values).astype(np.float64)
    values = values[:, None] if values.ndim == 2 else values  # [subset, seed, query]
    if masks.ndim != 2 or values.ndim != 3 or len(masks) != len(values) or 0 in masks.shape + values.shape:
        raise UpweightError(
            f"masks have shape {masks.shape} and values {values.shape}, expected [subset, train] and [subset, query] "
            "or [subset, seed, query] -> one mask for every trained model"
        )
    if not np.isin(masks, (0, 1)).all():
        raise UpweightError("masks hold other values than 0 and 1 -> True where the example was trained on")
    if np.isinf(values).any():
        raise UpweightError(f"{int(np.isinf(values).sum())} values are infinite -> leave those models out")
    whole = np.asarray(np.isfinite(values).all(axis=(1, 2)))
    relabelled = getattr(outcomes, "relabelled", None)  # masks do not tell what their models were trained on
    whole &= True if relabelled is None else ~np.asarray(relabelled, dtype=bool)
    if whole.sum() < 6:
        raise UpweightError(
            f"{int(whole.sum())} of {len(whole)} subsets have all their values, expected at least 6 -> train "
            "more models"
        )
    ids = None if query_ids is None else list(query_ids)
    kept_blocks = None if blocks is None else np.asarray(blocks)[whole]
    return masks[whole].astype(bool), values[whole].mean(1), ids, kept_blocks, int((~whole).sum())


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
