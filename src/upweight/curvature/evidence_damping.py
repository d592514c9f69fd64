"""``damping="auto"`` for a Fisher matrix of sampled or given labels: the prior that makes the weights most likely.

Such a matrix is not the curvature of the objective: it lacks most directions, and with the given labels it shrinks
where these are fitted. How far its steps lower the objective (`upweight.curvature.auto_damping`) then says how long
they should be, and nothing of their direction, which is what scores are made of. A damping is also a Gaussian prior
N(0, 1 / (n damping)) on the parameters, and the evidence of the trained ones is largest where its pull matches the
number of directions that the data determines,

    n theta^T (damping + l2) theta = sum_j s_j / (s_j + damping + l2) = effective dimension,

s_j the eigenvalues of H without l2. The left side rises with the damping and the right side falls: there is exactly one
such damping, or l2 alone is more than enough. It is no less than the regulariser that the weights betray (see
`upweight.curvature.implicit_l2`). Source: "Bayesian Interpolation" (MacKay 1992, eq. 4.8, a fixed point).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from upweight.curvature.auto_damping import LEAST_OF_L2, rounded
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.implicit_l2 import implicit_l2_beside
from upweight.curvature.krylov import lanczos_quadrature
from upweight.gradients.layers import from_parameters

BISECTIONS = 100


@dataclass(frozen=True)
class EvidenceDamping:
    """What was chosen and from what.

    Attributes:
        value: the damping.
        effective_dimension: directions that the data determines at this damping.
        squared_norm: ``|theta|^2`` of the tracked parameters.
        smallest: the smallest eigenvalue met.
        implicit: the regulariser that the trained parameters betray; the damping is at least this.
    """

    value: float
    effective_dimension: float
    squared_norm: float
    smallest: float
    implicit: float

    def summary(self) -> dict[str, Any]:
        """JSON-able, for a result's evidence."""
        return {
            "criterion": "n theta^T (damping + l2) theta = effective dimension (MacKay 1992)",
            "damping": self.value,
            "effective_dimension": self.effective_dimension,
            "squared_norm": self.squared_norm,
            "smallest_eigenvalue": self.smallest,
            "implicit_l2": self.implicit,
        }


def evidence_damping(operator: ExactCurvature) -> EvidenceDamping:
    """The damping of the highest evidence, rounded to two digits; at least a thousandth of l2.

    Cost: 32 products of H with four vectors and with two, and a forward and backward pass over the training data.
    """
    nodes, weights = lanczos_quadrature(operator)
    data = (nodes - operator.l2).clamp_min(0)
    named = {name: p.detach()[None].double() for name, p in operator.tracker.parameters.items()}
    theta = from_parameters(operator.tracker.layers, named)[0]
    squared, pull = float(theta.square().sum()), float(theta.square() @ operator.ridge.to(theta))
    implicit = implicit_l2_beside(operator)
    least = max(LEAST_OF_L2 * operator.l2, implicit) or 1e-12
    value = rounded(_balance(data, weights, operator.examples, squared, pull, operator.l2, least), least)
    return EvidenceDamping(
        value, _determined(data, weights, value + operator.l2), squared, float(nodes.min()), implicit
    )


def _determined(values: Tensor, weights: Tensor, precision: float) -> float:
    return float((weights * values / (values + precision)).sum())


def _balance(
    values: Tensor, weights: Tensor, n: int, squared: float, pull: float, l2: float, least: float
) -> float:
    """The x from `least` on with ``n (x squared + pull) = sum weights values / (values + x + l2)``, by bisection."""
    low, high = least, max(float(values.max()), float(weights.sum()) / (n * max(squared, 1e-300))) * 10
    for _ in range(BISECTIONS):
        middle = (low * high) ** 0.5
        above = n * (middle * squared + pull) < _determined(values, weights, middle + l2)
        low, high = (middle, high) if above else (low, middle)
    return max(least, (low * high) ** 0.5)
