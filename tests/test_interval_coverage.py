"""In simulations whose truth is known, intervals of 95 % hold it 92 to 98 times of 100, as `test_lds` shows for LDS.

The truth is the mean of the statistic over many other simulations: what an endless one would find, or close to it.
"""

import numpy as np
import pytest
from banks import simulated
from sklearn.metrics import average_precision_score, roc_auc_score

from upweight.evaluate import (
    NoiseCeiling,
    Outcomes,
    label_noise,
    lds_difference,
    leave_one_out,
    noise_ceiling,
    subsets,
)
from upweight.evaluate.bootstrap import interaction_once
from upweight.evaluate.ceiling import spearman_brown

TRIALS = 200


def share_covered(estimates, truth: float) -> float:
    """How often an interval holds the truth."""
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


def detector(trial: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 500 examples, and which of them are wrong: a tenth, which score higher by one standard deviation."""
    generator = np.random.default_rng([1, trial])
    wrong = generator.random(500) < 0.1
    return wrong + generator.standard_normal(500), wrong


@pytest.mark.parametrize(
    ("name", "statistic"), [("auroc", roc_auc_score), ("average_precision", average_precision_score)]
)
def test_of_label_noise(name, statistic):
    others = (detector(TRIALS + k) for k in range(1000))
    truth = float(np.mean([statistic(wrong, scores) for scores, wrong in others]))
    found = [label_noise(*detector(k), resamples=200, seed=k) for k in range(TRIALS)]
    assert 0.92 <= share_covered([getattr(one, name) for one in found], truth) <= 0.98


def left_out(trial: int) -> tuple[np.ndarray, Outcomes]:
    """Scores that tell some queries' truth better than others', and noisy measurements without each of 60 examples."""
    generator = np.random.default_rng([2, trial])
    truth, chosen = generator.standard_normal((20, 60)), subsets.leave_one_out(60)
    exact = 3 + (~chosen.masks).astype(float) @ truth.T
    measured = exact[:, None] + generator.standard_normal((len(chosen), 4, 20))
    blur = generator.uniform(0.3, 2, (20, 1)) * generator.standard_normal(truth.shape)
    return truth + blur, Outcomes(chosen.masks, measured)


def test_of_leaving_one_out():
    others = [leave_one_out(*left_out(TRIALS + k), resamples=2) for k in range(200)]
    found = [leave_one_out(*left_out(k), resamples=200, seed=k) for k in range(TRIALS)]
    for name in ("pearson", "spearman", "slope", "intercept"):
        truth = float(np.mean([getattr(one, name).value for one in others]))
        assert 0.92 <= share_covered([getattr(one, name) for one in found], truth) <= 0.98, name


@pytest.mark.parametrize(("noise", "shared", "seeds"), [(0.5, 0.0, 3), (1.0, 1.0, 2)])
def test_of_the_noise_ceiling(noise, shared, seeds):
    def ceiling(trial: int) -> NoiseCeiling:
        generator = np.random.default_rng([4, trial])
        outcomes = simulated(generator, queries=15, noise=noise, shared=shared, seeds=seeds)[1]
        found = noise_ceiling(outcomes, seed=trial, resamples=100)
        assert found is not None
        return found

    _, many = simulated(
        np.random.default_rng(0), queries=200, count=4000, noise=noise, shared=shared, seeds=2
    )
    endless = noise_ceiling(many, resamples=2)
    assert endless is not None
    truth = endless.reliability.value
    found = [ceiling(k) for k in range(TRIALS)]
    assert 0.92 <= share_covered([one.reliability for one in found], truth) <= 0.98
    highest = spearman_brown(truth, seeds) ** 0.5
    assert 0.92 <= share_covered(found, highest) <= 0.98


def compared(trial: int):
    """Two methods' scores, of which one is noisier on every query, and a bank of the truth."""
    generator = np.random.default_rng([3, trial])
    truth, outcomes = simulated(generator, 40, 40, 50, 2, noise=1.0, shared=1.0)
    noise = generator.uniform(0.2, 2, (40, 1)) * generator.standard_normal(truth.shape)
    return truth + 0.3 * generator.standard_normal(truth.shape), truth + noise, outcomes


def test_of_the_difference_of_two_methods():
    truth = float(np.mean([lds_difference(*compared(TRIALS + k), resamples=2).value for k in range(200)]))
    found = [lds_difference(*compared(k), resamples=200, seed=k) for k in range(TRIALS)]
    assert 0.92 <= share_covered(found, truth) <= 0.98


def test_what_two_factors_share_is_counted_once():
    """Their joint resampling counts it three times: the variance is v_one + v_other less what both of them hold."""
    generator = np.random.default_rng(0)
    one, other = generator.standard_normal((2, 4000))
    both = 1.5 * (one + other) + generator.standard_normal(4000)
    once = interaction_once(one, other, both)
    assert once.mean() == pytest.approx(both.mean())
    assert once.var() == pytest.approx(
        max(one.var(), other.var(), 2 * (one.var() + other.var()) - both.var())
    )
    mild = one + other + 0.5 * generator.standard_normal(4000)
    assert interaction_once(one, other, mild).var() == pytest.approx(
        2 * (one.var() + other.var()) - mild.var()
    )
    lost = interaction_once(one, other, np.where(np.arange(4000) % 2, mild, np.nan))
    assert np.isnan(lost[0]) and np.isfinite(lost[1::2]).all()
    np.testing.assert_allclose(
        interaction_once(1e200 * one, 1e200 * other, 1e200 * mild) / 1e200, interaction_once(one, other, mild)
    )


def test_a_slope_uses_it():
    """Queries whose own slopes differ, and few examples: much of the joint variance is what both share."""
    found = leave_one_out(*left_out(0), resamples=400)
    widths = {name: high - low for name, (low, high) in found.slope.intervals.items()}
    assert max(widths["queries"], widths["examples"]) <= 1.1 * widths["both"]
    scores = left_out(0)[0]
    x, y = scores[:, :60], found.truth
    generator = np.random.default_rng(0)
    joint = []
    for _ in range(400):
        q, e = generator.integers(0, 20, 20), generator.integers(0, 60, 60)
        joint.append(np.polyfit(x[np.ix_(q, e)].ravel(), y[np.ix_(q, e)].ravel(), 1)[0])
    assert widths["both"] < 0.95 * (np.quantile(joint, 0.975) - np.quantile(joint, 0.025))
