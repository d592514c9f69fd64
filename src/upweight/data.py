"""A training or query set as batches in one fixed order, each example with an id.

Rows of a score matrix mean nothing unless example 17 is example 17 in every pass. `Examples` therefore reads whatever a
user has (tensors, arrays, a Dataset, a DataLoader) in one order, and refuses what has none: a loader that shuffles
unpredictably, a data set that returns another image each time it is asked.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.data import default_collate as torch_collate

from upweight._ids import as_ids
from upweight._random import preserved
from upweight._trees import (
    as_tensors,
    batch_length,
    concatenate,
    digest_of,
    hash_tree,
    length,
    map_tensors,
    signature,
    tensors_in,
)
from upweight.errors import UpweightError
from upweight.fingerprint import Versions, data_versions

FINGERPRINT_ITEMS = 256
"""How many evenly spaced examples of a lazily read data set go into its fingerprint; tensors are hashed whole."""
REPEATED_ITEMS = 32
"""How many examples of a map-style data set are read twice: a flip with probability 1/2 shows among them."""


@dataclass(frozen=True)
class Rows:
    """A batch: examples ``start`` to ``stop`` of the fixed order, collated."""

    start: int
    stop: int
    batch: Any

    def __len__(self) -> int:
        return self.stop - self.start


class Examples:
    """A data set in one fixed order.

    Args:
        data: a pair, tuple or dict of tensors or arrays that share their first axis; a map-style `Dataset`; a
            `DataLoader` (a shuffling one is read in the order of its data set); or any other re-iterable of batches.
        ids: one id (int or str) an example; positions 0, 1, ... if None.

    Raises:
        UpweightError: the data is empty, has no fixed order, or comes back different when read twice.

    Example:
        >>> import torch
        >>> examples = Examples((torch.arange(5.0)[:, None], torch.arange(5)))
        >>> [(rows.start, rows.stop) for rows in examples.batches(2)]
        [(0, 2), (2, 4), (4, 5)]
    """

    def __init__(self, data: Any, ids: Sequence[int | str] | None = None) -> None:
        if isinstance(data, Examples):
            ids = data.ids if ids is None else ids
            data = data._source
        self._source = data if isinstance(data, Source) else _open(data)
        self.n = self._source.n
        if self.n == 0:
            raise UpweightError("the data is empty -> pass at least one example")
        ids = None if ids is None else as_ids(ids, "ids")
        if ids is not None and len(ids) != self.n:
            raise UpweightError(f"{len(ids)} ids were given for {self.n} examples -> pass one id per example")
        self.ids: Sequence[Any] = range(self.n) if ids is None else ids
        if len(self.ids) != len(set(self.ids)):
            raise UpweightError("the ids repeat -> every example needs its own id")
        self._fingerprint: tuple[Versions, str] | None = None
        self._source.check_repeatable()

    def __len__(self) -> int:
        return self.n

    def batches(self, batch_size: int) -> Iterator[Rows]:
        """All examples in order, `batch_size` at a time (a stream keeps the batches it comes in)."""
        return self._source.batches(batch_size)

    def take(self, positions: Sequence[int]) -> Any:
        """The examples at these positions, collated into one batch."""
        return self._source.take(positions)

    @property
    def alike(self) -> int:
        """How many examples, from the first on, can be collated with one another (a stream may change its lengths)."""
        return self._source.alike if isinstance(self._source, _Stream) else self.n

    @property
    def preferred_batch_size(self) -> int | None:
        """The batch size that the data insists on (a stream's), else None."""
        return self._source.batch_size

    def versions(self) -> Versions:
        """A cheap sign of whether what is held in memory was written to."""
        return self._source.versions()

    def fingerprint(self) -> str:
        """Content hash: of every value for tensors, of 256 evenly spaced examples for data sets read from elsewhere.

        It is worked out again where tensors or arrays that were given as such were written to since.
        """
        versions = self.versions()
        if self._fingerprint is None or self._fingerprint[0] != versions:
            digest = hashlib.blake2b(str(self.n).encode(), digest_size=16)
            for batch in self._source.sample_for_fingerprint():
                hash_tree(digest, batch)
            self._fingerprint = versions, digest.hexdigest()
        return self._fingerprint[1]


class Source(ABC):
    """Where examples are read from, in one fixed order.

    Attributes:
        n: how many there are.
        batch_size: the batch size that the source insists on, or None.
    """

    n: int
    batch_size: int | None = None

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Rows]:
        """All examples in order; about `batch_size` at a time."""

    @abstractmethod
    def take(self, positions: Sequence[int]) -> Any:
        """The examples at these positions, collated."""

    def check_repeatable(self) -> None:  # noqa: B027 - nothing to check is the rule: tensors give the same numbers
        """Raise if reading twice gives other numbers."""

    def versions(self) -> Versions:
        """A cheap sign of whether what is held in memory changed."""
        return ()

    @abstractmethod
    def sample_for_fingerprint(self) -> Iterator[Any]:
        """Batches whose content is hashed."""


