"""The second moment of a convolution's windows, from products of whole rows of its input at a few offsets.

Windows that move one step at a time overlap: two of their rows, i and j of the kernel's k, see the same rows of the
input, only shifted by ``(j - i) * dilation``. With the windows cut along all axes but the first into u[row, .],

    A[i, j] = sum over windows' first rows p of u[p + i dilation]^T u[p + j dilation]

depends on i and j by their difference, but for the rows at the edges. So k products of the rows' width replace k^2 of
them, and windows are cut k times narrower.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from upweight.curvature.sums import Moments, Sum, add_gram
from upweight.gradients.blocks import Factored, Piece
from upweight.gradients.operations import Patches

FEWEST_POSITIONS = 4096
"""Windows in one block of maps at least: a matrix product needs many, also along a single row of each map."""


class Inputs:
    """``sum of r r^T`` and ``sum of r`` over a layer's right factors r without their column of ones.

    Args:
        streams: how many sequences of factors arrive side by side (a Fisher column each).
        means: whether the sum of factors is wanted, too.
    """

    def __init__(self, streams: int = 1, means: bool = False) -> None:
        self._any = Moments(streams, means)
        self._windows: dict[Geometry, WindowMoments] = {}
        self._means = means

    def add(self, block: Factored, real: Tensor | None, stream: int = 0) -> None:
        """Add a batch's factors, of which those at positions that are not real are left out."""
        geometries = [Geometry.of(piece, block.groups) for piece in block.pieces]
        if None in geometries:
            self._any.add(flat(block.inputs(), real), stream)
            return
        for geometry, piece in zip(geometries, block.pieces, strict=True):
            assert geometry is not None
            if geometry not in self._windows:
                self._windows[geometry] = WindowMoments(geometry, self._means)
            self._windows[geometry].add(piece.cols.flatten(0, 1))

    def second(self) -> Tensor | None:
        """``sum of r r^T`` [group, k, k], float64; None before anything was added."""
        return _total([moments.second() for moments in (self._any, *self._windows.values())])

    def first(self) -> Tensor | None:
        """``sum of r`` [group, k], float64; None before anything was added or if it was not wanted."""
        return _total([moments.first() for moments in (self._any, *self._windows.values())])


def _total(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.stack(found).sum(0) if found else None


def flat(factor: Tensor, real: Tensor | None) -> Tensor:
    """[group, batch, position, k] as rows; padding has no gradient, but it does have inputs, which are put to zero."""
    return (factor if real is None else factor * real[None, :, :, None]).flatten(1, 2)


@dataclass(frozen=True)
class Geometry:
    """What decides which windows are cut: the patches, the maps' size and the number of windows along each axis."""

    patches: Patches
    space: tuple[int, ...]
    windows: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, piece: Piece, groups: int) -> Geometry | None:
        """The geometry of a piece's windows if they overlap as described above, else None."""
        patches = piece.patches
        if patches is None or piece.swapped or piece.real is not None:
            return None
        if patches.kernel[0] == 1 or patches.stride[0] != 1:
            return None
        space = tuple(piece.cols.shape[2:-1])
        windows = tuple(min(a, b) for a, b in zip(patches.count(space), piece.windows, strict=True))
        return cls(patches, space, windows, groups)

    def rows(self, shift: int) -> list[tuple[int, int]]:
        """For every kernel row i that has a partner i + shift: the rows of the map that it meets, first and end.

        Rows of padding are left out, as they are zero: those of either factor.
        """
        step, (before, _) = self.patches.dilation[0], self.patches.padding[0]
        last = self.space[0] - shift * step
        starts = [i * step - before for i in range(self.patches.kernel[0] - shift)]
        return [(max(0, a), max(0, a, min(last, a + self.windows[0]))) for a in starts]

    def cut(self, maps: Tensor) -> Tensor:
        """Maps [n, *space, channel] as [group, row, n * windows of the other axes, width]."""
        p = self.patches
        inner = Patches(
            (1, *p.kernel[1:]), (1, *p.stride[1:]), ((0, 0), *p.padding[1:]), (1, *p.dilation[1:])
        )
        every_row_a_map = maps.movedim(1, 0).flatten(0, 1).unsqueeze(1)  # [row * n, 1, *other axes, channel]
        cut = inner.of(every_row_a_map, self.groups, False, (1, *self.windows[1:]))
        return cut.reshape(self.groups, self.space[0], -1, cut.shape[-1])


class WindowMoments:
    """``sum of r r^T`` and ``sum of r`` over all windows r of maps that come in batches.

    Blocks hold a fixed number of maps, counted from the first one on, so that sums do not depend on the batches.

    Args:
        geometry: which windows.
        means: whether the sum of windows is wanted, too.
    """

    def __init__(self, geometry: Geometry, means: bool = False) -> None:
        self.geometry = geometry
        inner = 1
        for count in geometry.windows[1:]:
            inner *= count
        self._maps = max(1, -(-FEWEST_POSITIONS // (inner * geometry.windows[0])))
        self._second, self._first = Sum(), Sum()
        self._waiting: list[Tensor] = []
        self._means = means

    def add(self, maps: Tensor) -> None:
        """Add maps [n, *space, channel]; those that do not fill a block wait for the next ones."""
        start = 0
        while start < len(maps):
            missing = self._maps - sum(len(part) for part in self._waiting)
            part = maps[start : start + missing]
            start += len(part)
            if len(part) < missing:
                self._waiting.append(part.clone())  # a view would keep the whole batch alive
                return
            self._block(torch.cat([*self._waiting, part]) if self._waiting else part)
            self._waiting.clear()

    def second(self) -> Tensor | None:
        """``sum of r r^T`` [group, kernel * channel, kernel * channel], float64; None before anything was added."""
        self._release()
        total = self._second.value()
        return None if total is None else total.triu() + total.triu(1).mT

    def first(self) -> Tensor | None:
        """``sum of r`` [group, kernel * channel], float64; None before anything was added or if it was not wanted."""
        self._release()
        return self._first.value()

    def _release(self) -> None:
        if self._waiting:
            self._block(torch.cat(self._waiting))
            self._waiting.clear()

    def _block(self, maps: Tensor) -> None:
        geometry, kernel = self.geometry, self.geometry.patches.kernel[0]
        u = geometry.cut(maps)
        groups, width = u.shape[0], u.shape[-1]
        step = geometry.patches.dilation[0]
        with self._second.adding(u, groups, kernel * width, kernel * width) as total:
            for shift in range(kernel):
                for members, (start, stop) in _shared(geometry.rows(shift)):
                    left = u[:, start:stop].flatten(1, 2)
                    right = u[:, start + shift * step : stop + shift * step].flatten(1, 2)
                    product = add_gram(None, left) if shift == 0 else left.mT @ right
                    for i in members:
                        j = i + shift
                        total[:, i * width : (i + 1) * width, j * width : (j + 1) * width] += product
        if self._means:
            sums = u.sum(2)  # [group, row, width]
            parts = [sums[:, start:stop].sum(1) for start, stop in geometry.rows(0)]
            self._first.add(torch.cat(parts, 1))


def _shared(ranges: list[tuple[int, int]]) -> list[tuple[list[int], tuple[int, int]]]:
    """Disjoint ranges of rows, each with the numbers of those given that hold it: every row is multiplied once."""
    edges = sorted({edge for one in ranges for edge in one})
    found = []
    for start, stop in pairwise(edges):
        members = [i for i, (a, b) in enumerate(ranges) if a <= start and stop <= b]
        if members:
            found.append((members, (start, stop)))
    return found
