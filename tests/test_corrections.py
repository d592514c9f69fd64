"""Rescaled and relative influence in `Influence`, against dense float64 formulas written out."""

import oracles
import pytest
import torch
from dense_inverse import DenseInverse
from refusals import refused
from torch import Tensor, nn

import upweight as uw
from upweight.attributors.reweighted import dense_damped
from upweight.gradients import Gradients

N, Q, DAMPING, L2 = 24, 6, 0.02, 0.01


def problem(kind: str):
    """A model, its task, training data and queries."""
    torch.manual_seed(0)
    x = torch.randn(N + Q, 4, dtype=torch.float64)
    if kind == "logistic":
        model, y, task = nn.Linear(4, 1), (torch.rand(N + Q) < 0.5).double(), uw.BinaryClassification()
    elif kind == "softmax":
        model, y, task = nn.Linear(4, 3), torch.randint(0, 3, (N + Q,)), uw.Classification()
    else:
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        y, task = torch.randint(0, 3, (N + Q,)), uw.Classification()
    return model.double(), task, (x[:N], y[:N]), (x[N:], y[N:])


def fitted(kind: str, **options):
    model, task, train, query = problem(kind)
    options = {"curvature": "ggn", "damping": DAMPING, "l2": L2} | options
    return uw.Influence(model, task, **options).fit(train), query


def dense(kind: str, curvature: str) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Damped H, each example's own part, training and query gradients, by plain autograd."""
    model, task, train, query = problem(kind)
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)

    def losses(flat: Tensor, batch) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        values = {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        outputs = torch.func.functional_call(model, values, (batch[0],))
        return task.loss(*task.check_outputs(outputs, batch[1]))

    at = torch.cat([p.detach().flatten() for p in model.parameters()])
    one = lambda i: (train[0][i : i + 1], train[1][i : i + 1])  # noqa: E731
    if curvature == "hessian":
        own = [
            torch.autograd.functional.hessian(lambda t, i=i: losses(t, one(i)).sum(), at) for i in range(N)
        ]
    else:
        named = {"logistic": "binary"}.get(kind, "classification")
        own = [oracles.fisher(named, model, train, i) for i in range(N)]
    A = sum(own) / N + (DAMPING + L2) * torch.eye(len(at), dtype=at.dtype)
    G = torch.autograd.functional.jacobian(lambda t: losses(t, train), at)
    V = torch.autograd.functional.jacobian(lambda t: losses(t, query), at)
    return A, own, G, V


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - truth).abs().max()) <= tolerance * float(truth.abs().max())


DAMPING_OF = {"network": 1.0}
"""A random network's Hessian is indefinite: enough damping to make it positive."""


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("kind", ["logistic", "softmax", "network"])
def test_rescaled_scores_equal_the_direct_inverse_without_each_example(kind, curvature):
    extra = DAMPING_OF.get(kind, DAMPING) - DAMPING
    A, own, G, V = dense(kind, curvature)
    A = A + extra * torch.eye(len(A), dtype=A.dtype)
    X = torch.stack([torch.linalg.solve(A - H_i / N, g) for H_i, g in zip(own, G, strict=True)])
    method, query = fitted(
        kind, curvature=curvature, correction="rescaled", damping=DAMPING + extra, batch_size=7
    )
    scores = method.attribute(query)
    close(scores.values, V @ X.T / N)
    assert scores.unit == "nats"
    assert scores.info["correction"] == "rescaled"
    close(method.self_influence().values, (G * X).sum(1) / N)
    first = V @ torch.linalg.solve(A, G.T) / N
    assert float((first - scores.values).abs().max()) > 1e-3 * float(first.abs().max())


@pytest.mark.parametrize("kind", ["logistic", "softmax", "network"])
def test_layers_add_up(kind):
    method, query = fitted(kind, correction="rescaled")
    scores = method.attribute(query, per_layer=True)
    close(sum(scores.layers.values()), scores.values)


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_a_linear_models_curvatures_agree(kind):
    """The Hessian of a convex loss of a linear model is its Gauss-Newton matrix: Woodbury equals refactorisation."""
    (one, query), (two, _) = (fitted(kind, curvature=c, correction="rescaled") for c in ("ggn", "hessian"))
    close(one.attribute(query).values, two.attribute(query).values)
    effects = [m.removal([0, 5, 6, 20], query) for m in (one, two)]
    close(effects[0].newton, effects[1].newton)


