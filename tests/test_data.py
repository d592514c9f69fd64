"""Data is read in one fixed order whatever form it comes in, and data without one is refused."""

from typing import NamedTuple

import numpy as np
import oracles
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from upweight.data import Examples, as_tensors, map_tensors, signature, tensors_in
from upweight.errors import UpweightError

N = 10
X, Y = torch.arange(2.0 * N).reshape(N, 2), torch.arange(N)


class Pairs(Dataset):
    """A map-style data set of (x, y)."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class Dicts(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, index):
        return {"x": X[index].numpy(), "labels": int(Y[index])}


class Batches:
    """A re-iterable of batches, which cannot be indexed."""

    def __init__(self, *stops):
        self.stops = stops

    def __iter__(self):
        for start, stop in zip((0, *self.stops), (*self.stops, N), strict=True):
            yield X[start:stop], Y[start:stop]


class StreamOfPairs(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


class WholeBatches(Dataset):
    """A data set whose elements are batches already."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return X[5 * index : 5 * index + 5], Y[5 * index : 5 * index + 5]


class Shifted(TensorDataset):
    """A tensor data set whose items are not what its tensors hold: here, put right again."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 1, y


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


FORMS = {
    "named tuple": lambda: Pair(X, Y),
    "tensor data set with items of its own": lambda: Shifted(X - 1, Y),
    "loader of a tensor data set with items of its own": lambda: DataLoader(Shifted(X - 1, Y), batch_size=3),
    "loader with a batch sampler of the data set": lambda: DataLoader(
        TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(Y), 3, drop_last=True)
    ),
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "dict of tensors": lambda: {"x": X, "labels": Y},
    "dict of arrays": lambda: {"x": X.numpy(), "labels": Y.numpy()},
    "nested dict": lambda: ({"x": X}, Y),
    "tensor data set": lambda: TensorDataset(X, Y),
    "map-style data set": Pairs,
    "data set of dicts": Dicts,
    "subset": lambda: Subset(Pairs(), range(N)),
    "list of examples": lambda: [(X[i], int(Y[i])) for i in range(N)],
    "loader": lambda: DataLoader(Pairs(), batch_size=4),
    "loader of tensors": lambda: DataLoader(TensorDataset(X, Y), batch_size=3),
    "shuffling loader": lambda: DataLoader(Pairs(), batch_size=4, shuffle=True),
    "shuffling loader of tensors": lambda: DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True),
    "loader that drops the last batch": lambda: DataLoader(Pairs(), batch_size=4, drop_last=True),
    "loader with a batch sampler": lambda: DataLoader(
        Pairs(), batch_sampler=BatchSampler(SequentialSampler(range(N)), 4, drop_last=False)
    ),
    "loader of an iterable data set": lambda: DataLoader(StreamOfPairs(), batch_size=4),
    "loader of whole batches": lambda: DataLoader(WholeBatches(), batch_size=None),
    "batches": lambda: Batches(4, 8),
    "batches of other sizes": lambda: Batches(1, 2, 7),
    "loader of an own order": lambda: DataLoader(Pairs(), batch_size=4, sampler=list(range(N))),
    "examples again": lambda: Examples((X, Y)),
}


def leaves(batch):
    x, y = tensors_in(batch)
    return x, y


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch_size", [1, 4, 5, N, 100])  # n = k B, n = k B + r, one batch
def test_every_form_is_read_in_order_without_losing_any(form, batch_size):
    examples = Examples(FORMS[form]())
    assert len(examples) == N and list(examples.ids) == list(range(N))
    for _ in range(2):
        read = list(examples.batches(batch_size))
        assert [rows.start for rows in read[1:]] == [rows.stop for rows in read[:-1]]
        assert read[0].start == 0 and read[-1].stop == N
        assert [len(leaves(rows.batch)[1]) for rows in read] == [len(rows) for rows in read]
        assert torch.equal(torch.cat([leaves(rows.batch)[0] for rows in read]).float(), X)
        assert torch.equal(torch.cat([leaves(rows.batch)[1] for rows in read]), Y)


@pytest.mark.parametrize("form", FORMS)
def test_any_examples_can_be_taken(form):
    examples = Examples(FORMS[form]())
    for positions in ([0], [7], [0, 1, 1], [9, 2, 5], range(N)):
        x, y = leaves(examples.take(positions))
        assert torch.equal(x.float(), X[list(positions)])
        assert torch.equal(y, Y[list(positions)])


@pytest.mark.parametrize("form", FORMS)
def test_reading_leaves_the_global_random_states_alone(form):
    data = FORMS[form]()
    with oracles.untouched(nn.Identity()):
        examples = Examples(data)
        for _ in examples.batches(3):
            pass
        examples.take([0, 1])
        examples.fingerprint()
        next(iter(examples.batches(3)))  # abandoned half-way


def test_a_stream_keeps_its_own_batches():
    examples = Examples(Batches(1, 5))
    assert [(rows.start, rows.stop) for rows in examples.batches(3)] == [(0, 1), (1, 5), (5, N)]
    assert examples.preferred_batch_size == 5
    assert Examples((X, Y)).preferred_batch_size is None


def test_a_stream_may_change_its_lengths():
    batches = [
        (torch.ones(2, 3), torch.zeros(2)),
        (torch.ones(3, 3), torch.zeros(3)),
        (torch.ones(2, 5), torch.zeros(2)),
    ]

    class Ragged:
        def __iter__(self):
            return iter(batches)

    examples = Examples(Ragged())
    assert examples.n == 7 and examples.alike == 5
    assert leaves(examples.take([0, 4]))[0].shape == (2, 3)
    assert leaves(examples.take([5, 6]))[0].shape == (2, 5)
    with pytest.raises(UpweightError, match=r"other shapes.*float32\[3\].*-> .*pads"):
        examples.take([0, 6])


def test_arrays_may_be_read_only():
    x = X.numpy().copy()
    x.flags.writeable = False
    assert torch.equal(leaves(Examples((x, Y)).take([3]))[0], X[[3]])


def test_an_own_sampler_sets_the_order():
    order = [3, 1, 2]
    examples = Examples(DataLoader(Pairs(), batch_size=2, sampler=order))
    assert examples.n == 3
    assert torch.equal(leaves(examples.take([0, 1, 2]))[1], Y[order])


@pytest.mark.parametrize("data", [Pairs(), TensorDataset(X, Y)])
def test_a_batch_sampler_keeps_its_samplers_order(data):
    order = [3, 1, 7, 9]
    examples = Examples(DataLoader(data, batch_sampler=BatchSampler(order, 2, drop_last=False)))
    assert examples.n == len(order)
    assert torch.equal(torch.cat([leaves(rows.batch)[1] for rows in examples.batches(2)]), Y[order])


def test_named_tuples_stay_named():
    class Named(Dataset):
        def __len__(self):
            return N

        def __getitem__(self, index):
            return Pair(X[index], Y[index])

    examples = Examples(Named())
    batch = map_tensors(examples.take([1, 2]), lambda t: t + 1)
    assert torch.equal(batch.y, Y[1:3] + 1)
    assert isinstance(next(examples.batches(4)).batch, Pair)


@pytest.mark.parametrize(
    "items", [[{"ids": [1, 2]}, {"ids": [3, 4]}], [torch.ones(2), torch.ones(3)], [object(), object()]]
)
def test_examples_that_do_not_stack_are_refused(items):
    with pytest.raises(UpweightError, match="collate_fn that pads"):
        Examples(items)


def test_a_collate_function_is_kept():
    def collate(items):
        x, y = zip(*items, strict=True)
        return {"x": torch.stack(x), "labels": torch.tensor(y)}

    examples = Examples(DataLoader(Pairs(), batch_size=2, collate_fn=collate, shuffle=True))
    assert list(examples.take([0, 5])) == ["x", "labels"]


def test_worker_processes_read_the_same():
    examples = Examples(DataLoader(Pairs(), batch_size=2, num_workers=1))
    assert torch.equal(torch.cat([leaves(rows.batch)[1] for rows in examples.batches(4)]), Y)


# Ids and fingerprints


def test_ids_name_the_examples():
    names = [f"image {i}" for i in range(N)]
    examples = Examples((X, Y), ids=names)
    assert examples.ids == names
    assert Examples(examples).ids == names
    assert Examples(examples, ids=range(5, 5 + N)).ids == list(range(5, 5 + N))


def test_fingerprints_tell_contents_apart():
    prints = {
        "same": Examples((X, Y)).fingerprint(),
        "value": Examples((X + torch.eye(N, 2), Y)).fingerprint(),
        "label": Examples((X, Y.flip(0))).fingerprint(),
        "dtype": Examples((X.double(), Y)).fingerprint(),
        "shape": Examples((X[:, None], Y)).fingerprint(),
        "length": Examples((X[:9], Y[:9])).fingerprint(),
    }
    assert len(set(prints.values())) == len(prints)
    assert Examples((X.clone(), Y.clone())).fingerprint() == prints["same"]
    assert Examples(DataLoader(TensorDataset(X, Y), shuffle=True)).fingerprint() == prints["same"]
    assert Examples(Pairs()).fingerprint() == Examples(DataLoader(Pairs(), batch_size=4)).fingerprint()


# Trees of tensors


def test_trees_keep_their_form():
    tree = {"a": (X, [Y]), "b": "text"}
    doubled = map_tensors(tree, lambda t: 2 * t)
    assert (
        torch.equal(doubled["a"][0], 2 * X)
        and torch.equal(doubled["a"][1][0], 2 * Y)
        and doubled["b"] == "text"
    )
    assert [t.shape for t in tensors_in(tree)] == [X.shape, Y.shape]
    assert signature((X, Y)) == ["float32[2]", "int64[]"]
    assert isinstance(as_tensors({"a": np.float32(3)})["a"], torch.Tensor)


def test_a_single_number_of_a_column_has_a_fingerprint():
    table = torch.arange(12.0).reshape(6, 2)
    one = Examples((table[:1], table[:1, 1]))  # stride 2, and yet contiguous
    assert one.fingerprint() == Examples((table[:1].clone(), torch.tensor([1.0]))).fingerprint()
    assert one.fingerprint() != Examples((table[:1], table[:1, 0])).fingerprint()


def test_a_sampler_of_a_part_of_the_data_gives_that_part():
    table = torch.arange(12.0)[:, None]
    for part in (range(5), range(7)):
        loader = DataLoader(TensorDataset(table), batch_size=2, sampler=SequentialSampler(part))
        examples = Examples(loader)
        assert examples.n == len(part)
        assert torch.equal(torch.cat([rows.batch[0] for rows in examples.batches(2)]), table[: len(part)])
