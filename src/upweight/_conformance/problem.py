"""A small problem on which laws are checked, and the words in which they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight._random import preserved
from upweight._trees import as_tensors, batch_length, map_tensors, tensors_in
from upweight.errors import UpweightError
from upweight.scores import Scores
from upweight.task import Classification, Task


class Inapplicable(Exception):  # noqa: N818 - no error
    """The law does not apply; the message says why."""


class Violated(Exception):  # noqa: N818 - a finding
    """The law is broken; the message says how."""

    def __init__(self, message: str, error: float | None = None, tolerance: float | None = None) -> None:
        super().__init__(message)
        self.error, self.tolerance = error, tolerance


@dataclass(frozen=True)
class Measured:
    """A relative error within its tolerance."""

    error: float
    tolerance: float


@dataclass(frozen=True)
class Problem:
    """An attributor's factory, a model, its task and data as trees of tensors.

    Attributes:
        make: ``(model, task) -> attributor``.
        model, task, train, query: what it is made for and fitted on.
        tolerance: of equalities.
        unbiased: a model for the same data without biases, in which an input of zeros has no gradient, or None.
    """

    make: Callable[[nn.Module, Task], Any]
    model: nn.Module
    task: Task
    train: Any
    query: Any
    tolerance: float
    unbiased: nn.Module | None

    @staticmethod
    def of(
        make: Callable[[nn.Module, Task], Any],
        train: Any,
        query: Any,
        model: nn.Module | None,
        task: Task | None,
        tolerance: float | None,
    ) -> Problem:
        """The user's problem, or the built-in one."""
        given = [name for name, value in _named(train, query, model, task) if value is not None]
        if not given:
            built_in, unbiased = _network(bias=True), _network(bias=False)
            data = _data(12, 1), _data(5, 2)
            return Problem(make, built_in, Classification(), *data, tolerance or 1e-8, unbiased)
        if len(given) < 4 or model is None or task is None:
            missing = [name for name, value in _named(train, query, model, task) if value is None]
            raise UpweightError(
                f"{', '.join(given)} were given without {', '.join(missing)} -> give all four, or none of them"
            )
        train, query = as_tensors(train), as_tensors(query)
        if batch_length(train) == batch_length(query) or batch_length(train) < 6:
            raise UpweightError(
                f"there are {batch_length(query)} queries and {batch_length(train)} training examples, expected at "
                "least 6 training examples and another number of queries -> a transposed matrix would go unnoticed"
            )
        doubles = any(p.dtype == torch.float64 for p in model.parameters())
        return Problem(make, model, task, train, query, tolerance or (1e-8 if doubles else 5e-3), None)

    @property
    def n(self) -> int:
        """Training examples."""
        return batch_length(self.train)

    @property
    def queries(self) -> int:
        """Queries."""
        return batch_length(self.query)

    @property
    def exact(self) -> float:
        """Tolerance of what differs by rounding alone."""
        return self.tolerance * 1e-3

    def attributor_name(self) -> str:
        """Class of what `make` makes."""
        return type(self.make(self.model, self.task)).__name__

    def fitted(self, train: Any = None, **options: Any) -> Any:
        """A new attributor, fitted on the training data or on this; options are attributes that it must have."""
        method = self.make(self.model, self.task)
        for name, value in options.items():
            setattr(method, name, value)
        method.fit(self.train if train is None else train)
        return method

    def scores(self, train: Any = None, query: Any = None) -> Scores:
        """Scores of a new attributor, for the problem's data or for this."""
        return self.fitted(train).attribute(self.query if query is None else query)

    def values(self, train: Any = None, query: Any = None) -> Tensor:
        """Values of `scores`, checked to be [query, train]."""
        train, query = (self.train if train is None else train), (self.query if query is None else query)
        return checked(self.scores(train, query), batch_length(query), batch_length(train))

    def with_model(self, model: nn.Module) -> Problem:
        """The same problem for another model."""
        return replace(self, model=model)

    def gradients(self, function: Callable[[nn.Module, Any], Tensor], batch: Any) -> Tensor:
        """Gradients [batch, parameters] of ``function(model, batch of one)``, by plain autograd, in float64."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        rows = []
        for i in range(batch_length(batch)):
            with torch.enable_grad():
                value = function(self.model, self.moved(take(batch, [i]))).sum()
                grads = torch.autograd.grad(value, parameters, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]
            rows.append(torch.cat([g.double().reshape(-1) for g in flat]))
        return torch.stack(rows)

    def moved(self, batch: Any) -> Any:
        """A batch on the model's device, floating-point values in its precision."""
        first = next(self.model.parameters())
        return map_tensors(
            batch, lambda t: t.to(first.device, first.dtype if t.is_floating_point() else t.dtype)
        )


def checked(scores: Scores, queries: int, n: int) -> Tensor:
    """The values; raise unless they are finite and [query, train]."""
    if not isinstance(scores, Scores):
        raise Violated(f"attribute returned {type(scores).__name__}, expected upweight.Scores")
    shape = tuple(scores.values.shape)
    if shape != (queries, n):
        raise Violated(f"scores have shape {shape}, expected [query, train] = {(queries, n)}")
    return scores.values.double()


def close(found: Tensor, expected: Tensor, what: str, tolerance: float) -> Measured:
    """The largest difference, relative to the largest expected number; raise if it is larger than the tolerance."""
    scale = float(expected.abs().max()) or 1.0
    error = float((found.double() - expected.double()).abs().max()) / scale
    if not error <= tolerance:
        raise Violated(f"{what}: relative error {error:.1e}, tolerance {tolerance:.0e}", error, tolerance)
    return Measured(error, tolerance)


def worst(*measured: Measured) -> Measured:
    """The one nearest its tolerance."""
    return max(measured, key=lambda m: m.error / m.tolerance)


def take(tree: Any, positions: Sequence[int] | Tensor) -> Any:
    """Examples of a tree of tensors, in this order."""
    index = torch.as_tensor(positions)
    return map_tensors(tree, lambda t: t[index.to(t.device)])


def join(first: Any, second: Any) -> Any:
    """The examples of two trees, one after the other."""
    rest = iter(list(tensors_in(second)))
    return map_tensors(first, lambda t: torch.cat([t, next(rest)]))


def offers(method: Any, call: str, option: str) -> bool:
    """Whether a method of an attributor takes an option by name."""
    try:
        return option in inspect.signature(getattr(method, call)).parameters
    except (TypeError, ValueError):
        return False


def _named(train: Any, query: Any, model: Any, task: Any) -> list[tuple[str, Any]]:
    return [("train", train), ("query", query), ("model", model), ("task", task)]


# The built-in problem ------------------------------------------------------------------------------------------------


def _data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.arange(n) % 3  # every class occurs, and labels have little to do with inputs


def _network(bias: bool) -> nn.Module:
    """A two-layer network at a minimum of its training loss with an L2 penalty of 0.05."""
    with preserved():
        torch.manual_seed(0)
        layers = nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias)
        model = nn.Sequential(*layers).double()
    x, y = _data(12, 1)
    optimiser = torch.optim.LBFGS(model.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
        value = F.cross_entropy(model(x), y) + 0.025 * penalty
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(closure)
    optimiser.zero_grad(set_to_none=True)
    return model.eval()
