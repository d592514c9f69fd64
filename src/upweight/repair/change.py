"""What is done to a training set: examples removed, given other labels or other weights; and the set that results.

The changed set gives example i a weight w_i (0 where it is removed, 1 where nothing happens) and perhaps another label.
Its objective is

    J'(theta) = (1/N) sum_i w_i l'_i(theta) + (1/2) sum_j l2_j theta_j^2

with N = n (convention "sum", the divisor stays) or N = sum_i w_i ("mean", as ordinary retraining divides).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._ids import as_ids, positions_of
from upweight._trees import map_tensors
from upweight.curvature.l2 import CONVENTIONS
from upweight.data import Examples, Rows, Source, _Tensors
from upweight.errors import UpweightError
from upweight.fingerprint import Versions
from upweight.repair.targets import Label, check_named, different, real, with_targets
from upweight.task import FisherKind, Task


@dataclass(frozen=True)
class Change:
    """A change of a training set of n examples, by position.

    Attributes:
        n: examples before the change.
        removed: positions of those that go.
        labels: {position: new label}.
        weights: {position: new weight}, neither 0 nor 1.
        ids: {position: id} of everything that is named above.
    """

    n: int
    removed: Sequence[int] = ()
    labels: Mapping[int, Label] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    ids: Mapping[int, Any] = field(default_factory=dict)

    @property
    def kept(self) -> np.ndarray:
        """Positions that stay, ascending."""
        mask = np.ones(self.n, dtype=bool)
        mask[list(self.removed)] = False
        return np.flatnonzero(mask)

    @property
    def total(self) -> float:
        """The sum of the weights after the change."""
        return self.n - len(self.removed) + sum(w - 1 for w in self.weights.values())

    def divisor(self, convention: str) -> float:
        """N of the changed objective."""
        if convention not in CONVENTIONS:
            raise UpweightError(f"convention={convention!r} is unknown -> use one of {list(CONVENTIONS)}")
        return float(self.n) if convention == "sum" else self.total

    @property
    def groups(self) -> dict[str, list[int]]:
        """{"forgotten" | "repaired" | "reweighted": positions}, those that are not empty."""
        found = {
            "forgotten": list(self.removed),
            "repaired": list(self.labels),
            "reweighted": [p for p in self.weights if p not in self.labels],
        }
        return {name: positions for name, positions in found.items() if positions}

    @property
    def untouched(self) -> list[int]:
        """Positions that nothing is done to."""
        touched = {*self.removed, *self.labels, *self.weights}
        return [p for p in range(self.n) if p not in touched]

    def describe(self) -> str:
        """In words."""
        parts = [
            f"{len(positions):,} {name}" for name, positions in self.groups.items()
        ]  # "forgotten" and the like
        return f"{', '.join(parts)} of {self.n:,} training examples"


def read_change(
    examples: Examples,
    remove: Any = None,
    labels: Mapping[Any, Any] | None = None,
    weights: Mapping[Any, float] | None = None,
    task: Task | None = None,
) -> Change:
    """The change that a user asks for, by ids; with errors that name the ids.

    Args:
        examples: the training data.
        remove: ids to remove.
        labels: {id: new label}. Labels that are the given ones already are no change.
        weights: {id: new weight}; 0 removes, 1 is no change.
        task: what the data is for, which says which tensor of a batch is the target; not asked if None.
    """
    known = examples.ids
    removed = [] if remove is None else positions_of(known, remove)
    new_labels = dict(zip(positions_of(known, as_ids(labels, "ids")), labels.values())) if labels else {}
    given = dict(zip(positions_of(known, as_ids(weights, "ids")), weights.values())) if weights else {}
    new_weights = {p: _weight(w, known[p]) for p, w in given.items()}
    both = {*removed} & ({*new_labels} | {*new_weights})
    if both:
        raise UpweightError(
            f"example {known[min(both)]!r} is to be removed and also to be changed ({len(both)} such) -> decide on one"
        )
    gone = [p for p, w in new_weights.items() if w == 0]
    if both := {*gone} & {*new_labels}:
        raise UpweightError(
            f"example {known[min(both)]!r} gets weight 0 and also a label ({len(both)} such) -> decide on one"
        )
    found = Change(
        examples.n,
        removed=sorted({*removed, *gone}),
        labels=_different(examples, new_labels, task),
        weights={p: w for p, w in new_weights.items() if w not in (0, 1)},
    )
    named = {*found.removed, *found.labels, *found.weights}
    if not named:
        raise UpweightError(
            "nothing would change (labels and weights are the ones the examples have), expected a change -> name "
            "examples to remove, other labels or other weights"
        )
    if len(found.removed) == examples.n:
        raise UpweightError(
            f"all {examples.n} training examples would go, expected some to stay -> an untrained model holds none"
        )
    return Change(found.n, found.removed, found.labels, found.weights, {p: known[p] for p in sorted(named)})


def _weight(weight: Any, name: Any) -> float:
    number = real(weight)
    if number is None or not 0 <= number < math.inf:
        raise UpweightError(
            f"the weight of example {name!r} is {weight!r}, expected a finite number >= 0 -> 0 removes it, 1 leaves it "
            "as it is"
        )
    return float(number)


def _different(examples: Examples, labels: Mapping[int, Any], task: Task | None) -> dict[int, Label]:
    """The labels that differ from the given ones, as plain numbers."""
    if not labels:
        return {}
    batch = examples.take(list(labels))
    check_named(task, batch)
    return different(labels, batch, {p: examples.ids[p] for p in labels})


# The changed data ----------------------------------------------------------------------------------------------------


def changed(examples: Examples, change: Change) -> Examples:
    """The training set after the change, with its own ids; each batch with its weights where there are any."""
    weights = None
    if change.weights:
        weights = torch.ones(change.n, dtype=torch.float64)
        weights[list(change.weights)] = torch.tensor(list(change.weights.values()), dtype=torch.float64)
    return selected(examples, change.kept, change.labels, weights)


def selected(
    examples: Examples,
    positions: Sequence[int] | np.ndarray,
    labels: Mapping[int, Label] | None = None,
    weights: Tensor | None = None,
) -> Examples:
    """The examples at these ascending positions, with these labels, and with these weights [n] beside each batch."""
    positions = np.asarray(positions, dtype=np.int64)
    ids = [examples.ids[int(p)] for p in positions]
    return Examples(_Changed(examples, positions, labels or {}, weights), ids)


def without_weights(examples: Examples) -> Examples:
    """The changed examples, their batches without weights beside them."""
    source = examples._source
    if not isinstance(source, _Changed) or source.weights is None:
        return examples
    return Examples(_Changed(source.base, source.positions, source.labels, None), examples.ids)


def weights_of(examples: Examples) -> Tensor | None:
    """The changed examples' weights [n], or None where all are 1."""
    source = examples._source
    if not isinstance(source, _Changed) or source.weights is None:
        return None
    return source.weights[torch.from_numpy(source.positions)]


