"""Models whose rows are cut, sorted or routed by the rest of the batch: exact gradients, or an error that says why."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import flat, gradients
from torch import Tensor, nn
from torch.utils.data import DataLoader

import upweight as uw
from upweight.errors import UpweightError


def scores_of(model, task, train, query, batch_size):
    return uw.GradDot(model, task, batch_size=batch_size, progress=False).fit(train).attribute(query).values


def expected(loss, model, train, query) -> Tensor:
    n, q = len(train[-1]), len(query[-1])
    return flat(gradients(loss, model, query, q)) @ flat(gradients(loss, model, train, n)).T


# Rows cut by size ----------------------------------------------------------------------------------------------------


class Chunked(nn.Module):
    """A language model whose head works on 64 rows at a time."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, tokens):
        z = self.table(tokens).tanh().flatten(0, 1)
        return torch.cat([self.head(part) for part in z.split(64)]).unflatten(0, tokens.shape)


def tokens_loss(model, batch):
    return F.cross_entropy(model(batch[0]).mT, batch[1], reduction="none").sum(1)


@pytest.mark.parametrize("batch_size", [8, 16, 20, 32])
def test_rows_cut_by_the_batchs_size(batch_size):
    """16 texts of 4 tokens make one piece, 20 an odd one, and 32 two of 64 rows that look like 32 texts of two."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (32, 4))
    model, train = Chunked().double(), (tokens, tokens.roll(-1, 1))
    query, task = tuple(t[:4] for t in train), uw.Task.from_functions(tokens_loss)
    if batch_size > 16:
        with pytest.raises(UpweightError, match="batch_size="):
            scores_of(model, task, train, query, batch_size)
    else:
        torch.testing.assert_close(
            scores_of(model, task, train, query, batch_size), expected(tokens_loss, model, train, query)
        )


# Rows sorted by content ----------------------------------------------------------------------------------------------


class Sorting(nn.Module):
    """Sorts its batch by a key, as code for packed sequences does, and back again."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, key):
        order = torch.argsort(key, descending=True, stable=True)
        return self.head(self.first(x[order]).tanh())[torch.argsort(order)]


