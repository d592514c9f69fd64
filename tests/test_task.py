"""Losses, measurements, predictive distributions and their Fisher, against formulas written down once more."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upweight.errors import UpweightError
from upweight.task import BinaryClassification, Classification, Regression, Task, resolve_fisher, split_batch

N, CLASSES = 6, 4
TASKS = {"classification": Classification, "binary": BinaryClassification, "regression": Regression}
WIDTH = {"classification": CLASSES, "binary": 1, "regression": 3}


def problem(kind: str):
    """A linear model, a batch, and the model's outputs."""
    model = nn.Linear(2, WIDTH[kind]).double()
    targets = {
        "classification": torch.randint(0, CLASSES, (N,)),
        "binary": torch.randint(0, 2, (N,)),
        "regression": torch.randn(N, 3, dtype=torch.float64),
    }[kind]
    batch = (3 * torch.randn(N, 2, dtype=torch.float64), targets)
    return model, batch, model(batch[0]).detach()


class Fixed(nn.Module):
    """A model whose outputs are its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class Squeezed(Fixed):
    """The same, without axes of size 1."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze()


# Losses and measurements

PAIRS = [(kind, name) for kind, measures in oracles.MEASURE.items() for name in measures]


@pytest.mark.parametrize(("kind", "measurement"), PAIRS)
def test_losses_and_measurements_are_what_they_say(kind, measurement):
    model, batch, outputs = problem(kind)
    task = TASKS[kind](measurement=measurement)

    def each(function) -> Tensor:
        return torch.stack([function(outputs[i : i + 1], batch[1][i : i + 1]) for i in range(N)])

    assert torch.allclose(task.train_loss(model, batch), each(oracles.LOSS[kind]), rtol=1e-12)
    assert torch.allclose(task.measure(model, batch), each(oracles.MEASURE[kind][measurement]), rtol=1e-12)
    higher = oracles.HIGHER_IS_BETTER[measurement]
    assert task.higher_is_better is higher and task.orientation == (-1 if higher else 1)
    assert task.measurement == measurement and isinstance(task.unit, str)


@pytest.mark.parametrize(("kind", "measurement"), PAIRS)
def test_a_better_prediction_has_a_better_measurement(kind, measurement):
    """Moving the outputs against the loss's gradient must lower a loss and raise a margin."""
    if measurement == "prediction":
        pytest.skip("a prediction is neither good nor bad")
    _, (_, targets), outputs = problem(kind)
    task, model = TASKS[kind](measurement=measurement), Fixed()
    x = outputs.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(task.train_loss(model, (x, targets)).sum(), x)
    before = task.measure(model, (outputs, targets))
    after = task.measure(model, (outputs - 1e-3 * slope, targets))
    assert bool(((after - before) * -task.orientation > 0).all())


def test_units_name_what_is_measured():
    assert Classification().unit == "nats" and Classification("margin").unit == "log-odds"
    assert BinaryClassification().unit == "nats" and BinaryClassification("logit").unit == "log-odds"
    assert Regression().unit == "0.5 x squared error" and Regression(scale=1).unit == "squared error"
    assert Regression(measurement="prediction").unit == "output"


@pytest.mark.parametrize("kind", TASKS)
def test_a_function_may_measure(kind):
    def confidence(model, batch):
        return model(batch[0]).abs().sum(1)

    model, batch, outputs = problem(kind)
    task = TASKS[kind](measurement=confidence, higher_is_better=True, unit="logits")
    assert torch.equal(task.measure(model, batch), outputs.abs().sum(1))
    assert (task.measurement, task.higher_is_better, task.unit, task.orientation) == (
        "confidence",
        True,
        "logits",
        -1,
    )


@pytest.mark.parametrize("scale", [0.5, 1.0, 0.25])
def test_regression_scales_its_loss(scale):
    model, batch, outputs = problem("regression")
    expected = scale * (outputs - batch[1]).square().sum(1)
    assert torch.allclose(Regression(scale).train_loss(model, batch), expected)


def test_margins_of_certain_predictions_are_finite():
    logits = torch.tensor([[60.0, 0.0, -60.0], [-60.0, 0.0, 60.0]])
    margins = Classification("margin").measure(Fixed().float(), (logits, torch.tensor([0, 0])))
    assert margins.tolist() == pytest.approx([60.0, -120.0])


