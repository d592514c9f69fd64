"""Targets of a training batch: which tensor they are, what a new one must be, and a batch with other ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.task import OutputTask, Task
from upweight.task.outputs import split_batch

Label = int | float


def real(value: Any) -> Label | None:
    """A real number of whatever type (Python's, NumPy's, a tensor of one) as Python's; None for anything else.

    Example:
        >>> real(np.float32(0.5)), real(torch.tensor(2)), real(True), real("2")
        (0.5, 2, None, None)
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        if math.prod(value.shape) != 1:
            return None
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def check_named(task: Task | None, batch: Any) -> None:
    """Raise where nothing says which tensor of a batch is the target: of ``(x, y, w)`` the last one is not.

    Args:
        task: one of outputs takes the last tensor of a tuple for its targets; others take what their functions do.
        batch: a batch of training examples.
    """
    if task is None or isinstance(task, OutputTask) or not isinstance(batch, (tuple, list)):
        return
    if len(batch) > 2:
        raise UpweightError(
            f"labels= on batches of {len(batch)} tensors, and a task of one's own does not say which is the target, "
            'expected (inputs, targets) or a dict -> give the data as a dict with the targets as "labels": {"x": x, '
            '"labels": y, "weight": w}, which the loss then reads by name'
        )


def targets_of(batch: Any) -> Tensor:
    """The targets of a batch, one number an example."""
    targets = split_batch(batch)[2]
    if not isinstance(targets, Tensor):
        raise UpweightError(
            f"the targets are {type(targets).__name__}, expected one tensor to relabel -> give the data as a dict with "
            'the targets as "labels"'
        )
    if targets.numel() != len(targets):
        raise UpweightError(
            f"the targets have shape {tuple(targets.shape)}, expected one number an example to relabel -> remove the "
            "examples instead"
        )
    return targets.reshape(len(targets))


def different(labels: Mapping[int, Any], batch: Any, names: Mapping[int, Any]) -> dict[int, Label]:
    """The labels that are not the given ones, as plain numbers.

    Args:
        labels: {position: new label}.
        batch: the examples at these positions, in this order.
        names: {position: id}, for errors.
    """
    targets = targets_of(batch)
    found: dict[int, Label] = {}
    for old, (position, given) in zip(targets, labels.items(), strict=True):
        label = _label(given, targets, names[position])
        if old.item() != _as_kept(label, targets):
            found[position] = label
    return found


def with_targets(batch: Any, new: Sequence[tuple[int, Label]]) -> Any:
    """The batch with new targets in these rows, in the form of its own."""
    old = split_batch(batch)[2]
    targets = old.clone()
    for row, label in new:
        targets[row] = label
    if isinstance(batch, Mapping):
        return {key: targets if value is old else value for key, value in batch.items()}
    if hasattr(batch, "_fields"):
        return batch._replace(**{batch._fields[-1]: targets})
    return [*batch[:-1], targets] if isinstance(batch, list) else (*batch[:-1], targets)


def _label(label: Any, targets: Tensor, name: Any) -> Label:
    """A new label as a number that the targets can hold."""
    number = real(label[0] if isinstance(label, (list, tuple)) and len(label) == 1 else label)
    if number is None or not math.isfinite(number):
        raise UpweightError(
            f"the new label of example {name!r} is {label!r}, expected one finite number -> class names must be "
            "turned into class numbers"
        )
    dtype = str(targets.dtype).removeprefix("torch.")
    integers = not targets.is_floating_point()
    if integers and number != int(number):
        raise UpweightError(
            f"the new label of example {name!r} is {number!r}, expected a class number (the targets are {dtype}) -> "
            "an integer"
        )
    if not _fits(number, targets.dtype):
        raise UpweightError(
            f"the new label of example {name!r} is {number!r}, expected one that {dtype} can hold, as the targets are "
            "-> another label, or targets of a wider type"
        )
    return int(number) if integers else float(number)


def _fits(number: Label, dtype: torch.dtype) -> bool:
    if dtype == torch.bool:
        return number in (0, 1)
    limits = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return limits.min <= number <= limits.max


def _as_kept(label: Label, targets: Tensor) -> Label:
    """What a label is among the targets: 0.1 is another number in float32."""
    return torch.tensor(label, dtype=targets.dtype).item()
