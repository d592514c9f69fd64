"""The bound on a repaired linear model's residual gradient, in a thousand random trials, and the constants in it."""

import math

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.special import expit
from scipy.stats import norm
from torch import nn

import upweight as uw
from upweight.repair.certificate import LOGISTIC, SOFTMAX, Certificate, bend_bound

TRIALS = 1000


def third_derivative(z: torch.Tensor, v: torch.Tensor) -> float:
    """``d^3/dt^3 logsumexp(z + t v)`` at 0: the third central moment of v under softmax(z)."""
    p = z.softmax(0)
    centred = v - (p * v).sum()
    return float((p * centred**3).sum())


def test_no_direction_bends_the_losses_more_than_the_constants_say():
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for trial in range(3000):
        classes = 2 + trial % 5
        z, v = (torch.randn(classes, generator=generator, dtype=torch.float64) * s for s in (2, 1))
        largest = max(largest, abs(third_derivative(z, v / v.norm())))
    assert largest <= SOFTMAX
    # ... and one does bend as much: two classes, apart by the logit where p (1 - p) (1 - 2p) is largest.
    p = (3 - math.sqrt(3)) / 6
    z = torch.tensor([0.0, math.log(p / (1 - p))], dtype=torch.float64)
    v = torch.tensor([-1.0, 1.0], dtype=torch.float64) / math.sqrt(2)
    assert third_derivative(z, v) == pytest.approx(SOFTMAX, rel=1e-12)
    assert p * (1 - p) * (1 - 2 * p) == pytest.approx(LOGISTIC, rel=1e-12)


def random_trial(generator: np.random.Generator, kind: str):
    """A small convex problem at weights that are anywhere, a step that is anything, and the gradient after it."""
    n, d = int(generator.integers(4, 12)), int(generator.integers(1, 4))
    classes = {"logistic": 1, "softmax": int(generator.integers(2, 5))}[kind]
    X = generator.normal(size=(n, d)) * 10.0 ** generator.uniform(-1, 1)
    y = generator.integers(0, max(2, classes), n)
    w = generator.choice([0.0, 0.3, 1.0, 2.0], n, p=[0.1, 0.1, 0.7, 0.1])
    w[0] = 1.0
    W = generator.normal(size=(classes, d))
    l2 = 10.0 ** generator.uniform(-4, 0)
    return X, y, w, W, l2


def gradient(X, y, w, W, l2):
    """Of ``(1/n) sum w l + (l2/2) |W|^2``, and its Hessian [Cd, Cd], written down plainly."""
    n, (classes, d) = len(X), W.shape
    z = X @ W.T
    if classes == 1:
        p = expit(z)
        slopes, bends = p - y[:, None], (p * (1 - p))[:, :, None]
    else:
        e = np.exp(z - z.max(1, keepdims=True))
        p = e / e.sum(1, keepdims=True)
        slopes = p - np.eye(classes)[y]
        bends = np.einsum("ic,ce->ice", p, np.eye(classes)) - np.einsum("ic,ie->ice", p, p)
    g = (w[:, None] * slopes).T @ X / n + l2 * W
    H = np.einsum("i,ice,ij,ik->cjek", w, bends, X, X).reshape(classes * d, classes * d) / n
    return g, H + l2 * np.eye(classes * d)


@pytest.mark.parametrize("kind", ["logistic", "softmax"])
def test_the_bound_holds_in_a_thousand_random_trials(kind):
    """For Newton steps (as a repair takes them) and for any others, of every length."""
    generator = np.random.default_rng(7)
    tightest = 0.0
    for trial in range(TRIALS):
        X, y, w, W, l2 = random_trial(generator, kind)
        g, H = gradient(X, y, w, W, l2)
        newton = -np.linalg.solve(H, g.ravel()).reshape(W.shape)
        U = newton if trial % 2 else generator.normal(size=W.shape) * 10.0 ** generator.uniform(-3, 1)
        measured = np.linalg.norm(gradient(X, y, w, W + U, l2)[0])
        solved = np.linalg.norm(g.ravel() + H @ U.ravel())
        inputs, moved = torch.as_tensor(X), torch.as_tensor(X @ U.T)
        gamma = LOGISTIC if kind == "logistic" else SOFTMAX
        bound = solved + bend_bound(inputs, moved, torch.as_tensor(w), gamma, len(X))
        assert measured <= bound * (1 + 1e-9) + 1e-13
        if trial % 2:
            tightest = max(tightest, measured / bound)
    assert 0.2 < tightest <= 1 + 1e-9  # no bound that anything would satisfy


