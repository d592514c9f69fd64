"""How a repair moves the parameters: one function a method.

With the gradient ``g`` and the curvature ``H'`` of the tilted changed objective (`upweight.repair.descent`):

    gradient      -t g                              first order; t from the objective's curvature along g
    influence     -(H + damping I)^-1 g             the curvature of the data before the change
    newton        -(H' + damping I)^-1 g            of the data after it; again and again, if told so
    trust_region  newton with H' as it was, g anew, and the damping led by the trust ratio
    corrected     newton, and then steps with H' as it was and g anew
    fine_tune     passes in shuffled batches, with H' as it was and momentum
    last_layer    newton for the last linear layer alone, whose objective is convex, until it is at its minimum

Sources: "Machine Unlearning of Features and Labels" (arXiv 2108.11577), "Certified Data Removal from Machine Learning
Models" (arXiv 1911.03030); the damping of a trust region: Levenberg and Marquardt's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from upweight.curvature.damping import Damping, DampingLike
from upweight.data import Examples
from upweight.repair.descent import Descent
from upweight.repair.inverse import Inverse
from upweight.repair.objective import batch_gradient
from upweight.repair.options import Settings
from upweight.repair.vectors import Vector, combine, dot, norm, scaled
from upweight.task import Task

NOTABLE = 1e-3
"""A trust region stops where a step promises less than this share of what was gained so far."""
EAGER, WARY = 0.75, 0.25
"""Trust ratios above which the damping is halved, and below which it is quadrupled."""
REFUSALS = 12
"""Steps that a trust region may refuse in all."""
STALLED = 0.3
"""The last layer's curvature is fitted anew where a step leaves more than this share of the gradient."""
LEAST_DAMPING = 1e-6
"""Of the damping that was chosen: with less, rounding could leave the last layer's curvature singular."""
MOMENTUM = 0.9


@dataclass
class Problem:
    """What a method works on.

    Attributes:
        descent: the tilted changed objective.
        settings: the options.
        model: the model that is moved.
        task: its loss on the changed data.
        before: the training data before the change.
        after: the training data after it, for `task`.
        plain: its loss on the data before.
    """

    descent: Descent
    settings: Settings
    model: nn.Module
    task: Task
    before: Examples
    after: Examples
    plain: Task

    def inverse(self, changed: bool = True, damping: DampingLike | None = None) -> Inverse:
        """The damped inverse at the model's weights, of the data after the change, or before it."""
        settings = self.settings if damping is None else replace(self.settings, damping=damping)
        if changed:
            return Inverse(self.model, self.task, self.after, self.descent.objective.divisor, settings)
        return Inverse(self.model, self.plain, self.before, self.before.n, settings)


def run(problem: Problem) -> dict[str, Any]:
    """Move the model by the method of the settings; returns evidence of how its systems were solved."""
    return METHODS[problem.settings.method](problem)


def gradient(problem: Problem) -> dict[str, Any]:
    """A step along the negative gradient, to where the curvature along it says the minimum is."""
    descent = problem.descent
    g = descent.gradient()
    bend = descent.bend(g)
    t = norm(g) ** 2 / bend if bend > 0 else 1.0
    if problem.settings.step_size is not None:
        t = 1.0  # the user's own tau
    u = scaled(g, -t)
    descent.take(g, u, lambda share: share * dot(g, u) + share**2 / 2 * t**2 * bend)
    return {"curvature": "along the gradient only", "rate": t}


def influence(problem: Problem) -> dict[str, Any]:
    """One step with the curvature of the data before the change."""
    inverse = problem.inverse(changed=False)
    _step(problem.descent, inverse)
    return inverse.evidence()


def newton(problem: Problem) -> dict[str, Any]:
    """Steps with the curvature of the data after the change, fitted anew each time."""
    descent, settings = problem.descent, problem.settings
    evidence: dict[str, Any] = {}
    start: float | None = None
    for _ in range(settings.most_steps):
        size = norm(descent.gradient())
        start = size if start is None else start
        if size <= settings.tolerance * start:
            break
        inverse = problem.inverse()
        t = _step(descent, inverse)
        evidence = inverse.evidence()
        if t == 0:
            break
    return evidence


def trust_region(problem: Problem) -> dict[str, Any]:
    """Small steps, until they promise no more; the damping follows the trust ratio."""
    descent, settings = problem.descent, problem.settings
    inverse, factor, gained = problem.inverse(), 1.0, 0.0
    value = descent.value()
    taken_steps = 0
    for _ in range(
        settings.most_steps + REFUSALS
    ):  # a refused step costs no gradient, and is none of the steps
        if taken_steps == settings.most_steps:
            break
        g = descent.gradient()
        u = scaled(inverse(g, factor), -1)
        predicted = _predicted(inverse, g, u, factor)(1.0)
        if -predicted <= NOTABLE * gained or norm(g) == 0:
            break
        at = descent.here()
        descent.place(combine(at, u))
        actual = descent.value() - value
        ratio = actual / predicted if predicted else 0.0
        taken = actual < 0 and ratio > ARMIJO_RATIO
        if taken:
            value, gained, descent.last = value + actual, gained - actual, at
            taken_steps += 1
        else:
            descent.place(at)
        descent.records.append(
            {
                "step_size": float(taken),
                "length": norm(u) if taken else 0.0,
                "gradient_norm": norm(g),
                "damping_factor": factor,
                "predicted": predicted if taken else 0.0,
                "trust_ratio": ratio,
            }
        )
        factor = factor * 4 if ratio < WARY else factor / 2 if ratio > EAGER else factor
    return inverse.evidence()


