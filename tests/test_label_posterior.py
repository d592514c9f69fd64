"""Posteriors and thresholds: exact where there is a formula, and honest in simulations with known flips.

Simulations have fixed seeds. What they may miss is stated: the share of wrong labels among the flagged may fall short
of the wanted precision by three standard errors of a proportion, and by a bias of `BIAS` besides.
"""

import numpy as np
import pytest
from scipy.stats import false_discovery_control, norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from upweight.repair import class_posterior as by_class
from upweight.repair.class_posterior import class_posterior
from upweight.repair.evidence import folds
from upweight.repair.posterior import residual_posterior
from upweight.repair.thresholds import discoveries, expected_precision_cut, pooled_posterior, tail

BIAS = 0.05


def noisy(n, classes, spread, noise, seed, trusted=400):
    """Out-of-fold probabilities of blobs with uniform flips; (p, given, wrong, reference, true)."""
    generator = np.random.default_rng(seed)
    centres = 3 * generator.normal(size=(classes, 5))
    true = generator.integers(0, classes, n + trusted)
    x = centres[true] + spread * generator.normal(size=(n + trusted, 5))
    given = true[:n].copy()
    flips = generator.random(n) < noise
    given[flips] = (given[flips] + generator.integers(1, classes, flips.sum())) % classes
    p, held_out = np.zeros((n, classes)), []
    for learned, rest in folds(given, 3, 0):
        model = LinearDiscriminantAnalysis().fit(x[learned], given[learned])
        p[rest] = model.predict_proba(x[rest])
        held_out.append(model.predict_proba(x[n:]))
    return p, given, flips, (np.concatenate(held_out), np.tile(true[n:], 3)), true[:n]


def kept_promise(flags, wrong, precision):
    k = int(flags.sum())
    return wrong[flags].mean() >= precision - BIAS - 3 * np.sqrt(precision * (1 - precision) / k)


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("noise", [0.1, 0.2])
@pytest.mark.parametrize("precision", [0.7, 0.9])
def test_the_wanted_precision_is_kept(trusted, noise, precision):
    for classes, seed in ((4, 0), (4, 1), (10, 2), (10, 3)):
        p, given, wrong, reference, true = noisy(800, classes, 1.3, noise, seed)
        found = class_posterior(p, given, reference if trusted else None)
        flags = expected_precision_cut(1 - p[np.arange(len(p)), given], found.wrong, precision)
        assert kept_promise(flags, wrong, precision)
        assert flags[wrong].mean() > (0.5 if trusted else 0.25)  # and it is no empty promise
        assert (found.suggested[flags & wrong] == true[flags & wrong]).mean() > 0.8
        right = found.suggested == true
        assert right[flags].mean() > found.probability[flags].mean() - 0.1  # no more is promised than is kept


@pytest.mark.parametrize("noise", [0.0, 0.05, 0.2, 0.4])
def test_trusted_labels_tell_the_noise_rate(noise):
    for seed, spread in ((0, 1.3), (1, 3.0)):
        p, given, wrong, reference, _ = noisy(2000, 4, spread, noise, seed)
        found = class_posterior(p, given, reference)
        assert abs(found.info["noise_rate"] - wrong.mean()) < 0.04
        assert "validation" in found.info["calibration"]


def test_clean_labels_are_not_flagged():
    for seed in range(4):
        p, given, *_ = noisy(800, 4, 1.3, 0.0, seed)
        flags = expected_precision_cut(1 - p[np.arange(len(p)), given], class_posterior(p, given).wrong, 0.8)
        assert flags.sum() <= 3


def test_without_trusted_labels_a_weak_model_or_much_noise_flags_nothing_and_says_so():
    for spread, noise in ((6.0, 0.0), (6.0, 0.1), (1.3, 0.45)):
        p, given, *_ = noisy(2000, 10, spread, noise, 0)
        found = class_posterior(p, given)
        assert "validation data would tell them apart" in found.info["withheld"] and not found.wrong.any()


def test_deconvolution_undoes_known_noise():
    generator = np.random.default_rng(0)
    P = generator.dirichlet(np.full(3, 0.3), 200)
    T = np.array([[0.8, 0.2, 0.0], [0.05, 0.9, 0.05], [0.1, 0.0, 0.9]])
    found = by_class._deconvolved(P @ T, T)
    assert np.abs(found @ T - P @ T).max() < 0.02  # the likelihood's own fixed point
    assert np.abs(found - P).mean() < 0.02
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)


