"""The curvature of one layer, kept with its raw eigenvalues: changing the damping costs nothing.

Each operator applies ``(H + damping I)^-1`` to a gradient block and gives the quadratic form of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients.blocks import (
    Block,
    Dense,
    Eigenbasis,
    Factored,
    Rotated,
    Sparse,
    Spectral,
    flatten_groups,
    matmul_last,
)
from upweight.gradients.contraction import tiles
from upweight.gradients.rowwise import paired_blocks


class LayerCurvature(Protocol):
    """Curvature of one layer."""

    @property
    def eigenvalues(self) -> Tensor:
        """Raw eigenvalues, undamped, in any shape with `numel` entries (an identity's is a single 1)."""
        ...

    def coordinates(self, block: Block) -> Tensor:
        """Every gradient in this curvature's eigenbasis, [batch, numel], in the order of the eigenvalues."""
        ...

    def precondition(self, block: Block, damping: float) -> Block:
        """``(H + damping I)^-1 G`` for every gradient of a block."""
        ...

    def quadratic(self, block: Block, damping: float) -> Tensor:
        """``G^T (H + damping I)^-1 G`` for every gradient of a block, [batch]."""
        ...


@dataclass(frozen=True)
class Identity:
    """No curvature: ``H = I`` and damping is ignored."""

    @property
    def eigenvalues(self) -> Tensor:
        return torch.ones(1)

    def coordinates(self, block: Block) -> Tensor:
        return block.dense()

    def precondition(self, block: Block, damping: float) -> Block:
        return block

    def quadratic(self, block: Block, damping: float) -> Tensor:
        return paired_blocks(block, block)


@dataclass(frozen=True)
class Diagonal:
    """``H = diag(values)``: values [numel] in the block's flat order."""

    values: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        return self.values

    def coordinates(self, block: Block) -> Tensor:
        return block.dense()

    def precondition(self, block: Block, damping: float) -> Block:
        inverse = damped_inverse(self.values, damping)
        if isinstance(block, Sparse):  # rows that were looked up, each scaled by its own table row
            return Sparse(block.ids, block.rows * inverse.reshape(block.table)[block.ids], block.table)
        return Dense(block.dense() * inverse)

    def quadratic(self, block: Block, damping: float) -> Tensor:
        if isinstance(block, Sparse):
            return paired_blocks(self.precondition(block, damping), block)
        inverse = damped_inverse(self.values, damping)
        return torch.cat([block[rows].dense().square() @ inverse for rows in tiles(block)])


@dataclass(frozen=True)
class Full:
    """A small exact block ``H = V diag(values) V^T``: values [numel], vectors [numel, numel]."""

    values: Tensor
    vectors: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        return self.values

    def coordinates(self, block: Block) -> Tensor:
        return block.dense() @ self.vectors

    def precondition(self, block: Block, damping: float) -> Block:
        return Dense((self.coordinates(block) * damped_inverse(self.values, damping)) @ self.vectors.mT)

    def quadratic(self, block: Block, damping: float) -> Tensor:
        return self.coordinates(block).square() @ damped_inverse(self.values, damping)


@dataclass(frozen=True)
class Kronecker:
    """``H = (Q_B x Q_A) diag(values) (Q_B x Q_A)^T``, for K-FAC (values ``beta alpha^T``) and EK-FAC (measured values).

    Attributes:
        basis: eigenvectors of the output-gradient factor B (rows) and of the input factor A (cols).
        values: [group, R, C].
    """

    basis: Eigenbasis
    values: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        return self.values

    def coordinates(self, block: Block) -> Tensor:
        out = self.values.new_empty(len(block), self.values.numel())
        for part in tiles(block):
            rotated_gradients(self.basis, block[part], out=self.basis.grouped(out[part]))
        return out

    def back(self, coordinates: Tensor) -> Tensor:
        """Gradients [batch, numel] with these coordinates [batch, numel]."""
        return flatten_groups(self.basis.back(self.basis.grouped(coordinates)))

    def rotate(self, block: Block) -> Rotated:
        """Every gradient in the eigenbasis."""
        return Rotated(self.coordinates(block), self.basis)

    def squares(self, columns: Sequence[Block]) -> Tensor:
        """``sum_c (Q_B^T G_c Q_A)^2`` [batch, numel] of every example: its part of EK-FAC's eigenvalues."""
        factored = [c for c in columns if isinstance(c, Factored)]
        if len(factored) < len(columns) or any(piece.swapped for piece in factored[0].pieces):
            return torch.stack([self.coordinates(column).square_() for column in columns]).sum(0)
        first = factored[0]  # all share their inputs: rotate these once
        if first.positions == 1:
            left = torch.stack(
                [matmul_last(c.left(), self.basis.rows)[:, :, 0].square_() for c in factored]
            ).sum(0)
            right = self.basis.rotate_inputs(first)[:, :, 0].square_()
            return flatten_groups(left[:, :, :, None] * right[:, :, None, :])
        rows, cols = self.values.shape[1:]
        factors_first = rotate_factors_first(first.positions, rows, cols)
        right = self.basis.rotate_inputs(first) if factors_first else first.right()
        total: Tensor | None = None
        for column in factored:
            part = rotated_gradients(self.basis, column, right, factors_first).square_()
            total = part if total is None else total.add_(part)
        assert total is not None
        return flatten_groups(total)

    def precondition(self, block: Block, damping: float) -> Block:
        inverse = damped_inverse(self.values, damping)
        if isinstance(block, Rotated) and block.basis is self.basis:
            return Rotated(block.values * inverse.flatten(), self.basis)
        if isinstance(block, Factored) and block.positions == 1:
            return Spectral(*self.basis.rotate(block), self.basis, inverse)
        # Several positions: the gradient itself is smaller than its factors' rotation.
        out = inverse.new_empty(len(block), inverse.numel())
        for part in tiles(block):
            gradients = self.basis.grouped(block[part].dense())
            rotated = self.basis.rotate_dense(gradients).mul_(inverse[:, None])
            out[part] = flatten_groups(self.basis.back(rotated))
        return Dense(out)

    def quadratic(self, block: Block, damping: float) -> Tensor:
        inverse = damped_inverse(self.values, damping)
        if isinstance(block, Rotated) and block.basis is self.basis:
            return block.values.square() @ inverse.flatten()
        out = []
        for part in tiles(block):
            tile = block[part]
            if isinstance(tile, Factored) and tile.positions == 1:
                left, right = (f[:, :, 0].square() for f in self.basis.rotate(tile))  # [group, batch, .]
                out.append(((left @ inverse) * right).sum((0, 2)))
            else:
                out.append(
                    rotated_gradients(self.basis, tile).square_().mul_(inverse[:, None]).sum((0, 2, 3))
                )
        return torch.cat(out)


def rotated_gradients(
    basis: Eigenbasis,
    block: Block,
    right: Tensor | None = None,
    factors_first: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """``Q_B^T G Q_A`` [group, batch, R, C], rotating the factors or the gradient, whichever takes fewer operations.

    Args:
        basis: the eigenbasis.
        block: the gradients.
        right: the block's right factor, rotated before if `factors_first`, where the caller has it already.
        factors_first: which way; decided by the shapes if None.
        out: where to write them, or None for new memory, which the caller may overwrite.
    """
    if isinstance(block, Rotated) and block.basis is basis:
        rotated = basis.grouped(block.values)
        return rotated.clone() if out is None else out.copy_(rotated)
    if not isinstance(block, Factored):
        return basis.rotate_dense(basis.grouped(block.dense()), out)
    if factors_first is None:
        factors_first = rotate_factors_first(block.positions, basis.rows.shape[-1], basis.cols.shape[-1])
    if factors_first:
        right = basis.rotate_inputs(block) if right is None else right
        return torch.matmul(matmul_last(block.left(), basis.rows).mT, right, out=out)
    return basis.rotate_dense(block.left().mT @ (block.right() if right is None else right), out)


def rotate_factors_first(positions: int, rows: int, cols: int) -> bool:
    """Whether rotating T factors costs less than rotating one R x C gradient."""
    return positions * (rows**2 + cols**2) < rows * cols * (rows + cols)


def damped_inverse(values: Tensor, damping: float) -> Tensor:
    """``1 / (values + damping)``; raises where that would magnify rounding noise."""
    damped = values + damping
    smallest = float(damped.min()) if damped.numel() else 1.0
    if not smallest > rounding_noise(values, damping) or smallest == 0:
        raise UpweightError(
            f"damping={damping:g} leaves the curvature singular (smallest damped eigenvalue {smallest:.1e}) -> use "
            "damping='auto' or a larger number"
        )
    return 1 / damped


def rounding_noise(values: Tensor, damping: float) -> float:
    """What a damped eigenvalue must exceed.

    Without damping, one within the rounding of the largest eigenvalue is a zero that happens to look positive.
    """
    largest = float(values.max()) if values.numel() else 0.0
    return torch.finfo(values.dtype).eps * largest * (10 if damping == 0 else 1e-3)