@pytest.mark.parametrize("shape", [(N,), (N, 1)])
@pytest.mark.parametrize(
    "targets", [torch.ones(N), torch.ones(N, 1), torch.ones(N, dtype=torch.long), torch.ones(N) > 0]
)
def test_one_logit_may_have_an_axis_or_none(shape, targets):
    outputs = torch.randn(shape)
    losses = BinaryClassification().train_loss(Fixed().float(), (outputs, targets))
    assert torch.allclose(losses, F.softplus(-outputs.reshape(N)))


def test_targets_of_a_regression_may_lack_axes_of_one():
    outputs = torch.randn(N, 1)
    losses = Regression().train_loss(Fixed().float(), (outputs, torch.zeros(N)))
    assert torch.allclose(losses, outputs[:, 0].square() / 2)


# Batches


def test_batches_are_split_into_inputs_and_targets():
    a, b, y = torch.zeros(2), torch.ones(2), torch.tensor([0, 1])
    assert split_batch((a, b, y)) == ((a, b), {}, y)
    for key in ("labels", "label", "targets", "target", "y"):
        inputs, keywords, targets = split_batch({"ids": a, key: y})
        assert inputs == () and list(keywords) == ["ids"] and targets is y


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3), r"a batch is Tensor, expected \(inputs, targets\)"),
        ((torch.zeros(3),), "a batch is tuple, expected"),
        ({"x": torch.zeros(3)}, r"a dict with keys \['x'\], expected one of"),
    ],
)
def test_batches_without_targets_are_refused(batch, message):
    with pytest.raises(UpweightError, match=message + ".* -> "):
        split_batch(batch)


# Predictive distributions


@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])  # from near chance to certain
@pytest.mark.parametrize("kind", TASKS)
def test_hessian_roots_multiply_to_the_hessian(kind, spread):
    outputs = spread * torch.randn(20, WIDTH[kind], dtype=torch.float64)
    if kind == "binary":
        outputs = outputs[:, 0]
    root = TASKS[kind]().hessian_root(outputs)
    assert (
        root.shape[0] == 20
        and root.shape[-1] == {"classification": CLASSES - 1, "binary": 1, "regression": 3}[kind]
    )
    for i in range(20):
        expected = oracles.output_hessian(kind, outputs[i])
        assert float((root[i] @ root[i].T - expected).abs().max()) <= 1e-14


def test_the_hessian_of_a_scaled_regression_is_scaled():
    root = Regression(scale=2.0).hessian_root(torch.zeros(3, 2))
    assert torch.allclose(root[0] @ root[0].T, 4 * torch.eye(2))


@pytest.mark.parametrize("kind", TASKS)
def test_the_hessian_root_is_that_of_the_loss(kind):
    _, (_, targets), outputs = problem(kind)
    task = TASKS[kind](scale=0.3) if kind == "regression" else TASKS[kind]()
    for i in range(N):
        hessian = torch.autograd.functional.hessian(
            lambda f, i=i: task.train_loss(Fixed(), (f[None], targets[i : i + 1])).sum(), outputs[i]
        ).reshape(WIDTH[kind], WIDTH[kind])
        root = task.hessian_root(outputs[i : i + 1, 0] if kind == "binary" else outputs[i : i + 1])[0]
        assert torch.allclose(root @ root.T, hessian, atol=1e-12)


@pytest.mark.parametrize("kind", TASKS)
def test_draws_follow_the_predictive_distribution(kind):
    """Every mean within 5 standard errors: a false alarm less than once in 50,000 runs; the seed is fixed."""
    draws = 20_000
    _, _, outputs = problem(kind)
    outputs = outputs[:, 0] if kind == "binary" else outputs
    task = TASKS[kind](scale=2.0) if kind == "regression" else TASKS[kind]()
    drawn = task.draw(outputs, draws, torch.Generator().manual_seed(0))
    assert drawn.shape[:2] == (N, draws)
    if kind == "regression":
        variance = 1 / (2 * 2.0)
        error = (drawn - outputs[:, None]).mean(1) / math.sqrt(variance / draws)
        assert float(error.abs().max()) < 5
        squares = ((drawn - outputs[:, None]).square().mean(1) - variance) / (variance * math.sqrt(2 / draws))
        assert float(squares.abs().max()) < 5
        return
    probabilities = outputs.softmax(1) if kind == "classification" else outputs.sigmoid()[:, None]
    seen = (
        F.one_hot(drawn, CLASSES).double().mean(1)
        if kind == "classification"
        else drawn.double().mean(1)[:, None]
    )
    error = (seen - probabilities) / (probabilities * (1 - probabilities) / draws).sqrt().clamp_min(1e-6)
    assert float(error.abs().max()) < 5


