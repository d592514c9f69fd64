"""Models trained with changed labels are no truth about leaving examples out."""

import numpy as np
import pytest
from banks import N, bank, problem
from refusals import refused

import upweight as uw
from upweight.evaluate import (
    Outcomes,
    lds,
    leave_one_out,
    noise_ceiling,
    plan_removals,
    removal_curve,
    subsets,
)

FLIPPED = [{0: 1, 1: 1, 2: 1}, {3: 0, 4: 0, 5: 0}]


def with_and_without(chosen, queries=4):
    """Outcomes of an additive truth on these subsets; and with two more whose labels are changed, far off it."""
    truth = np.random.default_rng(0).standard_normal((queries, chosen.n))

    def of(these, shift):
        values = ((~these.masks).astype(float) @ truth.T)[:, None]
        return Outcomes(these.masks, values + shift[:, None, None], blocks=these.blocks)

    both = chosen + subsets.label_changes(chosen.n, FLIPPED)
    changed = np.arange(len(both)) >= len(chosen)
    more = of(both, 100.0 * changed)
    return (
        truth,
        of(chosen, np.zeros(len(chosen))),
        Outcomes(more.masks, more.values, blocks=both.blocks, relabelled=changed),
    )


def test_a_bank_says_which_subsets_change_labels(tmp_path):
    y = problem()[0][1]
    chosen = subsets.full(N) + subsets.label_changes(N, [{0: 1 - int(y[0])}]) + subsets.full(N)
    made = bank(tmp_path, subsets=chosen, seeds=1)
    made.run()
    assert made.outcomes("queries").relabelled.tolist() == [False, True, False]
    assert made.outcomes("queries").select(np.array([1])).relabelled.tolist() == [True]
    assert made.outcomes("queries").for_queries([0]).relabelled.tolist() == [False, True, False]


def test_leave_one_out_does_not_take_them_for_the_whole_set():
    truth, plain, more = with_and_without(subsets.leave_one_out(12))
    found = leave_one_out(truth, more, resamples=50)
    assert found.slope.value == pytest.approx(1) and found.intercept.value == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(found.truth, leave_one_out(truth, plain, resamples=50).truth)
    with refused("no model was trained on the whole set"):
        leave_one_out(truth, more.select(np.arange(1, len(more.masks))))


def test_lds_and_ceiling_are_those_without_them():
    truth, plain, more = with_and_without(subsets.half_subsets(12, 20))
    noisy = truth + np.random.default_rng(1).standard_normal(truth.shape)
    found, expected = lds(noisy, more, resamples=50), lds(noisy, plain, resamples=50)
    np.testing.assert_array_equal(found.per_query, expected.per_query)
    assert (found.low, found.high, found.subsets_dropped) == (expected.low, expected.high, 2)
    assert noise_ceiling(more) is None
    with refused("2 of 4 subsets have all their seeds .besides 2 with changed labels."):
        lds(truth, more.select(np.arange(18, 22)))


def test_a_datamodel_is_not_fitted_to_them():
    _, plain, more = with_and_without(subsets.half_subsets(12, 40))
    train, query = np.zeros((12, 1)), np.zeros((4, 1))
    task = uw.Task.from_functions(lambda model, batch: batch.sum(1))
    found, expected = (
        uw.Datamodel(None, task, outcomes=of, estimator="ridge").fit(train).attribute(query)
        for of in (more, plain)
    )
    np.testing.assert_array_equal(found.values, expected.values)
    assert found.info["subsets_dropped"] == 2


def test_a_removal_curve_refuses_them():
    truth = np.random.default_rng(0).standard_normal((2, 12))
    plan = plan_removals(truth, [2])
    values = ((~plan.subsets.masks).astype(float) @ truth.T)[:, None]
    relabelled = np.arange(len(values)) == 1
    with refused("1 subsets of the outcomes change labels"):
        removal_curve(plan, Outcomes(plan.subsets.masks, values, relabelled=relabelled))
