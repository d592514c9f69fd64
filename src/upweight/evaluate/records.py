"""What a bank's folder calls its shards, and what a run of the bank reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from torch import Tensor

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.evaluate.runs import Run

__all__ = ["BankReport", "attempt_key", "kept_state", "later_key", "plain_ids", "run_key"]


@dataclass(frozen=True)
class BankReport:
    """What a call of `RetrainingBank.run` did.

    Attributes:
        trained: Models trained and kept by this call.
        finished: Models the bank holds now, of ``planned``.
        planned: Subsets times seeds.
        failed: ``(subset, seed, error)`` of runs that failed twice; they take part in nothing.
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