@pytest.mark.parametrize("kind", TASKS)
def test_draws_do_not_depend_on_the_cut_into_batches(kind):
    _, _, outputs = problem(kind)
    outputs = outputs[:, 0] if kind == "binary" else outputs
    task, generator = TASKS[kind](), torch.Generator()
    whole = task.draw(outputs, 3, generator.manual_seed(0))
    generator.manual_seed(0)
    parts = [task.draw(part, 3, generator) for part in outputs.split([1, 4, 1])]
    assert torch.equal(torch.cat(parts), whole)


def test_certain_predictions_are_drawn_as_they_are():
    logits = torch.full((2, 3), -1e4)
    logits[0, 0] = logits[1, 2] = 1e4
    drawn = Classification().draw(logits, 50, torch.Generator().manual_seed(0))
    assert drawn.unique(dim=1).tolist() == [[0], [2]]
    assert BinaryClassification().draw(torch.tensor([-1e4, 1e4]), 50, torch.Generator()).mean(1).tolist() == [
        0,
        1,
    ]


@pytest.mark.parametrize("kind", TASKS)
def test_drawn_targets_may_be_used_again(kind):
    model, batch, _ = problem(kind)
    first, drawn = TASKS[kind]().pseudo_losses(model, batch, "sampled", 3, torch.Generator().manual_seed(0))
    second, same = TASKS[kind]().pseudo_losses(
        model, batch, "sampled", 3, torch.Generator().manual_seed(9), drawn
    )
    assert first.shape == (N, 3) and drawn is same and torch.equal(first, second)


# Which Fisher


@pytest.mark.parametrize(
    ("kind", "columns"), [("classification", CLASSES - 1), ("binary", 1), ("regression", 3)]
)
def test_the_number_of_backward_passes_is_known_before(kind, columns):
    model, batch, _ = problem(kind)
    task = TASKS[kind]()
    assert task.fisher_columns(model, batch, "exact", 5) == columns
    assert task.fisher_columns(model, batch, "sampled", 5) == 5
    assert task.fisher_columns(model, batch, "empirical", 5) == 1
    for asked in ("exact", "sampled", "empirical"):
        scalars, _ = task.pseudo_losses(model, batch, asked, 5, torch.Generator())
        assert scalars.shape == (N, task.fisher_columns(model, batch, asked, 5))


def test_the_most_faithful_affordable_fisher_is_the_default():
    model, batch, _ = problem("classification")
    assert resolve_fisher(Classification(), model, batch, "auto", 1) == ("exact", CLASSES - 1)
    assert resolve_fisher(Classification(), model, batch, "empirical", 1) == ("empirical", 1)
    many = (torch.randn(2, 5000), torch.tensor([0, 1]))
    assert resolve_fisher(Classification(), Fixed().float(), many, "auto", 2) == ("sampled", 2)
    only_loss = Task.from_functions(lambda model, batch: model(batch[0]).sum(1))
    assert resolve_fisher(only_loss, model, batch, "auto", 1) == ("empirical", 1)
    drawing = Task.from_functions(lambda m, b: m(b[0]).sum(1), sampled_loss=lambda m, b, g: m(b[0]).sum(1))
    assert resolve_fisher(drawing, model, batch, "auto", 3) == ("sampled", 3)


