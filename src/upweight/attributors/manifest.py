"""What gradients and scores on disk belong to, so that those of another run are refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.attributors.base import explained_by_form
from upweight.attributors.functional import FunctionalQueries
from upweight.data import Examples, signature
from upweight.fingerprint import model_fingerprint
from upweight.gradients import Tracker

if TYPE_CHECKING:
    from upweight.attributors.base import Attributor
    from upweight.attributors.influence import Influence

FIRST = 8
"""Examples whose losses and measurements tell two functions of one name apart."""


def gradients_manifest(
    method: Influence | Attributor, tracker: Tracker, examples: Examples
) -> dict[str, Any]:
    """What training gradients on disk belong to: this model, this loss, these layers, this data."""
    return {
        "holds": "training gradients",
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


def first_losses(tracker: Tracker, examples: Examples) -> list[float]:
    """Training losses of the first few examples: two losses of one name would otherwise pass for the same."""
    with torch.no_grad(), tracker.quietly():
        batch = tracker.move(examples.take(range(min(examples.n, FIRST))))
        return [float(loss) for loss in tracker.task.train_loss(tracker.model, batch)]


def first_values(
    tracker: Tracker,
    examples: Examples,
    queries: Examples | FunctionalQueries,
    out: str | os.PathLike[str] | None,
) -> dict[str, list[float]]:
    """The first losses and measurements, if scores are written to a folder, for when that run is resumed."""
    if out is None:
        return {}
    if isinstance(queries, FunctionalQueries):
        measurements = [float(f.value(tracker.model).detach()) for f in queries.functionals[:FIRST]]
    else:
        batch = queries.take(range(min(queries.n, FIRST)))

        def measured() -> Tensor:
            with torch.no_grad(), tracker.quietly():
                return tracker.task.measure(tracker.model, tracker.move(batch))

        form = signature(examples.take([0]))
        measurements = [float(m) for m in explained_by_form(batch, form, measured)]
    return {"training loss": first_losses(tracker, examples), "measurement": measurements}
