"""The tasks most models were trained for: classification, binary classification, regression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from upweight.errors import UpweightError
from upweight.task.base import Batch, PerExample
from upweight.task.outputs import OutputTask, split_batch, uniform


class Classification(OutputTask):
    """Cross-entropy over classes: outputs are logits [batch, class], targets are class numbers [batch].

    Args:
        measurement: what is asked of a query. ``"loss"``: cross-entropy in nats; ``"margin"``: the log-odds of the true
            class ``log p/(1-p)``; ``"logit"``: the true class's logit; or any function ``(model, batch) -> [batch]``.
        higher_is_better: only for a function: whether a higher value is better.
        unit: only for a function: its unit in words.

    Example:
        >>> import torch, upweight as uw
        >>> task = uw.Classification(measurement="margin")
        >>> task.higher_is_better, task.unit
        (True, 'log-odds')
        >>> model = torch.nn.Linear(4, 3)
        >>> task.measure(model, (torch.ones(2, 4), torch.tensor([0, 2]))).shape
        torch.Size([2])
    """

    def __init__(
        self,
        measurement: str | PerExample = "loss",
        *,
        higher_is_better: bool | None = None,
        unit: str | None = None,
    ) -> None:
        choices = {
            "loss": (self.loss, False, "nats"),
            "margin": (_class_margin, True, "log-odds"),
            "logit": (_class_logit, True, "logit"),
        }
        super().__init__(measurement, choices, higher_is_better, unit)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return _rounded_once(F.cross_entropy(_double(outputs), targets, reduction="none"), outputs)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.ndim != 2 or targets.ndim != 1:
            raise UpweightError(
                f"logits have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected [batch, class] "
                "and [batch] -> use Task.from_functions for other losses (per token, multi-label)"
            )
        if targets.is_floating_point() or targets.is_complex():
            raise UpweightError(
                f"class targets have dtype {targets.dtype}, expected integers -> targets.long()"
            )
        return outputs, targets.long()

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        targets = split_batch(batch)[2]
        if targets.ndim != 1 or targets.is_complex():
            return  # no class numbers: the outputs' check says so
        targets = (
            targets if targets.is_floating_point() else targets.long()
        )  # unsigned ones cannot be compared
        classes = output_shape[-1] if output_shape else 0
        wrong = (targets < 0) | (targets >= classes)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            raise UpweightError(
                f"example {ids[first]} has label {int(targets[first])}, expected 0 to {classes - 1} (the model has "
                f"{classes} outputs) -> number the classes from 0, or drop the example"
            )

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T = L L^T`` with C-1 columns.

        ``L = diag(u) Q`` with u = sqrt(p) and Q an orthonormal basis of u's complement, which is a Householder
        reflection without the column that it maps onto u.
        """
        u = outputs.softmax(1).sqrt()  # [batch, class]
        w = u.clone()
        w[:, -1] += 1.0
        w = w / w.norm(dim=1, keepdim=True)
        basis = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) - 2 * w[:, :, None] * w[:, None, :]
        return u[:, :, None] * basis[:, :, :-1]

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        cumulative = outputs.double().softmax(1).cumsum(1)
        drawn = torch.searchsorted(cumulative, uniform(outputs, draws, generator))
        return drawn.clamp_max(outputs.shape[1] - 1)  # the last cumulative value may round to just under 1


