"""Inner products of two sets of per-example gradients, layer by layer, by the cheapest route.

For a preconditioned query P_q and a training gradient ``G_i = sum_t left_t right_t^T`` (rows R, columns C, T
positions):

=============  =======================================  ==============================================================
route          FLOPs per pair                           takes
=============  =======================================  ==============================================================
ghost          ``2 Tq Tt (R + C)``                      two factored gradients: never forms a gradient
dense          ``2 R C`` (+ ``2 T R C`` per example)    anything: forms the gradients once, then one matrix product
stream         ``2 T R C``                              a dense query against factors: forms no training gradient
eigenbasis     ``2 R C``                                two gradients that were rotated into one eigenbasis
separable      ``2 k (R + C)``                          T = 1 under EK-FAC: the spectral filter as a sum of k products
sparse         ``2 Tq Tt D``                            two embedding gradients: rows that both looked up
=============  =======================================  ==============================================================

All but *separable* are exact. The separable route is taken only where its error, measured on a probe against the exact
route, is below the tolerance; the choice depends on layer shapes and the fit alone, never on how many queries or
examples happen to be in a tile, so that scores do not depend on tiling. Costs are estimated with rates measured on
this machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Dense, Factored, Rotated, Sparse, Spectral
from upweight.gradients.gradients import Gradients
from upweight.gradients.separable import Terms

Route = Literal["ghost", "dense", "stream", "eigenbasis", "separable", "sparse"]
TILE_BYTES = 12 << 20
"""Largest temporary of a route: small enough to stay near the processor's caches, large enough for full speed."""
FORMED_BYTES = 28 << 20
"""The same where gradients are formed for one product: it needs many at a time, in memory that malloc uses again."""
THIN = 32
"""A matrix product whose narrowest side is w runs at w / (w + THIN) of the rate of a large one. Measured."""
REDUCED = 16
"""Multiplying the stream route's products by the left factors and summing them takes as long as to read them so many
times. Measured."""
SEPARABLE_QUERIES, SEPARABLE_TRAIN = 384, 512
"""Queries and training examples whose products are formed at a time in the separable route."""


@dataclass(frozen=True)
class Rates:
    """What this machine does, measured: multiply-adds of large and of batched small products, and memory traffic.

    Attributes:
        gemm: FLOP/s of a large matrix product.
        batched: FLOP/s of a batch of small matrix products.
        bandwidth: bytes/s of an elementwise operation.
    """

    gemm: float
    batched: float
    bandwidth: float

    def of_width(self, width: int) -> float:
        """FLOP/s of a product with this narrowest side."""
        return self.gemm * width / (width + THIN)


@lru_cache(maxsize=8)
def measured_rates(device: str, dtype: torch.dtype) -> Rates:
    """Rates of one device, measured once in a few milliseconds."""
    a = torch.ones(256, 256, device=device, dtype=dtype)
    b = torch.ones(16, 128, 16, device=device, dtype=dtype)
    c = torch.ones(1 << 20, device=device, dtype=dtype)  # more than the caches near a core hold
    gemm = 2 * 256**3 / _seconds(lambda: a @ a, device)
    batched = 2 * 16 * 128 * 16 * 128 / _seconds(lambda: b @ b.mT, device)
    bandwidth = 3 * c.nbytes / _seconds(lambda: c * c, device)
    return Rates(gemm, batched, bandwidth)


_ASSUMED: ContextVar[Rates | None] = ContextVar("rates", default=None)


@contextmanager
def assuming(rates: Rates | None) -> Iterator[None]:
    """Choose routes by these rates, not by those of the machine at this moment: a run that resumes rounds as before.

    Args:
        rates: None changes nothing.
    """
    token = _ASSUMED.set(rates or _ASSUMED.get())
    try:
        yield
    finally:
        _ASSUMED.reset(token)


def _rates(like: Tensor) -> Rates:
    return _ASSUMED.get() or measured_rates(str(like.device), like.dtype)


