"""Removing, changing and reweighting examples against really refitting, in float64.

scikit-learn's Ridge sums its losses: refitting without an example at the same alpha is the fixed-sum convention.
"""

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import nn

import upweight as uw
from upweight.attributors.functional import Functional
from upweight.integrations.sklearn import from_sklearn

ALPHA, TRAIN = 2.0, 60  # few examples: leverages up to 0.5
GROUP = list(range(3, 60, 4))


class Data:
    """Diabetes patients; `refit(weights)` is what training really does with other weights."""

    def __init__(self) -> None:
        X, y = load_diabetes(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(X))[: TRAIN + 20]
        X, y = X[order] * 20, (y[order] - 150) / 77
        self.X, self.y, self.Xq, self.yq = X[:TRAIN], y[:TRAIN], X[TRAIN:], y[TRAIN:]

    def refit(self, weights=None, *, alpha=ALPHA, X=None, y=None) -> Ridge:
        ridge = Ridge(alpha=alpha, solver="cholesky")
        return ridge.fit(self.X if X is None else X, self.y if y is None else y, sample_weight=weights)

    def query_loss(self, ridge: Ridge) -> np.ndarray:
        return (ridge.predict(self.Xq) - self.yq) ** 2 / 2


DATA = Data()
BEFORE = DATA.refit()


def fitted(measurement="loss", **options) -> uw.Influence:
    converted = from_sklearn(BEFORE, DATA.X, DATA.y, measurement=measurement)
    options = {"curvature": "ggn", "damping": 0.0, "solver": "direct"} | options
    return uw.Influence(converted.model, converted.task, l2=converted.l2, **options).fit(converted.train)


def query() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.as_tensor(DATA.Xq), torch.as_tensor(DATA.yq)


def kept(*removed: int) -> np.ndarray:
    weights = np.ones(TRAIN)
    weights[list(removed)] = 0
    return weights


def error(found, truth) -> float:
    found, truth = np.asarray(found), np.asarray(truth)
    return float(np.abs(found - truth).max() / np.abs(truth).max())


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_rescaled_influence_is_leave_one_out_exactly(curvature):
    """Parameters, predictions, and the query's loss with its own bend r x^T u + (x^T u)^2 / 2."""
    method = fitted(curvature=curvature)
    predictions = fitted("prediction", curvature=curvature, correction="rescaled").attribute(query())
    losses = fitted(curvature=curvature, correction="rescaled").attribute(query())
    largest = 0.0
    for i in range(0, TRAIN, 5):
        after = DATA.refit(kept(i))
        effect = method.removal([i], query())
        assert error(effect.steps["rescaled"]["weight"][0], after.coef_ - BEFORE.coef_) < 1e-10
        assert float(effect.steps["rescaled"]["bias"]) == pytest.approx(
            after.intercept_ - BEFORE.intercept_, rel=1e-8
        )
        moved = after.predict(DATA.Xq) - BEFORE.predict(DATA.Xq)
        assert error(-predictions.values[:, i], moved) < 1e-9  # a proponent's removal lowers the prediction
        real = DATA.query_loss(after) - DATA.query_loss(BEFORE)
        assert error(effect.effect("rescaled"), real) < 1e-9
        residual = BEFORE.predict(DATA.Xq) - DATA.yq
        assert error(effect.rescaled, residual * moved) < 1e-9
        assert error(effect.second_order["rescaled"], moved**2 / 2) < 1e-9
        assert error(losses.values[:, i], effect.rescaled) < 1e-10
        assert error(effect.newton, effect.rescaled) < 1e-10  # RIF is Newton for a group of one
        largest = max(largest, error(effect.first_order, effect.rescaled))
    assert largest > 0.1  # where first order errs


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_newton_removal_of_any_group_is_the_refit(curvature, convention):
    method = fitted(curvature=curvature)
    effect = method.removal(GROUP, query(), convention=convention)
    share = (TRAIN - len(GROUP)) / TRAIN
    after = DATA.refit(kept(*GROUP), alpha=ALPHA * (share if convention == "mean" else 1))
    assert error(effect.steps["newton"]["weight"][0], after.coef_ - BEFORE.coef_) < 1e-10
    real = DATA.query_loss(after) - DATA.query_loss(BEFORE)
    assert error(effect.effect("newton"), real) < 1e-9
    wrong = {name: error(effect.effect(name), real) for name in ("first_order", "rescaled")}
    assert min(wrong.values()) > 0.05  # where the others err