@pytest.mark.parametrize(
    ("fisher", "message"),
    [
        ("exact", "needs the model's predictive distribution"),
        ("sampled", "needs the model's"),
        ("true", "is unknown"),
    ],
)
def test_a_fisher_that_the_task_cannot_give_is_refused(fisher, message):
    model, batch, _ = problem("classification")
    task = Task.from_functions(lambda model, batch: model(batch[0]).sum(1))
    with pytest.raises(UpweightError, match=f"fisher='{fisher}' {message}.* -> use "):
        resolve_fisher(task, model, batch, fisher, 1)
    if fisher != "true":
        with pytest.raises(UpweightError, match=message):
            task.pseudo_losses(model, batch, fisher, 1, torch.Generator())


# Tasks from functions


def test_a_task_may_be_made_of_functions():
    def loss(model, batch):
        return (model(batch[0]) - batch[1]).abs().sum(1)

    def drawn(model, batch, generator):
        outputs = model(batch[0])
        noise = torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype)
        return (outputs - outputs.detach() - noise).square().sum(1) / 2

    model, batch, outputs = problem("regression")
    plain = Task.from_functions(loss)
    assert torch.equal(plain.train_loss(model, batch), plain.measure(model, batch))
    assert (plain.orientation, plain.unit, plain.mask) == (1, "loss", None)
    task = Task.from_functions(
        loss,
        lambda model, batch: model(batch[0])[:, 0],
        higher_is_better=True,
        sampled_loss=drawn,
        mask=lambda batch: batch[0] > 0,
        unit="metres",
    )
    assert torch.equal(task.measure(model, batch), outputs[:, 0])
    assert (task.orientation, task.unit) == (-1, "metres")
    scalars, none = task.pseudo_losses(model, batch, "sampled", 4, torch.Generator().manual_seed(0))
    assert scalars.shape == (N, 4) and none is None
    empirical, _ = task.pseudo_losses(model, batch, "empirical", 4, torch.Generator())
    assert torch.equal(empirical[:, 0], loss(model, batch))


def test_a_task_of_its_own_kind_needs_a_training_loss_alone():
    class Squared(Task):
        def train_loss(self, model, batch):
            return model(batch[0]).square().sum(1)

    model, batch, outputs = problem("regression")
    task = Squared()
    assert torch.equal(task.measure(model, batch), outputs.square().sum(1))
    assert task.output_shape(model, batch) is None
    task.check_targets(batch, range(N), None)
    with pytest.raises(NotImplementedError):
        Task().train_loss(model, batch)


@pytest.mark.parametrize("task", [BinaryClassification(), Regression()], ids=["binary", "regression"])
def test_a_squeezed_output_of_one_example_is_one_number(task):
    """``model(x).squeeze()`` takes the only example's axis away, too."""
    batch = (torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([1.0]))
    squeezed = Squeezed()
    assert torch.equal(task.train_loss(squeezed, batch), task.train_loss(Fixed(), batch))
    generator = torch.Generator().manual_seed(0)
    assert task.pseudo_losses(squeezed, batch, "sampled", 2, generator)[0].shape == (1, 2)


@pytest.mark.parametrize("task", [Classification(), BinaryClassification()], ids=["classes", "binary"])
def test_the_slope_of_a_confident_prediction_is_not_rounding(task):
    """In float32, 1 - p is 0 for p = 1 - 2e-9 and off by a tenth for 1 - 1e-6: no gradient would be left."""
    for size in (20.0, 14.0, 3.0):
        outputs = torch.tensor([[size, 0.0]]) if isinstance(task, Classification) else torch.tensor([size])
        targets = torch.tensor([0]) if isinstance(task, Classification) else torch.tensor([1.0])
        outputs.requires_grad_()
        loss = task.loss(outputs, targets)
        assert loss.dtype == torch.float32
        (slope,) = torch.autograd.grad(loss.sum(), outputs)
        expected = 1 / (1 + math.exp(size))
        assert -float(slope.detach().flatten()[0]) == pytest.approx(expected, rel=1e-6)
        assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(-size)), rel=1e-6)


def test_a_loss_that_is_no_tensor_is_refused():
    model, batch, _ = problem("regression")
    task = Task.from_functions(
        lambda model, batch: model(batch[0]).sum().item(), lambda model, batch: [1.0, 2.0]
    )
    with pytest.raises(UpweightError, match=r"loss function returned float, expected a tensor \[batch\]"):
        task.train_loss(model, batch)
    with pytest.raises(UpweightError, match="measurement function returned list"):
        task.measure(model, batch)
