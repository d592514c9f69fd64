"""What has no per-example gradients, or would give wrong ones, is refused in one line: the cause and the way out."""

import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Net, frozen, parameter
from cases_all import by_parameter
from cases_basic import mlp
from refusals import IDS, N, data, refused, track
from torch import nn
from torch.utils.checkpoint import checkpoint

from upweight.task import BinaryClassification, Regression, Task

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
    with refused(r"outputs have shape \(8, 3\) but targets \(8,\), expected one shape"):
        track(mlp(), (x, torch.randn(N)), Regression())


def test_float_class_targets_are_refused():
    x, y = data()
    with refused(r"class targets have dtype torch.float32, expected integers -> targets.long\(\)"):
        track(mlp(), (x, y.float()))


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
    "two rows an example, of which one is another's": (
        lambda model, batch: model(torch.cat([batch[0], batch[0].flip(0)]))[len(batch[0]) :, 0].flip(0),
        r"the gradient of the measurement in 0.bias differs from autograd's: it uses the model in another way",
    ),
}


@pytest.mark.parametrize("name", UNLIKE_TRAINING)
def test_a_measurement_that_uses_the_model_unlike_the_loss_is_refused(name):
    measure, message = UNLIKE_TRAINING[name]
    tracker = track(mlp(), task=Task.from_functions(cross_entropy, measure))
    with refused(message):
        tracker.query(data(), IDS)


@pytest.mark.parametrize("length", [N, 3])
def test_a_measurement_with_time_first_is_refused_where_the_loss_has_the_batch_first(length):
    model = Net(lambda m, x: m.a(x).tanh(), a=nn.Linear(4, CLASSES))
    task = Task.from_functions(
        lambda model, batch: F.cross_entropy(model(batch[0]).mean(1), batch[1], reduction="none"),
        lambda model, batch: model(batch[0].transpose(0, 1)).square().sum((0, 2)),
    )
    tracker = track(model, data(length, 4), task)
    with refused("the gradient of the measurement in a.bias differs from autograd's"):
        tracker.query(data(length, 4), IDS)


def test_a_measurement_may_put_two_rows_an_example_side_by_side():
    """All examples first, then all of them again: positions before examples, which is tried before it is refused."""

    def measure(model, batch):
        return model(torch.cat([batch[0], batch[0].flip(1)]))[len(batch[0]) :, 0]

    model, batch = mlp().double(), data()
    batch = (batch[0].double(), batch[1])
    tracker = track(model, batch, Task.from_functions(cross_entropy, measure))
    found = by_parameter(tracker, tracker.query(batch, IDS))
    for i in range(N):
        (expected,) = torch.autograd.grad(
            measure(model, (batch[0][i : i + 1],)).sum(), model.get_parameter("0.weight")
        )
        assert float((found["0.weight"][i] - expected).norm()) < 1e-12 * float(expected.norm())


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