def test_known_probabilities_give_back_the_noise_matrix():
    generator = np.random.default_rng(0)
    n, T = 30_000, np.array([[0.8, 0.15, 0.05], [0.0, 0.95, 0.05], [0.3, 0.0, 0.7]])
    P = generator.dirichlet(np.full(3, 0.2), n)
    draw = lambda chances: (generator.random(n)[:, None] > chances.cumsum(1)).sum(1)  # noqa: E731
    found = by_class._explaining_noise(P, draw(T[draw(P)]))
    # Standard errors of a proportion of 10,000 are .005; the imagined examples add up to .003 more.
    assert np.abs(found - T).max() < 0.025


def test_calibration_is_the_likeliest():
    """The slope and the offsets that made the labels come back from many of them."""
    generator = np.random.default_rng(0)
    logs, offsets = generator.normal(size=(20_000, 3)), np.array([0.5, -0.5, 0.0])
    chances = by_class._softmax(1.7 * logs + offsets)
    true = (generator.random(len(logs))[:, None] > chances.cumsum(1)).sum(1)
    slope, found = by_class._calibration(logs, true)
    assert abs(slope - 1.7) < 0.06 and np.abs(found - offsets).max() < 0.06


def test_one_class_and_empty_classes():
    found = class_posterior(np.ones((20, 1)), np.zeros(20, int))
    assert not found.wrong.any() and not found.suggested.any()
    p = np.tile([0.9, 0.05, 0.05], (30, 1))  # nobody is, or is predicted to be, of the last two classes
    found = class_posterior(p, np.zeros(30, int))
    assert (found.wrong < 0.01).all() and not found.suggested.any()


@pytest.mark.parametrize("precision", [0.3, 0.6])
def test_the_cut_by_brute_force(precision):
    generator = np.random.default_rng(0)
    for _ in range(50):
        wrong, suspicion = generator.random(12), generator.integers(0, 6, 12).astype(float)
        pooled = pooled_posterior(suspicion, wrong)
        allowed = [np.zeros(12, bool)]
        for value in np.unique(suspicion)[::-1]:
            flags = suspicion >= value
            if wrong[flags].mean() >= precision and pooled[flags].min() >= min(precision, 0.5):
                allowed.append(flags)
        assert (expected_precision_cut(suspicion, wrong, precision) == max(allowed, key=np.sum)).all()


def test_the_pooled_posterior_never_falls_and_keeps_the_mean():
    generator = np.random.default_rng(1)
    suspicion, wrong = generator.normal(size=200), generator.random(200)
    pooled = pooled_posterior(suspicion, wrong)[np.argsort(suspicion)]
    assert (np.diff(pooled) >= 0).all() and abs(pooled.mean() - wrong.mean()) < 1e-12


def test_discoveries_are_benjamini_and_hochberg():
    generator = np.random.default_rng(0)
    for _ in range(20):
        chances = np.append(generator.random(40), generator.random(8) * 1e-3)
        np.testing.assert_array_equal(discoveries(chances, 0.8), false_discovery_control(chances) <= 0.2)


def test_the_bulk_is_no_discovery_and_planted_values_are():
    generator = np.random.default_rng(0)
    false = 0
    for _ in range(50):
        values = 5 + 3 * generator.normal(size=500)
        false += bool(discoveries(tail(values), 0.8)[0:].any())
        planted = np.append(values, 5 + 3 * np.array([7.0, 8.0]))
        assert discoveries(tail(planted), 0.8)[-2:].all()
    # Under the null a family has any discovery with a chance of at most .2, a little more with an estimated spread.
    assert false <= 20
    standard = norm.ppf((np.arange(2001) + 0.5) / 2001)
    np.testing.assert_allclose(tail(standard), norm.sf(standard), atol=2e-3)


@pytest.mark.parametrize("values", [np.ones(50), np.arange(3.0), np.append(np.zeros(60), 1.0)])
def test_no_spread_or_too_few_have_no_tail(values):
    assert (tail(values) == 0.5).all()


def test_residuals():
    generator = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.1):
        wrong = generator.random(2000) < share
        residuals = np.where(wrong, 10, 1) * generator.normal(size=2000) * 1e-4
        found = residual_posterior(residuals, np.zeros(2000))
        assert abs(found.info["noise_rate"] - share) < 0.02
        flags = expected_precision_cut(np.abs(residuals), found.wrong, 0.8)
        assert flags.sum() <= 2 if not share else kept_promise(flags, wrong, 0.8)
    for few in (np.zeros(40), np.array([1.0]), np.array([0.0, 0.0, 50.0])):
        assert not residual_posterior(few, few).wrong.any()
