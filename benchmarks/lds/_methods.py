"""The methods of the tables, each a function of a trained model that yields scores by damping."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from _training import Checkpoint
from torch import Tensor, nn

import upweight as uw

Data: TypeAlias = "tuple[Tensor, Tensor]"


@dataclass(frozen=True)
class Explained:
    """A model of the whole training set, and what a method may know of it: a few checkpoints of its run, and many."""

    model: nn.Module
    checkpoints: list[Checkpoint]
    task: uw.Task
    train: Data
    query: Data
    l2: float
    dampings: tuple[float, ...]
    number: int = 0
    seed: int = 0
    often: list[Checkpoint] = field(default_factory=list)


Method: TypeAlias = Callable[[Explained], Iterator[tuple[str, Any]]]
"""Yields (choice, scores): the damping as a word, or "" where nothing is chosen. The first one includes the fit."""


def influence(
    curvature: str, dampings: tuple[float, ...] | None = None, l2: bool = False, **options: Any
) -> Method:
    """`Influence` with automatic damping and, from the same fit, with these dampings: the setting's if None."""

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        more = options | ({"l2": run.l2} if l2 else {})
        fitted = uw.Influence(run.model, run.task, curvature=curvature, progress=False, **more).fit(run.train)
        others = run.dampings if dampings is None else dampings
        yield "auto" if others else "", fitted.attribute(run.query)
        for damping in others:
            yield f"{damping:g}", fitted.with_damping(damping).attribute(run.query)

    return method


def plain(name: str, **options: Any) -> Method:
    """An attributor of `upweight` that is made from a model and a task."""

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        made = getattr(uw, name)(run.model, run.task, progress=False, **options)
        yield "", made.fit(run.train).attribute(run.query)

    return method


def tracin(**options: Any) -> Method:
    """TracIn over the checkpoints of the run."""

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        rates = [rate for _, rate in run.checkpoints]
        yield from along_the_run("TracIn", len(rates), learning_rates=rates, **options)(run)

    return method


def along_the_run(name: str, count: int | None = None, **options: Any) -> Method:
    """An attributor of `upweight` made from a model and the first checkpoints of its run: all of them if None."""

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        states = [state for state, _ in run.checkpoints[:count]]
        made = getattr(uw, name)(run.model, run.task, checkpoints=states, progress=False, **options)
        yield "", made.fit(run.train).attribute(run.query)

    return method


def over_checkpoints(
    curvature: str, dampings: tuple[float, ...] | None = None, equal: bool = False, **options: Any
) -> Method:
    """The mean over the run's checkpoints of influence scores, each with its own curvature.

    With `equal` it is over many checkpoints, whose scores of a query count alike: as uw.Ensemble(equal=True).
    """

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        last = {k: v.clone() for k, v in run.model.state_dict().items()}
        totals: dict[str, np.ndarray] = {}
        try:
            for state, _ in run.often if equal else run.checkpoints:
                run.model.load_state_dict(state)
                for choice, scores in influence(curvature, dampings, **options)(run):
                    values = as_array(scores)
                    if equal:
                        values = values / np.sqrt((values**2).mean(1, keepdims=True))
                    totals[choice] = totals.get(choice, 0) + values
        finally:
            run.model.load_state_dict(last)
        yield from totals.items()

    return method


