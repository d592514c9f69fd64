"""Fit a curvature to the Fisher of a model over its training data.

The data comes as a *Fisher source*: an iterable over batches that yields, for each, one `Gradients` per column s_c (see
`Task.pseudo_losses`); the columns of one batch share their inputs. Sums over examples are accumulated in float64, so that
results do not depend on how the data was cut into batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from upweight.curvature.curvature import Curvature
from upweight.curvature.eigen import eigh
from upweight.curvature.operators import (
    Diagonal,
    Full,
    Identity,
    Kronecker,
    LayerCurvature,
    rotate_factors_first,
    rotated_gradients,
)
from upweight.errors import UpweightError
from upweight.gradients.blocks import Eigenbasis, Factored
from upweight.gradients.contraction import tiles
from upweight.gradients.gradients import Gradients
from upweight.gradients.layers import Layer, MatrixLayer, TableLayer

LARGEST_FULL_BLOCK = 1024
"""Vector layers (norms, biases) up to this many parameters get their exact block of the Fisher; larger ones a diagonal."""

KINDS = ("identity", "diagonal", "kfac", "ekfac")


class FisherSource(Protocol):
    """Batches of Fisher columns over the training data, the same each time it is iterated."""

    def __iter__(self) -> Iterator[tuple[int, Sequence[Gradients]]]:
        """Yield (number of the first example, one `Gradients` a column)."""
        ...


def fit_curvature(
    kind: str, layers: Mapping[str, Layer], source: FisherSource, n: int, dtype: torch.dtype
) -> Curvature:
    """Fit a curvature.

    Args:
        kind: ``"identity"``, ``"diagonal"``, ``"kfac"`` or ``"ekfac"``.
        layers: the tracked layers.
        source: Fisher columns of all n training examples.
        n: number of training examples.
        dtype: dtype of the result.

    Returns:
        The curvature. Matrix layers follow `kind`; embedding tables get a diagonal and other vectors an exact block or,
        above 1,024 parameters, a diagonal (``info["represented"]`` says which).
    """
    if kind not in KINDS:
        raise UpweightError(f"curvature={kind!r} is unknown -> use one of {list(KINDS)}")
    if kind == "identity":
        return Curvature(kind, {name: Identity() for name in layers}, {"represented": dict.fromkeys(layers, "identity")})
    sums = {name: _accumulator(kind, layer) for name, layer in layers.items()}
    for start, columns in source:
        for name in layers:
            sums[name].add([column[name] for column in columns], f"layer {name}, batch from example {start}")
    fitted = {name: sums[name].finish(n, f"layer {name}", dtype) for name in layers}
    if kind == "ekfac":
        fitted = _correct_eigenvalues(fitted, source, n, dtype)
    represented = {name: _describe(fitted[name], kind) for name in layers}
    return Curvature(kind, fitted, {"represented": represented})


def _describe(layer: LayerCurvature, kind: str) -> str:
    return {Kronecker: kind, Full: "exact block", Diagonal: "diagonal", Identity: "identity"}[type(layer)]  # type: ignore[index]


def _accumulator(kind: str, layer: Layer) -> _Factors | _Square | _Outer:
    if isinstance(layer, MatrixLayer) and kind in ("kfac", "ekfac"):
        return _Factors()
    if kind == "diagonal" or isinstance(layer, (MatrixLayer, TableLayer)) or layer.numel > LARGEST_FULL_BLOCK:
        return _Square()
    return _Outer()


class _Factors:
    """K-FAC's factors: ``A = mean over positions of a a^T`` and ``B = (1/n) sum over examples and positions of d d^T``."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.cols: Tensor | None = None
        self.positions = 0

    def add(self, columns: Sequence[Any], where: str) -> None:
        first = columns[0]
        if not isinstance(first, Factored):  # the objective does not reach this layer: its gradients are zero
            return
        for part in tiles(first):
            right = first[part].right().flatten(1, 2)  # [group, batch * position, C]
            self.cols = _added(self.cols, right.mT @ right)
            for column in columns:
                left = column[part].left().flatten(1, 2)
                self.rows = _added(self.rows, left.mT @ left)
        self.positions += len(first) * first.positions
        _check_finite(self.rows, where)
        _check_finite(self.cols, where)

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        if self.rows is None or self.cols is None:
            raise UpweightError(f"{where} got no gradient from any training example -> leave it out with parameters=")
        beta, q_b = eigh(self.rows / n, f"the output-gradient factor of {where}", dtype)
        alpha, q_a = eigh(self.cols / self.positions, f"the input factor of {where}", dtype)
        return Kronecker(Eigenbasis(q_b, q_a), beta[:, :, None] * alpha[:, None, :])


