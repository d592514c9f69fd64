"""Losses of scikit-learn's linear models that the library's own tasks do not have."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.errors import UpweightError
from upweight.task import Batch, FisherKind, OutputTask, PerExample, Regression, split_batch


@dataclass(frozen=True)
class _Loss:
    """A function of the signed margin z = s f, with its second derivative and its unit."""

    value: Callable[[Tensor], Tensor]
    second: Callable[[Tensor], Tensor]
    unit: str


_LOSSES = {
    "squared_hinge": _Loss(
        lambda z: (1 - z).clamp_min(0).square(), lambda z: 2.0 * (z < 1).to(z), "squared hinge loss"
    ),
    "log_loss": _Loss(lambda z: F.softplus(-z), lambda z: z.sigmoid() * (-z).sigmoid(), "nats"),
    "squared_error": _Loss(
        lambda z: 0.5 * (1 - z).square(), lambda z: torch.ones_like(z), "0.5 x squared error"
    ),
}


class SignedMargins(OutputTask):
    """One classifier a class, each against the rest: ``l = sum_k phi(s_k f_k)`` with ``s_k = +1`` for the true class.

    Outputs are decision values [batch, class], or [batch, 1] for two classes; targets are class numbers [batch].

    Args:
        loss: phi: ``"squared_hinge"`` ``max(0, 1 - z)^2``, ``"log_loss"`` ``log(1 + e^-z)`` or ``"squared_error"``
            ``(1 - z)^2 / 2``.
        measurement: ``"loss"``; ``"margin"``: the true class's decision value less the largest other one (for two
            classes: signed by the true class); or a function ``(model, batch) -> [batch]``.
        higher_is_better: only for a function: whether a higher value is better.
        unit: only for a function: its unit in words.

    Example:
        >>> task = SignedMargins("squared_hinge")
        >>> task.loss(torch.tensor([[0.5], [2.0]]), torch.tensor([1, 1])).tolist()
        [0.25, 0.0]
    """

    def __init__(
        self,
        loss: str,
        measurement: str | PerExample = "loss",
        *,
        higher_is_better: bool | None = None,
        unit: str | None = None,
    ) -> None:
        self._kind, self._phi = loss, _LOSSES[loss]
        choices = {
            "loss": (self.loss, False, self._phi.unit),
            "margin": (_margin, True, "decision value"),
        }
        super().__init__(measurement, choices, higher_is_better, unit)

    @property
    def name(self) -> str:
        return f"SignedMargins({self._kind})"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._phi.value(_signs(outputs, targets) * outputs).sum(1)

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        targets = split_batch(batch)[2]
        classes = max(2, output_shape[-1] if output_shape else 2)
        wrong = (targets < 0) | (targets >= classes)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            raise UpweightError(
                f"example {ids[first]} has label {int(targets[first])}, expected 0 to {classes - 1} -> let "
                "SklearnModel.tensors number the classes"
            )

    def fisher_columns(self, model: nn.Module, batch: Batch, kind: FisherKind, draws: int) -> int:
        if kind == "sampled":
            return 0  # a margin loss has no distribution to draw from
        if kind == "exact":
            with torch.no_grad():
                return self.forward(model, batch)[0].shape[1]
        return 1

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Batch,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if kind != "exact":
            return super().pseudo_losses(model, batch, kind, draws, generator, drawn)
        outputs, targets = self.forward(model, batch)
        margins = (_signs(outputs, targets) * outputs).detach()
        return outputs * self._phi.second(margins).sqrt(), None  # the Hessian in the outputs is diagonal


class EpsilonInsensitive(Regression):
    """Squared epsilon-insensitive loss: ``sum_k max(0, |f_k - y_k| - epsilon)^2``.

    Args:
        epsilon: half the width of the tube in which an error costs nothing.
        measurement: ``"loss"``, ``"prediction"`` or a function ``(model, batch) -> [batch]``.
        higher_is_better: only for a function: whether a higher value is better.
        unit: only for a function: its unit in words.

    Example:
        >>> EpsilonInsensitive(0.5).loss(torch.tensor([[3.0]]), torch.tensor([[1.0]])).tolist()
        [2.25]
    """

    def __init__(
        self,
        epsilon: float,
        measurement: str | PerExample = "loss",
        *,
        higher_is_better: bool | None = None,
        unit: str | None = None,
    ) -> None:
        self.epsilon = epsilon
        super().__init__(1.0, measurement, higher_is_better=higher_is_better, unit=unit)
        if measurement == "loss":
            self.unit = "squared epsilon-insensitive loss"

    @property
    def name(self) -> str:
        return f"EpsilonInsensitive({self.epsilon:g})"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).abs() - self.epsilon).clamp_min(0).square().sum(1)

    def fisher_columns(self, model: nn.Module, batch: Batch, kind: FisherKind, draws: int) -> int:
        return 0 if kind == "sampled" else super().fisher_columns(model, batch, kind, draws)

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Batch,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if kind != "exact":
            return super().pseudo_losses(model, batch, kind, draws, generator, drawn)
        outputs, targets = self.forward(model, batch)
        outside = (outputs - targets).detach().abs() > self.epsilon
        return outputs * (math.sqrt(2.0) * outside.to(outputs)), None


def _signs(outputs: Tensor, targets: Tensor) -> Tensor:
    """+1 for the true class and -1 for the others, in the shape of the outputs."""
    if outputs.ndim != 2 or targets.ndim != 1:
        raise UpweightError(
            f"decision values have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected "
            "[batch, class] and [batch] -> let SklearnModel.tensors make the targets"
        )
    targets = targets.long()
    if outputs.shape[1] == 1:
        return (2 * targets - 1).to(outputs)[:, None]
    return 2 * F.one_hot(targets, outputs.shape[1]).to(outputs) - 1


def _margin(outputs: Tensor, targets: Tensor) -> Tensor:
    if outputs.shape[1] == 1:
        return (_signs(outputs, targets) * outputs)[:, 0]
    own = outputs.gather(1, targets[:, None])[:, 0]
    return own - outputs.scatter(1, targets[:, None], -math.inf).amax(1)
