"""LDS: golden values, the noise ceiling, and intervals that cover."""

import math

import numpy as np
import pytest
import torch
from banks import simulated
from refusals import refused
from scipy import stats

from upweight.evaluate import Outcomes, lds, lds_difference, noise_ceiling, subsets
from upweight.evaluate.bootstrap import interval
from upweight.evaluate.ceiling import seeds_for, spearman_brown
from upweight.evaluate.ranks import spearman, weighted_ranks
from upweight.scores import Scores

SCORES = np.array([[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.3, 0.4]])
MASKS = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0]], dtype=bool)
OUTPUTS = np.array([[0.3, 0.3], [0.4, 0.4], [0.5, 0.3]])  # [subset, query]


def test_golden_values_in_loss_orientation():
    """dattri's test: sums over included examples give 1 and .8660254; ours, against a loss, are their negatives."""
    as_loss = lds(SCORES, Outcomes(MASKS, OUTPUTS[:, None]))
    np.testing.assert_allclose(as_loss.per_query, [-1.0, -0.8660254], atol=1e-7)
    as_margin = lds(SCORES, Outcomes(MASKS, -OUTPUTS[:, None]))
    np.testing.assert_allclose(as_margin.per_query, [1.0, 0.8660254], atol=1e-7)
    assert as_margin.value == pytest.approx((1 + math.sqrt(0.75)) / 2)


def test_ranks_and_their_correlation_are_scipys_also_in_a_resample():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 6, (30, 4)).astype(float)  # many ties
    y = generator.standard_normal((30, 4)).round(1)
    expected = [stats.spearmanr(x[:, c], y[:, c]).statistic for c in range(4)]
    np.testing.assert_allclose(spearman(x, y), expected, atol=1e-12)
    counts = generator.multinomial(30, np.full(30, 1 / 30), size=5)
    built = [np.repeat(np.arange(30), row) for row in counts]
    expected = [[stats.spearmanr(x[i, c], y[i, c]).statistic for c in range(4)] for i in built]
    np.testing.assert_allclose(spearman(x, y, counts.astype(float)), expected, atol=1e-12)
    np.testing.assert_allclose(weighted_ranks(x[:, 0], np.ones((1, 30)))[0] + 0.5, stats.rankdata(x[:, 0]))


def test_spearman_brown_and_the_seeds_it_asks_for():
    assert spearman_brown(0.75, 5) == pytest.approx(0.9375)
    assert [seeds_for(rho) for rho in (0.75, 0.5, 0.3)] == [4, 10, 22]
    assert seeds_for(0.0) == math.inf and seeds_for(1.0) == 1
    for rho in (0.2, 0.6):
        needed = seeds_for(rho, 0.9)
        assert spearman_brown(rho, needed) >= 0.81 > spearman_brown(rho, needed - 1)


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_the_linear_truth_gets_the_ceiling(noise):
    truth, outcomes = simulated(np.random.default_rng(1), queries=200, count=100, seeds=4, noise=noise)
    result = lds(truth, outcomes, resamples=200)
    assert result.ceiling is not None
    # The ceiling is Pearson's formula with Spearman's correlations: right to about .01.
    assert result.value == pytest.approx(result.ceiling.value, abs=0.02)
    rho = 1 / (1 + noise**2)
    assert result.ceiling.reliability.value == pytest.approx(6 / math.pi * math.asin(rho / 2), abs=0.02)
    one = math.sqrt(rho * spearman_brown(rho, 3))
    assert result.ceiling.one_against_others == pytest.approx(6 / math.pi * math.asin(one / 2), abs=0.02)
    assert result.corrected == pytest.approx(1, abs=0.03)
    assert result.ceiling.low < result.ceiling.value < result.ceiling.high