def _seconds(work, device: str) -> float:
    best = float("inf")
    for _ in range(4):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@dataclass
class Router:
    """Chooses and runs the route of every layer.

    Attributes:
        terms: {layer: separable terms} for layers whose spectral filter was found separable within the tolerance.
        force: take this route wherever it applies, for tests and benchmarks.
        chosen: {layer: route last taken}, for the result's evidence.
    """

    terms: dict[str, Terms] = field(default_factory=dict)
    force: Route | None = None
    chosen: dict[str, str] = field(default_factory=dict)

    def prepare(self, queries: Gradients) -> Gradients:
        """Preconditioned queries in the form that is contracted many times: factored if separable, else dense."""

        def prepared(name: str, block: Block) -> Block:
            if isinstance(block, Spectral) and not self._separable(name, block):
                return Dense(block.dense())
            return block

        return Gradients({name: prepared(name, block) for name, block in queries.items()}, self)

    def contract(self, name: str, query: Block, train: Block) -> Tensor:
        """Inner products [query, train] of one layer."""
        route = self.route(name, query, train)
        self.chosen[name] = route if route != "separable" else f"separable, {self.terms[name].rank} terms"
        return self._run(route, name, query, train)

    def route(self, name: str, query: Block, train: Block) -> Route:
        """The cheapest route that applies to these two blocks."""
        options = self.options(name, query, train)
        if self.force in options:
            return self.force
        return min(options, key=options.__getitem__)

    def options(self, name: str, query: Block, train: Block) -> dict[Route, float]:
        """{route: estimated seconds} of the routes that apply."""
        if isinstance(query, Spectral) and self._separable(name, query) and _single(train):
            return {"separable": 0.0}
        if isinstance(query, Rotated) and query.meets(train):
            return {"eigenbasis": 0.0}
        if isinstance(query, Sparse) and isinstance(train, Sparse):
            return _sparse_costs(query, train)
        if not isinstance(train, Factored):
            return {"dense": 0.0}
        rates = _rates(train.pieces[0].rows)
        groups, n, positions, rows, cols = _sizes(train)
        q = len(query)
        size = groups * rows * cols
        item = train.pieces[0].rows.element_size()
        form = 2 * positions * size * n / (rates.batched if positions > 1 else rates.gemm)
        form += 2 * size * n * item / rates.bandwidth
        tile = min(n, max(1, FORMED_BYTES // example_bytes(train)))
        product = 2 * size * q * n / rates.of_width(min(q, tile))
        product += -(-n // tile) * 2 * q * size * item / rates.bandwidth  # every tile meets all queries anew
        costs: dict[Route, float] = {"dense": form + product}
        if isinstance(query, Factored):
            q_positions = query.positions
            pairs = q * n * q_positions * positions * groups
            costs["ghost"] = 2 * pairs * (rows + cols) / rates.gemm + 4 * pairs * item / rates.bandwidth
            costs["dense"] += 2 * q_positions * size * q / rates.batched
        elif isinstance(query, Dense):
            products = q * n * positions * groups * rows * item
            costs["stream"] = 2 * positions * size * q * n / rates.gemm + REDUCED * products / rates.bandwidth
        return costs

    def _separable(self, name: str, query: Spectral) -> bool:
        return name in self.terms and query.left.shape[2] == 1 and query.left.shape[0] == 1

    def _run(self, route: Route, name: str, query: Block, train: Block) -> Tensor:
        if route == "separable":
            assert isinstance(query, Spectral) and isinstance(train, Factored)
            return _separable(self.terms[name], query, train)
        if route == "eigenbasis":
            assert isinstance(query, Rotated) and isinstance(train, Rotated)
            return query.values @ train.values.mT
        if route == "sparse":
            assert isinstance(query, Sparse) and isinstance(train, Sparse)
            return _sparse(query, train)
        if route == "ghost":
            assert isinstance(query, Factored) and isinstance(train, Factored)
            return _ghost(query, train)
        if route == "stream":
            assert isinstance(train, Factored)
            return _stream(query.dense(), train)
        return _dense(query.dense(), train)


def _single(train: Block) -> bool:
    return isinstance(train, Factored) and train.positions == 1 and train.groups == 1


def _sizes(block: Factored) -> tuple[int, int, int, int, int]:
    """Groups, batch, positions, rows and columns without cutting any windows."""
    piece = block.pieces[0]
    rows = piece.rows.shape[2] // block.groups
    cols = piece.cols.shape[-1] // block.groups
    if piece.patches is not None:
        for k in piece.patches.kernel:
            cols *= k
    return block.groups, len(block), block.positions, rows, cols + block.ones


def example_bytes(block: Block) -> int:
    """Bytes one example needs while a route forms its windows and its gradient."""
    if isinstance(block, Spectral):
        return 2 * block.filter.nbytes  # its gradient, in and out of the eigenbasis
    if isinstance(block, Sparse):
        return block.rows.element_size() * block.table[0] * block.table[1]
    if not isinstance(block, Factored):
        return max(1, block.nbytes // max(1, len(block)))
    groups, _, positions, rows, cols = _sizes(block)
    return block.pieces[0].rows.element_size() * groups * (positions * (rows + 2 * cols) + rows * cols)


def tiles(block: Block, budget: int = TILE_BYTES) -> Iterator[slice]:
    """Slices of the examples of a block such that a tile's temporaries stay within the budget."""
    step = max(1, budget // example_bytes(block))
    for start in range(0, len(block), step):
        yield slice(start, min(start + step, len(block)))


def _dense(query: Tensor, train: Block) -> Tensor:
    """One matrix product with the training gradients formed tile by tile."""
    parts = [query @ train[rows].dense().mT for rows in tiles(train, FORMED_BYTES)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _ghost(query: Factored, train: Factored) -> Tensor:
    """``sum_{s,t} <left_s, left_t> <right_s, right_t>``: two Gram matrices of factors, multiplied and summed."""
    if query.positions == train.positions == 1:
        return _ghost_single(query, train)
    q, n = len(query), len(train)
    out = query.pieces[0].rows.new_empty(q, n)
    pair = train.pieces[0].rows.element_size() * 2 * query.positions * train.positions * query.groups
    for columns in tiles(train):
        left_t, right_t = train[columns].left(), train[columns].right()
        width = columns.stop - columns.start
        step = max(1, TILE_BYTES // (pair * width))
        for start in range(0, q, step):
            part = query[start : start + step]
            left = torch.einsum("gqsr,gntr->gqsnt", part.left(), left_t)
            right = torch.einsum("gqsc,gntc->gqsnt", part.right(), right_t)
            out[start : start + step, columns] = left.mul_(right).sum((0, 2, 4))
    return out


def _ghost_single(query: Factored, train: Factored) -> Tensor:
    """The same for one position each: two large products, whose tile stays in the processor's cache."""
    (left_q, right_q), (left_t, right_t) = (
        (block.left()[:, :, 0], block.right()[:, :, 0]) for block in (query, train)
    )
    q, n = len(query), len(train)
    out = left_q.new_empty(q, n)
    height = max(1, TILE_BYTES // (2 * out.element_size() * query.groups * max(1, n)))
    for a in range(0, q, height):
        rows = slice(a, a + height)
        product = (left_q[:, rows] @ left_t.mT).mul_(right_q[:, rows] @ right_t.mT)
        out[rows] = product[0] if query.groups == 1 else product.sum(0)
    return out


def _stream(query: Tensor, train: Factored) -> Tensor:
    """``sum_t left_t^T P right_t`` with the query's dense P and no training gradient formed."""
    groups, n, positions, rows, cols = _sizes(train)
    blocks = query.reshape(len(query), groups, rows, cols)
    out = query.new_empty(len(query), n)
    # No gradient is formed, so that more examples fit a tile than where one is.
    height = max(1, TILE_BYTES // (query.element_size() * groups * positions * (rows + 2 * cols)))
    for a in range(0, n, height):
        columns = slice(a, min(a + height, n))
        left, right = train[columns].left(), train[columns].right()
        width = columns.stop - columns.start
        step = max(1, TILE_BYTES // (query.element_size() * groups * rows * positions * width))
        for start in range(0, len(query), step):
            part = blocks[start : start + step]
            applied = torch.einsum("qgrc,gntc->qgntr", part, right)
            # Not by einsum, which makes small matrix products of it and is up to ten times as slow.
            out[start : start + step, columns] = applied.mul_(left).sum((1, 3, 4))
    return out


def _separable(terms: Terms, query: Spectral, train: Factored) -> Tensor:
    """``sum_k <left_q o u_k, left_i> <right_q o w_k, right_i>`` in the eigenbasis, for one position each."""
    left_q, right_q = query.left[0, :, 0], query.right[0, :, 0]
    left_t, right_t = (factor[0, :, 0] for factor in query.basis.rotate(train))
    out = left_q.new_zeros(len(left_q), len(left_t))
    # Few queries and few training examples at a time: a term's products of these stay in the processor's cache. And the
    # fewer the queries, the more terms share a matrix product, from the earliest row and column of them.
    for a in range(0, len(left_q), SEPARABLE_QUERIES):
        queries = slice(a, a + SEPARABLE_QUERIES)
        weighted = list(_weighted(terms, left_q[queries], right_q[queries]))
        for b in range(0, len(left_t), SEPARABLE_TRAIN):
            train_rows = slice(b, b + SEPARABLE_TRAIN)
            left, right, tile = left_t[train_rows], right_t[train_rows], out[queries, train_rows]
            for own_left, own_right in weighted:
                lefts = own_left.flatten(0, 1) @ left[:, -own_left.shape[2] :].mT
                rights = own_right.flatten(0, 1) @ right[:, -own_right.shape[2] :].mT
                for one in range(0, len(lefts), len(tile)):
                    tile.addcmul_(lefts[one : one + len(tile)], rights[one : one + len(tile)])
    return out


def _weighted(terms: Terms, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """``left o u_k`` and ``right o w_k`` [terms, query, rows or columns from the first that is not zero]."""
    at_a_time = max(1, SEPARABLE_QUERIES // len(left))
    for k in range(0, terms.rank, at_a_time):
        few = slice(k, k + at_a_time)
        r, c = (min(starts) for starts in zip(*terms.starts[few], strict=True))
        yield left[:, r:] * terms.rows[r:, few].mT[:, None], right[:, c:] * terms.cols[c:, few].mT[:, None]


def _sparse_costs(query: Sparse, train: Sparse) -> dict[Route, float]:
    rates = _rates(train.rows)
    item = train.rows.element_size()
    size, width = train.table[0] * train.table[1], train.table[1]
    pairs = len(query) * len(train) * query.ids.shape[1] * train.ids.shape[1]
    return {
        "sparse": 2 * pairs * width / rates.gemm + 4 * pairs * item / rates.bandwidth,
        "dense": 2 * size * len(query) * len(train) / rates.gemm
        + 3 * size * (len(query) + len(train)) * item / rates.bandwidth,
    }


def _sparse(query: Sparse, train: Sparse) -> Tensor:
    """``sum_{s,t: same id} <row_s, row_t>``."""
    q, n = len(query), len(train)
    out = query.rows.new_empty(q, n)
    step_n = max(1, TILE_BYTES // (2 * train.rows.element_size() * query.ids.shape[1] * train.ids.shape[1]))
    for b in range(0, n, step_n):
        ids, rows = train.ids[b : b + step_n], train.rows[b : b + step_n]
        step_q = max(1, step_n // len(ids))
        for a in range(0, q, step_q):
            dots = torch.einsum("qsd,ntd->qsnt", query.rows[a : a + step_q], rows)
            same = query.ids[a : a + step_q, :, None, None] == ids[None, None]
            out[a : a + step_q, b : b + step_n] = (dots * same).sum((1, 3))
    return out