ARMIJO_RATIO = 1e-4


def corrected(problem: Problem) -> dict[str, Any]:
    """A Newton step of the change's own gradient, and steps with the same curvature and the gradient evaluated anew."""
    descent, settings = problem.descent, problem.settings
    inverse, own = problem.inverse(), descent.own
    u = scaled(inverse(own), -1)
    descent.take(own, u, _predicted(inverse, own, u))
    for _ in range(settings.most_steps):
        if norm(descent.gradient()) <= settings.tolerance * norm(own) or _step(descent, inverse, False) == 0:
            break
    return inverse.evidence()


def fine_tune(problem: Problem) -> dict[str, Any]:
    """`steps` passes over the changed data in shuffled batches, with the curvature as it was at the trained weights.

        velocity <- 0.9 velocity + (H' + damping I)^-1 g_batch,      theta <- theta - rate velocity

    The rate falls linearly to 0. The gradient is that of J' itself: nothing that training left undone is kept.
    """
    descent, settings, after = problem.descent, problem.settings, problem.after
    inverse = problem.inverse()
    generator = torch.Generator().manual_seed(settings.seed)
    batches = [
        batch.tolist()
        for _ in range(math.ceil(settings.passes))
        for batch in torch.randperm(after.n, generator=generator).split(settings.batch)
    ]
    batches = batches[: max(1, round(settings.passes * math.ceil(after.n / settings.batch)))]
    velocity: Vector = scaled(descent.start, 0.0)
    for done, batch in enumerate(batches):
        velocity = combine(inverse(_batch_gradient(problem, batch)), velocity, MOMENTUM)
        rate = settings.rate * (1 - done / len(batches))
        descent.place(combine(descent.here(), velocity, -rate))
    descent.records.append(
        {
            "step_size": settings.rate,
            "length": norm(combine(descent.here(), descent.start, -1)),
            "gradient_norm": None,
            "predicted": None,
            "batches": len(batches),
        }
    )
    return inverse.evidence()


def last_layer(problem: Problem) -> dict[str, Any]:
    """Newton steps to the minimum; the curvature is fitted anew only where the one at hand does not get on.

    An automatic damping of an exact curvature is chosen once, and a quarter of it remains wherever a step could be
    taken whole: it is no part of the objective, and only slows down.
    """
    descent, settings = problem.descent, problem.settings
    evidence: dict[str, Any] = {}
    inverse: Inverse | None = None
    chosen, first = Damping.of(settings.damping).auto, 0.0
    damping: DampingLike | None = None
    size = start = norm(descent.gradient())
    for _ in range(settings.most_steps):
        if size <= settings.tolerance * start:
            break
        fresh = inverse is None
        inverse = inverse or problem.inverse(damping=damping)
        t = _step(descent, inverse)
        evidence = inverse.evidence()
        if t == 0 and fresh:
            break
        if chosen and (number := inverse.number()) is not None:
            first = first or number
            damping = max(number / 4 if t == 1 else number, LEAST_DAMPING * first)
        left = norm(descent.gradient())
        inverse = None if t == 0 or left > STALLED * size else inverse
        size = left
    return evidence


METHODS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "gradient": gradient,
    "influence": influence,
    "newton": newton,
    "trust_region": trust_region,
    "corrected": corrected,
    "fine_tune": fine_tune,
    "last_layer": last_layer,  # of the head alone, which `upweight.repair.head` makes a problem of its own
}


def _step(descent: Descent, inverse: Inverse, held_out: bool = True) -> float:
    g = descent.gradient()
    u = scaled(inverse(g), -1)
    return descent.take(g, u, _predicted(inverse, g, u), held_out=held_out)


def _predicted(inverse: Inverse, g: Vector, u: Vector, factor: float = 1.0) -> Callable[[float], float]:
    """``t g.u + (t^2/2) u^T H u``, where the step's own equation gives ``u^T H u = -g.u - u^T damping u``."""
    slope, damped = dot(g, u), inverse.damped(u, factor)
    return lambda t: t * slope + t**2 / 2 * (-slope - damped)


def _batch_gradient(problem: Problem, positions: list[int]) -> Vector:
    """The changed objective's gradient, its sum over the data estimated by a batch."""
    descent, after = problem.descent, problem.after
    objective = descent.objective
    ids = [after.ids[p] for p in positions]
    _, total = batch_gradient(objective.tracker, problem.task, after.take(positions), ids)
    share = after.n / len(positions) / objective.divisor
    rest = objective.penalty_gradient()
    return {name: v + share * total[name].double() if name in total else v for name, v in rest.items()}
