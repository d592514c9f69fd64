"""Fit a curvature to the Fisher of a model over its training data.

The data comes as a *Fisher source*: an iterable over batches that yields, for each, one `Gradients` per column s_c (see
`Task.pseudo_losses`); the columns of one batch share their inputs. Results do not depend on how the data was cut into
batches (see `upweight.curvature.sums`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.curvature.curvature import Curvature
from upweight.curvature.eigen import NotFiniteError, eigh
from upweight.curvature.operators import (
    Diagonal,
    Full,
    Identity,
    Kronecker,
    LayerCurvature,
    rotate_factors_first,
    rotated_gradients,
)
from upweight.curvature.sums import Moments, Sum
from upweight.curvature.windows import Inputs, flat
from upweight.errors import UpweightError
from upweight.gradients.blocks import Eigenbasis, Factored, Rotated
from upweight.gradients.contraction import tiles
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer, MatrixLayer, TableLayer

LARGEST_FULL_BLOCK = 1024
"""Vector layers (norms, biases) of up to this many parameters get an exact block; larger ones a diagonal."""

KINDS = ("identity", "diagonal", "kfac", "ekfac")


class FisherSource(Protocol):
    """Batches of Fisher columns over the training data, the same each time it is iterated."""

    def __iter__(self) -> Iterator[tuple[int, Sequence[Gradients]]]:
        """Yield (number of the first example, one `Gradients` a column)."""
        ...


class Keeper(Protocol):
    """Keeps the training gradients rotated where EK-FAC rotates them anyway."""

    @property
    def wanted(self) -> bool:
        """Whether it has room for them: asked once the source was walked for the first time."""
        ...

    def put(self, start: int, blocks: Mapping[str, Rotated]) -> None:
        """Take those of the batch that begins with this example, of some layers."""
        ...


def fit_curvature(
    kind: str,
    layers: Mapping[str, Layer],
    source: FisherSource,
    n: int,
    dtype: torch.dtype,
    keeper: Keeper | None = None,
) -> Curvature:
    """Fit a curvature.

    Args:
        kind: ``"identity"``, ``"diagonal"``, ``"kfac"`` or ``"ekfac"``.
        layers: the tracked layers.
        source: Fisher columns of all n training examples.
        n: number of training examples.
        dtype: dtype of the result.
        keeper: takes what EK-FAC rotates, if the Fisher's single column is the training gradient.

    Returns:
        The curvature. Matrix layers follow `kind`; embedding tables get a diagonal and other vectors an exact block or,
        above 1,024 parameters, a diagonal (``info["represented"]`` says which).
    """
    if kind not in KINDS:
        raise UpweightError(f"curvature={kind!r} is unknown -> use one of {list(KINDS)}")
    if kind == "identity":
        return Curvature(
            kind,
            {name: Identity() for name in layers},
            {"represented": dict.fromkeys(layers, "identity"), "examples": n},
        )
    sums = {name: _accumulator(kind, layer) for name, layer in layers.items()}
    for start, columns in source:
        for name in layers:
            sums[name].add([column[name] for column in columns], f"layer {name}, batch from example {start}")
    fitted: dict[str, LayerCurvature] = {}
    for name in layers:
        try:
            fitted[name] = sums[name].finish(n, f"layer {name}", dtype)
        except NotFiniteError as error:
            where = _first_bad_batch(
                source, lambda columns, name=name: _moment(columns, name, kind, layers[name])
            )
            raise NotFiniteError(f"{where}{error}") from None
    if kind == "ekfac":
        fitted = _correct_eigenvalues(fitted, source, n, dtype, keeper)
    represented = {name: _describe(fitted[name], kind) for name in layers}
    return Curvature(kind, fitted, {"represented": represented, "examples": n})


def _describe(layer: LayerCurvature, kind: str) -> str:
    return {Kronecker: kind, Full: "exact block", Diagonal: "diagonal", Identity: "identity"}[type(layer)]  # type: ignore[index]


def _accumulator(kind: str, layer: Layer) -> _Factors | _Square | _Outer:
    if isinstance(layer, MatrixLayer) and kind in ("kfac", "ekfac"):
        return _Factors()
    if kind == "diagonal" or isinstance(layer, (MatrixLayer, TableLayer)) or layer.numel > LARGEST_FULL_BLOCK:
        return _Square()
    return _Outer()


class _Factors:
    """K-FAC's factors: ``A = mean over positions of a a^T`` and ``B = (1/n) sum over examples and positions of d d^T``.

    Where output gradients are along the gradient's columns (transposed convolutions, tied weights), A is made of
    them and B of inputs; A is then a mean over the Fisher's columns, too, so that the product keeps its size.
    """

    def __init__(self) -> None:
        self.rows: Moments | None = None
        self.cols: Inputs | None = None
        self.positions = 0

    def add(self, columns: Sequence[Any], where: str) -> None:
        first = columns[0]
        if not isinstance(first, Factored):  # the objective does not reach this layer: its gradients are zero
            return
        # Output gradients along the columns are each Fisher column's own; inputs are the same for all.
        own = len(columns) if _swapped(first) else 1
        if self.rows is None or self.cols is None:
            self.rows, self.cols = Moments(len(columns)), Inputs(own, means=first.ones)
        for part in tiles(first):
            for c, column in enumerate(columns):
                tile = column[part]
                real = tile.real()
                self.rows.add(flat(tile.left(), real), c)
                if c >= own:
                    continue
                self.cols.add(tile, real, c)
                self.positions += len(tile) * tile.positions if real is None else int(real.sum())

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        if self.rows is None or self.cols is None:
            raise UpweightError(
                f"{where} got no gradient from any training example -> leave it out with parameters="
            )
        rows, cols, edge = self.rows.second(), self.cols.second(), self.cols.first()
        assert rows is not None and cols is not None
        if edge is not None:
            # The constant input's row and column of A: the sums of the others, and the count.
            count = torch.full_like(edge[:, :1], self.positions)
            last = torch.cat([edge, count], 1)[:, None]  # [group, 1, C + 1]
            cols = torch.cat([torch.cat([cols, edge[:, :, None]], 2), last], 1)
        beta, q_b = eigh(rows / n, f"the output-gradient factor of {where}", dtype)
        alpha, q_a = eigh(cols / self.positions, f"the input factor of {where}", dtype)
        return Kronecker(Eigenbasis(q_b, q_a), beta[:, :, None] * alpha[:, None, :])


class _Square:
    """``diag(F) = (1/n) sum of squared gradients``."""

    def __init__(self) -> None:
        self.sum, self.products = Sum(), Sum()

    def add(self, columns: Sequence[Any], where: str) -> None:
        for block in columns:
            if isinstance(block, Factored) and block.positions == 1:
                # (left^2)^T (right^2): no gradient is ever formed.
                left, right = (factor[:, :, 0].square() for factor in (block.left(), block.right()))
                _check_finite(left.sum() + right.sum(), where)
                self.products.add_product(left, right)
                continue
            for part in tiles(block):
                square = block[part].dense().square().sum(0)
                _check_finite(square.sum(), where)
                self.sum.add(square)

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        parts = [total.flatten() for sums in (self.sum, self.products) if (total := sums.value()) is not None]
        return Diagonal((torch.stack(parts).sum(0) / n).to(dtype))


class _Outer:
    """``F = (1/n) sum of g g^T``, for a layer with few parameters."""

    def __init__(self) -> None:
        self.moments: Moments | None = None

    def add(self, columns: Sequence[Any], where: str) -> None:
        self.moments = self.moments or Moments(len(columns))
        for c, block in enumerate(columns):
            dense = block.dense()
            _check_finite(dense.sum(0), where)
            self.moments.add(dense[None], c)

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        total = self.moments.second() if self.moments is not None else None
        assert total is not None
        values, vectors = eigh(total[0] / n, f"the Fisher block of {where}", dtype)
        return Full(values, vectors)


def _correct_eigenvalues(
    fitted: Mapping[str, LayerCurvature],
    source: FisherSource,
    n: int,
    dtype: torch.dtype,
    keeper: Keeper | None = None,
) -> dict[str, LayerCurvature]:
    """EK-FAC: ``Lambda = (1/n) sum of (Q_B^T G Q_A)^2``, the Fisher's diagonal in K-FAC's eigenbasis."""
    kronecker = {name: layer for name, layer in fitted.items() if isinstance(layer, Kronecker)}
    moments = {name: Sum() for name in kronecker}
    keeper = keeper if keeper is not None and keeper.wanted else None
    for start, columns in source:
        rotated: dict[str, Rotated] = {}
        for name, layer in kronecker.items():
            blocks = [column[name] for column in columns]
            if keeper is not None and smaller_rotated(blocks[0]):
                rotated[name] = layer.rotate(blocks[0])
                blocks = [rotated[name]]
            _add_second_moments(moments[name], layer.basis, blocks)
        if keeper is not None:
            keeper.put(start, rotated)
    out = dict(fitted)
    for name, layer in kronecker.items():
        moment = moments[name].value()
        assert moment is not None
        if not bool(torch.isfinite(moment).all()):
            where = _first_bad_batch(source, lambda columns, n=name, b=layer.basis: _squares(columns, n, b))
            _check_finite(moment, f"{where}layer {name}")
        out[name] = Kronecker(layer.basis, (moment / n).to(dtype))
    return out


def _first_bad_batch(
    source: FisherSource, of_batch: Callable[[Sequence[Gradients]], Sequence[Tensor]]
) -> str:
    """The first batch of which something is not finite, for an error: one more pass over the data."""
    for start, columns in source:
        if not all(bool(torch.isfinite(part).all()) for part in of_batch(columns)):
            return f"batch from example {start}: "
    return ""


def _moment(columns: Sequence[Gradients], name: str, kind: str, layer: Layer) -> list[Tensor]:
    """What one batch adds to K-FAC's factors, or to a block of few parameters."""
    total = _accumulator(kind, layer)
    total.add([column[name] for column in columns], "")
    if isinstance(total, _Factors):
        parts = [sums.second() for sums in (total.rows, total.cols) if sums is not None]
    else:
        parts = [total.moments.second()] if isinstance(total, _Outer) and total.moments else []
    return [part for part in parts if part is not None]


