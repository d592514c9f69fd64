"""What has no per-example gradients, or would give wrong ones, is refused in one line: the cause and the way out."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, frozen, parameter
from cases_all import by_parameter
from cases_basic import mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.task import BinaryClassification, Classification, Regression, Task

N = 8
IDS = [f"image-{i}" for i in range(N)]


@contextmanager
def refused(message: str):
    """An UpweightError of one line that says what was seen, and after an arrow what to do."""
    with pytest.raises(UpweightError, match=message) as caught:
        yield
    assert "\n" not in str(caught.value) and " -> " in str(caught.value)
    assert len(str(caught.value)) < 500


def data(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, *(shape or (4,))), torch.arange(N) % CLASSES


def track(model: nn.Module, batch=None, task: Task | None = None, **options) -> Tracker:
    return Tracker(model, task or Classification(), Examples(batch or data(), IDS), **options)


# Values that are not finite


@pytest.mark.parametrize("position", [0, 5])
def test_an_input_that_is_not_finite_is_named(position):
    x, y = data()
    x[position, 2] = float("nan")
    with refused(
        rf"the loss of example image-{position} is nan: its input holds NaN or infinity \(1 such in this batch\)"
    ):
        track(mlp(), (x, y))


@pytest.mark.parametrize("position", [0, 5])
@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_an_infinite_input_is_named_where_the_model_saturates(value, position):
    x, y = data()
    x[position, 2] = value
    with refused(
        rf"the gradient of 0.weight for example image-{position} is not finite.*its input holds NaN or inf"
    ):
        track(mlp(), (x, y)).train((x, y), IDS)


def test_an_input_that_is_not_finite_is_named_in_any_later_batch():
    tracker, (x, y) = track(mlp()), data()
    x[5], x[6] = float("nan"), float("nan")
    for call in (tracker.train, tracker.query):
        with refused(r"example image-5 is nan: its input holds NaN or infinity \(2 such"):
            call((x, y), IDS)
    with refused("example image-5"):
        tracker.fisher((x, y), IDS, "exact", 1, torch.Generator())


def test_a_loss_that_is_not_finite_is_named():
    def logarithm(model, batch):
        return torch.log(batch[0][:, 0]) * model(batch[0]).sum(1)

    x, y = data()
    x[:, 0] = 1 + x[:, 0].abs()
    tracker = track(mlp(), (x, y), Task.from_functions(logarithm))
    x[3, 0] = -1
    with refused(
        r"the loss of example image-3 is nan: its input is finite, so the model or the loss overflows"
    ):
        tracker.train((x, y), IDS)


def test_a_target_that_is_not_finite_is_named():
    x, _ = data()
    y = torch.randn(N, CLASSES)
    y[2, 1] = float("nan")
    with refused(r"the loss of example image-2 is nan: its input holds NaN"):
        track(mlp(), (x, y), Regression())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = mlp()
    model.get_parameter("2.weight").data[1, 2] = value
    with refused(r"parameter 2.weight holds 1 NaN or infinite values -> load a healthy checkpoint"):
        track(model)


def test_a_buffer_that_is_not_finite_shows_in_the_loss():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, CLASSES)).eval()
    model[0].running_mean[0] = float("nan")
    with refused("its input is finite, so the model or the loss overflows"):
        track(model)


def test_a_gradient_that_is_not_finite_is_named_though_its_loss_is():
    """The root's slope at zero is infinite, and zero times infinity is no number."""

    def forward(m, x):
        return m.b(m.a(x).abs().sqrt())

    model = Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES))
    model.a.bias.data.fill_(5.0)
    x, y = data()
    tracker = track(model, (x, y))
    model.a.weight.data.zero_()
    model.a.bias.data.zero_()
    with refused(
        r"the gradient of a.weight for example image-0 is not finite although its loss is.* \(8 such"
    ):
        tracker.train((x, y), IDS)


def test_a_masked_input_that_is_not_finite_is_named_though_its_loss_is():
    """Autograd gives NaN as well: zero times NaN."""

    def forward(m, x):
        return torch.where(x.isnan().any(-1, keepdim=True), 0.0, m.a(x)).sum(1)

    tracker = track(Net(forward, a=nn.Linear(4, CLASSES)), data(3, 4))
    x, y = data(3, 4)
    x[6, 1] = float("nan")
    with refused(r"the gradient of a.weight for example image-6 is not finite.*its input holds NaN"):
        tracker.train((x, y), IDS)


