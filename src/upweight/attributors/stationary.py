"""The minimum of a convex, L2-penalised objective of one layer's weights, by Newton's method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]
"""Weights [C, d] -> losses [n], convex in the weights."""


def objective(losses: Losses, l2: float, weight: Tensor) -> Tensor:
    """``(1/n) sum_i l_i(W) + (l2/2) |W|^2``."""
    return losses(weight).mean() + l2 / 2 * weight.square().sum()


@torch.inference_mode(False)
@torch.enable_grad()
def objective_gradient(losses: Losses, l2: float, weight: Tensor) -> Tensor:
    """The objective's gradient at these weights."""
    weight = weight.detach().clone().requires_grad_(True)
    return torch.autograd.grad(objective(losses, l2, weight), weight)[0]


@torch.inference_mode(False)
@torch.enable_grad()
def minimise(losses: Losses, l2: float, start: Tensor, tolerance: float, max_iter: int) -> tuple[Tensor, int]:
    """Weights with ``|gradient| <= tolerance l2 |W|``, if Newton's method gets there, and the steps it took.

    Every step solves ``(H + l2 I) step = -gradient`` by conjugate gradients, more exactly the nearer the minimum, and
    is halved until the objective falls. Near the minimum a step is taken whole, and the gradient decides when to stop:
    there the objective's differences are rounding noise.

    Args:
        losses: of the weights.
        l2: the penalty.
        start: where to begin.
        tolerance: of the gradient.
        max_iter: most steps.
    """
    weight = start.detach().clone()
    for step_number in range(max_iter):
        leaf = weight.clone().requires_grad_(True)
        value = objective(losses, l2, leaf)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        size = float(gradient.detach().norm())
        if size <= tolerance * l2 * float(weight.norm()) or size == 0:
            return weight, step_number

        def product(x: Tensor, gradient: Tensor = gradient, leaf: Tensor = leaf) -> Tensor:
            return torch.autograd.grad(gradient, leaf, x, retain_graph=True)[0]

        step = _conjugate_gradients(product, -gradient.detach(), accuracy=min(0.1, size**0.5, 1e-2))
        weight = _descend(
            losses, l2, weight, step, float(value.detach()), float((gradient.detach() * step).sum())
        )
    return weight, max_iter


def _descend(losses: Losses, l2: float, weight: Tensor, step: Tensor, value: float, slope: float) -> Tensor:
    """The longest of ``weight + step, step/2, step/4, ...`` that lowers the objective as far as it should."""
    noise = 1e-13 * abs(value)
    with torch.no_grad():
        for halvings in range(40):
            share = 0.5**halvings
            candidate = weight + share * step
            if float(objective(losses, l2, candidate)) <= value + 1e-4 * share * slope + noise:
                return candidate
    return weight


def _conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, accuracy: float) -> Tensor:
    """The x with ``|product(x) - b| <= accuracy |b|``."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    squared = float(residual.square().sum())
    goal = accuracy**2 * squared
    for _ in range(10 * b.numel()):
        if squared <= goal:
            break
        applied = product(direction)
        length = squared / float((direction * applied).sum())
        x, residual = x + length * direction, residual - length * applied
        squared, before = float(residual.square().sum()), squared
        direction = residual + squared / before * direction
    return x
