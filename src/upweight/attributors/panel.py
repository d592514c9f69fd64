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

BEYOND = 2.0
"""A query is beyond the terms if its expected error is more than this many tolerances: of all queries together, the
tolerance is the root mean square."""


@dataclass(frozen=True)
class Panel:
    """Preconditioned queries.

    Attributes:
        queries: all of them.
        exact: some of them again, in the form of an exact route; the layers that separable terms serve.
        rows: which these are.
    """

    queries: Gradients
    exact: Gradients
    rows: Tensor

    def __matmul__(self, train: Transposed) -> Tensor:
        """Inner products [query, train], summed over layers."""
        return torch.stack(list(self.by_layer(train).values())).sum(0)

    def by_layer(self, train: Transposed) -> dict[str, Tensor]:
        """Inner products [query, train] of each layer."""
        scores = self.queries.by_layer(train)
        few = Gradients({name: train.gradients[name] for name in self.exact})
        for name, part in self.exact.by_layer(few.T).items():
            scores[name][self.rows] = part
        return scores


def gather_panel(
    parts: Iterable[Gradients], total: int, inverse: Any, router: Router, tolerance: float
) -> Gradients | Panel:
    """Preconditioned queries from several batches, `total` of them, in the form that is contracted many times."""
    exact: list[Gradients] = []
    rows: list[Tensor] = []
    # One route, whatever the machine's rates: a run that is resumed ends with the same scores.
    route = Router(force="stream")

    def prepared() -> Iterator[Gradients]:
        start = 0
        for part in parts:
            if router.terms:
                beyond = (query_errors(part, inverse, router.terms) > BEYOND * tolerance).nonzero()[:, 0]
                if len(beyond):
                    served = Gradients({name: part[name] for name in router.terms})
                    exact.append(route.prepare(served.rows(beyond)))
                    rows.append(start + beyond)
            start += part.batch
            yield router.prepare(part)

    queries = Gradients.gather(prepared(), total).with_router(router)
    if not exact:
        return queries
    return Panel(queries, Gradients.concatenate(exact).with_router(route), torch.cat(rows))
