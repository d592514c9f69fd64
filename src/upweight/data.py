"""A training or query set as batches in one fixed order, each example with an id.

Rows of a score matrix mean nothing unless example 17 is example 17 in every pass. `Examples` therefore reads whatever a
user has (tensors, arrays, a Dataset, a DataLoader) in one order, and refuses what has none: a loader that shuffles
unpredictably, a data set that returns another image each time it is asked.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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

from upweight.errors import UpweightError

FINGERPRINT_ITEMS = 256
"""How many evenly spaced examples of a lazily read data set go into its fingerprint; tensors are hashed whole."""


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
        self._source = data if isinstance(data, (_Tensors, _Items, _Stream)) else _open(data)
        self.n = self._source.n
        if self.n == 0:
            raise UpweightError("the data is empty -> pass at least one example")
        if ids is not None and len(ids) != self.n:
            raise UpweightError(f"{len(ids)} ids were given for {self.n} examples -> pass one id per example")
        self.ids: Sequence[Any] = range(self.n) if ids is None else list(ids)
        if len(self.ids) != len(set(self.ids)):
            raise UpweightError("the ids repeat -> every example needs its own id")
        self._fingerprint: str | None = None
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
    def preferred_batch_size(self) -> int | None:
        """The batch size that the data insists on (a stream's), else None."""
        return self._source.batch_size

    def fingerprint(self) -> str:
        """Content hash: of every value for tensors, of 256 evenly spaced examples for data sets read from elsewhere."""
        if self._fingerprint is None:
            digest = hashlib.blake2b(str(self.n).encode(), digest_size=16)
            for batch in self._source.sample_for_fingerprint():
                _hash_tree(digest, batch)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class _Tensors:
    """Tensors or arrays that share their first axis."""

    batch_size = None

    def __init__(self, tree: Any) -> None:
        self.tree = map_tensors(tree, lambda t: t)
        lengths = {_length(t) for t in tensors_in(self.tree)}
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

    def check_repeatable(self) -> None:
        pass  # indexing a tensor twice gives the same numbers

    def sample_for_fingerprint(self) -> Iterator[Any]:
        yield self.tree


class _Items:
    """A map-style data set, read by index."""

    batch_size = None

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], workers: int = 0) -> None:
        self.dataset, self.collate, self.workers = dataset, collate, workers
        self.n = len(dataset)

    def batches(self, batch_size: int) -> Iterator[Rows]:
        loader = DataLoader(
            self.dataset, batch_size, shuffle=False, collate_fn=self.collate, num_workers=self.workers
        )
        for k, batch in enumerate(loader):
            yield Rows(k * batch_size, min((k + 1) * batch_size, self.n), as_tensors(batch))

    def take(self, positions: Sequence[int]) -> Any:
        return as_tensors(self.collate([self.dataset[int(i)] for i in positions]))

    def check_repeatable(self) -> None:
        probe = range(min(self.n, 4))
        if not _same_twice(lambda: self.take(probe)):
            raise UpweightError(
                "the first examples differ when read twice, expected the same numbers (random augmentation?) -> pass "
                "the data set with its random transforms switched off, as the trained model sees it at test time"
            )

    def sample_for_fingerprint(self) -> Iterator[Any]:
        picked = np.unique(np.linspace(0, self.n - 1, FINGERPRINT_ITEMS).astype(int))
        for position in picked:
            yield self.take([position])


class _Stream:
    """Batches from an iterable that can only be read from its beginning, in the order in which they come."""

    def __init__(self, iterable: Iterable[Any]) -> None:
        self.iterable = iterable
        self.sizes = [_batch_length(as_tensors(batch)) for batch in self._read()]
        self.n = sum(self.sizes)
        self.batch_size = max(self.sizes, default=None)

    def _read(self) -> Iterator[Any]:
        with torch.random.fork_rng(devices=[]):
            yield from self.iterable

    def batches(self, batch_size: int) -> Iterator[Rows]:
        start, seen = 0, 0
        for batch in self._read():
            batch = as_tensors(batch)
            size = _batch_length(batch)
            if seen >= len(self.sizes) or size != self.sizes[seen]:
                break
            yield Rows(start, start + size, batch)
            start, seen = start + size, seen + 1
        if start != self.n:
            raise UpweightError(
                f"the loader gave {start} examples in the batches of its first reading of {self.n} -> pass a data set, "
                "or a loader that gives the same batches each time"
            )

    def take(self, positions: Sequence[int]) -> Any:
        first = as_tensors(next(iter(self._read())))
        size = _batch_length(first)
        return map_tensors(first, lambda t: t[[int(p) % size for p in positions]])

    def check_repeatable(self) -> None:
        if self.n and not _same_twice(lambda: next(iter(self._read()))):
            raise UpweightError(
                "the loader's first batch differs when read twice, expected one fixed order (shuffling or random "
                "augmentation?) -> pass the data set itself, or a loader with shuffle=False and no random transforms"
            )

    def sample_for_fingerprint(self) -> Iterator[Any]:
        yield from (rows.batch for rows in self.batches(0))


