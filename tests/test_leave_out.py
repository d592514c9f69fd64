"""Examples left out of EK-FAC's and K-FAC's eigenvalues, against dense float64 matrices and real refits."""

import curvature_oracles as oracle
import pytest
import torch
from cases_all import WITH_OUTPUTS, N, each, track
from curvature_cases import CASES, DAMPING, FISHERS, QUERIES, Case, influence, key_of, recorded
from curvature_cases import N as MEMBERS
from curvature_oracles import relative
from gauss_newton import parts
from refusals import refused
from sklearn.datasets import load_digits
from torch import Tensor, nn

import upweight as uw
from upweight.curvature import fit_curvature
from upweight.curvature.curvature import Inverse
from upweight.curvature.leave_out import LeftOut, Weighted, rotated
from upweight.curvature.operators import Full, Kronecker

SMALL = 1e-2
"""A damping at which leverages of these few examples are large."""


# EK-FAC and K-FAC written out ----------------------------------------------------------------------------------------


def dense_left_out(
    layer: oracle.Layer, curvature: str, change: Tensor, other: oracle.Layer | None = None
) -> Tensor:
    """``Q diag(max(Lambda + (1/n) sum_i change_i lambda_i, 0)) Q^T`` of one layer; `other` has the replacements."""
    B, A = oracle.kronecker_factors(layer)
    blocks = []
    for g in range(layer.groups):
        beta, q_b = torch.linalg.eigh(B[g])
        alpha, q_a = torch.linalg.eigh(A[g])
        Q = torch.kron(q_b, q_a)
        own = (layer.gradients()[:, :, g].flatten(2) @ Q).square().sum(1)  # [n, parameters]
        Lambda = own.mean(0) if curvature == "ekfac" else torch.kron(beta, alpha)
        Lambda = Lambda + change @ own / layer.n
        if other is not None:
            Lambda = Lambda + (other.gradients()[:, :, g].flatten(2) @ Q).square().sum((0, 1)) / layer.n
        blocks.append((Q * Lambda.clamp_min(0)) @ Q.T)
    return torch.block_diag(*blocks)


def removed(*positions: int) -> Tensor:
    change = torch.zeros(MEMBERS, dtype=torch.float64)
    change[list(positions)] = -1
    return change


