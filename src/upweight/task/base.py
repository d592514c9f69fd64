"""What a model was trained for and what is asked of it: per-example loss, query measurement, predictive distribution.

A `Task` answers three questions about a batch, always one number per example and never a batch average:

* `train_loss`: what training minimised, ``l_i(theta)``, shape [batch];
* `measure`: what the user asks about a query, ``m_q(theta)``, shape [batch];
* `pseudo_losses`: scalars whose gradients' outer products sum to the Fisher matrix of the model's *own* predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from upweight.errors import UpweightError

Batch = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors with the examples along the first axis."""

PerExample = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch) -> Tensor [batch]``."""

FisherKind = Literal["exact", "sampled", "empirical"]

MOST_EXACT_COLUMNS = 32
"""`fisher="auto"` takes the expectation over targets exactly up to this many backward passes a batch."""


class _SampledLoss(Protocol):
    def __call__(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> Tensor: ...


class Task:
    """Per-example training loss, query measurement and predictive distribution of one learning problem.

    Subclass it, use `Classification`, `BinaryClassification` or `Regression`, or build one from two functions with
    `Task.from_functions`.

    Attributes:
        higher_is_better: whether a higher measurement is a better one (a margin) or a worse one (a loss).
        unit: the measurement's unit in words, for example ``"nats"``.
        mask: optional function ``batch -> Tensor [batch, position]``, 1 for real positions and 0 for padding; padded
            positions are left out of the curvature's input covariance.
    """

    higher_is_better: bool = False
    unit: str = "loss"
    mask: Callable[[Batch], Tensor] | None = None

    def train_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-example training loss, shape [batch], neither averaged nor summed over the batch."""
        raise NotImplementedError

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """Per-example query measurement, shape [batch], in the task's `unit`."""
        return self.train_loss(model, batch)

    @property
    def draws_apart(self) -> bool:
        """Whether every draw of ``"sampled"`` runs the model anew, instead of all sharing its outputs."""
        return False

    def fisher_columns(self, model: nn.Module, batch: Batch, kind: FisherKind, draws: int) -> int:
        """How many backward passes a batch the Fisher of this `kind` costs; 0 if this task cannot give it."""
        return 1 if kind == "empirical" else 0

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Batch,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Scalars [batch, columns] whose per-example gradients s_c give the Fisher: ``F_i = sum_c s_c s_c^T``.

        Args:
            model: the model.
            batch: a batch of examples.
            kind: ``"exact"`` expectation over targets, ``"sampled"`` targets, or the ``"empirical"`` dataset targets.
            draws: targets drawn per example for ``"sampled"``.
            generator: source of the draws; the global random state is never touched.
            drawn: targets that were drawn before for this very batch, to be used again instead of new ones.

        Returns:
            The scalars, and the drawn targets (None where nothing was drawn).
        """
        if kind != "empirical":
            raise UpweightError(
                f"fisher={kind!r} needs the model's predictive distribution, which {type(self).__name__} does not "
                "define -> use fisher='empirical', or pass sampled_loss= to Task.from_functions"
            )
        return self.train_loss(model, batch)[:, None], None

    def output_shape(self, model: nn.Module, batch: Batch) -> tuple[int, ...] | None:
        """Shape of one example's model output, where the task looks at outputs; learned once and given back below."""
        return None

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        """Raise an `UpweightError` that names the first example whose target this task cannot have."""

    @property
    def name(self) -> str:
        """What tells this task's training loss from another's, for the manifest of a cache."""
        return type(self).__name__

    def sample(self, model: nn.Module, batch: Batch) -> list[float]:
        """What the task's functions are of a batch: two of one name would otherwise pass for the same."""
        found = [self.train_loss(model, batch)]
        if self.mask is not None:
            found.append(self.mask(batch).flatten(1).sum(1))
        return torch.cat([part.double().cpu() for part in found]).tolist()

    @property
    def measured_by(self) -> Callable[..., Any] | None:
        """The user's own code behind `measure`, a function or a class; None for a measurement that has a name."""
        ours = type(self).__module__.partition(".")[0] == "upweight"
        return None if ours else type(self)

    @property
    def orientation(self) -> int:
        """+1 if a higher measurement is worse (a loss), -1 if it is better: scores are oriented here and only here."""
        return -1 if self.higher_is_better else 1

    @staticmethod
    def from_functions(
        loss: PerExample,
        measure: PerExample | None = None,
        *,
        higher_is_better: bool = False,
        sampled_loss: _SampledLoss | None = None,
        mask: Callable[[Batch], Tensor] | None = None,
        unit: str = "loss",
    ) -> Task:
        """A task from any pair of functions.

        Args:
            loss: ``(model, batch) -> Tensor [batch]``, the training loss of each example (its own tokens summed).
            measure: the same for queries; the training loss if None.
            higher_is_better: whether a higher measurement is better.
            sampled_loss: ``(model, batch, generator) -> Tensor [batch]``, the negative log-likelihood of targets drawn
                from the model's own predictive distribution, for ``fisher="sampled"``.
            mask: ``batch -> Tensor [batch, position]``, 0 where a position is padding.
            unit: the measurement's unit in words.

        Example:
            >>> import torch, upweight as uw
            >>> def absolute(model, batch):
            ...     x, y = batch
            ...     return (model(x) - y).abs().sum(1)
            >>> task = uw.Task.from_functions(absolute, unit="metres")
            >>> model = torch.nn.Linear(2, 1)
            >>> task.train_loss(model, (torch.ones(3, 2), torch.zeros(3, 1))).shape
            torch.Size([3])
        """
        return _Functions(loss, measure, higher_is_better, sampled_loss, mask, unit)


