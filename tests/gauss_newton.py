"""Gauss-Newton matrices of registered models by autograd, in the order of the engine's flat gradients."""

import oracles
import torch
from cases_all import N, track
from torch import Tensor

from upweight.gradients import Gradients, Tracker
from upweight.gradients.layers import from_parameters


def flat_order(tracker: Tracker) -> Tensor:
    """For every place in the flat order of the tracker's layers, its place in that of its parameters."""
    parameters = tracker.parameters
    order = torch.arange(float(sum(p.numel() for p in parameters.values())), dtype=torch.float64)
    parts = order.split([p.numel() for p in parameters.values()])
    named = {n: part.reshape(1, *parameters[n].shape) for n, part in zip(parameters, parts, strict=True)}
    return from_parameters(tracker.layers, named)[0].long()


def in_flat_order(tracker: Tracker, H: Tensor) -> Tensor:
    """H [p, p] in the order of the tracker's parameters, in the order of its layers' flat gradients instead."""
    rows = flat_order(tracker)
    return H[rows][:, rows]


def undone(tracker: Tracker, H: Tensor) -> Tensor:
    """The inverse of `in_flat_order`."""
    back = flat_order(tracker).argsort()
    return H[back][:, back]


def parts(case) -> tuple[Gradients, list[Gradients], list[Tensor], Tensor]:
    """Gradients, Fisher columns, every example's own Gauss-Newton matrix (by autograd), and the damped mean of all."""
    model, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    columns = tracker.fisher(batch, range(N), "exact", 1, torch.Generator())
    own = [
        in_flat_order(tracker, oracles.fisher(case.kind, model, batch, i, case.parameters)) for i in range(N)
    ]
    H = sum(own) / N
    damping = 0.05 * float(H.diagonal().mean())
    return gradients, columns, own, H + damping * torch.eye(len(H), dtype=H.dtype)
