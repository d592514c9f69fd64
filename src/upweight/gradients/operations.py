"""The operations through which a parameter enters a network, and the factors of its per-example gradient.

Every weight matrix W enters through a product, so that its gradient for one example is a sum of outer products over
positions (tokens, output pixels): ``G = sum_t rows_t cols_t^T``. For a linear layer ``rows`` is the gradient of the
output and ``cols`` the input; for a convolution ``cols`` are the input's patches; a transposed convolution swaps the
roles. Affine parameters of norms, biases, scales and shifts are sums of an elementwise product over positions.

`parse` reads one call of a torch function; `engine.md` calls the result a use of the parameters in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.errors import UpweightError


@dataclass(frozen=True)
class Layout:
    """Where the examples are in a tensor: along axis `dim`, alone or merged with other positions.

    A merged axis of size ``batch * k`` is read example-major (``[batch, k]``), or position-major (``[k, batch]``), as
    in attention code that keeps time first.
    """

    dim: int
    position_major: bool = False

    def batch_first(self, tensor: Tensor, batch: int) -> Tensor:
        """The tensor as [batch, k, ...], k positions per example along the examples' axis."""
        moved = tensor.movedim(self.dim, 0)
        if len(moved) % batch:
            raise UpweightError(
                f"axis {self.dim} of a layer's output has size {len(moved)}, expected a multiple of {batch} examples "
                "as in the probe batch (rows cut or routed by the batch, or a measurement that calls the model "
                "differently?) -> another batch_size=, or leave the layer out with parameters="
            )
        k = len(moved) // batch
        if self.position_major:
            return moved.reshape(k, batch, *moved.shape[1:]).transpose(0, 1)
        return moved.reshape(batch, k, *moved.shape[1:])