class _Functions(Task):
    def __init__(
        self,
        loss: PerExample,
        measure: PerExample | None,
        higher_is_better: bool,
        sampled_loss: _SampledLoss | None,
        mask: Callable[[Batch], Tensor] | None,
        unit: str,
    ) -> None:
        self._loss, self._measure, self._sampled = loss, measure, sampled_loss
        self.higher_is_better, self.mask, self.unit = higher_is_better, mask, unit

    @property
    def name(self) -> str:
        return f"function {getattr(self._loss, '__qualname__', type(self._loss).__name__)}"

    @property
    def measured_by(self) -> Callable[..., Any] | None:
        return self._measure or self._loss

    def sample(self, model: nn.Module, batch: Batch) -> list[float]:
        found = super().sample(model, batch)
        if self._sampled is not None:
            found += self._sampled(model, batch, torch.Generator().manual_seed(0)).double().tolist()
        return found

    def train_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return _tensor(self._loss(model, batch), "loss")

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._measure is None:
            return self.train_loss(model, batch)
        return _tensor(self._measure(model, batch), "measurement")

    @property
    def draws_apart(self) -> bool:
        return self._sampled is not None

    def fisher_columns(self, model: nn.Module, batch: Batch, kind: FisherKind, draws: int) -> int:
        if kind == "sampled":
            return draws if self._sampled is not None else 0
        return super().fisher_columns(model, batch, kind, draws)

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Batch,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if kind == "sampled" and self._sampled is not None:
            losses = [self._sampled(model, batch, generator) for _ in range(draws)]
            return torch.stack(losses, 1) / math.sqrt(draws), None
        return super().pseudo_losses(model, batch, kind, draws, generator, drawn)


def _tensor(found: Any, what: str) -> Tensor:
    if not isinstance(found, Tensor):
        raise UpweightError(
            f"the {what} function returned {type(found).__name__}, expected a tensor [batch], one number an example -> "
            "no .item(), .tolist() or float()"
        )
    return found


def resolve_fisher(
    task: Task, model: nn.Module, batch: Batch, fisher: str, draws: int
) -> tuple[FisherKind, int]:
    """The Fisher kind and its backward passes a batch; ``"auto"`` is the most faithful one that is affordable."""
    kinds: tuple[FisherKind, ...] = ("exact", "sampled", "empirical")
    if fisher == "auto":
        for kind in kinds:
            columns = task.fisher_columns(model, batch, kind, draws)
            if columns and (kind != "exact" or columns <= MOST_EXACT_COLUMNS):
                return kind, columns
    for kind in kinds:
        if fisher == kind:
            columns = task.fisher_columns(model, batch, kind, draws)
            if not columns:
                raise UpweightError(
                    f"fisher={fisher!r} needs the model's predictive distribution, which this task does not define -> "
                    "use fisher='empirical', or pass sampled_loss= to Task.from_functions"
                )
            return kind, columns
    raise UpweightError(f"fisher={fisher!r} is unknown -> use 'auto', 'exact', 'sampled' or 'empirical'")
