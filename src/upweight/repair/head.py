"""The last linear layer as a problem of its own: what goes into it is fixed, and its objective is convex.

For outputs ``z = W x`` (a bias is a constant input) and the losses of `Classification`, `BinaryClassification` and
`Regression`, the objective in W is convex, and quadratic for regression: Newton's method finds its minimum.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.attributors.last_layer import last_linear
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.repair.vectors import Vector, place, values_of
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
    """The last linear layer of a model, of which nothing else is tracked.

    Raises:
        UpweightError: the outputs are not those of an `nn.Linear` that is used once, on inputs that do not depend on
            it.
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
        _check(module, seen, outputs, name)
        if rows.start == 0:
            _check_fixed(tracker, task, module, batch, seen, name)
    return Head(name, module, Examples((torch.cat(inputs), torch.cat(targets)), list(examples.ids)))


def _watched(tracker: Tracker, task: OutputTask, module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """What the layer sees of a batch, and what the model makes of it."""
    seen, outputs = _all_watched(tracker, task, module, batch)
    if len(seen) != 1 or seen[0].ndim != 2:
        shapes = [tuple(s.shape) for s in seen]
        raise UpweightError(
            f"the last linear layer sees {shapes} of a batch, expected [batch, features] once -> use another method"
        )
    return seen[0], outputs


@torch.no_grad()
def _all_watched(
    tracker: Tracker, task: OutputTask, module: nn.Module, batch: Any
) -> tuple[list[Tensor], Tensor]:
    """All that the layer sees of a batch, use by use, and what the model makes of it."""
    seen: list[Tensor] = []

    def see(_: nn.Module, args: Any, named: Any) -> None:
        seen.append((args[0] if args else named["input"]).detach())

    handle = module.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with tracker.quietly():
            outputs, _ = task.forward(tracker.model, batch)
    finally:
        handle.remove()
    return seen, outputs


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
        ours = module(seen)
    if not _agree(ours, outputs):
        raise UpweightError(
            f"the model's outputs are not those of its last linear layer {name}, expected nothing after it -> use "
            "another method, with parameters= to keep the rest as it is"
        )


def _check_fixed(
    tracker: Tracker, task: OutputTask, module: nn.Linear, batch: Any, seen: Tensor, name: str
) -> None:
    here = values_of(tracker.parameters)
    place(tracker.parameters, _random(tracker))
    try:
        elsewhere, _ = _watched(tracker, task, module, batch)
    finally:
        place(tracker.parameters, here)
    if not _agree(elsewhere, seen):
        raise UpweightError(
            f"what goes into the last linear layer {name} depends on its own weights, which something before it uses "
            "too, expected inputs that stay -> use another method"
        )


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors of a batch are the same but for rounding, and for axes of one."""
    if ours.numel() != theirs.numel() or len(ours) != len(theirs):
        return False
    if not ours.numel():
        return True
    ours = ours.reshape(theirs.shape)
    gap = torch.where(ours == theirs, 0.0, (ours - theirs).abs()).max()  # of equal infinities too
    size = theirs.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float(gap) <= AGREES.get(theirs.dtype, 1e-2) * (1 + float(size))


def linear_head(
    tracker: Tracker, task: Task, examples: Examples, batch_size: int, places: Sequence[Vector]
) -> Head | None:
    """The one linear layer that is tracked, if the model is linear in it and the objective so convex; else None.

    What the layer sees must not depend on its weights, and ``x W^T + b`` must be the model's outputs: computed for
    every example at the places given, and for the first batch at random weights, as equal at one place says little.

    Args:
        tracker: of the model, which is at its own weights again afterwards.
        task: its loss.
        examples: the training data.
        batch_size: examples a pass.
        places: weights at which it has to hold.
    """
    layer = _tracked_layer(tracker)
    if layer is None or not isinstance(task, OutputTask):
        return None
    name, module = layer
    here, anywhere = values_of(tracker.parameters), _random(tracker)
    inputs, targets = [], []
    try:
        for rows in examples.batches(examples.preferred_batch_size or batch_size):
            batch = tracker.move(rows.batch)
            first: Tensor | None = None
            for values in [*places, anywhere] if rows.start == 0 else places:
                place(tracker.parameters, values)
                seen, outputs = _all_watched(tracker, task, module, batch)
                if len(seen) != 1 or seen[0].ndim != 2:
                    return None
                first = seen[0] if first is None else first
                if not _agree(seen[0], first) or not _agree(_affine(module, seen[0]), outputs):
                    return None
            assert first is not None
            inputs.append(first)
            targets.append(split_batch(batch)[2])
    finally:
        place(tracker.parameters, here)
    return Head(name, module, Examples((torch.cat(inputs), torch.cat(targets)), list(examples.ids)))


def _tracked_layer(tracker: Tracker) -> tuple[str, nn.Linear] | None:
    """The `nn.Linear` whose weight and bias are all that is tracked, with its name; None if there is no such."""
    names = {full.rpartition(".")[0] for full in tracker.parameters}
    if len(names) != 1:
        return None
    (name,) = names
    module = tracker.model.get_submodule(name) if name else tracker.model
    if not isinstance(module, nn.Linear):
        return None
    own = {id(p) for p in (module.weight, module.bias)}  # not what a weight is computed from
    return (name, module) if all(id(p) in own for p in tracker.parameters.values()) else None


@torch.no_grad()
def _affine(module: nn.Linear, inputs: Tensor) -> Tensor:
    """Of the weights themselves: a class of its own, or a hook, may make something else of them."""
    return F.linear(inputs, module.weight, module.bias)


def _random(tracker: Tracker) -> Vector:
    """Weights of the size of the model's, drawn."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, p in values_of(tracker.parameters).items():
        size = float(p.square().mean().sqrt()) or 1.0
        found[name] = p + size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
    return found
