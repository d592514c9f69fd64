"""Plain training loops, on one thread: batches are cut from index tables, and nothing else is in the loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Checkpoint = tuple[dict[str, Tensor], float]
"""Weights, and the learning rate with which they were trained."""


def sgd(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    seed: int,
    rate: float,
    momentum: float,
    decay: float,
    batch: int,
    epochs: int,
    keep_after: Sequence[int] = (),
    schedule: Callable[[float], float] | None = None,
) -> list[Checkpoint]:
    """Train `model` in place by SGD with momentum; the order of the data is the seed's.

    `decay` is added to the gradient as decay * theta: the objective is the mean loss + (decay/2) ||theta||^2. A last
    batch that is not full is left out of its epoch, as every epoch has another order. The rate is constant, or times
    `schedule` of the share of all steps that are done.

    Returns:
        Checkpoints after the epochs in `keep_after`.
    """
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=decay, fused=True)
    steps = max(1, len(y) // batch)
    kept: list[Checkpoint] = []
    model.train()
    done = 0
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(y), generator=generator)[: steps * batch]
        for chosen in order.split(batch):
            if schedule is not None:
                optimizer.param_groups[0]["lr"] = rate * schedule(done / (steps * epochs))
            done += 1
            optimizer.zero_grad()
            loss(model(x[chosen]), y[chosen]).backward()
            optimizer.step()
        if epoch in keep_after:
            now = optimizer.param_groups[0]["lr"]
            kept.append(({k: v.detach().clone() for k, v in model.state_dict().items()}, now))
    model.eval()
    return kept