def both(case: Case, method: uw.Influence, layers, query, train):
    """Query and training gradients by autograd, in the oracle's order."""
    model = method.model
    return (oracle.layer_gradients(case.loss, model, batch, layers) for batch in (query, train))


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("case", CASES[1::2], ids=lambda case: case.name)
def test_rescaled_equals_the_dense_matrix_without_each_example(case: Case, curvature: str, fisher: str):
    model = case.build()
    train, query = case.data(MEMBERS, 1), case.data(QUERIES, 2)
    layers = recorded(case, model, train, fisher)
    options = {"correction": "rescaled", "batch_size": 3}
    method = influence(case, model, curvature, fisher, DAMPING, **options).fit(train)
    V, G = both(case, method, layers, query, train)
    expected, own = {}, torch.zeros(MEMBERS, dtype=torch.float64)
    for name, layer in layers.items():
        columns = []
        for i in range(MEMBERS):
            H = dense_left_out(layer, curvature, removed(i))
            columns.append(oracle.solve(H, DAMPING, V[name], G[name][i : i + 1]) / MEMBERS)
            own[i] += oracle.solve(H, DAMPING, G[name][i : i + 1], G[name][i : i + 1]).item() / MEMBERS
        expected[name] = torch.cat(columns, 1)
    scores = method.attribute(query, per_layer=True)
    for name, part in expected.items():
        assert relative(scores.layers[key_of(method, name)], part) < 1e-10
    assert relative(scores.values, sum(expected.values())) < 1e-10
    assert relative(method.attribute(query).values, sum(expected.values())) < 1e-10
    assert relative(method.self_influence().values, own) < 1e-10
    plain = influence(case, model, curvature, fisher, DAMPING).fit(train)
    assert relative(plain.attribute(query).values, scores.values) > 1e-3


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("name", ["mlp", "sequence of 7", "two convolutions", "conv2d in two groups"])
def test_a_group_equals_the_dense_matrix_with_its_weights(name: str, curvature: str, fisher: str):
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    train, query = case.data(MEMBERS, 1), case.data(QUERIES, 2)
    layers = recorded(case, model, train, fisher)
    method = influence(case, model, curvature, fisher, DAMPING, batch_size=3).fit(train)
    V, G = both(case, method, layers, query, train)

    def expected(change: Tensor) -> tuple[Tensor, Tensor]:
        rescaled, newton = 0, 0
        for layer in layers:
            for i in change.nonzero()[:, 0].tolist():
                alone = torch.zeros_like(change)
                alone[i] = change[i]
                H = dense_left_out(layers[layer], curvature, alone)
                rescaled -= (
                    change[i] * oracle.solve(H, DAMPING, V[layer], G[layer][i : i + 1])[:, 0] / MEMBERS
                )
            H = dense_left_out(layers[layer], curvature, change)
            newton -= oracle.solve(H, DAMPING, V[layer], (change @ G[layer])[None])[:, 0] / MEMBERS
        return rescaled, newton

    effect = method.removal([5, 0, 4], query)
    rescaled, newton = expected(removed(5, 0, 4))
    assert relative(effect.rescaled, rescaled) < 1e-10
    assert relative(effect.newton, newton) < 1e-10
    assert relative(effect.first_order, newton) > 1e-3
    alone = method.removal([2], query)
    assert relative(alone.rescaled, alone.newton) < 1e-10
    effect = method.reweight({1: 0.0, 2: 3.0, 6: 0.5}, query)
    change = torch.tensor([0, -1, 2, 0, 0, 0, -0.5], dtype=torch.float64)
    rescaled, newton = expected(change)
    assert relative(effect.rescaled, rescaled) < 1e-10
    assert relative(effect.newton, newton) < 1e-10
    everything = method.removal(range(MEMBERS), query)  # only the damping is left
    assert bool(torch.isfinite(everything.newton).all())


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["mlp", "sequence of 7", "two convolutions"])
def test_changed_examples_leave_and_enter(name: str, fisher: str):
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    train, query, to = case.data(MEMBERS, 1), case.data(QUERIES, 2), case.data(2, 3)
    layers, others = (recorded(case, model, batch, fisher) for batch in (train, to))
    method = influence(case, model, "ekfac", fisher, DAMPING).fit(train)
    V, G = both(case, method, layers, query, train)
    after = oracle.layer_gradients(case.loss, model, to, layers)
    newton = 0
    for layer in layers:
        H = dense_left_out(layers[layer], "ekfac", removed(1, 3), others[layer])
        step = (G[layer][[1, 3]] - after[layer]).sum(0, keepdim=True)
        newton += oracle.solve(H, DAMPING, V[layer], step)[:, 0] / MEMBERS
    assert relative(method.change([1, 3], to, query).newton, newton) < 1e-10
    one = method.change([1], (to[0][:1], to[1][:1]), query)
    assert relative(one.rescaled, one.newton) < 1e-10
    same = method.change([1, 3], (train[0][[1, 3]], train[1][[1, 3]]), query)
    assert float(same.newton.abs().max()) < 1e-15 and float(same.rescaled.abs().max()) < 1e-15