def test_logistic_rescaling_divides_by_one_minus_the_leverage():
    plain, query = fitted("logistic")
    rescaled, _ = fitted("logistic", correction="rescaled")
    A, own, _, _ = dense("logistic", "ggn")
    leverage = torch.stack([torch.linalg.solve(A, H_i).trace() / N for H_i in own])
    close(rescaled.attribute(query).values, plain.attribute(query).values / (1 - leverage))


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "ekfac"])
@pytest.mark.parametrize("correction", ["relative", "relative-loss"])
def test_relative_scores_are_divided_by_the_size_of_the_step(correction, curvature):
    options = {} if curvature != "ekfac" else {"l2": 0.0}
    method, query = fitted("softmax", curvature=curvature, correction=correction, **options)
    plain, _ = fitted("softmax", curvature=curvature, **options)
    inverse = method._ready().curvature.inverse(method.damping)
    tracker, (x, y) = method._ready().tracker, problem("softmax")[2]
    gradients = tracker.train((x, y), range(N))
    X = (inverse @ gradients).dense()
    size = X.norm(dim=1) if correction == "relative" else (X * gradients.dense()).sum(1).sqrt()
    scores = method.attribute(query)
    close(scores.values, plain.attribute(query).values * N / size)
    assert scores.unit is None
    own = method.self_influence()
    close(own.values, plain.self_influence().values * N / size)
    assert own.unit is None


def test_relative_to_the_loss_is_bounded():
    """Cauchy-Schwarz: never above sqrt(v^T (H + damping I)^-1 v), and equal to it for the example itself."""
    method, _ = fitted("softmax", correction="relative-loss")
    train = problem("softmax")[2]
    scores = method.attribute(train).values
    tracker = method._ready().tracker
    inverse = method._ready().curvature.inverse(method.damping)
    quadratic = sum(inverse.quadratic(tracker.train(train, range(N))).values())
    assert float((scores.abs() / quadratic.sqrt()[:, None]).max()) < 1 + 1e-10
    close(scores.diagonal(), quadratic.sqrt())


@pytest.mark.parametrize("correction", ["relative", "relative-loss", "rescaled"])
def test_an_example_without_a_gradient_scores_zero(correction):
    model = nn.Linear(2, 1, bias=False).double()
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
    data = (x, torch.ones(3, 1, dtype=torch.float64))
    method = uw.Influence(model, uw.Regression(), curvature="ggn", damping=0.1, correction=correction).fit(
        data
    )
    values = method.attribute(data).values
    assert bool((values[:, 0] == 0).all())
    assert bool(values[1:, 1:].abs().min() > 0)
    assert float(method.self_influence().values[0]) == 0


def test_a_structured_curvature_takes_corrections():
    """EK-FAC: finite, close to no correction where leverages are small, in tiles of any size."""
    plain, query = fitted("network", curvature="ekfac", l2=0.0, damping=1.0)
    rescaled, _ = fitted(
        "network", curvature="ekfac", l2=0.0, damping=1.0, correction="rescaled", batch_size=5
    )
    again, _ = fitted("network", curvature="ekfac", l2=0.0, damping=1.0, correction="rescaled")
    close(rescaled.attribute(query).values, again.attribute(query).values)
    close(rescaled.attribute(query).values, plain.attribute(query).values, 0.1)
    effect = rescaled.removal([2, 3], query)
    close(effect.rescaled, rescaled.attribute(query).removal_effect([2, 3]))


