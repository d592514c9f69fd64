"""Per-example gradients equal autograd, one example at a time, for every case; and the Fisher equals its definition."""

import math

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import CLASSES, Case, Net, normal
from cases_all import CASES, EXACT, WITH_OUTPUTS, N, by_parameter, each, named, track
from cases_basic import mlp
from torch import Tensor, nn

from upweight.data import Examples, map_tensors
from upweight.gradients import Dense, Factored, Gradients, Tracker
from upweight.gradients.blocks import Piece
from upweight.task import FisherKind, Regression

TOLERANCE = {torch.float64: (1e-10, 1e-4), torch.float32: (1e-5, 1e-2)}
"""{dtype: (relative error of a parameter's gradient, the floor of what it is relative to)}; see oracles.worst_error."""


def in_order(tracker: Tracker, gradients: Gradients) -> Tensor:
    """[batch, parameters], in the order of the oracles."""
    return oracles.flat(by_parameter(tracker, gradients))


def assert_close(found, expected, dtype=torch.float64):
    tolerance, floor = TOLERANCE[dtype]
    error, name = oracles.worst_error(found, expected, floor)
    assert error <= tolerance, f"{name} is off by {error:.1e}"


# Training losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@each(EXACT)
def test_training_gradients_equal_autograd(case, dtype):
    model, batch, tracker = track(case, dtype)
    found = by_parameter(tracker, tracker.train(batch, range(N)))
    assert_close(found, oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters), dtype)


def sort_the_batch(m, x):
    order = x[:, 0, 0].argsort()
    return m.b(m.a(x.mean(1)[order]).tanh()[order.argsort()])


def route_tokens(m, x):
    flat, out = x.flatten(0, 1), torch.zeros(len(x) * 4, 6, dtype=x.dtype)
    for chosen, expert in ((flat[:, 0] > 0, m.a), (flat[:, 0] <= 0, m.c)):
        out = out.index_copy(0, chosen.nonzero()[:, 0], expert(flat[chosen]).tanh())
    return m.b(out.unflatten(0, (-1, 4)).mean(1))


def call_a_layer_for_some(m, x):
    out, some = m.a(x.mean(1)), (x[:, 0, 0] < 0).nonzero()[:, 0]
    return m.b((out.index_add(0, some, m.c(x[some]).mean(1)) if len(some) else out).tanh())


@pytest.mark.parametrize("forward", [sort_the_batch, route_tokens, call_a_layer_for_some])
def test_examples_that_a_use_orders_by_the_data_are_not_taken_for_others(forward):
    x, y = normal(4, 4)(12, torch.Generator().manual_seed(0)).double(), torch.zeros(12, 1)
    y[:2] = (
        50  # the largest losses are the probe: sorted, two tokens of each sign an example, the first one positive
    )
    counts = torch.tensor([2, 2, 1, 3, 3, 1, 4, 1, 0, 3, 2, 2])
    x[:, :, 0] = torch.where(torch.arange(4) < counts[:, None], 1.0, -1.0) + torch.arange(12)[:, None] / 24
    torch.manual_seed(0)
    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 1), c=nn.Linear(4, 6)).double()
    tracker = Tracker(model, Regression(), Examples((x, y)))
    shuffled = (x[[5, 8, 4, 3]], y[[5, 8, 4, 3]])
    found = by_parameter(tracker, tracker.train(shuffled, range(4)))
    oracle = oracles.of_outputs(oracles.half_squared)
    assert_close(found, oracles.gradients(oracle, model, shuffled, 4))
    assert tracker.layers["b"].how == "factors"


@each([case for case in CASES if case.autocast is not None])
def test_autocast_gradients_equal_autograd_up_to_bfloat16(case):
    model, batch, tracker = track(case, torch.float32)
    found = by_parameter(tracker, tracker.train(batch, range(N)))
    with torch.autocast("cpu", case.autocast):
        alike = oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters)
    assert oracles.worst_error(found, alike, floor=0.1)[0] <= 2e-2
    single = oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters)
    assert 1e-4 < oracles.worst_error(found, single, floor=1.0)[0] <= 1e-1  # not float32, and not far from it


