"""The Fisher columns of all training examples as the rows of one matrix S [N, p] that is never formed.

The columns s_c of example i (see `Task.pseudo_losses`) make its Fisher ``sum_c s_c s_c^T``, so ``H = (1/n) S^T S``.
What is asked of S is inner products: with itself (the Gram matrix) and with other gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from upweight.gradients import Gradients
from upweight.gradients.blocks import Block, cast
from upweight.gradients.contraction import tiles
from upweight.passes import Kept, Pass, Step

TILE_BYTES, TILE_ROWS = 128 << 20, 2048
"""Rows of a tile: as many as one layer's gradients fit these bytes, should a route form them."""


class Columns:
    """The rows of S that are kept, step by step of the training data, and their places in the Gram matrix.

    Args:
        source: Fisher columns of every step.
        kept: [column, example], which of them are rows of S.
        dtype: precision of all inner products.
        budget: bytes that may be kept in memory.
    """

    def __init__(
        self, source: Pass[Sequence[Gradients]], kept: Tensor, dtype: torch.dtype, budget: float
    ) -> None:
        self.kept, self.dtype = kept, dtype
        self.size = int(kept.sum())
        self._steps = Kept(_Picked(source, kept, dtype), budget, lambda gradients: gradients.nbytes)

    def tiles(self, first: int = 0) -> Iterator[tuple[slice, Gradients]]:
        """(rows of S, their gradients), from the step that begins with example `first` on."""
        place = 0
        for step in self._steps:
            count = int(self.kept[:, step.start : step.stop].sum())
            if step.start >= first and count:
                gradients = step.load()
                for rows in _tile_rows(gradients):
                    yield slice(place + rows.start, place + rows.stop), gradients.rows(rows)
            place += count

    def gram(self) -> Tensor:
        """``K = S S^T`` [N, N]: the products of every two steps once, then mirrored.

        They are summed in float64 and rounded once: the errors of sums in float32 are several times as large, and on
        a K whose largest eigenvalues are thousands of times the damping they decide what residual can be reached.
        """
        out = torch.empty(self.size, self.size, dtype=self.dtype, device=self.kept.device)
        for step in self._steps:
            if not bool(self.kept[:, step.start : step.stop].any()):
                continue
            place = int(self.kept[:, : step.start].sum())
            gradients = step.load()
            for rows in _tile_rows(gradients):
                left = gradients.rows(rows).to(torch.float64)
                mine = slice(place + rows.start, place + rows.stop)
                for theirs, right in self.tiles(step.start):
                    if theirs.start >= mine.start:
                        out[mine, theirs] = (left @ right.to(torch.float64).T).to(self.dtype)
        _mirror(out)
        return out

    def products(self, gradients: Gradients, dtype: torch.dtype | None = None) -> Tensor:
        """``S G^T`` [N, batch], in this precision."""
        dtype = dtype or self.dtype
        out = torch.empty(self.size, gradients.batch, dtype=dtype, device=self.kept.device)
        left = gradients.to(dtype)
        for rows, columns in self.tiles():  # this way round, dense gradients need no column formed
            out[rows] = (left @ columns.to(dtype).T).mT
        return out

    def products_by_layer(self, gradients: Gradients) -> dict[str, Tensor]:
        """``S G^T`` [N, batch] of each layer."""
        left = gradients.to(self.dtype)
        parts = [left.by_layer(columns.T) for _, columns in self.tiles()]
        return {name: torch.cat([part[name] for part in parts], 1).mT for name in parts[0]}

    def combine(self, weights: Tensor) -> dict[str, Tensor]:
        """``W S`` of weights W [k, N]: k vectors as large as the parameters, {layer: [k, numel]}, in float64."""
        total: dict[str, Tensor] = {}
        for rows, columns in self.tiles():
            for name, block in columns.items():
                part = combined(block, weights[:, rows].double())
                total[name] = total[name] + part if name in total else part
        return total


def combined(block: Block, weights: Tensor) -> Tensor:
    """``sum_b w_b G_b`` [k, numel] in float64, a tile of examples at a time.

    The gradients are formed: that takes their positions once, and not once for each of the k rows of weights.
    """
    out: Tensor | None = None
    for rows in tiles(block):
        part = weights[:, rows] @ cast(block[rows], torch.float64).dense()
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


class _Picked:
    """The kept columns of each step, side by side."""

    def __init__(self, source: Pass[Sequence[Gradients]], kept: Tensor, dtype: torch.dtype) -> None:
        self.source, self.kept, self.dtype = source, kept, dtype

    def __iter__(self) -> Iterator[Step[Gradients]]:
        for step in self.source:
            yield Step(step.start, step.stop, lambda s=step: self._pick(s))

    def _pick(self, step: Step[Sequence[Gradients]]) -> Gradients:
        kept = self.kept[:, step.start : step.stop]
        pairs = zip(step.load(), kept, strict=True)
        picked = [column.rows(rows.nonzero()[:, 0]) for column, rows in pairs if bool(rows.any())]
        return Gradients.concatenate(picked).to(self.dtype)


def _tile_rows(gradients: Gradients) -> list[slice]:
    widest = max(_numel(gradients, name) for name in gradients)
    height = max(1, min(TILE_ROWS, TILE_BYTES // (8 * widest)))
    bounds = [*range(0, gradients.batch, height), gradients.batch]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _numel(gradients: Gradients, name: str) -> int:
    return gradients[name][0:1].dense().shape[1]


def _mirror(matrix: Tensor, height: int = TILE_ROWS) -> None:
    """Copy the upper half of a square matrix into the lower one, a square of rows and columns at a time."""
    n = len(matrix)
    for a in range(0, n, height):
        rows = slice(a, min(a + height, n))
        square = matrix[rows, rows].triu()
        matrix[rows, rows] = square + square.triu(1).mT
        for b in range(a + height, n, height):
            columns = slice(b, min(b + height, n))
            matrix[columns, rows] = matrix[rows, columns].mT
