"""Tasks whose loss looks at the model only through its outputs, and knows their distribution."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight.errors import UpweightError
from upweight.task.base import Batch, FisherKind, PerExample, Task

LARGEST_ROOT = 1024
"""Outputs of an example up to which the root of its loss's Hessian is formed to count its columns."""
_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


class OutputTask(Task):
    """A task whose loss looks at the model only through its outputs, and knows their distribution.

    Batches are ``(inputs, ..., targets)``, called as ``model(*inputs)``, or dicts with a key such as ``labels``, called
    as ``model(**everything else)``. Outputs with a ``.logits`` attribute are unwrapped.
    """

    def __init__(
        self,
        measurement: str | PerExample,
        choices: Mapping[str, tuple[Callable[[Tensor, Tensor], Tensor], bool, str]],
        higher_is_better: bool | None,
        unit: str | None,
    ) -> None:
        if callable(measurement):
            self._measure: Any = measurement
            self._by_output = False
            self.higher_is_better, self.unit = bool(higher_is_better), unit or "measurement"
        elif measurement in choices:
            self._measure, self.higher_is_better, self.unit = choices[measurement]
            self._by_output = True
        else:
            raise UpweightError(
                f"measurement={measurement!r} is unknown -> use one of {sorted(choices)} or a function"
            )
        self.measurement = (
            measurement if isinstance(measurement, str) else getattr(measurement, "__name__", "function")
        )

    # What a subclass must say ------------------------------------------------------------------------------------

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Per-example loss [batch] of outputs [batch, ...] against targets."""
        raise NotImplementedError

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """Columns L [batch, outputs, columns] with ``L L^T`` the Hessian of the loss in the (flattened) outputs."""
        raise NotImplementedError

    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        """Targets [batch, draws, ...] drawn from the model's predictive distribution."""
        raise NotImplementedError

    def nll(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """Loss [batch] of one set of drawn targets, on the scale on which its gradients have the Fisher covariance."""
        return self.loss(outputs, drawn)

    # What follows from it ----------------------------------------------------------------------------------------

    @property
    def measured_by(self) -> Callable[..., Any] | None:
        return super().measured_by if self._by_output else self._measure

    def train_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        outputs, targets = self.forward(model, batch)
        return self.loss(outputs, targets)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self._by_output:
            return self._measure(model, batch)
        outputs, targets = self.forward(model, batch)
        return self._measure(outputs, targets)

    def forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's outputs and the targets of one batch."""
        inputs, keywords, targets = split_batch(batch)
        return self.check_outputs(_outputs(model, inputs, keywords), targets)

    def output_shape(self, model: nn.Module, batch: Batch) -> tuple[int, ...] | None:
        inputs, keywords, _ = split_batch(batch)
        with torch.no_grad():
            return tuple(_outputs(model, inputs, keywords).shape[1:])

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and targets in the shape this task computes with; raise if they do not fit each other."""
        return outputs, targets

    def fisher_columns(self, model: nn.Module, batch: Batch, kind: FisherKind, draws: int) -> int:
        if kind == "exact":
            with torch.no_grad():
                one = self.forward(model, batch)[0][:1]
                if one.numel() > LARGEST_ROOT:  # shapes alone; torch takes a second to learn them
                    one = one.to("meta")
                return self.hessian_root(one).shape[-1]
        return draws if kind == "sampled" else 1

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Batch,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        outputs, targets = self.forward(model, batch)
        if kind == "empirical":
            return self.loss(outputs, targets)[:, None], None
        if kind == "exact":
            root = self.hessian_root(outputs.detach())  # [batch, outputs, columns]
            return torch.einsum("bo,boc->bc", outputs.reshape(len(outputs), -1), root), None
        if drawn is None:
            drawn = self.draw(outputs.detach(), draws, generator)
        losses = [self.nll(outputs, drawn[:, d]) for d in range(draws)]
        return torch.stack(losses, 1) / math.sqrt(draws), drawn


def uniform(outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in (0, 1), [batch, count], float64.

    Drawn one after the other on the CPU: example i gets the same numbers however the data is cut into batches.
    """
    u = torch.rand(len(outputs), count, generator=generator, dtype=torch.float64)
    return u.clamp_min(torch.finfo(torch.float64).tiny).to(outputs.device)


def _outputs(model: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    outputs = model(*inputs, **keywords)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        seen = type(outputs).__name__
        raise UpweightError(f"the model returned {seen}, expected a tensor -> use Task.from_functions")
    return outputs


def split_batch(batch: Batch) -> tuple[Sequence[Any], Mapping[str, Any], Tensor]:
    """A batch as positional inputs, keyword inputs and targets: ``(x, ..., y)`` or a dict with a ``labels`` key."""
    if isinstance(batch, Mapping):
        for key in _TARGET_KEYS:
            if key in batch:
                return (), {k: v for k, v in batch.items() if k != key}, batch[key]
        raise UpweightError(
            f"the batch is a dict with keys {sorted(map(str, batch))}, expected one of {list(_TARGET_KEYS)} for the "
            "targets -> rename it, or use Task.from_functions"
        )
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[:-1], {}, batch[-1]
    raise UpweightError(
        f"a batch is {type(batch).__name__}, expected (inputs, targets) or a dict with targets "
        "-> use Task.from_functions"
    )
