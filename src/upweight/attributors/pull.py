"""The pull of one example on the outputs of a model: what it takes away when removed, what it brings when added.

    r(f) [C], S(f) [C, C]: slope and Hessian of its loss at outputs f     K [C, C]: what a pull does to its own outputs

    removed:   z = (I - S K)^-1 r     of a model that was trained on it: it takes its curvature along
    added:     z = r(f - K z)         to a model that was not: it is fitted until its loss resists

Both are exact where the model is linear in its parameters and the others' losses are quadratic; its own loss may be any
convex one. An example that is confidently wrong has a large slope and hardly any curvature, so that a Newton step from
there would go far past it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from upweight._ids import Id
from upweight.errors import UpweightError
from upweight.task import OutputTask

MOST_STEPS, HALVINGS = 100, 30
ACCURACY = 1e-10
"""Of the outputs of an added example, relative to their size."""


def removed(slope: Tensor, hessian: Tensor, own: Tensor) -> Tensor:
    """``z = (I - S K)^-1 r`` [batch, C], of r [batch, C], S and K [batch, C, C]."""
    eye = torch.eye(slope.shape[1], dtype=slope.dtype, device=slope.device)
    return torch.linalg.solve(eye - hessian @ own, slope)


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

    def off(g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        slope = gradient(task, g.view(shape), targets)
        difference = g - start + (own @ slope[..., None])[..., 0]
        return slope, difference, difference.norm(dim=1)

    slope, difference, size = off(now)
    enough = ACCURACY * (1 + start.norm(dim=1) + own.flatten(1).norm(dim=1))
    for _ in range(MOST_STEPS):
        if bool((size <= enough).all()):
            return slope
        step = torch.linalg.solve(eye + own @ curvature(task, now.view(shape)), difference)
        scale = torch.ones_like(size)
        found = off(now - step)
        for _ in range(HALVINGS):
            worse = (found[2] > size) & (size > enough)
            if not bool(worse.any()):
                break
            scale = torch.where(worse, scale / 2, scale)
            found = off(now - scale[:, None] * step)
        now, (slope, difference, size) = now - scale[:, None] * step, found
    worst = int((size / enough).argmax())
    raise UpweightError(
        f"what adding example {ids[worst]} does to its own outputs was not found in {MOST_STEPS} steps -> a larger "
        "damping, or a look at its input and target"
    )


def gradient(task: OutputTask, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss's gradient in the outputs, [batch, C]."""
    with torch.enable_grad():
        leaf = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(task.loss(leaf, targets).sum(), leaf)
    return slope.reshape(len(slope), -1)


def curvature(task: OutputTask, outputs: Tensor) -> Tensor:
    """The loss's Hessian in the outputs, [batch, C, C]."""
    root = task.hessian_root(outputs)
    return root @ root.mT
