"""Nestings of tensors: tuples, lists and dicts of them, as data sets and batches are.

A tree's tensors have the examples along their first axis, unless a function says otherwise.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.errors import UpweightError


def as_tensors(tree: Any) -> Any:
    """The same nesting with every numpy array (or number) as a tensor."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, (np.ndarray, np.generic)):
        array = np.asarray(tree)
        if array.dtype.kind not in "biufc":
            raise UpweightError(
                f"an array holds {array.dtype} values, expected numbers -> convert it to a numeric dtype"
            )
        with warnings.catch_warnings():  # of arrays that may not be written to: nobody does
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(np.ascontiguousarray(array))
    if isinstance(tree, Mapping):
        return {key: as_tensors(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [as_tensors(value) for value in tree])
    return tree


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to every tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [map_tensors(value, function) for value in tree])
    return tree


def _like(tree: tuple | list, values: list[Any]) -> Any:
    """A sequence of the same type, which takes its values one by one if they have names."""
    return type(tree)(*values) if hasattr(tree, "_fields") else type(tree)(values)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nesting, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for key in tree:
            yield from tensors_in(tree[key])
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


def signature(batch: Any) -> list[str]:
    """Shapes of one example and dtypes, for error messages and cache checks: ``["float32[3, 32, 32]", "int64[]"]``."""
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in tensors_in(batch)]


def length(tensor: Tensor) -> int:
    """Examples in a tensor."""
    if tensor.ndim == 0:
        raise UpweightError(
            "a tensor of the data has no axes, expected the examples along the first -> add an axis"
        )
    return len(tensor)


def batch_length(batch: Any) -> int:
    """Examples in a batch."""
    sizes = {length(t) for t in tensors_in(batch)}
    if len(sizes) != 1:
        raise UpweightError(
            f"a batch holds tensors with first axes of {sorted(sizes)}, expected one -> align them"
        )
    return sizes.pop()


def concatenate(batches: Sequence[Any]) -> Any:
    """One batch of several of the same form and shapes."""
    shapes = {str(signature(batch)) for batch in batches}
    if len(shapes) > 1:
        raise UpweightError(
            f"the loader's batches have other shapes, {' and '.join(sorted(shapes)[:2])}, expected one for these "
            "examples -> pass the data set itself, with a collate function that pads"
        )
    leaves = [list(tensors_in(batch)) for batch in batches]
    joined = iter([torch.cat(parts) for parts in zip(*leaves, strict=True)])
    return map_tensors(batches[0], lambda _: next(joined))


def digest_of(tree: Any) -> str:
    """Hash of every value, shape and dtype."""
    digest = hashlib.blake2b(digest_size=16)
    hash_tree(digest, tree)
    return digest.hexdigest()


def hash_tree(digest: Any, tree: Any) -> None:
    """Add every value, shape and dtype to a hash."""
    for tensor in tensors_in(tree):
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(raw_bytes(tensor))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's memory itself, copied only if it is not contiguous or not on the CPU."""
    whole = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    # Not reshape(-1), which keeps the stride of a single number of a column: it cannot be viewed as bytes.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8).numpy().data
