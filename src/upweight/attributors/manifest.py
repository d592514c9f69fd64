"""What gradients and scores on disk belong to, so that those of another run are refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.attributors.base import explained_by_form
from upweight.attributors.functional import FunctionalQueries, functional_gradients
from upweight.data import Examples, signature
from upweight.fingerprint import model_fingerprint
from upweight.gradients import Tracker

if TYPE_CHECKING:
    from upweight.attributors.base import Attributor
    from upweight.attributors.influence import Influence

CONTENTS = 1
"""Rises with every version whose folders hold something else, or mean something else by it: older ones are refused."""
FEW = 8
"""Examples whose losses and measurements tell two functions of one name apart."""


def gradients_manifest(
    method: Influence | Attributor, tracker: Tracker, examples: Examples
) -> dict[str, Any]:
    """What training gradients on disk belong to: this model, this loss, these layers, this data."""
    return {
        "holds": "training gradients",
        "contents": CONTENTS,
        "model": model_fingerprint(method.model),
        "train": examples.fingerprint(),
        "n": examples.n,
        "task": method.task.name,
        "mask": method.task.mask is not None,
        "layers": {name: [layer.how, layer.numel] for name, layer in tracker.layers.items()},
        "dtype": str(tracker.dtype),
        "autocast": str(method.autocast),
    }


def scores_manifest(
    method: Influence | Attributor,
    tracker: Tracker,
    examples: Examples,
    queries: Examples | FunctionalQueries,
    per_layer: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """What scores on disk belong to: these training gradients, these queries, these settings of the method."""
    return {
        **gradients_manifest(method, tracker, examples),
        "holds": "scores",
        "queries": queries.fingerprint(),
        "measurement": str(getattr(method.task, "measurement", "function")),
        "per_layer": per_layer,
        **settings,
    }


def sample_of_task(tracker: Tracker, examples: Examples) -> list[float]:
    """What the task's functions are of a few examples: two of one name would otherwise pass for the same."""
    with torch.no_grad(), tracker.quietly():
        batch = tracker.move(examples.take(_spread(examples)))
        return tracker.task.sample(tracker.model, batch)


def sample_of_scores(
    tracker: Tracker,
    examples: Examples,
    queries: Examples | FunctionalQueries,
    out: str | os.PathLike[str] | None,
) -> dict[str, list[float]]:
    """The same and a few measurements, if scores are written to a folder, for when that run is resumed."""
    if out is None:
        return {}
    if isinstance(queries, FunctionalQueries):
        few = queries.functionals[:FEW]
        slopes = functional_gradients(tracker, few).dense().norm(dim=1)  # two may agree in their value
        measurements = [*(float(f.value(tracker.model).detach()) for f in few), *slopes.tolist()]
    else:
        batch = queries.take(_spread(queries))

        def measured() -> Tensor:
            with torch.no_grad(), tracker.quietly():
                return tracker.task.measure(tracker.model, tracker.move(batch))

        form = signature(examples.take([0]))
        measurements = [float(m) for m in explained_by_form(batch, form, measured)]
    return {"training loss": sample_of_task(tracker, examples), "measurement": measurements}


def _spread(examples: Examples) -> list[int]:
    """A few positions from all over the data."""
    n = examples.alike
    return sorted({round(k * (n - 1) / (FEW - 1)) for k in range(FEW)})
