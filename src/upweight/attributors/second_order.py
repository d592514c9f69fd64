"""How a measurement bends along a step of the parameters: ``(1/2) u^T M_q u``, M_q its own Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from upweight.gradients import Tracker

Measure = Callable[[nn.Module], Tensor]
"""``model -> measurements`` [query]."""


@torch.inference_mode(False)
@torch.enable_grad()
def bend(tracker: Tracker, measure: Measure, step: Mapping[str, Tensor]) -> Tensor:
    """``(1/2) d^2/de^2 m_q(theta + e u)`` at e = 0 for every query, [query], by reverse-mode differentiation alone.

    Args:
        tracker: of the model.
        measure: ``model -> measurements`` [query].
        step: u, {parameter name: its shape}.
    """
    wrapped = _Measured(tracker.model, measure)
    e = torch.zeros((), dtype=tracker.dtype, device=tracker.device, requires_grad=True)
    moved = {
        f"model.{name}": p.detach() + (e * step[name].to(tracker.dtype)).to(p.dtype)
        for name, p in tracker.parameters.items()
    }
    # Fused attention kernels have no second derivative; the plain one has.
    with tracker.quietly(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = torch.func.functional_call(wrapped, moved, ())
        # One number a query, to take all second derivatives apart.
        weights = torch.ones_like(measured, requires_grad=True)
        first = _slope((weights * measured).sum(), e)
        second = _slope(first, e) if first is not None else None
        bent = _slope(second, weights) if second is not None else None
    return torch.zeros_like(measured.detach()) if bent is None else bent.detach() / 2


class _Measured(nn.Module):
    def __init__(self, model: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model, self.measure = model, measure

    def forward(self) -> Tensor:
        return self.measure(self.model).reshape(-1)


def _slope(value: Tensor, into: Any) -> Tensor | None:
    if not value.requires_grad:
        return None
    return torch.autograd.grad(value, into, create_graph=True, allow_unused=True)[0]