def test_sampled_columns_are_those_of_the_fit_whatever_the_batches_and_the_cache(tmp_path):
    case = next(case for case in CASES if case.name == "mlp")
    model, train, query = case.build(), case.data(MEMBERS, 1), case.data(QUERIES, 2)
    values = []
    for options in ({}, {"batch_size": 2}, {"batch_size": 3}, {"batch_size": 3}):
        method = influence(case, model, "ekfac", "sampled", SMALL, **options)
        method.fit(train, cache=tmp_path if options.get("batch_size") == 3 else None)
        values.append(method.attribute(query).values)
        method = influence(case, model, "ekfac", "sampled", SMALL, correction="rescaled", **options)
        method.fit(train, cache=tmp_path if options.get("batch_size") == 3 else None)
        values[-1] = torch.stack([method.attribute(query).values, method.attribute(query).values])
        effect = method.removal([6, 1], query)  # not in the order of the data
        assert relative(effect.rescaled, values[-1][0][:, [1, 6]].sum(1)) < 1e-10
    for other in values[1:]:
        assert relative(other, values[0]) < 1e-10


def test_in_tiles_of_any_size(monkeypatch):
    """One example at a time, and never more than the budget's rows of all parameters at once."""
    case = next(case for case in CASES if case.name == "two convolutions")
    model, train, query = case.build(), case.data(MEMBERS, 1), case.data(QUERIES, 2)
    method = influence(case, model, "ekfac", "exact", DAMPING, correction="rescaled").fit(train)
    whole = method.attribute(query).values, method.self_influence().values
    effect = method.removal([0, 3, 5], query)
    monkeypatch.setattr("upweight.curvature.leave_out.TILE_BYTES", 1)
    monkeypatch.setattr("upweight.attributors.corrections.BATCH_BYTES", 1)
    sizes = []
    solve = LeftOut.solve_rotated
    monkeypatch.setattr(LeftOut, "solve_rotated", lambda self, g: sizes.append(g.batch) or solve(self, g))
    assert relative(method.attribute(query).values, whole[0]) < 1e-12
    assert sizes == [1] * MEMBERS
    assert relative(method.self_influence().values, whole[1]) < 1e-12
    again = method.removal([0, 3, 5], query)
    assert relative(again.rescaled, effect.rescaled) < 1e-12 and relative(again.newton, effect.newton) < 1e-12


# Every registered model ----------------------------------------------------------------------------------------------


def left_out_by_layer(curvature, own: Tensor, change: float, n: int, sizes: dict[str, int]) -> Tensor:
    """The whole matrix H' [p, p] from the fitted eigenbases and an example's own Fisher [p, p]."""
    blocks, start = [], 0
    for name, size in sizes.items():
        layer, here = curvature.layers[name], own[start : start + size, start : start + size]
        start += size
        if isinstance(layer, Full):
            blocks.append((layer.vectors * layer.values) @ layer.vectors.T + change * here / n)
            continue
        Q = torch.eye(size, dtype=own.dtype)
        if isinstance(layer, Kronecker):
            pairs = zip(layer.basis.rows, layer.basis.cols, strict=True)
            Q = torch.block_diag(*(torch.kron(a, b) for a, b in pairs))
        values = layer.eigenvalues.flatten() + change * (Q.T @ here @ Q).diagonal() / n
        blocks.append((Q * values.clamp_min(0)) @ Q.T)
    return torch.block_diag(*blocks)


