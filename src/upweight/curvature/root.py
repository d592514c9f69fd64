"""A Gauss-Newton matrix by its square root, kept as factors: ``H = (1/n) sum_i sum_c s_ic s_ic^T``.

The columns s_ic are gradients of an example's *output*, weighted by a root of the loss's Hessian in the outputs (see
`Task.pseudo_losses`). They are captured like any per-example gradients, once, and never formed for all examples:

    z = S x         every example's columns against k vectors, summed over layers      [batch, columns, k]
    H x = S^T z / n

For a weight matrix with inputs a and output gradients d, both are two matrix products that all the columns share,
because an example's columns differ in d only: ``z_c = sum_t d_tc^T (X a_t)`` and ``S^T z = sum_t (sum_c z_c d_tc) a_t^T``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Factored, Sparse, flatten_groups
from upweight.gradients.gradients import Gradients

TILE_BYTES = 64 << 20
"""Largest temporary of one layer."""


class LayerRoot(Protocol):
    """The columns of one layer for a batch; vectors x are [numel, k], coordinates z [batch, columns, k]."""

    def prepared(self, x: Tensor) -> Tensor:
        """X in the form that `coordinates` reads, made once for all batches."""
        ...

    def coordinates(self, prepared: Tensor, z: Tensor) -> None:
        """Add ``S x`` to z."""
        ...

    def accumulator(self, k: int) -> Tensor:
        """Zeros for `combine` to add to."""
        ...

    def combine(self, z: Tensor, out: Tensor) -> None:
        """Add ``S^T z`` to an accumulator."""
        ...

    def finished(self, out: Tensor) -> Tensor:
        """An accumulator as [numel, k]."""
        ...

    def dense(self) -> Tensor:
        """[batch * columns, numel]."""
        ...

    def take(self, rows: Tensor) -> LayerRoot:
        """The examples at these positions."""
        ...

    @property
    def work(self) -> int:
        """Multiply-adds of `coordinates` an example, parameter and vector: min(positions, columns) or the columns."""
        ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True)
class SharedInputs:
    """A weight matrix whose columns share their inputs.

    Attributes:
        deltas: [group, batch, columns, position, row], the output gradients.
        block: the first column, for its inputs.
    """

    deltas: Tensor
    block: Factored
    shape: tuple[int, int, int]

    def prepared(self, x: Tensor) -> Tensor:
        return x if self._formed else self._inputs_first(x)

    def coordinates(self, prepared: Tensor, z: Tensor) -> None:
        k = z.shape[2]
        for part in self._tiles(k):
            if self._formed:
                z[part] += (self._dense(part) @ prepared).reshape(-1, *z.shape[1:])
                continue
            inputs = self._inputs(part)  # [group, batch * position, column]
            products = torch.bmm(inputs, prepared)  # [group, batch * position, row * k]
            deltas = self.deltas[:, part].flatten(3)  # [group, batch, columns, position * row]
            for d, m in zip(deltas, products, strict=True):
                z[part] += d @ m.reshape(len(d), d.shape[2], k)

    def accumulator(self, k: int) -> Tensor:
        groups, rows, columns = self.shape
        shape = (groups * rows * columns, k) if self._formed else (groups, columns, rows * k)
        return self.deltas.new_zeros(shape)

    def combine(self, z: Tensor, out: Tensor) -> None:
        k = z.shape[2]
        for part in self._tiles(k):
            if self._formed:
                out.addmm_(self._dense(part).mT, z[part].reshape(-1, k))
                continue
            deltas = self.deltas[:, part].flatten(3)
            mixed = deltas.mT @ z[part]  # [group, batch, position * row, k]
            inputs = self._inputs(part)
            out.baddbmm_(inputs.mT, mixed.reshape(*inputs.shape[:2], -1))

    def finished(self, out: Tensor) -> Tensor:
        if self._formed:
            return out
        groups, rows, columns = self.shape
        return out.reshape(groups, columns, rows, -1).transpose(1, 2).reshape(groups * rows * columns, -1)

    def dense(self) -> Tensor:
        return self._dense(slice(None))

    def take(self, rows: Tensor) -> SharedInputs:
        return SharedInputs(self.deltas[:, rows], _take(self.block, rows), self.shape)

    @property
    def work(self) -> int:
        return min(self.deltas.shape[3], self.deltas.shape[2])

    @property
    def nbytes(self) -> int:
        return self.deltas.nbytes + sum(piece.cols.nbytes for piece in self.block.pieces)

    @property
    def _formed(self) -> bool:
        """Whether forming the columns takes fewer operations than going through every position."""
        return self.deltas.shape[3] > self.deltas.shape[2]

    def _inputs_first(self, x: Tensor) -> Tensor:
        groups, rows, columns = self.shape
        k = x.shape[1]
        return x.reshape(groups, rows, columns, k).transpose(1, 2).reshape(groups, columns, rows * k)

    def _inputs(self, part: slice) -> Tensor:
        return self.block[part].right().flatten(1, 2)

    def _dense(self, part: slice) -> Tensor:
        deltas = self.deltas[:, part]  # [group, batch, columns, position, row]
        groups, batch, columns, positions, rows = deltas.shape
        left = deltas.transpose(3, 4).reshape(groups, batch, columns * rows, positions)
        formed = left @ self.block[part].right()  # [group, batch, columns * row, column]
        formed = formed.reshape(groups, batch * columns, rows, -1)
        return flatten_groups(formed)

    def _tiles(self, k: int) -> Iterator[slice]:
        groups, batch, columns, positions, rows = self.deltas.shape
        width = columns * self.shape[2] if self._formed else positions * k
        step = max(1, TILE_BYTES // max(1, groups * rows * width * self.deltas.element_size()))
        for start in range(0, batch, step):
            yield slice(start, start + step)


@dataclass(frozen=True)
class Formed:
    """Any other layer: its columns [batch, columns, numel], formed."""

    values: Tensor

    def prepared(self, x: Tensor) -> Tensor:
        return x

    def coordinates(self, prepared: Tensor, z: Tensor) -> None:
        z += (self.values.flatten(0, 1) @ prepared).reshape(z.shape)

    def accumulator(self, k: int) -> Tensor:
        return self.values.new_zeros(self.values.shape[2], k)

    def combine(self, z: Tensor, out: Tensor) -> None:
        out.addmm_(self.values.flatten(0, 1).mT, z.flatten(0, 1))

    def finished(self, out: Tensor) -> Tensor:
        return out

    def dense(self) -> Tensor:
        return self.values.flatten(0, 1)

    def take(self, rows: Tensor) -> Formed:
        return Formed(self.values[rows])

    @property
    def work(self) -> int:
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class LookedUp:
    """An embedding table: ids [batch, position], rows [batch, columns, position, width] of their gradients."""

    ids: Tensor
    rows: Tensor
    table: tuple[int, int]

    def prepared(self, x: Tensor) -> Tensor:
        return x

    def coordinates(self, prepared: Tensor, z: Tensor) -> None:
        for part in self._tiles(z.shape[2]):
            seen = prepared.reshape(*self.table, -1)[self.ids[part]]  # [batch, position, width, k]
            z[part] += self.rows[part].flatten(2) @ seen.flatten(1, 2)

    def accumulator(self, k: int) -> Tensor:
        return self.rows.new_zeros(self.table[0] * self.table[1], k)

    def combine(self, z: Tensor, out: Tensor) -> None:
        table = out.reshape(*self.table, -1)
        for part in self._tiles(z.shape[2]):
            mixed = self.rows[part].flatten(2).mT @ z[part]  # [batch, position * width, k]
            table.index_add_(0, self.ids[part].flatten(), mixed.reshape(-1, self.table[1], z.shape[2]))

    def finished(self, out: Tensor) -> Tensor:
        return out

    def dense(self) -> Tensor:
        batch, columns = self.rows.shape[:2]
        ids = self.ids[:, None].expand(-1, columns, -1).flatten(0, 1)
        return Sparse(ids, self.rows.flatten(0, 1), self.table).dense().reshape(batch * columns, -1)

    def take(self, rows: Tensor) -> LookedUp:
        return LookedUp(self.ids[rows], self.rows[rows], self.table)

    @property
    def work(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.ids.nbytes

    def _tiles(self, k: int) -> Iterator[slice]:
        size = self.ids.shape[1] * self.table[1] * k * self.rows.element_size()
        step = max(1, TILE_BYTES // max(1, size))
        for start in range(0, len(self.ids), step):
            yield slice(start, start + step)


@dataclass(frozen=True)
class Root:
    """S of one batch, layer by layer."""

    layers: dict[str, LayerRoot]
    batch: int
    columns: int

    @staticmethod
    def of(columns: Sequence[Gradients]) -> Root:
        """The root whose columns these gradients are, one `Gradients` [batch, parameters] a column."""
        layers = {name: _layer_root([column[name] for column in columns]) for name in columns[0]}
        return Root(layers, columns[0].batch, len(columns))

    def take(self, rows: Tensor) -> Root:
        """The examples at these positions."""
        return Root({name: layer.take(rows) for name, layer in self.layers.items()}, len(rows), self.columns)

    def dense(self) -> Tensor:
        """[batch * columns, p]."""
        return torch.cat([layer.dense() for layer in self.layers.values()], 1)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers.values())


class RootProduct:
    """``sum over batches of S^T S x``, one batch at a time.

    Args:
        x: {layer: [numel, k]}.
        blocks: leave out what couples different layers.
    """

    def __init__(self, x: Mapping[str, Tensor], blocks: bool) -> None:
        self.x, self.blocks = x, blocks
        self._prepared: dict[tuple[str, type, bool], Tensor] = {}
        self.total = {name: torch.zeros_like(part, dtype=torch.float64) for name, part in x.items()}

    def add(self, root: Root) -> None:
        """Add one batch. Sums of different batches are taken in float64."""
        k = next(iter(self.x.values())).shape[1]
        z: Tensor | None = None
        for name, layer in root.layers.items():
            if self.blocks or z is None:
                z = self.x[name].new_zeros(root.batch, root.columns, k)
            layer.coordinates(self._prepare(name, layer), z)
            if self.blocks:
                self._combine(name, layer, z)
        if not self.blocks and z is not None:
            for name, layer in root.layers.items():
                self._combine(name, layer, z)

    def _combine(self, name: str, layer: LayerRoot, z: Tensor) -> None:
        out = layer.accumulator(z.shape[2])
        layer.combine(z, out)
        self.total[name] += layer.finished(out)

    def _prepare(self, name: str, layer: LayerRoot) -> Tensor:
        key = (name, type(layer), isinstance(layer, SharedInputs) and layer._formed)
        if key not in self._prepared:  # a layer may change its form from batch to batch, with the length
            self._prepared[key] = layer.prepared(self.x[name])
        return self._prepared[key]


def _layer_root(columns: Sequence[Block]) -> LayerRoot:
    first = columns[0]
    factored = [c for c in columns if isinstance(c, Factored)]
    if len(factored) == len(columns) and not any(p.swapped for c in factored for p in c.pieces):
        deltas = torch.stack([c.left() for c in factored], 2)
        block = factored[0]
        return SharedInputs(deltas, block, (block.groups, deltas.shape[-1], _width(block)))
    tables = [c for c in columns if isinstance(c, Sparse)]
    if len(tables) == len(columns):
        return LookedUp(tables[0].ids, torch.stack([c.rows for c in tables], 1), tables[0].table)
    return (
        Formed(torch.stack([c.dense() for c in columns], 1))
        if len(columns) > 1
        else Formed(first.dense()[:, None])
    )


def _width(block: Factored) -> int:
    return block[:1].right().shape[-1]


def _take(block: Factored, rows: Tensor) -> Factored:
    pieces = tuple(replace(p, rows=p.rows[rows], cols=p.cols[rows], real=None) for p in block.pieces)
    return Factored(pieces, block.groups, block.ones)