def test_noiseless_truth_gets_one_and_negated_scores_the_negative():
    truth, outcomes = simulated(np.random.default_rng(2), noise=0.0)
    result, negated = lds(truth, outcomes, resamples=50), lds(-truth, outcomes, resamples=50)
    assert result.value == pytest.approx(1) and result.ceiling.value == pytest.approx(1)
    np.testing.assert_allclose(negated.per_query, -result.per_query)


def test_intervals_of_tiny_banks_end_where_a_correlation_must():
    truth, outcomes = simulated(np.random.default_rng(7), queries=3, count=5, noise=2.0)
    worse = -truth + np.random.default_rng(8).standard_normal(truth.shape)
    for result in (lds(truth, outcomes, resamples=100), lds(worse, outcomes, resamples=100)):
        assert -1 <= result.low <= result.value <= result.high <= 1
    assert lds(truth, outcomes, resamples=100).high == 1  # which it would pass by itself
    gain = lds_difference(truth, worse, outcomes, resamples=100)
    assert -2 <= gain.low <= gain.high <= 2


@pytest.mark.slow
def test_random_scores_get_zero_within_their_interval():
    generator = np.random.default_rng(3)
    _, outcomes = simulated(generator, queries=100)
    hits = 0
    for _ in range(20):
        result = lds(generator.standard_normal((100, 40)), outcomes, resamples=200)
        hits += result.low < 0 < result.high
    assert hits >= 17  # 3 misses of 20 at 5 % each: a false alarm in 1.6 % of seeds


def test_the_difference_of_two_methods_is_surer_than_their_intervals():
    generator = np.random.default_rng(4)
    truth, outcomes = simulated(generator, noise=0.5, shared=1.0)
    worse = truth + 0.4 * generator.standard_normal(truth.shape)
    a, b = lds(truth, outcomes, resamples=500), lds(worse, outcomes, resamples=500)
    difference = lds_difference(truth, worse, outcomes, resamples=500)
    assert difference.value == pytest.approx(a.value - b.value)
    assert difference.low > 0
    assert difference.high - difference.low < a.high - a.low
    same = lds_difference(truth, truth, outcomes, resamples=50)
    assert same.value == same.low == same.high == 0


def test_queries_without_a_rank_correlation_are_counted_and_left_out():
    truth, outcomes = simulated(np.random.default_rng(5), queries=4)
    truth[1] = 0.1  # all sums equal but for rounding
    result = lds(truth, outcomes, resamples=50)
    assert result.undefined == 1 and math.isnan(result.per_query[1])
    assert result.value == pytest.approx(np.nanmean(result.per_query))
    assert "1 queries undefined" in str(result)


def test_a_subset_that_lacks_a_seed_is_left_out_not_averaged():
    truth, outcomes = simulated(np.random.default_rng(6))
    values = outcomes.values.copy()
    values[7, 1] = np.nan
    result = lds(truth, Outcomes(outcomes.masks, values), resamples=50)
    without = np.arange(60) != 7
    expected = lds(truth, Outcomes(outcomes.masks[without], outcomes.values[without]), resamples=50)
    assert result.subsets_dropped == 1 and result.subsets == 59
    np.testing.assert_array_equal(result.per_query, expected.per_query)


def test_one_seed_has_no_ceiling():
    truth, outcomes = simulated(np.random.default_rng(7), seeds=1)
    result = lds(truth, outcomes, resamples=50)
    assert result.ceiling is None and math.isnan(result.corrected)
    with refused("one seed cannot tell noise"):
        result.seeds_needed()


def test_more_subsets_shrink_the_interval_as_foretold():
    generator = np.random.default_rng(8)
    truth, outcomes = simulated(generator, queries=60, count=400, noise=0.2, shared=2.0)
    few = lds(truth, outcomes.select(np.arange(50)), resamples=1000)
    many = lds(truth, outcomes, resamples=1000)
    assert 200 < few.subsets_needed(many.high - many.low) < 800
    assert few.subsets_needed(few.high - few.low) == pytest.approx(50, abs=1)


