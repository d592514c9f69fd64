"""Ways to apply the damped inverse of a curvature that is known by its products."""

from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution, SolveInfo, Solver

__all__ = ["LinearOperator", "Preconditioner", "Solution", "SolveInfo", "Solver"]
