"""Leave-one-out, removal curves, brittleness, label noise and stability against values known beforehand."""

import math

import numpy as np
import pytest
import torch
from banks import N, Trainer, network, problem
from refusals import refused
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

import upweight as uw
from upweight.errors import UpweightError
from upweight.evaluate import (
    Outcomes,
    brittleness,
    class_detection,
    label_noise,
    leave_one_out,
    model_randomisation,
    plan_removals,
    removal_curve,
    retrain_in,
    subsets,
    top_k_overlap,
)
from upweight.evaluate.label_noise import _statistics

generator = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def fresh_generator():
    global generator
    generator = np.random.default_rng(0)


# Leave-one-out


def left_out(truth, noise=0.0, seeds=5, positions=None):
    chosen = subsets.leave_one_out(truth.shape[1], positions)
    values = 3 + (~chosen.masks).astype(float) @ truth.T
    common = generator.standard_normal((1, seeds, len(truth)))  # what a seed does to all models alike
    values = values[:, None] + common + noise * generator.standard_normal((len(chosen), seeds, len(truth)))
    return Outcomes(chosen.masks, values)


def test_leave_one_out_finds_scale_offset_and_correlation():
    truth = generator.standard_normal((8, 30))
    result = leave_one_out((truth - 0.1) / 2, left_out(truth), resamples=100)
    assert result.slope.value == pytest.approx(2) and result.intercept.value == pytest.approx(0.1)
    assert result.pearson.value == pytest.approx(1) and result.spearman.value == pytest.approx(1)
    assert result.noise_sd == pytest.approx(0, abs=1e-12)
    assert leave_one_out(-truth, left_out(truth), resamples=20).pearson.value == pytest.approx(-1)


def test_leave_one_out_is_scipys_and_knows_its_noise():
    truth = generator.standard_normal((20, 60))
    outcomes = left_out(truth, noise=1.0, seeds=8, positions=range(10, 60))
    scores = truth + generator.standard_normal(truth.shape)
    result = leave_one_out(scores, outcomes, resamples=300)
    np.testing.assert_array_equal(result.examples, range(10, 60))
    pairs = list(zip(scores[:, 10:], result.truth, strict=True))
    assert result.pearson.value == pytest.approx(np.mean([stats.pearsonr(a, b).statistic for a, b in pairs]))
    assert result.spearman.value == pytest.approx(
        np.mean([stats.spearmanr(a, b).statistic for a, b in pairs])
    )
    line = stats.linregress(scores[:, 10:].reshape(-1), result.truth.reshape(-1))
    assert (result.slope.value, result.intercept.value) == pytest.approx((line.slope, line.intercept))
    # The model of the whole set is noisy too, but the same for all examples of a query.
    assert result.noise_sd == pytest.approx(math.sqrt(2), rel=0.15)
    assert result.slope.low < line.slope < result.slope.high
    width = result.slope.intervals["examples"][1] - result.slope.intervals["examples"][0]
    assert width == pytest.approx(2 * 1.96 * line.stderr, rel=0.4)
    assert len(result.to_pandas()) == 20 * 50


def test_leave_one_out_weights_stand_for_repeated_examples():
    truth = generator.standard_normal((4, 6))
    scores = truth + generator.standard_normal(truth.shape)
    weights = np.array([1, 2, 1, 3, 1, 1])
    result = leave_one_out(scores, left_out(truth), weights=weights, resamples=20)
    rows = np.repeat(np.arange(6), weights)
    expected = [stats.pearsonr(a[rows], b[rows]).statistic for a, b in zip(scores, result.truth, strict=True)]
    assert result.pearson.value == pytest.approx(np.mean(expected))


def test_leave_one_out_refuses_other_banks():
    truth = generator.standard_normal((2, 6))
    with refused("no model was trained on the whole set"):
        leave_one_out(truth, left_out(truth).select(np.arange(1, 7)))
    with refused("a subset leaves out 3 examples"):
        chosen = subsets.full(6) + subsets.half_subsets(6, 4)
        leave_one_out(truth, Outcomes(chosen.masks, np.zeros((5, 1, 2))))


