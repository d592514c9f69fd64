"""Running sums over the training data that come out the same however the data is cut into batches.

Curvature is inverted: what is added to an eigenvalue far below the largest one by rounding is magnified by the inverse,
and nearly equal eigenvalues change places. So the second moments of factors are summed over blocks of a fixed number of
rows, counted from the first example on, whatever batches they arrive in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

BLOCK_NUMBERS = 1 << 18
"""Numbers in one block: enough for a matrix product at full speed, few enough to wait for the next batch."""
FEWEST_ROWS = 1024
"""Rows of a block at least."""
SYMMETRIC_FROM = 256
"""Products ``r^T r`` at least this wide are formed by their upper half."""
GATHER = 8
"""Products that are added up in the factors' precision before they go to float64."""


class Sum:
    """A running sum of tensors: `gather` of them are added up in their own precision, then in float64."""

    def __init__(self, gather: int = GATHER) -> None:
        self.gather = gather
        self.total: Tensor | None = None
        self._partial: Tensor | None = None
        self._gathered = 0

    def add(self, part: Tensor) -> None:
        """Add a tensor."""
        self._partial = part if self._partial is None else self._partial.add_(part)
        self._count()

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Add ``left^T right`` of [group, row, .] factors."""
        if self._partial is None:
            self._partial = left.mT @ right
        else:
            self._partial.baddbmm_(left.mT, right)
        self._count()

    def add_gram(self, rows: Tensor) -> None:
        """Add ``r^T r`` of rows [group, row, k]: only the upper blocks of a wide one, which `symmetric` completes."""
        self._partial = add_gram(self._partial, rows)
        self._count()

    @contextmanager
    def adding(self, like: Tensor, *shape: int) -> Iterator[Tensor]:
        """A tensor of this shape, to which one part is to be added in place."""
        if self._partial is None:
            self._partial = like.new_zeros(shape)
        yield self._partial
        self._count()

    def value(self) -> Tensor | None:
        """The sum so far, float64; None before anything was added."""
        self._flush()
        return self.total

    def symmetric(self) -> Tensor | None:
        """The sum of `add_gram`'s products, both halves; None before anything was added."""
        total = self.value()
        if total is None or total.shape[-1] < SYMMETRIC_FROM:
            return total
        return total.triu() + total.triu(1).mT

    def _count(self) -> None:
        self._gathered += 1
        if self._gathered == self.gather:
            self._flush()

    def _flush(self) -> None:
        if self._partial is not None:
            part = self._partial.double()
            self.total = part if self.total is None else self.total.add_(part)
        self._partial, self._gathered = None, 0


def add_gram(total: Tensor | None, rows: Tensor) -> Tensor:
    """``total + r^T r`` of rows [group, row, k], in place: of a wide one only the upper blocks mean anything."""
    width = rows.shape[-1]
    if width < SYMMETRIC_FROM:
        return rows.mT @ rows if total is None else total.baddbmm_(rows.mT, rows)
    total = rows.new_zeros(rows.shape[0], width, width) if total is None else total
    for start, stop in _bands(width):
        total[:, start:stop, start:].baddbmm_(rows[..., start:stop].mT, rows[..., start:])
    return total


def _bands(width: int) -> list[tuple[int, int]]:
    """Four bands of rows: with each from its diagonal block on, five eighths of the whole matrix."""
    return list(pairwise(round(width * k / 4) for k in range(5)))


class Moments:
    """``sum of r r^T`` and ``sum of r`` over rows r, given as [group, row, k] factors, many at a time.

    Args:
        streams: how many sequences of rows arrive side by side (a Fisher column each); blocks are cut in each alone.
        means: whether the sums of rows are wanted, too.
    """

    def __init__(self, streams: int = 1, means: bool = False) -> None:
        gather = GATHER if streams == 1 else 1  # side by side, their order depends on the batches
        self._second, self._first = Sum(gather), Sum(gather)
        self._waiting: list[list[Tensor]] = [[] for _ in range(streams)]
        self._means = means

    def add(self, rows: Tensor, stream: int = 0) -> None:
        """Add rows; those that do not fill a block wait for the next ones."""
        waiting = self._waiting[stream]
        start, stop = 0, rows.shape[1]
        block = max(FEWEST_ROWS, BLOCK_NUMBERS // rows.shape[-1])
        if waiting:
            start = min(block - sum(part.shape[1] for part in waiting), stop)
            waiting.append(rows[:, :start].clone())
            if start < stop:
                self._release(waiting)
        while stop - start >= block:
            self._block(rows[:, start : start + block])
            start += block
        if start < stop:
            waiting.append(rows[:, start:].clone())  # a view would keep the whole batch alive

    def second(self) -> Tensor | None:
        """``sum of r r^T`` [group, k, k], float64; None before anything was added."""
        self._release_all()
        return self._second.symmetric()

    def first(self) -> Tensor | None:
        """``sum of r`` [group, k], float64; None before anything was added or if it was not wanted."""
        self._release_all()
        return self._first.value()

    def _release_all(self) -> None:
        for waiting in self._waiting:
            self._release(waiting)

    def _release(self, waiting: list[Tensor]) -> None:
        if waiting:
            self._block(torch.cat(waiting, 1) if len(waiting) > 1 else waiting[0])
            waiting.clear()

    def _block(self, rows: Tensor) -> None:
        self._second.add_gram(rows)
        if self._means:
            self._first.add(rows.sum(1))
