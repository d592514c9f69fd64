"""How suspicious each label is: the detectors of label errors, by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import rankdata

from upweight.attributors.baselines.aum import AUM
from upweight.attributors.baselines.el2n import EL2N
from upweight.attributors.baselines.margin import Margin
from upweight.attributors.tracin import TracIn
from upweight.errors import UpweightError
from upweight.repair.evidence import Evidence, as_numbers

__all__ = ["DETECTORS", "choose", "suspicion"]


def suspicion(name: str, evidence: Evidence) -> np.ndarray:
    """How suspicious each label is, [n], higher is worse; only the order means something.

    Args:
        name: of a detector.
        evidence: what it may look at.

    Raises:
        UpweightError: the detector needs what was not given, or the task is not one for it.
    """
    if name not in DETECTORS:
        raise UpweightError(f"there is no detector {name!r} -> one of {', '.join(['auto', *DETECTORS])}")
    return DETECTORS[name](evidence)


def choose(evidence: Evidence) -> str:
    """The detector to use if none is asked for: by the figures of benchmarks/RESULTS.md ("Label errors").

    Which single detector is best hangs on whether the network has learnt its wrong labels by heart: its margins if not,
    margins averaged over the training run if so. The mean rank of all that can be had is within .02 of the best in
    either case.
    """
    return "combined" if evidence.labels.kind == "classes" else "loss"


def _loss(evidence: Evidence) -> np.ndarray:
    return evidence.losses


def _margin(evidence: Evidence) -> np.ndarray:
    return _own(Margin(evidence.model, evidence.task, **evidence.options.shared), evidence)


def _self_influence(evidence: Evidence) -> np.ndarray:
    return evidence.self_influence


def _aum(evidence: Evidence) -> np.ndarray:
    options = evidence.options
    if options.log is None:
        _need_checkpoints(evidence, "aum", " or log=")
    given = {"log": options.log} if options.log is not None else {"checkpoints": options.checkpoints}
    return _own(AUM(evidence.model, evidence.task, **given, **options.shared), evidence)


def _el2n(evidence: Evidence) -> np.ndarray:
    _need_checkpoints(evidence, "el2n")
    options = evidence.options
    method = EL2N(evidence.model, evidence.task, checkpoints=options.checkpoints or [], **options.shared)
    return _own(method, evidence)


def _tracin(evidence: Evidence) -> np.ndarray:
    return _own(_traced(evidence, None), evidence)


def _tracin_last_layer(evidence: Evidence) -> np.ndarray:
    return _own(_traced(evidence, "last_layer"), evidence)


def _traced(evidence: Evidence, parameters: str | None) -> TracIn:
    """Equal learning rates if none are given: every checkpoint counts alike."""
    _need_checkpoints(evidence, "tracin")
    options = evidence.options
    return TracIn(
        evidence.model,
        evidence.task,
        checkpoints=options.checkpoints or [],
        learning_rates=1.0 if options.learning_rates is None else options.learning_rates,
        parameters=parameters,
        **options.shared,
    )


def _confident_learning(evidence: Evidence) -> np.ndarray:
    """``1 - p[given]`` by probabilities that did not see the label: cleanlab's self-confidence."""
    _need_classes(evidence, "confident_learning")
    p, _ = evidence.probabilities
    return 1 - p[np.arange(len(p)), evidence.labels.values]


def _knn(evidence: Evidence) -> np.ndarray:
    """Share of the neighbours with another label; for numbers, the distance to the neighbours' mean."""
    labels, neighbours = evidence.labels, evidence.neighbours
    if labels.kind == "none":
        raise UpweightError(
            "the detector 'knn' needs one label an example, which this task has not -> 'loss'"
        )
    if neighbours is None:
        return np.zeros(evidence.examples.n)
    theirs = labels.values[neighbours.positions]
    if labels.kind == "numbers":
        return np.abs(labels.values - theirs.mean(1))
    return (theirs != labels.values[:, None]).mean(1)


def _combined(evidence: Evidence) -> np.ndarray:
    """Mean rank of the margin (the loss, of what is no class) and of those that can be had of neighbours, AUM and CL.

    Self-influence is not among them: with it the order was worse in every setting of the benchmark.
    """
    options, classes = evidence.options, evidence.labels.kind == "classes"
    names = ["margin" if classes else "loss"]
    if evidence.labels.kind != "none" and evidence.has_neighbours:
        names.append("knn")
    if classes and (options.log is not None or options.checkpoints is not None):
        names.append("aum")
    if classes and (options.probabilities is not None or options.train_fn is not None):
        names.append("confident_learning")
    return np.mean([rankdata(suspicion(name, evidence)) for name in names], axis=0)


DETECTORS: dict[str, Callable[[Evidence], np.ndarray]] = {
    "self_influence": _self_influence,
    "loss": _loss,
    "margin": _margin,
    "aum": _aum,
    "el2n": _el2n,
    "tracin": _tracin,
    "tracin_last_layer": _tracin_last_layer,
    "confident_learning": _confident_learning,
    "knn": _knn,
    "combined": _combined,
}


def _own(method: Margin | AUM | EL2N | TracIn, evidence: Evidence) -> np.ndarray:
    return as_numbers(method.fit(evidence.examples).self_influence().values)


def _need_checkpoints(evidence: Evidence, name: str, others: str = "") -> None:
    if evidence.options.checkpoints is None:
        raise UpweightError(
            f"the detector {name!r} follows the training run, of which nothing was given -> checkpoints=[state dicts]"
            f"{others}, or another detector"
        )


def _need_classes(evidence: Evidence, name: str) -> None:
    if evidence.labels.kind != "classes":
        raise UpweightError(
            f"the detector {name!r} needs classes, but the task is {type(evidence.task).__name__} -> 'loss'"
        )