@each(CASES)
def test_every_layer_is_tracked_as_it_should_be(case):
    _, _, tracker = track(case, torch.float64 if case.autocast is None else torch.float32)
    layers = tracker.layers.values()

    def parameters(how: str) -> set[str]:
        return {parameter for layer in layers if layer.how.startswith(how) for parameter in layer.parameters}

    assert parameters("exact fallback") == set(case.fallback)
    assert parameters("unused") == set(case.zero)
    assert case.how.items() <= tracker.coverage.layers.items()
    assert sorted(p for layer in layers for p in layer.parameters) == sorted(
        oracles.tracked(tracker.model, case.parameters)
    )


@pytest.mark.parametrize("width", [8, 16, 32])
def test_rounding_noise_of_float32_sends_nothing_to_the_fallback(width):
    """The gradient of a key's bias is zero in theory: its noise is nothing that two computations could agree on."""

    def forward(m, x):
        return m.out(F.scaled_dot_product_attention(m.q(x), m.k(x), m.v(x)).mean(1))

    layers = {name: nn.Linear(width, width) for name in "qkv"}
    case = Case("attention", lambda: Net(forward, **layers, out=nn.Linear(width, CLASSES)), normal(20, width))
    tracker = Tracker(case.build(torch.float32), case.task(), Examples(case.batch(N, torch.float32)))
    assert set(tracker.coverage.layers.values()) == {"factors"}


@each(EXACT)
def test_gradients_do_not_depend_on_the_cut_into_batches(case):
    _, batch, tracker = track(case)
    whole = tracker.train(batch, range(N))
    parts = []
    for start, stop in ((0, 1), (1, 4), (4, 5)):
        parts.append(tracker.train(map_tensors(batch, lambda t, a=start, b=stop: t[a:b]), range(start, stop)))
    assert_close(by_parameter(tracker, Gradients.concatenate(parts)), by_parameter(tracker, whole))


@each([case for case in EXACT if case.longer is not None])
def test_later_batches_may_have_other_lengths(case):
    model, batch, tracker = track(case)
    other = case.batch(4, longer=True, seed=3)
    found = tracker.train(other, range(4))
    assert_close(
        by_parameter(tracker, found), oracles.gradients(case.oracle_loss(), model, other, 4, case.parameters)
    )
    both = Gradients.concatenate([tracker.train(batch, range(N)), found])
    expected = oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters)
    together = {name: rows[:N] for name, rows in by_parameter(tracker, both).items()}
    assert_close(together, expected)
    assert_close(
        {name: rows[N:] for name, rows in by_parameter(tracker, both).items()}, by_parameter(tracker, found)
    )


@named("mlp", "lstm")
def test_one_training_example_is_enough(case):
    model, batch = case.build(), case.batch(1)
    tracker = Tracker(model, case.task(), Examples(batch))
    found = by_parameter(tracker, tracker.train(batch, [0]))
    assert_close(found, oracles.gradients(case.oracle_loss(), model, batch, 1))


def test_loss_of_zero_at_the_first_examples_hides_nothing():
    """A margin loss is flat where it is satisfied: the probe must be taken where it is not."""

    def hinge(model, batch):
        x, y = batch
        return torch.relu(1 - (2 * y - 1) * model(x.transpose(0, 1).flatten(0, 1)).reshape(3, -1, 1)[1, :, 0])

    x = torch.randn(8, 3, 4, dtype=torch.float64)
    model = nn.Linear(4, 1).double()
    margins = model(x[:, 1])[:, 0].detach()
    y = (margins > 0).double()
    x[:4] *= 2 / margins[:4].abs()[:, None, None]
    x[4:] *= 0.5 / margins[4:].abs()[:, None, None]
    model.bias.data.zero_()
    case = Case("hinge", lambda: model, normal(4), "functions", hinge)
    tracker = Tracker(model, case.task(), Examples((x, y)))
    assert float(hinge(model, (x[:2], y[:2])).detach().max()) == 0
    assert_close(
        by_parameter(tracker, tracker.train((x, y), range(8))), oracles.gradients(hinge, model, (x, y), 8)
    )


# Coverage


