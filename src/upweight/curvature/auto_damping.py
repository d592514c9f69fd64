"""``damping="auto"`` for an exact curvature: the prior precision under which the trained weights are most likely.

A damping is a Gaussian prior N(0, 1 / (n damping)) on the parameters. The evidence of the trained ones, in the
quadratic model of the loss around them, is largest where the prior's pull matches the number of directions that the
data determines,

    n damping |theta|^2 = sum_j s_j / (s_j + damping) = effective dimension(damping),

s_j the eigenvalues of H. The left side rises with the damping and the right side falls: there is exactly one such
damping. Source: "Bayesian Interpolation" (MacKay 1992, eq. 4.8 at its fixed point).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.exact import ExactCurvature

PROBES = 4
"""Random vectors whose Lanczos quadratures stand in for the trace of a function of H."""
STEPS = 48
"""Lanczos steps of each."""
INDEFINITE_MARGIN = 2.0
"""The damping of an indefinite Hessian is at least this many times its most negative eigenvalue."""


@dataclass(frozen=True)
class AutoDamping:
    """What was chosen and from what.

    Attributes:
        value: the damping.
        effective_dimension: directions that the data determines at this damping.
        squared_norm: ``|theta|^2`` of the tracked parameters.
        smallest: the smallest eigenvalue (met).
    """

    value: float
    effective_dimension: float
    squared_norm: float
    smallest: float

    def summary(self) -> dict[str, Any]:
        """JSON-able, for a result's evidence."""
        return {
            "criterion": "n damping |theta|^2 = effective dimension (MacKay 1992)",
            "damping": self.value,
            "effective_dimension": self.effective_dimension,
            "squared_norm": self.squared_norm,
            "smallest_eigenvalue": self.smallest,
        }


def auto_damping(operator: ExactCurvature, eigenvalues: Tensor | None) -> AutoDamping:
    """The damping at which ``n (damping + l2) |theta|^2`` equals the effective dimension.

    The regulariser `l2` is part of the prior: where it alone is strong enough, the damping is a thousandth of it.

    Args:
        operator: H, l2 included.
        eigenvalues: all of H's, or None to have them estimated by stochastic Lanczos quadrature.
    """
    if eigenvalues is None:
        nodes, weights = lanczos_quadrature(operator)
    else:
        nodes, weights = eigenvalues, torch.ones_like(eigenvalues)
    data = (nodes - operator.l2).clamp_min(0)  # what the data alone says
    squared = float(sum(p.detach().double().square().sum() for p in operator.tracker.parameters.values()))
    n = operator.examples
    precision = evidence_precision(data, weights, n, squared)
    smallest = float(nodes.min())
    value = max(precision - operator.l2, 1e-3 * operator.l2, -INDEFINITE_MARGIN * min(smallest, 0.0))
    value = value or 1e-12  # no curvature at all
    effective = float((weights * data / (data + value + operator.l2)).sum())
    return AutoDamping(value, effective, squared, smallest)


def evidence_precision(eigenvalues: Tensor, weights: Tensor, n: int, squared: float) -> float:
    """The root of ``n x squared = sum_j weights_j eigenvalues_j / (eigenvalues_j + x)``, by bisection of log x."""
    top = float(eigenvalues.max())
    if top <= 0 or squared <= 0:
        return max(top, 0.0) * 0.1
    low, high = top * 1e-14, max(top, float(weights.sum()) / (n * squared)) * 10
    for _ in range(100):
        middle = (low * high) ** 0.5
        determined = float((weights * eigenvalues / (eigenvalues + middle)).sum())
        low, high = (middle, high) if n * middle * squared < determined else (low, middle)
    return (low * high) ** 0.5


def lanczos_quadrature(
    operator: ExactCurvature, probes: int = PROBES, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Nodes and weights with ``sum weights f(nodes) ~= trace f(H)``: stochastic Lanczos quadrature.

    All probes advance together, one product a step, with full reorthogonalisation. Source: "Fast Estimation of tr(f(A))
    via Stochastic Lanczos Quadrature" (Ubaru, Chen, Saad 2017).
    """
    p, steps = operator.size, min(steps, operator.size)
    device = operator.tracker.device
    signs = torch.randint(0, 2, (p, probes), generator=torch.Generator().manual_seed(0))
    q = (2.0 * signs.double() - 1).to(device) / p**0.5
    basis = [q]
    alphas, betas = [], []
    for step in range(steps):
        w = operator.product(basis[-1])
        alphas.append((w * basis[-1]).sum(0))
        for _ in range(2):
            for v in basis:
                w = w - v * (v * w).sum(0)
        beta = torch.linalg.vector_norm(w, dim=0)
        if step + 1 == steps or float(beta.max()) < 1e-12 * float(alphas[0].abs().max() + 1e-300):
            break
        betas.append(beta)
        basis.append(w / beta.clamp_min(1e-300))
    nodes, weights = [], []
    for j in range(probes):
        T = torch.diag(torch.stack(alphas)[:, j])
        if betas:
            off = torch.stack(betas)[: len(alphas) - 1, j]
            T = T + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(T)
        nodes.append(values)
        weights.append(vectors[0].square() * p / probes)
    return torch.cat(nodes), torch.cat(weights)


def trace(operator: ExactCurvature) -> float:
    """The trace of H, by the squared columns of a Gauss-Newton matrix exactly, else by Lanczos quadrature."""
    exact = operator.trace()
    if exact is not None:
        return exact
    nodes, weights = lanczos_quadrature(operator)
    return float((nodes * weights).sum())


def top_eigenvalue(operator: ExactCurvature) -> float:
    """The largest eigenvalue of H, by Lanczos from several random vectors."""
    return float(lanczos_quadrature(operator, probes=2, steps=STEPS)[0].max())
