"""One registry of models that per-example gradients must be right for: model x loss x data x kind of layer.

A test that is parametrised over `CASES` (or `cases_of(...)`) meets every layer that upweight claims to support. A case
says which of its parameters may go to the exact fallback, so that none gets there by accident.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import oracles
import torch
from torch import Tensor, nn

from upweight.data import map_tensors
from upweight.task import BinaryClassification, Classification, Regression, Task

CLASSES = 3
Kind = Literal["classification", "binary", "regression", "functions"]


@dataclass(frozen=True)
class Case:
    """A model, data it takes and a task.

    Attributes:
        name: unique name, as shown by pytest.
        model: builds the model, in eval mode, in the default dtype, from the global random state.
        inputs: ``(examples, generator) -> inputs``: a tensor, a tuple or a dict, examples along the first axis.
        kind: the task's kind; ``"functions"`` takes `loss`.
        loss: ``(model, batch) -> [batch]``, for kind ``"functions"``.
        targets: ``(examples, generator) -> targets`` where they are not those of the kind.
        fallback: the parameters that go to the exact fallback; every other one must not.
        zero: parameters whose gradient is zero because nothing uses them.
        how: {layer: how it must be tracked}, beyond what `fallback` says.
        parameters: parameter filter, a regular expression.
        longer: like `inputs`, of another length than the probe's, for models that take any length.
        autocast: run the forward pass in this dtype.
        warning: a warning of torch's own that the case cannot avoid.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]
    kind: Kind = "classification"
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    targets: Callable[[int, torch.Generator], Tensor] | None = None
    fallback: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    how: dict[str, str] = field(default_factory=dict, hash=False)
    parameters: str | None = None
    longer: Callable[[int, torch.Generator], Any] | None = None
    autocast: torch.dtype | None = None
    warning: str | None = None

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The model, the same each time."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = self.model().eval()
            with torch.no_grad():  # biases, scales and shifts that start at 0 or 1 would hide mistakes
                for parameter in model.parameters():
                    if parameter.ndim < 2:
                        parameter.add_(0.3 * torch.randn_like(parameter))
            return model.to(dtype)

    def batch(self, n: int, dtype: torch.dtype = torch.float64, seed: int = 0, longer: bool = False) -> Any:
        """A batch of n examples, the same each time."""
        generator = torch.Generator().manual_seed(seed)
        build = self.longer if longer else self.inputs
        assert build is not None
        inputs = build(n, generator)
        targets = (self.targets or _TARGETS[self.kind])(n, generator)
        if isinstance(inputs, dict):
            batch: Any = {**inputs, "labels": targets}
        else:
            batch = (*inputs, targets) if isinstance(inputs, tuple) else (inputs, targets)
        return map_tensors(batch, lambda t: t.to(dtype) if t.is_floating_point() else t)

    def task(self, measurement: str = "loss") -> Task:
        """The task, asked for this measurement."""
        if self.kind == "classification":
            return Classification(measurement)
        if self.kind == "binary":
            return BinaryClassification(measurement)
        if self.kind == "regression":
            return Regression(measurement=measurement)
        assert self.loss is not None
        return Task.from_functions(self.loss)

    def oracle_loss(self) -> Callable[[nn.Module, Any], Tensor]:
        """The training loss of a batch of one example, written independently of the task."""
        if self.kind == "functions":
            assert self.loss is not None
            return self.loss
        return oracles.of_outputs(oracles.LOSS[self.kind])


def _labels(n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, CLASSES, (n,), generator=generator)


_TARGETS: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "classification": _labels,
    "binary": lambda n, generator: torch.randint(0, 2, (n,), generator=generator),
    "regression": lambda n, generator: torch.randn(n, 2, generator=generator),
    "functions": _labels,
}


def normal(*shape: int) -> Callable[[int, torch.Generator], Tensor]:
    """Inputs of normal numbers, [examples, *shape]."""
    return lambda n, generator: torch.randn(n, *shape, generator=generator)


def tokens(length: int, vocabulary: int = 7) -> Callable[[int, torch.Generator], Tensor]:
    """Inputs of token ids [examples, length]; a small vocabulary, so that ids repeat within an example."""
    return lambda n, generator: torch.randint(0, vocabulary, (n, length), generator=generator)


class Head(nn.Module):
    """Logits from maps [batch, channel, *space], every position with another weight, so that none may be mixed up."""

    def __init__(self, channels: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.out = nn.Linear(channels, classes)

    def forward(self, maps: Tensor) -> Tensor:
        flat = maps.tanh().flatten(2)
        ramp = torch.linspace(0.5, 1.5, flat.shape[2], dtype=flat.dtype)
        return self.out(flat @ ramp / flat.shape[2])


class Net(nn.Module):
    """A model whose forward is a plain function of itself and the inputs, so that a case fits on a few lines."""

    def __init__(self, forward: Callable[..., Any], **children: nn.Module | Tensor) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)
        self.function = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    """A parameter of normal numbers."""
    return nn.Parameter(torch.randn(shape))


def frozen(model: nn.Module, *names: str) -> nn.Module:
    """The model with these parameters frozen."""
    for name in names:
        model.get_parameter(name).requires_grad_(False)
    return model


def registry() -> tuple[
    list[Case], Callable[..., Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]]
]:
    """A list of cases, and a decorator that adds the case of a function that builds a model, under its name."""
    cases: list[Case] = []

    def case(inputs: Callable[[int, torch.Generator], Any], kind: Kind = "classification", **rest: Any):
        def register(model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
            cases.append(Case(model.__name__.replace("_", " "), model, inputs, kind, **rest))
            return model

        return register

    return cases, case
