"""What the iterative solvers share: checks of the system, the report, the largest eigenvalue, mini-batches."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upweight.curvature.solvers.base import (
    LinearOperator,
    Preconditioner,
    Solution,
    SolveInfo,
    relative_residual,
)
from upweight.errors import UpweightError
from upweight.gradients.checks import is_finite

Callback: TypeAlias = Callable[[int, float], None]
"""Called after every iteration with its number and the largest relative residual known (nan where none is)."""


@dataclass
class System:
    """``(H + damping I) X = B`` with B's columns scaled to length 1, and the books of solving it.

    Unit columns make every tolerance an absolute number, and keep the tiny gradients of confident queries, whose
    squares underflow in float32, from passing for zeros.

    Attributes:
        name: of the solver.
        operator: H.
        b: right-hand sides of length 1, or 0 [p, k].
        damping: what is added to every eigenvalue.
        scale: the lengths of the right-hand sides [k], 1 where they are 0.
    """

    name: str
    operator: LinearOperator
    b: Tensor
    damping: float
    scale: Tensor = field(init=False)

    def __post_init__(self) -> None:
        _check(self.name, self.operator, self.b, self.damping)
        self._start, self._products = time.perf_counter(), self.operator.products
        largest = self.b.abs().amax(0) if self.b.numel() else self.b.new_zeros(self.b.shape[1])
        largest = torch.where(largest > 0, largest, 1)
        b = self.b / largest
        lengths = torch.linalg.vector_norm(b, dim=0)
        lengths = torch.where(lengths > 0, lengths, 1)
        self.b, self.scale = b / lengths, largest * lengths

    def product(self, x: Tensor) -> Tensor:
        """``(H + damping I) x``."""
        return finite(self.name, self.operator.product(x)).add(x, alpha=self.damping)

    def solution(
        self,
        x: Tensor,
        rtol: float,
        iterations: int,
        notes: dict[str, Any],
        advice: str,
        residual: Tensor | None = None,
    ) -> Solution:
        """The solution for the caller's right-hand sides, with a warning if a residual exceeds `rtol`.

        Args:
            x: solution for the unit right-hand sides.
            rtol: what the solver promised.
            iterations: steps taken.
            notes: for the info.
            advice: what to do if it did not converge.
            residual: relative residuals by the full operator, if just measured; else they are.
        """
        if residual is None:
            residual = relative_residual(self.operator, x, self.b, self.damping)
        if not bool(torch.isfinite(residual).all()):
            raise UpweightError(
                f"{self.name} ended in numbers that are not finite -> raise the damping, or use float64"
            )
        missed = int((residual > rtol).sum())
        if missed:
            warnings.warn(
                f"{self.name} left a relative residual of {float(residual.max()):.1e} after {iterations} iterations, "
                f"above {rtol:.0e} for {missed} of {len(residual)} right-hand sides: not converged -> {advice}",
                UserWarning,
                stacklevel=3,
            )
        spent = self.operator.products - self._products
        seconds = time.perf_counter() - self._start
        info = SolveInfo(
            self.name, self.damping, iterations, residual, spent, seconds, converged=not missed, notes=notes
        )
        return Solution(x * self.scale, info)


def _check(name: str, operator: LinearOperator, b: Tensor, damping: float) -> None:
    if b.ndim != 2 or b.shape[0] != operator.size:
        raise UpweightError(
            f"right-hand sides have shape {tuple(b.shape)}, expected [{operator.size}, columns] -> one column per query"
        )
    if not b.is_floating_point():
        raise UpweightError(
            f"right-hand sides are {b.dtype}, expected floating point -> pass float32 or float64"
        )
    if not bool(torch.isfinite(b).all()):
        bad = int((~torch.isfinite(b)).any(0).nonzero()[0])
        raise UpweightError(
            f"right-hand side {bad} is not finite -> check that query's gradient for NaN and inf"
        )
    if not (math.isfinite(damping) and damping >= 0):
        raise UpweightError(f"{name} got damping={damping!r}, expected a finite number >= 0 -> try 1e-3")


def finite(name: str, product: Tensor) -> Tensor:
    """The product, or an error if it is not finite."""
    if not is_finite(product):
        raise UpweightError(
            f"a product of the curvature is not finite in {name} -> check the model's outputs and the data for NaN and "
            "inf, or use float64"
        )
    return product


def check_positive_damping(name: str, damping: float, why: str) -> None:
    """Raise if the method needs damping and there is none."""
    if damping <= 0:
        raise UpweightError(
            f"{name} needs damping > 0, got {damping:g}: {why} -> damping=1e-3 or solver='cg'"
        )


def negative_curvature(name: str, quotient: float, damping: float) -> UpweightError:
    """The error for a direction along which ``H + damping I`` is not positive."""
    if damping == 0 and quotient >= 0:
        return UpweightError(
            f"{name} met a direction without curvature (Rayleigh quotient {quotient:.1e}) at damping=0: the system is "
            "singular -> use a damping > 0, 1e-3 for example"
        )
    return UpweightError(
        f"{name} met negative curvature: a direction p with p^T (H + {damping:g} I) p / p^T p = {quotient:.2e}, so the "
        f"system is not positive definite -> raise the damping beyond {damping - quotient:.1e}, or use curvature='ggn'"
    )


def check_options(name: str, **options: float | None) -> None:
    """Raise unless each option, if given, is a finite number above 0."""
    for option, value in options.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UpweightError(
                f"{name} got {option}={value!r}, expected a number above 0 -> leave it at its default"
            )


def random_matrix(like: Tensor, columns: int, seed: int | torch.Generator) -> Tensor:
    """Normal random columns [p, columns] in the dtype and on the device of `like`; no global state is touched."""
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape[0], columns, generator=generator, dtype=torch.float64)
    return drawn.to(like)


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor],
    like: Tensor,
    seed: int | torch.Generator,
    preconditioner: Preconditioner | None = None,
    iterations: int = 20,
) -> float:
    """The eigenvalue of ``M^-1 A`` that is largest in absolute value, by power iteration; an estimate from below.

    ``M^-1 A`` is self-adjoint in the inner product of M, where the Rayleigh quotient of ``v = M^-1 u`` needs no
    product with M: ``v^T A v / v^T u``.

    Args:
        product: ``A v`` for v [p, 1].
        like: a tensor [p, k] of the dtype and device to work in.
        seed: of the first vector.
        preconditioner: ``M^-1``; the identity if None.
        iterations: products spent.
    """
    u = random_matrix(like, 1, seed)
    quotient = 0.0
    for _ in range(iterations):
        u = u / torch.linalg.vector_norm(u)
        v = u if preconditioner is None else preconditioner @ u
        w = product(v)
        quotient = float((v * w).sum() / (v * u).sum())
        if not math.isfinite(quotient) or quotient == 0 or not bool(w.any()):
            break
        u = w
    return quotient


def minibatches(examples: int, batch_size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Positions of mini-batches without end: shuffled epochs, without replacement within one.

    Example:
        >>> batches = minibatches(4, 2, torch.Generator().manual_seed(0))
        >>> sorted(next(batches) + next(batches))
        [0, 1, 2, 3]
    """
    while True:
        order = torch.randperm(examples, generator=generator)
        # a last short batch would weigh its examples more
        for start in range(0, examples - batch_size + 1, batch_size):
            yield order[start : start + batch_size].tolist()


def batch_size_of(operator: LinearOperator, batch_size: int | None) -> int | None:
    """The size of the mini-batches, None where one would hold all the data."""
    return None if batch_size is None or batch_size >= operator.examples else int(batch_size)


def largest_of_batches(
    system: System,
    batch_size: int,
    generator: torch.Generator,
    preconditioner: Preconditioner | None = None,
    probes: int = 5,
) -> float:
    """The largest eigenvalue of ``M^-1 (H_batch + damping I)`` over a few mini-batches, which exceeds that of H."""
    operator, largest = system.operator, []
    for _, batch in zip(range(probes), minibatches(operator.examples, batch_size, generator)):

        def product(v: Tensor, batch: list[int] = batch) -> Tensor:
            return finite(system.name, operator.sampled_product(v, batch)) + system.damping * v

        largest.append(largest_eigenvalue(product, system.b, generator, preconditioner))
    return max(largest)