class _Tensors(Source):
    """Tensors or arrays that share their first axis."""

    def __init__(self, tree: Any) -> None:
        self.tree = map_tensors(tree, lambda t: t)
        lengths = {length(t) for t in tensors_in(self.tree)}
        if len(lengths) != 1:
            raise UpweightError(
                f"tensors have first axes of {sorted(lengths)}, expected one length -> align them"
            )
        self.n = lengths.pop()

    def batches(self, batch_size: int) -> Iterator[Rows]:
        for start in range(0, self.n, batch_size):
            stop = min(start + batch_size, self.n)
            yield Rows(start, stop, map_tensors(self.tree, lambda t, a=start, b=stop: t[a:b]))

    def take(self, positions: Sequence[int]) -> Any:
        index = torch.as_tensor(list(positions))
        return map_tensors(self.tree, lambda t: t[index.to(t.device)])

    def versions(self) -> Versions:
        return data_versions(tensors_in(self.tree))

    def sample_for_fingerprint(self) -> Iterator[Any]:
        yield self.tree


class _Items(Source):
    """A map-style data set, read by index."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], workers: int = 0) -> None:
        self.dataset, self.collate, self.workers = dataset, collate, workers
        self.n = len(dataset)

    def batches(self, batch_size: int) -> Iterator[Rows]:
        loader = DataLoader(
            self.dataset, batch_size, shuffle=False, collate_fn=self.collate, num_workers=self.workers
        )
        for k, batch in enumerate(_undisturbed(loader)):
            yield Rows(k * batch_size, min((k + 1) * batch_size, self.n), as_tensors(batch))

    def take(self, positions: Sequence[int]) -> Any:
        with preserved():
            return self._read(positions)

    def _read(self, positions: Sequence[int]) -> Any:
        items = [self.dataset[int(i)] for i in positions]
        if self.collate is not torch_collate:
            return as_tensors(self.collate(items))
        for key, value in items[0].items() if items and isinstance(items[0], Mapping) else ():
            if isinstance(value, (list, tuple)):
                raise _uncollatable(f"{key!r} of an example is a {type(value).__name__}")
        try:
            return as_tensors(torch_collate(items))
        except (RuntimeError, TypeError) as error:
            raise _uncollatable(f"examples do not make a batch ({error})") from error

    def check_repeatable(self) -> None:
        probe = range(min(self.n, REPEATED_ITEMS))
        if not _same_twice(lambda: self._read(probe)):
            raise UpweightError(
                "the first examples differ when read twice, expected the same numbers (random augmentation?) -> pass "
                "the data set with its random transforms switched off, as the trained model sees it at test time"
            )

    def sample_for_fingerprint(self) -> Iterator[Any]:
        picked = np.unique(np.linspace(0, self.n - 1, FINGERPRINT_ITEMS).astype(int))
        for position in picked:
            yield self.take([position])


class _Stream(Source):
    """Batches from an iterable that can only be read from its beginning, in the order in which they come.

    Every reading is compared with the first, batch by batch: rows of a score matrix must stay the same examples.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        self.sizes: list[int] = []
        self.digests: list[str] = []
        shapes: list[list[str]] = []
        for batch in _undisturbed(iterable):
            batch = as_tensors(batch)
            self.sizes.append(batch_length(batch))
            self.digests.append(digest_of(batch))
            shapes.append(signature(batch))
        self.n = sum(self.sizes)
        self.batch_size = max(self.sizes, default=None)
        self.alike = sum(
            size for size, _ in takewhile(lambda b: b[1] == shapes[0], zip(self.sizes, shapes, strict=True))
        )

    def batches(self, batch_size: int) -> Iterator[Rows]:
        start, seen = 0, 0
        for batch in _undisturbed(self.iterable):
            batch = as_tensors(batch)
            if seen >= len(self.sizes) or digest_of(batch) != self.digests[seen]:
                raise _no_fixed_order(f"batch {seen}")
            yield Rows(start, start + self.sizes[seen], batch)
            start, seen = start + self.sizes[seen], seen + 1
        if seen < len(self.sizes):
            raise _no_fixed_order(f"batch {seen}")

    def take(self, positions: Sequence[int]) -> Any:
        found: dict[int, Any] = {}
        for rows in self.batches(0):
            for position in positions:
                if rows.start <= position < rows.stop:
                    k = position - rows.start
                    found[position] = map_tensors(rows.batch, lambda t, k=k: t[k : k + 1])
            if len(found) == len(set(positions)):
                break
        return concatenate([found[p] for p in positions])

    def check_repeatable(self) -> None:
        if self.n and not _same_twice(lambda: next(iter(self.iterable))):
            raise _no_fixed_order("the first batch")

    def sample_for_fingerprint(self) -> Iterator[Any]:
        yield from (rows.batch for rows in self.batches(0))


