"""Passes over the training data: by running the model, from memory, or from a cache on disk.

A pass is an iterable, the same each time, of `Step`: which examples, and how to load their gradients if they are needed.
Running the model is the cost of influence functions, so a pass is kept in memory while it fits the budget, and on disk if
the user gives a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Factored, Gradients, Tracker
from upweight.task import FisherKind

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class Step(Generic[Loaded]):
    """Examples ``start`` to ``stop`` of a pass; `load` computes or reads what belongs to them."""

    start: int
    stop: int
    load: Callable[[], Loaded]


class Pass(Protocol[Loaded]):
    """An iterable over all training examples in order, the same each time."""

    def __iter__(self) -> Iterator[Step[Loaded]]: ...


class ModelPass:
    """Training gradients, computed by the model each time."""

    def __init__(self, tracker: Tracker, examples: Examples, batch_size: int) -> None:
        self.tracker, self.examples, self.batch_size = tracker, examples, batch_size

    def __iter__(self) -> Iterator[Step[Gradients]]:
        for rows in self.examples.batches(self.batch_size):
            ids = self.examples.ids[rows.start : rows.stop]
            yield Step(rows.start, rows.stop, lambda b=rows.batch, i=ids: self._gradients(b, i))

    def _gradients(self, batch: Any, ids: Sequence[Any]) -> Gradients:
        return _without_padding(self.tracker.train(batch, ids), self.tracker, batch)


class FisherPass:
    """Fisher columns, computed by the model each time, with the same draws each time."""

    def __init__(
        self, tracker: Tracker, examples: Examples, batch_size: int, kind: FisherKind, draws: int, seed: int
    ) -> None:
        self.tracker, self.examples, self.batch_size = tracker, examples, batch_size
        self.kind: FisherKind = kind
        self.draws, self.seed = draws, seed

    def __iter__(self) -> Iterator[Step[Sequence[Gradients]]]:
        generator = torch.Generator().manual_seed(self.seed)
        for rows in self.examples.batches(self.batch_size):
            ids = self.examples.ids[rows.start : rows.stop]
            columns = self.tracker.fisher(rows.batch, ids, self.kind, self.draws, generator)
            columns = [_without_padding(column, self.tracker, rows.batch) for column in columns]
            yield Step(rows.start, rows.stop, lambda c=columns: c)


def _without_padding(gradients: Gradients, tracker: Tracker, batch: Any) -> Gradients:
    """The gradients, knowing which positions the task's mask calls padding."""
    if tracker.task.mask is None:
        return gradients
    mask = tracker.task.mask(tracker.move(batch))
    if mask.ndim != 2 or len(mask) != gradients.batch:
        raise UpweightError(
            f"the task's mask has shape {tuple(mask.shape)}, expected [batch, position] with batch {gradients.batch} -> "
            "return 1 for real positions and 0 for padding"
        )
    mask = mask.bool()
    blocks = {name: b.masked(mask) if isinstance(b, Factored) else b for name, b in gradients.items()}
    return Gradients(blocks, gradients.router)


class EmpiricalPass:
    """The empirical Fisher's single column: the training gradients themselves."""

    def __init__(self, training: Pass[Gradients]) -> None:
        self.training = training

    def __iter__(self) -> Iterator[Step[Sequence[Gradients]]]:
        for step in self.training:
            yield Step(step.start, step.stop, lambda s=step: [s.load()])


class Kept(Generic[Loaded]):
    """A pass that is remembered the first time it is walked through, if it fits into `budget` bytes.

    Args:
        source: the pass.
        expected: bytes that keeping all of it is expected to take.
        budget: bytes that may be kept.
        nbytes: bytes of what one step loads.
    """

    def __init__(
        self, source: Pass[Loaded], expected: float, budget: float, nbytes: Callable[[Loaded], int]
    ) -> None:
        self.source, self.budget, self.nbytes = source, budget, nbytes
        self.keeps = expected <= budget
        self._steps: list[tuple[int, int, Loaded]] | None = None

    @property
    def in_memory(self) -> bool:
        """Whether the next walk reads from memory."""
        return self._steps is not None

    def __iter__(self) -> Iterator[Step[Loaded]]:
        if self._steps is not None:
            for start, stop, loaded in self._steps:
                yield Step(start, stop, lambda x=loaded: x)
            return
        kept: list[tuple[int, int, Loaded]] = []
        used = 0
        complete = self.keeps
        for step in self.source:
            if not complete:
                yield step
                continue
            wanted = _Once(step.load)
            yield Step(step.start, step.stop, wanted)
            if not wanted.asked:  # a step that nobody loaded (a finished tile) cannot be replayed
                complete, kept = False, []
                continue
            used += self.nbytes(wanted.value)
            if used > self.budget:
                complete, kept = False, []
                continue
            kept.append((step.start, step.stop, wanted.value))
        if complete:
            self._steps = kept


class _Once(Generic[Loaded]):
    def __init__(self, load: Callable[[], Loaded]) -> None:
        self._load = load
        self.asked = False

    def __call__(self) -> Loaded:
        if not self.asked:
            self.value = self._load()
            self.asked = True
        return self.value
