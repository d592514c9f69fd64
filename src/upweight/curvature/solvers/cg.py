"""Conjugate gradients for many right-hand sides at once.

The block form searches, at each step, the directions of all right-hand sides together: with k of them a step
takes k products and gives every query all k new directions. It is Dubrulle's variant, which keeps the residuals as
``R = Q Z`` with orthonormal Q [p, r] and so does not break down where residuals become dependent:

    D <- M^-1 Q - D (D^T A D)^-1 D^T A M^-1 Q          directions, conjugate to the last ones, with A = H + damping I
    a <- (D^T A D)^-1 D^T Q
    X <- X + D a Z
    Q, T <- qr(Q - A D a);   Z <- T Z

"Retooling the method of block conjugate gradients" (Dubrulle, ETNA 12, 2001), here with a preconditioner and with
inner products computed rather than inferred, which is what float32 needs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from upweight.curvature.solvers.base import LinearOperator, Preconditioner, Solution
from upweight.curvature.solvers.common import Callback, System, check_options, negative_curvature
from upweight.errors import UpweightError

# The block is narrowed when this share of it would do: narrowing sooner costs more iterations than it saves.
SHRINK = 0.5
DEFAULT_RTOL = {torch.float64: 1e-6}
FLOAT32_RTOL = 1e-4


class ConjugateGradient:
    """Solve ``(H + damping I) X = B`` by (block) conjugate gradients; the default where H is known by its products.

    Args:
        rtol: relative residual at which a right-hand side is done; None for 1e-6 in float64 and 1e-4 in float32,
            which rounding lets it reach on curvature as ill-conditioned as a network's.
        max_iter: iterations, over all restarts.
        block: whether the right-hand sides share their search directions. False runs one scalar recurrence per
            column, side by side: the textbook method, for comparison and for less memory.
        callback: called after every iteration with its number and the largest relative residual still open.

    Each right-hand side stops at its own time: its column is no longer updated, and the block is narrowed to the
    directions the others need once half of it would do. Dependent, equal and zero right-hand sides cost nothing extra.
    When the recurrence says all are done, the residual is measured by the full operator; columns that rounding has
    left above `rtol` are restarted from it, until they are done or no longer improve.

    Cost: one product with H per open column and iteration; the block form adds about eight [p, k] x [k, k] matrix
    products. Storage: six [p, k] blocks.

    Fails when: H + damping I is not positive definite (an error with the Rayleigh quotient), or its condition number is
    beyond the precision (a warning, and ``info.converged`` is False). The products must be over all the data and the
    same each time: mini-batches break conjugacy.

    Source: "Methods of Conjugate Gradients for Solving Linear Systems" (Hestenes and Stiefel, 1952); for the
    block form see the module.

    Example:
        >>> solver = ConjugateGradient(rtol=1e-8)
        >>> solver.name, solver.max_iter
        ('cg', 200)
    """

    name = "cg"

    def __init__(
        self,
        *,
        rtol: float | None = None,
        max_iter: int = 200,
        block: bool = True,
        callback: Callback | None = None,
    ) -> None:
        check_options("cg", rtol=rtol, max_iter=max_iter)
        self.rtol, self.max_iter, self.block, self.callback = rtol, max_iter, block, callback

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The solution for b [p, k].

        Raises:
            UpweightError: negative curvature met, a product that is not finite, or bad input.
        """
        system = System(self.name, operator, b, damping)
        rtol = self.rtol or DEFAULT_RTOL.get(b.dtype, FLOAT32_RTOL)
        run = _block if self.block else _simultaneous
        x = torch.zeros_like(system.b)
        residual = torch.linalg.vector_norm(system.b, dim=0)
        open_ = (residual > 0).nonzero()[:, 0]
        rest = system.b[:, open_]
        spent, rounds, first = 0, 0, 0
        while len(open_) and spent < self.max_iter:
            search = _Search(system, rtol, spent, self.max_iter, preconditioner, self.callback)
            step, stopped = run(search, rest)
            spent, rounds, first = int(stopped.max()), rounds + 1, first or int(stopped.min())
            candidate = x[:, open_] + step
            rest = system.b[:, open_] - system.product(candidate)
            old, new = residual[open_], torch.linalg.vector_norm(rest, dim=0)
            x[:, open_] = torch.where(new < old, candidate, x[:, open_])
            residual[open_] = torch.minimum(new, old)
            again = (new > rtol) & (new < old / 2)  # a column that rounding stops is left at its best
            open_, rest = open_[again], rest[:, again]
        notes = {
            "block": self.block,
            "preconditioned": preconditioner is not None,
            "first_stopped": first,
            "restarts": max(rounds - 1, 0),
        }
        advice = (
            "raise max_iter or the damping, or pass a preconditioner"
            if spent >= self.max_iter
            else "rounding allows no more: use a float64 model, raise the damping, or ask for a larger rtol"
        )
        return system.solution(x, rtol, spent, notes, advice, residual)