class _Changed(Source):
    """Some of another data set's examples, in its order, with other labels and weights."""

    def __init__(
        self, base: Examples, positions: np.ndarray, labels: Mapping[int, Label], weights: Tensor | None
    ) -> None:
        self.base, self.positions, self.labels, self.weights = base, positions, labels, weights
        self.n = len(positions)
        self.batch_size = base.preferred_batch_size
        self._kept = np.zeros(base.n, dtype=bool)
        self._kept[positions] = True

    def batches(self, batch_size: int) -> Iterator[Rows]:
        if (
            self.batch_size is None and 2 * self.n < self.base.n
        ):  # few: not all are read for them, and batches are full
            for start in range(0, self.n, batch_size):
                stop = min(start + batch_size, self.n)
                yield Rows(start, stop, self.take(range(start, stop)))
            return
        start = 0
        for rows in self.base.batches(batch_size):
            here = np.flatnonzero(self._kept[rows.start : rows.stop])
            if not len(here):
                continue
            index = torch.from_numpy(here)
            batch = rows.batch
            if len(here) < len(rows):
                batch = map_tensors(batch, lambda t, i=index: t[i.to(t.device)])
            yield Rows(start, start + len(here), self._altered(batch, here + rows.start))
            start += len(here)

    def take(self, positions: Sequence[int]) -> Any:
        theirs = self.positions[np.asarray(list(positions), dtype=np.int64)]
        return self._altered(self.base.take(theirs.tolist()), theirs)

    def versions(self) -> Versions:
        return self.base.versions()

    def sample_for_fingerprint(self) -> Iterator[Any]:
        yield torch.from_numpy(self.positions)
        yield torch.tensor([[float(p), float(label)] for p, label in sorted(self.labels.items())])
        yield self.weights if self.weights is not None else torch.zeros(0)
        if 2 * self.n < self.base.n and isinstance(
            self.base._source, _Tensors
        ):  # not all of it, for a few of them
            yield self.base.take(self.positions.tolist())
            return
        yield torch.frombuffer(bytearray(self.base.fingerprint().encode()), dtype=torch.uint8)

    def _altered(self, batch: Any, positions: np.ndarray) -> Any:
        here = [(k, self.labels[int(p)]) for k, p in enumerate(positions) if int(p) in self.labels]
        if here:
            batch = with_targets(batch, here)
        return batch if self.weights is None else (batch, self.weights[torch.from_numpy(positions)])


class Weighted(Task):
    """A task on batches ``(batch, weights [batch])``: losses times weights, and so their curvature.

    Args:
        task: the task without weights.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.higher_is_better, self.unit = task.higher_is_better, task.unit
        mask = task.mask
        self.mask = None if mask is None else lambda batch: mask(batch[0])

    @property
    def name(self) -> str:
        return f"weighted {self.task.name}"

    def train_loss(self, model: nn.Module, batch: Any) -> Tensor:
        losses = self.task.train_loss(model, batch[0])
        return losses * batch[1].to(losses)

    @property
    def draws_apart(self) -> bool:
        return self.task.draws_apart

    def fisher_columns(self, model: nn.Module, batch: Any, kind: FisherKind, draws: int) -> int:
        return self.task.fisher_columns(model, batch[0], kind, draws)

    def pseudo_losses(
        self,
        model: nn.Module,
        batch: Any,
        kind: FisherKind,
        draws: int,
        generator: torch.Generator,
        drawn: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        scalars, drawn = self.task.pseudo_losses(model, batch[0], kind, draws, generator, drawn)
        weights = batch[1].to(scalars)[:, None]
        # The empirical Fisher is of the weighted loss's own gradients; the others are curvatures, linear in the weight.
        return scalars * (weights if kind == "empirical" else weights.sqrt()), drawn

    def output_shape(self, model: nn.Module, batch: Any) -> tuple[int, ...] | None:
        return self.task.output_shape(model, batch[0])

    def check_targets(self, batch: Any, ids: Sequence[Any], output_shape: tuple[int, ...] | None) -> None:
        self.task.check_targets(batch[0], ids, output_shape)
