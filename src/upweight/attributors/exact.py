"""What `Influence` does with an exact curvature: check the arguments, choose the solver, fit, report how it solved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from upweight.curvature import KINDS
from upweight.curvature.exact import EXACT_KINDS, ExactCurvature
from upweight.curvature.l2 import L2, check_l2, describe_l2
from upweight.curvature.solved import SolvedCurvature, solve_summary
from upweight.curvature.solvers import Solver, make_solver
from upweight.curvature.solvers.direct import Direct
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.task import FisherKind

if TYPE_CHECKING:
    from upweight.attributors.influence import Influence

DIRECT_UP_TO = 6000
"""Parameters up to which the dense inverse is the default: a few seconds."""
PRECONDITIONERS = ("sketch", "ekfac", "kfac", "diagonal")
"""Preconditioners by name."""
DEFAULT_PRECONDITIONER = {"cg": "sketch", "astra": "ekfac"}


def check_curvature(curvature: str, solver: str | Solver | None, l2: L2, blocks: bool = False) -> None:
    """Raise unless curvature, solver and regulariser are known and go together."""
    known = [*KINDS, "datainf", *EXACT_KINDS]
    if curvature not in known:
        raise UpweightError(f"curvature={curvature!r} is unknown -> use one of {known}")
    check_l2(l2)
    if solver is not None and solver != "dual":
        make_solver(solver)
    if curvature in EXACT_KINDS:
        if solver == "dual" and curvature == "hessian":
            raise UpweightError(
                "solver='dual' needs H as a sum of squares, which a Hessian is not -> use curvature='ggn' or "
                "another solver"
            )
        if solver == "dual" and blocks:
            raise UpweightError("solver='dual' couples all layers, expected blocks=False -> use solver='cg'")
        if solver == "dual" and not isinstance(l2, (int, float)):
            raise UpweightError(
                "solver='dual' takes one l2 for all parameters -> give a number, or use solver='direct'"
            )
        return
    if solver is not None:
        raise UpweightError(
            f"solver={solver!r} does not apply to curvature={curvature!r}, whose inverse is known in closed form -> "
            "leave it None, or use curvature='ggn' or 'hessian'"
        )
    if blocks:
        raise UpweightError(
            f"blocks=True does not apply to curvature={curvature!r}, which never couples layers -> leave it out, or "
            "use curvature='ggn' or 'hessian'"
        )
    if not isinstance(l2, (int, float)) or l2:
        raise UpweightError(
            f"l2={describe_l2(l2)} does not apply to curvature={curvature!r}, which models the loss "
            "alone -> add it to a number as damping, or use curvature='ggn' or 'hessian'"
        )


def fit_exact(method: Influence, tracker: Tracker, examples: Examples) -> SolvedCurvature:
    """The exact curvature with its solver, ready to solve."""
    fisher: Any = "exact" if method.fisher == "auto" or method.curvature == "hessian" else method.fisher
    if fisher not in get_args(FisherKind):
        raise UpweightError(f"fisher={fisher!r} is unknown -> use 'auto', 'exact', 'sampled' or 'empirical'")
    operator = ExactCurvature(
        tracker,
        examples,
        method.curvature,
        method.l2,
        method.batch_size,
        method.blocks,
        fisher=fisher,
        draws=method.draws,
        seed=method.seed,
        memory=method.memory,
        progress=method.progress,
    )
    solver = _choose_solver(method, operator)
    if isinstance(solver, Direct):
        operator.check_dense()
    preconditioner = method.preconditioner
    if preconditioner == "auto":
        preconditioner = None if solver == "dual" else DEFAULT_PRECONDITIONER.get(solver.name)
    if isinstance(preconditioner, str) and preconditioner not in PRECONDITIONERS:
        raise UpweightError(
            f"preconditioner={preconditioner!r} is unknown -> use 'auto', None, one of "
            f"{list(PRECONDITIONERS)} or an object"
        )
    extent = "a matrix for every layer" if method.blocks else "one matrix over all layers"
    represented = dict.fromkeys(tracker.layers, f"exact {method.curvature}, {extent}")
    curvature = SolvedCurvature(operator, solver, preconditioner, {"represented": represented})
    curvature.prepare(method.damping)
    return curvature


def solver_settings(curvature: Any, preconditioner: Any) -> dict[str, Any]:
    """What solves with a curvature, and its options that are numbers or words."""
    chosen = {"solver": curvature.solver, "preconditioner": preconditioner}
    whole = {"blocks": True} if curvature.operator.blocks else {}
    return whole | {
        name: part
        if part is None or isinstance(part, str)
        else {
            "name": getattr(part, "name", type(part).__name__),
            **{key: v for key, v in sorted(vars(part).items()) if isinstance(v, (int, float, str))},
        }
        for name, part in chosen.items()
    }


def solve_evidence(inverse: Any) -> dict[str, Any]:
    """How well an inverse's systems were solved, for a result's evidence; nothing for closed forms."""
    solves = getattr(inverse, "solves", [])
    return {"solve": solve_summary(solves)} if solves else {}


def _choose_solver(method: Influence, operator: ExactCurvature) -> Any:
    if method.solver == "dual":
        return "dual"
    if method.solver is not None:
        return make_solver(method.solver)
    return make_solver("direct" if operator.size <= DIRECT_UP_TO and operator.fits_dense() else "cg")
