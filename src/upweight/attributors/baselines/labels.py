"""The class labels of a data set, for methods that compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.task import Task
from upweight.task.outputs import OutputTask, split_batch


def class_labels(task: Task, examples: Examples, batch_size: int, why: str) -> Tensor:
    """One class label an example, [n], on the CPU.

    Args:
        task: the task, which knows labels from inputs.
        examples: the data.
        batch_size: examples to read at a time.
        why: what they are for, in words.

    Raises:
        UpweightError: the task has no labels apart from inputs, or they are no classes.
    """
    if not isinstance(task, OutputTask):
        raise UpweightError(
            f"task is {type(task).__name__}, which does not tell labels apart from inputs, expected class labels: "
            f"{why} -> use Classification or BinaryClassification"
        )
    labels = torch.cat([split_batch(rows.batch)[2].cpu() for rows in examples.batches(batch_size)])
    binary = labels.is_floating_point() and bool(((labels == 0) | (labels == 1)).all())
    if labels.numel() != examples.n or (labels.is_floating_point() and not binary):
        raise UpweightError(
            f"targets are {labels.dtype} {tuple(labels.shape)}, expected one class label an example: {why} -> use "
            "Loss for other tasks"
        )
    return labels.reshape(-1)