def test_a_removal_carries_its_bound():
    """Through the whole of `unlearn`: with a bias, weights, damping, and with a step that is not Newton's."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    for classes, task in ((2, uw.Classification()), (3, uw.Classification()), (1, uw.BinaryClassification())):
        y = torch.randint(0, max(2, classes), (40,), generator=generator)
        torch.manual_seed(1)
        model = nn.Linear(3, classes).double()
        data = (x, y.double() if classes == 1 else y)
        for options in (
            {"method": "newton", "damping": 0.1},
            {"method": "newton", "steps": 3, "damping": 1e-3},
            {"method": "gradient"},
            {"method": "influence", "damping": 1e-2, "step_size": 3.0},
            {"method": "trust_region", "damping": 1e-2},
            {"method": "corrected", "damping": 1e-2, "steps": 2},
            {"method": "last_layer", "damping": 1e-3},
        ):
            repair = uw.amend(
                model,
                task,
                data,
                remove=[1, 2],
                weights={5: 0.5},
                l2=0.02,
                curvature="ggn",
                progress=False,
                **options,
            )
            proof = repair.certificate
            assert proof is not None and 0 < proof.measured <= proof.bound
            residual = repair.evidence["residual_gradient_norm"]["after"]
            assert proof.measured == pytest.approx(residual, rel=1e-9, abs=1e-15)
            # The bound's first part by plain autograd: grad J'(theta) + H' u, at the last step's beginning.
            if len(repair.evidence["steps"]) == 1:
                assert proof.solved == pytest.approx(linear_residual(model, repair, task, data), rel=1e-6)


def linear_residual(model, repair, task, data) -> float:
    w = torch.ones(40, dtype=torch.float64)
    w[[1, 2]], w[5] = 0, 0.5
    names = [name for name, _ in model.named_parameters()]
    start = [p.detach() for p in model.parameters()]
    u = [a.detach() - b for a, b in zip(repair.model.parameters(), start)]

    def objective(*parameters):
        class Moved(nn.Module):
            def forward(self, inputs):
                return torch.func.functional_call(model, dict(zip(names, parameters)), (inputs,))

        losses = task.train_loss(Moved(), data)
        return (w * losses).sum() / w.sum() + 0.01 * sum(p.square().sum() for p in parameters)

    leaves = [p.clone().requires_grad_(True) for p in start]
    gradients = torch.autograd.grad(objective(*leaves), leaves)
    product = torch.autograd.functional.hvp(objective, tuple(start), tuple(u))[1]
    return math.sqrt(sum(float((g + h).square().sum()) for g, h in zip(gradients, product)))


def test_regression_bends_nothing_and_networks_have_no_certificate():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    data = (x, x[:, :1] + torch.randn(20, 1, generator=generator))
    repair = uw.unlearn(nn.Linear(3, 1).double(), uw.Regression(), data, [4], l2=0.1, progress=False)
    assert repair.certificate.bent == 0
    deep = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    assert uw.unlearn(deep, uw.Regression(), data, [4], l2=0.1, progress=False).certificate is None
    # ... but its last layer, of features that stay, has one.
    assert uw.unlearn(
        deep, uw.Regression(), data, [4], l2=0.1, method="last_layer", progress=False
    ).certificate


@pytest.mark.parametrize("epsilon", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("delta", [1e-6, 1e-3, 0.1])
def test_the_noise_is_enough_by_the_exact_law_of_the_gaussian_mechanism(epsilon, delta):
    """By "Improving the Gaussian Mechanism for Differential Privacy" (arXiv 1805.06530), theorem 8."""
    b = 3e-4
    proof = Certificate(b / 50, 0.0, 0.0, b / 50, LOGISTIC, 50.0)
    sigma = proof.noise_scale(epsilon, delta)
    shift = b / sigma
    exact = norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift)
    assert exact <= delta
    assert proof.summary()["noise_scale"]["sigma"] == proof.noise_scale()


def test_no_noise_for_what_is_no_guarantee():
    proof = Certificate(1e-3, 0.0, 0.0, 1e-3, LOGISTIC, 50.0)
    for epsilon, delta in ((0, 1e-5), (2.0, 1e-5), (1.0, 0.0), (1.0, 1.0)):
        with refused("epsilon="):
            proof.noise_scale(epsilon, delta)
