"""Small networks trained on scikit-learn's digits, checkpoints around a model, and a model that counts its examples."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

N, QUERIES = 500, 24
"""Training examples and queries that tests use of the 1,797."""


@lru_cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """((train images [500, 1, 8, 8], labels), (query images [24, 1, 8, 8], labels)), float32."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))[: N + QUERIES]
    x = torch.from_numpy(data.images).float()[order, None] / 16
    y = torch.from_numpy(data.target)[order]
    return (x[:N], y[:N]), (x[N:], y[N:])


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 10)
    )


class SmallCNN(nn.Module):
    """Two convolutions, one of them in groups, a norm between them, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.second, self.head = nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().flatten(1))


@lru_cache
def _weights(name: str) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = NETWORKS[name]()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, y = digits()[0]
        for _ in range(40):
            optimiser.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return model.state_dict()


NETWORKS = {"mlp": mlp, "cnn": SmallCNN}


def trained(name: str) -> nn.Module:
    """A fresh copy of a network that was trained for 40 steps: most images right, no loss quite zero."""
    model = NETWORKS[name]()
    model.load_state_dict(_weights(name))
    return model.eval()


class Tagger(nn.Module):
    """A linear layer at every position, averaged afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.embed(tokens)).mean(1)


def nearby(model: nn.Module) -> list[dict[str, Tensor]]:
    """Two checkpoints around a model."""
    generator = torch.Generator().manual_seed(3)
    state = model.state_dict()
    return [
        {k: v + 0.1 * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in state.items()}
        for _ in range(2)
    ]


class Counting(nn.Module):
    """A model that counts the examples it is run on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.examples = 0
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.examples += len(x)
        return self.model(x)

    def reset(self) -> None:
        self.examples = self.calls = 0


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the rows of two matrices, [rows]."""
    ranks = [t.double().argsort(1).argsort(1).double() for t in (a, b)]
    centred = [r - r.mean(1, keepdim=True) for r in ranks]
    return (centred[0] * centred[1]).sum(1) / (centred[0].norm(dim=1) * centred[1].norm(dim=1))
