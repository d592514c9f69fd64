"""Losses of a batch, examples that see each other, and chance are refused: there, one example has no gradient."""

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net
from cases_basic import mlp
from refusals import IDS, N, data, refused, track
from torch import nn

from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.task import Classification, Task

# Losses of a batch instead of an example

REDUCED = {
    "mean": (lambda losses: losses.mean(), "is a single number, expected one number per example"),
    "sum": (lambda losses: losses.sum(), "is a single number, expected one number per example"),
    "mean, kept as an axis": (
        lambda losses: losses.mean()[None],
        r"is shape \(1,\), expected one number per example",
    ),
    "one per class": (
        lambda losses: losses[:, None].expand(-1, 3),
        r"is shape \(8, 3\), expected one number per",
    ),
    "mean, expanded": (lambda losses: losses.mean().expand(len(losses)), "averaged over the batch"),
    "sum, expanded": (lambda losses: losses.sum().expand(len(losses)), "averaged over the batch"),
    "divided by the batch": (lambda losses: losses / len(losses), "averaged over the batch"),
    "divided by the sum": (lambda losses: losses / losses.sum(), "averaged over the batch"),
    "without the largest": (lambda losses: losses - losses.max(), "averaged over the batch"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", REDUCED)
def test_reduced_losses_are_refused(name, dtype):
    reduce, message = REDUCED[name]

    def loss(model, batch):
        return reduce(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    with refused(message):
        track(mlp().to(dtype), task=Task.from_functions(loss))


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-5, 3e-5, 1e-4, 1e-3, 1.0, 1e3])
def test_reduced_losses_are_refused_however_small_or_large_they_are(size):
    def loss(model, batch):
        return size * F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[1])

    with refused("averaged over the batch"):
        track(mlp(), task=Task.from_functions(loss))


def test_reduced_measurements_are_refused_however_small_they_are():
    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    tracker = track(mlp(), task=Task.from_functions(loss, lambda m, b: 1e-6 * loss(m, b) / len(b[1])))
    with refused("averaged over the batch"):
        tracker.query(data(), IDS)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("margin", [10.0, 12.0, 14.0, 15.0, 16.0, 20.0, 110.0])
def test_tiny_losses_of_a_saturated_model_are_no_trouble(margin, seed):
    torch.manual_seed(seed)
    model = nn.Linear(4, CLASSES)
    x = torch.randn(8, 4)
    y = model(x).argmax(1)
    gap = model(x).topk(2).values
    with torch.no_grad():
        model.weight.mul_(margin / float((gap[:, 0] - gap[:, 1]).min()))
        model.bias.mul_(margin / float((gap[:, 0] - gap[:, 1]).min()))
    tracker = track(model, (x, y))
    tracker.query((x[:5], y[:5]), range(5))


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_measurements_are_refused(name):
    reduce, message = REDUCED[name]

    def measure(model, batch):
        return reduce(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    tracker = track(mlp(), task=Task.from_functions(loss, measure))
    with refused(message):
        tracker.query(data(), IDS)


# Examples that see each other

COUPLED = {
    "centred inputs": lambda m, x: m.b(m.a(x - x.mean(0)).relu()),
    "centred features": lambda m, x: m.b((lambda h: h - h.mean(0))(m.a(x)).relu()),
    "features over the largest": lambda m, x: m.b(m.a(x) / m.a(x).abs().max()),
    "inputs over the largest": lambda m, x: m.b(m.a(x / x.abs().amax(0)).relu()),
    "attention over the batch": lambda m, x: m.b(
        F.scaled_dot_product_attention(m.a(x)[None], x[None], x[None])[0]
    ),
    "neighbour's features": lambda m, x: m.b(m.a(x) + m.a(x).roll(1, 0)),
    "statistics of the batch, by hand": lambda m, x: m.b((m.a(x) - m.a(x).mean(0)) / m.a(x).std(0)),
    "a gate of the batch": lambda m, x: m.b(m.a(x)) * m.a(x).sum().sigmoid(),
}


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_examples_are_refused(name):
    model = Net(COUPLED[name], a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES))
    with refused(r"(the examples see each other|depends on what .* computes for other examples)"):
        track(model)


def test_a_contrastive_loss_is_refused():
    def contrastive(model, batch):
        h = F.normalize(model(batch[0]), dim=1)
        return F.cross_entropy(h @ h.T / 0.1, torch.arange(len(h)), reduction="none")

    with refused("the examples see each other"):
        track(mlp(), task=Task.from_functions(contrastive))


class CoupledBackward(torch.autograd.Function):
    """Couples the gradients of the examples but not their losses."""

    @staticmethod
    def forward(ctx, h):
        return h.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].mean(0, keepdim=True).expand_as(grads[0])


