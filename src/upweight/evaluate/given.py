"""Scores in the forms in which they are given, as tables that can be compared: finite, and in one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight._ids import Id, some
from upweight.errors import UpweightError
from upweight.scores import Scores

__all__ = ["aligned", "finite_table"]


def finite_table(scores: Scores | np.ndarray | Tensor | Sequence[Any]) -> Tensor:
    """Finite floating-point scores [query, train] on the CPU, without a graph.

    Raises:
        UpweightError: There is no such table in what was given.
    """
    values: Any = scores.values if isinstance(scores, Scores) else scores
    try:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, np.float64))
    except (TypeError, ValueError):
        raise UpweightError(
            f"scores is {type(scores).__name__}, expected Scores or numbers [query, train] -> method.attribute(query)"
        ) from None
    table = tensor.detach().cpu()
    if table.dim() != 2:
        raise UpweightError(
            f"scores have shape {tuple(table.shape)}, expected [query, train] -> a single query still has its axis"
        )
    table = table if table.is_floating_point() else table.double()
    if not table.isfinite().all():
        raise UpweightError(
            f"{int((~table.isfinite()).sum())} scores are not finite, expected numbers -> a NaN has no rank; see why"
        )
    return table


def aligned(runs: Sequence[Scores | np.ndarray | Tensor]) -> list[Tensor]:
    """Tables of the same queries and training examples, in the order of the first one that names them.

    Raises:
        UpweightError: Shapes differ, or the ids name other examples.
    """
    tables = [finite_table(run) for run in runs]
    if len({tuple(table.shape) for table in tables}) > 1:
        shapes = [tuple(table.shape) for table in tables]
        raise UpweightError(
            f"scores have shapes {shapes}, expected tables of one shape -> score the same examples"
        )
    first = next((run for run in runs if isinstance(run, Scores)), None)
    for number, run in enumerate(runs):
        if isinstance(run, Scores) and first is not None:
            rows = _order(first.query_ids, run.query_ids, "queries")
            columns = _order(first.train_ids, run.train_ids, "training examples")
            table = tables[number] if rows is None else tables[number][rows]
            tables[number] = table if columns is None else table[:, columns]
    return tables


def _order(ours: Sequence[Id], theirs: Sequence[Id], what: str) -> list[int] | None:
    """Where ours stand among theirs; None if they are in the same order."""
    if list(ours) == list(theirs):
        return None
    position = {name: place for place, name in enumerate(theirs)}
    if len(position) < len(theirs) or position.keys() != set(ours):
        raise UpweightError(
            f"the scores are of other {what}: {some(theirs)}, expected {some(ours)} in any order and each once -> "
            "score the same examples"
        )
    return [position[name] for name in ours]
