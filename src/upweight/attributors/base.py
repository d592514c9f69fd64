"""What every attributor takes, and what it refuses before any work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from upweight.budget import parse_memory
from upweight.data import Examples, signature
from upweight.errors import UpweightError
from upweight.fingerprint import Origin
from upweight.gradients.select import ParameterFilter
from upweight.task import Task

Result = TypeVar("Result")


class Attributor:
    """Options that the attributors share, and the state of the model they were fitted on.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss and what is asked of queries.
        parameters: which parameters to track.
        memory: bytes to stay within.
        batch_size: examples per forward pass; chosen from the memory budget if None.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        parameters: ParameterFilter,
        memory: int | str,
        batch_size: int | None,
        autocast: torch.dtype | None,
        progress: bool,
    ) -> None:
        if not isinstance(task, Task):
            raise UpweightError(
                f"task is {type(task).__name__}, expected a Task -> uw.Classification() for example"
            )
        if batch_size is not None and batch_size < 1:
            raise UpweightError(
                f"batch_size={batch_size}, expected at least 1 -> leave it None to have it chosen"
            )
        self.model, self.task, self.parameters = model, task, parameters
        self.memory, self.batch_size = parse_memory(memory), batch_size
        self.autocast, self.progress = autocast, progress
        self._fitted_on: Origin | None = None

    def _remember(self, examples: Examples) -> None:
        """What a later question must find unchanged."""
        self._fitted_on = Origin(self.model, examples)

    def _ready(self) -> tuple[Examples, dict[str, str]]:
        """The training data and the fingerprints of the fit; raise without one, or if either changed since."""
        if self._fitted_on is None:
            raise UpweightError("not fitted yet -> call fit(train) first")
        self._fitted_on.check()
        return self._fitted_on.examples, self._fitted_on.fingerprints


def explained_by_form(
    batch: Any, expected: list[str], work: Callable[[], Result], what: str = "queries"
) -> Result:
    """What `work` gives on a batch; an error of the model's own is explained by the form of its examples.

    Args:
        batch: queries, or other examples.
        expected: the form of one training example, as `signature` gives it.
        work: runs the model on the batch.
        what: what the examples are, in words.
    """
    try:
        return work()
    except UpweightError:
        raise
    except Exception as error:
        seen = signature(batch)
        if seen == expected:
            raise
        raise UpweightError(
            f"the model refuses the {what}: one is {seen} but a training example is {expected} -> give "
            f"the {what} the training data's form ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
        ) from error
