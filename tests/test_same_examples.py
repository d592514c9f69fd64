"""What is compared is of the same queries, the same training examples and one unit; or it is refused."""

import numpy as np
import pytest
import torch
from banks import TASK, bank, problem, simulated
from refusals import refused

import upweight as uw
from upweight.evaluate import (
    Outcomes,
    lds,
    leave_one_out,
    model_randomisation,
    plan_removals,
    removal_curve,
    subsets,
    top_k_overlap,
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A bank whose queries have no ids, and what it measured."""
    made = bank(tmp_path_factory.mktemp("bank"), count=30, seeds=1)
    made.run()
    return made.outcomes("queries")


def scores_of(query):
    (x, y), model = problem()[0], torch.nn.Linear(3, 2)
    torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(0))
    return uw.Influence(model, TASK, curvature="identity", damping=1.0, progress=False).fit((x, y)), query


def test_scores_of_other_queries_are_refused_though_all_are_numbered(measured):
    method, (x, y) = scores_of(problem()[1])
    scores = method.attribute((x, y))
    assert measured.info["queries"] == scores.info["queries"]
    assert np.isfinite(lds(scores, measured, resamples=50).value)
    turned = method.attribute((x.flip(0), y.flip(0)))
    for compare in (lds, leave_one_out):
        with refused("other queries than the bank measured .fingerprint"):
            compare(turned, measured)
    assert np.isfinite(lds(turned.values, measured, resamples=50).value)
    half = method.attribute((x[::2], y[::2]))
    part = measured.for_queries([0, 2, 4])
    assert np.isfinite(lds(half.values, part, resamples=50).value) and "queries" not in part.info


def test_a_datamodel_knows_the_queries_that_were_measured(measured):
    (x, y), (train, _) = problem()[1], problem()
    method = uw.Datamodel(None, TASK, outcomes=measured, estimator="ridge").fit(train)
    every = method.attribute((x, y))
    with refused("2 queries without ids for outcomes of 6"):
        method.attribute((x[4:], y[4:]))
    torch.testing.assert_close(method.attribute((x[4:], y[4:]), ids=[4, 5]).values, every.values[4:])
    with refused("the queries are not those that the bank measured .fingerprint"):
        method.attribute((x.flip(0), y.flip(0)))


def named(values, query_ids, train_ids=None, unit="loss"):
    n = values.shape[1]
    return uw.Scores(torch.as_tensor(values), query_ids, range(n) if train_ids is None else train_ids, unit)


def test_a_removal_curve_is_of_the_queries_of_its_plan():
    truth = np.random.default_rng(0).standard_normal((3, 12))
    plan = plan_removals(named(truth, list("abc")), [1, 2])
    values = ((~plan.subsets.masks).astype(float) @ truth.T)[:, None]
    assert removal_curve(plan, Outcomes(plan.subsets.masks, values, list("abc"))).slope == pytest.approx(1)
    with refused("first difference: 'a' and 'c'"):
        removal_curve(plan, Outcomes(plan.subsets.masks, values, list("cba")))
    plain = plan_removals(truth, [1, 2])  # without ids there is nothing to compare
    assert removal_curve(plain, Outcomes(plan.subsets.masks, values, list("cba"))).slope


def test_a_removal_that_failed_takes_no_part_in_the_slope():
    truth = np.random.default_rng(0).standard_normal((3, 12))
    plan = plan_removals(truth, [1, 2])
    values = ((~plan.subsets.masks).astype(float) @ truth.T)[:, None]
    values[plan.rows[0, 1, 2]] = np.nan
    curve = removal_curve(plan, Outcomes(plan.subsets.masks, values))
    assert curve.slope == pytest.approx(1) and np.isnan(curve.per_query[0]).sum() == 1
    nothing = plan_removals(np.zeros((3, 12)), [1])
    values = np.zeros((len(nothing.subsets), 1, 3))
    assert np.isnan(removal_curve(nothing, Outcomes(nothing.subsets.masks, values)).slope)


def test_a_slope_is_of_one_unit():
    truth = np.random.default_rng(0).standard_normal((3, 12))
    masks = subsets.leave_one_out(12).masks
    outcomes = Outcomes(masks, ((~masks).astype(float) @ truth.T)[:, None], unit="nats")
    assert leave_one_out(named(truth, range(3), unit="nats"), outcomes, resamples=20).slope.value
    assert leave_one_out(named(truth, range(3), unit=None), outcomes, resamples=20).slope.value
    with refused("the scores are in 'log-odds' and the outcomes in 'nats'"):
        leave_one_out(named(truth, range(3), unit="log-odds"), outcomes)
    plan = plan_removals(named(truth, range(3), unit="log-odds"), [1])
    values = ((~plan.subsets.masks).astype(float) @ truth.T)[:, None]
    curve = removal_curve(plan, Outcomes(plan.subsets.masks, values, unit="nats"))
    with refused("the scores are in 'log-odds' and the changes in 'nats'"):
        _ = curve.slope
    ranked, against = simulated(np.random.default_rng(0), queries=3)
    assert lds(named(ranked, range(3), unit="log-odds"), against, resamples=20).value > 0


@pytest.mark.parametrize("by", ["queries", "train"])
def test_runs_are_compared_by_their_ids(by):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((4, 20))
    queries, train = list("abcd"), [f"x{i}" for i in range(20)]
    order = generator.permutation(4 if by == "queries" else 20)
    one = named(values, queries, train)
    if by == "queries":
        other = named(values[order], [queries[i] for i in order], train)
        strange = named(values, list("abce"), train)
    else:
        other = named(values[:, order], queries, [train[i] for i in order])
        strange = named(values, queries, [*train[1:], "y"])
    assert top_k_overlap([one, other], 3).value == 1 and model_randomisation(one, other).value == 1
    assert (
        top_k_overlap([values, other, one], 3).value < 1
    )  # a table without ids is in the order of the first ids
    for compare in (lambda a, b: top_k_overlap([a, b], 3), model_randomisation):
        with refused("the scores are of other (queries|training examples)"):
            compare(one, strange)
