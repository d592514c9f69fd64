"""The per-example gradients of one layer for a batch, in the form that is cheapest to hold.

* `Factored`: a weight matrix's gradient as the factors it is made of, ``G_b = sum_t left[b, t] right[b, t]^T``;
* `Dense`: one vector an example (norms, lone biases, whatever the exact fallback computed, preconditioned queries);
* `Sparse`: an embedding's gradient as the rows that were looked up;
* `Rotated`: one vector an example, in the eigenbasis of a Kronecker-factored curvature;
* `Spectral`: a preconditioned query in such an eigenbasis, as factors.

Every block flattens to the same [batch, parameters] matrix through `dense`, which is what every route is tested
against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.gradients.operations import Patches

Rows: TypeAlias = "slice | Tensor"
"""Which examples: a slice, or their positions [k]."""


@dataclass(frozen=True)
class Piece:
    """The factors of one use of a weight: one call of the layer.

    Attributes:
        rows: [batch, position, row], the factor along the weight's rows (a linear layer's output gradient).
        cols: [batch, position, col], the factor along its columns (the layer's input); or the channel-last maps
            [batch, k, *space, channel] that `patches` cuts into windows, late, because windows overlap.
        patches: the windows' geometry, or None.
        windows: windows to cut along each axis.
        swapped: whether the layer's input is along the rows and its output gradient along the columns.
        real: [batch, position], False where a position is padding, or None if all are real. Curvature statistics leave
            padding out; the gradient needs no telling, because a padded position's output gradient is zero.
    """

    rows: Tensor
    cols: Tensor
    patches: Patches | None = None
    windows: tuple[int, ...] = ()
    swapped: bool = False
    real: Tensor | None = None

    def left(self, groups: int) -> Tensor:
        """[group, batch, position, row / group]."""
        batch, positions, width = self.rows.shape
        if groups == 1:
            return self.rows[None]
        return self.rows.reshape(batch, positions, groups, width // groups).permute(2, 0, 1, 3)

    def right(self, groups: int, ones: bool) -> Tensor:
        """[group, batch, position, column], with a last column of ones for a folded bias."""
        if self.patches is not None:
            maps = self.cols
            cut = self.patches.of(maps.flatten(0, 1), groups, ones, self.windows)
            return cut.reshape(groups, maps.shape[0], -1, cut.shape[-1])
        cols = F.pad(self.cols, (0, 1), value=1.0) if ones else self.cols
        return cols[None]

    def __getitem__(self, rows: Rows) -> Piece:
        real = None if self.real is None else self.real[rows]
        return replace(self, rows=self.rows[rows], cols=self.cols[rows], real=real)


@dataclass(frozen=True)
class Factored:
    """``G_b = sum over pieces and positions of left right^T``: uses are summed before anything quadratic."""

    pieces: tuple[Piece, ...]
    groups: int = 1
    ones: bool = False

    def __len__(self) -> int:
        return len(self.pieces[0].rows)

    @property
    def positions(self) -> int:
        """Positions T an example, over all uses."""
        return sum(piece.rows.shape[1] for piece in self.pieces)

    def left(self) -> Tensor:
        """[group, batch, position, row]."""
        parts = [piece.left(self.groups) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def right(self) -> Tensor:
        """[group, batch, position, column]."""
        return self._right(self.ones)

    def inputs(self) -> Tensor:
        """`right` without the column of ones, which most products can do without."""
        return self._right(False)

    def _right(self, ones: bool) -> Tensor:
        parts = [piece.right(self.groups, ones) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def dense(self) -> Tensor:
        """[batch, group * row * column]."""
        return materialise(self.left(), self.right())

    def real(self) -> Tensor | None:
        """[batch, position], 0 where a position is padding; None if all are real."""
        if all(piece.real is None for piece in self.pieces):
            return None
        parts = [
            p.rows.new_ones(p.rows.shape[:2]) if p.real is None else p.real.to(p.rows) for p in self.pieces
        ]
        return torch.cat(parts, 1)

    def masked(self, mask: Tensor) -> Factored:
        """The same gradients, knowing which positions are padding: mask [batch, position], for uses of that many."""
        pieces = tuple(
            replace(p, real=mask) if p.patches is None and p.rows.shape[1] == mask.shape[1] else p
            for p in self.pieces
        )
        return replace(self, pieces=pieces)

    def __getitem__(self, rows: Rows) -> Factored:
        return Factored(tuple(piece[rows] for piece in self.pieces), self.groups, self.ones)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for piece in self.pieces for t in (piece.rows, piece.cols))


@dataclass(frozen=True)
class Dense:
    """One gradient vector an example: values [batch, parameters]."""

    values: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        """[batch, parameters]."""
        return self.values

    def __getitem__(self, rows: Rows) -> Dense:
        return Dense(self.values[rows])

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class Sparse:
    """An embedding table's gradient: ``G_b[v] = sum of rows[b, t] over the positions t with ids[b, t] = v``.

    Attributes:
        ids: [batch, position] rows of the table.
        rows: [batch, position, width] their gradients.
        table: (rows, width) of the table.
    """

    ids: Tensor
    rows: Tensor
    table: tuple[int, int]

    def __len__(self) -> int:
        return len(self.ids)

    def dense(self) -> Tensor:
        """[batch, table rows * width]."""
        out = self.rows.new_zeros(len(self.ids), *self.table)
        out.scatter_add_(1, self.ids[:, :, None].expand_as(self.rows), self.rows)
        return out.flatten(1)

    def __getitem__(self, rows: Rows) -> Sparse:
        return Sparse(self.ids[rows], self.rows[rows], self.table)

    @property
    def nbytes(self) -> int:
        return self.ids.nbytes + self.rows.nbytes


@dataclass(frozen=True)
class Eigenbasis:
    """Orthonormal bases of a Kronecker-factored curvature (columns): rows [group, R, R], cols [group, C, C]."""

    rows: Tensor
    cols: Tensor

    def grouped(self, flat: Tensor) -> Tensor:
        """[batch, group * R * C] as [group, batch, R, C]."""
        groups, rows, cols = self.rows.shape[0], self.rows.shape[-1], self.cols.shape[-1]
        return flat.reshape(-1, groups, rows, cols).transpose(0, 1)

    def rotate(self, block: Factored) -> tuple[Tensor, Tensor]:
        """A gradient's left [group, batch, position, R] and right [.., C] factors in this basis."""
        return matmul_last(block.left(), self.rows), self.rotate_inputs(block)

    def rotate_inputs(self, block: Factored) -> Tensor:
        """The right factor in this basis; a column of ones turns into the basis's last row, added."""
        inputs = block.inputs()
        if not block.ones:
            return matmul_last(inputs, self.cols)
        groups, batch, positions, width = inputs.shape
        flat = inputs.reshape(groups, batch * positions, width)
        rotated = torch.baddbmm(self.cols[:, width:], flat, self.cols[:, :width])
        return rotated.reshape(groups, batch, positions, self.cols.shape[-1])

    def rotate_dense(self, gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """``Q_B^T G Q_A`` of gradients [group, batch, R, C]."""
        return torch.matmul(self.rows.mT[:, None], gradients @ self.cols[:, None], out=out)

    def back(self, gradients: Tensor) -> Tensor:
        """``Q_B G Q_A^T`` of gradients [group, batch, R, C]: out of this basis again."""
        return self.rows[:, None] @ (gradients @ self.cols.mT[:, None])


@dataclass(frozen=True)
class Rotated:
    """``Q_B^T G_b Q_A`` of every example, flat: values [batch, group * R * C].

    Inner products are the same in any orthonormal basis, so two of one basis meet without rotating back.
    """

    values: Tensor
    basis: Eigenbasis

    def __len__(self) -> int:
        return len(self.values)

    def dense(self) -> Tensor:
        """[batch, group * R * C], out of the eigenbasis."""
        return flatten_groups(self.basis.back(self.basis.grouped(self.values)))

    def meets(self, other: object) -> TypeGuard[Rotated]:
        """Whether the other is in the same basis."""
        return isinstance(other, Rotated) and other.basis is self.basis

    def __getitem__(self, rows: Rows) -> Rotated:
        return Rotated(self.values[rows], self.basis)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class Spectral:
    """A preconditioned query in factored form: ``P_b = Q_B [ filter o (left^T right) ] Q_A^T``.

    Attributes:
        left: [group, batch, position, R], the query's factors in the eigenbasis.
        right: [group, batch, position, C].
        basis: the eigenbasis.
        filter: [group, R, C], ``1 / (eigenvalue + damping)``.
    """

    left: Tensor
    right: Tensor
    basis: Eigenbasis
    filter: Tensor

    def __len__(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """[batch, group * R * C], out of the eigenbasis."""
        rotated = self.left.mT @ self.right  # [group, batch, R, C]
        return flatten_groups(self.basis.back(rotated.mul_(self.filter[:, None])))

    def __getitem__(self, rows: Rows) -> Spectral:
        return Spectral(self.left[:, rows], self.right[:, rows], self.basis, self.filter)

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes


Block: TypeAlias = Factored | Dense | Sparse | Rotated | Spectral


def materialise(left: Tensor, right: Tensor) -> Tensor:
    """``sum_t left_t right_t^T`` as [batch, group * row * column]."""
    if left.shape[2] == 1:  # one position: an outer product, which a batched matrix product does slowly
        return flatten_groups(left[:, :, 0, :, None] * right[:, :, 0, None, :])
    return flatten_groups(left.mT @ right)


def flatten_groups(gradients: Tensor) -> Tensor:
    """[group, batch, row, column] as [batch, group * row * column]."""
    if gradients.shape[0] == 1:
        return gradients[0].flatten(1)
    return gradients.transpose(0, 1).flatten(1)


def matmul_last(factors: Tensor, basis: Tensor) -> Tensor:
    """Factors [group, batch, position, width] times basis [group, width, k]: one matrix product a group."""
    groups, batch, positions, width = factors.shape
    product = factors.reshape(groups, batch * positions, width) @ basis
    return product.reshape(groups, batch, positions, basis.shape[-1])


def cast(block: Block, dtype: torch.dtype) -> Block:
    """The block in another precision."""
    if isinstance(block, Factored):
        pieces = tuple(replace(p, rows=p.rows.to(dtype), cols=p.cols.to(dtype)) for p in block.pieces)
        return replace(block, pieces=pieces)
    if isinstance(block, Dense):
        return Dense(block.values.to(dtype))
    if isinstance(block, Sparse):
        return replace(block, rows=block.rows.to(dtype))
    basis = Eigenbasis(block.basis.rows.to(dtype), block.basis.cols.to(dtype))
    if isinstance(block, Rotated):
        return Rotated(block.values.to(dtype), basis)
    return Spectral(block.left.to(dtype), block.right.to(dtype), basis, block.filter.to(dtype))


def concatenate(blocks: Sequence[Block]) -> Block:
    """One block of all the examples of several, in order; fewer positions are padded with zeros, which add nothing."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if (
        isinstance(first, Dense) or len({type(b) for b in blocks}) > 1
    ):  # a layer that one of the batches does not reach
        return Dense(torch.cat([b.dense() for b in blocks]))
    if isinstance(first, Rotated):
        parts = [b.values for b in blocks if first.meets(b)]
        if len(parts) < len(blocks):  # of several bases
            return Dense(torch.cat([b.dense() for b in blocks]))
        return Rotated(torch.cat(parts), first.basis)
    if isinstance(first, Spectral):
        parts = [b for b in blocks if isinstance(b, Spectral)]
        left = _pad_and_cat([b.left for b in parts], batch_axis=1, position_axis=2)
        right = _pad_and_cat([b.right for b in parts], batch_axis=1, position_axis=2)
        return Spectral(left, right, first.basis, first.filter)
    if isinstance(first, Sparse):
        parts = [b for b in blocks if isinstance(b, Sparse)]
        ids = _pad_and_cat([b.ids for b in parts], 0, 1)
        return Sparse(ids, _pad_and_cat([b.rows for b in parts], 0, 1), first.table)
    parts = [b for b in blocks if isinstance(b, Factored)]
    same = len({tuple(p.cols.shape[1:] for p in b.pieces) for b in parts}) == 1
    if same and len({tuple(p.rows.shape[1:] for p in b.pieces) for b in parts}) == 1:
        pieces = tuple(
            replace(
                ps[0], rows=torch.cat([p.rows for p in ps]), cols=torch.cat([p.cols for p in ps]), real=None
            )
            for ps in zip(*(b.pieces for b in parts), strict=True)
        )
        return Factored(pieces, first.groups, first.ones)
    return Dense(torch.cat([b.dense() for b in parts]))


def _pad_and_cat(tensors: Sequence[Tensor], batch_axis: int, position_axis: int) -> Tensor:
    longest = max(t.shape[position_axis] for t in tensors)
    padded = []
    for t in tensors:
        missing = longest - t.shape[position_axis]
        axes_after = t.ndim - 1 - position_axis
        padded.append(F.pad(t, [0, 0] * axes_after + [0, missing]) if missing else t)
    return torch.cat(padded, batch_axis)
