"""Passes over the training data: by running the model, from memory, or from a cache on disk.

A pass is an iterable, the same each time, of `Step`: which examples, and how to load their gradients if they are
needed. Running the model is the cost of influence functions, so a pass is kept in memory while it fits the budget,
and on disk if the user gives a cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from upweight.data import Examples, Rows
from upweight.errors import UpweightError
from upweight.gradients import Factored, Gradients, Rotated, Tracker
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
        self.draws = draws
        # The random state before each step, learned on the first walk, which loads every step in order.
        self._states = {0: torch.Generator().manual_seed(seed).get_state()}

    def __iter__(self) -> Iterator[Step[Sequence[Gradients]]]:
        for rows in self.examples.batches(self.batch_size):
            yield Step(rows.start, rows.stop, lambda r=rows: self._columns(r))

    def at(self, positions: Sequence[int]) -> list[Gradients]:
        """The columns of these examples, in their order, with the draws that a walk gives them.

        Loads the steps that hold them, and before that, once, those whose random states no walk has learned yet.
        """
        found: list[Sequence[Gradients]] = []
        order: list[int] = []
        for start in range(0, max(positions) + 1, self.batch_size):
            stop = min(start + self.batch_size, self.examples.n)
            here = [k for k, p in enumerate(positions) if start <= p < stop]
            if not here and stop in self._states:
                continue
            columns = self._columns(Rows(start, stop, self.examples.take(range(start, stop))))
            rows = torch.as_tensor([positions[k] - start for k in here], device=self.tracker.device)
            if here:
                found.append([column.rows(rows) for column in columns])
            order += here
        joined = [Gradients.concatenate(list(parts)) for parts in zip(*found, strict=True)]
        back = torch.as_tensor(order, device=self.tracker.device).argsort()
        return [column.rows(back) for column in joined]

    def _columns(self, rows: Rows) -> Sequence[Gradients]:
        generator = torch.Generator()
        generator.set_state(self._states[rows.start])
        ids = self.examples.ids[rows.start : rows.stop]
        columns = self.tracker.fisher(rows.batch, ids, self.kind, self.draws, generator)
        self._states[rows.stop] = generator.get_state()
        return [_without_padding(column, self.tracker, rows.batch) for column in columns]


def _without_padding(gradients: Gradients, tracker: Tracker, batch: Any) -> Gradients:
    """The gradients, knowing which positions the task's mask calls padding."""
    if tracker.task.mask is None:
        return gradients
    mask = tracker.task.mask(tracker.move(batch))
    if mask.ndim != 2 or len(mask) != gradients.batch:
        raise UpweightError(
            f"the task's mask has shape {tuple(mask.shape)}, expected [batch, position] with batch {gradients.batch} "
            "-> return 1 for real positions and 0 for padding"
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
    """A pass whose steps are remembered the first time they are loaded, as many as fit into `budget` bytes.

    Args:
        source: the pass.
        budget: bytes that may be kept; what does not fit is loaded from the source each time.
        nbytes: bytes of what one step loads.
    """

    def __init__(self, source: Pass[Loaded], budget: float, nbytes: Callable[[Loaded], int]) -> None:
        self.source, self.budget, self.nbytes = source, budget, nbytes
        self._kept: dict[int, Loaded] = {}
        self._bounds: list[tuple[int, int]] = []
        self._used = 0

    @property
    def share_in_memory(self) -> float:
        """Share of the steps that the next walk reads from memory."""
        return len(self._kept) / len(self._bounds) if self._bounds else 0.0

    def release(self) -> None:
        """Give up what is kept, and keep nothing from now on: its memory is needed for something better."""
        self._kept.clear()
        self._used, self.budget = 0, 0

    def replace(self, start: int, change: Callable[[Loaded], Loaded]) -> None:
        """Keep something else instead of what is kept of the step that begins with this example."""
        before = self._kept[start]
        self._kept[start] = change(before)
        self._used += self.nbytes(self._kept[start]) - self.nbytes(before)

    def __iter__(self) -> Iterator[Step[Loaded]]:
        if self.share_in_memory == 1:  # the source need not even be read
            for start, stop in self._bounds:
                yield Step(start, stop, lambda s=start: self._kept[s])
            return
        bounds = []
        for step in self.source:
            bounds.append((step.start, step.stop))
            yield Step(step.start, step.stop, lambda s=step: self._load(s))
        self._bounds = bounds

    def _load(self, step: Step[Loaded]) -> Loaded:
        if step.start in self._kept:
            return self._kept[step.start]
        loaded = step.load()
        size = self.nbytes(loaded)
        if self._used + size <= self.budget:
            self._kept[step.start] = loaded
            self._used += size
        return loaded


def counted(steps: Iterable[Any], advance: Callable[[int], None]) -> Iterator[Any]:
    """The steps of a pass, each counted for a progress bar when it is done."""
    for step in steps:
        yield step
        advance(step.stop - step.start)


class LoadedSteps:
    """A pass whose steps are read: ``(start, what belongs to them)``, each counted when it is done."""

    def __init__(self, source: Iterable[Any], advance: Callable[[int], None] = lambda _: None) -> None:
        self.source, self.advance = source, advance

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for step in counted(self.source, self.advance):
            yield step.start, step.load()


class InEigenbasis:
    """Keeps training gradients in the eigenbasis of a curvature instead of as factors, once all are in memory.

    EK-FAC's eigenvalues from the empirical Fisher need every training gradient rotated; scores then cost one matrix
    product, without forming the gradients again.

    Attributes:
        layers: those that are kept so.
    """

    def __init__(self, training: Kept[Gradients]) -> None:
        self.training = training
        self.layers: frozenset[str] = frozenset()

    @property
    def wanted(self) -> bool:
        """Whether all training gradients are in memory."""
        return self.training.share_in_memory == 1

    def put(self, start: int, blocks: Mapping[str, Rotated]) -> None:
        """Keep these layers of the step that begins with this example rotated."""
        self.layers = frozenset(blocks)
        self.training.replace(start, lambda kept: Gradients({**kept, **blocks}, kept.router))
