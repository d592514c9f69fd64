"""The options of a repair, shared by `unlearn`, `relabel`, `reweight` and `amend`."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

from upweight.curvature import KINDS, Damping
from upweight.curvature.damping import DampingLike
from upweight.curvature.exact import EXACT_KINDS
from upweight.curvature.l2 import CONVENTIONS, L2
from upweight.curvature.solvers import Preconditioner, Sketch, Solver
from upweight.errors import UpweightError
from upweight.gradients.select import ParameterFilter

METHODS = ("newton", "influence", "gradient", "trust_region", "corrected", "fine_tune", "last_layer")
ITERATED = ("newton", "trust_region", "corrected", "fine_tune", "last_layer")
DEFAULT_STEPS = {"trust_region": 10, "corrected": 5, "last_layer": 50}


class Options(TypedDict, total=False):
    """Keyword arguments that `unlearn`, `relabel`, `reweight` and `amend` take.

    * ``method``: ``"newton"`` (the default; the curvature after the change), ``"influence"`` (before it),
      ``"gradient"`` (first order), ``"trust_region"`` (small Newton steps, the gradient evaluated anew each time),
      ``"corrected"`` (a Newton step and `steps` further preconditioned gradient steps on the changed objective),
      ``"fine_tune"`` (`steps` passes over the changed data in shuffled batches, preconditioned by the curvature),
      ``"last_layer"`` (only the last linear layer, to its exact minimum).
    * ``curvature``, ``damping``, ``solver``, ``preconditioner`` (none, unless told so: it seldom pays for one
      right-hand side), ``fisher``, ``draws``, ``parameters``, ``memory``, ``batch_size``,
      ``seed``, ``progress``: as in `Influence`. With `parameters` of an `nn.Sequential`'s later layers alone, what goes
      into them is computed once. ``curvature=None`` is ``"ggn"`` up to 6,000 parameters and
      ``"ekfac"`` beyond, with ``"newton"`` and the like.
    * ``l2``: the regulariser ``(1/2) sum_j l2_j theta_j^2`` of the training objective (weight decay): one coefficient,
      or {regular expression of parameter names: coefficient}.
    * ``convention``: ``"mean"`` (the default): the changed objective divides by the examples that are left, as ordinary
      retraining does; ``"sum"``: still by n, as scikit-learn's penalties have it.
    * ``finish``: also drive to zero what gradient the training itself had left. By default that stays as it is, so that
      a network that was stopped early moves by the change alone.
    * ``step_size``: times the step; None chooses it: the longest that has at least half of the effect which the
      quadratic model promises, or, with `validation`, the best on it. Where none helps, the model stays as it is, with
      a warning. A given one is taken as it is.
    * ``steps``: the most steps of an iterated method; 1 for ``"newton"``.
    * ``batch`` and ``rate``: of ``"fine_tune"``, whose `steps` are passes over the changed data (1.5: one and a half).
    * ``curvature_examples``: fit the curvature to this many of the examples, drawn by the seed; None for all.
    * ``search_examples``: how far to go along a step is decided on at most this many of the training examples, drawn by
      the seed (without `validation`); the step itself and the change's own gradient are of all of them.
    * ``tolerance``: an iterated method stops where the gradient has fallen to this share of what it was.
    """

    method: str
    curvature: str | None
    damping: DampingLike
    solver: str | Solver | None
    preconditioner: str | Sketch | Preconditioner | None
    fisher: str
    draws: int
    parameters: ParameterFilter
    l2: L2
    convention: str
    finish: bool
    step_size: float | None
    steps: float | None
    batch: int
    rate: float
    curvature_examples: int | None
    search_examples: int
    tolerance: float
    memory: int | str
    batch_size: int | None
    seed: int
    progress: bool


@dataclass(frozen=True)
class Settings:
    """`Options` with their defaults."""

    method: str = "newton"
    curvature: str | None = None
    damping: DampingLike = "auto"
    solver: str | Solver | None = None
    preconditioner: str | Sketch | Preconditioner | None = None
    fisher: str = "auto"
    draws: int = 4
    parameters: ParameterFilter = None
    l2: L2 = 0.0
    convention: str = "mean"
    finish: bool = False
    step_size: float | None = None
    steps: float | None = None
    batch: int = 128
    rate: float = 2e-3
    curvature_examples: int | None = None
    search_examples: int = 2048
    tolerance: float = 1e-8
    memory: int | str = "auto"
    batch_size: int | None = None
    seed: int = 0
    progress: bool = True

    @property
    def most_steps(self) -> int:
        """Steps at the most."""
        return DEFAULT_STEPS.get(self.method, 1) if self.steps is None else int(self.steps)

    @property
    def passes(self) -> float:
        """Passes over the data, of ``"fine_tune"``."""
        return 1.0 if self.steps is None else float(self.steps)


def read_options(options: Mapping[str, Any]) -> Settings:
    """The settings, or an error that says which option cannot be."""
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            raise UpweightError(
                f"there is no option {name!r} -> {f'{close[0]}=' if close else 'one of ' + ', '.join(known)}"
            )
    found = Settings(**options)
    if found.method not in METHODS:
        raise UpweightError(f"method={found.method!r} is unknown -> use one of {list(METHODS)}")
    kinds = [*KINDS, *EXACT_KINDS]
    if found.curvature is not None and found.curvature not in kinds:
        raise UpweightError(f"curvature={found.curvature!r} is unknown -> use one of {kinds}")
    if found.convention not in CONVENTIONS:
        raise UpweightError(f"convention={found.convention!r} is unknown -> use one of {list(CONVENTIONS)}")
    if found.step_size is not None and not found.step_size > 0:
        raise UpweightError(
            f"step_size={found.step_size!r}, expected a positive number -> 1 is the whole step"
        )
    if found.steps is not None and found.method == "fine_tune":
        if not 0 < found.steps < math.inf:
            raise UpweightError(
                f"steps={found.steps} with method='fine_tune', expected a positive number of passes -> 1 is a whole one"
            )
    elif found.steps is not None and (
        found.steps < 1 or found.steps != int(found.steps) or found.method not in ITERATED
    ):
        raise UpweightError(
            f"steps={found.steps} with method={found.method!r}, expected an integer of at least 1, and an iterated "
            f"method -> leave it out, or use one of {list(ITERATED)}"
        )
    if found.curvature_examples is not None and found.curvature_examples < 1:
        raise UpweightError(
            f"curvature_examples={found.curvature_examples}, expected at least 1 -> leave it out for all of them"
        )
    if found.search_examples < 1:
        raise UpweightError(
            f"search_examples={found.search_examples}, expected at least 1 -> 2048 is the default"
        )
    if found.batch < 1 or not found.rate > 0:
        raise UpweightError(
            f"batch={found.batch!r} and rate={found.rate!r}, expected at least 1 and a positive number -> 128 and 2e-3"
        )
    if not found.tolerance >= 0:
        raise UpweightError(f"tolerance={found.tolerance!r}, expected >= 0 -> 1e-8 is the default")
    Damping.of(found.damping)
    return replace(found, finish=True) if found.method == "fine_tune" else found
