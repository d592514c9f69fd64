"""DataInf against its definition: dense inverses of single examples in float64, layer by layer."""

import oracles
import pytest
import torch
from cases_all import EXACT, each, named, track
from curvature_oracles import relative
from refusals import refused
from torch import Tensor

from upweight.curvature.damping import Damping
from upweight.curvature.datainf import DataInfCurvature, DataInfQueries
from upweight.data import Examples
from upweight.gradients import Gradients, Tracker
from upweight.passes import Kept, ModelPass

N = 5


def fit(tracker: Tracker, batch, n: int = N, size: int = 2, budget: float = 1e9) -> DataInfCurvature:
    examples = Examples(batch if n == N else oracles.one(batch, 0))
    training = Kept(ModelPass(tracker, examples, size), budget, lambda g: g.nbytes)
    return DataInfCurvature.fit(training, tracker.layers)


def layer_gradients(case, model, tracker: Tracker, batch) -> dict[str, Tensor]:
    """{layer: [N, numel]} by plain autograd, a layer's parameters side by side."""
    found = oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters)
    return {
        name: torch.cat([found[p].reshape(N, -1) for p in layer.parameters], 1)
        for name, layer in tracker.layers.items()
    }


def mean_of_inverses(G: Tensor, damping: float) -> Tensor:
    """``(1/n) sum_i (g_i g_i^T + damping I)^-1``, each inverse by LAPACK."""
    eye = torch.eye(G.shape[1], dtype=G.dtype)
    return torch.stack([torch.linalg.inv(torch.outer(g, g) + damping * eye) for g in G]).mean(0)


@each(EXACT)
def test_the_mean_of_the_examples_own_inverses(case):
    model, batch, tracker = track(case)
    by_layer = layer_gradients(case, model, tracker, batch)
    curvature = fit(tracker, batch)
    numbers = curvature.damping(Damping.of("auto"))
    gradients = tracker.train(batch, range(N))
    inverse = curvature.inverse(Damping.of("auto"))
    queries = inverse @ gradients
    found, own = queries.by_layer(gradients.T), inverse.quadratic(gradients)
    total = torch.zeros(N, N, dtype=torch.float64)
    for name, G in by_layer.items():
        if not G.any():
            continue
        # a tenth of the mean squared gradient of a parameter, as the paper has it
        assert numbers[name] == pytest.approx(0.1 * float(G.square().sum(1).mean()) / G.shape[1], rel=1e-10)
        truth = G @ mean_of_inverses(G, numbers[name]) @ G.T
        assert relative(found[name], truth) < 1e-10, name
        assert relative(own[name], truth.diagonal()) < 1e-10, name
        total += truth
    assert relative(queries @ gradients.T, total) < 1e-10


@named("mlp", "linear on sequences")
def test_one_example_is_exact(case):
    """I10: with n = 1 it is the damped empirical Fisher's inverse."""
    model, batch, tracker = track(case)
    curvature = fit(tracker, batch, n=1)
    assert curvature.n == 1
    gradients = tracker.train(batch, range(N))
    found = (curvature.inverse(Damping(0.03)) @ gradients).by_layer(gradients.T)
    for name, G in layer_gradients(case, model, tracker, batch).items():
        H = torch.outer(G[0], G[0]) + 0.03 * torch.eye(G.shape[1], dtype=G.dtype)
        assert relative(found[name], G @ torch.linalg.solve(H, G.T)) < 1e-10


@named("mlp", "linear on sequences")
def test_both_ways_of_carrying_out_the_sum(case, monkeypatch):
    """Products with the training gradients, and queries as large as the parameters: the same numbers."""
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    few = fit(tracker, batch).inverse(Damping(1e-2))
    kinds, scores = set(), []
    for by_products in (True, False):
        monkeypatch.setattr(type(few), "_by_products", lambda self, queries, b=by_products: b)
        queries = few @ gradients
        kinds.add(type(queries))
        scores.append(queries @ gradients.T)
    assert kinds == {DataInfQueries, Gradients}
    assert relative(*scores) < 1e-12
    monkeypatch.undo()
    lean = fit(
        tracker, batch, budget=0
    )  # the model runs again: two passes, not one for each tile of the scores
    assert isinstance(lean.inverse(Damping(1e-2)) @ gradients, Gradients)


@pytest.mark.parametrize("size", [1, 5])
@named("mlp")
def test_batches_change_nothing(case, size):
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    scores = [
        fit(tracker, batch, size=s).inverse(Damping.of("auto")) @ gradients @ gradients.T for s in (2, size)
    ]
    assert relative(*scores) < 1e-12


@named("mlp")
def test_large_damping_tends_to_gradient_products(case):
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    damping = 1e8 * float(max(norms.max() for norms in fit(tracker, batch).norms.values()))
    scores = fit(tracker, batch).inverse(Damping(damping)) @ gradients @ gradients.T
    assert relative(damping * scores, gradients @ gradients.T) < 1e-6


@named("mlp")
def test_what_it_refuses(case):
    _, batch, tracker = track(case)
    curvature = fit(tracker, batch)
    with refused("damping=0 of layer"):
        curvature.inverse(Damping(0.0))
    with refused("the largest eigenvalue is not known"):
        curvature.inverse(Damping.of("0.01 top"))
    with refused("nowhere"):
        curvature.inverse(Damping.of({"nowhere": 1.0}))