def test_rescaled_alone_is_newton_under_either_convention():
    method = fitted()
    for convention in ("sum", "mean"):
        effect = method.removal([7], query(), convention=convention)
        assert error(effect.rescaled, effect.newton) < 1e-10


def test_conventions_differ_by_a_constant_per_query():
    """After the factor n / (n - 1): the regulariser's pull is the same whichever example goes."""
    method = fitted()
    scores = method.attribute(query()).values
    mean = torch.stack([method.removal([i], query(), convention="mean").first_order for i in range(TRAIN)], 1)
    shift = mean * (TRAIN - 1) / TRAIN - scores
    assert float((shift - shift.mean(1, keepdim=True)).abs().max()) < 1e-10 * float(scores.abs().max())
    assert float(shift.abs().max()) > 1e-6 * float(scores.abs().max())


def test_first_order_and_rescaled_are_sums_of_scores():
    method, rescaled = fitted(), fitted(correction="rescaled")
    effect = method.removal(GROUP, query())
    assert error(effect.first_order, method.attribute(query()).removal_effect(GROUP)) < 1e-10
    assert error(effect.rescaled, rescaled.attribute(query()).removal_effect(GROUP)) < 1e-10


def test_a_higher_measurement_is_signed_as_it_moves():
    effect = fitted("prediction").removal(GROUP, query())
    moved = DATA.refit(kept(*GROUP)).predict(DATA.Xq) - BEFORE.predict(DATA.Xq)
    assert error(effect.newton, moved) < 1e-9
    assert float(effect.second_order["newton"].abs().max()) == 0  # a prediction is linear in the parameters


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("what", ["labels", "inputs"])
def test_newton_repair_is_the_refit_on_changed_examples(what, curvature):
    """Labels alone leave the curvature as it is, so that first order is exact too; inputs change it."""
    X, y = DATA.X.copy(), DATA.y.copy()
    if what == "labels":
        y[GROUP] = -2 * y[GROUP] + 1
    else:
        X[GROUP] = 1.5 * X[GROUP][:, ::-1] + 0.3
    after = DATA.refit(X=X, y=y)
    to = (torch.as_tensor(X[GROUP]), torch.as_tensor(y[GROUP]))
    effect = fitted(curvature=curvature).change(GROUP, to, query())
    assert error(effect.steps["newton"]["weight"][0], after.coef_ - BEFORE.coef_) < 1e-9
    assert error(effect.effect("newton"), DATA.query_loss(after) - DATA.query_loss(BEFORE)) < 1e-9
    first = error(effect.steps["first_order"]["weight"][0], after.coef_ - BEFORE.coef_)
    assert first < 1e-9 if what == "labels" else first > 0.05
    one = fitted(curvature=curvature).change([GROUP[0]], (to[0][:1], to[1][:1]), query())
    assert error(one.rescaled, one.newton) < 1e-10


def test_unchanged_examples_change_nothing():
    to = (torch.as_tensor(DATA.X[GROUP]), torch.as_tensor(DATA.y[GROUP]))
    effect = fitted().change(GROUP, to, query())
    assert float(effect.newton.abs().max()) < 1e-15


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_newton_reweighting_is_the_refit_with_these_weights(curvature, convention):
    rng = np.random.default_rng(1)
    weights = np.ones(TRAIN)
    weights[:20] = rng.choice([0.0, 0.5, 2.0, 3.0], 20)
    alpha = ALPHA * (weights.sum() / TRAIN if convention == "mean" else 1)
    after = DATA.refit(weights, alpha=alpha)
    method = fitted(curvature=curvature)
    effect = method.reweight(weights, query(), convention=convention)
    assert error(effect.steps["newton"]["weight"][0], after.coef_ - BEFORE.coef_) < 1e-9
    named = {i: w for i, w in enumerate(weights) if w != 1}
    again = method.reweight(named, query(), convention=convention)
    assert error(again.newton, effect.newton) < 1e-12


def test_removing_is_the_weight_zero():
    method = fitted()
    removed = method.removal(GROUP, query())
    weighted = method.reweight(dict.fromkeys(GROUP, 0.0), query())
    for name in ("first_order", "rescaled", "newton"):
        assert error(weighted.effect(name), removed.effect(name)) < 1e-12


