"""Leave-one-out: figures that do not depend on the scale or the offset of the scores, and say what they leave out."""

import math

import numpy as np
import pytest
from refusals import refused

from upweight.evaluate import Outcomes, leave_one_out, subsets
from upweight.evaluate.bootstrap import estimate_mean


def left_out(truth):
    """Outcomes of an additive truth [query, train], and of the whole set."""
    masks = subsets.leave_one_out(truth.shape[1]).masks
    return Outcomes(masks, (3 + (~masks).astype(float) @ truth.T)[:, None])


def problem(queries=6, n=12):
    generator = np.random.default_rng(0)
    truth = generator.standard_normal((queries, n))
    return truth, truth + generator.standard_normal(truth.shape)


@pytest.mark.parametrize("scale", [1e-200, 1e-13, 1e-10, 1e10])
def test_the_correlation_does_not_depend_on_the_scale(scale):
    truth, scores = problem()
    expected = leave_one_out(scores, left_out(truth), resamples=50)
    found = leave_one_out(scores * scale, left_out(truth), resamples=50)
    assert found.pearson.value == pytest.approx(expected.pearson.value) and found.undefined == 0
    assert found.pearson.low == pytest.approx(expected.pearson.low)
    assert found.slope.value * scale == pytest.approx(expected.slope.value)
    assert found.intercept.value == pytest.approx(expected.intercept.value)


def test_one_query_of_small_scores_counts_as_much_as_the_others():
    truth, scores = problem()
    expected = leave_one_out(scores, left_out(truth), resamples=50)
    scores[2] *= 1e-13
    found = leave_one_out(scores, left_out(truth), resamples=50)
    np.testing.assert_allclose(found.per_query, expected.per_query)


def test_constant_scores_have_no_correlation_and_no_slope():
    truth, scores = problem()
    found = leave_one_out(np.full_like(truth, 0.1), left_out(truth), resamples=50)
    assert math.isnan(found.pearson.value) and found.undefined == 6 and "6 queries undefined" in str(found)
    assert math.isnan(found.slope.value) and math.isnan(found.intercept.value)
    scores[1] = 0.1
    found = leave_one_out(scores, left_out(truth), resamples=50)
    assert found.undefined == 1 and found.pearson.value == pytest.approx(np.nanmean(found.per_query))


def test_an_offset_of_the_scores_moves_the_intercept_alone():
    truth, scores = problem()
    expected = leave_one_out(scores, left_out(truth), resamples=50)
    found = leave_one_out(scores + 1e7, left_out(truth), resamples=50)
    assert found.slope.value == pytest.approx(expected.slope.value, rel=1e-7)
    assert found.slope.low == pytest.approx(expected.slope.low, rel=1e-6)
    assert found.intercept.value == pytest.approx(
        expected.intercept.value - 1e7 * expected.slope.value, rel=1e-7
    )


def test_a_query_with_a_missing_measurement_is_left_out_of_every_figure():
    truth, scores = problem()
    outcomes = left_out(truth)
    values = outcomes.values.copy()
    values[4, 0, 3] = np.nan
    others = np.arange(6) != 3
    found = leave_one_out(scores, Outcomes(outcomes.masks, values), resamples=50)
    expected = leave_one_out(scores[others], left_out(truth[others]), resamples=50)
    for name in ("pearson", "spearman", "slope", "intercept"):
        assert getattr(found, name).value == pytest.approx(getattr(expected, name).value)
    assert np.isfinite([found.slope.low, found.slope.high]).all() and found.undefined == 1
    values[np.arange(6), 0, np.arange(6)] = np.nan
    with refused("no query has all its measurements"):
        leave_one_out(scores, Outcomes(outcomes.masks, values))


def test_resamples_without_a_defined_query_are_counted_and_left_out():
    generator = np.random.default_rng(0)
    per_query = generator.standard_normal(10)
    resampled = per_query + generator.standard_normal((200, 10))
    expected = estimate_mean(per_query, resampled, 20, 0.95, np.random.default_rng(1))
    resampled[7] = np.nan
    found = estimate_mean(per_query, resampled, 20, 0.95, np.random.default_rng(1))
    assert found.undefined == 1 and expected.undefined == 0
    assert found.intervals["both"] == pytest.approx(expected.intervals["both"], abs=0.05)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.05)
    nothing = estimate_mean(per_query, np.full((200, 10), np.nan), 20, 0.95, np.random.default_rng(1))
    assert np.isnan(nothing.intervals["both"]).all() and nothing.undefined == 200
