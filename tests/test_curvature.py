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
    columns_of,
    dense_inverse,
    influence,
    key_of,
    recorded,
)
from curvature_oracles import relative
from torch import Tensor, nn

import upweight as uw
from upweight.curvature import Damping


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


# Layers whose inputs are not the columns of their gradient -----------------------------------------------------------


class Upsampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 4, 3, stride=2, padding=1, dilation=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).tanh()
        return self.head(h @ torch.linspace(0.5, 1.5, h.shape[2], dtype=h.dtype))


class TiedAutoencoder(nn.Module):
    """One weight used as itself and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight).tanh() @ self.weight


class TiedEmbedding(nn.Module):
    """A table that is looked up and gives the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.body = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.linear(self.body(self.table(ids)).tanh().mean(1), self.table.weight)


def word_ids(n: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (n, 3), generator=generator), torch.randint(0, 5, (n,), generator=generator)


SWAPPED = [
    Case("transposed convolution", Upsampled, (3, 4)),
    Case("tied autoencoder", TiedAutoencoder, (5,), "regression", 5),
    Case("tied embedding", TiedEmbedding, (3,), outputs=5),
]


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("case", SWAPPED, ids=lambda case: case.name)
def test_eigenvalues_are_the_fishers_diagonal_in_the_eigenbasis(case: Case, fisher: str):
    model = case.build()
    train = word_ids(N, 1) if case.name == "tied embedding" else case.data(N, 1)
    method = influence(case, model, "ekfac", fisher, DAMPING).fit(train)
    fitted = method._fitted
    columns = columns_of(case, model, train, fisher)
    checked = 0
    for name, layer in fitted.tracker.layers.items():
        kronecker = fitted.curvature.layers[name]
        if not hasattr(kronecker, "basis"):
            continue
        parameters = [model.get_parameter(p) for p in layer.parameters]
        rows = []
        for i in range(N):
            scalars = columns[i](model(train[0][i : i + 1]), train[1][i : i + 1])
            for scalar in scalars:
                grads = torch.autograd.grad(scalar, parameters, retain_graph=True)
                rows.append(torch.cat([g.reshape(-1) for g in grads]))
        eye = torch.eye(layer.numel, dtype=torch.float64)
        order = torch.cat([p.flatten(1) for p in layer.to_parameters(eye).values()], 1)
        if layer.bias is not None:  # to_parameters gives the bias first
            back = layer.to_parameters(eye)
            order = torch.cat([back[p].flatten(1) for p in layer.parameters], 1)
        G = torch.stack(rows) @ order.T  # in the layer's own order
        Q = torch.block_diag(*(torch.kron(b, a) for b, a in zip(kronecker.basis.rows, kronecker.basis.cols)))
        Lambda = (G @ Q).square().sum(0) / N
        assert relative(kronecker.values.reshape(-1), Lambda) < 1e-10
        checked += 1
    assert checked >= 1


@pytest.mark.parametrize("fisher", FISHERS)
def test_kfac_of_a_transposed_convolution(fisher: str):
    """Its gradient has inputs as rows and windows of output gradients as columns, which make up B and A."""
    case = SWAPPED[0]
    model, train, query = case.build(), case.data(N, 1), case.data(QUERIES, 2)
    columns = columns_of(case, model, train, fisher)
    A = B = 0
    for i in range(N):
        x = train[0][i : i + 1]
        kept: list[Tensor] = []
        handle = model.up.register_forward_hook(lambda m, args, z: kept.append(z))  # noqa: B023
        scalars = columns[i](model(x), train[1][i : i + 1])
        handle.remove()
        B = B + x[0] @ x[0].T / N
        for scalar in scalars:
            (delta,) = torch.autograd.grad(scalar, kept, retain_graph=True)
            windows = nn.functional.unfold(
                delta[:, :, None], (1, 3), dilation=(1, 2), padding=(0, 1), stride=(1, 2)
            )
            A = A + windows[0] @ windows[0].T / (N * 4)
    method = influence(case, model, "kfac", fisher, DAMPING, parameters="^up.weight").fit(train)
    weight = model.up.weight
    V, G = (
        torch.stack(
            [
                torch.autograd.grad(case.loss(model(data[0][i : i + 1]), data[1][i : i + 1]), weight)[
                    0
                ].reshape(-1)
                for i in range(len(data[1]))
            ]
        )
        for data in (query, train)
    )
    truth = oracle.solve(torch.kron(B, A), DAMPING, V, G) / N
    assert relative(method.attribute(query).values, truth) < 1e-10


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


