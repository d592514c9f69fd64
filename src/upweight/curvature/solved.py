"""A curvature that is known by its products, and its damped inverse by a solver: ``inverse(damping) @ gradients``."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from upweight.budget import PANEL_SHARE
from upweight.curvature.auto_damping import auto_damping
from upweight.curvature.curvature import Curvature
from upweight.curvature.damping import Damping, Spectrum
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.fisher_damping import fisher_damping
from upweight.curvature.krylov import top_eigenvalue, trace
from upweight.curvature.solvers.base import Preconditioner, SolveInfo, Solver
from upweight.curvature.solvers.direct import Direct
from upweight.curvature.solvers.sketch import Sketch
from upweight.errors import UpweightError
from upweight.gradients.blocks import Dense
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer


@dataclass
class SolvedCurvature:
    """One matrix over all tracked parameters, or a block of it for every layer, inverted by a solver.

    Attributes:
        operator: H by its products.
        solver: what solves ``(H + damping I) x = b``; ``"dual"`` inverts through the columns' Gram matrix.
        preconditioner: ``"sketch"``, ``"ekfac"``, ``"kfac"``, ``"diagonal"``, a `Sketch` or `Preconditioner`, or None.
        info: what was fitted on what.
    """

    operator: ExactCurvature
    solver: Solver | Literal["dual"]
    preconditioner: str | Sketch | Preconditioner | None = None
    info: dict[str, Any] = field(default_factory=dict)
    _chosen: dict[Damping, float] = field(default_factory=dict)
    _structured: Curvature | None = None
    _dual: Any = None

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The tracked layers, in the order of the flat vectors."""
        return self.operator.tracker.layers

    def damping(self, damping: Damping) -> dict[str, float]:
        """The damping by layer: the same number for all of them."""
        return dict.fromkeys(self.layers, self.number(damping))

    def number(self, damping: Damping) -> float:
        """The damping as one number; a relative or automatic one is worked out from the spectrum once."""
        if damping.layers:
            raise UpweightError(
                f"damping names layers, but curvature={self.operator.kind!r} takes one number for all of them -> "
                "give a number, or use curvature='ekfac'"
            )
        if damping not in self._chosen:
            self._chosen[damping] = self._resolve(damping)
        return self._chosen[damping]

    def inverse(self, damping: Damping) -> Any:
        """``(H + damping I)^-1`` as an operator on `Gradients`: a `SolvedInverse`, or the dual's own."""
        number = self.number(damping)
        if self.solver == "dual":
            return self._dual_curvature().inverse(number, l2=self.operator.l2)
        return SolvedInverse(self, number)

    def prepare(self, damping: Damping) -> None:
        """Do now what need not wait for queries, so that a matrix that cannot be inverted is refused at once."""
        number = self.number(damping)
        if isinstance(self.solver, Direct):
            self.solver.factorise(self.operator, number)

    def _dual_curvature(self) -> Any:
        if self._dual is None:
            from upweight.curvature.dual import DualCurvature  # not needed by any other solver

            operator = self.operator
            self._dual = DualCurvature(
                operator.fisher_pass(), operator.examples, parameters=operator.size, memory=operator.memory
            )
        return self._dual

    def eigenvalues(self) -> Tensor | None:
        """All eigenvalues of H where the solver is direct, else None."""
        return self.solver.spectrum(self.operator)[0] if isinstance(self.solver, Direct) else None

    def preconditioned_by(self, damping: float, like: Tensor) -> Preconditioner | None:
        """The preconditioner at a damping, for right-hand sides like [p, k]; fitted when it is first asked for."""
        if self.preconditioner == "sketch":
            self.preconditioner = Sketch()
        if isinstance(self.preconditioner, Sketch):
            return self.preconditioner.inverse(self.operator, damping, like)
        if not isinstance(self.preconditioner, str):
            return self.preconditioner
        if self._structured is None:
            self._structured = self.operator.structured(self.preconditioner)
        return StructuredInverse(self._structured, self.layers, damping + self.operator.l2)

    def _resolve(self, damping: Damping) -> float:
        if damping.auto:
            objective = self.operator.kind == "hessian" or self.operator.fisher == "exact"
            found = auto_damping(self.operator) if objective else fisher_damping(self.operator)
            self.info["auto_damping"] = found.summary()
            return found.value
        if damping.relative == "top":
            values = self.eigenvalues()
            top = float(values.max()) if values is not None else top_eigenvalue(self.operator)
            return damping.resolve("", Spectrum(0.0, top))
        if damping.relative:
            values = self.eigenvalues()
            total = float(values.sum()) if values is not None else trace(self.operator)
            spectrum = Spectrum(total / self.operator.size, example=total / self.operator.examples)
            return damping.resolve("", spectrum)
        return float(damping.value)


