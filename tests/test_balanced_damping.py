"""The damping of Banzhaf influence: where removals and additions are of one size, as far as a sample can tell."""

import math

import numpy as np
import pytest
import torch
from banzhafs import ridge
from torch import nn

import upweight as uw
from upweight.curvature.balanced_damping import balanced_damping, log_ratio


@pytest.mark.parametrize("l2", [0.02, 0.2])
def test_the_damping_found_is_the_regulariser_that_was_not_told(l2):
    """Ridge regression: inside and outside matter alike, on average, at the l2 of the training and nowhere else."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 400, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(400, 1, generator=generator).double() / 20 + torch.randn(400, 1, generator=generator)
    half = list(range(0, 400, 2))
    method = uw.BanzhafInfluence(
        nn.Linear(400, 1, bias=False).double(),
        uw.Regression(),
        checkpoints=[{"weight": ridge(x, y, half, len(half) * l2)}],
        subsets=[half],
        progress=False,
    ).fit((x, y))
    info = method.attribute((x[:1], y[:1])).info
    assert 0.7 < info["damping"][0] / l2 < 1.4
    assert info["balance"][0][0] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_a_ratio_that_does_not_tell_dampings_apart_adds_none(seed):
    """Many examples of few parameters: removals and additions are of one size at any small damping."""
    torch.manual_seed(seed)
    x = torch.randn(1000, 5).double()
    y = x @ torch.randn(5, 1).double() + torch.randn(1000, 1).double()
    half = torch.randperm(1000)[:500].tolist()
    method = uw.BanzhafInfluence(
        nn.Linear(5, 1, bias=False).double(),
        uw.Regression(),
        checkpoints=[{"weight": ridge(x, y, half, 500 * 1e-3)}],
        subsets=[half],
        l2=1e-3,
        progress=False,
    ).fit((x, y))
    assert method.attribute((x[:1], y[:1])).info["damping"][0] < 1e-3


def test_a_damping_is_searched_for_within_bounds():
    asked = []

    def ratio(damping):
        asked.append(damping)
        return 0.3 * math.log(1e-3 / damping), 0.01

    damping, (found, error) = balanced_damping(ratio, 1.0, 1e-9)
    assert damping == pytest.approx(1e-3, rel=0.1)
    assert found == math.exp(ratio(damping)[0])
    assert error == pytest.approx(0.01, rel=0.1)
    assert len(asked) < 20
    with pytest.warns(UserWarning, match="0.5 times as large"):
        assert balanced_damping(lambda d: (math.log(0.5), 0.0), 1.0, 1e-3) == (1e-3, (0.5, 0.0))
    assert balanced_damping(lambda d: (0.1, 0.06), 1.0, 0.0)[0] == 0.0  # not significant
    with pytest.raises(uw.UpweightError, match="removals are larger"):
        balanced_damping(lambda d: (0.7, 0.01), 1.0, 1e-3)
    # Only the largest damping comes near: it is taken, and the ratio that is told is its own.
    far, (found, _) = balanced_damping(lambda d: (math.log(50) if d < 1e6 else 0.2, 0.01), 1.0, 1e-8)
    assert far >= 1e6
    assert found == pytest.approx(math.exp(0.2))
    for sizes in ([0.0, 0.0], [math.nan, 1.0]):
        with pytest.raises(uw.UpweightError, match="removals change other examples by"):
            log_ratio(torch.tensor(sizes), torch.ones(3))
    assert (
        balanced_damping(lambda d: (0.2, 0.01), 1.0, 0.0)[0] == 0.0
    )  # no damping changes it, and it is near 1


def test_sizes_are_compared_with_their_standard_error():
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.rand(2, 100, generator=generator).log().neg() for _ in range(400)]
    found = [log_ratio(2 * a, b) for a, b in drawn]
    assert np.mean([size for size, _ in found]) == pytest.approx(math.log(2), abs=0.02)
    assert np.mean([error for _, error in found]) == pytest.approx(
        np.std([size for size, _ in found]), rel=0.1
    )


def test_models_that_stopped_early_get_a_large_damping():
    """Gradient descent of 3 steps knows no curvature: whatever is near 1 only at the largest damping takes it."""
    torch.manual_seed(0)
    x = torch.randn(80, 60, dtype=torch.float64)
    y = x @ torch.randn(60, 1, dtype=torch.float64) + torch.randn(80, 1, dtype=torch.float64)

    def stopped(ids):
        w = torch.zeros(60, 1, dtype=torch.float64)
        for _ in range(3):
            w -= 0.05 * x[ids].T @ (x[ids] @ w - y[ids]) / len(ids)
        return w

    for seed in range(4):
        ids = torch.randperm(80, generator=torch.Generator().manual_seed(seed))[:40].sort().values.tolist()
        method = uw.BanzhafInfluence(
            nn.Linear(60, 1, bias=False).double(),
            uw.Regression(measurement="prediction"),
            checkpoints=[{"weight": stopped(ids).T}],
            subsets=[ids],
            progress=False,
        ).fit((x, y))
        scores = method.attribute((x[:10], y[:10])).values
        w = stopped(ids)
        real = torch.stack(
            [
                (x[:10] @ (w - stopped(sorted({*ids} ^ {i}))))[:, 0] * (1 if i in ids else -1)
                for i in range(80)
            ],
            1,
        )
        found, real = (v - v.mean(1, keepdim=True) for v in (scores, real))
        cosine = (found * real).sum(1) / (found.norm(dim=1) * real.norm(dim=1))
        assert float(cosine.min()) > 0.9
