"""What an attributor refuses, and how: an `UpweightError` of one line that says what is wrong and the way out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from upweight._conformance.problem import Inapplicable, Problem, Violated, take
from upweight._trees import map_tensors, tensors_in
from upweight.errors import UpweightError


def not_fitted(problem: Problem) -> None:
    """Asked before it was fitted, it says so."""
    method = problem.make(problem.model, problem.task)
    _must_refuse("attribute before fit", lambda: method.attribute(problem.query))
    _must_refuse("self_influence before fit", method.self_influence)


def empty_data(problem: Problem) -> None:
    """Training data or queries without a single example are refused."""
    none = torch.zeros(0, dtype=torch.int64)
    _must_refuse("empty training data", lambda: problem.fitted(take(problem.train, none)))
    _must_refuse("empty queries", lambda: problem.fitted().attribute(take(problem.query, none)))


def not_finite(problem: Problem) -> None:
    """NaN in an input is refused, not passed on."""
    if not any(t.is_floating_point() for t in tensors_in(problem.train)):
        raise Inapplicable("the data holds no floating-point values")
    broken = _broken(problem.train, -2)
    _must_refuse("NaN in training data", lambda: problem.fitted(broken).attribute(problem.query))
    _must_refuse("NaN in queries", lambda: problem.fitted().attribute(_broken(problem.query, 1)))


def other_shape(problem: Problem) -> None:
    """Queries that the model cannot take are refused in words, whatever the model itself says."""
    wide = map_tensors(problem.query, _widened)
    try:
        with torch.no_grad():
            problem.task.measure(problem.model, problem.moved(wide))
    except Exception:
        _must_refuse("queries of another shape", lambda: problem.fitted().attribute(wide))
        return
    raise Inapplicable("the model takes inputs of any shape")


def _must_refuse(what: str, work: Callable[[], Any]) -> None:
    try:
        work()
    except UpweightError as error:
        if "\n" in str(error) or " -> " not in str(error):
            raise Violated(
                f"{what}: the error has no single line with a way out after '->': {error}"
            ) from error
        return
    except Exception as error:
        seen = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
        raise Violated(f"{what} raises {seen}, expected an UpweightError") from error
    raise Violated(f"{what} is accepted, expected an UpweightError")


def _broken(tree: Any, position: int) -> Any:
    """The same examples, one with NaN."""

    def one(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        tensor = tensor.clone()
        tensor[position] = float("nan")
        return tensor

    return map_tensors(tree, one)


def _widened(tensor: Tensor) -> Tensor:
    """Floating-point inputs with their last axis twice as long."""
    if tensor.ndim < 2 or not tensor.is_floating_point():
        return tensor
    return torch.cat([tensor, tensor], -1)


ERROR_LAWS: dict[str, Callable[[Problem], None]] = {
    "not fitted": not_fitted,
    "empty data": empty_data,
    "NaN input": not_finite,
    "shape mismatch": other_shape,
}