@dataclass(frozen=True)
class StructuredInverse:
    """A block-diagonal curvature's damped inverse on flat vectors [p, k]: a preconditioner."""

    curvature: Curvature
    layers: Mapping[str, Layer]
    damping: float

    def __matmul__(self, x: Tensor) -> Tensor:
        widths = [layer.numel for layer in self.layers.values()]
        parts = x.T.split(widths, 1)
        gradients = Gradients({name: Dense(part) for name, part in zip(self.layers, parts, strict=True)})
        return (self.curvature.inverse(Damping(self.damping)) @ gradients).dense().T


class SolvedInverse:
    """``(H + damping I)^-1`` on gradients, and the evidence of every solve.

    Attributes:
        number: the damping.
        damping: the same by layer.
        solves: one `SolveInfo` a solve so far.
    """

    def __init__(self, curvature: SolvedCurvature, damping: float) -> None:
        self.curvature, self.number = curvature, damping
        self.damping = dict.fromkeys(curvature.layers, damping)
        self.solves: list[SolveInfo] = []

    def __matmul__(self, gradients: Gradients) -> Gradients:
        """Preconditioned gradients, one dense block a layer."""
        return Gradients(self._blocks(self._solve(self._flat(gradients))), gradients.router)

    def quadratic(self, gradients: Gradients) -> dict[str, Tensor]:
        """``g^T (H + damping I)^-1 g`` of every example, [batch], by layer: the layers' parts of the sum."""
        operator, parts = self.curvature.operator, []
        panel = max(1, int(operator.memory * PANEL_SHARE / (operator.size * 8)))
        widths = [layer.numel for layer in self.curvature.layers.values()]
        for a in range(0, gradients.batch, panel):
            flat = self._flat(gradients.rows(slice(a, a + panel)))
            products = (self._solve(flat) * flat).split(widths, 1)
            parts.append(torch.stack([part.sum(1) for part in products]))
        return dict(zip(self.curvature.layers, torch.cat(parts, 1), strict=True))

    def _flat(self, gradients: Gradients) -> Tensor:
        if set(gradients) != set(self.curvature.layers):
            raise UpweightError(
                "the gradients and the curvature have different layers -> fit on the same model"
            )
        return torch.cat([gradients[name].dense() for name in self.curvature.layers], 1)

    def _solve(self, flat: Tensor) -> Tensor:
        curvature, b, started = self.curvature, flat.T.contiguous(), time.perf_counter()
        assert curvature.solver != "dual"
        before = curvature.operator.products
        preconditioner = curvature.preconditioned_by(self.number, b)
        solution = curvature.solver.solve(curvature.operator, b, self.number, preconditioner)
        spent = curvature.operator.products - before  # those of the preconditioner included
        self.solves.append(replace(solution.info, products=spent, seconds=time.perf_counter() - started))
        return solution.value.T

    def _blocks(self, flat: Tensor) -> dict[str, Dense]:
        parts = flat.split([layer.numel for layer in self.curvature.layers.values()], 1)
        return {
            name: Dense(part.contiguous()) for name, part in zip(self.curvature.layers, parts, strict=True)
        }


def solve_summary(solves: Sequence[SolveInfo]) -> dict[str, Any]:
    """How well several panels of systems were solved, JSON-able; a warning where one was not as well as promised."""
    if not solves:
        return {}
    whole = replace(
        solves[-1],
        iterations=max(s.iterations for s in solves),
        residual=torch.cat([s.residual.double().cpu() for s in solves]),
        products=sum(s.products for s in solves),
        seconds=sum(s.seconds for s in solves),
        converged=all(s.converged for s in solves),
    )
    summary = {**whole.summary(), "panels": len(solves)}
    if not whole.converged:
        warnings.warn(
            f"solver={whole.solver!r} did not converge at damping={whole.damping:.3g}: relative residual up to "
            f"{summary['residual_max']:.1e} after {whole.iterations} iterations -> see info['solve']; raise the "
            "damping or the solver's iterations, or use a preconditioner",
            stacklevel=3,
        )
    return summary
