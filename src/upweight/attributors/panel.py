"""A panel of preconditioned queries, of which those that separable terms do not suffice for take exact routes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from upweight.gradients import Gradients, Router
from upweight.gradients.gradients import Transposed
from upweight.gradients.separable import query_errors


@dataclass(frozen=True)
class Panel:
    """Preconditioned queries.

    Attributes:
        queries: all of them.
        exact: some of them again, in the form of the exact routes.
        rows: which these are.
    """

    queries: Gradients
    exact: Gradients
    rows: Tensor

    def __matmul__(self, train: Transposed) -> Tensor:
        """Inner products [query, train], summed over layers."""
        return self._placed(self.queries @ train, self.exact @ train)

    def by_layer(self, train: Transposed) -> dict[str, Tensor]:
        """Inner products [query, train] of each layer."""
        exact = self.exact.by_layer(train)
        return {name: self._placed(part, exact[name]) for name, part in self.queries.by_layer(train).items()}

    def _placed(self, scores: Tensor, exact: Tensor) -> Tensor:
        scores[self.rows] = exact
        return scores


def gather_panel(
    parts: Iterable[Gradients], total: int, inverse: Any, router: Router, tolerance: float
) -> Gradients | Panel:
    """Preconditioned queries from several batches, `total` of them, in the form that is contracted many times."""
    exact: list[Gradients] = []
    rows: list[Tensor] = []

    def prepared() -> Iterator[Gradients]:
        start = 0
        for part in parts:
            if router.terms:
                beyond = (query_errors(part, inverse, router.terms) > tolerance).nonzero()[:, 0]
                if len(beyond):
                    exact.append(Router().prepare(part.rows(beyond)))
                    rows.append(start + beyond)
            start += part.batch
            yield router.prepare(part)

    queries = Gradients.gather(prepared(), total).with_router(router)
    return Panel(queries, Gradients.concatenate(exact), torch.cat(rows)) if exact else queries
