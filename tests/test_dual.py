"""The dual inverse of the damped Gauss-Newton matrix or Fisher, against dense float64 matrices of plain autograd."""

import oracles
import pytest
import torch
from cases_all import WITH_OUTPUTS, each, named, track
from curvature_oracles import relative, solve
from networks import digits
from refusals import refused
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.dual import DualCurvature
from upweight.curvature.gram import GramSystem, heaviest
from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.gradients.norms import layer_squared_norms
from upweight.passes import FisherPass

DAMPING = 1e-2
N = 5
MEMORY = 1 << 28


def curvature(tracker: Tracker, batch, n: int = N, kind="exact", size: int = 2, memory: float = MEMORY):
    examples = Examples(batch)
    source = FisherPass(tracker, examples, size, kind, 3, seed=4)
    parameters = sum(p.numel() for p in tracker.parameters.values())
    return DualCurvature(source, n, parameters, memory)


def dense_exact(case, model, batch) -> Tensor:
    return sum(oracles.fisher(case.kind, model, batch, i, case.parameters) for i in range(N)) / N


def dense_gradients(case, model, batch) -> Tensor:
    return oracles.flat(oracles.gradients(case.oracle_loss(), model, batch, N, case.parameters))


@each(WITH_OUTPUTS)
def test_every_kind_of_layer_equals_the_dense_inverse(case):
    """The exact Gauss-Newton matrix, written out, for every model of the registry: scores and self-influence."""
    model, batch, tracker = track(case)
    G = dense_gradients(case, model, batch)
    truth = solve(dense_exact(case, model, batch), DAMPING, G, G)
    gradients = tracker.train(batch, range(N))
    inverse = curvature(tracker, batch).inverse(DAMPING)
    queries = inverse @ gradients
    assert relative(queries @ gradients.T, truth) < 1e-8
    assert relative(inverse.quadratic(gradients)[""], truth.diagonal()) < 1e-8
    assert queries.solve_info.converged
    parts = queries.by_layer(gradients.T)
    assert parts.keys() == gradients.keys()
    assert relative(sum(parts.values()), truth) < 1e-8


@named("mlp", "mlp regression", "mlp logistic", "linear on sequences")
def test_the_empirical_and_a_sampled_fisher(case):
    model, batch, tracker = track(case)
    G = dense_gradients(case, model, batch)
    gradients = tracker.train(batch, range(N))
    empirical = curvature(tracker, batch, kind="empirical").inverse(DAMPING) @ gradients
    assert relative(empirical @ gradients.T, solve(G.T @ G / N, DAMPING, G, G)) < 1e-8

    dual = curvature(tracker, batch, kind="sampled")
    order = next(iter(FisherPass(tracker, Examples(batch), N, "sampled", 3, seed=4))).load()
    S = torch.cat([column.dense() for column in order])  # three draws of every example, seen in one batch
    assert len(S) == 3 * N
    flat = gradients.dense()
    sampled = dual.inverse(DAMPING) @ gradients
    assert relative(sampled @ gradients.T, solve(S.T @ S / N, DAMPING, flat, flat)) < 1e-8


@named("relu mlp")
def test_another_damping_an_l2_term_and_eigenvectors(case):
    """One fit serves every damping, smaller and larger ones, by a factor or by eigenvectors; L2 adds to the damping."""
    model, batch, tracker = track(case)
    G, H = dense_gradients(case, model, batch), dense_exact(case, model, batch)
    gradients, dual = tracker.train(batch, range(N)), curvature(tracker, batch)
    for damping in (1e-1, 1e-4, 1.0, 1e-3):
        truth = solve(H, damping, G, G)
        for spectrum in (False, True):
            inverse = dual.inverse(damping, spectrum=spectrum)
            assert relative(inverse @ gradients @ gradients.T, truth) < 1e-7, (damping, spectrum)
    both = dual.inverse(0.02, l2=0.03)
    assert relative(both @ gradients @ gradients.T, solve(H, 0.05, G, G)) < 1e-8
    alone = dual.inverse(0.0, l2=0.03)
    assert relative(alone @ gradients @ gradients.T, solve(H, 0.03, G, G)) < 1e-8


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("memory", [MEMORY, 4000])
@named("mlp")
def test_batches_and_what_stays_in_memory_change_nothing(case, size, memory):
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    whole = curvature(tracker, batch, size=N).inverse(DAMPING) @ gradients @ gradients.T
    again = curvature(tracker, batch, size=size, memory=memory)
    assert (again.source.share_in_memory == 1) is (memory == MEMORY)
    assert relative(again.inverse(DAMPING) @ gradients @ gradients.T, whole) < 1e-10


