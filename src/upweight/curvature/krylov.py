"""Krylov spaces of a curvature: its damped inverse for every damping at once, and its spectrum in passing.

With ``H Q = Q T`` after Lanczos steps from b, ``(H + d I)^-1 b = |b| Q (T + d I)^-1 e_1`` for every d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.curvature.exact import ExactCurvature

STEPS = 32
"""Lanczos steps."""


@dataclass(frozen=True)
class KrylovSteps:
    """``(H + d I)^-1 b`` of several b for every d, from the Krylov space of each.

    Attributes:
        basis: Lanczos vectors Q, one [p, k] a step.
        tridiagonal: T of every b, [k, steps, steps].
        norms: |b| [k].
        top: the largest eigenvalue of H that was met.
        smallest: the smallest.
    """

    basis: Sequence[Tensor]
    tridiagonal: Tensor
    norms: Tensor
    top: float
    smallest: float

    @classmethod
    def of(cls, operator: ExactCurvature, b: Tensor, steps: int = STEPS) -> KrylovSteps:
        """The Krylov spaces of b [p, k]: all advance together, one product a step, with full reorthogonalisation."""
        norms = torch.linalg.vector_norm(b, dim=0)
        basis, T = lanczos(operator, b / norms.clamp_min(1e-300), steps)
        values = torch.linalg.eigvalsh(T)
        return cls(basis, T, norms, float(values.max()), float(values.min()))

    def at(self, damping: float) -> Tensor:
        """``(H + damping I)^-1 b`` [p, k]."""
        count = self.tridiagonal.shape[-1]
        first = torch.zeros(len(self.norms), count, 1, dtype=self.tridiagonal.dtype, device=self.norms.device)
        first[:, 0, 0] = self.norms
        damped = self.tridiagonal + damping * torch.eye(count).to(self.tridiagonal)
        weights = torch.linalg.solve(damped, first)[..., 0]  # [k, steps]
        return sum((q * weights[:, j] for j, q in enumerate(self.basis)), torch.zeros_like(self.basis[0]))


def lanczos(operator: ExactCurvature, q: Tensor, steps: int) -> tuple[list[Tensor], Tensor]:
    """Lanczos vectors, one [p, k] a step, and tridiagonals [k, steps, steps], from unit vectors q [p, k].

    A space that is exhausted before the others goes on with zero vectors and zero couplings.
    """
    steps = min(steps, operator.size)
    basis, alphas, betas = [q], [], []
    for step in range(steps):
        w = operator.product(basis[-1])
        alphas.append((w * basis[-1]).sum(0))
        for _ in range(2):
            for v in basis:
                w = w - v * (v * w).sum(0)
        beta = torch.linalg.vector_norm(w, dim=0)
        scale = torch.stack(alphas).abs().amax(0).clamp_min(1e-300)
        beta = torch.where(beta > 1e-10 * scale, beta, torch.zeros_like(beta))
        if step + 1 == steps or not bool(beta.any()):
            break
        betas.append(beta)
        basis.append(torch.where(beta > 0, w / beta.clamp_min(1e-300), torch.zeros_like(w)))
    T = torch.diag_embed(torch.stack(alphas, 1))
    if betas:
        off = torch.diag_embed(torch.stack(betas, 1), 1)
        T = T + off + off.mT
    return basis, T


def lanczos_quadrature(
    operator: ExactCurvature, probes: int = 4, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Nodes and weights with ``sum weights f(nodes) ~= trace f(H)``: stochastic Lanczos quadrature.

    Source: "Fast Estimation of tr(f(A)) via Stochastic Lanczos Quadrature" (Ubaru, Chen, Saad 2017).
    """
    p = operator.size
    signs = torch.randint(0, 2, (p, probes), generator=torch.Generator().manual_seed(0))
    _, T = lanczos(operator, (2.0 * signs.double() - 1).to(operator.tracker.device) / p**0.5, steps)
    values, vectors = torch.linalg.eigh(T)
    return values.flatten(), (vectors[:, 0].square() * p / probes).flatten()


def trace(operator: ExactCurvature) -> float:
    """The trace of H, by the squared columns of a Gauss-Newton matrix exactly, else by Lanczos quadrature."""
    exact = operator.trace()
    if exact is not None:
        return exact
    nodes, weights = lanczos_quadrature(operator)
    return float((nodes * weights).sum())


def top_eigenvalue(operator: ExactCurvature) -> float:
    """The largest eigenvalue of H, by Lanczos from several random vectors."""
    return float(lanczos_quadrature(operator, probes=2)[0].max())
