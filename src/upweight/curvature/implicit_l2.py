"""The regulariser that trained parameters betray although nobody told it: weight decay, or stopping early.

At a minimum of ``J(theta) + (lambda/2) |theta|^2`` the gradient of J alone is ``-lambda theta``. Gradient descent from
small weights that stops after t steps at rate eta leaves nearly the same: in directions of curvature s << 1/(eta t) it
has come to ``theta = -eta t grad J``, in the others there is no gradient left (where lambda = 1/(eta t) in "A
Continuous-Time View of Early Stopping for Least Squares Regression", arXiv 1810.10082). Both are read off as

    lambda = |g|^2 / (-g . theta)        g = grad J(theta),

in which directions that training has finished do not count, for g is zero there. Initial weights and noise of the last
steps are not along g, so where theta is hardly along -g, as in networks, nothing is claimed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters

ALIGNED = 0.2
"""The least cosine of theta and -g. Seen on MNIST, from the first epoch to the last: .32 to .45 for logistic regression
from random weights, .14 and below for networks, which are as far as they are because of where they began."""


def implicit_l2(gradient: Tensor, theta: Tensor) -> float:
    """``|g|^2 / (-g . theta)`` of an objective's gradient [p] and its parameters [p], or 0 where they do not tell.

    Example:
        >>> theta = torch.tensor([3.0, -1.0])
        >>> round(implicit_l2(-0.02 * theta, theta), 6)
        0.02
        >>> implicit_l2(0.02 * theta, theta)
        0.0
    """
    gradient, theta = gradient.double(), theta.double()
    along = -float(gradient @ theta)
    if along <= ALIGNED * float(gradient.norm() * theta.norm()):
        return 0.0
    return float(gradient @ gradient) / along


def implicit_l2_of(
    tracker: Tracker, examples: Examples, batch_size: int, ridge: Tensor | None = None
) -> float:
    """The same for the mean training loss of a model, and the regulariser [p] that is known: what is left beside it.

    Cost: one forward and backward pass over the training data.
    """
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
    gradient = from_parameters(tracker.layers, mean)[0]
    theta = from_parameters(
        tracker.layers, {name: p.detach().double()[None] for name, p in parameters.items()}
    )[0]
    return implicit_l2(gradient if ridge is None else gradient + ridge.to(theta) * theta, theta)
