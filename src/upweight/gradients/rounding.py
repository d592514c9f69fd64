"""Parameters without effect, whose gradients are what rounding leaves of zero.

A bias before a normalisation, or one of attention's keys, changes nothing. How small its gradient is tells nothing:
behind a layer that scales by 1e-6 a gradient is as small, and as exact as any. But what is only rounding changes
altogether when the weights change in their last digits.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from upweight.gradients.checks import autograd
from upweight.gradients.fallback import with_parameters
from upweight.gradients.probe import largest_losses

if TYPE_CHECKING:
    from upweight.data import Examples
    from upweight.gradients.tracker import Tracker

EXAMPLES = 4
"""Examples whose gradients are looked at, those of large losses."""
DIGITS = 2
"""Units in the last place that weights are moved by."""
ALTOGETHER = 0.5
"""A gradient that changes by this share of its norm is not known."""


def without_effect(tracker: Tracker, examples: Examples, layers: Sequence[str]) -> list[str]:
    """Those of these layers whose gradients are rounding.

    Args:
        tracker: of the model.
        examples: the training data, of which a few are looked at.
        layers: names to look at.

    Returns:
        The names. None of them, with a warning, if the model cannot be run with other weights than its own.
    """
    if not layers:
        return []
    batch = tracker.move(examples.take(largest_losses(tracker, examples, EXAMPLES)))
    try:
        here, there = (_gradient(tracker, batch, k * torch.finfo(tracker.computes).eps) for k in (0, DIGITS))
    except Exception as error:  # torch.func refuses in many ways
        warnings.warn(
            f"the gradients of {', '.join(layers)} are so small that they may be only rounding, and the model cannot "
            f"be run with other weights to find out ({error}) -> leave out by parameters= what has no effect",
            stacklevel=2,
        )
        return []
    change = {name: there[name] - gradient for name, gradient in here.items()}

    def norm(layer: str, of: Mapping[str, Tensor]) -> float:
        parts = (of[name].double().square().sum() for name in tracker.layers[layer].parameters)
        return math.sqrt(sum(map(float, parts)))

    return [layer for layer in layers if norm(layer, change) > ALTOGETHER * norm(layer, here)]


@torch.inference_mode(False)
@torch.enable_grad()
def _gradient(tracker: Tracker, batch: object, moved_by: float) -> dict[str, Tensor]:
    """The gradient of a sum of losses with weights moved by this share, up or down at random."""
    generator = torch.Generator().manual_seed(0)
    moved = {}
    for name, p in tracker.parameters.items():
        signs = torch.randint(0, 2, p.shape, generator=generator).to(p) * 2 - 1
        moved[name] = (p.detach() * (1 + moved_by * signs)).requires_grad_()
    with tracker.quietly(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of recurrent weights that are not in one piece
        losses = with_parameters(tracker.model, moved, tracker.task.train_loss, batch)
        return autograd(losses.sum(), moved)