def test_no_number_of_subsets_makes_up_for_few_queries():
    generator = np.random.default_rng(8)
    truth, outcomes = simulated(generator, queries=20, count=100, noise=0.1)
    quality = np.linspace(0.1, 3, 20)[:, None]
    result = lds(truth + quality * generator.standard_normal(truth.shape), outcomes, resamples=200)
    assert result.subsets_needed(0.01) == math.inf
    with refused("expected a positive width"):
        result.subsets_needed(0)


def test_paired_subsets_are_resampled_as_one():
    generator = np.random.default_rng(9)
    _, outcomes = simulated(generator, paired=True)
    from upweight.evaluate.ceiling import block_weights

    weights, blocks = block_weights(outcomes, 20, generator)
    assert blocks == 30
    np.testing.assert_array_equal(weights[:, ::2], weights[:, 1::2])


def test_refusals_and_ids():
    truth, outcomes = simulated(np.random.default_rng(10), queries=5)
    with refused("transposed"):
        lds(truth.T, outcomes)
    with refused("1 scores are not finite"):
        lds(_with_nan(truth), outcomes)
    with refused("other queries than the bank measured"):
        lds(Scores(torch.from_numpy(truth), list("abcde"), range(40)), outcomes)
    assert lds(Scores(torch.from_numpy(truth), range(5), range(40)), outcomes, resamples=20).value > 0
    with refused("0 of 60 subsets have all their seeds"):
        lds(truth, Outcomes(outcomes.masks, outcomes.values * np.nan))
    with refused("a single seed still has its axis"):
        Outcomes(outcomes.masks, outcomes.means)


def _with_nan(values):
    values = values.copy()
    values[0, 0] = np.nan
    return values


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(0).standard_normal(12)
    counts = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), size=200_000)
    low, high = interval(values.mean(), counts @ values / 12, 12, 0.95)
    expected = stats.t.interval(0.95, 11, values.mean(), stats.sem(values))
    np.testing.assert_allclose([low, high], expected, atol=0.06)


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "queries"), [(0.0, 40), (1.0, 40)], ids=["own noise", "shared noise"])
def test_intervals_cover_in_a_simulation(shared, queries):
    """95 +- 3 % of 400 banks: a correct interval misses that band with probability .6 %."""
    expected, covered, banks = [], [], 400

    def draw(seed):
        generator = np.random.default_rng([seed, int(shared)])
        truth, outcomes = simulated(generator, 40, queries, 50, 2, noise=1.0, shared=shared)
        # Queries differ in how well the scores describe them.
        quality = generator.uniform(0.2, 2.0, (queries, 1))
        return truth + quality * generator.standard_normal(truth.shape), outcomes

    for seed in range(4000, 5500):
        scores, outcomes = draw(seed)
        expected.append(np.nanmean(spearman((~outcomes.masks).astype(float) @ scores.T, outcomes.means)))
    target = np.mean(expected)
    for seed in range(banks):
        scores, outcomes = draw(seed)
        result = lds(scores, outcomes, resamples=300, seed=seed, ceiling=_ANY)
        covered.append(result.low <= target <= result.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.03)


def test_pairs_of_halves_are_complements_of_one_size():
    drawn = subsets.half_subsets(9, 6)
    assert drawn.masks.sum(1).tolist() == [4] * 6
    assert not (drawn.masks[::2] & drawn.masks[1::2]).any()
    np.testing.assert_array_equal(subsets.half_subsets(9, 4).masks, drawn.masks[:4])


_ANY = noise_ceiling(simulated(np.random.default_rng(0), queries=2, count=5)[1], resamples=2)


def test_plots_and_tables():
    truth, outcomes = simulated(np.random.default_rng(11), queries=5)
    result = lds(truth, outcomes, resamples=20)
    table = result.to_pandas()
    assert list(table.columns) == ["query_id", "lds"] and len(table) == 5
    pytest.importorskip("matplotlib")
    assert result.plot().get_xlabel() == "LDS of a query"
