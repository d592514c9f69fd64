"""Examples left out of an exact Hessian of a small model: the matrix without them, factorised anew.

Where an example's own Hessian has no short root (a loss that is not convex in the outputs, a network's second
derivatives) there is no closed form; a Cholesky factorisation of ``H + (change_i / n) H_i + damping I`` always is one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.gradients.blocks import Dense


class DenseReweighted:
    """``(H + (1/n) sum_i change_i H_i + damping I)^-1`` by refactorisation, one example at a time or a group at once.

    Args:
        damped: ``H + damping I`` [p, p].
        own: ``members -> sum of their Hessians`` [p, p], without a regulariser.
        n: number of training examples.
        ids: the members' ids, for the error.
        change: by how much each member's weight of 1 changes, [members]; -1 (removal) if None.

    Cost: p products with each member's Hessian, and a Cholesky factorisation of size p for each.

    Raises:
        UpweightError: without an example the damped Hessian is not positive definite.
    """

    def __init__(
        self,
        damped: Tensor,
        own: Callable[[list[int]], Tensor],
        n: int,
        ids: Sequence[Any],
        change: Tensor | None = None,
    ) -> None:
        self.damped, self.own, self.n, self.ids = damped, own, n, list(ids)
        self.change = damped.new_full((len(self.ids),), -1.0) if change is None else change.to(damped)
        self._factors: dict[tuple[int, ...], Tensor] = {}

    def solve_group(self, gradients: Gradients) -> Gradients:
        """``(H + (1/n) sum_i change_i H_i + damping I)^-1 g`` for every vector g [k, p]."""
        rows = gradients.dense().to(self.damped)
        return as_gradients(self.solve(range(len(self.ids)), rows, "the group"), gradients)

    def solve(self, members: Sequence[int], rows: Tensor, name: str) -> Tensor:
        """The same for vectors [k, p] and the changes of these members alone."""
        key = tuple(members)
        if key not in self._factors:
            moved = self.damped.clone()
            for change in self.change[list(members)].unique().tolist():
                own = self.own([k for k in members if float(self.change[k]) == change])
                moved += (change / self.n) * (own + own.T) / 2
            factor, failed = torch.linalg.cholesky_ex(moved)
            if int(failed):
                lowest = float(torch.linalg.eigvalsh(moved)[0])
                raise UpweightError(
                    f"the damped Hessian without {name} has the eigenvalue {lowest:.3g}, expected positive ones -> "
                    f"raise the damping by more than {max(-lowest, 0):.2g}, or use curvature='ggn'"
                )
            self._factors = {key: factor} if len(key) == 1 else {**self._factors, key: factor}
        return torch.cholesky_solve(rows.T, self._factors[key]).T


def as_gradients(flat: Tensor, like: Gradients) -> Gradients:
    """Vectors [k, p] as `Gradients` with the layers of `like`."""
    widths = [block[:1].dense().shape[1] for block in like.values()]
    return Gradients(
        {name: Dense(v) for name, v in zip(like, flat.split(widths, 1), strict=True)}, like.router
    )
