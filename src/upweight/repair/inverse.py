"""``(H + damping I)^-1`` on vectors of parameters, with H the curvature of a whole objective, regulariser included.

The objective is ``J = (1/N) sum_i w_i l_i + R`` over k rows of data. A curvature that is fitted is the mean over the
rows, H_fit, so that with s = k / N

    (s H_fit + l2 + damping)^-1 = (H_fit + (l2 + damping) / s)^-1 / s.

An exact curvature knows l2 itself; a structured one has it added to every layer's damping.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.exact import DIRECT_UP_TO, solve_evidence
from upweight.attributors.influence import Influence
from upweight.attributors.reweighted import many_at_once
from upweight.curvature import Damping
from upweight.curvature.exact import EXACT_KINDS
from upweight.curvature.l2 import L2
from upweight.data import Examples
from upweight.gradients import Gradients
from upweight.gradients.blocks import Dense
from upweight.gradients.layers import from_parameters, to_parameters
from upweight.gradients.select import ParameterFilter, select_parameters
from upweight.repair.change import selected
from upweight.repair.options import Settings
from upweight.repair.vectors import Vector, scaled
from upweight.task import OutputTask, Task

DENSE_UP_TO = 1000
"""Parameters up to which one solution is soonest had from a dense matrix."""


class Inverse:
    """The damped inverse of an objective's curvature, at the weights that the model has when this is made.

    Args:
        model: the model.
        task: its loss on the examples.
        examples: the data.
        divisor: N of the objective.
        settings: curvature, damping, solver, l2.
    """

    def __init__(
        self, model: nn.Module, task: Task, examples: Examples, divisor: float, settings: Settings
    ) -> None:
        self.share = examples.n / divisor  # s
        few = settings.curvature_examples
        if few is not None and few < examples.n:  # a sample stands for all
            generator = torch.Generator().manual_seed(settings.seed)
            chosen = torch.randperm(examples.n, generator=generator)[:few].sort().values
            examples = selected(examples, chosen.numpy())
        self.curvature = settings.curvature or "ekfac"
        exact = self.curvature in EXACT_KINDS
        self.method = Influence(
            model,
            task,
            curvature=self.curvature,
            damping=self._over_share(Damping.of(settings.damping)),
            solver=settings.solver or default_solver(self.curvature, model, settings.parameters),
            preconditioner=settings.preconditioner,
            l2=divided(settings.l2, self.share) if exact else 0.0,
            fisher=settings.fisher,
            draws=settings.draws,
            parameters=settings.parameters,
            memory=settings.memory,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=settings.progress,
        ).fit(examples)
        self.fitted = self.method._ready()
        self.layers = self.fitted.tracker.layers
        self._l2 = dict.fromkeys(self.layers, 0.0) if exact else self._mean_l2(settings.l2)
        self.solves: list[Any] = []

    def __call__(self, gradient: Mapping[str, Tensor], factor: float = 1.0) -> Vector:
        """``(H + factor damping I)^-1 g``."""
        tracker = self.fitted.tracker
        rows = {name: g[None].to(tracker.dtype) for name, g in gradient.items()}
        parts = from_parameters(self.layers, rows).split([layer.numel for layer in self.layers.values()], 1)
        gradients = Gradients({name: Dense(part) for name, part in zip(self.layers, parts, strict=True)})
        inverse = self.fitted.curvature.inverse(self._damping(factor))
        solved = (many_at_once(inverse, list(self.layers)) @ gradients).dense()
        self.solves += [solve_evidence(inverse)] if solve_evidence(inverse) else []
        return scaled({n: v[0] for n, v in to_parameters(self.layers, solved).items()}, 1 / self.share)

    def damping(self, factor: float = 1.0) -> dict[str, float]:
        """The damping by layer, without the regulariser."""
        found = self.fitted.curvature.damping(self.method.damping)
        return {name: factor * self.share * value for name, value in found.items()}

    def number(self) -> float | None:
        """The damping of an exact curvature, as the option is given; None for others, which have one for each layer."""
        return next(iter(self.damping().values())) if self.curvature in EXACT_KINDS else None

    def damped(self, u: Mapping[str, Tensor], factor: float = 1.0) -> float:
        """``u^T damping u``."""
        damping = self.damping(factor)
        return sum(
            damping[name] * float(sum(u[p].double().square().sum() for p in layer.parameters))
            for name, layer in self.layers.items()
        )

    def evidence(self) -> dict[str, Any]:
        """JSON-able: curvature, damping, how systems were solved."""
        kind, columns = self.fitted.fisher
        return {
            "curvature": self.curvature,
            "fisher": kind if self.curvature not in ("identity", "hessian") else None,
            "fisher_columns": columns,
            "damping": self.damping(),
            "fit_seconds": self.fitted.notes["fit_seconds"],
            **(self.solves[-1] if self.solves else {}),
        }

    def _damping(self, factor: float) -> Damping:
        found = self.fitted.curvature.damping(self.method.damping)
        if self.curvature in EXACT_KINDS:
            return Damping.of(factor * next(iter(found.values())))
        return Damping.of(
            {name: factor * value + self._l2[name] / self.share for name, value in found.items()}
        )

    def _over_share(self, damping: Damping) -> Damping:
        """A number is divided by s; a fraction of an eigenvalue scales by itself."""
        layers = tuple((name, self._over_share(one)) for name, one in damping.layers)
        value = damping.value if damping.relative else damping.value / self.share
        return Damping(value, damping.relative, layers, damping.auto)

    def _mean_l2(self, l2: L2) -> dict[str, float]:
        """Each layer's coefficient: the mean over its parameters, where they differ."""
        from upweight.curvature.l2 import l2_vector

        flat = l2_vector(l2, self.fitted.tracker).double()
        parts = flat.split([layer.numel for layer in self.layers.values()])
        return {name: float(part.mean()) for name, part in zip(self.layers, parts, strict=True)}


def divided(l2: L2, share: float) -> L2:
    """A regulariser over a number."""
    if isinstance(l2, Tensor):
        return l2 / share
    return {name: c / share for name, c in l2.items()} if isinstance(l2, Mapping) else l2 / share


def default_solver(curvature: str, model: nn.Module, parameters: ParameterFilter) -> str | None:
    """A repair solves for one right-hand side: conjugate gradients, where a dense inverse takes longer."""
    if curvature not in EXACT_KINDS:
        return None
    size = sum(p.numel() for p in select_parameters(model, parameters).values())
    return "direct" if size <= DENSE_UP_TO else "cg"


def default_curvature(task: Task, parameters: Mapping[str, Tensor]) -> str:
    """The Gauss-Newton matrix where a dense one is quick, else EK-FAC."""
    small = sum(p.numel() for p in parameters.values()) <= DIRECT_UP_TO
    return "ggn" if small and isinstance(task, OutputTask) else "ekfac"