# The digits in float32 ------------------------------------------------------------------------------------------------


def confident() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A small network, trained until most of its predictions are sure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    train, query = ((x[:k].flatten(1), y[:k]) for (x, y), k in zip(digits(), (150, 40), strict=True))
    optimiser = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(400):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimiser.step()
    return model.eval(), train, query


def dense_ggn(model: nn.Module, x: Tensor) -> Tensor:
    """The Gauss-Newton matrix of the cross-entropy by its definition, in float64."""
    model, x = model.double(), x.double()
    parameters = dict(model.named_parameters())
    f = lambda p, row: torch.func.functional_call(model, p, (row[None],))[0]  # noqa: E731
    J = torch.func.vmap(torch.func.jacrev(f), in_dims=(None, 0))(parameters, x)
    J = torch.cat([j.flatten(2) for j in J.values()], 2).detach()  # [n, class, p]
    p = model(x).softmax(1).detach()
    L = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return torch.einsum("ncp,ncd,ndq->pq", J, L, J) / len(x)


def test_single_precision_keeps_its_promise_and_says_so():
    """The residual that is reported is the one a dense float64 matrix finds; some columns are left out."""
    model, train, query = confident()
    n, damping = len(train[0]), 1e-2
    tracker = Tracker(model, uw.Classification(), Examples(train))
    dual = curvature(tracker, train, n, size=64)
    v, g = tracker.query(query, range(len(query[0]))), tracker.train(train, range(n))
    queries = dual.inverse(damping) @ v
    info, kept = queries.solve_info, dual.inverse(damping).columns
    assert info.converged and float(info.residual.max()) <= 5e-5
    assert kept.size < dual.norms.numel() == n * 9
    assert len(dual.inverse(damping).system.heavy) < kept.size, (
        "no row was left to the diagonal preconditioner"
    )

    wide = torch.float64  # the engine's own float32 gradients, and everything after them without rounding
    V, G = v.to(wide).dense(), g.to(wide).dense()
    every = torch.cat([column.to(wide).dense() for step in dual.source for column in step.load()])
    damped = every.T @ every / n + damping * torch.eye(V.shape[1], dtype=wide)
    assert relative(queries @ g.T, V @ torch.linalg.solve(damped, G.T)) < 1e-5
    expected = (G * torch.linalg.solve(damped, G.T).mT).sum(1)
    self_influence = dual.inverse(damping).quadratic(g)[""]
    assert float(((self_influence - expected).abs() / expected).max()) < 1e-3

    S = torch.cat([rows.to(wide).dense() for _, rows in kept.tiles()])
    x = (V - queries.weights.T @ S) / damping
    real = (V - x @ damped).norm(dim=1) / V.norm(dim=1)
    assert bool((real <= info.residual * 1.001).all())
    assert float(real.max()) > 0.1 * float(info.residual.max() - dual.inverse(damping).neglected)

    values = torch.linalg.eigvalsh(damped) - damping  # and the columns are those of the Gauss-Newton matrix
    truth = torch.linalg.eigvalsh(dense_ggn(model.double(), train[0]))
    assert relative(values, truth) < 1e-5


