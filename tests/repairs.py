"""What repairs are tried on: ridge regression with its exact refit, and a small network."""

import numpy as np
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import nn

ALPHA, TRAIN = 2.0, 60
GROUP = list(range(3, 60, 4))
QUIET = {"progress": False}


def diabetes():
    X, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:TRAIN]
    return X[order] * 20, (y[order] - 150) / 77


def ridge(X, y, weights=None, alpha=ALPHA):
    return Ridge(alpha=alpha, solver="cholesky").fit(X, y, sample_weight=weights)


def error(model, estimator) -> float:
    """Of all coefficients, relative to the largest."""
    found = torch.cat([model.weight.flatten(), model.bias]).detach().numpy()
    truth = np.append(np.ravel(estimator.coef_), estimator.intercept_)
    return float(np.abs(found - truth).max() / np.abs(truth).max())


def exact(converted, **options):
    return {"l2": converted.l2, "damping": 0.0, "convention": "sum", "curvature": "ggn", **QUIET, **options}


def problem(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    y = (x[:, 0] + x[:, 1] ** 2 > 0.7).long()
    return x, y


class WithStatistics(nn.Module):
    """A weight used twice, and BatchNorm's statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.again = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.norm(self.first(x)))
        return self.head(torch.tanh(self.tied(torch.tanh(self.again(h)))))


def network(model=None, l2=0.01, steps=150):
    torch.manual_seed(0)
    model = (model or WithStatistics)()
    x, y = problem()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y) + l2 / 2 * sum(
            p.square().sum() for p in model.parameters()
        )
        loss.backward()
        optimizer.step()
    return model.eval()