def test_coverage_is_the_share_of_parameters_and_of_squared_norm():
    case = next(case for case in CASES if case.name == "only the last layer")
    model, batch, tracker = track(case)
    assert tracker.coverage.parameters == pytest.approx((5 * 3 + 3) / (4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3))
    everything = oracles.gradients(case.oracle_loss(), model, batch, N)
    losses = [float(case.oracle_loss()(model, oracles.one(batch, i)).detach()) for i in range(N)]
    probe = sorted(range(N), key=lambda i: -losses[i])[:2]
    squares = {name: float(g[probe].square().sum()) for name, g in everything.items()}
    inside = squares["4.weight"] + squares["4.bias"]
    assert tracker.coverage.squared_norm == pytest.approx(inside / sum(squares.values()))
    assert tracker.coverage.layers == {"4": "factors"}


@pytest.mark.parametrize("which", [r"^4\.", lambda name: name.startswith("4.")], ids=["regex", "function"])
def test_parameters_may_be_named_by_regex_or_function(which):
    case = next(case for case in CASES if case.name == "mlp")
    tracker = Tracker(case.build(), case.task(), Examples(case.batch(N)), which)
    assert list(tracker.parameters) == ["4.weight", "4.bias"]


# Measurements of queries


@each(WITH_OUTPUTS)
def test_query_gradients_are_of_the_oriented_measurement(case):
    check_measurement(
        case, {"classification": "margin", "binary": "logit", "regression": "prediction"}[case.kind]
    )


@pytest.mark.parametrize(
    ("name", "measurement"),
    [("mlp", "logit"), ("mlp logistic", "margin"), ("mlp regression", "loss"), ("lstm", "logit")],
)
def test_query_gradients_of_the_other_measurements(name, measurement):
    check_measurement(next(case for case in CASES if case.name == name), measurement)


def check_measurement(case: Case, measurement: str) -> None:
    model, batch, tracker = track(case, measurement=measurement)
    function = oracles.of_outputs(oracles.MEASURE[case.kind][measurement])
    sign = -1 if oracles.HIGHER_IS_BETTER[measurement] else 1
    expected = oracles.gradients(function, model, batch, N, case.parameters)
    found = by_parameter(tracker, tracker.query(batch, range(N)))
    assert_close(found, {name: sign * g for name, g in expected.items()})


@named("mlp", "logistic", "linear regression", "absolute loss")
def test_the_loss_as_a_measurement_keeps_its_sign(case):
    _, batch, tracker = track(case)
    assert torch.equal(tracker.query(batch, range(N)).dense(), tracker.train(batch, range(N)).dense())


# Fisher


@each(WITH_OUTPUTS)
def test_exact_fisher_columns_give_the_fisher(case):
    model, batch, tracker = track(case)
    columns = tracker.fisher(batch, range(N), "exact", 1, torch.Generator())
    rows = torch.stack([in_order(tracker, column) for column in columns], 1)  # [batch, column, parameters]
    for position in range(N):
        expected = oracles.fisher(case.kind, model, batch, position, case.parameters)
        error = float((rows[position].T @ rows[position] - expected).norm() / expected.norm())
        assert error <= 1e-10


@named("linear", "mlp", "mlp logistic", "mlp regression", "weight norm", "lstm")
def test_all_parameters_get_the_same_drawn_targets(case):
    """Also those of the fallback, which differentiates in a pass of its own."""
    draws = 3
    model, batch, tracker = track(case)
    columns = tracker.fisher(batch, range(N), "sampled", draws, torch.Generator().manual_seed(1))
    loss = case.oracle_loss()
    for column in columns:
        found = in_order(tracker, column) * math.sqrt(draws)
        if (
            case.kind == "regression"
        ):  # gradients are J^T (outputs - drawn): in J's row space with one coefficient vector
            for position in range(N):
                J = oracles.jacobian(model, batch, position)[1]
                noise = torch.linalg.lstsq(J.T, found[position][:, None]).solution
                assert float((J.T @ noise - found[position][:, None]).norm()) <= 1e-10 * float(
                    found[position].norm()
                )
            continue
        classes = CLASSES if case.kind == "classification" else 2
        options = torch.stack(
            [
                oracles.flat(oracles.gradients(loss, model, (batch[0], torch.full((N,), k)), N))
                for k in range(classes)
            ]
        )
        errors = (options - found).norm(dim=2) / options.norm(dim=2)
        assert float(errors.min(0).values.max()) <= 1e-10