def test_single_precision_is_enough_on_an_ill_conditioned_network():
    """Eigenvalues up to thousands of times the damping: no second Gram matrix in float64, and one refinement."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    (x, y), (qx, qy) = digits()
    train, query = (x[:120].flatten(1), y[:120]), (qx[:20].flatten(1), qy[:20])
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(train[0]), train[1]).backward()
        optimiser.step()
    tracker = Tracker(model.eval(), uw.Classification(), Examples(train))
    dual = curvature(tracker, train, 120, size=64)
    inverse = dual.inverse(1e-3)
    assert float(inverse.system.gram.diagonal().max()) > 100 * inverse.system.shift
    info = (inverse @ tracker.query(query, range(20))).solve_info
    assert info.notes["gram_dtype"] == "float32"
    assert info.converged and float(info.residual.max()) <= 5e-5
    assert info.iterations <= 3


@named("mlp")
def test_a_wrong_factor_is_reported(case, monkeypatch):
    """The residual comes from the Gram matrix, not from what the solver believes: a spoilt solution shows."""
    _, batch, tracker = track(case)
    gradients = tracker.train(batch, range(N))
    inverse = curvature(tracker, batch).inverse(DAMPING)
    good = inverse @ gradients
    monkeypatch.setattr(
        GramSystem,
        "_correct",
        lambda self, b, wanted: (1.5 * torch.linalg.solve(self.gram + self.shift * torch.eye(len(b)), b), 1),
    )
    monkeypatch.setattr("upweight.curvature.gram.ROUNDS", 1)
    bad = inverse @ gradients
    assert good.solve_info.converged and float(good.solve_info.residual.max()) < 1e-9
    assert not bad.solve_info.converged
    S = torch.cat([t.dense() for _, t in inverse.columns.tiles()])
    v = gradients.dense()
    x = (v - bad.weights.T @ S) / DAMPING
    real = (v - x @ S.T @ S / N - DAMPING * x).norm(dim=1) / v.norm(dim=1)
    assert float(real.min()) > 1e-3
    assert relative(bad.solve_info.residual, real) < 1e-8


def test_a_precision_too_low_for_the_damping_is_replaced(monkeypatch):
    """With n d near float32's rounding of K, its residual misses what a fresh product sees: float64 takes over."""
    model, train, query = confident()
    train = (train[0][:60], train[1][:60])
    tracker = Tracker(model, uw.Classification(), Examples(train))
    v = tracker.query(query, range(len(query[0])))
    info = (curvature(tracker, train, 60, size=60).inverse(1e-8) @ v).solve_info
    assert info.notes["gram_dtype"] == "float64" and info.converged

    dual = curvature(tracker, train, 60, size=60)
    monkeypatch.setattr(dual, "memory", 4 * dual.norms.numel() ** 2 * 4 + 1)  # room for one in float32 only
    info = (dual.inverse(1e-8) @ v).solve_info
    assert info.notes["gram_dtype"] == "float32" and not info.converged


def test_zero_gradients_score_zero():
    model, batch = nn.Linear(3, 1, bias=False).double(), (torch.eye(3).double(), torch.zeros(3, 1).double())
    with torch.no_grad():
        model.weight.zero_()  # every prediction is right
    tracker = Tracker(nn.Linear(3, 1, bias=False).double(), uw.Regression(), Examples(batch))
    tracker.model.load_state_dict(model.state_dict())
    gradients = tracker.train(batch, range(3))
    queries = curvature(tracker, batch, 3).inverse(DAMPING) @ gradients
    assert torch.equal(queries @ gradients.T, torch.zeros(3, 3).double())
    assert queries.solve_info.converged


# Refusals -------------------------------------------------------------------------------------------------------------


@named("mlp")
def test_what_it_refuses(case):
    _, batch, tracker = track(case)
    dual = curvature(tracker, batch)
    for damping in (0.0, -1e-3):
        with refused("positive"):
            dual.inverse(damping)
    with refused(r"Gram matrix of 10 gradient columns \(5 examples x 2\).*1.6 KiB.*sampled.*solver='cg'"):
        curvature(tracker, batch, memory=1000).inverse(DAMPING)


# Parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "embedding", "tied linear", "grouped conv", "layer norm"])
def test_squared_norms(name):
    found = [case for case in WITH_OUTPUTS if name in case.name] or WITH_OUTPUTS[:1]
    _, batch, tracker = track(found[0])
    for block in tracker.train(batch, range(N)).values():
        assert (
            relative(layer_squared_norms(block), block.dense().square().sum(1)) < 1e-12
            or not block.dense().any()
        )


def test_the_heaviest():
    assert heaviest(torch.tensor([3.0, 0.1, 2.0, 0.2, 0.5]), 0.31).tolist() == [0, 2, 4]
    assert heaviest(torch.zeros(3), 1.0).numel() == 1


def test_gram_system_against_lapack():
    """Rows of very different weight, in both precisions, with and without a diagonal part."""
    torch.manual_seed(0)
    S = torch.randn(60, 200, dtype=torch.float64) * torch.logspace(0, -5, 60, dtype=torch.float64)[:, None]
    K, b = S @ S.T, S @ torch.randn(200, 4, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        low = K.to(dtype)
        system = GramSystem(low, 0.1)
        assert 1 < len(system.heavy) < 60
        allowed = torch.full((4,), 1e-9 if dtype == torch.float64 else 1e-6, dtype=torch.float64)
        solution = system.solve(b, allowed)
        shifted = low.double() + 0.1 * torch.eye(60, dtype=torch.float64)
        truth = torch.linalg.solve(shifted, b)
        assert relative(solution.value, truth) < tolerance
        assert bool((solution.energy.sqrt() <= allowed).all())
        if dtype == torch.float64:
            continue  # what is left is rounding
        rest = b - shifted @ solution.value
        assert relative(rest, solution.rest) < 1e-2
        exact = (rest * (low.double() @ rest)).sum(0)
        assert float(((solution.energy - exact).abs() / exact).max()) < 1e-2