def _open(data: Any) -> _Tensors | _Items | _Stream:
    if isinstance(data, DataLoader):
        return _open_loader(data)
    if isinstance(data, TensorDataset):
        return _Tensors(tuple(data.tensors))
    if isinstance(data, (Tensor, np.ndarray)) or (
        isinstance(data, (tuple, list, Mapping)) and _only_tensors(data)
    ):
        return _Tensors(as_tensors(data))
    if isinstance(data, IterableDataset):
        raise UpweightError(
            "an IterableDataset has no length and no ids, expected a map-style Dataset -> wrap it in a DataLoader that "
            "yields the same batches each time, or load it into tensors"
        )
    if isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
        return _Items(data, torch_collate)
    if isinstance(data, Iterable) and not isinstance(data, Iterator):
        return _Stream(data)
    raise UpweightError(
        f"the data is {type(data).__name__}, expected a Dataset, a DataLoader, or (inputs, targets) -> a one-shot "
        "iterator cannot be read twice; put it in a list"
    )


def _open_loader(loader: DataLoader) -> _Tensors | _Items | _Stream:
    in_order = isinstance(loader.sampler, SequentialSampler)
    whole_shuffle = (
        isinstance(loader.sampler, RandomSampler)
        and not loader.sampler.replacement
        and loader.sampler.num_samples == len(loader.sampler.data_source)
    )
    if loader.batch_sampler is not None and type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        return _Stream(loader)
    if isinstance(loader.dataset, IterableDataset) or not (in_order or whole_shuffle):
        return _Stream(
            loader
        )  # a sampler that picks its own subset: its order must hold still, which is checked
    if isinstance(loader.dataset, TensorDataset) and loader.collate_fn is torch_collate:
        return _Tensors(tuple(loader.dataset.tensors))
    # A plain shuffle only permutes: row i of a result belongs to dataset[i], as a user would look it up.
    return _Items(loader.dataset, loader.collate_fn or torch_collate, loader.num_workers)


def as_tensors(tree: Any) -> Any:
    """The same nesting with every numpy array (or number) as a tensor."""
    if isinstance(tree, Tensor):
        return tree
    if isinstance(tree, (np.ndarray, np.generic)):
        array = np.asarray(tree)
        if array.dtype == object:
            raise UpweightError(
                "an array holds Python objects, expected numbers -> convert it to a numeric dtype"
            )
        return torch.from_numpy(np.ascontiguousarray(array))
    if isinstance(tree, Mapping):
        return {key: as_tensors(value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(as_tensors(value) for value in tree)
    if isinstance(tree, list):
        return [as_tensors(value) for value in tree]
    return tree


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with `function` applied to every tensor in it."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Every tensor of a nesting, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for key in tree:
            yield from tensors_in(tree[key])
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from tensors_in(value)


def signature(batch: Any) -> list[str]:
    """Shapes of one example and dtypes, for error messages and cache checks: ``["float32[3, 32, 32]", "int64[]"]``."""
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in tensors_in(batch)]


def _only_tensors(tree: Any) -> bool:
    leaves = tree.values() if isinstance(tree, Mapping) else tree
    # A plain list of tensors is a list of examples or batches, not a structure: only tuples and dicts are one.
    return (
        not isinstance(tree, list)
        and len(tree) > 0
        and all(isinstance(v, (Tensor, np.ndarray)) for v in leaves)
    )


def _length(tensor: Tensor) -> int:
    if tensor.ndim == 0:
        raise UpweightError(
            "a tensor of the data has no axes, expected the examples along the first -> add an axis"
        )
    return len(tensor)


def _batch_length(batch: Any) -> int:
    sizes = {_length(t) for t in tensors_in(batch)}
    if len(sizes) != 1:
        raise UpweightError(
            f"a batch holds tensors with first axes of {sorted(sizes)}, expected one -> align them"
        )
    return sizes.pop()


def _same_twice(read: Callable[[], Any]) -> bool:
    with torch.random.fork_rng(devices=[]):
        first, second = list(tensors_in(as_tensors(read()))), list(tensors_in(as_tensors(read())))
    return len(first) == len(second) and all(
        a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(first, second, strict=True)
    )


def _hash_tree(digest: Any, tree: Any) -> None:
    for tensor in tensors_in(tree):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
