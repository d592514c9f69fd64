"""K-FAC and EK-FAC against dense float64 matrices: every layer kind, Fisher kind and damping; where they are exact,
against the inverse of the Fisher itself; and the identities between them."""

import curvature_oracles as oracle
import pytest
import torch
from curvature_cases import (
    CASES,
    DAMPING,
    FISHERS,
    QUERIES,
    Case,
    N,
    dense_inverse,
    influence,
    key_of,
    recorded,
)
from curvature_oracles import relative
from torch import Tensor, nn

import upweight as uw
from upweight.curvature import Damping
from upweight.curvature.damping import Spectrum


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equal_to_the_dense_matrix(case: Case, curvature: str, fisher: str):
    model = case.build()
    train, query = case.data(N, 1), case.data(QUERIES, 2)
    layers = recorded(case, model, train, fisher)
    method = influence(case, model, curvature, fisher, DAMPING).fit(train)
    scores = method.attribute(query, per_layer=True)
    V = oracle.layer_gradients(case.loss, model, query, layers)
    G = oracle.layer_gradients(case.loss, model, train, layers)
    inverse = dense_inverse(method, layers)
    total = torch.zeros(QUERIES, N, dtype=torch.float64)
    for name, layer in layers.items():
        H = oracle.DENSE[curvature](layer)
        damped = torch.linalg.inv(H + DAMPING * torch.eye(len(H), dtype=H.dtype))
        assert relative(inverse[name], damped) < 1e-10
        part = oracle.solve(H, DAMPING, V[name], G[name]) / N
        assert relative(scores.layers[key_of(method, name)], part) < 1e-10
        total += part
    assert relative(scores.values, total) < 1e-10
    assert relative(method.attribute(query).values, total) < 1e-10  # not by layer: another way of summing
    quadratic = sum(
        (oracle.solve(oracle.DENSE[curvature](layers[name]), DAMPING, G[name], G[name]) / N).diagonal()
        for name in layers
    )
    assert relative(method.self_influence().values, quadratic) < 1e-10


