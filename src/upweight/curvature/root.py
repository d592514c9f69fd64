"""A Gauss-Newton matrix by its square root, kept as factors: ``H = (1/n) sum_i sum_c s_ic s_ic^T``.

The columns s_ic are gradients of an example's *output*, weighted by a root of the loss's Hessian in the outputs (see
`Task.pseudo_losses`). They are captured like any per-example gradients, once, and never formed for all examples:

    z = S x         every example's columns against k vectors, summed over layers      [batch, columns, k]
    H x = S^T z / n

For a weight matrix with inputs a and output gradients d, both are two matrix products that all the columns share,
because an example's columns differ in d only:

    z_c = sum_t d_tc^T (X a_t)        S^T z = sum_t (sum_c z_c d_tc) a_t^T
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Factored, Sparse, flatten_groups
from upweight.gradients.gradients import Gradients
from upweight.passes import FisherPass, Step

TILE_BYTES = 16 << 20
"""Largest temporary of one layer."""


class LayerRoot(Protocol):
    """The columns of one layer for a batch."""

    def coordinates(self, x: Tensor, z: Tensor) -> None:
        """Add ``S x`` of x [numel, k] to z [batch, columns, k]."""
        ...

    def combined(self, z: Tensor) -> Tensor:
        """``S^T z`` [numel, k]."""
        ...

    def dense(self) -> Tensor:
        """[batch * columns, numel]."""
        ...

    def take(self, rows: Tensor) -> LayerRoot:
        """The examples at these positions."""
        ...

    def join(self, parts: Sequence[Any]) -> LayerRoot:
        """These parts of the same layer, this one among them, as one batch; their `signature` is the same."""
        ...

    @property
    def signature(self) -> tuple[int, ...]:
        """Sizes that parts must have in common to be joined: sequences may differ in length."""
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

    def coordinates(self, x: Tensor, z: Tensor) -> None:
        groups, rows, columns = self.shape
        k = x.shape[1]
        if not self._formed:  # [group, column, row * k], for one matrix product with the inputs
            x = x.reshape(groups, rows, columns, k).transpose(1, 2).reshape(groups, columns, rows * k)
        for part in self._tiles(k):
            if self._formed:
                z[part] += (self._dense(part) @ x).reshape(-1, *z.shape[1:])
                continue
            products = torch.bmm(self._inputs(part), x)  # [group, batch * position, row * k]
            deltas = self.deltas[:, part].flatten(3)  # [group, batch, columns, position * row]
            for d, m in zip(deltas, products, strict=True):
                z[part] += d @ m.reshape(len(d), d.shape[2], k)

    def combined(self, z: Tensor) -> Tensor:
        groups, rows, columns = self.shape
        k = z.shape[2]
        if self._formed:
            out = z.new_zeros(groups * rows * columns, k)
            for part in self._tiles(k):
                out.addmm_(self._dense(part).mT, z[part].reshape(-1, k))
            return out
        out = z.new_zeros(groups, columns, rows * k)
        for part in self._tiles(k):
            mixed = self.deltas[:, part].flatten(3).mT @ z[part]  # [group, batch, position * row, k]
            inputs = self._inputs(part)
            out.baddbmm_(inputs.mT, mixed.reshape(*inputs.shape[:2], -1))
        return out.reshape(groups, columns, rows, k).transpose(1, 2).reshape(groups * rows * columns, k)

    def dense(self) -> Tensor:
        return self._dense(slice(None))

    def take(self, rows: Tensor) -> SharedInputs:
        return SharedInputs(self.deltas[:, rows], _take(self.block, rows), self.shape)

    def join(self, parts: Sequence[SharedInputs]) -> SharedInputs:
        blocks = [part.block for part in parts]
        pieces = tuple(
            replace(
                uses[0],
                rows=torch.cat([p.rows for p in uses]),
                cols=torch.cat([p.cols for p in uses]),
                real=None,
            )
            for uses in zip(*(block.pieces for block in blocks), strict=True)
        )
        block = Factored(pieces, self.block.groups, self.block.ones)
        return SharedInputs(torch.cat([part.deltas for part in parts], 1), block, self.shape)

    @property
    def signature(self) -> tuple[int, ...]:
        uses = (size for p in self.block.pieces for size in (*p.rows.shape[1:], *p.cols.shape[1:]))
        return (*self.deltas.shape[2:], *uses)

    @property
    def work(self) -> int:
        return min(self.deltas.shape[3], self.deltas.shape[2])

    @property
    def nbytes(self) -> int:
        return self.deltas.nbytes + sum(piece.rows.nbytes + piece.cols.nbytes for piece in self.block.pieces)

    @property
    def _formed(self) -> bool:
        """Whether forming the columns takes fewer operations than going through every position."""
        return self.deltas.shape[3] > self.deltas.shape[2]

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

    def coordinates(self, x: Tensor, z: Tensor) -> None:
        z += (self.values.flatten(0, 1) @ x).reshape(z.shape)

    def combined(self, z: Tensor) -> Tensor:
        return self.values.flatten(0, 1).mT @ z.flatten(0, 1)

    def dense(self) -> Tensor:
        return self.values.flatten(0, 1)

    def take(self, rows: Tensor) -> Formed:
        return Formed(self.values[rows])

    def join(self, parts: Sequence[Formed]) -> Formed:
        return Formed(torch.cat([part.values for part in parts]))

    @property
    def signature(self) -> tuple[int, ...]:
        return tuple(self.values.shape[1:])

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

    def coordinates(self, x: Tensor, z: Tensor) -> None:
        for part in self._tiles(z.shape[2]):
            seen = x.reshape(*self.table, -1)[self.ids[part]]  # [batch, position, width, k]
            z[part] += self.rows[part].flatten(2) @ seen.flatten(1, 2)

    def combined(self, z: Tensor) -> Tensor:
        k = z.shape[2]
        out = z.new_zeros(*self.table, k)
        for part in self._tiles(k):
            mixed = self.rows[part].flatten(2).mT @ z[part]  # [batch, position * width, k]
            out.index_add_(0, self.ids[part].flatten(), mixed.reshape(-1, self.table[1], k))
        return out.reshape(-1, k)

    def dense(self) -> Tensor:
        batch, columns = self.rows.shape[:2]
        ids = self.ids[:, None].expand(-1, columns, -1).flatten(0, 1)
        return Sparse(ids, self.rows.flatten(0, 1), self.table).dense().reshape(batch * columns, -1)

    def take(self, rows: Tensor) -> LookedUp:
        return LookedUp(self.ids[rows], self.rows[rows], self.table)

    def join(self, parts: Sequence[LookedUp]) -> LookedUp:
        ids, rows = torch.cat([part.ids for part in parts]), torch.cat([part.rows for part in parts])
        return LookedUp(ids, rows, self.table)

    @property
    def signature(self) -> tuple[int, ...]:
        return (*self.ids.shape[1:], *self.rows.shape[1:])

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

    def product(self, x: Mapping[str, Tensor], blocks: bool) -> dict[str, Tensor]:
        """``S^T S x`` for x {layer: [numel, k]}, or without what couples different layers (`blocks`)."""
        k = next(iter(x.values())).shape[1]
        out: dict[str, Tensor] = {}
        z: Tensor | None = None
        for name, layer in self.layers.items():
            if blocks or z is None:
                z = x[name].new_zeros(self.batch, self.columns, k)
            layer.coordinates(x[name], z)
            if blocks:
                out[name] = layer.combined(z)
        if z is not None and not blocks:
            out = {name: layer.combined(z) for name, layer in self.layers.items()}
        return out

    @property
    def signature(self) -> tuple[Any, ...]:
        """What roots have in common that can be joined."""
        return tuple((name, layer.signature) for name, layer in self.layers.items())

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(layer.nbytes for layer in self.layers.values())


class RootPass:
    """The roots of a pass over Fisher columns."""

    def __init__(self, source: FisherPass) -> None:
        self.source = source

    def __iter__(self) -> Iterator[Step[Root]]:
        for step in self.source:
            yield Step(step.start, step.stop, lambda s=step: Root.of(s.load()))


def joined(roots: Iterable[Root], nbytes: float) -> Iterator[Root]:
    """The same examples in fewer roots, each of no more than these bytes, or of one root.

    A product with few examples mostly reads and writes its vectors, which are as long as the parameters. The roots that
    one is joined from are let go before it is yielded.
    """
    waiting: dict[tuple[Any, ...], list[Root]] = {}  # by their sequences' lengths
    held = 0
    for root in roots:
        if held + root.nbytes > nbytes:
            yield from _emptied(waiting)
            held = 0
        waiting.setdefault(root.signature, []).append(root)
        held += root.nbytes
        del root
    yield from _emptied(waiting)


def _emptied(waiting: dict[tuple[Any, ...], list[Root]]) -> Iterator[Root]:
    while waiting:
        yield _join(waiting.pop(next(iter(waiting))))


def _join(roots: Sequence[Root]) -> Root:
    first = roots[0]
    if len(roots) == 1:
        return first
    layers = {name: layer.join([r.layers[name] for r in roots]) for name, layer in first.layers.items()}
    return Root(layers, sum(r.batch for r in roots), first.columns)


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