class BinaryClassification(OutputTask):
    """Logistic loss on one logit an example: outputs [batch] or [batch, 1], targets 0 or 1.

    Args:
        measurement: ``"loss"`` in nats, ``"margin"`` or ``"logit"`` (the logit, signed by the true class), or a
            function.
        higher_is_better: only for a function: whether a higher value is better.
        unit: only for a function: its unit in words.

    Example:
        >>> import torch, upweight as uw
        >>> task = uw.BinaryClassification()
        >>> task.loss(torch.zeros(2), torch.tensor([0.0, 1.0])).tolist() == [0.6931471824645996] * 2
        True
    """

    def __init__(
        self,
        measurement: str | PerExample = "loss",
        *,
        higher_is_better: bool | None = None,
        unit: str | None = None,
    ) -> None:
        def signed(outputs: Tensor, targets: Tensor) -> Tensor:
            return outputs * (2 * targets - 1)

        choices = {
            "loss": (self.loss, False, "nats"),
            "margin": (signed, True, "log-odds"),
            "logit": (signed, True, "log-odds"),
        }
        super().__init__(measurement, choices, higher_is_better, unit)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        wide = _double(outputs)
        return _rounded_once(
            F.binary_cross_entropy_with_logits(wide, targets.to(wide), reduction="none"), outputs
        )

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # model(x).squeeze() of one example has no axis left.
        outputs, targets = torch.atleast_1d(outputs, targets)
        if outputs.numel() != len(outputs) or targets.numel() != len(outputs):
            raise UpweightError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected one logit and "
                "one target an example -> use Classification for one of several classes; for several labels an example "
                "Task.from_functions with their summed losses"
            )
        return outputs.reshape(-1), targets.reshape(-1).to(outputs.dtype)

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        targets = split_batch(batch)[2]
        if targets.numel() != len(ids):
            return  # not one an example: the outputs' check says so
        targets = targets.reshape(-1)
        wrong = (targets != 0) & (targets != 1)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            seen = float(targets[first])
            raise UpweightError(f"example {ids[first]} has target {seen:g}, expected 0 or 1 -> recode it")

    def hessian_root(self, outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt().reshape(-1, 1, 1)

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        return (uniform(outputs, draws, generator) < outputs.double().sigmoid()[:, None]).to(outputs.dtype)


class Regression(OutputTask):
    """Squared error: loss ``scale * ||f - y||^2`` summed over outputs, for outputs and targets of one shape.

    Args:
        scale: 0.5 for the half squared error (the default), 1 for the squared error, ``1/k`` for `nn.MSELoss` over k
            outputs. Scores are in this loss's unit.
        measurement: ``"loss"``, ``"prediction"`` (the sum of the outputs), or a function ``(model, batch) -> [batch]``.
        higher_is_better: only for a function: whether a higher value is better.
        unit: only for a function: its unit in words.

    Example:
        >>> import torch, upweight as uw
        >>> uw.Regression().loss(torch.tensor([[3.0]]), torch.tensor([[1.0]])).tolist()
        [2.0]
    """

    def __init__(
        self,
        scale: float = 0.5,
        measurement: str | PerExample = "loss",
        *,
        higher_is_better: bool | None = None,
        unit: str | None = None,
    ) -> None:
        if not scale > 0:
            raise UpweightError(f"scale={scale} must be positive -> 0.5 for the half squared error")
        self.scale = scale
        choices = {
            "loss": (self.loss, False, "squared error" if scale == 1 else f"{scale:g} x squared error"),
            "prediction": (lambda outputs, targets: outputs.flatten(1).sum(1), True, "output"),
        }
        super().__init__(measurement, choices, higher_is_better, unit)

    @property
    def name(self) -> str:
        return f"Regression(scale={self.scale:g})"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (outputs - targets).flatten(1).square().sum(1)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # model(x).squeeze() of one example has no axis left.
        outputs, targets = torch.atleast_1d(outputs, targets)
        if len(outputs) != len(targets) or _wide_axes(outputs) != _wide_axes(targets):
            raise UpweightError(
                f"outputs have shape {tuple(outputs.shape)} but targets {tuple(targets.shape)}, expected one shape -> "
                "reshape the targets (a silent broadcast would change the loss)"
            )
        outputs = outputs.reshape(len(outputs), -1)
        return outputs, targets.reshape(outputs.shape).to(outputs.dtype)

    def hessian_root(self, outputs: Tensor) -> Tensor:
        flat = outputs.flatten(1)
        eye = torch.eye(flat.shape[1], dtype=flat.dtype, device=flat.device)
        return (math.sqrt(2 * self.scale) * eye).expand(len(flat), -1, -1)

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        width = outputs.shape[1]
        noise = torch.special.ndtri(uniform(outputs, draws * width, generator)).to(outputs.dtype)
        noise = noise.reshape(len(outputs), draws, width)
        # Variance 1/(2 scale) makes the loss a negative log-likelihood, whose Fisher is the Gauss-Newton matrix.
        return outputs[:, None] + noise / math.sqrt(2 * self.scale)


def _wide_axes(tensor: Tensor) -> list[int]:
    """An example's axes but those of size 1: [batch, 1] and [batch] are the same numbers, [2, 3] and [3, 2] are not."""
    return [size for size in tensor.shape[1:] if size != 1]


def _class_logit(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.gather(1, targets[:, None])[:, 0]


def _class_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    others = outputs.scatter(1, targets[:, None], -math.inf)
    return _class_logit(outputs, targets) - others.logsumexp(1)


def _double(outputs: Tensor) -> Tensor:
    """In float64, where the device has it: in float32 the slope p - 1 of a confident prediction is all rounding."""
    return outputs.float() if outputs.device.type == "mps" else outputs.double()


def _rounded_once(loss: Tensor, outputs: Tensor) -> Tensor:
    return loss.to(torch.promote_types(outputs.dtype, torch.float32))