@dataclass(frozen=True)
class _Search:
    """What one round of either form needs to know."""

    system: System
    rtol: float
    spent: int
    max_iter: int
    preconditioner: Preconditioner | None
    callback: Callback | None

    def preconditioned(self, x: Tensor) -> Tensor:
        if self.preconditioner is None:
            return x
        out = self.preconditioner @ x
        if not bool(torch.isfinite(out).all()):
            raise UpweightError("the preconditioner gave numbers that are not finite -> raise its damping")
        return out

    def report(self, iteration: int, residual: Tensor) -> None:
        if self.callback is not None:
            self.callback(iteration, float(residual.max()))


def _block(search: _Search, r: Tensor) -> tuple[Tensor, Tensor]:
    """A step towards ``A^-1 r`` [p, k] and the iteration at which each column stopped [k]."""
    system, eps = search.system, torch.finfo(r.dtype).eps
    x, stopped = torch.zeros_like(r), torch.full((r.shape[1],), search.max_iter)
    columns = torch.arange(r.shape[1], device=r.device)  # those still open
    Q, Z = _independent(*torch.linalg.qr(r), cut=eps * r.shape[1])
    D = S = r[:, :0]
    inverse, top = r.new_zeros(0, 0), r.new_zeros(())
    for iteration in range(search.spent + 1, search.max_iter + 1):
        P = search.preconditioned(Q)
        P = P - D @ (inverse @ (S.mT @ P))
        D = P / torch.linalg.vector_norm(P, dim=0).clamp_min(torch.finfo(r.dtype).tiny)
        S = system.product(D)
        top = torch.maximum(top, torch.linalg.vector_norm(S, dim=0).max())
        inverse = _inverse(D, S, top, system)
        a = inverse @ (D.mT @ Q)
        if not bool(a.any()):  # rounding leaves every direction undecided: the residual will say so
            stopped[columns.cpu()] = iteration
            break
        if len(columns) == r.shape[1]:
            x.addmm_(D, a @ Z)
        else:
            x[:, columns] += D @ (a @ Z)
        Q, T = _orthonormal(Q - S @ a)
        Z = T @ Z
        residual = torch.linalg.vector_norm(Z, dim=0)  # of the columns, since Q is orthonormal
        search.report(iteration, residual)
        done = residual <= search.rtol
        if bool(done.any()):
            stopped[columns[done].cpu()] = iteration
            columns, Z = columns[~done], Z[:, ~done]
            if not len(columns):
                break
            if len(columns) <= SHRINK * Q.shape[1]:
                Q, Z = _independent(Q, Z, cut=0.0)
    return x, stopped


def _orthonormal(W: Tensor) -> tuple[Tensor, Tensor]:
    """``W = Q T`` with orthonormal Q.

    By Cholesky's factor of the Gram matrix where the columns are independent enough to lose no more than a thousandth
    of orthogonality, which only the estimate of the residual sees; by the slower Householder otherwise.
    """
    gram = W.mT @ W
    lengths = gram.diagonal().sqrt()
    lower, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None])
    enough = (torch.finfo(W.dtype).eps / 1e-3) ** 0.5
    if not int(failed) and bool((lower.diagonal() >= enough).all()):
        T = lower.mT * lengths
        return torch.linalg.solve_triangular(T, W, upper=True, left=False), T
    return torch.linalg.qr(W)


