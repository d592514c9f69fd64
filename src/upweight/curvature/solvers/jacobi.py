"""The diagonal preconditioner."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.errors import UpweightError


class Jacobi:
    """``M^-1 = 1 / (diag(H) + damping)``: a `Preconditioner` that undoes differences of scale between parameters.

    Args:
        diagonal: of H, or of any positive diagonal approximation of it [p].
        damping: of the system it is to precondition.

    Cost: nothing next to a product with H. Storage: p. Fails when the curvature is not aligned with the parameters, as
    in most networks: it then saves few iterations, but never makes a solution wrong.

    Example:
        >>> Jacobi(torch.tensor([1.0, 3.0]), damping=1.0) @ torch.tensor([[4.0], [4.0]])
        tensor([[2.], [1.]])
    """

    def __init__(self, diagonal: Tensor, damping: float) -> None:
        damped = diagonal + damping
        if diagonal.ndim != 1:
            raise UpweightError(f"the diagonal has shape {tuple(diagonal.shape)}, expected [p] -> flatten it")
        if not bool((damped > 0).all() & torch.isfinite(damped).all()):
            raise UpweightError(
                f"the damped diagonal goes down to {float(damped.min()):.1e}, expected finite numbers above 0 -> raise "
                "the damping or use the diagonal of the Gauss-Newton matrix"
            )
        self.inverse = 1 / damped

    def __matmul__(self, x: Tensor) -> Tensor:
        """``M^-1 x`` for x [p, k]."""
        return self.inverse[:, None] * x
