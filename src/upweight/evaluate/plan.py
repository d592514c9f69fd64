"""Which models a bank trains, and which of them first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from upweight.evaluate.checks import most_different
from upweight.evaluate.records import run_key
from upweight.evaluate.runs import Run
from upweight.evaluate.subsets import Subsets

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Every subset with every seed.

    Seeds are the outer loop: a bank that is stopped early has every subset before it has a second seed of one.
    """

    subsets: Subsets
    seeds: list[int]

    def __iter__(self) -> Iterator[Run]:
        for seed in self.seeds:
            for subset in range(len(self.subsets)):
                yield self.run(subset, seed)

    def run(self, subset: int, seed: int) -> Run:
        """One model to train."""
        indices, labels = self.subsets.positions(subset), dict(self.subsets.labels[subset])
        return Run(subset, seed, run_key(subset, seed), indices, labels)

    def waves(self) -> list[list[Run]]:
        """First the few models that show whether train_fn heeds its indices and its seed, then the rest."""
        a, b = most_different(self.subsets)
        first = [self.run(a, self.seeds[0])]
        if b is None:  # all subsets are nearly the same: two halves, for this question alone
            for half, indices in enumerate(np.array_split(np.arange(self.subsets.n), 2)):
                if len(indices):
                    first.append(Run(-1 - half, self.seeds[0], f"probe-{half}", indices, {}))
        else:
            first.append(self.run(b, self.seeds[0]))
        first += [self.run(a, seed) for seed in self.seeds[1:2]]
        taken = {run.key for run in first}
        return [first, [run for run in self if run.key not in taken]]
