"""Small dense operators for tests of the solvers: the truth is one `torch.linalg.solve` away."""

from collections.abc import Sequence

import torch
from torch import Tensor


class DenseOperator:
    """A symmetric matrix that counts its products, one per column."""

    def __init__(self, H: Tensor, positive: bool = True) -> None:
        self.H, self.positive, self.size = H, positive, H.shape[0]
        self.products, self.widths, self.floor = 0.0, [], 0.0

    def product(self, x: Tensor) -> Tensor:
        self.products += x.shape[1]
        self.widths.append(x.shape[1])
        return self.H @ x

    def sampled_product(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        return self.product(x)

    def dense(self) -> Tensor:
        return self.H

    @property
    def examples(self) -> int:
        return 1

    def solve(self, b: Tensor, damping: float) -> Tensor:
        """The truth, by LU in float64."""
        A = self.H.double() + damping * torch.eye(self.size, dtype=torch.float64)
        return torch.linalg.solve(A, b.double())


class SampledOperator(DenseOperator):
    """The mean of one matrix per training example, and a regulariser: ``(1/n) sum_i J_i^T J_i + l2 I``."""

    def __init__(self, J: Tensor, l2: float = 0.0) -> None:
        """J: [n, outputs, p]."""
        self.J, self.l2 = J, l2
        flat = J.reshape(-1, J.shape[-1])
        super().__init__(flat.T @ flat / len(J) + l2 * torch.eye(J.shape[-1], dtype=J.dtype))
        self.floor = l2

    @property
    def examples(self) -> int:
        return len(self.J)

    def sampled_product(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        J = self.J[list(positions)].reshape(-1, self.size)
        self.products += x.shape[1] * len(positions) / len(self.J)
        return J.T @ (J @ x) / len(positions) + self.l2 * x


class DenseInverse:
    """A preconditioner that is a matrix."""

    def __init__(self, M: Tensor) -> None:
        self.inverse = torch.linalg.inv(M.double()).to(M.dtype)

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.inverse @ x


def rotation(p: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64)).Q.to(dtype)


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix with these eigenvalues."""
    Q = rotation(len(values), seed, values.dtype)
    H = (Q * values) @ Q.T
    return (H + H.T) / 2


def columns(p: int, k: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(p, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).abs().max() / truth.abs().max())
