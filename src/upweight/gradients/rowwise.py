"""Arithmetic of per-example gradients, example by example: inner products, sums over examples, sums of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients.blocks import Block, Dense, Factored, Piece, Rotated, Sparse, Spectral
from upweight.gradients.contraction import TILE_BYTES, tiles
from upweight.gradients.gradients import Gradients


def paired(a: Gradients, b: Gradients) -> Tensor:
    """Inner product of example i of `a` with example i of `b`, [batch]: the diagonal of ``a @ b.T``.

    Example:
        >>> a = Gradients({"w": Dense(torch.eye(2))})
        >>> b = Gradients({"w": Dense(torch.tensor([[3.0, 1.0], [2.0, 5.0]]))})
        >>> paired(a, b).tolist()
        [3.0, 5.0]
    """
    if set(a) != set(b) or a.batch != b.batch:
        raise UpweightError(
            f"{a.batch} and {b.batch} gradients, expected as many and the same layers -> capture both with one tracker"
        )
    return torch.stack([paired_blocks(block, b[name]) for name, block in a.items()]).sum(0)


def paired_blocks(a: Block, b: Block) -> Tensor:
    """The same for one layer, [batch]."""
    if isinstance(b, Spectral) and isinstance(a, Factored):
        return paired_blocks(b, a)
    if isinstance(a, Spectral) and isinstance(b, Factored) and a.left.shape[2] == b.positions == 1:
        left, right = a.basis.rotate(b)
        left, right = (a.left * left)[:, :, 0], (a.right * right)[:, :, 0]  # [group, batch, .]
        return ((left @ a.filter) * right).sum((0, 2))
    if isinstance(a, Spectral) and isinstance(b, Spectral) and _meet(a, b):
        left, right = (a.left * b.left)[:, :, 0], (a.right * b.right)[:, :, 0]
        return ((left @ (a.filter * b.filter)) * right).sum((0, 2))
    if isinstance(a, Sparse) and isinstance(b, Sparse):
        return _paired_rows(a, b)
    if isinstance(a, Rotated) and a.meets(b):
        return (a.values * b.values).sum(1)
    if isinstance(a, Factored) and isinstance(b, Factored) and a.positions == b.positions == 1:
        left, right = (a.left() * b.left()).sum((2, 3)), (a.right() * b.right()).sum((2, 3))
        return (left * right).sum(0)
    parts = []
    for rows in tiles(a):
        left = a[rows].dense()
        parts.append((left * (left if b is a else b[rows].dense())).sum(1))
    return torch.cat(parts)


def _paired_rows(a: Sparse, b: Sparse) -> Tensor:
    """``sum_{s,t: same id} <row_s, row_t>`` of every example: no table is formed."""
    pairs = a.rows.element_size() * 2 * a.ids.shape[1] * b.ids.shape[1]
    step, parts = max(1, TILE_BYTES // pairs), []
    for start in range(0, len(a), step):
        x, y = (block[slice(start, start + step)] for block in (a, b))
        same = x.ids[:, :, None] == y.ids[:, None]
        parts.append(((x.rows @ y.rows.mT) * same).sum((1, 2)))
    return torch.cat(parts)


def _meet(a: Spectral, b: Spectral) -> bool:
    return a.basis is b.basis and a.left.shape[2] == b.left.shape[2] == 1


def weighted_sum(gradients: Gradients, weights: Tensor) -> Gradients:
    """``sum_i weights[k, i] g_i`` for each row k of weights [k, batch]: k gradients, formed.

    Example:
        >>> g = Gradients({"w": Dense(torch.tensor([[3.0, 1.0], [2.0, 5.0]]))})
        >>> weighted_sum(g, torch.tensor([[1.0, -1.0]])).dense().tolist()
        [[1.0, -4.0]]
    """
    return Gradients({name: Dense(weighted_sum_of(block, weights)) for name, block in gradients.items()})


def weighted_sum_of(block: Block, weights: Tensor) -> Tensor:
    """The same for one layer, [k, parameters]."""
    if isinstance(block, Factored) and len(weights) < len(block):
        # One matrix product a row, nothing per example: [group, batch, T, R] with [group, batch * T, C].
        left, right = block.left(), block.right().flatten(1, 2)
        rows = [
            torch.bmm((left * w[:, None, None]).flatten(1, 2).mT, right).reshape(-1)
            for w in weights.to(left.dtype)
        ]
        return torch.stack(rows)
    parts = [
        weights[:, rows].to(tile.dtype) @ tile for rows in tiles(block) for tile in [block[rows].dense()]
    ]
    return torch.stack(parts).sum(0)


def combined(first: Gradients, others: Sequence[Gradients], weights: Tensor) -> Gradients:
    """``first_i + sum_c weights[i, c] others[c]_i`` for every example i, kept as factors; weights [batch, c].

    Example:
        >>> g, s = (Gradients({"w": Dense(torch.tensor([[x, 1.0]]))}) for x in (3.0, 5.0))
        >>> combined(g, [s], torch.tensor([[2.0]])).dense().tolist()
        [[13.0, 3.0]]
    """
    return Gradients(
        {name: _combined(block, [other[name] for other in others], weights) for name, block in first.items()},
        first.router,
    )


def _combined(first: Block, others: Sequence[Block], weights: Tensor) -> Block:
    factored = [b for b in others if isinstance(b, Factored)]
    if isinstance(first, Factored) and len(factored) == len(others):
        return _combined_factors(first, factored, weights)
    tables = [b for b in others if isinstance(b, Sparse)]
    if isinstance(first, Sparse) and len(tables) == len(others):
        scaled = [b.rows * w[:, None, None].to(b.rows) for b, w in zip(tables, weights.T, strict=True)]
        ids = torch.cat([first.ids, *(b.ids for b in tables)], 1)
        return Sparse(ids, torch.cat([first.rows, *scaled], 1), first.table)
    total = first.dense().clone()
    for other, w in zip(others, weights.T, strict=True):
        total += other.dense() * w[:, None].to(total)
    return Dense(total)


def _combined_factors(first: Factored, others: Sequence[Factored], weights: Tensor) -> Factored:
    """Rows are added where the columns (the layer's inputs) are the same; else positions are put side by side."""
    pieces = list(first.pieces)
    for other, w in zip(others, weights.T, strict=True):
        scaled = [_scaled(piece, w) for piece in other.pieces]
        same = len(scaled) == len(first.pieces) and all(
            not a.swapped and not b.swapped and a.patches == b.patches and torch.equal(a.cols, b.cols)
            for a, b in zip(first.pieces, scaled, strict=True)
        )
        if same:
            summed = [_added(a, b) for a, b in zip(pieces, scaled, strict=False)]
            pieces = summed + pieces[len(summed) :]
        else:
            pieces += scaled
    return Factored(tuple(pieces), first.groups, first.ones)


def _scaled(piece: Piece, w: Tensor) -> Piece:
    rows, cols = piece.rows, piece.cols
    if piece.swapped:  # the rows are the layer's input: scale either factor, but only one
        return Piece(rows * w[:, None, None].to(rows), cols, piece.patches, piece.windows, True, piece.real)
    return Piece(rows * w[:, None, None].to(rows), cols, piece.patches, piece.windows, False, piece.real)


def _added(a: Piece, b: Piece) -> Piece:
    return Piece(a.rows + b.rows, a.cols, a.patches, a.windows, a.swapped, a.real)
