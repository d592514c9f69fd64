"""How far a linear model's repaired weights can be from the changed objective's minimum, and the noise that hides it.

With outputs ``z_i = W x_i``, per-example losses l(z_i, y_i) and an L2 regulariser, the gradient of the changed
objective J' after a step U is, by Taylor's theorem with the remainder as an integral,

    grad J'(W + U) = grad J'(W) + H' U + (1/N) sum_i w_i e_i x_i^T,
    e_i = int_0^1 [l''(z_i + t d_i) - l''(z_i)] d_i dt,      d_i = U x_i.

Where ``|l''(z + d) - l''(z)| <= gamma |d|``, ``|e_i| <= (gamma/2) |d_i|^2``, and so

    |grad J'(W + U)| <= |grad J'(W) + H' U| + (gamma / 2N) |X| sqrt(sum_i w_i |d_i|^4),

with |X| the largest singular value of the rows ``sqrt(w_i) x_i``. The first term is what the linear system was
solved to (damping included), the second what the objective bends. Constants: gamma is the largest third derivative
of the loss in a unit direction (a symmetric trilinear form is largest on its diagonal, Banach),

    regression 0;  logistic 1/(6 sqrt 3);  softmax sqrt(2)/(3 sqrt 3)

the last as the third central moment of a variable of range r is at most ``r^3/(6 sqrt 3)``, and the logits' range is at
most sqrt 2 along a unit direction. (The source has gamma = 1/4 for the logistic loss and no factor 1/2: both are
looser.)

A bound b on the gradient of the **sum** ``N J'`` certifies removal: if training added ``p . w`` to that sum, with p
drawn from N(0, sigma^2 I) and ``sigma >= c b / epsilon``, then the weights of retraining and of the repair are
(epsilon, delta)- indistinguishable for ``delta = 1.5 exp(-c^2 / 2)``, epsilon <= 1.

Source: "Certified Data Removal from Machine Learning Models" (arXiv 1911.03030), theorems 1 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.task import BinaryClassification, Classification, Regression, Task

LOGISTIC = 1 / (6 * math.sqrt(3))
SOFTMAX = math.sqrt(2) / (3 * math.sqrt(3))


@dataclass(frozen=True)
class Certificate:
    """A bound on the changed objective's gradient after a repair.

    Attributes:
        bound: on ``|grad J'|`` after the repair, from what was known before its last step was taken.
        measured: ``|grad J'|`` as computed afterwards.
        solved: the bound's first part, what the step's linear system left.
        bent: the second, what the objective bends along the step.
        gamma: the loss's largest third derivative.
        examples: N, by which the objective divides.
    """

    bound: float
    measured: float
    solved: float
    bent: float
    gamma: float
    examples: float

    def noise_scale(self, epsilon: float = 1.0, delta: float = 1e-5) -> float:
        """Standard deviation of the linear term of the *summed* objective that makes the repair a certified removal.

        Args:
            epsilon: in (0, 1].
            delta: in (0, 1).

        Raises:
            UpweightError: no such guarantee.

        Example:
            >>> round(Certificate(1e-6, 1e-7, 0.0, 1e-6, LOGISTIC, 1000.0).noise_scale(1.0, 1e-4), 5)
            0.00439
        """
        if not 0 < epsilon <= 1 or not 0 < delta < 1:
            raise UpweightError(
                f"epsilon={epsilon!r} and delta={delta!r}, expected 0 < epsilon <= 1 and 0 < delta < 1 -> "
                "epsilon=1, delta=1e-5 for example"
            )
        c = math.sqrt(2 * math.log(1.5 / delta))
        return c * self.bound * self.examples / epsilon

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "bound": self.bound,
            "measured": self.measured,
            "solved": self.solved,
            "bent": self.bent,
            "gamma": self.gamma,
            "N": self.examples,
            "noise_scale": {"epsilon": 1.0, "delta": 1e-5, "sigma": self.noise_scale()},
            "note": "certified only if training added p . w to the summed objective, p ~ N(0, sigma^2 I)",
        }


def gamma_of(task: Task) -> float | None:
    """The loss's largest third derivative in a unit direction of the outputs; None where it is not known."""
    if type(task) is Classification:
        return SOFTMAX
    if type(task) is BinaryClassification:
        return LOGISTIC
    return 0.0 if type(task) is Regression else None


def bend_bound(inputs: Tensor, moved: Tensor, weights: Tensor, gamma: float, divisor: float) -> float:
    """``(gamma / 2N) |X| sqrt(sum_i w_i |d_i|^4)``.

    Args:
        inputs: x_i [n, d], a constant 1 among them where there is a bias.
        moved: d_i [n, outputs].
        weights: w_i [n].
        gamma: the loss's largest third derivative.
        divisor: N.
    """
    rows = inputs.double() * weights.double().sqrt()[:, None]
    # The singular value from the smaller Gram matrix; a hair more, for rounding.
    gram = rows.mT @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.mT
    largest = math.sqrt(float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0)))
    fourth = float((weights.double() * moved.double().square().sum(1).square()).sum())
    return gamma / (2 * divisor) * largest * math.sqrt(fourth) * (1 + 1e-9)