@dataclass(frozen=True)
class Patches:
    """Geometry of the sliding windows of a convolution, for any number of spatial axes."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]

    def count(self, spatial: Sequence[int]) -> tuple[int, ...]:
        """Windows along each axis of a map of this spatial size."""
        return tuple(
            (size + low + high - d * (k - 1) - 1) // s + 1
            for size, k, s, (low, high), d in zip(
                spatial, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        )

    def of(self, maps: Tensor, groups: int, ones: bool, limit: Sequence[int] | None = None) -> Tensor:
        """Windows of channel-last maps [n, *space, channel] as [group, n, window, kernel * channel/group (+ 1)].

        Args:
            maps: the maps, channels last.
            groups: channel groups; each sees only its own channels.
            ones: append a constant 1, whose gradient is the bias's.
            limit: at most this many windows along each axis (a transposed convolution's output may have room for more).
        """
        pads = [p for low_high in reversed(self.padding) for p in low_high]
        padded = F.pad(maps, [0, 0, *pads]) if any(pads) else maps
        padded = padded.contiguous()
        n, *_, channels = padded.shape
        windows = self.count(maps.shape[1:-1])
        if limit is not None:
            windows = tuple(min(a, b) for a, b in zip(windows, limit, strict=True))
        step = padded.stride()
        space = step[1:-1]
        view = padded.as_strided(  # one strided view: copying it moves runs of contiguous channels
            (groups, n, *windows, *self.kernel, channels // groups),
            (
                channels // groups,
                step[0],
                *(a * s for a, s in zip(space, self.stride, strict=True)),
                *(a * d for a, d in zip(space, self.dilation, strict=True)),
                1,
            ),
        )
        total = _product(windows)
        width = _product(self.kernel) * (channels // groups)
        if not ones:
            return view.reshape(groups, n, total, width)
        out = padded.new_empty(groups, n, total, width + 1)
        out[..., -1] = 1
        inner = [width + 1]  # strides of the window axes inside `out`
        for size in reversed(windows[1:]):
            inner.insert(0, inner[0] * size)
        kernel_strides = [channels // groups]
        for size in reversed(self.kernel[1:]):
            kernel_strides.insert(0, kernel_strides[0] * size)
        target = out.as_strided(view.shape, (*out.stride()[:2], *inner, *kernel_strides, 1))
        target.copy_(view)
        return out


@dataclass(frozen=True)
class Product:
    """A use of a weight through a matrix product or a convolution."""

    transposed: bool = False
    """The weight is stored [in, out] (``x @ W``, transposed convolutions) instead of [out, in]."""
    patches: Patches | None = None
    groups: int = 1


@dataclass(frozen=True)
class Lookup:
    """A use of an embedding table: row ``ids[t]`` for every position."""

    padding_row: int | None = None


@dataclass(frozen=True)
class Affine:
    """A use of an elementwise scale or shift, broadcast from `shape` (aligned to the output's trailing axes).

    ``normalise`` gives the tensor that is scaled, from the recorded input (a norm's normalised input).
    """

    shape: tuple[int, ...]
    normalise: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Call:
    """One recognised call: the operation, its parameters by role, and the input that the gradient needs."""

    operation: Product | Lookup | Affine
    weight: Tensor | None
    bias: Tensor | None
    x: Tensor | None


def parse(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    """Read one call of a torch function; None if its parameters have no factor form here."""
    parser = _PARSERS.get(function)
    return parser(args, kwargs) if parser is not None else None


# One parser a function -------------------------------------------------------------------------------------------


def _bind(names: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    keys = names.split()
    return [*args, *(kwargs.get(k) for k in keys[len(args) :])]


def _linear(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    x, weight, bias = _bind("input weight bias", args, kwargs)
    return Call(Product(), weight, bias, x) if weight.ndim == 2 else None


def _addmm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    if kwargs.get("beta", 1) != 1 or kwargs.get("alpha", 1) != 1 or len(args) > 3:
        return None
    bias, x, weight = _bind("input mat1 mat2", args, kwargs)
    return Call(Product(transposed=True), weight, bias, x) if bias.ndim == 1 else None


def _matmul(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    x, weight = _bind("input other", args, kwargs)
    if weight is None:
        weight = kwargs.get("mat2")
    if not isinstance(weight, Tensor) or not isinstance(x, Tensor) or weight.ndim != 2 or x.ndim < 2:
        return None
    return Call(Product(transposed=True), weight, None, x)


def _convolution(spatial: int) -> Callable[[Sequence[Any], Mapping[str, Any]], Call | None]:
    def parser(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        bound = _bind("input weight bias stride padding dilation groups", args, kwargs)
        x, weight, bias, stride, padding, dilation, groups = bound
        if x.ndim != spatial + 2:
            return None  # an unbatched map has no axis of examples
        kernel, dilation = tuple(weight.shape[2:]), _tuple(dilation, 1, spatial)
        if padding == "same":
            total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        else:
            pads = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, 0, spatial))
        patches = Patches(kernel, _tuple(stride, 1, spatial), pads, dilation)
        return Call(Product(patches=patches, groups=groups or 1), weight, bias, x)

    return parser


def _transposed_convolution(spatial: int) -> Callable[[Sequence[Any], Mapping[str, Any]], Call | None]:
    def parser(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
        bound = _bind("input weight bias stride padding output_padding groups dilation", args, kwargs)
        x, weight, bias, stride, padding, _, groups, dilation = bound
        if x.ndim != spatial + 2:
            return None
        pads = tuple((p, p) for p in _tuple(padding, 0, spatial))
        patches = Patches(
            tuple(weight.shape[2:]), _tuple(stride, 1, spatial), pads, _tuple(dilation, 1, spatial)
        )
        return Call(Product(transposed=True, patches=patches, groups=groups or 1), weight, bias, x)

    return parser


def _embedding(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    ids, weight, padding_row, *_ = _bind("input weight padding_idx", args, kwargs)
    if padding_row is not None and padding_row < 0:
        padding_row += len(weight)
    return Call(Lookup(padding_row), weight, None, ids)


def _layer_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    x, shape, weight, bias, eps = _bind("input normalized_shape weight bias eps", args, kwargs)
    shape = tuple(shape)
    keep = 1e-5 if eps is None else eps
    return Call(Affine(shape, lambda t: F.layer_norm(t, shape, eps=keep)), weight, bias, x)


def _rms_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    x, shape, weight, eps = _bind("input normalized_shape weight eps", args, kwargs)
    shape = tuple(shape)
    return Call(Affine(shape, lambda t: F.rms_norm(t, shape, eps=eps)), weight, None, x)


def _group_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    x, groups, weight, bias, eps = _bind("input num_groups weight bias eps", args, kwargs)
    keep = 1e-5 if eps is None else eps
    shape = (x.shape[1], *(1 for _ in x.shape[2:]))
    return Call(Affine(shape, lambda t: F.group_norm(t, groups, eps=keep)), weight, bias, x)


def _instance_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    names = "input running_mean running_var weight bias use_input_stats momentum eps"
    x, mean, variance, weight, bias, own, _, eps = _bind(names, args, kwargs)
    own = own is None or own
    if x.ndim < 3 or (own and mean is not None):
        return None
    keep = 1e-5 if eps is None else eps
    shape = (x.shape[1], *(1 for _ in x.shape[2:]))
    return Call(
        Affine(shape, lambda t: F.instance_norm(t, mean, variance, use_input_stats=own, eps=keep)),
        weight,
        bias,
        x,
    )


def _batch_norm(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    names = "input running_mean running_var weight bias training momentum eps"
    x, mean, variance, weight, bias, training, _, eps = _bind(names, args, kwargs)
    if training or mean is None:
        return None
    keep = 1e-5 if eps is None else eps
    shape = (x.shape[1], *(1 for _ in x.shape[2:]))
    return Call(Affine(shape, lambda t: F.batch_norm(t, mean, variance, eps=keep)), weight, bias, x)


def _scale(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    one, other = _bind("input other", args, kwargs)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return None
    weight, x = (one, other) if isinstance(one, torch.nn.Parameter) else (other, one)
    return Call(Affine(tuple(weight.shape)), weight, None, x)


def _shift(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call | None:
    one, other = _bind("input other", args, kwargs)
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)) or kwargs.get("alpha", 1) != 1:
        return None
    bias, x = (one, other) if isinstance(one, torch.nn.Parameter) else (other, one)
    return Call(Affine(tuple(bias.shape)), None, bias, None) if x.ndim >= 1 else None


def _tuple(value: Any, default: int, length: int) -> tuple[int, ...]:
    value = default if value is None else value
    if isinstance(value, int):
        return (value,) * length
    return tuple(value) * length if len(value) == 1 else tuple(value)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_PARSERS: dict[Any, Callable[[Sequence[Any], Mapping[str, Any]], Call | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.mm: _matmul,
    torch.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.conv1d: _convolution(1),
    torch.conv2d: _convolution(2),
    torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1),
    torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.mul: _scale,
    Tensor.mul: _scale,
    Tensor.__mul__: _scale,
    Tensor.__rmul__: _scale,
    torch.add: _shift,
    Tensor.add: _shift,
    Tensor.__add__: _shift,
    Tensor.__radd__: _shift,
}