def _independent(Q: Tensor, Z: Tensor, cut: float) -> tuple[Tensor, Tensor]:
    """``Q Z`` again, with as few orthonormal columns as span it to a relative accuracy of `cut`."""
    U, values, Vh = torch.linalg.svd(Z, full_matrices=False)
    kept = values > cut * values[0]
    return Q @ U[:, kept], values[kept, None] * Vh[kept]


def _inverse(D: Tensor, S: Tensor, top: Tensor, system: System) -> Tensor:
    """``(D^T A D)^-1`` without the directions that rounding leaves undecided.

    D has unit columns, ``S = A D``, and top is the largest ``|A d|`` seen.
    """
    C = D.mT @ S
    values, V = torch.linalg.eigh((C + C.mT) / 2)
    noise = torch.finfo(D.dtype).eps * D.shape[1]
    kept = values > noise * values[-1].abs()
    if not bool(kept.all()):
        W = V[:, ~kept]
        lengths = torch.linalg.vector_norm(D @ W, dim=0)
        # What rounds is W^T C W, by as much however short D W is: of directions that nearly depend, nothing is known.
        rounded = torch.finfo(D.dtype).eps * (D.shape[1] + D.shape[0] ** 0.5) * top
        _check_curvature(values[~kept] / lengths.square(), rounded / lengths.square(), top, system)
    return (V[:, kept] / values[kept]) @ V[:, kept].mT


def _check_curvature(quotients: Tensor, noise: Tensor, top: Tensor, system: System) -> None:
    """Raise if a Rayleigh quotient is negative beyond its rounding error, or zero where no damping excuses it.

    With damping on a positive operator it can only be rounding: the direction is skipped, and the residual will tell.
    """
    if system.operator.positive and system.damping > 0:
        return
    worst = int((quotients + noise).argmin())
    if float(quotients[worst]) < -float(noise[worst]):
        raise negative_curvature(system.name, float(quotients[worst]), system.damping)
    if system.damping == 0 and bool(((quotients.abs() <= noise) & (noise < 1e-3 * top)).any()):
        raise negative_curvature(system.name, 0.0, 0.0)


def _simultaneous(search: _Search, r: Tensor) -> tuple[Tensor, Tensor]:
    """As `_block`, by one scalar recurrence per column; columns that are done are left out of the products."""
    system = search.system
    out, stopped = torch.zeros_like(r), torch.full((r.shape[1],), search.max_iter)
    columns = torch.arange(r.shape[1], device=r.device)
    x, r = torch.zeros_like(r), r.clone()
    z = search.preconditioned(r)
    top, d, rho = r.new_zeros(()), z.clone(), (r * z).sum(0)  # r changes in place, and z may be r
    for iteration in range(search.spent + 1, search.max_iter + 1):
        s = system.product(d)
        curvature, length = (d * s).sum(0), (d * d).sum(0)
        top = torch.maximum(top, (torch.linalg.vector_norm(s, dim=0) / length.sqrt()).max())
        if not bool((curvature > 0).all()):
            _check_curvature(
                curvature / length, torch.finfo(r.dtype).eps * top.expand_as(length), top, system
            )
        a = torch.where(curvature > 0, rho / curvature, 0)
        x.addcmul_(d, a)
        r.addcmul_(s, a, value=-1)
        residual = torch.linalg.vector_norm(r, dim=0)
        search.report(iteration, residual)
        done = (residual <= search.rtol) | ~(curvature > 0)
        if bool(done.any()):
            stopped[columns[done].cpu()] = iteration
            out[:, columns[done]] = x[:, done]
            columns, x, r, d, rho = columns[~done], x[:, ~done], r[:, ~done], d[:, ~done], rho[~done]
            if not len(columns):
                return out, stopped
        z = search.preconditioned(r)
        new = (r * z).sum(0)
        d, rho = z + (new / rho) * d, new
    out[:, columns] = x
    return out, stopped
