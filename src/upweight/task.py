"""What a model was trained for and what is asked of it: per-example loss, query measurement, predictive distribution.

A `Task` answers three questions about a batch, always one number per example and never a batch average:

* `train_loss`: what training minimised, ``l_i(theta)``, shape [batch];
* `measure`: what the user asks about a query, ``m_q(theta)``, shape [batch];
* `pseudo_losses`: scalars whose gradients' outer products sum to the Fisher matrix of the model's *own* predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.errors import UpweightError

Batch = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors with the examples along the first axis."""

PerExample = Callable[[nn.Module, Batch], Tensor]
"""``(model, batch) -> Tensor [batch]``."""

FisherKind = Literal["exact", "sampled", "empirical"]

_TARGET_KEYS = ("labels", "label", "targets", "target", "y")
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

    def train_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._loss(model, batch)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self._measure or self._loss)(model, batch)

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


class _OutputTask(Task):
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
            raise UpweightError(f"measurement={measurement!r} is unknown -> use one of {sorted(choices)} or a function")
        self.measurement = measurement if isinstance(measurement, str) else getattr(measurement, "__name__", "function")

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
                return self.hessian_root(self.forward(model, batch)[0]).shape[-1]
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


class Classification(_OutputTask):
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
        return F.cross_entropy(outputs, targets, reduction="none")

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.ndim != 2 or targets.ndim != 1:
            raise UpweightError(
                f"logits have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected [batch, class] "
                "and [batch] -> use Task.from_functions for other losses (per token, multi-label)"
            )
        if targets.is_floating_point() or targets.is_complex():
            raise UpweightError(f"class targets have dtype {targets.dtype}, expected integers -> targets.long()")
        return outputs, targets.long()

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        targets = split_batch(batch)[2]
        classes = output_shape[-1] if output_shape else 0
        wrong = (targets < 0) | (targets >= classes)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            raise UpweightError(
                f"example {ids[first]} has label {int(targets[first])}, expected 0 to {classes - 1} (the model has "
                f"{classes} outputs) -> number the classes from 0, or drop the example"
            )

    def hessian_root(self, outputs: Tensor) -> Tensor:
        """``diag(p) - p p^T = L L^T`` with C-1 columns: ``L = diag(u) Q``, u = sqrt(p), Q an orthonormal basis of u's
        complement, which is a Householder reflection without the column that it maps onto u."""
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


class BinaryClassification(_OutputTask):
    """Logistic loss on one logit an example: outputs [batch] or [batch, 1], targets 0 or 1.

    Args:
        measurement: ``"loss"`` in nats, ``"margin"`` or ``"logit"`` (the logit, signed by the true class), or a function.
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
        return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.numel() != len(outputs) or targets.numel() != len(outputs):
            raise UpweightError(
                f"outputs have shape {tuple(outputs.shape)} and targets {tuple(targets.shape)}, expected one logit and "
                "one target an example -> use Classification for several classes"
            )
        return outputs.reshape(-1), targets.reshape(-1).to(outputs.dtype)

    def check_targets(self, batch: Batch, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        targets = split_batch(batch)[2].reshape(-1)
        wrong = (targets != 0) & (targets != 1)
        if wrong.any():
            first = int(wrong.nonzero()[0, 0])
            raise UpweightError(f"example {ids[first]} has target {float(targets[first]):g}, expected 0 or 1 -> recode it")

    def hessian_root(self, outputs: Tensor) -> Tensor:
        p = outputs.sigmoid()
        return (p * (1 - p)).sqrt().reshape(-1, 1, 1)


    def draw(self, outputs: Tensor, draws: int, generator: torch.Generator) -> Tensor:
        return (uniform(outputs, draws, generator) < outputs.double().sigmoid()[:, None]).to(outputs.dtype)


class Regression(_OutputTask):
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

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.scale * (outputs - targets).flatten(1).square().sum(1)

    def check_outputs(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if outputs.numel() != targets.numel() or len(outputs) != len(targets):
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


def uniform(outputs: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers in (0, 1), [batch, count], float64.

    Drawn one after the other on the CPU: example i gets the same numbers however the data is cut into batches.
    """
    u = torch.rand(len(outputs), count, generator=generator, dtype=torch.float64)
    return u.clamp_min(torch.finfo(torch.float64).tiny).to(outputs.device)


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


def _outputs(model: nn.Module, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    outputs = model(*inputs, **keywords)
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Tensor):
        raise UpweightError(f"the model returned {type(outputs).__name__}, expected a tensor -> use Task.from_functions")
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
        f"a batch is {type(batch).__name__}, expected (inputs, targets) or a dict with targets -> use Task.from_functions"
    )


def _class_logit(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.gather(1, targets[:, None])[:, 0]


def _class_margin(outputs: Tensor, targets: Tensor) -> Tensor:
    others = outputs.scatter(1, targets[:, None], -math.inf)
    return _class_logit(outputs, targets) - others.logsumexp(1)
