"""Data is read in one fixed order whatever form it comes in, and data without one is refused."""

import random

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
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
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


FORMS = {
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


# Data without a fixed order


class Augmented(Dataset):
    """A flip with probability one half, drawn from the source of chance that is asked for."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 100

    def __getitem__(self, index):
        x = torch.tensor([float(index + 1), 0.0])
        return (x.flip(0) if self.draw() < 0.5 else x), 0


DRAWS = {
    "torch": lambda: float(torch.rand(())),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002
    "python": lambda: random.random(),
}


@pytest.mark.parametrize("source", DRAWS)
@pytest.mark.parametrize("seed", range(20))
def test_random_augmentation_is_refused_whatever_the_seed(source, seed):
    torch.manual_seed(seed), np.random.seed(seed), random.seed(seed)  # noqa: NPY002
    with oracles.untouched(nn.Identity()):
        for data in (
            Augmented(DRAWS[source]),
            DataLoader(Augmented(DRAWS[source]), batch_size=50, shuffle=True),
        ):
            with pytest.raises(
                UpweightError, match=r"first examples differ when read twice.* -> .*random transforms"
            ):
                Examples(data)


UNORDERED = {
    "random batch sampler": lambda: DataLoader(
        Pairs(), batch_sampler=BatchSampler(RandomSampler(range(N)), 3, drop_last=False), collate_fn=None
    ),
    "subset sampler": lambda: DataLoader(Pairs(), batch_size=4, sampler=SubsetRandomSampler(range(N))),
    "drawing with replacement": lambda: DataLoader(
        Pairs(), batch_size=4, sampler=WeightedRandomSampler(torch.ones(N), N)
    ),
    "sampling with replacement": lambda: DataLoader(
        Pairs(), batch_size=4, sampler=RandomSampler(range(N), replacement=True)
    ),
    "part of a shuffle": lambda: DataLoader(
        Pairs(), batch_size=4, sampler=RandomSampler(range(N), num_samples=5)
    ),
    "shuffling iterable": lambda: Reshuffled(lambda: torch.randperm(N)),
    "iterable shuffled by numpy": lambda: Reshuffled(lambda: np.random.permutation(N)),  # noqa: NPY002
    "generator of its own": lambda: Reshuffled(generator_of_its_own()),
}


class Reshuffled:
    def __init__(self, permutation):
        self.permutation = permutation

    def __iter__(self):
        order = torch.as_tensor(self.permutation())
        for part in order.split(5):
            yield X[part], Y[part]


def generator_of_its_own():
    generator = torch.Generator().manual_seed(0)
    return lambda: torch.randperm(N, generator=generator)


@pytest.mark.parametrize("form", [form for form in UNORDERED if form != "random batch sampler"])
def test_loaders_without_a_fixed_order_are_refused(form):
    data = UNORDERED[form]()
    with (
        oracles.untouched(nn.Identity()),
        pytest.raises(UpweightError, match=r"differs when read again.* -> pass the data set itself"),
    ):
        Examples(data)


def test_a_loader_that_batches_at_random_is_refused_unless_it_is_a_plain_shuffle():
    """A standard batch sampler over a shuffle is what ``shuffle=True`` makes: it is read in the data set's order."""
    plain = UNORDERED["random batch sampler"]()
    assert torch.equal(leaves(Examples(plain).take(range(N)))[1], Y)

    class Buckets(BatchSampler):
        pass

    with pytest.raises(UpweightError, match="differs when read again"):
        Examples(DataLoader(Pairs(), batch_sampler=Buckets(RandomSampler(range(N)), 3, drop_last=False)))


def test_a_change_after_the_first_batch_is_noticed():
    class LaterOnly:
        readings = 0

        def __iter__(self):
            self.readings += 1
            yield X[:5], Y[:5]
            yield X[5:] + (self.readings > 3), Y[5:]

    examples = Examples(LaterOnly())
    with pytest.raises(UpweightError, match=r"batch 1 of the loader differs when read again"):
        for _ in range(3):
            list(examples.batches(5))


def test_a_loader_that_grows_or_shrinks_is_noticed():
    for length in (1, 3):

        class Changing:
            batches = 2

            def __iter__(self):
                return iter([(X[:5], Y[:5])] * self.batches)

        data = Changing()
        examples = Examples(data)
        data.batches = length
        with pytest.raises(UpweightError, match=r"batch \d of the loader differs"):
            list(examples.batches(5))


# Data that is no data


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((), "the data is empty"),
        ([], "the data is empty"),
        ((X[:0], Y[:0]), "the data is empty"),
        (TensorDataset(X[:0]), "the data is empty"),
        ((X, Y[:3]), r"first axes of \[3, 10\], expected one length -> align"),
        ((X, torch.tensor(3)), "has no axes"),
        ((X, [0, 1, 2]), r"element 1 of the data is list, expected tensors or arrays.* -> torch.as_tensor"),
        ({"x": X, "labels": [0, 1, 2]}, r"element 'labels' of the data is list"),
        (((X[0], 0), (X[1], 1)), r"element 0 of the data is tuple.* -> .*list of examples"),
        (({"x": [1]}, Y), "element 'x' of the data is list"),
        (np.array([object()]), "an array holds object values, expected numbers"),
        ((X, np.array(["cat"] * N)), "an array holds <U3 values, expected numbers"),
        (iter([(X, Y)]), r"the data is list_iterator.* -> .*one-shot iterator into a list"),
        ("train.csv", "the data is str, expected a Dataset"),
        (3, "the data is int, expected a Dataset"),
        (StreamOfPairs(), "an IterableDataset has no length and no ids"),
    ],
)
def test_unusable_data_is_refused(data, message):
    with pytest.raises(UpweightError, match=message) as caught:
        Examples(data)
    assert "\n" not in str(caught.value) and " -> " in str(caught.value)


def test_data_frames_are_refused():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2.0], "y": [0, 1]})
    with pytest.raises(UpweightError, match=r"the data is DataFrame.* -> .*to_numpy"):
        Examples(frame)
    with pytest.raises(UpweightError, match="element 0 of the data is DataFrame"):
        Examples((frame, frame["y"]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (range(3), r"3 ids were given for 10 examples -> pass one id per example"),
        ([0] * N, r"the ids repeat -> every example needs its own id"),
    ],
)
def test_unusable_ids_are_refused(ids, message):
    with pytest.raises(UpweightError, match=message):
        Examples((X, Y), ids=ids)


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
