"""Solve ``(K + shift I) A = B`` for a Gram matrix ``K = S S^T`` and many right-hand sides, and know how well.

K is kept in the model's precision. A Cholesky factor gives a correction, or where many rows are light a factor of the
heavy ones, as the preconditioner of conjugate gradients; the residual it leaves is computed with float64 accumulation,
and the next correction is solved for that, until the residual is what was promised (iterative refinement).

What counts is the residual that the solution leaves in parameter space. With ``x = (v - S^T a) / d`` and
``rho = S v - (K + n d I) a`` it is ``v - (H + d I) x = -S^T rho / (n d)``, whose squared norm is
``rho^T K rho / (n d)^2``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.errors import UpweightError

LIGHT = 1e-2
"""Rows whose diagonal entries sum to less than this share of the shift are left to the diagonal preconditioner."""
WORTH = 0.8
"""A factor of fewer than this share of the rows is worth its price: half a factor's operations are saved, for several
products with K for every right-hand side."""
ROUNDS, STEPS = 8, 60
"""Corrections at most, and steps of conjugate gradients in each."""
REDUCE = {torch.float32: 3e-6, torch.float64: 1e-13}
"""What one round reduces the residual to, at best: more than single precision can hold is left to the next."""
ROW_BYTES = 64 << 20
"""Working memory of the float64 products."""


@dataclass(frozen=True)
class GramSolution:
    """``(K + shift I)^-1 B`` and what is left.

    Attributes:
        value: [N, k], float64.
        rest: ``B - (K + shift I) value`` [N, k], float64.
        energy: ``rest^T K rest`` of every column [k], float64.
        steps: uses of the factor, each with one product with K; 0 where there was nothing to solve.
    """

    value: Tensor
    rest: Tensor
    energy: Tensor
    steps: int


class GramSystem:
    """``K + shift I``, factorised.

    Args:
        gram: K [N, N], symmetric, both halves. Not changed.
        shift: what is added to the diagonal, > 0.
        spectrum: K's eigenvalues [N] and eigenvectors [N, N] where they are known: no factor is needed then.

    Raises:
        UpweightError: K is not positive definite with this shift in its precision.

    Example:
        >>> import torch
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> GramSystem(K, 1.0).solve(
        ...     torch.ones(2, 1, dtype=torch.float64), torch.tensor([1e-12])
        ... ).value.flatten()
        tensor([0.2500, 0.2500], dtype=torch.float64)
    """

    def __init__(self, gram: Tensor, shift: float, spectrum: tuple[Tensor, Tensor] | None = None) -> None:
        self.gram, self.shift, self.spectrum = gram, shift, spectrum
        diagonal = gram.diagonal()
        self._scale = 1 / (diagonal + shift)
        self.heavy = heaviest(diagonal, LIGHT * shift)
        if len(self.heavy) > WORTH * len(gram):
            self.heavy = torch.arange(len(gram), device=gram.device)
        if spectrum is not None:
            return
        block = gram[self.heavy][:, self.heavy] if len(self.heavy) < len(gram) else gram.clone()
        block.diagonal().add_(shift)
        self.factor = block.mT  # in the order of LAPACK, so that the block itself becomes the factor
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(self.factor, out=(self.factor, failed))
        if int(failed) or not bool(torch.isfinite(self.factor.diagonal()).all()):
            dtype = str(gram.dtype).removeprefix("torch.")
            raise UpweightError(
                f"the Gram matrix of {len(gram):,} gradient columns, with entries up to {float(diagonal.max()):.1e}, "
                f"is not positive definite in {dtype} with n * damping = {shift:.1e} on its diagonal -> raise the "
                "damping, or give the model in float64"
            )

    def solve(self, b: Tensor, allowed: Tensor) -> GramSolution:
        """Solve for b [N, k] until ``sqrt(rest^T K rest)`` of every column is within `allowed` [k], or stalls."""
        rest = b.double().clone()
        value, steps = torch.zeros_like(rest), 0
        energy = torch.where((rest != 0).any(0), torch.inf, 0.0).double()  # not worth a product to know
        for _ in range(ROUNDS):
            unsolved = (energy.sqrt() > allowed).nonzero()[:, 0]
            if not len(unsolved):
                break
            wanted = (allowed[unsolved] / energy[unsolved].sqrt()).to(self.gram.dtype)
            correction, taken = self._correct(rest[:, unsolved], wanted)
            tried = value[:, unsolved] + correction
            left = b[:, unsolved].double() - self.product(tried)
            found = self.energy(left)
            better = found < energy[unsolved]
            steps += taken
            if not bool(better.any()):  # rounding of K itself is all that is left
                break
            columns = unsolved[better]
            value[:, columns], rest[:, columns] = tried[:, better], left[:, better]
            energy[columns] = found[better]
        return GramSolution(value, rest, energy, steps)

    def product(self, x: Tensor) -> Tensor:
        """``(K + shift I) x`` with float64 accumulation."""
        height = max(1, ROW_BYTES // (8 * len(self.gram)))
        parts = [self.gram[a : a + height].double() @ x for a in range(0, len(self.gram), height)]
        return torch.cat(parts).add_(x, alpha=self.shift)

    def energy(self, rest: Tensor) -> Tensor:
        """``rest^T K rest`` of every column [k], float64."""
        scale = rest.abs().amax(0).clamp_min(1e-300)  # a tiny residual would be zero in single precision
        unit = (rest / scale).to(self.gram.dtype)
        return (unit * (self.gram @ unit)).double().sum(0).clamp_min(0) * scale.square()

    def precondition(self, r: Tensor) -> Tensor:
        """The factor's solution for the heavy rows and the diagonal's for the others."""
        if self.spectrum is not None:
            values, vectors = self.spectrum
            return vectors @ ((vectors.mT @ r) / (values.clamp_min(0) + self.shift)[:, None])
        if len(self.heavy) == len(self.gram):
            return cholesky_solve(r, self.factor)
        out = r * self._scale[:, None]
        out[self.heavy] = cholesky_solve(r[self.heavy], self.factor)
        return out

    def _correct(self, b: Tensor, wanted: Tensor) -> tuple[Tensor, int]:
        """The factor's solution, or preconditioned conjugate gradients for all columns side by side; in K's precision.

        They stop where every column's residual is a third of the share `wanted` [k], or what the precision gives.
        """
        scale = torch.linalg.vector_norm(b, dim=0).clamp_min(1e-300)
        rest = (b / scale).to(self.gram.dtype)
        x = torch.zeros_like(rest)
        z = self.precondition(rest)
        if len(self.heavy) == len(self.gram):  # solved, but for rounding: refinement sees to that
            return z.double() * scale, 1
        p, gain = z, (rest * z).sum(0)
        tiny = torch.finfo(rest.dtype).tiny
        reduce = (wanted / 3).clamp_min(REDUCE[rest.dtype])
        step = 0
        for step in range(1, STEPS + 1):
            image = torch.addmm(p, self.gram, p, beta=self.shift)
            length = gain / (p * image).sum(0).clamp_min(tiny)
            x = torch.addcmul(x, p, length)
            rest = torch.addcmul(rest, image, -length)
            if step == STEPS or bool((torch.linalg.vector_norm(rest, dim=0) <= reduce).all()):
                break
            z = self.precondition(rest)
            before, gain = gain, (rest * z).sum(0)
            p = torch.addcmul(z, p, gain / before.clamp_min(tiny))
        return x.double() * scale, step


def cholesky_solve(b: Tensor, factor: Tensor) -> Tensor:
    """``(L L^T)^-1 b``. torch's own copies the factor each time: its memory once more, and time for a few vectors."""
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


def heaviest(weights: Tensor, allowance: float) -> Tensor:
    """Positions, ascending, of the fewest weights [N] that leave out no more than `allowance`; at least one."""
    ascending, order = weights.double().sort()
    light = min(int((ascending.cumsum(0) <= allowance).sum()), len(weights) - 1)
    return order[light:].sort().values