def half_models(
    train: Callable[[np.ndarray, int], tuple[nn.Module, Any]], dampings: tuple[float, ...] = ()
) -> Method:
    """Banzhaf influence of a model of its own for every number, trained on half of the data; with these dampings, too.

    Every two of them are of the two halves of one division. Scores are as large on every query as any other model's.
    The automatic damping, and the ratio of removals to additions there, go to standard error.
    """

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        number, n = run.number, len(run.train[1])
        order = np.random.default_rng(77 + number // 2).permutation(n)
        half = np.sort(order[: n // 2] if number % 2 == 0 else order[n // 2 :])
        model = train(half, 3000 + number)[0]
        options = {"checkpoints": [model], "subsets": [half], "l2": run.l2, "equal": True, "progress": False}
        scores = uw.BanzhafInfluence(model, run.task, **options).fit(run.train).attribute(run.query)
        (found,), ((ratio, error),) = scores.info["damping"], scores.info["balance"]
        said = f"model {number}: damping {found:.2g}, removals / additions {ratio:.2f}, standard error {error:.2f}"
        print(said, file=sys.stderr)
        yield "auto" if dampings else "", scores
        for damping in dampings:
            made = uw.BanzhafInfluence(model, run.task, damping=damping, **options)
            yield f"{damping:g}", made.fit(run.train).attribute(run.query)

    return method


def representer(run: Explained) -> Iterator[tuple[str, Any]]:
    """Representer points with the L2 coefficient of the training."""
    made = uw.Representer(run.model, run.task, l2=run.l2, progress=False)
    yield "", made.fit(run.train).attribute(run.query)


def random_scores(run: Explained) -> Iterator[tuple[str, Any]]:
    shape = (len(run.query[1]), len(run.train[1]))
    yield "", np.random.default_rng(run.seed).standard_normal(shape)


def as_array(scores: Any) -> np.ndarray:
    """[query, train] in float64."""
    return scores.values.double().numpy() if isinstance(scores, uw.Scores) else np.asarray(scores, float)


CONTROLS: dict[str, Method] = {
    "random": random_scores,
    "loss": plain("Loss"),
    "gradient norm": plain("GradNorm"),
    "embedding similarity": plain("EmbeddingSimilarity"),
}
GRADIENTS: dict[str, Method] = {
    "gradient dot": plain("GradDot"),
    "gradient cosine": plain("GradCos"),
    "TracIn, checkpoints": tracin(),
}
CURVATURES: dict[str, Method] = {
    "identity": influence("identity", dampings=()),
    "diagonal": influence("diagonal"),
    "K-FAC": influence("kfac"),
    "EK-FAC": influence("ekfac"),
    "EK-FAC, empirical Fisher": influence("ekfac", fisher="empirical"),
    "DataInf": influence("datainf"),
    "GGN, one sampled label, dual": influence("ggn", solver="dual", fisher="sampled", draws=1, l2=True),
    "empirical Fisher, dual": influence("ggn", solver="dual", fisher="empirical", l2=True),
    "EK-FAC, mean over checkpoints": over_checkpoints("ekfac"),
}
CLASSIFIERS: dict[str, Method] = {
    "same class": plain("SameClass"),
    "margin": plain("Margin"),
    "representer points": representer,
}

REGRESSION = {**CONTROLS, **GRADIENTS, **CURVATURES}
CLASSIFICATION = {**CONTROLS, **CLASSIFIERS, **GRADIENTS, **CURVATURES}

# What only one table has, for the time that it takes.
ALONG_THE_RUN: dict[str, Method] = {
    "EL2N, two early checkpoints": along_the_run("EL2N", 2),
    "AUM, checkpoints": along_the_run("AUM"),
    "TracIn, last layer": tracin(parameters="last_layer"),
}
CORRECTED: dict[str, Method] = {
    "EK-FAC, rescaled": influence("ekfac", dampings=(), correction="rescaled"),
    "EK-FAC, relative": influence("ekfac", dampings=(), correction="relative"),
    "EK-FAC, relative to the own loss": influence("ekfac", dampings=(), correction="relative-loss"),
}


def solved(
    solver: Any, damping: float, curvature: str = "ggn", dampings: tuple[float, ...] = (), **more: Any
) -> Method:
    """The Gauss-Newton matrix or the Hessian by a solver, with this damping and, to choose from, these."""

    def method(run: Explained) -> Iterator[tuple[str, Any]]:
        options = {"curvature": curvature, "solver": solver, "l2": run.l2, "progress": False, **more}
        fitted = uw.Influence(run.model, run.task, damping=damping, **options).fit(run.train)
        yield f"{damping:g}" if dampings else "", fitted.attribute(run.query)
        for other in dampings:
            yield f"{other:g}", fitted.with_damping(other).attribute(run.query)

    return method
