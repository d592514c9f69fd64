"""The dense damped inverse: Cholesky for one damping, the eigendecomposition where the spectrum is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.curvature.gram import cholesky_solve
from upweight.curvature.solvers.arnoldi import lanczos
from upweight.curvature.solvers.base import (
    LinearOperator,
    Preconditioner,
    Solution,
    SolveInfo,
    relative_residual,
)
from upweight.errors import UpweightError

EIGEN_UP_TO = 1024
"""Matrices up to this size are always diagonalised: it takes a second, and every other damping is then free."""
LANCZOS_STEPS = 24
"""For the ends of a Hessian's spectrum."""
ACCURACY = {torch.float64: 1e-8, torch.float32: 1e-3}
"""Relative residual that a solution is promised to have, by the dtype that products are computed in."""


class Direct:
    """Solves ``(H + damping I) X = B`` with H itself, in float64.

    H + damping I is factored by Cholesky, once for each damping. Matrices up to 1,024 parameters and curvatures whose
    damping is chosen from the spectrum are diagonalised instead, ``H = V diag(values) V^T``, and every damping is then
    free. Of a Hessian the number of negative eigenvalues is reported, which ``L D L^T`` gives by Sylvester's law of
    inertia, and the smallest and the largest one, by Lanczos with the factor and with H.

    Cost: H takes 8 p^2 bytes and is made once; p^3 / 6 multiply-adds for a Cholesky factor, p^3 / 6 for a Hessian's
    inertia, some 5 p^3 to diagonalise.

    Raises:
        UpweightError: H does not fit the memory budget, or the damped matrix is not positive definite; the message
            names the smallest eigenvalue.
    """

    name = "direct"

    def __init__(self) -> None:
        self._operator: LinearOperator | None = None
        self._dense: Tensor | None = None
        self._values: Tensor | None = None
        self._vectors: Tensor | None = None
        self._factor: tuple[float, Tensor] | None = None
        self._negative: int | None = None

    def solve(
        self,
        operator: LinearOperator,
        b: Tensor,
        damping: float,
        preconditioner: Preconditioner | None = None,
    ) -> Solution:
        """The solution for b [p, k]; a preconditioner is not needed and not used."""
        started = time.perf_counter()
        before = operator.products
        notes: dict[str, Any] = {}
        x = self.apply(operator, b, damping)
        if self._diagonalises(operator):
            values, _ = self.spectrum(operator)
            notes = {"smallest_eigenvalue": float(values[0]), "largest_eigenvalue": float(values[-1])}
            notes["negative_eigenvalues"] = int((values < -rounding(values)).sum())
        elif not operator.positive:
            notes = self._ends(operator, damping)
        residual = relative_residual(operator, x, b, damping)
        promised = ACCURACY[torch.float64 if b.dtype == torch.float64 else torch.float32]
        return Solution(
            x,
            SolveInfo(
                self.name,
                damping,
                0,
                residual,
                operator.products - before,
                time.perf_counter() - started,
                bool((residual <= promised).all()),
                notes,
            ),
        )

    def apply(self, operator: LinearOperator, b: Tensor, damping: float) -> Tensor:
        """The solution alone, for b [p, k]: its residual would cost more than it does."""
        right = b.double()
        if self._diagonalises(operator):
            values, vectors = self.spectrum(operator)
            check_definite(values, damping)
            x = vectors @ ((vectors.T @ right) / (values + damping)[:, None])
        else:
            x = cholesky_solve(right, self._cholesky(operator, damping))
        return x.to(b.dtype)

    def half(self, operator: LinearOperator, b: Tensor, damping: float) -> Tensor:
        """``R b`` [p, k] with ``R^T R = (H + damping I)^-1``: half of `apply`, enough for inner products."""
        right = b.double()
        if self._diagonalises(operator):
            values, vectors = self.spectrum(operator)
            check_definite(values, damping)
            x = (vectors.T @ right) / (values + damping).sqrt()[:, None]
        else:
            x = torch.linalg.solve_triangular(self._cholesky(operator, damping), right, upper=False)
        return x.to(b.dtype)

    def factorise(self, operator: LinearOperator, damping: float) -> None:
        """Make and check the inverse at a damping, before there is anything to solve."""
        if self._diagonalises(operator):
            check_definite(self.spectrum(operator)[0], damping)
        else:
            self._cholesky(operator, damping)

    def spectrum(self, operator: LinearOperator) -> tuple[Tensor, Tensor]:
        """Eigenvalues [p], ascending, and eigenvectors [p, p] of H, float64; kept."""
        self._open(operator)
        if self._values is None or self._vectors is None:
            self._values, self._vectors = torch.linalg.eigh(self._matrix(operator))
            self._dense = self._factor = None  # the spectrum says it all
        assert self._values is not None and self._vectors is not None
        return self._values, self._vectors

    def _diagonalises(self, operator: LinearOperator) -> bool:
        self._open(operator)
        return self._values is not None or operator.size <= EIGEN_UP_TO

    def _ends(self, operator: LinearOperator, damping: float) -> dict[str, Any]:
        """What a Hessian's spectrum would tell, without it."""
        H, factor = self._matrix(operator), self._cholesky(operator, damping)
        inverse = _Products(lambda x: cholesky_solve(x, factor), len(H))
        values = torch.stack(
            [
                lanczos_values(_Products(lambda x: H @ x, len(H)), H).max(),
                1 / lanczos_values(inverse, H).max() - damping,
            ]
        )
        if self._negative is None:
            self._negative = negative_eigenvalues(H, rounding(values, len(H)))
        return {
            "smallest_eigenvalue": float(values[1]),
            "largest_eigenvalue": float(values[0]),
            "negative_eigenvalues": self._negative,
        }

    def _cholesky(self, operator: LinearOperator, damping: float) -> Tensor:
        if self._factor is None or self._factor[0] != damping:
            self._factor = None  # two of them need not fit
            factor = self._matrix(operator).clone().mT  # in the order of LAPACK, which overwrites it
            factor.diagonal().add_(damping)
            failed = torch.empty((), dtype=torch.int32, device=factor.device)
            torch.linalg.cholesky_ex(factor, out=(factor, failed))
            if int(failed):  # name the eigenvalue
                check_definite(torch.linalg.eigvalsh(self._matrix(operator)), damping)
                raise UpweightError(f"Cholesky failed at damping={damping:g} -> use a larger damping")
            pivots = factor.diagonal()
            if float((pivots.min() / pivots.max()) ** 2) < 1e-15:
                check_definite(torch.linalg.eigvalsh(self._matrix(operator)), damping)
            self._factor = (damping, factor)
        return self._factor[1]

    def _matrix(self, operator: LinearOperator) -> Tensor:
        self._open(operator)
        if self._dense is None:
            self._dense = operator.dense().double()
        return self._dense

    def _open(self, operator: LinearOperator) -> None:
        if self._operator is not operator:
            self._operator = operator
            self._dense = self._values = self._vectors = self._factor = self._negative = None