class _Square:
    """``diag(F) = (1/n) sum of squared gradients``."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, columns: Sequence[Any], where: str) -> None:
        for block in columns:
            for part in tiles(block):
                self.total = _added(self.total, block[part].dense().square().sum(0))
        _check_finite(self.total, where)

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        assert self.total is not None
        return Diagonal((self.total / n).to(dtype))


class _Outer:
    """``F = (1/n) sum of g g^T``, for a layer with few parameters."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, columns: Sequence[Any], where: str) -> None:
        for block in columns:
            dense = block.dense()
            self.total = _added(self.total, dense.mT @ dense)
        _check_finite(self.total, where)

    def finish(self, n: int, where: str, dtype: torch.dtype) -> LayerCurvature:
        assert self.total is not None
        values, vectors = eigh(self.total / n, f"the Fisher block of {where}", dtype)
        return Full(values, vectors)


def _correct_eigenvalues(
    fitted: Mapping[str, LayerCurvature], source: FisherSource, n: int, dtype: torch.dtype
) -> dict[str, LayerCurvature]:
    """EK-FAC: ``Lambda = (1/n) sum of (Q_B^T G Q_A)^2``, the Fisher's diagonal in K-FAC's eigenbasis (arXiv 1806.03884)."""
    kronecker = {name: layer for name, layer in fitted.items() if isinstance(layer, Kronecker)}
    moments: dict[str, Tensor | None] = dict.fromkeys(kronecker)
    for start, columns in source:
        for name, layer in kronecker.items():
            blocks = [column[name] for column in columns]
            for moment in _second_moments(layer.basis, blocks):
                moments[name] = _added(moments[name], moment)
            _check_finite(moments[name], f"layer {name}, batch from example {start}")
    out = dict(fitted)
    for name, layer in kronecker.items():
        moment = moments[name]
        assert moment is not None
        out[name] = Kronecker(layer.basis, (moment / n).to(dtype))
    return out


def _second_moments(basis: Eigenbasis, blocks: Sequence[Any]) -> Iterator[Tensor]:
    """Sums over tiles of squared rotated gradients [group, R, C]; the columns of a batch share their rotated inputs."""
    first = blocks[0]
    for part in tiles(first):
        tile = first[part]
        if not isinstance(tile, Factored):
            for block in blocks:
                yield rotated_gradients(basis, block[part]).square_().sum(1)
            continue
        right = tile.right()
        rows, cols = basis.rows.shape[-1], right.shape[-1]
        factors_first = rotate_factors_first(right.shape[2], rows, cols)
        if right.shape[2] == 1:  # one position: (left^2)^T (right^2), no gradient is ever formed
            squares = (right[:, :, 0] @ basis.cols).square_()
            for block in blocks:
                left = block[part].left()[:, :, 0] @ basis.rows
                yield left.square_().mT @ squares
            continue
        if factors_first:
            right = (right.flatten(1, 2) @ basis.cols).reshape(right.shape)
        for block in blocks:
            yield rotated_gradients(basis, block[part], right, factors_first).square_().sum(1)


def _added(total: Tensor | None, part: Tensor) -> Tensor:
    part = part.double()
    return part if total is None else total.add_(part)


def _check_finite(total: Tensor | None, where: str) -> None:
    if total is not None and not bool(torch.isfinite(total).all()):
        raise UpweightError(f"{where}: the curvature is not finite -> look for exploding gradients or bad examples there")


