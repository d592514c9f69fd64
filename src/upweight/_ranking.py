"""The first k of many scores, in an order that does not depend on chance."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from upweight.errors import UpweightError

Row = TypeVar("Row")


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Generic[Row]):
    """The most extreme training examples, best first; equal scores keep the order of the training set.

    Attributes:
        ids: Their ids: a list per query (from `Scores`), or one list (from `SelfInfluence`).
        positions: Where they stand in ``train_ids``, int64, [query, k] or [k].
        values: Their scores, same shape.
    """

    ids: list[Row]
    positions: Tensor
    values: Tensor

    def __repr__(self) -> str:
        many = self.positions.dim() == 2
        rows: list[Any] = self.ids if many else [self.ids]
        lines = [f"Ranking {' x '.join(map(str, self.positions.shape))}, best first, as id (score)"]
        for row, values in zip(rows[:5], self.values if many else [self.values]):
            best = ", ".join(f"{name} ({value:+.3g})" for name, value in zip(row[:5], values.tolist()))
            lines.append(f"  {best}{', ...' if len(row) > 5 else ''}")
        return "\n".join(lines if len(rows) <= 5 else [*lines, "  ..."])


def extremes(values: Tensor, k: int, *, largest: bool) -> Tensor:
    """Positions [query, k] of the k most extreme values of each row; among equals, the earliest first."""
    try:
        count = operator.index(k)
    except TypeError:
        count = 0
    if count < 1:
        raise UpweightError(f"k is {k!r} -> use a whole number from 1 up, for example 10")
    k = min(count, values.shape[1])
    if k == 0:
        return torch.empty(len(values), 0, dtype=torch.int64, device=values.device)
    best = values.topk(k, dim=1, largest=largest)
    edge = best.values[:, -1:]
    positions = best.indices.sort(dim=1).values
    order = values.gather(1, positions).sort(dim=1, descending=largest, stable=True).indices
    positions = positions.gather(1, order)
    # topk takes any of the values equal to the last one it takes: those rows are sorted in full instead.
    tied = (values >= edge if largest else values <= edge).sum(dim=1) > k
    if tied.any():
        positions[tied] = values[tied].sort(dim=1, descending=largest, stable=True).indices[:, :k]
    return positions
