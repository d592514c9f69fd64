"""``(H + damping I)^-1`` where H is known on a few orthonormal directions: what Arnoldi and Nyström share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar
from weakref import ref

from torch import Tensor

from upweight.curvature.solvers.base import LinearOperator
from upweight.errors import UpweightError

Factor = TypeVar("Factor")


@dataclass(frozen=True)
class LowRankInverse:
    """``U diag(1/(values + damping)) U^T + (1/(floor + damping)) (I - U U^T)``, a `Preconditioner` if values are >= 0.

    Attributes:
        vectors: U, orthonormal [p, rank].
        values: eigenvalues of H along them [rank].
        damping: above 0, or the floor is, if there is a complement.
        complement: whether the rest of the space counts, as directions of no curvature but the floor.
        floor: the regulariser, which all directions have; part of the values.

    Example:
        >>> import torch
        >>> U = torch.tensor([[1.0], [0.0]])
        >>> LowRankInverse(U, torch.tensor([3.0]), damping=1.0) @ torch.ones(2, 1)
        tensor([[0.2500], [1.0000]])
    """

    vectors: Tensor
    values: Tensor
    damping: float
    complement: bool = True
    floor: float = 0.0

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with x [p, k]."""
        inside = self.vectors.mT @ x
        weights = 1 / (self.values + self.damping)
        if not self.complement:
            return self.vectors @ (weights[:, None] * inside)
        rest = 1 / (self.floor + self.damping)
        return rest * x + self.vectors @ ((weights - rest)[:, None] * inside)


class PerOperator(Generic[Factor]):
    """Remembers what was computed for the last operator, without keeping that operator alive."""

    def __init__(self) -> None:
        self._operator: ref[LinearOperator] | None = None
        self._factor: Factor | None = None

    def get(self, operator: LinearOperator, like: Tensor) -> Factor | None:
        """What was kept for this operator in this dtype and on this device."""
        known = self._operator is not None and self._operator() is operator and self._like == _kind(like)
        return self._factor if known else None

    def keep(self, operator: LinearOperator, like: Tensor, factor: Factor) -> Factor:
        """Keep it, in place of what was kept before."""
        self._operator, self._like, self._factor = ref(operator), _kind(like), factor
        return factor


def _kind(like: Tensor) -> tuple[object, object]:
    return like.dtype, like.device


def check_rank(name: str, rank: int, size: int) -> int:
    """The rank that can be had: at most p."""
    if rank < 1:
        raise UpweightError(f"{name} got rank={rank}, expected at least 1 -> 100 is the default")
    return min(rank, size)