def test_a_gradient_of_the_fallback_that_is_not_finite_is_named():
    model = Net(
        lambda m, x: m.b(x) + (m.scale - m.scale.detach()).abs().sqrt().sum(),
        b=nn.Linear(4, 3),
        scale=parameter(3),
    )

    def loss(model, batch):
        usual = F.cross_entropy(model.b(batch[0]), batch[1], reduction="none")
        return usual + torch.where(
            batch[0][:, 0] > 9, (model.scale - model.scale.detach()).square().sum().sqrt(), 0.0
        )

    x, y = data()
    tracker = track(model, (x, y), Task.from_functions(loss), parameters="b")
    assert by_parameter(tracker, tracker.train((x, y), IDS))["b.weight"].isfinite().all()
    with refused("the gradient of scale for example image-"):
        track(model, (x, y), Task.from_functions(loss)).train((x, y), IDS)


# Targets


@pytest.mark.parametrize("position", [1, 6])
@pytest.mark.parametrize("label", [-1, CLASSES, -100])
def test_a_label_out_of_range_is_named(position, label):
    x, y = data()
    tracker = track(mlp(), (x, y))
    y[position] = label
    message = rf"example image-{position} has label {label}, expected 0 to 2 \(the model has 3 outputs\)"
    with refused(message):
        track(mlp(), (x, y))
    for call in (tracker.train, tracker.query):
        with refused(message):
            call((x, y), IDS)


def test_a_binary_target_out_of_range_is_named():
    x, y = data()
    with refused("example image-2 has target 2, expected 0 or 1"):
        track(nn.Linear(4, 1), (x, y), BinaryClassification())


def test_regression_targets_of_another_shape_are_refused():
    x, _ = data()
    with refused(r"outputs have shape \(2, 3\) but targets \(2,\), expected one shape"):
        track(mlp(), (x, torch.randn(N)), Regression())


def test_float_class_targets_are_refused():
    x, y = data()
    with refused(r"class targets have dtype torch.float32, expected integers -> targets.long\(\)"):
        track(mlp(), (x, y.float()))


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
        r"is shape \(2, 3\), expected one number per",
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


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_reduced_losses_are_refused_however_small_or_large_they_are(size):
    def loss(model, batch):
        return size * F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[1])

    with refused("averaged over the batch"):
        track(mlp(), task=Task.from_functions(loss))


@pytest.mark.parametrize("name", REDUCED)
def test_reduced_measurements_are_refused(name):
    reduce, message = REDUCED[name]

    def measure(model, batch):
        return reduce(F.cross_entropy(model(batch[0]), batch[1], reduction="none"))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    tracker = track(mlp(), task=Task.from_functions(loss, measure))
    message = message.replace(r"\(2, 3\)", r"\(8, 3\)")
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


# Parameters


def test_a_filter_that_matches_nothing_is_refused():
    with refused(
        r"parameters='encoder' matches none of the 6 trainable parameters \(0.weight, 0.bias, .*name some"
    ):
        track(mlp(), parameters="encoder")
    with refused(r"matches none of the 6 trainable parameters"):
        track(mlp(), parameters=lambda name: False)


def test_a_filter_that_is_no_regular_expression_is_refused():
    with refused(r"parameters='\(' is no regular expression"):
        track(mlp(), parameters="(")


def test_a_filter_names_frozen_parameters_in_vain():
    with refused(r"matches none of the 5 trainable parameters"):
        track(frozen(mlp(), "0.weight"), parameters="0.weight")


@pytest.mark.parametrize("model", [nn.Identity(), mlp().requires_grad_(False)], ids=["none", "all frozen"])
def test_a_model_without_trainable_parameters_is_refused(model):
    with refused(r"the model has no trainable parameter \(requires_grad=True\) -> unfreeze"):
        track(model)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64, torch.complex128], ids=str)
def test_unsupported_dtypes_are_refused(dtype):
    with refused(
        rf"parameter 0.weight has dtype {dtype}, expected float32, float64 or bfloat16 -> model.float\(\)"
    ):
        track(mlp().to(dtype))


# Graphs that cannot be differentiated


def test_reentrant_checkpointing_is_refused():
    def forward(m, x):
        return m.b(checkpoint(m.a, x.requires_grad_(), use_reentrant=True))

    with refused(r"reentrant activation checkpointing.* -> pass use_reentrant=False"):
        track(Net(forward, a=nn.Sequential(nn.Linear(4, 4), nn.Tanh()), b=nn.Linear(4, CLASSES)))


DETACHED = {
    "no_grad": lambda m, x: torch.no_grad()(m.a)(x),
    "inference mode": lambda m, x: torch.inference_mode()(m.a)(x),
    "detach": lambda m, x: m.a(x).detach(),
}