def test_gradients_that_are_coupled_where_losses_are_not_are_refused():
    model = Net(lambda m, x: m.b(CoupledBackward.apply(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES))
    with refused(r"the loss of example image-\d depends on what a.weight computes for other examples"):
        track(model, parameters="b|a.weight")


def test_padding_that_is_not_masked_is_refused():
    """Averages over the longest example of a batch depend on which one that is."""
    model = Net(lambda m, x: m.a(x).mean(1), a=nn.Linear(4, CLASSES))
    items = [(torch.randn(k % 3 + 1, 4), k % CLASSES) for k in range(N)]

    def collate(items):
        x, y = zip(*items, strict=True)
        return nn.utils.rnn.pad_sequence(list(x), batch_first=True), torch.tensor(y)

    loader = torch.utils.data.DataLoader(items, collate_fn=collate)
    with refused(r"the examples see each other \(padding that is not masked\?\)"):
        Tracker(model, Classification(), Examples(loader))


# Train mode and chance


class WithoutStatistics(nn.Module):
    """BatchNorm that keeps no running statistics normalises by the batch in eval mode too."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(4, CLASSES), nn.BatchNorm1d(CLASSES, track_running_stats=False)

    def forward(self, x):
        return self.norm(self.a(x))


IN_TRAIN_MODE = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        r"BatchNorm is in train mode \(1\).*model.eval\(\)",
    ),
    "dropout": (
        nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)),
        r"dropout is in train mode \(1\).* -> .*model.eval\(\)",
    ),
    "alpha dropout": (
        nn.Sequential(nn.Linear(4, 3), nn.AlphaDropout(0.1)),
        r"dropout is in train mode \(1\)",
    ),
    "transformer layer": (
        Net(lambda m, x: m.t(x[:, None])[:, 0, :3], t=nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)),
        r"dropout is in train mode \(t.self_attn, t.dropout, t.dropout1 and 1 more\)",
    ),
    "attention dropout": (
        Net(
            lambda m, x: m.t(x[:, None], x[:, None], x[:, None])[0][:, 0, :3],
            t=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
        ),
        r"dropout is in train mode \(t\)",
    ),
    "recurrent dropout": (
        Net(
            lambda m, x: m.t(x[:, None])[0][:, 0],
            t=nn.LSTM(4, 3, num_layers=2, dropout=0.1, batch_first=True),
        ),
        r"dropout is in train mode \(t\)",
    ),
}
"""{name: (model in train mode, message)}"""


@pytest.mark.parametrize("name", IN_TRAIN_MODE)
def test_modules_in_train_mode_are_refused_by_name(name):
    model, message = IN_TRAIN_MODE[name]
    with refused(message):
        track(model.train())
    track(model.eval())


RANDOM = {
    "dropout function": (lambda m, x: m.a(F.dropout(x, 0.2)), r"dropout is active \(p=0.2\)"),
    "dropout function by keyword": (
        lambda m, x: m.a(F.dropout(x, p=0.2, training=True)),
        r"dropout is active \(p=0.2\)",
    ),
    "dropout of channels": (
        lambda m, x: m.a(F.dropout1d(x[:, None], 0.3)[:, 0]),
        r"dropout1d is active \(p=0.3\)",
    ),
    "alpha dropout function": (lambda m, x: m.a(F.alpha_dropout(x, 0.2, True)), r"alpha_dropout is active"),
    "attention dropout": (
        lambda m, x: m.a(
            F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.1)[:, 0]
        ),
        r"attention dropout is active \(p=0.1\)",
    ),
    "batch norm function": (
        lambda m, x: m.a(F.batch_norm(x, None, None, training=True)),
        "statistics of the batch",
    ),
    "noise of the inputs": (lambda m, x: m.a(x + 0.1 * torch.randn_like(x)), "the forward pass is random"),
    "noise of the features": (lambda m, x: m.a(x) * torch.rand(len(x), 1), "the forward pass is random"),
    "random activations": (lambda m, x: F.rrelu(m.a(x), training=True), "the forward pass is random"),
    "random sampling": (lambda m, x: F.gumbel_softmax(m.a(x)), "the forward pass is random"),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_forward_passes_are_refused(name):
    forward, message = RANDOM[name]
    with refused(message + ".* -> .*(model.eval|eval mode)"):
        track(Net(forward, a=nn.Linear(4, CLASSES)).eval())


def test_inactive_dropout_is_no_trouble():
    def forward(m, x):
        x = F.dropout(F.dropout(x, 0.5, False), p=0.0)
        return m.a(F.alpha_dropout(F.feature_alpha_dropout(x[..., None], 0.3)[..., 0], 0.3, training=False))

    track(Net(forward, a=nn.Linear(4, CLASSES)))
    track(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, CLASSES)).train())


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode():
    with refused(r"norm.weight normalises by the statistics of the batch"):
        track(WithoutStatistics().eval())


def test_a_table_that_counts_the_batch_is_refused():
    model = Net(lambda m, ids: m.table(ids).mean(1), table=nn.Embedding(5, CLASSES, scale_grad_by_freq=True))
    ids = torch.randint(0, 5, (N, 3))
    with refused(r"table.weight has scale_grad_by_freq.* -> set scale_grad_by_freq = False"):
        track(model, (ids, data()[1]))
