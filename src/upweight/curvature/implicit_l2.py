"""The regulariser that trained weights betray although nobody told it: weight decay, or stopping early.

At a minimum of ``J(theta) + (lambda/2) |theta|^2`` the gradient of J alone is ``-lambda theta``. Gradient descent from
small weights that stops after t steps at rate eta leaves nearly the same: in directions of curvature s << 1/(eta t) it
has come to ``theta = -eta t grad J``, in the others there is no gradient left (where lambda = 1/(eta t) in "A
Continuous-Time View of Early Stopping for Least Squares Regression", arXiv 1810.10082). Both are read off as

    lambda = |F g|^2 / (-F g . F theta)      g = grad J(theta),  F = lambda (H + lambda I)^-1,

a fixed point: F leaves the directions in which lambda outweighs the data. In the others the gradient is the noise of
the last steps, whose weight would be their curvature.

Of matrices only, biases and norms having no weight decay often and starting anywhere. And nothing is claimed where the
two filtered vectors are not along each other, as in networks, whose weights are mostly what they began with.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from upweight.curvature.curvature import Curvature, Inverse
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.krylov import KrylovSteps
from upweight.data import Examples
from upweight.gradients import Gradients, Tracker
from upweight.gradients.blocks import Dense
from upweight.gradients.layers import from_parameters

ALIGNED, CHANCE = 0.15, 2.2
"""The least cosine of F theta and -F g, and that in standard deviations 1 / sqrt(p) of a chance one. Seen with an early
stop or a regulariser: .18 to .46 on MNIST from random weights (p = 7,840), .75 and above on small linear models from
zero, which had .32 and below with noise alone."""
ROUNDS = 50
SETTLED = 1e-6
"""Relative change of lambda after which it is found."""

Filter = Callable[[float], tuple[Tensor, Tensor]]
"""lambda -> F g and F theta."""


def implicit_l2(gradient: Tensor, theta: Tensor, filtered: Filter) -> float:
    """The regulariser of an objective's gradient [p] and its parameters [p], or 0 where they do not tell.

    Example:
        >>> theta, s = torch.arange(1.0, 9.0), torch.linspace(0.1, 4.0, 8)
        >>> g = -0.02 * theta
        >>> round(implicit_l2(g, theta, lambda d: (d / (s + d) * g, d / (s + d) * theta)), 6)
        0.02
        >>> implicit_l2(-g, theta, lambda d: (-g, theta))
        0.0
    """
    found, aligned = _ratio(gradient, theta)
    least = max(ALIGNED, CHANCE / max(1, int(theta.count_nonzero())) ** 0.5)
    if aligned < ALIGNED:
        return 0.0
    for _ in range(ROUNDS):
        before = found
        found, aligned = _ratio(*filtered(before))
        if found == 0 or abs(found - before) <= SETTLED * before:
            break
    return found if aligned >= least else 0.0


def _ratio(g: Tensor, theta: Tensor) -> tuple[float, float]:
    """``|g|^2 / (-g . theta)``, and the cosine of theta and -g; zeros where it is not positive."""
    along, squared = -float(g @ theta), float(g @ g)
    if not along > 0:
        return 0.0, 0.0
    return squared / along, along / (squared * float(theta @ theta)) ** 0.5


def implicit_l2_beside(operator: ExactCurvature) -> float:
    """What is left beside the `l2` that an exact curvature was told.

    Cost: 32 products with two vectors, and one forward and backward pass over the training data.
    """
    g, theta, matrices = _stationarity(operator.tracker, operator.data, operator.batch_size, operator.ridge)
    g, theta = g * matrices, theta * matrices
    if not (g.any() and theta.any()):
        return 0.0
    steps = KrylovSteps.of(operator, torch.stack([g, theta], 1))

    def filtered(damping: float) -> tuple[Tensor, Tensor]:
        left = damping * steps.at(damping) * matrices[:, None]
        return left[:, 0], left[:, 1]

    found = implicit_l2(g, theta, filtered)
    return 0.0 if found <= -2 * steps.smallest else found  # a Hessian that is far from positive is no filter


def implicit_l2_of_layer(
    curvature: Curvature, tracker: Tracker, examples: Examples, batch_size: int
) -> float:
    """The same of a structured curvature of a single layer.

    Cost: one forward and backward pass over the training data.
    """
    g, theta, matrices = _stationarity(tracker, examples, batch_size)
    g, theta = g * matrices, theta * matrices
    (name,) = tracker.layers

    def filtered(damping: float) -> tuple[Tensor, Tensor]:
        block = Gradients({name: Dense(torch.stack([g, theta]).to(tracker.dtype))})
        left = damping * (Inverse(curvature, {name: damping}) @ block)[name].dense().double() * matrices
        return left[0], left[1]

    return implicit_l2(g, theta, filtered)


def _stationarity(
    tracker: Tracker, examples: Examples, batch_size: int, ridge: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``grad J``, theta and which parameters are of matrices, all [p]; J is the mean loss, with the ridge [p] told."""
    parameters = tracker.parameters
    mean = {name: torch.zeros_like(p, dtype=torch.float64)[None] for name, p in parameters.items()}
    with torch.inference_mode(False), torch.enable_grad():
        for rows in examples.batches(batch_size):
            with tracker.quietly():
                loss = tracker.task.train_loss(tracker.model, tracker.move(rows.batch)).sum()
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, g in zip(parameters, found, strict=True):
                if g is not None:
                    mean[name][0] += g / examples.n
    thetas = {name: p.detach().double()[None] for name, p in parameters.items()}
    kinds = {name: torch.full_like(p, p.ndim > 2) for name, p in thetas.items()}
    gradient, theta, matrices = (from_parameters(tracker.layers, named)[0] for named in (mean, thetas, kinds))
    return gradient if ridge is None else gradient + ridge.to(theta) * theta, theta, matrices