# Where they are exact ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_exact_for_a_single_example_with_one_position(curvature: str, fisher: str):
    case = CASES[1]
    model, train = case.build(), case.data(1, 1)
    layers = recorded(case, model, train, fisher)
    inverse = dense_inverse(influence(case, model, curvature, fisher, DAMPING).fit(train), layers)
    for name, layer in layers.items():
        H = oracle.dense_fisher(layer)
        assert (
            relative(inverse[name], torch.linalg.inv(H + DAMPING * torch.eye(len(H), dtype=H.dtype))) < 1e-10
        )


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_exact_for_a_linear_network_with_a_gaussian_loss(curvature: str):
    """Output gradients do not depend on the example, so that every layer's Fisher is a Kronecker product."""
    linear = lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6, bias=False), nn.Linear(6, 2))  # noqa: E731
    case = Case("linear network", linear, (4,), "regression", 2)
    model, train = case.build(), case.data(9, 1)
    layers = oracle.record(model, train, oracle.gaussian_expectation)
    method = influence(case, model, curvature, "exact", DAMPING).fit(train)
    inverse = dense_inverse(method, layers)
    for name, layer in layers.items():
        H = oracle.dense_fisher(layer)
        assert (
            relative(inverse[name], torch.linalg.inv(H + DAMPING * torch.eye(len(H), dtype=H.dtype))) < 1e-9
        )


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_one_linear_layer_with_a_gaussian_loss_equals_the_inverse_of_the_whole_fisher(curvature: str):
    case = Case("one layer", lambda: nn.Linear(4, 2), (4,), "regression", 2)
    model, train, query = case.build(), case.data(9, 1), case.data(QUERIES, 2)
    parameters = list(model.parameters())

    def flat(value: Tensor) -> Tensor:
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, parameters, retain_graph=True)])

    J = torch.stack([torch.stack([flat(f) for f in model(x[None])[0]]) for x in train[0]])
    fisher = torch.einsum("nop,noq->pq", J, J) / len(J)
    V, G = (
        torch.stack([flat(case.loss(model(x[None]), y[None])) for x, y in zip(data[0], data[1], strict=True)])
        for data in (query, train)
    )
    truth = oracle.solve(fisher, DAMPING, V, G) / len(J)
    scores = influence(case, model, curvature, "exact", DAMPING).fit(train).attribute(query)
    assert relative(scores.values, truth) < 1e-10


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_exact_where_inputs_and_output_gradients_are_independent(curvature: str):
    """All pairs of 5 inputs and 4 targets, at weights of zero: the output gradient is minus the target, whatever the
    input."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    targets = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(4))
    train = inputs[pairs[:, 0]], targets[pairs[:, 1]]
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        model.weight.zero_(), model.bias.zero_()
    case = Case("one layer", lambda: model, (4,), "regression", 2)
    layers = oracle.record(model, train, lambda f, y: [case.loss(f, y)])
    method = influence(case, model, curvature, "empirical", DAMPING).fit(train)
    H = oracle.dense_fisher(layers[""])
    truth = torch.linalg.inv(H + DAMPING * torch.eye(len(H), dtype=H.dtype))
    assert relative(dense_inverse(method, layers)[""], truth) < 1e-10


# Identities between them ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[10]], ids=lambda case: case.name)
def test_ekfac_is_nearer_to_the_fisher_than_kfac_and_keeps_its_trace(case: Case):
    model, train = case.build(), case.data(N, 1)
    layers = recorded(case, model, train, "exact")
    found = {
        kind: dense_inverse(influence(case, model, kind, "exact", 1.0).fit(train), layers)
        for kind in ("kfac", "ekfac")
    }
    for name, layer in layers.items():
        F = oracle.dense_fisher(layer)
        eye = torch.eye(len(F), dtype=F.dtype)
        kfac, ekfac = (torch.linalg.inv(found[kind][name]) - eye for kind in ("kfac", "ekfac"))
        assert torch.linalg.norm(F - ekfac) <= torch.linalg.norm(F - kfac) * (1 + 1e-10)
        assert abs(float(ekfac.trace() - F.trace())) < 1e-10 * float(F.trace())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("case", [CASES[1], CASES[7], CASES[12]], ids=lambda case: case.name)
def test_cut_into_the_smallest_tiles_nothing_changes(case: Case, curvature: str, monkeypatch):
    import upweight.curvature.fit as fit
    import upweight.curvature.operators as operators
    from upweight.gradients.contraction import tiles

    model, train, query = case.build(), case.data(N, 1), case.data(QUERIES, 2)
    whole = influence(case, model, curvature, "exact", DAMPING).fit(train)
    truth, own = whole.attribute(query).values, whole.self_influence().values
    for module in (fit, operators):
        monkeypatch.setattr(module, "tiles", lambda block: tiles(block, 1))
    method = influence(case, model, curvature, "exact", DAMPING, batch_size=2).fit(train)
    assert relative(method.attribute(query).values, truth) < 1e-12
    assert relative(method.self_influence().values, own) < 1e-12


# Damping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_an_automatic_damping_counts_examples_in_kronecker_layers_alone(curvature):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 5), nn.Flatten(), nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 3))
    data = torch.randint(0, 40, (6, 2)), torch.arange(6) % 3
    method = uw.Influence(model, uw.Classification(), curvature=curvature, progress=False).fit(data)
    values = {name: layer.eigenvalues for name, layer in method._fitted.curvature.layers.items()}
    tenth = {name: 0.1 * float(v.mean()) for name, v in values.items()}
    fiftieth = {name: 0.02 * float(v.sum()) / 6 for name, v in values.items()}
    assert all(fiftieth[name] > tenth[name] for name in ("0", "2", "4"))
    expected = tenth if curvature == "diagonal" else {**fiftieth, "0": tenth["0"]}
    assert method.attribute(data).info["layer_damping"] == pytest.approx(expected, rel=1e-5)


def test_a_damping_relative_to_what_is_not_known_is_refused():
    share, top = "an example's share", "the largest eigenvalue"
    for damping, what in (("auto", share), ("2 example", share), ("1 top", top)):
        with pytest.raises(uw.UpweightError, match=f"{what} is not known here -> '0.1 mean' or a number"):
            Damping.of(damping).resolve("0", Spectrum(1.0))
    with pytest.raises(uw.UpweightError, match="expected 'mean' or 'top'"):
        Damping(1.0, relative="bottom")


def test_each_layer_has_its_own_damping():
    case = CASES[1]
    model, train, query = case.build(), case.data(N, 1), case.data(QUERIES, 2)
    layers = recorded(case, model, train, "exact")
    means = {name: float(oracle.dense_ekfac(layer).diagonal().mean()) for name, layer in layers.items()}
    shares = {name: float(oracle.dense_ekfac(layer).trace()) / N for name, layer in layers.items()}
    auto = {name: max(0.02 * shares[name], 0.1 * means[name]) for name in layers}
    rules = {
        "auto": auto,
        "0.1 mean": {name: 0.1 * mean for name, mean in means.items()},
        "3 example": {name: 3 * share for name, share in shares.items()},
        0.02: dict.fromkeys(layers, 0.02),
    }
    rules_as_dicts = [
        ({"0": 0.5, "*": 0.01}, {"0": 0.5, "2": 0.01}),
        ({"2": 0.3}, {"0": auto["0"], "2": 0.3}),
        (Damping(0.7, relative=True), {name: 0.7 * mean for name, mean in means.items()}),
    ]
    V = oracle.layer_gradients(case.loss, model, query, layers)
    G = oracle.layer_gradients(case.loss, model, train, layers)
    for rule, expected in [*rules.items(), *rules_as_dicts]:
        scores = influence(case, model, "ekfac", "exact", rule).fit(train).attribute(query, per_layer=True)
        assert scores.info["layer_damping"] == pytest.approx(expected, rel=1e-12)
        for name, layer in layers.items():
            part = oracle.solve(oracle.dense_ekfac(layer), expected[name], V[name], G[name]) / N
            assert relative(scores.layers[name], part) < 1e-10