def _squares(columns: Sequence[Gradients], name: str, basis: Eigenbasis) -> list[Tensor]:
    """What one batch adds to EK-FAC's eigenvalues."""
    moment = Sum()
    _add_second_moments(moment, basis, [column[name] for column in columns])
    value = moment.value()
    return [] if value is None else [value]


def smaller_rotated(block: Any) -> bool:
    """Whether the gradients of several positions take less room formed and rotated than as factors."""
    if not isinstance(block, Factored) or block.positions == 1:
        return False
    rows, cols = block.left().shape[-1], block[:1].right().shape[-1]
    return len(block) * block.groups * rows * cols * block.pieces[0].rows.element_size() <= block.nbytes


def _add_second_moments(moments: Sum, basis: Eigenbasis, blocks: Sequence[Any]) -> None:
    """Add squared rotated gradients [group, R, C]; the columns of a batch share their rotated inputs."""
    first = blocks[0]
    if len(blocks) > 1 and _swapped(first):
        for block in blocks:
            _add_second_moments(moments, basis, [block])
        return
    for part in tiles(first):
        tile = first[part]
        if isinstance(tile, Rotated):
            moments.add(basis.grouped(tile.values).square().sum(1))
            continue
        if not isinstance(tile, Factored):
            for block in blocks:
                moments.add(rotated_gradients(basis, block[part]).square_().sum(1))
            continue
        rows, cols = basis.rows.shape[-1], basis.cols.shape[-1]
        if tile.positions == 1:  # one position: (left^2)^T (right^2), no gradient is ever formed
            squares = basis.rotate_inputs(tile)[:, :, 0].square_()
            for block in blocks:
                left = block[part].left()[:, :, 0] @ basis.rows
                moments.add_product(left.square_(), squares)
            continue
        factors_first = rotate_factors_first(tile.positions, rows, cols)
        right = basis.rotate_inputs(tile) if factors_first else tile.right()
        for block in blocks:
            moments.add(rotated_gradients(basis, block[part], right, factors_first).square_().sum(1))


def _swapped(block: Any) -> bool:
    """Whether the right factor holds output gradients, which the Fisher's columns do not have in common."""
    return isinstance(block, Factored) and any(piece.swapped for piece in block.pieces)


def _check_finite(sums: Tensor, where: str) -> None:
    """Raise if any of these sums is not finite: they are NaN or infinite whenever one of their terms is."""
    if not bool(torch.isfinite(sums).all()):
        raise UpweightError(
            f"{where}: the curvature is not finite -> look for exploding gradients or bad examples there"
        )
