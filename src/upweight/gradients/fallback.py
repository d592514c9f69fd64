"""The exact gradient of any parameter, however it is used: torch.func where it applies, else one example at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight.data import map_tensors, tensors_in

Scalars = Callable[[nn.Module, Any, Tensor | None], tuple[Tensor, Tensor | None]]
"""``(model, batch, drawn targets) -> (scalars [batch, columns], drawn targets)``."""


class _Objective(nn.Module):
    """A module whose forward is the user's objective, so that `functional_call` can swap the model's parameters."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.function = _shadow(model), function

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(self.model, *arguments)


def with_parameters(
    model: nn.Module, parameters: Mapping[str, Tensor], loss: Callable[[nn.Module, Any], Tensor], batch: Any
) -> Tensor:
    """``loss(model, batch)`` with these parameters in place of the model's own, which is left alone."""
    moving = {f"model.{name}": p for name, p in parameters.items()}
    return torch.func.functional_call(_Objective(model, loss), moving, (batch,))


def _shadow(model: nn.Module) -> nn.Module:
    """The model's modules again, around the same tensors: what a forward pass writes to attributes stays on them.

    A model that keeps its features (``self.features = h``) would otherwise be left with a tensor of a finished vmap.
    """
    copies: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            twin = copies[id(module)] = type(module).__new__(type(module))
            twin.__dict__ = module.__dict__.copy()
            twin._parameters, twin._buffers = module._parameters.copy(), module._buffers.copy()
            twin._modules = {n: None if m is None else copied(m) for n, m in module._modules.items()}
        return copies[id(module)]

    return copied(model)


def vmapped(
    model: nn.Module, parameters: Mapping[str, Tensor], scalars: Scalars, batch: Any, drawn: Tensor | None
) -> dict[str, Tensor]:
    """Per-example gradients {name: [columns, batch, numel]} by `torch.func`, all examples at once.

    Raises:
        RuntimeError: whatever torch.func says of a model it cannot vectorise (recurrent kernels, data-dependent flow).
    """
    objective = _Objective(model, lambda shadow, b, t: scalars(shadow, b, t)[0][0])
    leaves = list(tensors_in(batch))

    def of_example(moving: dict[str, Tensor], parts: list[Tensor], drawn_part: Tensor | None) -> Tensor:
        remaining = iter(parts)
        example = map_tensors(batch, lambda _: next(remaining)[None])
        targets = drawn_part[None] if drawn_part is not None else None
        return torch.func.functional_call(objective, moving, (example, targets))  # [columns]

    moving = {f"model.{name}": p.detach() for name, p in parameters.items()}
    per_example = torch.func.vmap(torch.func.jacrev(of_example), (None, 0, None if drawn is None else 0))
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
    ):  # of operations that torch.func runs one example at a time
        warnings.simplefilter("ignore")
        jacobians = per_example(moving, leaves, drawn)
    return {name: jacobians[f"model.{name}"].transpose(0, 1).flatten(2).detach() for name in parameters}


def looped(losses: Tensor, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same from an existing graph of losses [batch, columns]: one backward pass an example and column."""
    batch, columns = losses.shape
    tensors: Sequence[Tensor] = list(parameters.values())
    out = {
        name: torch.zeros(columns, batch, p.numel(), dtype=p.dtype, device=p.device)
        for name, p in parameters.items()
    }
    for b in range(batch):
        for c in range(columns):
            grads = torch.autograd.grad(losses[b, c], tensors, retain_graph=True, allow_unused=True)
            for name, grad in zip(parameters, grads, strict=True):
                if grad is not None:
                    out[name][c, b] = grad.to_dense().reshape(-1)
    return out