def test_ridge_regression_left_out_for_real_has_slope_one(tmp_path):
    """A convex model, retrained to its optimum on the same sum of losses: correlation above .99, slope 1 to 15 %."""
    data = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=data)
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + torch.randn(
        40, dtype=torch.float64, generator=data
    )
    l2 = 0.1

    def train_fn(indices, seed):
        model = torch.nn.Linear(3, 1, bias=False).double()
        a, b = x[indices], y[indices]
        gram = a.T @ a / 40 + l2 * torch.eye(3, dtype=torch.float64)  # fixed-sum convention: 1/n, not 1/(n-1)
        model.weight.data = torch.linalg.solve(gram, a.T @ b / 40)[None]
        return model

    task, query = uw.Regression(measurement="prediction"), (x[:5], y[:5, None])
    bank = uw.RetrainingBank(
        tmp_path, train_fn, task, 40, subsets=subsets.leave_one_out(40), seeds=1, progress=False
    )
    bank.measure(query, "five")
    bank.run()
    model = train_fn(np.arange(40), 0)
    hessian = x.T @ x / 40 + l2 * torch.eye(3, dtype=torch.float64)
    residual = (model(x)[:, 0] - y)[:, None].detach()
    gradients = residual * x
    scores = -x[:5] @ torch.linalg.solve(hessian, gradients.T) / 40  # a higher prediction counts as better
    result = leave_one_out(scores.numpy(), bank.outcomes("five"), resamples=50)
    assert result.pearson.value > 0.99
    assert result.slope.value == pytest.approx(1, abs=0.15)


# Removal


def test_removal_curves_of_an_additive_truth():
    truth = generator.standard_normal((6, 40))
    classes = np.arange(40) % 4
    plan = plan_removals(truth, [2, 4, 8], classes=classes, opponents=True)
    assert plan.kinds == ["proponents", "random", "opponents"] and len(plan.subsets) == 1 + 3 * 3 * 6
    for q in range(6):
        removed = [~plan.subsets.masks[plan.rows[kind, 2, q]] for kind in range(3)]
        assert set(np.flatnonzero(removed[0])) == set(np.argsort(-truth[q])[:8])
        assert set(np.flatnonzero(removed[2])) == set(np.argsort(truth[q])[:8])
        np.testing.assert_array_equal(np.bincount(classes[removed[0]]), np.bincount(classes[removed[1]]))
    values = (~plan.subsets.masks).astype(float) @ truth.T
    values = values[:, None] + generator.standard_normal((1, 3, 6))
    curve = removal_curve(plan, Outcomes(plan.subsets.masks, values))
    np.testing.assert_allclose(curve.per_query, plan.predicted, atol=1e-12)
    assert curve.slope == pytest.approx(1)
    top = -np.sort(-truth, axis=1)
    np.testing.assert_allclose(
        [e.value for e in curve.changes[0]], [top[:, :k].sum(1).mean() for k in (2, 4, 8)]
    )
    a, b, c = (e.value for e in curve.changes[0])
    assert curve.areas["proponents"].value == pytest.approx(
        (2 * a / 2 + 2 * (a + b) / 2 + 4 * (b + c) / 2) / 8
    )
    assert all(e.low > 0 for e in curve.above_random)
    assert curve.changes[2][2].high < 0
    with refused("subsets=plan.subsets"):
        removal_curve(plan, Outcomes(plan.subsets.masks[1:], values[1:]))
    with refused("leave something to train on"):
        plan_removals(truth, [40])


