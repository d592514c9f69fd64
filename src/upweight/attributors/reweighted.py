"""The curvature with other weights on some examples, for whichever curvature a method was fitted with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.curvature import Inverse
from upweight.curvature.dense import DenseReweighted, as_gradients
from upweight.curvature.dual import DualInverse
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.leave_out import LeftOut, Weighted
from upweight.curvature.leverage import Each, Group
from upweight.curvature.solved import SolvedInverse
from upweight.curvature.solvers.direct import Direct
from upweight.data import Examples
from upweight.gradients import Dense, Gradients
from upweight.gradients.rowwise import paired
from upweight.task import resolve_fisher

if TYPE_CHECKING:
    from upweight.attributors.fitted import Fitted
    from upweight.attributors.influence import Influence


@dataclass(frozen=True)
class Side:
    """Examples with a change of weight: training examples, or those that take their place.

    Attributes:
        examples: where they are read from.
        positions: which of them.
        change: what is added to their weight, [members].
    """

    examples: Examples
    positions: Sequence[int]
    change: Tensor

    @property
    def ids(self) -> list[Any]:
        """One a member."""
        return [self.examples.ids[p] for p in self.positions]


class Reweighted:
    """``(H + (delta_i/n) H_i + damping I)^-1`` one member at a time, and the same with the sum over all members.

    Args:
        method: fitted with a Gauss-Newton matrix (by Woodbury), a Hessian (by refactorisation), or a Kronecker-factored
            curvature (in its eigenvalues).
        fitted: what its fit learned.
        inverse: the damped inverse of its curvature.
        sides: the members: one side, or the removed and those that take their place, in the same order.
        damped: the dense ``H + damping I`` of a Hessian, where the caller has it already.
    """

    def __init__(
        self,
        method: Influence,
        fitted: Fitted,
        inverse: Any,
        sides: Sequence[Side],
        damped: Tensor | None = None,
    ) -> None:
        self.method, self.fitted, self.sides = method, fitted, sides
        self.inverse = many_at_once(inverse, list(fitted.tracker.layers))
        self.n = fitted.examples.n
        self.changes = [side.change.to(fitted.tracker.device) for side in sides]
        self._damped = damped

    def correct_each(self, gradients: Gradients) -> Gradients:
        """Vectors g' with ``(H + damping I)^-1 g'_i = (H + (delta_i/n) H_i + damping I)^-1 g_i``, one a member."""
        if self._refactors:
            flat = self.solve_each(gradients).dense() @ self._dense.damped
            return as_gradients(flat.to(self.fitted.dtype), gradients)
        return self._each.correct(gradients)

    def solve_each(self, gradients: Gradients) -> Gradients:
        """``(H + (delta_i/n) H_i + damping I)^-1 g_i`` for every member."""
        if isinstance(self.inverse, Inverse):
            return self.left_out.solve(gradients)
        if not self._refactors:
            return self._each.solve(gradients)
        flat, members = gradients.dense().to(self._dense.damped), gradients.batch
        solved = [
            self._dense.solve(
                range(k, members * len(self.sides), members), flat[k : k + 1], f"example {name}"
            )
            for k, name in enumerate(self.sides[0].ids)
        ]
        return as_gradients(torch.cat(solved), gradients)

    def solve_group(self, gradients: Gradients) -> Gradients:
        """``(H + (1/n) sum_i delta_i H_i + damping I)^-1 g`` for any vectors."""
        if isinstance(self.inverse, Inverse):
            return self.left_out.solve_group(gradients)
        return self._dense.solve_group(gradients) if self._refactors else self._group.solve(gradients)

    @property
    def _refactors(self) -> bool:
        return self.method.curvature == "hessian"

    # Eigenvalues -------------------------------------------------------------------------------------------------

    @cached_property
    def left_out(self) -> LeftOut:
        """The members out of a structured curvature."""
        pairs = zip(self._columns, self.changes, strict=True)
        return LeftOut([Weighted(c, d) for c, d in pairs], self.inverse, self.n, self.sides[0].ids)

    # Woodbury ----------------------------------------------------------------------------------------------------

    @cached_property
    def _each(self) -> Each:
        flat = [column for part in self._columns for column in part]
        pairs = zip(self.changes, self._columns, strict=True)
        change = torch.cat([d[:, None].expand(-1, len(c)) for d, c in pairs], 1)
        return Each(flat, self.inverse, self.n, self.sides[0].ids, change)

    @cached_property
    def _group(self) -> Group:
        joined = [Gradients.concatenate(list(parts)) for parts in zip(*self._columns, strict=True)]
        return Group(joined, self.inverse, self.n, torch.cat(self.changes))

    @cached_property
    def _columns(self) -> list[list[Gradients]]:
        """The rows S_i of each side's members, one `Gradients` [members, p] a row: of the Fisher that was fitted."""
        fitted = self.fitted
        kind, draws = fitted.fisher
        if kind == "sampled" and not isinstance(self.inverse, Inverse):
            # Not the draws that the curvature saw: the expectation over them is closer.
            batch = fitted.tracker.move(fitted.examples.take([0]))
            with torch.no_grad(), fitted.tracker.quietly():
                kind, draws = resolve_fisher(self.method.task, self.method.model, batch, "exact", draws)
        generator = torch.Generator().manual_seed(self.method.seed)
        found = []
        for side in self.sides:
            if kind == "sampled" and fitted.columns is not None and side.examples is fitted.examples:
                found.append(fitted.columns.at(side.positions))
                continue
            parts = [
                fitted.tracker.fisher(b, ids, kind, draws, generator) for b, ids in batches(fitted, side)
            ]
            found.append([Gradients.concatenate(list(column)) for column in zip(*parts, strict=True)])
        return found

    # Refactorisation ---------------------------------------------------------------------------------------------

    @cached_property
    def _dense(self) -> DenseReweighted:
        curvature: Any = self.fitted.curvature
        operator: ExactCurvature = curvature.operator
        damped = dense_damped(self.method, self.fitted) if self._damped is None else self._damped
        eye = torch.eye(len(damped), dtype=damped.dtype, device=damped.device)
        sources = [
            operator
            if side.examples is self.fitted.examples
            else ExactCurvature(self.fitted.tracker, side.examples, "hessian", memory=operator.memory)
            for side in self.sides
        ]
        members = len(self.sides[0].positions)

        def own(chosen: list[int]) -> Tensor:
            total = torch.zeros_like(damped)
            for k, (side, source) in enumerate(zip(self.sides, sources, strict=True)):
                here = [side.positions[m - k * members] for m in chosen if m // members == k]
                if here:
                    total += len(here) * (source.sampled_product(eye, here) - source.ridge.to(damped).diag())
            return total

        ids = [name for side in self.sides for name in side.ids]
        return DenseReweighted(damped, own, self.n, ids, torch.cat(self.changes))


@dataclass(frozen=True)
class FactorInverse:
    """``(H + damping I)^-1`` by a direct solver's factor, whose solutions for queries are checked elsewhere.

    A residual takes a product with all the data for every right-hand side, and every training example brings several.
    """

    inverse: SolvedInverse
    solver: Direct

    @property
    def damping(self) -> dict[str, float]:
        """The damping by layer."""
        return self.inverse.damping

    def __matmul__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients."""
        operator = self.inverse.curvature.operator
        return as_gradients(
            self.solver.apply(operator, gradients.dense().T, self.inverse.number).T, gradients
        )

    def half(self, gradients: Gradients) -> Gradients:
        """``R g`` with ``R^T R = (H + damping I)^-1``, whose inner products are those of g with solutions."""
        operator = self.inverse.curvature.operator
        return as_gradients(self.solver.half(operator, gradients.dense().T, self.inverse.number).T, gradients)

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H + damping I)^-1 g`` of every example [batch]."""
        half = self.half(gradients)
        return {"": paired(half, half)}


@dataclass(frozen=True)
class FormedDual:
    """The dual inverse with its solutions written out, ``(1/d) [v - S^T a]``: one vector of all parameters each."""

    inverse: DualInverse
    layers: Sequence[str]

    @property
    def damping(self) -> dict[str, float]:
        """The damping by layer."""
        return dict.fromkeys(self.layers, self.inverse.damping)

    def __matmul__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients."""
        solved = self.inverse @ gradients
        d = solved.inverse.damping + solved.inverse.l2
        explained = solved.inverse.columns.combine(solved.weights.mT)
        formed = {
            name: Dense(((block.dense().double() - explained[name]) / d).to(self.inverse.curvature.dtype))
            for name, block in gradients.items()
        }
        return Gradients(formed, gradients.router)

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H + damping I)^-1 g`` of every example [batch]."""
        return self.inverse.quadratic(gradients)


def many_at_once(inverse: Any, layers: Sequence[str]) -> Any:
    """An inverse whose ``@`` gives `Gradients`, for many right-hand sides.

    A direct solver's every residual is not checked, and a dual's solutions are written out.
    """
    if isinstance(inverse, DualInverse):
        return FormedDual(inverse, layers)
    if isinstance(inverse, SolvedInverse) and isinstance(inverse.curvature.solver, Direct):
        return FactorInverse(inverse, inverse.curvature.solver)
    return inverse


def dense_damped(method: Influence, fitted: Fitted) -> Tensor:
    """``H + damping I`` [p, p] of a method with an exact curvature."""
    curvature: Any = fitted.curvature
    damped: Tensor = curvature.operator.dense()
    damped.diagonal().add_(curvature.number(method.damping))
    return damped


def batches(fitted: Fitted, side: Side) -> Iterator[tuple[Any, list[Any]]]:
    """A side's members, a batch at a time, with their ids."""
    for a in range(0, len(side.positions), fitted.batch_size):
        positions = list(side.positions[a : a + fitted.batch_size])
        yield side.examples.take(positions), [side.examples.ids[p] for p in positions]