@pytest.mark.parametrize("name", DETACHED)
def test_a_loss_without_a_graph_is_refused(name):
    with refused(
        "the loss does not depend on any tracked parameter, expected a gradient -> check the parameter filter"
    ):
        track(Net(DETACHED[name], a=nn.Linear(4, CLASSES)))


def test_an_input_that_is_overwritten_after_its_layer_is_refused():
    def forward(m, x):
        h = x.clone()
        out = m.a(h)
        h.zero_()
        return m.b(out)

    with refused(r"changed in place.* -> replace the in-place operation \(x \+= y\) by x = x \+ y"):
        track(Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES)))


def test_an_input_that_is_overwritten_is_refused_where_autograd_has_its_own_copy():
    def forward(m, x):
        h = x.clone()
        with torch.autograd.graph.save_on_cpu():
            out = m.a(h)
        h.zero_()
        return m.b(out)

    def noticed_by_autograd(function):
        """Whether this build of torch saves a copy (only then is there anything left for us to notice)."""
        try:
            torch.autograd.grad(function().sum(), [])
        except RuntimeError:
            return True
        return False

    with refused(r"(the input of a.weight was|a tensor that the backward pass needs was) changed in place"):
        track(Net(forward, a=nn.Linear(4, 4), b=nn.Linear(4, CLASSES)))


# Uses that the probe did not show


def test_a_layer_that_only_some_batches_reach_is_refused_when_they_come():
    def forward(m, x):
        return m.a(x) + (m.b(x) if bool((x > 100).any()) else 0.0)

    tracker = track(Net(forward, a=nn.Linear(4, CLASSES), b=nn.Linear(4, CLASSES)))
    x, y = data()
    tracker.train((x, y), IDS)
    x[4] += 1000
    with refused(r"b.weight is used here in a way that the probe batch did not show .control flow"):
        tracker.train((x, y), IDS)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


UNLIKE_TRAINING = {
    "a norm of the weights": (
        lambda model, batch: cross_entropy(model, batch) + model.get_parameter("4.weight").norm(),
        r"4.weight is used here in a way that the probe batch did not show",
    ),
    "another number of axes": (
        lambda model, batch: model(batch[0][None].expand(5, -1, -1))[4].sum(1),
        r"0.weight is used here in a way that the probe batch did not show",
    ),
    "two rows an example, merged": (
        lambda model, batch: model(torch.cat([batch[0], batch[0].flip(1)]))[len(batch[0]) :, 0],
        r"the gradient of the measurement in 0.bias differs from autograd's: it uses the model in another way",
    ),
}


@pytest.mark.parametrize("name", UNLIKE_TRAINING)
def test_a_measurement_that_uses_the_model_unlike_the_loss_is_refused(name):
    measure, message = UNLIKE_TRAINING[name]
    tracker = track(mlp(), task=Task.from_functions(cross_entropy, measure))
    with refused(message):
        tracker.query(data(), IDS)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (N, "the gradient of the measurement in a.bias differs from autograd's"),
        (3, "axis 0 of a layer's output has size 3"),
    ],
)
def test_a_measurement_with_time_first_is_refused_where_the_loss_has_the_batch_first(length, message):
    model = Net(lambda m, x: m.a(x).tanh(), a=nn.Linear(4, CLASSES))
    task = Task.from_functions(
        lambda model, batch: F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none"),
        lambda model, batch: model(batch[0].transpose(0, 1)).square().sum((0, 2)),
    )
    tracker = track(model, data(length, 4), task)
    with refused(message):
        tracker.query(data(length, 4), IDS)


def test_a_measurement_of_a_part_of_the_model_is_no_trouble():
    def measure(model, batch):
        return model[:3](batch[0]).square().sum(1)

    model, batch = mlp().double(), data()
    batch = (batch[0].double(), batch[1])
    tracker = track(model, batch, Task.from_functions(cross_entropy, measure))
    found = by_parameter(tracker, tracker.query(batch, IDS))
    assert not found["4.weight"].any() and not found["4.bias"].any()
    for i in range(N):
        (expected,) = torch.autograd.grad(
            measure(model, (batch[0][i : i + 1],)).sum(), model.get_parameter("0.weight")
        )
        assert torch.allclose(found["0.weight"][i], expected, rtol=1e-10, atol=1e-14)


# Exceptions that are the user's own


def test_other_exceptions_pass_as_they_are():
    def loss(model, batch):
        raise ZeroDivisionError("of the user's own")

    with pytest.raises(ZeroDivisionError, match="of the user's own"):
        track(mlp(), task=Task.from_functions(loss))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        track(mlp(), data(5))