def test_removals_of_other_methods_stand_beside():
    truth, weak = generator.standard_normal((2, 5, 30))
    plan = plan_removals(truth, [3, 6], baselines={"weak": weak, "the same": truth})
    assert plan.kinds == ["proponents", "random", "weak", "the same"]
    for q in range(5):
        removed = ~plan.subsets.masks[plan.rows[2, 1, q]]
        assert set(np.flatnonzero(removed)) == set(np.argsort(-weak[q])[:6])
        assert plan.predicted[2, 1, q] == pytest.approx(np.sort(weak[q])[-6:].sum())
    np.testing.assert_array_equal(plan.predicted[3], plan.predicted[0])
    values = (~plan.subsets.masks).astype(float) @ truth.T
    curve = removal_curve(plan, Outcomes(plan.subsets.masks, values[:, None]))
    assert curve.areas["proponents"].value == curve.areas["the same"].value > curve.areas["weak"].value
    assert curve.slope == pytest.approx(1)
    with refused(r"the baseline 'weak' has scores \[5, 29\], expected \[5, 30\]"):
        plan_removals(truth, [3], baselines={"weak": weak[:, 1:]})
    with refused("the baseline's name 'random' is taken"):
        plan_removals(truth, [3], baselines={"random": weak})


def test_brittleness_finds_the_smallest_number_by_bisection():
    n, needed = 50, np.array([1, 2, 7, 16, 17, 3])
    scores = np.stack([np.roll(np.arange(n, 0, -1.0), 5 * q) for q in range(6)])
    calls = []

    def retrain(
        chosen,
    ):  # query q is wrong once `needed[q]` of its first proponents are gone; query 5 always, in one seed
        calls.append(len(chosen))
        gone = np.stack([(~chosen.masks)[:, np.argsort(-scores[q])[: needed[q]]].all(1) for q in range(6)], 1)
        wrong = np.repeat(gone[:, None], 3, axis=1)
        wrong[:, 0] ^= chosen.masks.all(1)[:, None] & (np.arange(6) == 5)
        wrong[1:, 1] = False  # a minority of seeds that never flips
        return wrong

    result = brittleness(scores, retrain, largest=16)
    np.testing.assert_array_equal(result.smallest, [1, 2, 7, 16, math.inf, math.nan])
    assert result.judged == 5 and result.flipped(7).value == 3 / 5 and result.flipped(16).value == 4 / 5
    with pytest.raises(UpweightError, match="between 0 and 1"):
        result.flipped(7, level=1.5)
    # Wilson's interval of 3 of 5, from its formula: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n).
    assert (result.flipped(7).low, result.flipped(7).high) == pytest.approx((0.2307, 0.8824), abs=1e-4)
    assert result.trained <= 1 + 5 + 4 * 4 and calls == sorted(calls)


def test_brittleness_with_real_retraining_resumes(tmp_path):
    log, (train, query) = tmp_path / "log", problem()
    model = Trainer()(np.arange(N), 0)
    scores = torch.stack(
        [(train[1] == label).float() * (train[0] @ x) for x, label in zip(*query, strict=True)]
    )
    wrong = uw.Classification(
        measurement=lambda model, batch: (model(batch[0]).argmax(1) != batch[1]).float()
    )
    results, trained = [], []
    for _ in range(2):
        retrain = retrain_in(tmp_path / "bank", Trainer(log), wrong, N, query, seeds=3, progress=False)
        results.append(brittleness(scores.numpy(), retrain, largest=8))
        trained.append(len(log.read_text().split()))
    # Two more models ask whether train_fn heeds its indices; the second time everything was there already.
    assert trained == [3 * results[0].trained + 2] * 2
    np.testing.assert_array_equal(results[0].smallest, results[1].smallest)
    for q, k in enumerate(results[0].smallest):
        if np.isfinite(k):
            kept = np.setdiff1d(np.arange(N), scores[q].argsort(descending=True)[: int(k)].numpy())
            models = [Trainer()(kept, seed) for seed in range(3)]
            assert sum(int(m(query[0][q]).argmax()) != int(query[1][q]) for m in models) >= 2
    assert isinstance(model, type(network()))


# Label noise


def test_golden_values_of_label_noise():
    values, noisy = -np.arange(100.0), np.zeros(100, dtype=bool)
    noisy[:10] = True
    perfect = label_noise(values, noisy, resamples=100)
    assert perfect.auroc.value == 1.0 and perfect.average_precision.value == pytest.approx(1)
    assert perfect.area == pytest.approx(0.9495)
    assert perfect.recall[10].value == 1.0 and perfect.auroc.low == perfect.auroc.high == 1.0
    assert label_noise(-values, noisy, resamples=20).auroc.value == 0.0
    at_80 = label_noise(-np.arange(100.0), (np.arange(100) >= 80) & (np.arange(100) < 90), resamples=20)
    assert at_80.auroc.value == pytest.approx(1 / 9) and 1 - at_80.auroc.value == pytest.approx(8 / 9)


