"""The end of a network as a problem of its own, where all before it stays as it is: what goes into it is computed once.

With ``parameters=`` that name only later layers of an `nn.Sequential`, every pass over the data would run the same
earlier layers to the same end. Their outputs are kept instead, and the repair works on the later layers, which are the
model's own: moving them moves the model.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import nn

from upweight.budget import parse_memory
from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.repair.head import watched
from upweight.task import OutputTask, Task
from upweight.task.outputs import split_batch

SHARE = 0.25
"""Of the memory budget, for what goes into the tail."""


@dataclass(frozen=True)
class Tail:
    """The model's later layers under their own names, and (what goes into them, targets) of the training data."""

    module: nn.Sequential
    examples: Examples


def find_tail(
    tracker: Tracker, task: Task, examples: Examples, batch_size: int, memory: int | str
) -> Tail | None:
    """The model from its first layer with tracked parameters on; None where that gains nothing, or cannot be had.

    Args:
        tracker: of the whole model.
        task: its loss.
        examples: the training data.
        batch_size: examples a pass.
        memory: budget for everything.

    Cost: a forward pass through the layers before.
    """
    model = tracker.model
    if type(model) is not nn.Sequential or not isinstance(task, OutputTask):
        return None
    tracked = {id(p) for p in tracker.parameters.values()}
    children = list(model._modules.items())
    holds = [any(id(p) in tracked for p in child.parameters()) for _, child in children if child is not None]
    first = holds.index(True) if True in holds else 0
    if not any(
        True for _, child in children[:first] for _ in child.parameters()
    ):  # nothing costly comes before
        return None
    later = [child for _, child in children[first:]]
    if any(child is other for child in later for _, other in children[:first]):  # a layer that is used twice
        return None
    inputs, targets, used = [], [], 0
    for rows in examples.batches(examples.preferred_batch_size or batch_size):
        batch = tracker.move(rows.batch)
        seen = watched(tracker, task, later[0], batch)
        if seen is None:
            return None
        used += seen.nbytes
        expected = used * examples.n / rows.stop
        if expected > SHARE * parse_memory(memory):
            return None
        inputs.append(seen)
        targets.append(split_batch(batch)[2])
    if len({t.shape[1:] for t in inputs}) > 1:  # sequences of several lengths
        return None
    kept = Examples((torch.cat(inputs), torch.cat(targets)), list(examples.ids))
    return Tail(nn.Sequential(OrderedDict(children[first:])).train(model.training), kept)
