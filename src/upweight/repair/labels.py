"""Labels of a data set, read and replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import BinaryClassification, Classification, Regression, Task
from upweight.task.outputs import _TARGET_KEYS, split_batch


@dataclass(frozen=True)
class Labels:
    """The given labels.

    Attributes:
        kind: "classes", "numbers", or "none" where the task has no one label an example.
        values: class numbers (int64) or numbers (float64), [n]; empty for "none".
        classes: how many there are; 0 if they are not classes.
    """

    kind: str
    values: np.ndarray
    classes: int = 0

    def listed(self, values: np.ndarray | None = None) -> list[Any]:
        """Plain ints or floats, or None for each where there are no labels."""
        values = self.values if values is None else values
        return [int(v) for v in values] if self.kind == "classes" else [float(v) for v in values]


def read_labels(task: Task, examples: Examples, outputs: int) -> Labels:
    """The labels of every example.

    Args:
        task: says what labels are.
        examples: the training data.
        outputs: how many the model has.

    Raises:
        UpweightError: a label is none of the task's.
    """
    if not isinstance(task, (Classification, BinaryClassification, Regression)):
        return Labels("none", np.zeros(0))
    size = examples.preferred_batch_size or 1024
    parts = [split_batch(rows.batch)[2].detach().cpu() for rows in examples.batches(size)]
    counts = sum(part.numel() for part in parts)
    if counts != examples.n:
        if isinstance(task, Regression):
            return Labels("none", np.zeros(0))  # several numbers an example: none of them is *the* label
        raise UpweightError(
            f"{counts} labels for {examples.n} examples, expected one an example -> one class number each"
        )
    values = torch.cat([part.reshape(-1).double() for part in parts]).numpy()
    if isinstance(task, Regression):
        return Labels("numbers", values)
    classes = 2 if isinstance(task, BinaryClassification) else outputs
    wrong = np.flatnonzero(~((values >= 0) & (values < classes) & (values == np.floor(values))))
    if len(wrong):
        name, value = examples.ids[int(wrong[0])], values[wrong[0]]
        raise UpweightError(
            f"example {str(name)[:60]!r} has label {value:g}, expected 0 to {classes - 1} -> number the classes from 0"
        )
    return Labels("classes", values.astype(np.int64), classes)


def with_labels(batch: Any, labels: np.ndarray) -> Any:
    """The batch with other labels, in the form of its own."""
    old = split_batch(batch)[2]
    new: Tensor = torch.as_tensor(labels).to(old).reshape(old.shape)
    if isinstance(batch, Mapping):
        key = next(key for key in _TARGET_KEYS if key in batch)
        return {**batch, key: new}
    return (*batch[:-1], new)
