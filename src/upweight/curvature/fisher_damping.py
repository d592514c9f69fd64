"""``damping="auto"`` for a Fisher matrix of sampled or given labels: as many directions as its examples can tell.

Such a matrix is not the curvature of the objective: it lacks most directions, and with the given labels it shrinks
where these are fitted. How far its steps lower the objective (`upweight.curvature.auto_damping`) then says how long
they should be, and nothing of their direction, which is what scores are made of.

It is a sum of one gradient an example. Where parameters are many, each adds a direction of which no other example
knows, and inverted without damping it would count as much as what all of them have in common. The damping is the one at
which n examples determine a share of n directions, the effective dimension of ridge regression:

    sum_j s_j / (s_j + damping + l2) = 0.08 n,        s_j the eigenvalues of H without l2.

Retraining agrees best with .04 to .11 on every bank of benchmarks/lds/dual_damping.py, over five orders of magnitude
of the damping. Where the data does not determine twice as many even without it (few parameters, or l2 is told and
large), it is at least that of the Gaussian prior N(0, 1 / (n damping)) under which the trained weights are most likely,

    n theta^T (damping + l2) theta = sum_j s_j / (s_j + damping + l2),

or next to nothing if l2 alone is more than that. In both the left side and the right side meet once. It is no less than
the regulariser that the weights betray (see `upweight.curvature.implicit_l2`). Source: "Bayesian Interpolation"
(MacKay 1992, eq. 4.8, a fixed point).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from upweight.curvature.auto_damping import LEAST_OF_L2, SPAN, rounded
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.implicit_l2 import implicit_l2_beside
from upweight.curvature.krylov import lanczos_quadrature
from upweight.gradients.layers import from_parameters

DIRECTIONS = 0.08
"""Of an example: the effective dimension is at most this many times the examples."""
SPARE = 2.0
"""The data must determine so many times that without damping: near all there are, the damping would tend to nothing."""
BISECTIONS = 100


@dataclass(frozen=True)
class FisherDamping:
    """What was chosen and from what.

    Attributes:
        value: the damping.
        criterion: what it solves, in words.
        effective_dimension: directions that the data determines at this damping.
        examples: training examples.
        squared_norm: ``|theta|^2`` of the tracked parameters.
        smallest: the smallest eigenvalue met.
        implicit: the regulariser that the trained parameters betray; the damping is at least this.
    """

    value: float
    criterion: str
    effective_dimension: float
    examples: int
    squared_norm: float
    smallest: float
    implicit: float

    def summary(self) -> dict[str, Any]:
        """JSON-able, for a result's evidence."""
        return {
            "criterion": self.criterion,
            "damping": self.value,
            "effective_dimension": self.effective_dimension,
            "examples": self.examples,
            "squared_norm": self.squared_norm,
            "smallest_eigenvalue": self.smallest,
            "implicit_l2": self.implicit,
        }


def fisher_damping(operator: ExactCurvature) -> FisherDamping:
    """The damping of .08 directions an example, or, where there are few, of the evidence.

    To two digits, and at least a thousandth of l2.

    Cost: 32 products of H with four vectors and with two, and a forward and backward pass over the training data.
    """
    nodes, weights = lanczos_quadrature(operator)
    n, rounding = operator.examples, torch.finfo(operator.tracker.dtype).eps * nodes.max()
    data = torch.where(nodes - operator.l2 > rounding, nodes - operator.l2, 0.0)
    named = {name: p.detach()[None].double() for name, p in operator.tracker.parameters.items()}
    theta = from_parameters(operator.tracker.layers, named)[0]
    squared, pull = float(theta.square().sum()), float(theta.square() @ operator.ridge.to(theta))
    implicit = implicit_l2_beside(operator)
    least = max(LEAST_OF_L2 * operator.l2, implicit) or 1e-12

    def determined(damping: float) -> float:
        return float((weights * data / (data + damping + operator.l2)).sum())

    most, largest = DIRECTIONS * n, max(least, SPAN[1] * float(data.max()))
    found = _crossing(lambda d: determined(d) - most, least, largest)
    criterion = f"effective dimension = {DIRECTIONS:g} n"
    if determined(least) <= SPARE * most:
        evidence = _crossing(lambda d: determined(d) - n * (d * squared + pull), least, largest)
        if evidence >= found:
            found = evidence
            criterion = "n theta^T (damping + l2) theta = effective dimension (MacKay 1992)"
    value = rounded(found, least)
    smallest = float(nodes.min())
    return FisherDamping(value, criterion, determined(value), n, squared, smallest, implicit)


def _crossing(falling: Callable[[float], float], low: float, high: float) -> float:
    """Where a falling function is zero, by bisection in log damping; the nearer end if that is not between the two."""
    if falling(low) <= 0:
        return low
    if falling(high) > 0:
        return high
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low * high) ** 0.5
