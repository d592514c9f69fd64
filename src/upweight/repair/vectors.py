"""Arithmetic of vectors of parameters, {name: tensor}, in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Vector = dict[str, Tensor]


def combine(x: Mapping[str, Tensor], y: Mapping[str, Tensor], t: float = 1.0) -> Vector:
    """``x + t y``."""
    return {name: x[name].double() + t * y[name].double() for name in x}


def scaled(x: Mapping[str, Tensor], t: float) -> Vector:
    """``t x``."""
    return {name: t * value.double() for name, value in x.items()}


def dot(x: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> float:
    """The inner product.

    Example:
        >>> dot({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([1.0, 2.0])})
        11.0
    """
    return math.fsum(float((x[name].double() * y[name].double()).sum()) for name in x)


def norm(x: Mapping[str, Tensor]) -> float:
    """The Euclidean norm."""
    return math.sqrt(dot(x, x))


def values_of(parameters: Mapping[str, Tensor]) -> Vector:
    """A float64 copy of parameters."""
    return {name: p.detach().double().clone() for name, p in parameters.items()}


def place(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into parameters."""
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])
