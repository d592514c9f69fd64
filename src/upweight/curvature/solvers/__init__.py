"""Ways to apply the damped inverse of a curvature that is known by its products."""

from __future__ import annotations

from collections.abc import Callable

from upweight.curvature.solvers.arnoldi import Arnoldi
from upweight.curvature.solvers.astra import Astra
from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution, SolveInfo, Solver
from upweight.curvature.solvers.cg import ConjugateGradient
from upweight.curvature.solvers.direct import Direct
from upweight.curvature.solvers.jacobi import Jacobi
from upweight.curvature.solvers.lissa import Lissa
from upweight.curvature.solvers.low_rank import LowRankInverse
from upweight.curvature.solvers.nystrom import Nystrom
from upweight.curvature.solvers.sketch import Sketch
from upweight.errors import UpweightError

SOLVERS: dict[str, Callable[[], Solver]] = {
    solver.name: solver for solver in (Direct, ConjugateGradient, Lissa, Arnoldi, Nystrom, Astra)
}
"""Solvers by name."""

__all__ = [
    "SOLVERS",
    "Arnoldi",
    "Astra",
    "ConjugateGradient",
    "Direct",
    "Jacobi",
    "LinearOperator",
    "Lissa",
    "LowRankInverse",
    "Nystrom",
    "Preconditioner",
    "Sketch",
    "Solution",
    "SolveInfo",
    "Solver",
    "make_solver",
]


def make_solver(solver: str | Solver) -> Solver:
    """A solver by name, with its defaults, or the given object.

    Example:
        >>> make_solver("direct").name
        'direct'
    """
    if isinstance(solver, str):
        if solver not in SOLVERS:
            raise UpweightError(
                f"solver={solver!r} is unknown -> use one of {[*SOLVERS, 'dual']} or an object"
            )
        return SOLVERS[solver]()
    if not callable(getattr(solver, "solve", None)) or not isinstance(getattr(solver, "name", None), str):
        raise UpweightError(
            f"solver is {type(solver).__name__}, expected a name or an object with `name` and `solve` -> use one "
            f"of {[*SOLVERS, 'dual']}"
        )
    return solver
