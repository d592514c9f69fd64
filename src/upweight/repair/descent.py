"""The changed objective as a repair sees it, and how far to go along a step.

A trained network is seldom at a minimum: ``r = grad J(theta)`` is what its training left undone. A repair should
move it by the change alone, so that unless `finish` is asked for, the linear term ``(n/N) r . (theta - theta_0)`` is
taken off the changed objective J'. Its gradient at the trained weights is then the change's own,

    -(1/N) [ sum_removed g_i + sum_relabelled (g_i - g~_i) + sum_reweighted (1 - w_i) g_i + (n - N) grad R ],

and its minimum is where the trained weights would have moved if they had been a minimum (the proximal Bregman objective
of "If Influence Functions are the Answer, Then What is the Question?", arXiv 2209.05364, for these changes).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.repair.objective import Objective
from upweight.repair.vectors import Vector, combine, dot, norm, place, values_of

HALVINGS = 12
ARMIJO = 1e-4
HELD_OUT_STEPS = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.12, 0.06)
"""Shares of the full step that are tried on held-out data."""


@dataclass
class Descent:
    """The tilted objective ``J'(theta) - a . (theta - theta_0)``, and where the model is on it.

    Attributes:
        objective: J'.
        tilt: a.
        start: theta_0.
        first: its gradient at theta_0.
        held_out: ``() -> losses of the held-out examples`` at the model's weights, or None.
        removes: whether the change only takes examples away.
        step_size: what the user fixed, or None.
        records: what each step did.
    """

    objective: Objective
    tilt: Vector
    start: Vector
    first: Vector
    held_out: Callable[[], Tensor] | None
    removes: bool
    step_size: float | None
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = self.start, self.first
        self.last = self.start  # where the last step began

    def value(self) -> float:
        """The tilted objective at the model's weights."""
        here = values_of(self.objective.tracker.parameters)
        return self.objective.value() - dot(self.tilt, combine(here, self.start, -1))

    def gradient(self) -> Vector:
        """Its gradient at the model's weights; no pass over the data where it is known, as at the start."""
        here = self.here()
        if not all(torch.equal(here[name], self._known[0][name]) for name in here):
            self._known = here, combine(self.objective.gradient(), self.tilt, -1)
        return self._known[1]

    def here(self) -> Vector:
        """The model's weights."""
        return values_of(self.objective.tracker.parameters)

    def place(self, values: Vector) -> None:
        """Give the model these weights."""
        place(self.objective.tracker.parameters, values)

    def take(
        self, gradient: Vector, u: Vector, predicted: Callable[[float], float], *, held_out: bool = True
    ) -> float:
        """Move the model by ``t u``, t chosen; returns t (0: nothing helps).

        Args:
            gradient: of the tilted objective here.
            u: the full step.
            predicted: ``t -> predicted change`` of the tilted objective.
            held_out: whether held-out data may choose t.
        """
        at, before = self.here(), self.value()
        slope = dot(gradient, u)
        if not all(bool(torch.isfinite(v).all()) for v in u.values()):
            raise UpweightError("the step is not finite, expected finite numbers -> raise the damping")
        if self.step_size is not None:
            t, after = self.step_size, None
            self.place(combine(at, u, t))
        elif self.held_out is not None and held_out:
            t, after = self._on_held_out(at, u), None
        else:
            t, after = self._backtrack(at, u, before, slope)
        if t:
            self.last = at
        self.records.append(
            {
                "step_size": t,
                "length": abs(t) * norm(u),
                "gradient_norm": norm(gradient),
                "predicted": predicted(t),
                "actual": (self.value() if after is None else after) - before,
            }
        )
        return t

    def _backtrack(self, at: Vector, u: Vector, before: float, slope: float) -> tuple[float, float]:
        """The longest of u, u/2, u/4, ... that lowers the tilted objective as far as it should."""
        noise = 1e-13 * abs(before)
        for halvings in range(HALVINGS):
            t = 0.5**halvings
            self.place(combine(at, u, t))
            after = self.value()
            if math.isfinite(after) and after <= before + ARMIJO * t * slope + noise:
                return t, after
        self.place(at)
        return 0.0, before

    def _on_held_out(self, at: Vector, u: Vector) -> float:
        """Labels and weights: the t of the lowest held-out loss. Removal: the longest t that does not clearly raise it.

        Taking away good examples can only cost accuracy: there the lowest held-out loss would often be that of not
        forgetting at all. A rise of up to one standard error of the paired differences passes for none.
        """
        assert self.held_out is not None
        start = self.held_out()
        best, lowest = 0.0, float(start.mean())
        for t in HELD_OUT_STEPS:
            if self.removes and t > 1:
                continue
            self.place(combine(at, u, t))
            losses = self.held_out()
            rise = losses - start
            if self.removes:
                error = float(rise.std() / math.sqrt(len(rise))) if len(rise) > 1 else 0.0
                if float(rise.mean()) <= error:
                    return t
            elif float(losses.mean()) < lowest:
                best, lowest = t, float(losses.mean())
        self.place(combine(at, u, best))
        return best

    def trust_ratio(self) -> float | None:
        """Actual over predicted change of the tilted objective over all steps: 1 where the quadratic model is right."""
        predicted = math.fsum(r["predicted"] for r in self.records)
        actual = math.fsum(r["actual"] for r in self.records)
        return actual / predicted if predicted else None


def change_gradient(
    leaving: Sequence[Vector], entering: Sequence[Vector], penalty: Vector, n: int, divisor: float
) -> Vector:
    """The gradient at the trained weights: ``-(1/N) [sum leaving - sum entering + (n - N) grad R]``."""
    total = {name: (n - divisor) * g for name, g in penalty.items()}
    for g in leaving:
        total = combine(total, g)
    for g in entering:
        total = combine(total, g, -1)
    return {name: -g / divisor for name, g in total.items()}
