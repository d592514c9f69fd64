"""What a model was trained for and what is asked of it."""

from upweight.task.base import Batch, FisherKind, PerExample, Task, resolve_fisher
from upweight.task.kinds import BinaryClassification, Classification, Regression
from upweight.task.outputs import OutputTask, split_batch, uniform

__all__ = [
    "Batch",
    "BinaryClassification",
    "Classification",
    "FisherKind",
    "OutputTask",
    "PerExample",
    "Regression",
    "Task",
    "resolve_fisher",
    "split_batch",
    "uniform",
]