@each(WITH_OUTPUTS)
def test_every_layer_of_every_model(case):
    """Matrices, tables, norms, convolutions, fallbacks: each alone and together, removed, halved, added, replaced."""
    gradients, columns, own, _ = parts(case)
    layers = track(case)[2].layers
    source = [(0, columns)]
    curvature = fit_curvature("ekfac", layers, source, N, torch.float64)
    damping = {name: SMALL * max(float(c.eigenvalues.mean()), 1e-3) for name, c in curvature.layers.items()}
    sizes = {name: layer.numel for name, layer in layers.items()}
    ridge = torch.cat(
        [torch.full((size,), damping[name], dtype=torch.float64) for name, size in sizes.items()]
    )
    inverse, G = Inverse(curvature, damping), gradients.dense()
    change = torch.tensor([-1.0, -0.5, 2.0, -1.0, -1.0], dtype=torch.float64)

    def dense(matrix: Tensor, d: float) -> Tensor:
        return left_out_by_layer(curvature, matrix, d, N, sizes) + ridge.diag()

    def close(found: Tensor, truth: Tensor) -> None:
        assert float((found - truth).abs().max()) <= 1e-9 * float(truth.abs().max()) + 1e-14

    alone = LeftOut([Weighted(columns, change)], inverse, N, range(N))
    truth = torch.stack([torch.linalg.solve(dense(own[i], float(change[i])), G[i]) for i in range(N)])
    close(alone.solve(gradients).dense(), truth)
    close(rotated(inverse, gradients) @ alone.solve_rotated(gradients).T, G @ truth.T)
    close(alone.rows(slice(1, 3)).solve(gradients.rows(slice(1, 3))).dense(), truth[1:3])
    matrix = sum(d * H_i for d, H_i in zip(change, own, strict=True))
    close(alone.solve_group(gradients).dense(), torch.linalg.solve(dense(matrix, 1.0), G.T).T)
    # Example i goes and example i + 1 comes once more.
    following = [column.rows(torch.arange(1, N + 1) % N) for column in columns]
    ones = torch.ones(N, dtype=torch.float64)
    swapped = LeftOut([Weighted(columns, -ones), Weighted(following, ones)], inverse, N, range(N))
    moved = [own[(i + 1) % N] - own[i] for i in range(N)]
    truth = torch.stack([torch.linalg.solve(dense(moved[i], 1.0), G[i]) for i in range(N)])
    close(swapped.solve(gradients).dense(), truth)


# Against refitting ---------------------------------------------------------------------------------------------------


def ridge_refit(X: Tensor, y: Tensor, weights: Tensor, damping: float) -> Tensor:
    H = X.T @ (weights[:, None] * X) / len(X) + damping * torch.eye(X.shape[1], dtype=X.dtype)
    return torch.linalg.solve(H, X.T @ (weights * y) / len(X))


