"""Which parameters form one layer, and how its flat gradient maps back to them.

A layer is what gets one block of curvature: a weight matrix with its bias folded in as a constant input, an embedding
table, or a vector of affine parameters. Layers are found by **parameter**, not by module, so that a module called twice
and a weight used in two places are each one layer whose uses are summed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True)
class MatrixLayer:
    """A weight matrix, and its bias if every use has the same one.

    Attributes:
        name: the layer's name (the weight's, without ``.weight``).
        weight: the weight's parameter name.
        bias: the folded bias's parameter name, or None.
        shape: (groups, rows, columns) of the gradient blocks, the folded bias as the last column.
        weight_shape: the weight's own shape.
        transposed: rows are the weight's second axis (``x @ W``).
        convolution: the weight is a kernel [row, channel, *space], kept here as [row, *space, channel].
    """

    name: str
    weight: str
    bias: str | None
    shape: tuple[int, int, int]
    weight_shape: tuple[int, ...]
    transposed: bool = False
    convolution: bool = False
    how: str = "factors"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def to_parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat gradients [batch, numel] as {parameter name: [batch, *parameter shape]}."""
        groups, rows, columns = self.shape
        blocks = flat.reshape(len(flat), groups, rows, columns)
        out: dict[str, Tensor] = {}
        if self.bias is not None:
            out[self.bias] = blocks[..., -1].reshape(len(flat), groups * rows)
            blocks = blocks[..., :-1]
        if self.convolution:
            _, channels, *space = self.weight_shape
            kernels = blocks.reshape(len(flat), groups * rows, *space, channels)
            out[self.weight] = kernels.movedim(-1, 2)
        else:
            matrix = blocks.reshape(len(flat), groups * rows, -1)
            out[self.weight] = matrix.mT if self.transposed else matrix
        return out

    def from_parameters(self, named: Mapping[str, Tensor]) -> Tensor:
        """{parameter name: [batch, *parameter shape]} as flat gradients [batch, numel]: undoes `to_parameters`."""
        groups, rows, columns = self.shape
        weight = named[self.weight]
        batch = len(weight)
        if self.convolution:
            weight = weight.movedim(2, -1)
        elif self.transposed:
            weight = weight.mT
        blocks = weight.reshape(batch, groups, rows, columns - (self.bias is not None))
        if self.bias is not None:
            bias = named[self.bias].reshape(batch, groups, rows, 1)
            blocks = torch.cat([blocks, bias], -1)
        return blocks.flatten(1)


@dataclass(frozen=True)
class TableLayer:
    """An embedding table [rows, width], of which an example touches only the rows it looks up."""

    name: str
    weight: str
    table: tuple[int, int]
    how: str = "sparse rows"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,)

    @property
    def numel(self) -> int:
        return self.table[0] * self.table[1]

    def to_parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat gradients [batch, numel] as {parameter name: [batch, *parameter shape]}."""
        return {self.weight: flat.reshape(len(flat), *self.table)}

    def from_parameters(self, named: Mapping[str, Tensor]) -> Tensor:
        """{parameter name: [batch, *parameter shape]} as flat gradients [batch, numel]: undoes `to_parameters`."""
        return named[self.weight].flatten(1)


@dataclass(frozen=True)
class VectorLayer:
    """A parameter whose gradient is kept as one vector an example.

    ``how`` says where it comes from: ``"affine"`` (norms, biases, scales and shifts, from the forward pass's
    tensors) or ``"exact fallback: reason"`` (torch.func or a loop over the examples).
    """

    name: str
    weight: str
    weight_shape: tuple[int, ...]
    how: str = "affine"

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,)

    @property
    def numel(self) -> int:
        total = 1
        for size in self.weight_shape:
            total *= size
        return total

    def to_parameters(self, flat: Tensor) -> dict[str, Tensor]:
        """Flat gradients [batch, numel] as {parameter name: [batch, *parameter shape]}."""
        return {self.weight: flat.reshape(len(flat), *self.weight_shape)}

    def from_parameters(self, named: Mapping[str, Tensor]) -> Tensor:
        """{parameter name: [batch, *parameter shape]} as flat gradients [batch, numel]: undoes `to_parameters`."""
        return named[self.weight].reshape(len(named[self.weight]), self.numel)


Layer: TypeAlias = MatrixLayer | TableLayer | VectorLayer


def to_parameters(layers: Mapping[str, Layer], flat: Tensor) -> dict[str, Tensor]:
    """Vectors [batch, p] in the order of `Gradients.dense` as {parameter name: [batch, *parameter shape]}."""
    parts = flat.split([layer.numel for layer in layers.values()], 1)
    out: dict[str, Tensor] = {}
    for layer, part in zip(layers.values(), parts, strict=True):
        out |= layer.to_parameters(part)
    return out


def from_parameters(layers: Mapping[str, Layer], named: Mapping[str, Tensor]) -> Tensor:
    """{parameter name: [batch, *parameter shape]} as [batch, p] in the order of `Gradients.dense`."""
    return torch.cat([layer.from_parameters(named) for layer in layers.values()], 1)
