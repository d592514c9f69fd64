"""What is wrong with the training data? Label errors, near-duplicates, outliers, harmful and rare examples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight.attributors.evidence import library_versions
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.repair.duplicates import near_duplicates
from upweight.repair.evidence import Evidence, Options, UnavailableError
from upweight.repair.issue_table import COLUMNS, KINDS, IssueTable, check_kind
from upweight.repair.suspicion import DETECTORS, choose, suspicion
from upweight.repair.thresholds import discoveries, expected_precision_cut, pooled_posterior, tail
from upweight.repair.validation_effect import ValidationEffect
from upweight.task import Task

if TYPE_CHECKING:
    from upweight.attributors.baselines.aum import MarginLog
    from upweight.attributors.checkpoints import Checkpoint
    from upweight.attributors.influence import Influence

__all__ = ["audit"]

SURE = 1.645
"""Standard errors by which an effect on the validation set must differ from zero: one-sided, 5 %."""


@without_autocast()
def audit(
    model: nn.Module,
    task: Task,
    train: Any,
    *,
    validation: Any = None,
    kinds: Sequence[str] | None = None,
    detector: str = "auto",
    precision: float = 0.8,
    probabilities: Tensor | np.ndarray | None = None,
    train_fn: Callable[..., nn.Module] | None = None,
    folds: int = 3,
    checkpoints: Sequence[Checkpoint] | None = None,
    learning_rates: Sequence[float] | float | None = None,
    log: MarginLog | None = None,
    influence: Influence | None = None,
    neighbours: int | None = None,
    ids: Sequence[int | str] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str = "auto",
    progress: bool = True,
) -> IssueTable:
    """Find what is wrong with the training data.

    Each kind of issue gives every training example a score from 0 (worst) to 1:

    * "label": 1 less the chance that the label is wrong. A *detector* ranks the labels, the threshold comes from
      out-of-sample probabilities (see `upweight.repair.class_posterior`): among those flagged, at least the share
      ``precision`` is expected to be wrong. Each gets a suggested label, by the same probabilities.
    * "near_duplicate": distance to the nearest neighbour in the network's embeddings, over the median one.
    * "outlier": chance that an example of the bulk lies so far from its neighbours.
    * "harmful": chance that an example of the bulk does so much harm to the mean validation measurement; flagged if
      besides the harm is larger than the validation set's own chance.
    * "rare": as "outlier", for self-influence, of examples whose label is likely right: those are worth keeping.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss, and what is measured on the validation data.
        train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on.
        validation: held-out examples with labels to be trusted, in the same form. Without them nothing is "harmful",
            and the column influence is empty.
        kinds: which issues to look for; all that the model and the data allow, if None.
        detector: of label errors: "self_influence", "loss", "margin", "aum", "el2n", "tracin", "tracin_last_layer",
            "confident_learning", "knn", "combined" (mean rank of margin, neighbours and what else can be had), or
            "auto": "combined", which no other is far ahead of in our benchmarks; "loss" for tasks without classes.
        precision: share of the flagged that should really be wrong; for outliers, harmful and rare examples, one less
            the false discovery rate.
        probabilities: out-of-sample probabilities of the classes, [train, class].
        train_fn: instead of those, ``(indices, seed) -> model``; `folds` models are trained.
        folds: for train_fn.
        checkpoints: of the training run, for "aum", "el2n" and "tracin": state dicts, files, models, or functions.
        learning_rates: at the checkpoints, for "tracin"; all alike if None.
        log: for "aum", margins recorded while training (`AUM.log`), instead of checkpoints.
        influence: how to compute influence: an `Influence` of this model; EK-FAC if None.
        neighbours: how many to ask; half the square root of n, between 10 and 50, if None.
        ids: one id per training example; positions if None.
        seed: of whatever is random.
        batch_size: examples per forward pass; chosen if None.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        progress: show progress bars (in a terminal only).

    Returns:
        `IssueTable`: one row per training example and kind.

    Raises:
        UpweightError: what is wrong with the model, the task or the data, or what a detector lacks, in one line.

    Cost: embeddings and losses cost a forward pass; self-influence and influence on the validation data the fit of
    `Influence` and four more passes; neighbours n^2 d multiplications. A few tables of n x classes are held in memory.

    Fails when: the network has learnt wrong labels by heart: its losses, margins and gradients hide them, and its
    embeddings put them among their wrong class. Give checkpoints, a log, or train_fn.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(120, 2)
        >>> y = (x[:, 0] > 0).long()
        >>> y[7] = 1 - y[7]
        >>> model = torch.nn.Linear(2, 2)
        >>> _ = model.weight.data.copy_(torch.tensor([[-4.0, 0.0], [4.0, 0.0]]))
        >>> table = uw.audit(model, uw.Classification(), (x, y), kinds=["label"], detector="loss")
        >>> table.flagged("label").ids, table.suggestions() == {7: 1 - int(y[7])}
        ([7], True)
    """
    for kind in kinds or ():
        check_kind(kind)
    if detector != "auto" and detector not in DETECTORS:
        raise UpweightError(f"there is no detector {detector!r} -> one of {', '.join(['auto', *DETECTORS])}")
    if not 0 < precision < 1:
        raise UpweightError(f"precision={precision}, expected 0 < precision < 1 -> 0.8")
    if neighbours is not None and not (isinstance(neighbours, int) and neighbours >= 1):
        raise UpweightError(f"neighbours={neighbours!r}, expected a whole number from 1 up -> None chooses")
    if influence is not None and influence.model is not model:
        raise UpweightError(
            "influence= is of another model than the one to audit -> Influence(model, task, ...)"
        )
    if influence is not None and influence.correction is not None:
        raise UpweightError(
            f"influence= has correction={influence.correction!r}, but effects on validation data are of first order -> "
            "correction=None"
        )
    started = time.perf_counter()
    examples = Examples(train, ids)
    options = Options(
        influence,
        probabilities,
        train_fn,
        folds,
        checkpoints,
        learning_rates,
        log,
        neighbours,
        seed,
        batch_size,
        memory,
        progress,
    )
    held_out = None if validation is None else Examples(validation)
    evidence = Evidence(model, task, examples, options, held_out)
    work = _Audit(evidence, detector, precision)
    found, facts, left_out = [], {}, {}
    for kind in kinds or KINDS:
        try:
            rows, info = getattr(work, kind)()
        except UnavailableError as error:
            if kinds is not None:
                raise
            left_out[kind] = str(error)
            continue
        found.append(_columns(kind, rows, evidence))
        facts[kind] = {**info, "flagged": int(rows["is_issue"].sum())}
    columns = {name: np.concatenate([part[name] for part in found]) for name in COLUMNS}
    settings = {
        "task": task.name,
        "n": examples.n,
        "validation": None if held_out is None else held_out.n,
        "precision": precision,
        "neighbours": evidence.asked,
        "seed": seed,
        "train": examples.fingerprint(),
        "model": model_fingerprint(model),
        "versions": library_versions(),
        "seconds": round(time.perf_counter() - started, 3),
    }
    info = {"settings": settings, "detectors": facts, "left_out": left_out}
    return IssueTable(columns, info | ({"influence": work.influence_info()} if held_out is not None else {}))


Rows = dict[str, np.ndarray]
"""Columns [n] in the training order: score and is_issue at least; `order`, what to rank by (the score if missing)."""


class _Audit:
    """One method a kind of issue: its rows, and how they were found."""

    def __init__(self, evidence: Evidence, detector: str, precision: float) -> None:
        self.evidence, self.validation, self.precision = evidence, evidence.validation, precision
        self.detector = detector
        self._effect: ValidationEffect | None = None
        self._labels: tuple[Rows, dict[str, Any]] | None = None

    def label(self) -> tuple[Rows, dict[str, Any]]:
        if self._labels is None:
            self._labels = self._label()
        return self._labels

    def _label(self) -> tuple[Rows, dict[str, Any]]:
        evidence = self.evidence
        name = choose(evidence) if self.detector == "auto" else self.detector
        values = suspicion(name, evidence)
        posterior, labels = evidence.posterior, evidence.labels
        if posterior is None:  # no labels to speak of: how far the detector's value is out of the ordinary
            chance = tail(_logs(values))
            rows = {"score": chance, "is_issue": discoveries(chance, self.precision), "order": -values}
            rule = f"false discovery rate {1 - self.precision:.2g}, against the bulk of the values"
            return self._with_influence(rows, None, name), {"detector": name, "threshold": rule}
        rows = {
            "score": 1 - pooled_posterior(values, posterior.wrong),
            "is_issue": expected_precision_cut(values, posterior.wrong, self.precision),
            "order": -values,
            "predicted_label": posterior.suggested,
            "suggested_probability": posterior.probability,
        }
        flags = rows["is_issue"]
        info = {
            "detector": name,
            "threshold": f"expected precision {self.precision:.2g}: the mean posterior of those flagged",
            "expected_precision": round(float(posterior.wrong[flags].mean()), 4) if flags.any() else None,
            "classes": labels.classes,
            **posterior.info,
        }
        return self._with_influence(rows, posterior.suggested, name), info

    def near_duplicate(self) -> tuple[Rows, dict[str, Any]]:
        rows, info = near_duplicates(self.evidence)
        return self._with_influence(rows, None, None), info

    def outlier(self) -> tuple[Rows, dict[str, Any]]:
        neighbours = self.evidence.neighbours
        if neighbours is None:
            raise UnavailableError("a single example has no neighbours to be far from -> more examples")
        distance = neighbours.distance
        # Rounding makes distances below about 1e-7 noise; identical examples are no outliers.
        rows = self._unusual(np.log(distance + 1e-7), -distance)
        info = {"detector": "neighbour distance", "neighbours": neighbours.positions.shape[1]}
        return self._with_influence(rows, None, "neighbour distance"), info

    def harmful(self) -> tuple[Rows, dict[str, Any]]:
        if self.validation is None:
            raise UnavailableError(
                "harm shows on validation data, of which there is none -> validation=(x, y)"
            )
        effect, task = self._validation_effect(), self.evidence.task
        # The gain of removal: positive where the measurement becomes better.
        gain = -task.orientation * effect.removal()
        error = effect.standard_error()
        rows = self._unusual(gain, -gain)
        rows["is_issue"] &= gain > np.nan_to_num(SURE * error, nan=np.inf)
        info = {
            "detector": "influence",
            "median_standard_error": float(np.median(error)) if np.isfinite(error).all() else None,
        }
        return self._with_influence(rows, None, "influence"), info

    def rare(self) -> tuple[Rows, dict[str, Any]]:
        own, (label, _) = self.evidence.self_influence, self.label()
        rows = self._unusual(_logs(own), -own)
        # An example whose label is likely wrong is not rare but wrong.
        right = (
            1 - self.evidence.posterior.wrong if self.evidence.posterior is not None else np.ones(len(own))
        )
        rows["order"] = rows["score"] = 1 - (1 - rows["score"]) * right
        rows["is_issue"] &= (right > 0.5) & ~label["is_issue"]
        if self.validation is not None:
            loss = self.evidence.task.orientation * self._validation_effect().removal()
            rows["is_issue"] &= loss > 0  # without it the model would be worse
        return self._with_influence(rows, None, "self_influence"), {"detector": "self_influence"}

    def influence_info(self) -> dict[str, Any]:
        """What the column influence holds."""
        assert self.validation is not None
        if self._effect is None:
            return {"unit": None, "left_out": "influence was not computed"}
        method = self._effect.method
        return {
            "unit": self._effect.unit,
            "of": f"mean measurement of {self.validation.n} validation examples",
            "higher_is_better": self.evidence.task.higher_is_better,
            "curvature": method.curvature,
            "damping": repr(method.damping),
            "estimate": "first order",
        }

    def _unusual(self, values: np.ndarray, order: np.ndarray) -> Rows:
        chance = tail(values)
        return {"score": chance, "is_issue": discoveries(chance, self.precision), "order": order}

    def _with_influence(self, rows: Rows, suggested: np.ndarray | None, detector: str | None) -> Rows:
        n = self.evidence.examples.n
        if detector is not None:
            rows["detector"] = np.full(n, detector, dtype=object)
        if self.validation is not None:
            effect, labels = self._validation_effect(), self.evidence.labels
            rows["influence"] = (
                effect.relabelling(labels.values, suggested) if suggested is not None else effect.removal()
            )
        return rows

    def _validation_effect(self) -> ValidationEffect:
        assert self.validation is not None
        if self._effect is None:
            self._effect = ValidationEffect(self.evidence.influence, self.validation)
        return self._effect


def _columns(kind: str, rows: Rows, evidence: Evidence) -> dict[str, Any]:
    """The table's columns for one kind, the worst first."""
    n, ids, labels = evidence.examples.n, evidence.examples.ids, evidence.labels
    order = np.argsort(rows.get("order", rows["score"]), kind="stable")
    nothing = np.full(n, None, dtype=object)
    given = _objects(labels.listed()) if labels.kind != "none" else nothing
    predicted = nothing
    related = rows.get("related", np.full(n, -1))
    if "predicted_label" in rows:
        predicted = _objects(labels.listed(rows["predicted_label"]))
    elif labels.kind != "none" and (related >= 0).any():
        predicted = np.where(related >= 0, given[related], nothing)
    columns = {
        "id": _objects([ids[i] for i in range(n)]),
        "position": np.arange(n),
        "issue": np.full(n, kind, dtype=object),
        "is_issue": rows["is_issue"],
        "score": np.clip(rows["score"], 0, 1),
        "given_label": given,
        "predicted_label": predicted,
        "suggested_probability": rows.get("suggested_probability", np.full(n, np.nan)),
        "influence": rows.get("influence", np.full(n, np.nan)),
        "related_id": _objects([ids[j] if j >= 0 else None for j in related.tolist()]),
        "detector": rows["detector"],
    }
    ordered = {name: values[order] for name, values in columns.items()}
    return ordered | {"rank": np.arange(1, n + 1)}


def _objects(values: list[Any]) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _logs(values: np.ndarray) -> np.ndarray:
    """Logarithms of what is not negative; zeros are as far down as the smallest positive value."""
    positive = values[values > 0]
    return np.log(np.maximum(values, positive.min() if len(positive) else 1.0))
