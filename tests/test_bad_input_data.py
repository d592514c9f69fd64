"""Data that has no fixed order, or is no data, is refused with the way out."""

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
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from upweight.data import Examples
from upweight.errors import UpweightError

N = 10
X, Y = torch.arange(2.0 * N).reshape(N, 2), torch.arange(N)


class Pairs(Dataset):
    """A map-style data set of (x, y)."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index], int(Y[index])


class StreamOfPairs(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y, strict=True))


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
    assert torch.equal(Examples(plain).take(range(N))[1], Y)

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
        (torch.zeros(N, dtype=torch.long), r"the ids repeat -> every example needs its own id"),
        ([[i] for i in range(N)], r"ids\[0\] is \[0\] -> use integers or strings"),
        ([i + 0.5 for i in range(N)], r"ids\[0\] is 0.5 -> use integers or strings"),
    ],
)
def test_unusable_ids_are_refused(ids, message):
    with pytest.raises(UpweightError, match=message):
        Examples((X, Y), ids=ids)


def test_a_data_set_without_a_length_is_refused():
    class Endless(Dataset):
        def __getitem__(self, index):
            return X[index], Y[index]

    with pytest.raises(UpweightError, match="Endless has no length -> give it __len__"):
        Examples(Endless())