class Packing(nn.Module):
    """A linear layer that sees the real positions of all sequences one after the other."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        packed = packed._replace(data=self.first(packed.data).tanh())
        padded, _ = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        return self.head(padded.sum(1))


@pytest.mark.parametrize("batch_size", [2, 8, 24])
@pytest.mark.parametrize("network", [Sorting, Packing])
def test_rows_sorted_by_content_that_the_first_examples_do_not_show(network, batch_size):
    torch.manual_seed(0)
    n = 24
    key = torch.full((n,), 3)
    key[16:] = torch.randint(1, 6, (8,))
    shape = (n, 4) if network is Sorting else (n, 5, 4)
    train = torch.randn(shape, dtype=torch.float64), key, torch.randint(0, 3, (n,))
    model, query = network().double(), tuple(t[:4] for t in train)

    def loss(model, batch):
        return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    found = scores_of(model, uw.Classification(), train, query, batch_size)
    torch.testing.assert_close(found, expected(loss, model, train, query))
    ekfac = uw.Influence(
        model, uw.Classification(), damping=0.1, batch_size=batch_size, fisher="empirical", progress=False
    )
    alone = uw.Influence(
        model, uw.Classification(), damping=0.1, batch_size=1, fisher="empirical", progress=False
    )
    torch.testing.assert_close(
        *(method.fit(train).attribute(query).values for method in (ekfac, alone)), rtol=1e-8, atol=1e-10
    )


class Routing(nn.Module):
    """Two experts, of which a batch may leave one without work."""

    def __init__(self):
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 5), nn.Linear(4, 5)]), nn.Linear(5, 3)

    def forward(self, x, expert):
        found = x.new_zeros(len(x), 5)
        for k, layer in enumerate(self.experts):
            found[expert == k] = layer(x[expert == k]).tanh()
        return self.head(found)


@pytest.mark.parametrize("batch_size", [1, 2, 8, 24])
def test_experts_without_work(batch_size):
    torch.manual_seed(0)
    expert = torch.arange(24) // 20
    train = torch.randn(24, 4, dtype=torch.float64), expert, torch.randint(0, 3, (24,))
    model, query = Routing().double(), tuple(t[18:22] for t in train)

    def loss(model, batch):
        return F.cross_entropy(model(*batch[:2]), batch[2], reduction="none")

    found = scores_of(model, uw.Classification(), train, query, batch_size)
    torch.testing.assert_close(found, expected(loss, model, train, query))
    method = uw.Influence(model, uw.Classification(), damping=0.1, batch_size=batch_size, progress=False)
    assert bool(method.fit(train).attribute(query).values.isfinite().all())


# Losses that depend on the batch -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_a_mean_over_padding_is_refused_whatever_the_lengths(seed):
    torch.manual_seed(seed)
    texts = [torch.randint(1, 9, (int(length),)) for length in torch.randint(3, 9, (64,))]
    model = nn.Sequential(nn.Embedding(9, 8, padding_idx=0), nn.Linear(8, 9)).double()

    def padded(items):
        return {"t": nn.utils.rnn.pad_sequence(items, batch_first=True)}

    def loss(model, batch):
        t = batch["t"]
        return F.cross_entropy(model(t).mT, t, ignore_index=0, reduction="none").mean(1)

    with pytest.raises(UpweightError, match="padding that is not masked"):
        uw.GradDot(model, uw.Task.from_functions(loss)).fit(DataLoader(texts, 8, collate_fn=padded))


def test_weights_by_class_that_are_normalised_over_the_batch_are_refused():
    """Of sorted data the first examples have one class, and their weights would be normalised away."""
    torch.manual_seed(0)
    y = torch.arange(3).repeat_interleave(20)
    x, model = torch.randn(60, 4, dtype=torch.float64), nn.Linear(4, 3).double()
    weights = torch.tensor([1.0, 3.0, 9.0], dtype=torch.float64)

    def loss(model, batch):
        w = weights[batch[1]]
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * w / w.mean()

    with pytest.raises(UpweightError, match="in one batch and"):
        uw.GradDot(model, uw.Task.from_functions(loss)).fit((x, y))


def test_padding_that_no_mask_names_is_warned_of():
    """K-FAC would count it, and so depend on the batches; gradients alone do not."""
    torch.manual_seed(0)
    texts = [(torch.randn(int(length), 4), k % 3) for k, length in enumerate(torch.randint(2, 9, (40,)))]

    class Summing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, real):
            return self.head((self.first(x).tanh() * real[..., None]).sum(1))

    def padded(items):
        x, y = zip(*items, strict=True)
        real = nn.utils.rnn.pad_sequence([torch.ones(len(t)) for t in x], batch_first=True)
        return nn.utils.rnn.pad_sequence(list(x), batch_first=True), real, torch.tensor(y)

    loader, model = DataLoader(texts, 8, collate_fn=padded), Summing()
    with pytest.warns(UserWarning, match="counts padding"):
        uw.Influence(model, uw.Classification(), progress=False).fit(loader)
    task = uw.Classification()
    task.mask = lambda batch: batch[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        uw.Influence(model, task, progress=False).fit(loader)
        uw.GradDot(model, uw.Classification(), progress=False).fit(loader)


# Positions before examples -------------------------------------------------------------------------------------------


class PositionsFirst(nn.Module):
    """Merges [position, batch] into one axis, which a text of a single token does not tell from [batch, position]."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)

    def forward(self, tokens):
        batch, length = tokens.shape
        z = self.table(tokens).transpose(0, 1).reshape(length * batch, 4)
        return self.head(self.inner(z).tanh()).reshape(length, batch, 9).transpose(0, 1)


@pytest.mark.parametrize("lengths", [(1, 3, 5), (5, 3, 1), (1, 1, 1)])
def test_positions_before_examples_whatever_length_comes_first(lengths):
    torch.manual_seed(0)
    batches = [{"t": torch.randint(0, 9, (4, length))} for length in lengths]
    model = PositionsFirst().double()

    def loss(model, batch):
        t = batch["t"]
        return F.cross_entropy(model(t).mT, t.roll(1, 1), reduction="none").sum(1)

    class Loader:
        def __iter__(self):
            return iter(batches)

    found = (
        uw.GradDot(model, uw.Task.from_functions(loss), progress=False).fit(Loader()).attribute(batches[1])
    )
    rows = [flat(gradients(loss, model, batch, 4)) for batch in batches]
    torch.testing.assert_close(found.values, rows[1] @ torch.cat(rows).T)
