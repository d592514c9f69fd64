"""Gauss-Newton matrices of registered models by autograd, in the order of the engine's flat gradients."""

import oracles
import torch
import torch.nn.functional as F
from cases_all import N, track
from torch import Tensor, nn

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


def dense_by_autograd(model: nn.Module, train, query, curvature: str) -> tuple[Tensor, Tensor, Tensor]:
    """A classifier's H [p, p], training gradients [n, p] and query gradients [q, p], in the parameters' order."""
    names = dict(model.named_parameters())
    at = torch.cat([p.detach().flatten() for p in names.values()])

    def outputs(flat: Tensor, x: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in names.values()])
        moved = {n: part.reshape(p.shape) for (n, p), part in zip(names.items(), parts, strict=True)}
        return torch.func.functional_call(model, moved, (x,))

    def losses(flat: Tensor, batch) -> Tensor:
        return F.cross_entropy(outputs(flat, batch[0]), batch[1], reduction="none")

    G, V = (torch.func.jacrev(losses)(at, batch) for batch in (train, query))
    if curvature == "hessian":
        return torch.func.hessian(lambda flat: losses(flat, train).mean())(at), G, V
    J = torch.func.jacrev(lambda flat: outputs(flat, train[0]))(at)  # [n, class, p]
    p = outputs(at, train[0]).softmax(1)
    inner = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", J, inner, J) / len(G), G, V