@pytest.mark.parametrize("kind", ["classification", "binary", "regression"])
def test_sampled_fisher_is_the_exact_one_on_average(kind):
    """Largest of at most 225 z-scores above 5 happens by chance less than once in 1,000 times; the seed is fixed."""
    calls, draws, width = 40, 25, {"classification": 3, "binary": 1, "regression": 2}[kind]
    case = Case(kind, lambda: nn.Linear(4, width), normal(4), kind)
    model, batch = case.build(), case.batch(1)
    tracker = Tracker(model, case.task(), Examples(batch))
    generator = torch.Generator().manual_seed(0)
    columns = [c for _ in range(calls) for c in tracker.fisher(batch, [0], "sampled", draws, generator)]
    assert len(columns) == calls * draws
    scores = torch.stack([in_order(tracker, column)[0] for column in columns]) * math.sqrt(draws)
    products = scores[:, :, None] * scores[:, None, :]
    standard_error = products.std(0) / math.sqrt(len(columns))
    z = (products.mean(0) - oracles.fisher(kind, model, batch, 0)) / standard_error.clamp_min(1e-12)
    assert float(z.abs().max()) < 5
    assert float(z.abs().max()) > 0.5  # drawn indeed, not the expectation


@named("mlp", "mlp regression", "gpt with tied head", "weight norm")
def test_empirical_fisher_is_the_training_gradient(case):
    _, batch, tracker = track(case)
    (column,) = tracker.fisher(batch, range(N), "empirical", 7, torch.Generator())
    assert torch.equal(column.dense(), tracker.train(batch, range(N)).dense())


@pytest.mark.parametrize("kind", ["sampled", "exact"])
def test_fisher_draws_depend_on_the_generator_alone(kind: FisherKind):
    case = next(case for case in CASES if case.name == "mlp")
    _, batch, tracker = track(case)

    def columns(seed: int) -> Tensor:
        torch.manual_seed(seed)
        found = tracker.fisher(batch, range(N), kind, 4, torch.Generator().manual_seed(3))
        return torch.stack([column.dense() for column in found])

    assert torch.equal(columns(0), columns(1))


# Gradients as a container


def test_gradients_are_a_mapping_of_layers_that_can_be_sliced():
    case = next(case for case in CASES if case.name == "mlp")
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    assert list(gradients) == ["0", "2", "4"] and len(gradients) == 3 and gradients.batch == N
    assert torch.equal(gradients.rows(slice(1, 3)).dense(), gradients.dense()[1:3])
    assert gradients.nbytes == sum(gradients[name].nbytes for name in gradients)
    assert gradients.nbytes < gradients.dense().nbytes  # factors are smaller than what they are factors of


def test_input_may_require_gradients_and_be_read_in_no_grad_or_inference_mode():
    model = mlp().double()
    x, y = torch.randn(N, 4, dtype=torch.float64, requires_grad=True), torch.randint(0, CLASSES, (N,))
    case = next(case for case in CASES if case.name == "mlp")
    tracker = Tracker(model, case.task(), Examples((x, y)))
    expected = tracker.train((x, y), range(N)).dense()
    assert x.grad is None
    with torch.no_grad():
        assert torch.equal(tracker.train((x, y), range(N)).dense(), expected)
    with torch.inference_mode():
        clone = (x.clone(), y.clone())
        assert torch.equal(tracker.train(clone, range(N)).dense(), expected)


def test_gather_equals_concatenation_for_blocks_of_any_kind():
    def dense(n: int, seed: int) -> Dense:
        return Dense(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)))

    def factored(n: int, seed: int) -> Factored:
        g = torch.Generator().manual_seed(seed)
        return Factored((Piece(torch.randn(n, 2, 2, generator=g), torch.randn(n, 2, 3, generator=g)),))

    parts = [Gradients({"a": dense(n, n), "b": factored(n, n)}) for n in (3, 1, 2)]
    parts.append(Gradients({"a": factored(2, 7), "b": dense(2, 8)}))  # a layer that one batch does not reach
    together = Gradients.gather(iter(parts), 8)
    assert together.batch == 8
    for name in ("a", "b"):
        assert torch.equal(together[name].dense(), torch.cat([part[name].dense() for part in parts]))
    assert Gradients.gather([parts[0]], 3)["a"] is parts[0]["a"]
