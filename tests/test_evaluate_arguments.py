"""Arguments that evaluation cannot use are refused in one line; few subsets and one query are said to be few."""

import numpy as np
import pytest
import torch
from banks import simulated
from refusals import refused

import upweight as uw
from upweight.evaluate import (
    Outcomes,
    brittleness,
    class_detection,
    label_noise,
    lds,
    lds_difference,
    leave_one_out,
    noise_ceiling,
    plan_removals,
    removal_curve,
    subsets,
    top_k_overlap,
)

TRUTH, OUTCOMES = simulated(np.random.default_rng(0), queries=5, count=20)
NOISY = np.arange(20) < 3


def left_out(queries=3, n=8):
    truth = np.random.default_rng(0).standard_normal((queries, n))
    masks = subsets.leave_one_out(n).masks
    return truth, Outcomes(masks, ((~masks).astype(float) @ truth.T)[:, None])


def removed():
    truth, _ = left_out()
    plan = plan_removals(truth, [1])
    return plan, Outcomes(plan.subsets.masks, ((~plan.subsets.masks).astype(float) @ truth.T)[:, None])


COMPARISONS = {
    "lds": lambda **options: lds(TRUTH, OUTCOMES, **options),
    "lds_difference": lambda **options: lds_difference(TRUTH, -TRUTH, OUTCOMES, **options),
    "noise_ceiling": lambda **options: noise_ceiling(OUTCOMES, **options),
    "leave_one_out": lambda **options: leave_one_out(*left_out(), **options),
    "label_noise": lambda **options: label_noise(np.arange(20.0), NOISY, **options),
    "removal_curve": lambda **options: removal_curve(*removed(), **options),
}


@pytest.mark.parametrize("level", [95, 1.5, 0, -0.1, float("nan")])
@pytest.mark.parametrize("name", COMPARISONS)
def test_a_level_is_between_0_and_1(name, level):
    with refused("expected between 0 and 1"):
        COMPARISONS[name](level=level)


@pytest.mark.parametrize("resamples", [0, 1, 1.5])
@pytest.mark.parametrize("name", [name for name in COMPARISONS if name != "removal_curve"])
def test_resamples_are_several(name, resamples):
    with refused("expected a whole number from 2 up"):
        COMPARISONS[name](resamples=resamples)


def test_scores_may_need_gradients_and_be_of_any_precision():
    tensor = torch.from_numpy(TRUTH).requires_grad_()
    expected = lds(TRUTH, OUTCOMES, resamples=20).value
    assert lds(tensor, OUTCOMES, resamples=20).value == expected
    assert lds(tensor.bfloat16(), OUTCOMES, resamples=20).value == pytest.approx(expected, abs=0.05)
    assert plan_removals(tensor, [2]).predicted.shape == (2, 1, 5)


def never(chosen):
    return np.zeros((len(chosen), 1, 5), dtype=bool)


TABLES = {
    "lds": lambda scores: lds(scores, OUTCOMES),
    "plan_removals": lambda scores: plan_removals(scores, [1]),
    "brittleness": lambda scores: brittleness(scores, never, 2),
    "top_k_overlap": lambda scores: top_k_overlap([TRUTH, scores]),
}


@pytest.mark.parametrize("name", TABLES)
def test_scores_are_a_finite_table(name):
    with refused("expected .query, train."):
        TABLES[name](TRUTH[0])
    broken = TRUTH.copy()
    broken[2, 3] = np.nan
    with refused("1 scores are not finite"):
        TABLES[name](broken)
    with refused("scores is str, expected Scores or numbers"):
        TABLES[name]("ekfac")


def test_leave_one_out_weights_and_positions():
    truth, outcomes = left_out()
    with refused("weights have shape .3,., expected one for each of 8"):
        leave_one_out(truth, outcomes, weights=np.ones(3))
    with refused("positions=1, expected a list of them"):
        subsets.leave_one_out(8, 1)
    with refused("2 of 2 subsets have all their seeds.*or retrain on more subsets"):
        leave_one_out(truth, outcomes.select(np.arange(2)))
    with refused("1 examples were left out, expected at least 2"):
        leave_one_out(truth, outcomes.select(np.array([0, 0, 1])))


def test_label_noise_arguments():
    values = np.arange(20.0)
    with refused("suspicion is Scores"):
        label_noise(uw.Scores(torch.ones(2, 20), range(2), range(20)), NOISY)
    for inspect in ([0.1], [0, 500], [500], [0]):
        with refused("expected whole numbers from 1 to 20"):
            label_noise(values, NOISY, inspect=inspect)
    assert [*label_noise(values, NOISY, inspect=[np.int64(5), 5], resamples=20).recall] == [5]
    assert [*label_noise(values, ~NOISY, resamples=20).recall] == [17]  # not twice as many as there are


def test_classes_are_of_one_kind():
    with refused("query classes are int64 and train classes <U2"):
        class_detection(TRUTH, np.arange(5), [f"{i:02d}" for i in range(40)])
    names = np.array([str(i) for i in range(40)], dtype=object)
    assert class_detection(TRUTH, ["1"] * 5, names).chance == 1 / 40


def test_one_query_has_an_interval_over_subsets_and_it_is_said():
    result = lds(TRUTH[:1], OUTCOMES.for_queries([0]), resamples=50)
    assert (result.low, result.high) == result.score.intervals["subsets"]
    assert "over subsets only" in str(result) and result.subsets_needed(2 * (result.high - result.low)) == 5
    assert "only" not in str(lds(TRUTH, OUTCOMES, resamples=50))


def test_few_subsets_have_no_interval():
    few = OUTCOMES.select(np.arange(3))
    result = lds(TRUTH, few, resamples=50)
    assert np.isfinite(result.value) and np.isnan([result.low, result.high]).all()
    assert "(no interval)" in str(result)
    assert np.isnan(lds_difference(TRUTH, -TRUTH, few, resamples=50).low)
    assert np.isfinite(lds(TRUTH, OUTCOMES.select(np.arange(5)), resamples=50).low)
    for scores, outcomes in ((TRUTH, few), (np.ones_like(TRUTH), OUTCOMES)):
        with refused("has no interval over subsets"):
            lds(scores, outcomes, resamples=50).subsets_needed(0.1)
