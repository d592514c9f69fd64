"""Ways to apply the damped inverse of a curvature that is known by its products."""

from upweight.curvature.solvers.arnoldi import Arnoldi
from upweight.curvature.solvers.astra import Astra
from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution, SolveInfo, Solver
from upweight.curvature.solvers.cg import ConjugateGradient
from upweight.curvature.solvers.jacobi import Jacobi
from upweight.curvature.solvers.lissa import Lissa
from upweight.curvature.solvers.low_rank import LowRankInverse
from upweight.curvature.solvers.nystrom import Nystrom

__all__ = [
    "Arnoldi",
    "Astra",
    "ConjugateGradient",
    "Jacobi",
    "LinearOperator",
    "Lissa",
    "LowRankInverse",
    "Nystrom",
    "Preconditioner",
    "Solution",
    "SolveInfo",
    "Solver",
]