def test_any_functional_of_the_model_is_a_query():
    """The mean loss over a set is the mean of its scores; a worst group's loss is its own; Newton is exact for both."""
    Xq, yq = query()

    def losses(model):
        return (model(Xq)[:, 0] - yq) ** 2 / 2

    mean = Functional(lambda model: losses(model).mean(), "mean", "0.5 x squared error")
    worst = Functional(
        lambda model: torch.stack([losses(model)[:5].mean(), losses(model)[5:].mean()]).max(),
        "worst",
        mean.unit,
    )
    method = fitted()
    scores = method.attribute([mean, worst])
    every = method.attribute(query())
    assert scores.query_ids == ["mean", "worst"]
    assert scores.unit == mean.unit
    assert error(scores.values[0], every.values.mean(0)) < 1e-12
    effect = method.removal(GROUP, [mean, worst])
    after = DATA.query_loss(DATA.refit(kept(*GROUP)))
    before = DATA.query_loss(BEFORE)
    real = [
        after.mean() - before.mean(),
        max(after[:5].mean(), after[5:].mean()) - max(before[:5].mean(), before[5:].mean()),
    ]
    assert error(effect.effect("newton"), real) < 1e-9
    better = Functional(lambda model: -losses(model).mean(), "score", "points", higher_is_better=True)
    same = method.attribute(better)
    assert error(same.values[0], scores.values[0]) < 1e-12  # proponents either way
    assert same.info["higher_is_better"]
    assert error(method.removal(GROUP, better).newton, -effect.newton[:1]) < 1e-12


def test_a_network_bends_as_its_measurement_does():
    """Quadratic terms against finite differences along the step, for a network and a margin."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 3, (20,))
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    task = uw.Classification("margin")
    method = uw.Influence(model, task, curvature="ekfac", damping=0.05).fit((x, y))
    effect = method.removal([1, 4, 9], (x[:4], y[:4]))
    for name in ("first_order", "rescaled", "newton"):
        values = []
        for e in (-0.1, 0.0, 0.1):
            moved = {p: v + e * effect.steps[name][p] for p, v in model.named_parameters()}
            copy = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()
            copy.load_state_dict({p: v.detach() for p, v in moved.items()})
            values.append(task.measure(copy, (x[:4], y[:4])).detach())
        slope, bend = (values[2] - values[0]) / 0.2, (values[2] - 2 * values[1] + values[0]) / 0.01
        assert error(getattr(effect, name), slope) < 1e-2
        assert error(effect.second_order[name], bend / 2) < 1e-2


def test_table_and_data_frame():
    effect = fitted().removal(GROUP, query())
    frame = effect.to_pandas()
    assert list(frame.columns[:4]) == ["query_id", "first_order", "rescaled", "newton"]
    assert error(frame["newton_second_order"], effect.effect("newton")) == 0
    table = effect.table(5)
    assert table.row_count == 5
    assert "removal of 15 training examples" in str(table.title)
    assert "positive = the measurement rises" in repr(effect)


def test_refused_in_one_line():
    method = fitted()
    with refused("'zebra', 999 not among the 60 training ids"):
        method.removal(["zebra", 999], query())
    with refused("no ids"):
        method.removal([], query())
    with refused("given twice"):
        method.removal([1, 1], query())
    with refused("convention='both'"):
        method.removal([1], query(), convention="both")
    with refused("2 examples are to be changed but 20 replacements"):
        method.change([1, 2], query(), query())
    with refused("3 weights were given for 60"):
        method.reweight([1, 2, 3], query())
    with refused("expected >= 0"):
        method.reweight({3: -1.0}, query())
    with refused("every weight is 1"):
        method.reweight([1.0] * TRAIN, query())
    with refused("leverage of the group is 1,"):
        method.removal(range(TRAIN), query())  # nothing is left to tell the intercept
    with refused("only ranks"):
        converted = from_sklearn(BEFORE, DATA.X, DATA.y)
        diagonal = uw.Influence(converted.model, converted.task, curvature="diagonal").fit(converted.train)
        diagonal.removal([1], query())
    with refused("does not depend on any tracked parameter"):
        method.attribute(Functional(lambda model: torch.ones(())))
    with refused("expected one number"):
        method.attribute(Functional(lambda model: model(query()[0])))
    with refused("mix functionals and data"):
        method.attribute([Functional(lambda model: model.weight.sum()), 3])
    with refused("estimate='best'"):
        method.removal([1], query()).effect("best")
