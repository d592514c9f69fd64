"""The pull of one example on the outputs of a model: what it takes away when removed, what it brings when added.

    r(f) [C], S(f) [C, C]: slope and Hessian of its loss at outputs f     K [C, C]: what a pull does to its own outputs

    removed:   z = (I - S K)^-1 r     of a model that was trained on it: it takes its curvature along
    added:     z = r(f - K z)         to a model that was not: it is fitted until its loss resists

The first is solved in `upweight.attributors.output_space`, whose numbers make it accurate. Both are exact where the
model is linear in its parameters and the others' losses are quadratic; its own loss may be any convex one. An example
that is confidently wrong has a large slope and hardly any curvature, so that a Newton step from there would go far past
it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upweight._ids import Id
from upweight.errors import UpweightError
from upweight.task import OutputTask

MOST_STEPS, HALVINGS = 200, 60
ENOUGH = 1e-4
"""A step must take away this share of what it promises."""
ACCURACY, ROUNDING = 1e-10, 1e-13
"""Of what an example does to its own outputs, relative to that; and to the outputs, which cannot be told better."""


def added(task: OutputTask, outputs: Tensor, targets: Tensor, own: Tensor, ids: Sequence[Id]) -> Tensor:
    """``z = r(f - K z)`` [batch, C]: the loss's gradient where its pull on the outputs and theirs on it agree.

    Newton's method on ``g - f + K r(g) = 0``, with steps halved until they help.

    Args:
        task: whose loss it is.
        outputs: f [batch, ...] without the example.
        targets: its targets.
        own: K [batch, C, C].
        ids: names of the examples, for an error.
    """
    shape = outputs.shape
    start = outputs.reshape(len(outputs), -1)
    now = start.clone()
    eye = torch.eye(start.shape[1], dtype=start.dtype, device=start.device)

    def off(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slope = gradient(task, g.view(shape), targets)
        own_pull = (own @ slope[..., None])[..., 0]
        difference = g - start + own_pull
        enough = ACCURACY * own_pull.norm(dim=1) + ROUNDING * (start.norm(dim=1) + g.norm(dim=1))
        return slope, difference, difference.norm(dim=1), enough

    slope, difference, size, enough = off(now)
    for _ in range(MOST_STEPS):
        step = torch.linalg.solve(eye + own @ curvature(task, now.view(shape)), difference)
        limit = ROUNDING * (
            start.norm(dim=1) + now.norm(dim=1)
        )  # a large K makes any rounding of g a large difference
        left = (size > enough) & (step.norm(dim=1) > limit)
        if not bool(left.any()):
            return slope
        step = torch.where(left[:, None], step, 0)
        scale = torch.ones_like(size)
        found = off(now - step)
        for _ in range(HALVINGS):
            worse = (found[2] > (1 - ENOUGH * scale) * size) & left
            if not bool(worse.any()):
                break
            scale = torch.where(worse, scale / 2, scale)
            found = off(now - scale[:, None] * step)
        now, (slope, difference, size, enough) = now - scale[:, None] * step, found
    worst = int((size / enough).argmax())
    raise UpweightError(
        f"what adding example {ids[worst]} does to its own outputs was not found in {MOST_STEPS} steps -> a larger "
        "damping, or a look at its input and target"
    )


def gradient(task: OutputTask, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss's gradient in the outputs, [batch, C]."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        targets = targets.clone()
        (slope,) = torch.autograd.grad(task.loss(leaf, targets).sum(), leaf)
    return slope.reshape(len(slope), -1)


def curvature(task: OutputTask, outputs: Tensor) -> Tensor:
    """The loss's Hessian in the outputs, [batch, C, C]."""
    root = task.hessian_root(outputs)
    return root @ root.mT