def _open(data: Any) -> _Tensors | _Items | _Stream:
    if isinstance(data, DataLoader):
        return _open_loader(data)
    if type(data) is TensorDataset:  # a subclass may change what an item is
        return _Tensors(tuple(data.tensors))
    if isinstance(data, (Tensor, np.ndarray)):
        return _Tensors(as_tensors(data))
    if isinstance(data, (tuple, Mapping)) and len(data) > 0:  # a list is a list of examples, not a structure
        _refuse_other_leaves(data)
        return _Tensors(as_tensors(data))
    if isinstance(data, IterableDataset):
        raise UpweightError(
            "an IterableDataset has no length and no ids, expected a map-style Dataset -> wrap it in a DataLoader that "
            "yields the same batches each time, or load it into tensors"
        )
    if isinstance(data, (str, bytes)) or hasattr(data, "to_numpy"):  # data frames index columns, not examples
        raise _unreadable(data)
    if isinstance(data, Dataset) and not hasattr(data, "__len__"):
        raise UpweightError(f"the data set {type(data).__name__} has no length -> give it __len__")
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return _Items(data, torch_collate)
    if isinstance(data, Iterable) and not isinstance(data, Iterator):
        return _Stream(data)
    raise _unreadable(data)


def _unreadable(data: Any) -> UpweightError:
    return UpweightError(
        f"the data is {type(data).__name__}, expected a Dataset, a DataLoader, (inputs, targets), or a list of "
        "examples -> turn a data frame into arrays with .to_numpy(), a one-shot iterator into a list of its examples"
    )


def _refuse_other_leaves(tree: Any) -> None:
    """Raise unless a tuple or dict holds nothing but tensors, arrays and dicts of them."""
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if isinstance(value, Mapping):
            _refuse_other_leaves(value)
        elif not isinstance(value, (Tensor, np.ndarray)):
            raise UpweightError(
                f"element {key!r} of the data is {type(value).__name__}, expected tensors or arrays with the examples "
                "along their first axis -> torch.as_tensor(...), or a list of examples [(input, target), ...]"
            )


def _open_loader(loader: DataLoader) -> _Tensors | _Items | _Stream:
    if type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        return _Stream(loader)  # batches of its own making, or none: the data set gives whole batches
    sampler = (
        loader.batch_sampler.sampler
    )  # not loader.sampler, which says nothing where batch_sampler= was given
    if isinstance(loader.dataset, IterableDataset) or not _is_of_all(sampler, loader.dataset):
        return _Stream(loader)  # a sampler picks its own subset: that its order holds still is checked
    if type(loader.dataset) is TensorDataset and loader.collate_fn is torch_collate:
        return _Tensors(tuple(loader.dataset.tensors))
    return _Items(loader.dataset, loader.collate_fn or torch_collate, loader.num_workers)


def _is_of_all(sampler: Any, dataset: Any) -> bool:
    """Whether a sampler gives the number of every example, once each.

    A plain shuffle only permutes them: row i of a result then belongs to dataset[i], as a user would look it up.
    """
    if type(sampler) is RandomSampler and sampler.replacement:
        return False
    return type(sampler) in (SequentialSampler, RandomSampler) and len(sampler) == len(dataset)


def _undisturbed(iterable: Iterable[Any]) -> Iterator[Any]:
    """The iterable's items, whose making leaves the global random states as they were."""
    with preserved():
        iterator = iter(iterable)
    while True:
        with preserved():
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


def _uncollatable(what: str) -> UpweightError:
    return UpweightError(
        f"{what}, expected tensors or arrays of one shape -> a DataLoader with a collate_fn that pads (a Hugging Face "
        "data set: with_format('torch') too)"
    )


def _same_twice(read: Callable[[], Any]) -> bool:
    with preserved():
        return digest_of(as_tensors(read())) == digest_of(as_tensors(read()))


def _no_fixed_order(what: str) -> UpweightError:
    return UpweightError(
        f"{what} of the loader differs when read again, expected one fixed order (shuffling or random augmentation?) "
        "-> pass the data set itself, or a loader with shuffle=False and no random transforms"
    )
