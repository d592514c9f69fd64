"""The tiny batches a model is traced with: which examples, what they tell about layouts, and how much they cover."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from upweight.data import Examples
from upweight.gradients.checks import autograd, check_finite, check_per_example
from upweight.gradients.operations import Layout
from upweight.gradients.tap import Tap, Use
from upweight.task import Task

if TYPE_CHECKING:
    from upweight.gradients.tracker import Tracker

CANDIDATES = 16
"""The probe is the two of the first examples with the largest losses: at a loss of zero nothing can be verified."""
OTHERS = 8
"""Examples from all over the data on which what the probe told is verified."""
AT_A_TIME = 8
"""Candidates whose losses are computed together."""


@dataclass(frozen=True)
class Coverage:
    """How much of the trainable model is tracked.

    Attributes:
        parameters: share of the trainable parameters.
        squared_norm: share of the squared norm of the training gradients of the probe examples.
        layers: {layer name: how its gradient is computed}.
    """

    parameters: float
    squared_norm: float
    layers: dict[str, str]


def pick_probe(
    model: nn.Module, task: Task, examples: Examples, names: Mapping[int, str], move: Callable[[Any], Any]
) -> tuple[tuple[int, int], tuple[int, ...] | None]:
    """Positions of the two probe examples, and the shape of one example's output (see `Task.output_shape`).

    Args:
        model: the model.
        task: the task.
        examples: training examples.
        names: {id of a parameter: its name}, for errors.
        move: brings a batch to the model's device and precision.
    """
    shape: tuple[int, ...] | None = None
    sizes: list[float] = []
    candidates = min(examples.alike, CANDIDATES)
    for start in range(0, candidates, AT_A_TIME):
        # Two at least, of which the second may repeat: a single example could hide a loss that is averaged.
        few = list(range(start, min(start + AT_A_TIME, candidates)))
        few = few if len(few) > 1 else few * 2
        ids = [examples.ids[p] for p in few]
        batch = move(examples.take(few))
        with (
            torch.no_grad(),
            Tap(names),
        ):  # a tap refuses dropout and batch statistics before they do anything
            if start == 0:
                shape = task.output_shape(model, batch)
            task.check_targets(batch, ids, shape)
            losses = task.train_loss(model, batch)[..., None]
        check_per_example(losses, len(few))
        check_finite(losses, ids, batch)
        sizes += losses[: candidates - start, 0].abs().tolist()
    order = sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True)
    return (order[0], order[min(1, len(order) - 1)]), shape


def pick_others(examples: Examples) -> list[int]:
    """Positions spread over the data, in an order that the probe, and the data as it is, do not have."""
    count = min(examples.alike, OTHERS)
    spread = [round(k * (examples.alike - 1) / max(1, count - 1)) for k in range(count)]
    return spread[1::2][::-1] + spread[::2]


def largest_losses(tracker: Tracker, examples: Examples, count: int) -> list[int]:
    """Positions of the examples with the largest losses, of eight times as many from all over the data."""
    few = sorted({round(p) for p in torch.linspace(0, examples.alike - 1, 8 * count).tolist()})
    with torch.no_grad(), tracker.quietly():
        losses = tracker.task.train_loss(tracker.model, tracker.move(examples.take(few)))
    return [few[k] for k in losses.abs().argsort(descending=True)[:count].tolist()]


def compare_layouts(
    larger: Sequence[Use], smaller: Sequence[Use]
) -> tuple[dict[Any, list[Layout]], dict[str, str]]:
    """Where the examples are in each use's output, from a batch of three and one of two; and what has no such axis."""
    lost: dict[str, str] = {}
    layouts: dict[Any, list[Layout]] = {}
    if [use.key for use in larger] != [use.key for use in smaller]:
        everyone = {name for use in (*larger, *smaller) for name in (use.weight, use.bias) if name}
        for use in (*larger, *smaller):
            layouts.setdefault(use.key, []).append(Layout(0))
        return layouts, dict.fromkeys(everyone, "a forward pass that changes with the batch size")
    for one, other in zip(larger, smaller, strict=True):
        moved = [axis for axis, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
        if len(moved) == 1 and one.shape[moved[0]] * 2 == other.shape[moved[0]] * 3:
            layouts.setdefault(one.key, []).append(Layout(moved[0]))
            continue
        layouts.setdefault(one.key, []).append(Layout(0))
        for name in (one.weight, one.bias):
            if name:
                lost[name] = "an operation whose output has no axis of examples"
    return layouts, lost


def measure_coverage(
    model: nn.Module,
    tracked: Mapping[str, Tensor],
    losses: Tensor,
    gradients: Sequence[Mapping[str, Tensor]],
    layers: dict[str, str],
) -> Coverage:
    """Coverage by the tracked parameters, from the probe's losses and their gradients in the tracked parameters."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    inside = {id(p) for p in tracked.values()}
    rest = {n: p for n, p in trainable.items() if id(p) not in inside}
    ours = sum(float(g.double().square().sum()) for grads in gradients for g in grads.values())
    others = 0.0
    if rest:
        for row in range(len(gradients)):
            others += sum(float(g.double().square().sum()) for g in autograd(losses[row, 0], rest).values())
    share = sum(p.numel() for p in tracked.values()) / sum(p.numel() for p in trainable.values())
    return Coverage(share, ours / (ours + others) if ours + others > 0 else 1.0, layers)