@dataclass
class _Products:
    """A matrix by its products, as `Arnoldi` takes it."""

    product: Callable[[Tensor], Tensor]
    size: int


def lanczos_values(operator: _Products, like: Tensor) -> Tensor:
    """Ritz values of a symmetric matrix, of which the ends are near those of its spectrum, and within them."""
    return torch.linalg.eigvalsh(lanczos(operator, like, min(LANCZOS_STEPS, operator.size), seed=0)[1])


def negative_eigenvalues(H: Tensor, noise: float) -> int:
    """How many eigenvalues of H [p, p] lie below -noise: as many as D has in ``H + noise I = L D L^T``.

    A block of two rows of D, which pivoting leaves where two pivots are equal and negative, has one of each sign.
    """
    shifted = H.clone()
    shifted.diagonal().add_(noise)
    factor, pivots, failed = torch.linalg.ldl_factor_ex(shifted)
    del failed  # an exact zero on D's diagonal, which is no negative eigenvalue
    return int(((pivots > 0) & (factor.diagonal() < 0)).sum()) + int((pivots < 0).sum()) // 2


def rounding(values: Tensor, size: int | None = None) -> float:
    """What an eigenvalue that is zero may come out as; of a matrix of this size, if these are not all eigenvalues."""
    return 10 * torch.finfo(values.dtype).eps * (size or len(values)) ** 0.5 * float(values.abs().max())


def check_definite(values: Tensor, damping: float) -> None:
    """Raise unless ``H + damping I`` with these eigenvalues of H is positive definite beyond rounding."""
    smallest = float(values.min())
    if smallest + damping > rounding(values):
        return
    if smallest < -rounding(values):
        raise UpweightError(
            f"the curvature is indefinite: its smallest eigenvalue {smallest:.3g} <= -damping, with "
            f"damping={damping:g}, expected a positive definite sum -> use curvature='ggn' or "
            f"damping={-1.5 * smallest:.2g}"
        )
    raise UpweightError(
        f"damping={damping:g} leaves the curvature singular (smallest eigenvalue {smallest:.1e}, largest "
        f"{float(values.max()):.1e}) -> use damping='auto' or a larger number"
    )
