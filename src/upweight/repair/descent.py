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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.repair.objective import Objective
from upweight.repair.vectors import Vector, combine, dot, norm, place, scaled, values_of

HALVINGS = 12
TRUSTED = 0.5
"""Share of its predicted effect that a step must have: a trust ratio, as `Descent.summary` reports."""
HELD_OUT_STEPS = (1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.12, 0.06)
"""Shares of the full step that are tried on held-out data."""


@dataclass
class Descent:
    """The tilted objective ``J'(theta) - a . (theta - theta_0)``, and where the model is on it.

    J' itself is a pass over all of the data. How far to go along a step is decided on a sample of it, J'_S, whose error
    in the linear term is known and taken off: with the exact gradient ``g`` at theta_0,

        J'_S(theta) - (grad J'_S(theta_0) - g) . (theta - theta_0),

    so that what the sample estimates is only what Taylor's series has beyond that term.

    Attributes:
        objective: J'.
        search: J'_S; J' itself where there is little data.
        change: ``() -> the change's own gradient at theta_0``, asked once, where something needs it.
        finish: whether what training left undone is to be done too: no tilt.
        held_out: ``() -> losses of the held-out examples`` at the model's weights, or None.
        removes: whether the change only takes examples away.
        step_size: what the user fixed, or None.
        records: what each step did.
    """

    objective: Objective
    search: Objective
    change: Callable[[], Vector]
    finish: bool
    held_out: Callable[[], Tensor] | None
    removes: bool
    step_size: float | None
    records: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.start = self.here()
        self.last = self.start  # where the last step began
        self._gradient: tuple[Vector, Vector] | None = (
            None  # (weights, gradient there), the last one asked for
        )
        self._value: tuple[Vector, float] | None = None

    @cached_property
    def own(self) -> Vector:
        """The change's own gradient at theta_0."""
        return self._at_start(self.change)

    @cached_property
    def trained(self) -> tuple[float, Vector]:
        """``J'(theta_0)`` and its gradient: a pass over the data, where something asks for it."""
        return self._at_start(self.objective.value_and_gradient)

    @property
    def full(self) -> Vector:
        """``grad J'(theta_0)``."""
        return self.trained[1]

    @cached_property
    def sampled(self) -> tuple[float, Vector]:
        """``J'_S(theta_0)`` and its gradient."""
        if self.search is self.objective:
            return self.trained
        return self._at_start(self.search.value_and_gradient)

    @cached_property
    def first(self) -> Vector:
        """The gradient of the tilted objective at theta_0."""
        return self.full if self.finish else self.own

    @cached_property
    def tilt(self) -> Vector:
        """A."""
        return scaled(self.own, 0.0) if self.finish else combine(self.full, self.own, -1)

    def value(self) -> float:
        """The tilted objective at the model's weights, by the sample; no pass over it where it is known."""
        here = self.here()
        if _same(here, self.start):
            return self.sampled[0]
        if self._value is None or not _same(here, self._value[0]):
            moved = combine(here, self.start, -1)
            error = dot(self.sampled[1], moved) - dot(self.first, moved)
            self._value = here, self.search.value() - error
        return self._value[1]

    def gradient(self) -> Vector:
        """Its gradient at the model's weights, exactly; no pass over the data where it is known, as at the start."""
        here = self.here()
        if _same(here, self.start):
            return self.first
        if self._gradient is None or not _same(here, self._gradient[0]):
            self._gradient = here, combine(self.objective.gradient(), self.tilt, -1)
        return self._gradient[1]

    def bend(self, direction: Vector) -> float:
        """``d^T H'_S d`` at theta_0, by the gradient a little further along -d."""
        size = norm(direction)
        if size == 0:
            return 0.0
        e = 1e-3 * max(norm(self.start), 1e-3) / size
        here = self.here()
        self.place(combine(self.start, direction, -e))
        moved = self.search.gradient()
        self.place(here)
        return dot(combine(self.sampled[1], moved, -1), direction) / e

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
        at = self.here()
        if not all(bool(torch.isfinite(v).all()) for v in u.values()):
            raise UpweightError("the step is not finite, expected finite numbers -> raise the damping")
        if norm(u) == 0 and norm(gradient) > 0:
            raise UpweightError(
                "the solver gave no step at all (it stopped before its first solution) -> raise its max_iter, or the "
                "damping"
            )
        if self.step_size is not None:
            t = self.step_size
            self.place(combine(at, u, t))
        elif self.held_out is not None and held_out:
            t = self._on_held_out(at, u)
        else:
            t = self._backtrack(at, u, predicted)
        if t:
            self.last = at
        self.records.append(
            {
                "step_size": t,
                "length": abs(t) * norm(u),
                "gradient_norm": norm(gradient),
                "predicted": predicted(t),
            }
        )
        return t

    def _backtrack(self, at: Vector, u: Vector, predicted: Callable[[float], float]) -> float:
        """The longest of u, u/2, u/4, ... that lowers the tilted objective by a good part of what it should.

        A step beyond where the quadratic model holds may lower the objective too, by little, on the way to a worse
        model: so that more is asked for here than Armijo's rule does.
        """
        before = self.value()
        noise = 1e-13 * abs(before)
        for halvings in range(HALVINGS):
            t = 0.5**halvings
            self.place(combine(at, u, t))
            after = self.value()
            if math.isfinite(after) and after <= before + TRUSTED * min(predicted(t), 0.0) + noise:
                return t
        self.place(at)
        return 0.0

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

    def _at_start(self, ask: Callable[[], Any]) -> Any:
        """What something is at theta_0."""
        here = self.here()
        self.place(self.start)
        try:
            return ask()
        finally:
            self.place(here)

    def summary(self, value: float) -> dict[str, float | None]:
        """Predicted and actual change of the tilted objective over all steps, and the trust ratio.

        That is actual over predicted, 1 where the quadratic model is right; None where nothing was predicted of a
        step.

        Args:
            value: J' at the model's weights, over all of the data.
        """
        actual = value - self.trained[0] - dot(self.tilt, combine(self.here(), self.start, -1))
        parts = [r["predicted"] for r in self.records]
        if None in parts:
            return {"predicted": None, "actual": actual, "trust_ratio": None}
        predicted = math.fsum(parts)
        return {
            "predicted": predicted,
            "actual": actual,
            "trust_ratio": actual / predicted if predicted else None,
        }


def _same(x: Vector, y: Vector) -> bool:
    return all(torch.equal(x[name], y[name]) for name in x)


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
