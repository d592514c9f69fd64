"""Per-example numbers of a model, by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from upweight._random import preserved
from upweight.attributors.base import Attributor, explained_by_form
from upweight.data import Examples, map_tensors, signature
from upweight.errors import UpweightError
from upweight.gradients.checks import check_alone, check_finite, check_per_example, constant_buffers
from upweight.gradients.select import check_model
from upweight.progress import progress_bar
from upweight.task import BinaryClassification, Classification
from upweight.task.outputs import OutputTask

PerBatch = Callable[[nn.Module, Any], Tensor]

FORWARD_BATCH = 256
"""Examples per forward pass, if neither the user nor the data asks for another number."""


class Forward:
    """Runs a model without gradients over examples, and checks what comes out.

    Args:
        method: whose task and options are used.
        model: the model, or a copy that holds a checkpoint.
        examples: the training data, whose form queries must have.
    """

    def __init__(self, method: Attributor, model: nn.Module, examples: Examples) -> None:
        check_model(model)
        self.method, self.model = method, model
        tensors = [*model.parameters(), *model.buffers()] or [torch.zeros(())]
        floating = [t.dtype for t in model.parameters() if t.is_floating_point()] or [torch.float32]
        self.device, self._model_dtype = tensors[0].device, floating[0]
        self.dtype = torch.float64 if torch.float64 in floating else torch.float32
        self.batch_size = examples.preferred_batch_size or method.batch_size or FORWARD_BATCH
        self.form = signature(examples.take([0]))
        with torch.no_grad(), self.quietly():
            self._output_shape = method.task.output_shape(model, self.move(examples.take([0])))

    def over(self, examples: Examples, function: PerBatch, what: str) -> Tensor:
        """``function(model, batch)`` for every example, [n] or [n, numbers], on the CPU.

        Args:
            examples: training examples or queries.
            function: gives one number, or one row of numbers, an example.
            what: what the numbers are, in words.

        Raises:
            UpweightError: the model cannot take the examples, a number is not finite, or one example's numbers depend
                on the others.
        """
        found = []
        with constant_buffers(self.model), progress_bar(what, examples.n, self.method.progress) as advance:
            for rows in examples.batches(self.batch_size):
                ids = examples.ids[rows.start : rows.stop]
                values = explained_by_form(
                    rows.batch, self.form, lambda b=rows.batch, i=ids: self._values(function, b, i)
                )
                if rows.start == 0 and values.shape[1] == 1:
                    pair = map_tensors(rows.batch, lambda t: t[[0, 0]])
                    alone = self._values(function, pair, [ids[0], ids[0]])
                    check_alone(alone[0, 0], values[0, 0], ids[0], what)
                found.append(values.cpu())
                advance(len(rows))
        values = torch.cat(found).to(self.dtype)
        return values[:, 0] if values.shape[1] == 1 else values

    def check(self, queries: Examples) -> None:
        """Raise if the task cannot measure these queries, as any method would."""
        self.over(queries, self.method.task.measure, "measurement")

    def move(self, batch: Any) -> Any:
        """The batch on the model's device, floating-point values in the model's precision."""
        cast = self._model_dtype in (torch.float32, torch.float64)

        def one(tensor: Tensor) -> Tensor:
            float_like = cast and tensor.is_floating_point()
            return tensor.to(self.device, self._model_dtype if float_like else tensor.dtype)

        return map_tensors(batch, one)

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """The global random states as they were afterwards, autocast if asked for."""
        devices = [self.device] if self.device.type == "cuda" else []
        dtype = self.method.autocast
        with preserved(devices), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            yield

    def _values(self, function: PerBatch, batch: Any, ids: Any) -> Tensor:
        """What the function gives, [batch, numbers], checked."""
        self.method.task.check_targets(batch, ids, self._output_shape)
        moved = self.move(batch)
        with torch.no_grad(), self.quietly():
            values = function(self.model, moved).detach()
        values = values[..., None] if values.ndim < 2 else values
        check_per_example(values, len(ids))
        check_finite(values, ids, moved)
        return values


def classifier(task: Any, name: str, needs: str) -> OutputTask:
    """The task, if its outputs are those of a classifier; raise if not, saying what the method needs of one.

    Args:
        task: any task.
        name: the method's.
        needs: what the method compares, in words.
    """
    if not isinstance(task, (Classification, BinaryClassification)):
        raise UpweightError(
            f"task is {type(task).__name__}, expected Classification or BinaryClassification: {name} compares {needs} "
            "-> use Loss or GradNorm for other tasks"
        )
    return task
