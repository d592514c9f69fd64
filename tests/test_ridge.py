"""Ridge regression on scikit-learn's diabetes data: 442 patients, 10 measurements, one linear layer.

K-FAC is exact there, the damping is the ridge coefficient, and what removing an example really does is known in closed
form: the parameters move by ``u_i / (1 - h_i)``, where ``u_i`` is the influence function's prediction and ``h_i`` the
example's leverage. Retraining keeps dividing the sum of losses by n ("fixed sum").
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

import upweight as uw

RIDGE = 0.05
TRAIN, QUERIES = 402, 40
REMOVED = range(0, 400, 4)  # 100 examples


@dataclass(frozen=True)
class Ridge:
    """A trained ridge regression; X [n, 11] has a last column of ones, and the bias is penalised like the weights."""

    X: Tensor
    y: Tensor
    Xq: Tensor
    yq: Tensor

    @property
    def n(self) -> int:
        return len(self.X)

    def solve(self, weights: Tensor) -> Tensor:
        """Parameters [11, outputs] that minimise ``(1/n) sum_i weights_i l_i + (RIDGE/2) |theta|^2``."""
        H = (self.X * weights[:, None]).T @ self.X / self.n + RIDGE * torch.eye(11, dtype=torch.float64)
        return torch.linalg.solve(H, (self.X * weights[:, None]).T @ self.y / self.n)

    @property
    def theta(self) -> Tensor:
        return self.solve(torch.ones(self.n, dtype=torch.float64))

    @property
    def inverse(self) -> Tensor:
        """``(H + RIDGE I)^-1`` for one output."""
        return torch.linalg.inv(self.X.T @ self.X / self.n + RIDGE * torch.eye(11, dtype=torch.float64))

    @property
    def leverage(self) -> Tensor:
        return ((self.X @ self.inverse) * self.X).sum(1) / self.n

    def without(self, i: int) -> Tensor:
        """The parameters of the regression without example i."""
        weights = torch.ones(self.n, dtype=torch.float64)
        weights[i] = 0
        return self.solve(weights)

    def model(self) -> nn.Linear:
        model = nn.Linear(10, self.y.shape[1]).double()
        with torch.no_grad():
            model.weight.copy_(self.theta[:-1].T)
            model.bias.copy_(self.theta[-1])
        return model.eval()

    @property
    def train(self) -> tuple[Tensor, Tensor]:
        return self.X[:, :-1].contiguous(), self.y

    @property
    def query(self) -> tuple[Tensor, Tensor]:
        return self.Xq[:, :-1].contiguous(), self.yq

    def predicted(self, theta: Tensor) -> Tensor:
        """Query losses [query]."""
        return ((self.Xq @ theta - self.yq) ** 2).sum(1) / 2


@pytest.fixture(scope="module", params=[1, 2], ids=["one output", "two outputs"])
def ridge(request) -> Ridge:
    data = load_diabetes(scaled=True)
    X = torch.from_numpy(data.data / data.data.std(0))
    y = torch.from_numpy((data.target - data.target.mean()) / data.target.std())
    targets = torch.stack([y, X[:, 2] ** 2 - y][: request.param], 1)
    X = torch.cat([X[:, :10], torch.ones(len(X), 1, dtype=torch.float64)], 1)
    order = torch.randperm(len(X), generator=torch.Generator().manual_seed(0))
    X, targets = X[order], targets[order]
    return Ridge(X[:TRAIN], targets[:TRAIN], X[TRAIN:], targets[TRAIN:])


def influence(ridge: Ridge, curvature: str, measurement: str = "loss") -> uw.Influence:
    task = uw.Regression(measurement=measurement)
    return uw.Influence(ridge.model(), task, curvature=curvature, damping=RIDGE).fit(ridge.train)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_scores_equal_the_closed_form(ridge: Ridge, curvature: str):
    residual, residual_q = ridge.X @ ridge.theta - ridge.y, ridge.Xq @ ridge.theta - ridge.yq
    products = ridge.Xq @ ridge.inverse @ ridge.X.T  # [query, train]
    closed = (residual_q @ residual.T) * products / ridge.n
    method = influence(ridge, curvature)
    scores = method.attribute(ridge.query)
    assert float((scores.values - closed).abs().max()) < 1e-8 * float(closed.abs().max())
    assert scores.unit == "0.5 x squared error"
    own = (residual**2).sum(1) * ridge.leverage
    assert float((method.self_influence().values - own).abs().max()) < 1e-8 * float(own.max())


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_a_prediction_moves_by_the_score_over_one_minus_the_leverage(ridge: Ridge, curvature: str):
    """The prediction is linear in the parameters: with the leverage the score is exact, in sign and size."""
    scores = influence(ridge, curvature, "prediction").attribute(ridge.query).values
    real = []
    for i in REMOVED:
        moved = (ridge.Xq @ (ridge.without(i) - ridge.theta)).sum(1)
        # A higher prediction is declared better, so a proponent's removal lowers it.
        predicted = -scores[:, i] / (1 - ridge.leverage[i])
        assert float((moved - predicted).abs().max()) < 1e-8 * float(scores.abs().max())
        real.append(-moved)
        slope = float(real[-1] @ scores[:, i]) / float(scores[:, i] @ scores[:, i])
        assert slope == pytest.approx(1 / (1 - float(ridge.leverage[i])), rel=1e-8)
    for q, row in enumerate(torch.stack(real, 1)):
        assert np.corrcoef(scores[q, list(REMOVED)], row)[0, 1] > 0.999


def test_a_loss_moves_as_predicted_to_first_order(ridge: Ridge):
    scores = influence(ridge, "ekfac").attribute(ridge.query).values
    before = ridge.predicted(ridge.theta)
    real = []
    for i in REMOVED:
        theta = ridge.without(i)
        real.append(ridge.predicted(theta) - before)
        second_order = ((ridge.Xq @ (theta - ridge.theta)) ** 2).sum(1) / 2
        predicted = scores[:, i] / (1 - ridge.leverage[i])
        assert float((real[-1] - second_order - predicted).abs().max()) < 1e-8 * float(scores.abs().max())
    real = torch.stack(real, 1).numpy()
    predicted = scores[:, list(REMOVED)].numpy()
    assert np.corrcoef(predicted.ravel(), real.ravel())[0, 1] > 0.999
    # Truth over prediction, example by example: 1 / (1 - leverage), up to the loss's own curvature.
    slopes = (predicted * real).sum(0) / (predicted**2).sum(0)
    expected = (1 / (1 - ridge.leverage[list(REMOVED)])).numpy()
    assert np.abs(slopes - expected).max() < 0.02
    assert np.corrcoef(slopes, expected)[0, 1] > 0.95
    assert abs(slopes.mean() - expected.mean()) < 0.002


def test_averaging_over_the_remaining_examples_adds_a_constant_per_query(ridge: Ridge):
    """Retraining with weights 1/(n-1) ("fixed mean") rescales, and shifts every score of a query alike: ranks agree."""
    scores = influence(ridge, "ekfac").attribute(ridge.query).values
    n = ridge.n
    gradients = (ridge.X @ ridge.theta - ridge.y)[:, None, :] * ridge.X[:, :, None]  # [n, 11, outputs]
    step = torch.einsum("ab,nbo->nao", ridge.inverse, gradients + RIDGE * ridge.theta) / (n - 1)
    residual_q = ridge.Xq @ ridge.theta - ridge.yq
    fixed_mean = torch.einsum("qo,qa,nao->qn", residual_q, ridge.Xq, step)
    shift = fixed_mean - scores * n / (n - 1)
    assert float((shift - shift.mean(1, keepdim=True)).abs().max()) < 1e-10 * float(scores.abs().max())