def test_resampled_label_noise_is_sklearns_with_ties():
    values = generator.integers(0, 8, 60).astype(float)
    noisy = generator.random(60) < 0.1 + 0.05 * values
    counts = generator.multinomial(60, np.full(60, 1 / 60), size=6).astype(float)
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(values[order]) != 0, True))
    ours = _statistics(counts[:, order], noisy[order], ends, [1.0])
    for row, weight in zip(ours, counts, strict=True):
        assert row[0] == pytest.approx(roc_auc_score(noisy, values, sample_weight=weight))
        assert row[1] == pytest.approx(average_precision_score(noisy, values, sample_weight=weight))
        assert row[2] == pytest.approx(1)


def test_scores_that_say_nothing_find_what_chance_finds():
    noisy = np.arange(200) % 10 == 0
    result = label_noise(np.ones(200), noisy, resamples=50)
    assert result.auroc.value == 0.5
    np.testing.assert_allclose(result.found, np.arange(1, 201) / 10)
    assert result.recall[20].value == pytest.approx(0.1)


def test_label_noise_intervals_and_forms():
    noisy = generator.random(500) < 0.1
    values = noisy + generator.standard_normal(500)
    result = label_noise(uw.SelfInfluence(torch.from_numpy(values), range(500)), torch.from_numpy(noisy))
    # Hanley and McNeil's standard error of an AUROC.
    a, m, k = result.auroc.value, noisy.sum(), (~noisy).sum()
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt((a * (1 - a) + (m - 1) * (q1 - a * a) + (k - 1) * (q2 - a * a)) / (m * k))
    assert result.auroc.high - result.auroc.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert "recall@" in str(result) and len(result.to_pandas()) == 500
    with refused("nothing to tell apart"):
        label_noise(values, np.zeros(500, dtype=bool))
    with refused("one number and one bool"):
        label_noise(values[1:], noisy)
    with refused("a NaN has no rank"):
        label_noise(values * np.nan, noisy)


# Stability


def test_overlap_classes_and_randomisation():
    base = generator.standard_normal((200, 50))
    same = top_k_overlap([base, base, base], k=5)
    assert same.value == 1.0 and same.chance == 0.1
    other = top_k_overlap([generator.standard_normal((200, 50)) for _ in range(3)], k=5)
    assert other.mean.low < 0.1 < other.mean.high
    classes, asked = np.arange(50) % 5, np.arange(200) % 5
    random = class_detection(base, asked, classes, k=5)
    assert random.chance == pytest.approx(0.2)
    assert random.value == pytest.approx(0.2, abs=0.04)  # three standard errors
    assert class_detection(base + 10 * (asked[:, None] == classes), asked, classes, k=5).value == 1.0
    check = model_randomisation(base, generator.standard_normal((200, 50)))
    assert check.mean.low < 0 < check.mean.high and not check.higher_is_better
    with refused("at least two tables"):
        top_k_overlap([base])
    with refused("for scores"):
        class_detection(base, asked, asked)


def test_every_result_plots():
    pytest.importorskip("matplotlib")
    truth = generator.standard_normal((3, 12))
    plan = plan_removals(truth, [1, 2])
    values = ((~plan.subsets.masks).astype(float) @ truth.T)[:, None]
    results = [
        leave_one_out(truth, left_out(truth), resamples=10),
        removal_curve(plan, Outcomes(plan.subsets.masks, values)),
        brittleness(truth, lambda chosen: np.zeros((len(chosen), 1, 3), dtype=bool), 2),
        label_noise(truth[0], np.arange(12) < 3, resamples=10),
        top_k_overlap([truth, truth], 2),
    ]
    for result in results:
        assert result.plot().get_xlabel()
        assert len(result.to_pandas()) and str(result)
