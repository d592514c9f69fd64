"""Influence scores against brute force by autograd; their damping, passes over the data, and evidence."""

import copy
import json

import curvature_oracles as oracle
import pytest
import torch
import torch.nn.functional as F
from curvature_oracles import relative
from networks import Counting, digits, trained
from small_problem import CURVATURES, QUERY, TRAIN, cross_entropy, influence, small
from torch import Tensor, nn

import upweight as uw

# Brute force, where another engine is known to be wrong --------------------------------------------------------------


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(64, 24), nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).tanh()
        return self.head(self.twice(self.twice(h).tanh()).tanh())


class TwoGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.first(x).tanh()).tanh()
        return self.head(F.avg_pool2d(h, 2).flatten(1))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", [CalledTwice, TwoGroups])
def test_a_layer_called_twice_and_a_grouped_convolution_equal_brute_force(network, curvature):
    """float32 scores against float64 autograd, one example at a time, with dense curvature matrices."""
    torch.manual_seed(0)
    model = network().eval()
    train, query = (tuple(t[:n] for t in part) for part, n in zip(digits(), (60, 10), strict=True))
    damping = 1e-2  # less would magnify the rounding of float32 gradients to 1e-5 of the scores
    options = {"curvature": curvature, "damping": damping, "fisher": "empirical"}
    method = influence(model, tolerance=0.0, **options).fit(train)
    scores = method.attribute(query, per_layer=True)
    routed = influence(model, **options).fit(train).attribute(query)

    reference = copy.deepcopy(model).double()
    train, query = ((x.double(), y) for x, y in (train, query))

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return oracle.loss_of("classification", f, y)

    layers = oracle.record(reference, train, lambda f, y: [loss(f, y)])
    V = oracle.layer_gradients(loss, reference, query, layers)
    G = oracle.layer_gradients(loss, reference, train, layers)
    total = torch.zeros(10, 60, dtype=torch.float64)
    for name, layer in layers.items():
        if curvature == "identity":
            part = V[name] @ G[name].T / 60
        else:
            part = oracle.solve(oracle.DENSE[curvature](layer), damping, V[name], G[name]) / 60
        assert relative(scores.layers[name], part) < 1e-5
        total += part
    assert relative(scores.values, total) < 1e-5
    assert relative(method.attribute(query).values, total) < 1e-5
    # By default a route may be approximate, up to the tolerance, and says by how much it is.
    error = float((routed.values - total).norm() / total.norm())
    assert error < 1e-3
    if routed.info["separable_error"]:
        assert error < 3 * routed.info["separable_error"]


# Damping -------------------------------------------------------------------------------------------------------------


