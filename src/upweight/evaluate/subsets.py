"""Which training sets a bank of retrained models is trained on.

from upweight.evaluate import subsets
subsets.full(n) + subsets.half_subsets(n, 100) + subsets.removals(n, [[3, 14], [15]])
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from upweight.errors import UpweightError

__all__ = ["Subsets", "any_size", "full", "half_subsets", "label_changes", "leave_one_out", "removals"]

Label = int | float | str


@dataclass(frozen=True, eq=False)
class Subsets:
    """Training sets to retrain on, as masks over the full training set.

    ``a + b`` holds those of both, in this order.

    Attributes:
        masks: bool, [subset, train]: True where the example is trained on.
        names: What each is, for people.
        blocks: int, [subset]: subsets that were drawn together share a number. They are not independent, so
            intervals resample them together.
        labels: For each subset, ``{position: label}`` of the examples that are trained on with another label.

    Example:
        >>> both = full(4) + removals(4, [[0, 2]])
        >>> both.names, both.masks.astype(int).tolist()
        (['full', 'without 0, 2'], [[1, 1, 1, 1], [0, 1, 0, 1]])
    """

    masks: np.ndarray
    names: Sequence[str]
    blocks: np.ndarray
    labels: Sequence[Mapping[int, Label]]

    def __post_init__(self) -> None:
        masks = np.asarray(self.masks)
        if masks.ndim != 2 or masks.dtype != bool or 0 in masks.shape:
            raise UpweightError(
                f"masks are {masks.dtype} of shape {masks.shape}, expected bool [subset, train] -> True where kept"
            )
        if not len(masks) == len(self.names) == len(self.blocks) == len(self.labels):
            raise UpweightError(
                f"{len(masks)} masks, {len(self.names)} names, {len(self.blocks)} blocks and {len(self.labels)} label "
                "changes -> give one of each for every subset"
            )
        if not masks.any(axis=1).all():
            raise UpweightError(
                f"subset {self.names[int(np.argmin(masks.any(axis=1)))]!r} is empty -> keep at least one example"
            )
        plain = [{int(i): _plain(i, label) for i, label in changes.items()} for changes in self.labels]
        object.__setattr__(self, "labels", plain)

    @property
    def n(self) -> int:
        """Training examples of the full set."""
        return self.masks.shape[1]

    def __len__(self) -> int:
        return len(self.masks)

    def __add__(self, other: Subsets) -> Subsets:
        if self.n != other.n:
            raise UpweightError(f"subsets of {self.n} and of {other.n} examples -> draw both for one n")
        blocks = np.concatenate([self.blocks, other.blocks + self.blocks.max() + 1])
        masks = np.concatenate([self.masks, other.masks])
        return Subsets(masks, [*self.names, *other.names], blocks, [*self.labels, *other.labels])

    def positions(self, subset: int) -> np.ndarray:
        """Positions of the examples that a subset is trained on, ascending, int64."""
        return np.flatnonzero(self.masks[subset])

    def digest(self, subset: int) -> str:
        """Content hash of one subset and its label changes."""
        labels = json.dumps(sorted(self.labels[subset].items()))
        content = np.packbits(self.masks[subset]).tobytes() + labels.encode()
        return hashlib.blake2b(content, digest_size=16).hexdigest()


def half_subsets(n: int, count: int, fraction: float = 0.5, seed: int = 0, *, paired: bool = True) -> Subsets:
    """Random subsets of one size, uniform without replacement; a larger count begins with the same ones.

    Args:
        n: Training examples.
        count: How many subsets.
        fraction: Share of the examples in each.
        seed: Of the draws.
        paired: Draw them in pairs from the two ends of one permutation: complements, for halves. What depends on the
            examples additively then cancels in a pair's mean, so that fewer models estimate main effects as well.

    Example:
        >>> drawn = half_subsets(6, 4)
        >>> drawn.masks.sum(axis=1).tolist(), drawn.blocks.tolist()
        ([3, 3, 3, 3], [0, 0, 1, 1])
        >>> bool((drawn.masks[0] ^ drawn.masks[1]).all())
        True
    """
    size = round(fraction * n)
    if count < 1 or not 0 < size < n:
        raise UpweightError(
            f"{count} subsets of {size} of {n} examples (fraction {fraction:g}) -> ask for at least one subset, with "
            "at least one example in and one out"
        )
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=bool)
    for subset in range(0, count, 2 if paired else 1):
        order = generator.permutation(n)
        masks[subset, order[:size]] = True
        if paired and subset + 1 < count:
            masks[subset + 1, order[n - size :]] = True
    blocks = np.arange(count) // (2 if paired else 1)
    return Subsets(masks, [f"random {s}" for s in range(count)], blocks, [{}] * count)


def any_size(n: int, count: int, least: float = 0.0, most: float = 1.0, seed: int = 0) -> Subsets:
    """Random subsets of random size, all sizes alike, in pairs of complements: those that Shapley values are made of.

    Args:
        n: Training examples.
        count: How many subsets.
        least: Share of the examples that the smallest has; one example at least.
        most: Share that the largest has; all but one at most.
        seed: Of the draws.

    Example:
        >>> drawn = any_size(6, 4)
        >>> drawn.masks.sum(axis=1).tolist(), drawn.blocks.tolist()
        ([1, 5, 4, 2], [0, 0, 1, 1])
    """
    low, high = max(1, math.ceil(least * n)), min(n - 1, math.floor(most * n))
    if count < 1 or low + high != n or low >= high:
        raise UpweightError(
            f"{count} subsets of {low} to {high} of {n} examples, expected at least one, of sizes around a half: each "
            "comes with its complement -> least=0.1, most=0.9"
        )
    generator = np.random.default_rng(seed)
    masks = np.zeros((count, n), dtype=bool)
    for subset in range(0, count, 2):
        order, size = generator.permutation(n), int(generator.integers(low, high + 1))
        masks[subset, order[:size]] = True
        masks[subset + 1 : subset + 2, order[size:]] = True
    return Subsets(masks, [f"random {s}" for s in range(count)], np.arange(count) // 2, [{}] * count)


def full(n: int) -> Subsets:
    """The whole training set, which removals and changes of labels are compared with."""
    return Subsets(np.ones((1, n), dtype=bool), ["full"], np.zeros(1, dtype=int), [{}])


def leave_one_out(n: int, positions: Sequence[int] | None = None) -> Subsets:
    """All examples but one, for each of these positions (every one, if None), after the whole set.

    Example:
        >>> leave_one_out(3, [1]).masks.astype(int).tolist()
        [[1, 1, 1], [1, 0, 1]]
    """
    chosen = range(n) if positions is None else positions
    if np.ndim(chosen) != 1:
        raise UpweightError(
            f"positions={positions!r}, expected a list of them -> [{positions}] for a single one"
        )
    return full(n) + removals(n, [[i] for i in chosen])


def removals(n: int, groups: Mapping[str, Sequence[int]] | Sequence[Sequence[int]]) -> Subsets:
    """All examples but those of a group, for each group of positions (named ones, if given as a mapping)."""
    members = list(groups.values()) if isinstance(groups, Mapping) else list(groups)
    if not members:
        raise UpweightError("there is no group to remove -> give at least one list of positions")
    masks = np.ones((len(members), n), dtype=bool)
    for mask, group in zip(masks, members, strict=True):
        mask[_positions(group, n)] = False
    names = [*groups] if isinstance(groups, Mapping) else [", ".join(map(str, g[:5])) for g in members]
    more = ["..." if len(g) > 5 and not isinstance(groups, Mapping) else "" for g in members]
    names = [f"without {name}{dots}" for name, dots in zip(names, more, strict=True)]
    return Subsets(masks, names, np.arange(len(members)), [{}] * len(members))


def label_changes(n: int, changes: Sequence[Mapping[int, Label]]) -> Subsets:
    """All examples, some of them with other labels: ``{position: label}`` for each training set.

    Example:
        >>> label_changes(3, [{0: 1}]).names
        ['labels 0=1']
    """
    if not changes:
        raise UpweightError("there is no change of labels -> give at least one {position: label}")
    for change in changes:
        _positions(list(change), n)
    masks = np.ones((len(changes), n), dtype=bool)
    names = ["labels " + ", ".join(f"{k}={v}" for k, v in [*c.items()][:5]) for c in changes]
    return Subsets(masks, names, np.arange(len(changes)), changes)


def _plain(position: int, label: Any) -> Label:
    """A label as Python's own number or string, whatever array or tensor it came from."""
    value = label.item() if np.ndim(label) == 0 and hasattr(label, "item") else label
    if not isinstance(value, int | float | str):
        raise UpweightError(
            f"the new label of example {position} is {label!r:.60}, expected a number or a string -> one label each"
        )
    return value


def _positions(group: Sequence[int], n: int) -> np.ndarray:
    positions = np.asarray(group)
    if positions.size == 0 or positions.dtype.kind not in "iu" or positions.ndim != 1:
        raise UpweightError(
            f"a group is {group!r} -> give the positions of at least one example, as integers"
        )
    if positions.min() < 0 or positions.max() >= n:
        wrong = positions[(positions < 0) | (positions >= n)][0]
        raise UpweightError(f"position {wrong} is not among the {n} examples -> count from 0 to {n - 1}")
    return positions
