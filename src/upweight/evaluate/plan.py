"""Which models a bank trains, and which of them first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate.checks import most_different
from upweight.evaluate.records import run_key
from upweight.evaluate.runs import Run
from upweight.evaluate.subsets import Subsets, half_subsets

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """Every subset with every seed.

    Seeds are the outer loop: a bank that is stopped early has every subset before it has a second seed of one.
    """

    subsets: Subsets
    seeds: list[int]

    @classmethod
    def of(cls, n: int, subsets: Subsets | int, seeds: int | Sequence[int]) -> Plan:
        """The plan of these subsets and seeds, or of so many.

        Raises:
            UpweightError: They are no subsets of n examples, or no different seeds.
        """
        chosen = half_subsets(n, int(subsets)) if isinstance(subsets, int | np.integer) else subsets
        if not isinstance(chosen, Subsets):
            raise UpweightError(
                f"subsets is {type(subsets).__name__}, expected Subsets or how many to draw -> subsets=100 for example"
            )
        if chosen.n != n:
            raise UpweightError(f"the subsets are of {chosen.n} examples, but n={n} -> draw them for n={n}")
        numbers = (
            list(range(int(seeds))) if isinstance(seeds, int | np.integer) else [int(seed) for seed in seeds]
        )
        if not numbers or len(set(numbers)) < len(numbers):
            raise UpweightError(
                f"seeds={seeds!r}, expected at least one and no repeats -> seeds=3 for example"
            )
        return cls(chosen, numbers)

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