def test_each_layer_has_its_own_damping():
    case = CASES[1]
    model, train, query = case.build(), case.data(N, 1), case.data(QUERIES, 2)
    layers = recorded(case, model, train, "exact")
    means = {name: float(oracle.dense_ekfac(layer).diagonal().mean()) for name, layer in layers.items()}
    rules = {
        "auto": {name: 0.1 * mean for name, mean in means.items()},
        0.02: dict.fromkeys(layers, 0.02),
    }
    rules_as_dicts = [
        ({"0": 0.5, "*": 0.01}, {"0": 0.5, "2": 0.01}),
        ({"2": 0.3}, {"0": 0.1 * means["0"], "2": 0.3}),
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


# Padding -------------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Attention over the real positions of a sequence, then their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.head = (
            nn.Linear(3, 4),
            nn.Linear(3, 4, False),
            nn.Linear(3, 4),
            nn.Linear(4, 3),
        )

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        weights = self.q(x) @ self.k(x).mT
        weights = weights.masked_fill(real[:, None] == 0, -torch.inf).softmax(-1)
        h = (weights @ self.v(x)).tanh() * real[..., None]
        return self.head(h.sum(1) / real.sum(1, keepdim=True))


def padded(n: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same sequences of 2 to 5 tokens whatever `length` they are padded to, with numbers like any other."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, 3, generator=generator, dtype=torch.float64)
    lengths = torch.randint(2, 6, (n,), generator=generator)
    real = (torch.arange(12) < lengths[:, None]).double()
    return x[:, :length], real[:, :length], torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "diagonal"])
def test_padding_changes_nothing_if_the_task_has_a_mask(curvature: str, fisher: str, tmp_path):
    torch.manual_seed(1)
    model = Masked().double().eval()

    def scores(length: int, mask: bool, **options) -> Tensor:
        task = uw.Classification()
        task.mask = (lambda batch: batch[1]) if mask else None
        method = uw.Influence(
            model, task, curvature=curvature, fisher=fisher, damping=DAMPING, draws=2, batch_size=4
        )
        return method.fit(padded(9, length, 1), **options).attribute(padded(QUERIES, length, 2)).values

    truth = scores(5, True)
    assert relative(scores(12, True), truth) < 1e-10
    assert relative(scores(12, True, cache=tmp_path), truth) < 1e-10
    if curvature != "diagonal":
        assert relative(scores(12, False), truth) > 1e-3  # what the mask is for


def test_kfac_counts_real_positions_only():
    """Padded sequences against the same sequences one by one, each at its own length."""
    torch.manual_seed(1)
    model = Masked().double().eval()
    x, real, y = padded(9, 12, 1)
    A = B = total = 0
    for i in range(9):
        length = int(real[i].sum())
        kept: list[Tensor] = []
        handle = model.v.register_forward_hook(lambda m, args, z: kept.append(z))  # noqa: B023
        outputs = model(x[i : i + 1, :length], real[i : i + 1, :length])
        handle.remove()
        a = torch.cat([x[i, :length], torch.ones(length, 1, dtype=torch.float64)], 1)
        A, total = A + a.T @ a, total + length
        (delta,) = torch.autograd.grad(oracle.loss_of("classification", outputs, y[i : i + 1]), kept)
        B = B + delta[0].T @ delta[0] / 9
    task = uw.Classification()
    task.mask = lambda batch: batch[1]
    method = uw.Influence(model, task, curvature="kfac", fisher="empirical", damping=DAMPING).fit(
        (x, real, y)
    )
    eigenvalues = method._fitted.curvature.layers["v"].eigenvalues.reshape(-1).sort()[0]
    truth = torch.linalg.eigvalsh(torch.kron(B, A / total))
    assert relative(eigenvalues, truth) < 1e-12
