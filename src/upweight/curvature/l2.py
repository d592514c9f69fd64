"""The regulariser that was part of the training objective, ``R(theta) = (1/2) sum_j l2_j theta_j^2``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from upweight._trees import digest_of
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters

L2: TypeAlias = "float | Mapping[str, float] | Tensor"
"""One coefficient for all tracked parameters; {regular expression: coefficient}, with 0 for parameters that none
finds; or one coefficient a parameter, [p], in the order of `Gradients.dense`."""
CONVENTIONS = ("sum", "mean")
"""What the sum of losses beside it is divided by when examples are left out: still by n, or by those that are left."""


def l2_vector(l2: L2, tracker: Tracker) -> Tensor:
    """The coefficient of every tracked parameter, [p], in the order of `Gradients.dense`.

    Raises:
        UpweightError: a coefficient is negative, or an expression finds no parameter or one that another found.

    Example:
        >>> import upweight as uw
        >>> model = torch.nn.Linear(2, 1)
        >>> data = uw.Examples((torch.ones(3, 2), torch.ones(3, 1)))
        >>> l2_vector({"weight$": 0.5}, Tracker(model, uw.Regression(), data)).tolist()
        [0.5, 0.5, 0.0]
    """
    check_l2(l2)
    if isinstance(l2, Tensor):
        size = sum(layer.numel for layer in tracker.layers.values())
        if l2.shape != (size,):
            raise UpweightError(
                f"l2 has shape {tuple(l2.shape)}, expected [{size}] -> one coefficient a parameter"
            )
        return l2.to(tracker.device, tracker.dtype)
    coefficients = _by_name({".": l2} if isinstance(l2, (int, float)) else l2, list(tracker.parameters))
    named = {
        name: torch.full(
            (1, *p.shape), coefficients.get(name, 0.0), dtype=tracker.dtype, device=tracker.device
        )
        for name, p in tracker.parameters.items()
    }
    return from_parameters(tracker.layers, named)[0]


def check_l2(l2: L2) -> None:
    """Raise unless this is a regulariser: finite numbers that are not negative."""
    if isinstance(l2, Tensor):
        numbers = [float(l2.min()), float(l2.max())] if l2.numel() else []
    else:
        numbers = [l2] if not isinstance(l2, Mapping) else list(l2.values())
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number < math.inf:
            raise UpweightError(f"l2={number!r}, expected finite numbers >= 0 -> 0 if nothing was penalised")


def describe_l2(l2: L2) -> Any:
    """JSON-able, for a result's evidence and for what a cache belongs to."""
    if isinstance(l2, Tensor):
        return {"mean": float(l2.double().mean()), "digest": digest_of(l2)}
    return dict(l2) if isinstance(l2, Mapping) else float(l2)


def _by_name(l2: Mapping[str, float], names: list[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pattern, coefficient in l2.items():
        here = [name for name in names if re.search(pattern, name)]
        if not here:
            raise UpweightError(
                f"l2 names {pattern!r}, which finds none of {names[:6]} -> a regular expression of parameter names"
            )
        for name in here:
            if name in found:
                raise UpweightError(f"l2 gives {name} two coefficients -> expressions that do not overlap")
            found[name] = float(coefficient)
    return found
