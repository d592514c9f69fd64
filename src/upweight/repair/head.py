"""The last linear layer as a problem of its own: what goes into it is fixed, and its objective is convex.

For outputs ``z = W x`` (a bias is a constant input) and the losses of `Classification`, `BinaryClassification` and
`Regression`, the objective in W is convex, and quadratic for regression: Newton's method finds its minimum.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.last_layer import last_linear
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.task import OutputTask, Task
from upweight.task.outputs import split_batch

AGREES = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Head:
    """A model's last linear layer, and what goes into it.

    Attributes:
        name: the module's name; empty if it is the model itself.
        module: the layer.
        examples: (what goes into it [n, d], targets [n, ...]) for the training data, with its ids.
    """

    name: str
    module: nn.Linear
    examples: Examples

    def in_double(self) -> tuple[nn.Linear, Examples]:
        """A float64 copy of the layer, and of what goes into it."""
        inputs, targets = self.examples.take(range(self.examples.n))
        return copy.deepcopy(self.module).double(), Examples((inputs.double(), targets), self.examples.ids)

    def take(self, other: nn.Linear) -> None:
        """Give the layer another's weights."""
        with torch.no_grad():
            for mine, theirs in zip(self.module.parameters(), other.parameters()):
                mine.copy_(theirs)

    def parameter(self, full: str) -> str:
        """A parameter's name within the layer: ``"weight"`` or ``"bias"``."""
        return full.removeprefix(f"{self.name}.") if self.name else full


def find_head(tracker: Tracker, task: Task, examples: Examples, batch_size: int) -> Head:
    """The last linear layer of a tracked model.

    Raises:
        UpweightError: the outputs are not those of an `nn.Linear` that is used once.
    """
    model = tracker.model
    if not isinstance(task, OutputTask):
        raise UpweightError(
            f"the last layer alone needs a task of outputs, and this is {type(task).__name__} -> use Classification, "
            "BinaryClassification or Regression, or another method"
        )
    name = last_linear(model, task, examples)[0].rpartition(".")[0]
    module = model.get_submodule(name) if name else model
    if not isinstance(module, nn.Linear):
        raise UpweightError(
            f"the last linear layer {name or 'of the model'} is {type(module).__name__}, expected nn.Linear -> use "
            "another method, with parameters= to keep the rest as it is"
        )
    inputs, targets = [], []
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        batch = tracker.move(rows.batch)
        seen, outputs = _watched(tracker, task, module, batch)
        inputs.append(seen)
        targets.append(split_batch(batch)[2])
        if rows.start == 0:
            _check(module, seen, outputs, name)
    return Head(name, module, Examples((torch.cat(inputs), torch.cat(targets)), list(examples.ids)))


@torch.no_grad()
def _watched(tracker: Tracker, task: OutputTask, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """What the layer sees of a batch, and what the model makes of it."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        with tracker.quietly():
            outputs, _ = task.forward(tracker.model, batch)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        shapes = [tuple(s.shape) for s in seen]
        raise UpweightError(
            f"the last linear layer sees {shapes} of a batch, expected [batch, features] once -> use another method"
        )
    return seen[0].detach(), outputs


class _ReachedError(Exception):
    """What a layer sees is known: the rest of the forward pass is not needed."""


@torch.no_grad()
def watched(tracker: Tracker, task: OutputTask, module: nn.Module, batch: Any) -> Tensor | None:
    """The one tensor that a layer sees of a batch; None if it sees anything else. Nothing after it is computed."""
    seen: list[Any] = []

    def stop(_: nn.Module, args: Any, named: Any) -> None:
        seen.append(args[0] if len(args) == 1 and not named else None)
        raise _ReachedError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with tracker.quietly():
            task.forward(tracker.model, batch)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return seen[0].detach() if seen and isinstance(seen[0], Tensor) else None


def _check(module: nn.Linear, seen: Tensor, outputs: Tensor, name: str) -> None:
    with torch.no_grad():
        ours = module(seen).reshape(outputs.shape)
    gap = float((ours - outputs).abs().max())
    if gap > AGREES.get(outputs.dtype, 1e-2) * (1 + float(outputs.abs().max())):
        raise UpweightError(
            f"the model's outputs are not those of its last linear layer {name} (they differ by {gap:.2g}) -> use "
            "another method, with parameters= to keep the rest as it is"
        )


def is_linear(tracker: Tracker, task: Task) -> bool:
    """Whether the tracked parameters are those of one linear layer, the objective then being convex."""
    names = {name.rpartition(".")[0] for name in tracker.parameters}
    if len(names) != 1 or not isinstance(task, OutputTask):
        return False
    (name,) = names
    return isinstance(tracker.model.get_submodule(name) if name else tracker.model, nn.Linear)
