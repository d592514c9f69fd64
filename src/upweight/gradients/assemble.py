"""From recorded uses to layers, and from uses with their output gradients to per-example gradient blocks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from upweight.gradients.blocks import Block, Dense, Factored, Piece, Sparse
from upweight.gradients.layers import Layer, MatrixLayer, TableLayer, VectorLayer
from upweight.gradients.operations import Affine, Layout, Lookup, Product
from upweight.gradients.tap import Use

MOST_ONE_HOT_ROWS = 8192
"""A table that is also used as a matrix (tied head) has its look-ups written as one-hot rows up to this many rows."""


def find_layers(
    uses: Sequence[Use], strangers: Mapping[str, str], parameters: Mapping[str, Tensor]
) -> dict[str, Layer]:
    """One layer per weight (with its bias, if all uses share it), in the order of the model's parameters.

    Args:
        uses: the uses of one forward pass.
        strangers: {parameter name: why it needs the exact fallback}.
        parameters: the tracked parameters.
    """
    as_weight: dict[str, list[Use]] = {}
    as_bias: dict[str, list[Use]] = {}
    for use in uses:
        if use.weight is not None:
            as_weight.setdefault(use.weight, []).append(use)
        if use.bias is not None:
            as_bias.setdefault(use.bias, []).append(use)
    reasons = dict(strangers)
    layers: list[Layer] = []
    folded: set[str] = set()
    for name, parameter in parameters.items():
        if name in reasons:
            continue
        calls = as_weight.get(name, [])
        if not calls or name in as_bias:
            continue
        kinds = {type(use.operation) for use in calls}
        if kinds == {Lookup}:
            layers.append(TableLayer(_layer_name(name), name, (parameter.shape[0], parameter.shape[1])))
        elif kinds <= {Product, Lookup}:
            layer = _matrix_layer(name, calls, as_weight, as_bias, parameter, reasons)
            if layer is None:
                reasons[name] = "uses of different kinds"
                continue
            layers.append(layer)
            folded.update(layer.parameters[1:])
        elif kinds != {Affine}:
            reasons[name] = "uses of different kinds"
    done = {p for layer in layers for p in layer.parameters}
    for name, parameter in parameters.items():
        if name in done:
            continue
        how = f"exact fallback: used by {reasons[name]}" if name in reasons else "affine"
        if how == "affine" and name not in as_weight and name not in as_bias:
            how = "unused: its gradient is zero"
        layers.append(VectorLayer(name, name, tuple(parameter.shape), how))
    order = {name: position for position, name in enumerate(parameters)}
    layers.sort(key=lambda layer: order[layer.parameters[0]])
    return {layer.name: layer for layer in layers}


def _matrix_layer(
    name: str,
    calls: Sequence[Use],
    as_weight: Mapping[str, Sequence[Use]],
    as_bias: Mapping[str, Sequence[Use]],
    parameter: Tensor,
    reasons: Mapping[str, str],
) -> MatrixLayer | None:
    products = [use.operation for use in calls if isinstance(use.operation, Product)]
    if len({op.patches is None for op in products}) > 1 or len({op.groups for op in products}) > 1:
        return None
    convolution, groups = products[0].patches is not None, products[0].groups
    looked_up = len(products) < len(calls)
    if looked_up and (convolution or parameter.shape[0] > MOST_ONE_HOT_ROWS):
        return None
    transposed = not convolution and not looked_up and all(op.transposed for op in products)
    biases = {use.bias for use in calls}
    bias = biases.pop() if len(biases) == 1 else None
    inputs_are_columns = transposed or not any(op.transposed for op in products)
    foldable = (
        bias is not None
        and inputs_are_columns
        and bias not in reasons
        and bias not in as_weight
        and all(use.weight == name and isinstance(use.operation, Product) for use in as_bias[bias])
    )
    shape = tuple(parameter.shape)
    rows, columns = (shape[1], shape[0]) if transposed else (shape[0], parameter.numel() // shape[0])
    return MatrixLayer(
        _layer_name(name),
        name,
        bias if foldable else None,
        (groups, rows // groups, columns + foldable),
        shape,
        transposed,
        convolution,
    )


def _layer_name(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def block_of(
    layer: Layer,
    uses: Iterable[tuple[Use, Tensor, Layout]],
    batch: int,
    parameter: Tensor,
    dtype: torch.dtype,
) -> Block:
    """The block of one layer from its uses, each with its output gradient and layout.

    Args:
        layer: the layer (not a fallback one).
        uses: the uses that involve any of its parameters, with output gradients and layouts.
        batch: examples in the batch.
        parameter: the layer's weight, for shapes.
        dtype: dtype of the factors.
    """
    if isinstance(layer, MatrixLayer):
        pieces = [
            _piece(layer, use, delta, layout, batch, dtype) for use, delta, layout in uses if use.weight
        ]
        if not pieces:  # the query does not reach this layer
            return Dense(torch.zeros(batch, layer.numel, dtype=dtype, device=parameter.device))
        return Factored(tuple(pieces), layer.shape[0], layer.bias is not None)
    if isinstance(layer, TableLayer):
        ids, rows = [], []
        for use, delta, layout in uses:
            index, gradient = _lookup(use, delta, layout, batch, dtype)
            ids.append(index)
            rows.append(gradient)
        if not ids:
            empty = torch.zeros(batch, 1, dtype=torch.long, device=parameter.device)
            nothing = torch.zeros(batch, 1, layer.table[1], dtype=dtype, device=parameter.device)
            return Sparse(empty, nothing, layer.table)
        return Sparse(torch.cat(ids, 1), torch.cat(rows, 1), layer.table)
    total = torch.zeros(batch, layer.numel, dtype=dtype, device=parameter.device)
    for use, delta, layout in uses:
        if use.weight == layer.weight:
            total += _affine(use, delta, layout, batch, tuple(parameter.shape), scale=True).to(dtype)
        if use.bias == layer.weight:
            total += _affine(use, delta, layout, batch, tuple(parameter.shape), scale=False).to(dtype)
    return Dense(total)


def _piece(
    layer: MatrixLayer, use: Use, delta: Tensor, layout: Layout, batch: int, dtype: torch.dtype
) -> Piece:
    assert use.x is not None
    operation = use.operation
    if isinstance(operation, Lookup):
        ids, gradient = _lookup(use, delta, layout, batch, dtype)
        rows = torch.nn.functional.one_hot(ids, layer.weight_shape[0]).to(dtype)
        return Piece(rows, gradient, swapped=True)
    assert isinstance(operation, Product)
    x = layout.batch_first(use.x, batch).to(dtype)
    delta = layout.batch_first(delta, batch).to(dtype)
    if operation.patches is None:
        x, delta = x.reshape(batch, -1, x.shape[-1]), delta.reshape(batch, -1, delta.shape[-1])
        swap = operation.transposed and not layer.transposed
        return Piece(x, delta, swapped=True) if swap else Piece(delta, x)
    x, delta = x.movedim(2, -1), delta.movedim(2, -1)  # [batch, k, *space, channel]
    rows, cols = (x, delta) if operation.transposed else (delta, x)
    windows = tuple(rows.shape[2:-1])
    rows = rows.reshape(batch, -1, rows.shape[-1])
    return Piece(rows, cols.contiguous(), operation.patches, windows, swapped=operation.transposed)


def _lookup(use: Use, delta: Tensor, layout: Layout, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    assert use.x is not None and isinstance(use.operation, Lookup)
    ids = layout.batch_first(use.x, batch).reshape(batch, -1)
    rows = layout.batch_first(delta, batch).to(dtype).reshape(batch, ids.shape[1], -1)
    if use.operation.padding_row is not None:
        rows = rows * (ids != use.operation.padding_row)[:, :, None]
    return ids, rows


def _affine(
    use: Use, delta: Tensor, layout: Layout, batch: int, shape: tuple[int, ...], scale: bool
) -> Tensor:
    """``sum over positions of delta o x`` (scale) or of delta (shift), [batch, numel]."""
    operation = use.operation
    product = delta
    if scale:
        assert use.x is not None and isinstance(operation, Affine)
        with torch.no_grad():
            x = operation.normalise(use.x) if operation.normalise is not None else use.x
        product = delta * x.to(delta.dtype)
    if isinstance(operation, Affine):
        aligned = operation.shape
    elif isinstance(operation, Product) and operation.patches is not None:
        aligned = (*shape, *(1 for _ in operation.patches.kernel))  # a bias per channel, the second axis
    else:
        aligned = shape  # a bias per output feature, the last axis
    aligned = (1,) * (delta.ndim - len(aligned)) + tuple(aligned)
    if aligned[layout.dim] != 1:
        raise ValueError("the parameter is broadcast along the examples")
    firsts = layout.batch_first(product, batch)  # [batch, k, *other axes]
    rest = [size for axis, size in enumerate(aligned) if axis != layout.dim]
    summed = firsts.sum(1)
    over = [axis + 1 for axis, size in enumerate(rest) if size == 1 and summed.shape[axis + 1] != 1]
    return (summed.sum(over) if over else summed).reshape(batch, -1)
