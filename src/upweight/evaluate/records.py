"""What a bank's folder calls its shards, and what a run of the bank reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from torch import Tensor

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.evaluate.runs import Run
from upweight.store import ShardStore

__all__ = [
    "BankReport",
    "about_queries",
    "attempt_key",
    "failures",
    "kept_state",
    "later_key",
    "plain_ids",
    "run_key",
    "tries_left",
]

ATTEMPTS = 2
"""How often a run may fail with one train_fn before its failure is reported."""


@dataclass(frozen=True)
class BankReport:
    """What a call of `RetrainingBank.run` did.

    Attributes:
        trained: Models trained and kept by this call.
        finished: Models the bank holds now, of ``planned``.
        planned: Subsets times seeds.
        failed: ``(subset, seed, error)`` of runs that failed whenever they were tried; they take part in nothing.
        seconds: Wall time of this call.
    """

    trained: int
    finished: int
    planned: int
    failed: list[tuple[int, int, str]]
    seconds: float

    def __str__(self) -> str:
        lines = [
            f"{self.finished} of {self.planned} models ({self.trained} trained now, in {self.seconds:.1f} s), "
            f"{len(self.failed)} failed"
        ]
        lines += [f"  subset {subset}, seed {seed}: {error}" for subset, seed, error in self.failed[:10]]
        return "\n".join(lines if len(self.failed) <= 10 else [*lines, "  ..."])


def run_key(subset: int, seed: int) -> str:
    """The shard of a finished model."""
    return f"run-{subset:05d}-{seed}"


def attempt_key(run: Run, number: int) -> str:
    """The shard that says how an attempt failed."""
    return f"failed-{number}-{run.key}"


def failures(store: ShardStore, run: Run) -> list[dict[str, Any]]:
    """What is known of each failed attempt at a run, the first one first."""
    found: list[dict[str, Any]] = []
    while store.has(key := attempt_key(run, len(found) + 1)):
        found.append(store.meta(key))
    return found


def tries_left(store: ShardStore, run: Run, train_fn: str) -> int:
    """How often to try an unfinished run now: until it has failed twice with this code, and once in any case.

    Whatever made it fail (a full disk, a bug in a module that train_fn calls) may have gone since.
    """
    return max(1, ATTEMPTS - sum(failed["train_fn"] == train_fn for failed in failures(store, run)))


def about_queries(store: ShardStore, run: Run, name: str) -> dict[str, Any]:
    """Fingerprint and ids of the queries that a finished run measured under a name; empty if it did not."""
    if store.has(later_key(run, name)):
        return store.meta(later_key(run, name))
    return store.meta(run.key)["queries"].get(name, {})


def later_key(run: Run, name: str) -> str:
    """The shard of what a kept model measured later."""
    return f"later-{quote(name, safe='')}-{run.key}"


def kept_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in a finished model's shard."""
    state = {name.removeprefix("model/"): t for name, t in tensors.items() if name.startswith("model/")}
    if not state:
        raise UpweightError("this bank kept no models -> run it with keep_models=True in a new folder")
    return state


def plain_ids(examples: Examples) -> dict[str, Any]:
    """The ids, unless they are positions."""
    return {} if isinstance(examples.ids, range) else {"ids": list(examples.ids)}
