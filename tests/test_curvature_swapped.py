"""K-FAC and EK-FAC of layers whose inputs are not the columns of their gradient: transposed ones, and tied weights."""

import curvature_oracles as oracle
import pytest
import torch
from curvature_cases import DAMPING, FISHERS, QUERIES, Case, N, columns_of, influence
from curvature_oracles import relative
from torch import Tensor, nn


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
        handle = model.up.register_forward_hook(lambda m, args, z, kept=kept: kept.append(z))
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