@pytest.mark.parametrize("solver", ["cg", "dual"])
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_any_solver_serves(solver, convention):
    """Inverses that are only known by their products give the same corrections."""
    direct, query = fitted("network", correction="rescaled", solver="direct")
    other, _ = fitted("network", correction="rescaled", solver=solver)
    close(other.attribute(query).values, direct.attribute(query).values, 1e-4)
    effects = [m.removal([1, 2, 9], query, convention=convention) for m in (direct, other)]
    close(effects[1].newton, effects[0].newton, 1e-4)
    close(effects[1].rescaled, effects[0].rescaled, 1e-4)
    for correction in ("relative", "relative-loss"):
        pair = [fitted("network", correction=correction, solver=s)[0] for s in ("direct", solver)]
        close(pair[1].attribute(query).values, pair[0].attribute(query).values, 1e-4)
        close(pair[1].self_influence().values, pair[0].self_influence().values, 1e-4)


@pytest.mark.parametrize("correction", ["rescaled", "relative-loss"])
def test_a_cholesky_factor_serves_as_the_spectrum_does(monkeypatch, correction):
    method, query = fitted("network", correction=correction, solver="direct")
    spectral = method.attribute(query).values
    monkeypatch.setattr("upweight.curvature.solvers.direct.EIGEN_UP_TO", 0)
    method, _ = fitted("network", correction=correction, solver="direct")
    close(method.attribute(query).values, spectral)
    assert method._ready().curvature.solver._factor is not None


def test_an_indefinite_hessian_is_refused():
    with refused("eigenvalue"):
        method, query = fitted("network", curvature="hessian", correction="rescaled", damping=1e-6, l2=0.0)
        method.attribute(query)


def test_dense_inverse_is_that_of_the_method():
    """The helper of other tests and the library's own dense matrix are one."""
    method, query = fitted("softmax", curvature="hessian")
    inverse = DenseInverse(dense_damped(method, method._ready()))
    gradients = method._ready().tracker.query(query, range(Q))
    assert isinstance(inverse @ gradients, Gradients)
    close(
        (inverse @ gradients).dense(), (method._ready().curvature.inverse(method.damping) @ gradients).dense()
    )


def test_refused_in_one_line():
    with refused("correction='best' is unknown"):
        fitted("softmax", correction="best")
    with refused("not in the loss's unit|needs a curvature in the loss's unit"):
        method, query = fitted("softmax", curvature="diagonal", l2=0.0, correction="rescaled")
        method.attribute(query)


def test_l2_by_parameter():
    """A regulariser of the weights alone: a vector, an expression and a dense formula agree."""
    A, _, G, V = dense("softmax", "ggn")
    penalty = torch.cat([torch.full((12,), L2, dtype=A.dtype), torch.zeros(3, dtype=A.dtype)]).diag()
    A = A - L2 * torch.eye(15, dtype=A.dtype) + penalty
    method, query = fitted("softmax", l2={"weight$": L2})
    close(method.attribute(query).values, V @ torch.linalg.solve(A, G.T) / N)
    flat = method._ready().curvature.operator.ridge
    same, _ = fitted("softmax", l2=flat)
    close(same.attribute(query).values, method.attribute(query).values)
    assert method.attribute(query).info["l2"] == {"weight$": L2}
    for l2, words in (
        ({"head": 1.0}, "finds none of"),
        ({"weight": 1.0, "w": 2.0}, "two coefficients"),
        (-1.0, "expected finite numbers"),
        ({"weight": float("nan")}, "expected finite numbers"),
        (torch.ones(3), "expected .15."),
    ):
        with refused(words):
            fitted("softmax", l2=l2)
    with refused("dual"):
        fitted("softmax", l2={"weight$": L2}, solver="dual")
    with refused("does not apply to curvature='ekfac'"):
        fitted("softmax", l2={"weight$": L2}, curvature="ekfac")


def test_datainf_forms_no_step_to_be_relative_to():
    model, task, train, query = problem("softmax")
    method = uw.Influence(model, task, curvature="datainf", correction="relative").fit(train)
    with refused("relative-loss"):
        method.attribute(query)
    bounded = uw.Influence(model, task, curvature="datainf", correction="relative-loss").fit(train)
    assert bool(bounded.attribute(query).values.isfinite().all())
