"""How much the scores depend on the damping: a curve to look at before believing any one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.data import Examples
from upweight.errors import UpweightError

if TYPE_CHECKING:
    from upweight.attributors.influence import Influence


@dataclass(frozen=True)
class DampingCurve:
    """Rank agreement of the scores at several dampings: mean Spearman correlation over queries.

    Attributes:
        dampings: [k], ascending.
        neighbours: [k - 1], of the scores at each damping and the next.
        to_chosen: [k], of the scores at each damping and at the method's own.
        chosen: the method's own damping (a number where it is one number for all layers).
    """

    dampings: list[float]
    neighbours: list[float]
    to_chosen: list[float]
    chosen: float | dict[str, float]

    def plot(self, ax: Any = None) -> Any:
        """The curve on a logarithmic axis, on a matplotlib axes (a new one if None), which it returns.

        Raises:
            UpweightError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from matplotlib import pyplot  # pyright: ignore[reportMissingImports]  # an extra
            except ImportError as error:
                raise UpweightError("matplotlib is not installed -> pip install matplotlib") from error
            ax = pyplot.subplots()[1]
        between = [(a * b) ** 0.5 for a, b in pairwise(self.dampings)]
        ax.plot(self.dampings, self.to_chosen, marker="o", label="with the chosen damping")
        ax.plot(between, self.neighbours, marker=".", linestyle=":", label="with the next damping")
        if isinstance(self.chosen, float):
            ax.axvline(self.chosen, color="grey", linewidth=1)
        ax.set(xscale="log", xlabel="damping", ylabel="Spearman correlation, mean over queries")
        ax.legend()
        return ax


def damping_curve(method: Influence, query: Any, dampings: Sequence[float]) -> DampingCurve:
    """Rank agreement of a fitted method's scores over dampings.

    Spearman's rank correlation of each query's scores over the training examples, averaged over queries. Flat and near
    1: the ranking does not hang on the damping. It says nothing about which damping is right.

    Args:
        method: a fitted `Influence`.
        query: queries, as `Influence.attribute` takes them.
        dampings: two or more positive numbers.

    Cost: one `attribute` for every damping and one for the method's own; nothing is fitted again.

    Raises:
        UpweightError: fewer than two dampings, or one that is not positive, or at which H is singular.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3)
        >>> y = (x[:, 0] > 0).long()
        >>> method = uw.Influence(
        ...     torch.nn.Linear(3, 2), uw.Classification(), damping=1e-2, progress=False
        ... ).fit((x, y))
        >>> curve = damping_curve(method, (x[:4], y[:4]), [1e-3, 1e-2, 1e-1])
        >>> curve.to_chosen[1], curve.to_chosen[2] < 1
        (1.0, True)
    """
    if len(dampings) < 2 or not all(0 < d < float("inf") for d in dampings):
        raise UpweightError(
            f"dampings={list(dampings)}, expected two or more positive numbers -> [1e-4, 1e-3, 1e-2] for example"
        )
    numbers = sorted(float(d) for d in dampings)
    examples = Examples(query)
    own = method.attribute(examples)
    reference = _ranks(own.values)
    ranks = [_ranks(method.with_damping(d).attribute(examples).values) for d in numbers]
    by_layer: dict[str, float] = own.info["layer_damping"]
    values = set(by_layer.values())
    return DampingCurve(
        numbers,
        [_agreement(a, b) for a, b in pairwise(ranks)],
        [_agreement(r, reference) for r in ranks],
        values.pop() if len(values) == 1 else by_layer,
    )


def _ranks(scores: Tensor) -> Tensor:
    """Centred ranks of every row, equal scores sharing their mean rank, unit length; a row of equal scores is zero."""
    rows = []
    for row in scores.double():
        _, place, counts = row.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        rows.append((last - (counts - 1) / 2)[place])
    ranks = torch.stack(rows)
    centred = ranks - ranks.mean(1, keepdim=True)
    return centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _agreement(a: Tensor, b: Tensor) -> float:
    return round(float((a * b).sum(1).mean()), 12)