def orthogonal_ridge(X: Tensor, damping: float) -> tuple[uw.Influence, Tensor, Tensor]:
    """A ridge regression, its targets and coefficients: one linear layer, of which EK-FAC is the exact curvature."""
    torch.manual_seed(0)
    y = X @ torch.randn(X.shape[1], dtype=X.dtype) + torch.randn(len(X), dtype=X.dtype)
    model = nn.Linear(X.shape[1], 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(ridge_refit(X, y, torch.ones_like(y), damping))
    method = uw.Influence(model, uw.Regression(), curvature="ekfac", fisher="exact", damping=damping)
    return method.fit((X, y[:, None])), y, model.weight.detach()[0]


def test_ridge_with_inputs_along_the_eigenvectors_is_the_refit():
    """One input of each group is not zero (one-way analysis of variance): no products of two coordinates to miss."""
    group = torch.arange(18) % 4
    X = nn.functional.one_hot(group, 4).double() * torch.linspace(0.5, 2, 18, dtype=torch.float64)[:, None]
    X = X * torch.tensor([1.0, 1.5, 2.0, 0.7], dtype=torch.float64)
    method, y, before = orthogonal_ridge(X, SMALL)
    for gone in ([0], [5], [0, 4, 9, 17], range(0, 18, 2)):
        weights = torch.ones_like(y)
        weights[list(gone)] = 0
        effect = method.removal(list(gone), (X[:3], y[:3, None]))
        after = ridge_refit(X, y, weights, SMALL)
        assert relative(effect.steps["newton"]["weight"][0], after - before) < 1e-10
        assert relative(effect.steps["first_order"]["weight"][0], after - before) > 0.02
        if len(gone) == 1:
            assert relative(effect.steps["rescaled"]["weight"][0], after - before) < 1e-10


def test_ridge_on_a_factorial_design_is_the_refit_for_a_balanced_group_only():
    """A replicate of the design keeps the eigenvectors, one run alone does not: only some of its leverage is seen."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    X = torch.cat([signs] * 3) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    method, y, before = orthogonal_ridge(X, SMALL)
    weights = torch.ones_like(y)
    weights[:8] = 0
    effect = method.removal(range(8), (X[:3], y[:3, None]))
    assert relative(effect.steps["newton"]["weight"][0], ridge_refit(X, y, weights, SMALL) - before) < 1e-10
    weights = torch.ones_like(y)
    weights[0] = 0
    step = ridge_refit(X, y, weights, SMALL) - before
    effect = method.removal([0], (X[:3], y[:3, None]))
    wrong = {name: relative(effect.steps[name]["weight"][0], step) for name in ("first_order", "rescaled")}
    assert 0.05 < wrong["rescaled"] < wrong["first_order"]


# Digits --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits(return_X_y=True)
    X, y = torch.as_tensor(X, dtype=torch.float32) / 16, torch.as_tensor(y)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(X[:1437]), y[:1437]).backward()
        optimiser.step()
    return model, (X[:1437], y[:1437]), (X[1437:1457], y[1437:1457])


@pytest.mark.parametrize("damping", [1e-3, "auto"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_nothing_is_refused_on_digits(digits, curvature, damping):
    model, train, query = digits
    plain = uw.Influence(model, uw.Classification(), curvature=curvature, damping=damping).fit(train)
    rescaled = uw.Influence(
        model, uw.Classification(), curvature=curvature, damping=damping, correction="rescaled", memory="64MB"
    ).fit(train)
    scores = rescaled.attribute(query)
    assert bool(torch.isfinite(scores.values).all()) and scores.unit == "nats"
    assert scores.info["left_out_of"] == "eigenvalues"
    assert bool((rescaled.self_influence().values >= plain.self_influence().values * (1 - 1e-4)).all())
    effect = plain.removal(range(0, 1437, 20), query)  # 5 %
    assert relative(effect.rescaled, scores.removal_effect(range(0, 1437, 20))) < 1e-3
    assert float(torch.corrcoef(torch.stack([effect.newton, effect.first_order]))[0, 1]) > 0.9
    assert all(
        bool(torch.isfinite(effect.effect(name)).all()) for name in ("first_order", "rescaled", "newton")
    )


# Refusals ------------------------------------------------------------------------------------------------------------


def test_without_damping_an_example_that_holds_an_eigenvalue_is_named():
    X = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    X = torch.cat([X, X[:2]])
    model = nn.Linear(3, 1, bias=False).double()
    method = uw.Influence(
        model, uw.Regression(), curvature="ekfac", fisher="exact", damping=0.0, correction="rescaled"
    ).fit((X, torch.ones(5, 1, dtype=torch.float64)))
    with refused("singular without example 2 "):
        method.attribute((X, torch.ones(5, 1, dtype=torch.float64)))
    with refused("singular without the group"):
        method.removal([0, 3], (X, torch.ones(5, 1, dtype=torch.float64)))
    assert bool(torch.isfinite(method.with_damping(1e-9).attribute((X, X[:, :1])).values).all())


@pytest.mark.parametrize("wrong", ["n", "sign", "once"])
def test_a_mistake_would_show(wrong):
    case = next(case for case in CASES if case.name == "mlp")
    model, train = case.build(), case.data(MEMBERS, 1)
    method = influence(case, model, "ekfac", "exact", SMALL).fit(train)
    tracker, inverse = method._ready().tracker, method._ready().curvature.inverse(method.damping)
    gradients = tracker.train(train, range(MEMBERS))
    columns = tracker.fisher(train, range(MEMBERS), "exact", 1, torch.Generator())
    gone = -torch.ones(MEMBERS, dtype=torch.float64)
    right = LeftOut([Weighted(columns, gone)], inverse, MEMBERS, range(MEMBERS)).solve(gradients).dense()
    n = MEMBERS + 1 if wrong == "n" else MEMBERS
    change, used = (-gone if wrong == "sign" else gone), (columns[:1] if wrong == "once" else columns)
    found = LeftOut([Weighted(used, change)], inverse, n, range(MEMBERS)).solve(gradients).dense()
    assert relative(found, right) > 1e-3