def per_example(function, model: nn.Module, batch) -> Tensor:
    """Gradients [n, parameters] of ``function(model, batch of one)``, by autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[1])):
        value = function(model, tuple(t[i : i + 1] for t in batch)).sum()
        grads = torch.autograd.grad(value, parameters)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_large_damping_tends_to_plain_inner_products(curvature):
    model = small()
    V, G = per_example(cross_entropy, model, QUERY), per_example(cross_entropy, model, TRAIN)
    largest = max(
        float(c.eigenvalues.max())
        for c in influence(model, curvature=curvature).fit(TRAIN)._fitted.curvature.layers.values()
    )
    damping = 1e8 * largest
    scores = influence(model, curvature=curvature, damping=damping).fit(TRAIN).attribute(QUERY).values
    assert relative(15 * damping * scores, V @ G.T) < 1e-6
    identity = influence(model, curvature="identity").fit(TRAIN).attribute(QUERY).values
    assert relative(15 * identity, V @ G.T) < 1e-12


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_another_damping_is_another_fit_without_any_pass(curvature):
    model = Counting(small())
    method = influence(model, curvature=curvature, damping="auto").fit(TRAIN)
    before = method.attribute(QUERY).values
    for damping in (1e-3, {"model.0": 0.1, "*": 0.02}, uw.Damping(0.5, relative=True)):
        model.reset()
        changed = method.with_damping(damping)
        assert model.calls == 0
        found = changed.attribute(QUERY)
        assert model.examples <= 3 * len(QUERY[1])  # queries only; the training gradients are still there
        own = changed.self_influence()
        fresh = influence(model, curvature=curvature, damping=damping).fit(TRAIN)
        assert torch.equal(found.values, fresh.attribute(QUERY).values)
        assert torch.equal(own.values, fresh.self_influence().values)
        assert found.info["layer_damping"] == fresh.attribute(QUERY).info["layer_damping"]
    assert torch.equal(method.attribute(QUERY).values, before)  # the first one is still what it was


# Passes over the data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_model_sees_the_data_at_most_twice(curvature, fisher):
    """Once for the Fisher's columns and once for the gradients to be scored, however many columns, passes and queries.

    The empirical Fisher's column is the gradients to be scored. On top come probes: of the trace, and of at most 272
    examples for separable routes.
    """
    model = Counting(trained("mlp"))
    train, query = digits()
    probes, n = 272 + 60, len(train[1])
    method = influence(model, curvature=curvature, fisher=fisher, batch_size=100).fit(train)
    method.attribute(query), method.self_influence(), method.attribute(query), method.attribute(query)
    passes = 1 if fisher == "empirical" or curvature == "identity" else 2
    assert model.examples <= passes * n + probes + 3 * (len(query[1]) + 16)


# Evidence ------------------------------------------------------------------------------------------------------------


def test_evidence_is_complete_and_survives_a_file(tmp_path):
    method = influence(small(), damping="auto", fisher="sampled", draws=2, seed=7).fit(TRAIN)
    scores = method.attribute(QUERY)
    info = scores.info
    json.dumps(info)
    assert info["method"] == "influence" and info["curvature"] == "ekfac"
    assert (info["fisher"], info["fisher_columns"], info["seed"], info["n"]) == ("sampled", 2, 7, 15)
    assert info["represented"] == {"0": "ekfac", "2": "ekfac"} and set(info["layer_damping"]) == {"0", "2"}
    assert info["coverage"] == {"parameters": 1.0, "squared_gradient_norm": 1.0}
    assert set(info["fingerprints"]) == {"model", "train"} and info["versions"]["torch"] == torch.__version__
    assert set(info["routes"]) == {"0", "2"} and info["dtype"] == "float64"
    scores.save(tmp_path / "scores")
    again = uw.Scores.load(tmp_path / "scores")
    assert torch.equal(again.values, scores.values) and again.info == info and again.unit == "nats"


def test_the_same_seed_gives_the_same_numbers_and_the_global_state_stays():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        method = influence(model, fisher="sampled", draws=1, seed=seed).fit(TRAIN)
        own = method.self_influence().values
        return torch.cat([method.attribute(QUERY).values, own[None]])

    first = run(0)
    torch.rand(3)
    assert torch.equal(run(0), first) and not torch.equal(run(1), first)
    torch.set_rng_state(state)
    run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_many_draws_tend_to_the_exact_fisher():
    """Errors shrink like one over the root of the number of draws: 100 have a tenth of one draw's."""
    exact = influence(small(), fisher="exact").fit(TRAIN).attribute(QUERY).values

    def error(draws: int, seeds: int) -> float:
        runs = [influence(small(), fisher="sampled", draws=draws, seed=s).fit(TRAIN) for s in range(seeds)]
        return sum(relative(run.attribute(QUERY).values, exact) for run in runs) / seeds

    assert error(100, 2) < 0.3 * error(1, 8)


def test_bfloat16_autocast_is_close():
    model, (train, query) = trained("mlp"), digits()
    truth = influence(model).fit(train).attribute(query)
    rough = influence(model, autocast=torch.bfloat16).fit(train).attribute(query)
    assert rough.info["autocast"] == "bfloat16" and rough.values.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([truth.values.reshape(-1), rough.values.reshape(-1)]))[0, 1]
    assert correlation > 0.99


def test_a_model_that_squeezes_its_output_may_meet_a_single_query():
    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    def scores(kind: type[nn.Sequential]) -> Tensor:
        torch.manual_seed(0)
        model, x = kind(nn.Linear(3, 1)), torch.randn(9, 3)
        method = uw.Influence(
            model, uw.Regression(), batch_size=4, progress=False
        )  # a batch of one at the end
        return method.fit((x, x[:, 0])).attribute((x[:1], x[:1, 0])).values

    assert torch.equal(scores(Squeezed), scores(nn.Sequential))
