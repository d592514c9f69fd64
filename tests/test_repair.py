"""Unlearning, relabelling and reweighting against really refitting, in float64, and on networks."""

import io
import json

import numpy as np
import oracles
import pytest
import torch
from repairs import ALPHA, GROUP, QUIET, TRAIN, diabetes, error, exact, network, problem, ridge
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn

import upweight as uw
from upweight.curvature.solvers import ConjugateGradient
from upweight.integrations.sklearn import from_sklearn
from upweight.repair.options import METHODS

# Exact identities ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
@pytest.mark.parametrize("solver", ["direct", ConjugateGradient(rtol=1e-12)], ids=["direct", "cg"])
@pytest.mark.parametrize("convention", ["sum", "mean"])
def test_one_newton_step_of_ridge_is_the_refit(curvature, solver, convention):
    X, y = diabetes()
    before, weights = ridge(X, y), np.ones(TRAIN)
    weights[GROUP] = 0
    share = weights.mean() if convention == "mean" else 1.0
    after = ridge(X, y, weights, ALPHA * share)
    converted = from_sklearn(before, X, y)
    options = exact(converted, curvature=curvature, solver=solver, convention=convention)
    repair = uw.unlearn(converted.model, converted.task, converted.train, GROUP, **options)
    assert error(repair.model, after) < 1e-9
    assert error(converted.model, after) > 0.05 and error(converted.model, before) < 1e-12
    assert repair.evidence["objective"]["trust_ratio"] == pytest.approx(1, abs=1e-6)
    # The losses' predicted changes are exact too: the losses are quadratic.
    for group in repair.evidence["groups"].values():
        assert group["predicted"] == pytest.approx(group["actual"], rel=1e-8)
    residual = repair.evidence["residual_gradient_norm"]
    assert residual["after"] < 1e-6 * residual["before"]
    first = uw.unlearn(converted.model, converted.task, converted.train, GROUP, method="influence", **options)
    assert error(first.model, after) > 0.01  # which Newton corrects


@pytest.mark.parametrize("method", ["newton", "trust_region", "corrected", "last_layer"])
def test_new_labels_and_weights_of_ridge_are_the_refit(method):
    X, y = diabetes()
    converted = from_sklearn(ridge(X, y), X, y)
    changed, weights = y.copy(), np.ones(TRAIN)
    changed[[1, 8]] += [3.0, -2.0]
    weights[[8, 20, 33]] = [2.0, 0.0, 0.25]
    weights[5] = 0
    repair = uw.amend(
        converted.model,
        converted.task,
        converted.train,
        remove=[5],
        labels={1: changed[1], 8: changed[8]},
        weights={8: 2.0, 20: 0, 33: 0.25},
        method=method,
        **exact(converted),
    )
    assert error(repair.model, ridge(X, changed, weights)) < 1e-9
    assert sorted(repair.change.removed) == [5, 20] and dict(repair.change.weights) == {8: 2.0, 33: 0.25}
    groups = repair.evidence["groups"]
    assert [groups[name]["of"] for name in ("forgotten", "repaired", "reweighted", "retained")] == [
        2,
        2,
        1,
        55,
    ]
    assert groups["repaired"]["actual"] < 0


def iris():
    X, y = load_iris(return_X_y=True)
    return (X - X.mean(0)) / X.std(0), y


def logistic(X, y, C=1.0):
    return LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(X, y)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("change", ["remove", "relabel"])
def test_newton_of_logistic_regression_equals_retraining(classes, change):
    X, y = iris()
    chosen = (y > 0) if classes == 2 else (y >= 0)
    X, y = X[chosen], y[chosen] - y[chosen].min()
    picked = list(range(1, len(y), 9))
    converted = from_sklearn(logistic(X, y), X, y)
    # A shift of all biases of a softmax is no change: without any damping the curvature has a zero there.
    damping = {"damping": 0.0 if classes == 2 else 1e-6}
    options = exact(converted, steps=20, finish=True, tolerance=1e-12) | damping
    if change == "remove":
        keep = np.setdiff1d(np.arange(len(y)), picked)
        after = logistic(X[keep], y[keep])
        repair = uw.unlearn(converted.model, converted.task, converted.train, picked, **options)
    else:
        new = y.copy()
        new[picked] = (new[picked] + 1) % classes
        after = logistic(X, new)
        repair = uw.relabel(
            converted.model, converted.task, converted.train, {p: int(new[p]) for p in picked}, **options
        )
    probabilities = after.predict_proba(X)
    with torch.no_grad():
        outputs = repair.model(torch.as_tensor(X))
        found = outputs.softmax(1) if classes == 3 else outputs.flatten().sigmoid()
    assert np.abs(found.numpy() - (probabilities if classes == 3 else probabilities[:, 1])).max() < 1e-6
    gap = np.abs(repair.model.weight.detach().numpy() - after.coef_).max()
    assert gap < 1e-6
    moved = np.abs(converted.model.weight.detach().numpy() - after.coef_).max()
    one = uw.amend(
        converted.model,
        converted.task,
        converted.train,
        remove=picked if change == "remove" else None,
        labels=dict(repair.change.labels) if change == "relabel" else None,
        **exact(converted) | damping,
    )
    assert (
        np.abs(one.model.weight.detach().numpy() - after.coef_).max() < 0.5 * moved
    )  # one step, most of the way
    assert moved > 1e-2 and len(repair.evidence["steps"]) > 1
    assert repair.evidence["residual_gradient_norm"]["after"] < 1e-9
    assert repair.certificate is not None and repair.certificate.bound >= repair.certificate.measured


# Networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_given_model_is_as_it_was(method):
    model = network()
    calls = []
    model.first.register_forward_hook(lambda *args: calls.append(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with oracles.untouched(model):
        repair = uw.unlearn(
            model,
            uw.Classification(),
            problem(),
            [0, 7, 9],
            method=method,
            l2=0.01,
            test=problem(20, 1),
            **QUIET,
        )
    assert repair.model is not model
    theirs = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not theirs & {id(t) for t in (*repair.model.parameters(), *repair.model.buffers())}
    assert all(p.grad is None for p in repair.model.parameters())
    # Tied weights are still one, statistics are those of before, and both are said.
    assert repair.model.tied.weight is repair.model.again.weight
    assert torch.equal(repair.model.norm.running_var, model.norm.running_var)
    assert repair.evidence["tied"] == [["again.weight", "tied.weight"]]
    assert repair.evidence["buffers_kept"] == ["norm.running_mean", "norm.running_var"]
    assert not repair.model.training
    assert not torch.equal(repair.model.head.weight, model.head.weight)
    moved = not torch.equal(repair.model.first.weight, model.first.weight)
    assert moved == (method != "last_layer")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_lowers_the_changed_objective_and_raises_what_is_forgotten(method):
    model = network()
    removed = list(range(0, 60, 7))
    repair = uw.unlearn(model, uw.Classification(), problem(), removed, method=method, l2=0.01, **QUIET)
    evidence = repair.evidence
    assert evidence["objective"]["actual"] < 0
    if method != "fine_tune":  # which also goes on with the training, and does not say what it will do
        assert evidence["groups"]["forgotten"]["actual"] > 0 < evidence["groups"]["forgotten"]["predicted"]
        assert 0.3 < evidence["objective"]["trust_ratio"] < 3
    assert evidence["groups"]["forgotten"]["n"] == len(removed)
    json.dumps(evidence)
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(repair)
    table = console.export_text()
    assert "forgotten" in table and "\N{HORIZONTAL ELLIPSIS}" not in table and method in repr(repair)


@pytest.mark.parametrize("convention", ["sum", "mean"])
@pytest.mark.parametrize("curvature", ["ggn", "ekfac"])
def test_the_whole_newton_step_is_that_of_group_removal(convention, curvature):
    """Two ways to one number: the curvature fitted without the group, and all of it with the group taken out."""
    model = network().double()
    x, y = problem()
    data, removed, l2 = (x.double(), y), [0, 7, 9, 30], 0.01 if curvature == "ggn" else 0.0
    options = {"curvature": curvature, "damping": 0.03, **QUIET}
    method = uw.Influence(model, uw.Classification(), **({"l2": l2} if l2 else {}), **options).fit(data)
    effect = method.removal(removed, data, convention=convention)
    repair = uw.unlearn(
        model, uw.Classification(), data, removed, convention=convention, l2=l2, step_size=1.0, **options
    )
    # EK-FAC's removal leaves the eigenbasis as it was, and so is near to the fit without the group, not equal to it.
    tolerance = 1e-7 if curvature == "ggn" and convention == "sum" else 0.3
    for name, parameter in repair.model.named_parameters():
        step = (parameter - dict(model.named_parameters())[name]).detach()
        expected = effect.steps["newton"][name]
        assert float((step - expected).norm()) <= tolerance * float(expected.norm())


def test_the_influence_step_is_that_of_group_removal():
    model = network().double()
    x, y = problem()
    data, removed = (x.double(), y), [0, 7, 9, 30]
    method = uw.Influence(model, uw.Classification(), curvature="ekfac", damping=0.03, **QUIET).fit(data)
    effect = method.removal(removed, data)
    repair = uw.unlearn(
        model,
        uw.Classification(),
        data,
        removed,
        method="influence",
        curvature="ekfac",
        damping=0.03,
        convention="sum",
        step_size=1.0,
        **QUIET,
    )
    for name, parameter in repair.model.named_parameters():
        step = (parameter - dict(model.named_parameters())[name]).detach()
        assert float((step - effect.steps["first_order"][name]).abs().max()) < 1e-12


def test_finish_drives_the_changed_objectives_own_gradient_to_zero():
    """By default what training left undone stays undone; the repair moves by the change alone."""
    model = network(lambda: nn.Linear(4, 2), steps=40).double()
    x, y = problem()
    options = {"l2": 0.01, "damping": 0.0, "curvature": "ggn", "steps": 20, **QUIET}
    data = (x.double(), y)
    plain = uw.unlearn(model, uw.Classification(), data, [3], **options).evidence["residual_gradient_norm"]
    finished = uw.unlearn(model, uw.Classification(), data, [3], finish=True, **options)
    after = finished.evidence["residual_gradient_norm"]
    assert plain["training_left"] > 1e-3 and after["after"] < 1e-9
    assert plain["after"] == pytest.approx(plain["training_left"], rel=0.05)


def test_held_out_data_chooses_the_step():
    """New labels: the lowest held-out loss. Removal: the longest step that does not clearly raise it."""
    x, y = problem(200)
    wrong = y.clone()
    wrong[:20] = 1 - wrong[:20]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(300):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), wrong).backward()
        optimizer.step()
    labels, held = {i: int(y[i]) for i in range(20)}, problem(300, 5)
    options = {"l2": 1e-3, "curvature": "ekfac", **QUIET}
    repair = uw.relabel(model.eval(), uw.Classification(), (x, wrong), labels, validation=held, **options)
    t = repair.evidence["steps"][0]["step_size"]
    assert repair.evidence["step_size_from"] == "held-out data" and t > 0
    assert repair.evidence["groups"]["validation"]["actual"] < 0
    for other in (0.06, 0.25, 1.0, 1.5):
        fixed = uw.relabel(
            model, uw.Classification(), (x, wrong), labels, validation=held, step_size=other, **options
        )
        best = repair.evidence["groups"]["validation"]["loss_after"]
        assert fixed.evidence["groups"]["validation"]["loss_after"] >= best - 1e-9 and t in (
            1.5,
            1.0,
            0.7,
            0.5,
            0.35,
            0.25,
            0.12,
            0.06,
        )
    # Forgetting all of one class of the held-out data can only hurt: the step is cut down until it does not show.
    group = [int(i) for i in torch.nonzero(wrong == 1)]
    careful = uw.unlearn(model, uw.Classification(), (x, wrong), group, validation=held, **options)
    whole = uw.unlearn(model, uw.Classification(), (x, wrong), group, step_size=1.0, **options)
    assert careful.evidence["steps"][0]["step_size"] < 1
    assert careful.evidence["parameters"]["moved"] < whole.evidence["parameters"]["moved"]


def test_fine_tuning_by_hand():
    """Passes in shuffled batches with momentum and a falling rate, the inverse curvature written out."""
    x, y = problem()
    model = network(lambda: nn.Linear(4, 2), steps=200).double()
    labels = {i: int(1 - y[i]) for i in range(0, 60, 10)}
    options = {"method": "fine_tune", "l2": 0.01, "steps": 2, "rate": 0.05, "batch": 25, "seed": 3, **QUIET}
    given = (model, uw.Classification(), (x.double(), y), labels)
    repair = uw.relabel(*given, curvature="ggn", damping=0.5, **options)
    changed = y.clone()
    changed[list(labels)] = torch.tensor(list(labels.values()))
    weight, bias = (p.detach().clone().requires_grad_(True) for p in (model.weight, model.bias))

    def objective(w, b, rows):
        losses = nn.functional.cross_entropy(x[rows].double() @ w.T + b, changed[rows])
        return losses + 0.005 * (w.square().sum() + b.square().sum())

    H = torch.autograd.functional.hessian(lambda w, b: objective(w, b, slice(None)), (weight, bias))
    H = torch.cat([torch.cat([H[i][j].reshape((8, 2)[i], (8, 2)[j]) for j in (0, 1)], 1) for i in (0, 1)])
    inverse = torch.linalg.inv(H + 0.5 * torch.eye(10, dtype=torch.float64))
    generator = torch.Generator().manual_seed(3)
    batches = [b for _ in range(2) for b in torch.randperm(60, generator=generator).split(25)]
    velocity = torch.zeros(10, dtype=torch.float64)
    for k, rows in enumerate(batches):
        grads = torch.autograd.grad(objective(weight, bias, rows), (weight, bias))
        velocity = 0.9 * velocity + inverse @ torch.cat([g.flatten() for g in grads])
        step = 0.05 * (1 - k / len(batches)) * velocity
        with torch.no_grad():
            weight -= step[:8].reshape(2, 4)
            bias -= step[8:]
    assert len(batches) == repair.evidence["steps"][0]["batches"] == 6
    assert float((repair.model.weight - weight).detach().abs().max()) < 1e-12
    assert repair.evidence["finish"] and repair.evidence["objective"]["trust_ratio"] is None
    assert repair.evidence["groups"]["repaired"]["actual"] < 0


def test_a_loader_and_dictionaries_are_changed_as_tensors_are():
    model = network()
    x, y = problem()
    task = uw.Classification()
    options = {"l2": 0.01, "curvature": "ggn", **QUIET}
    plain = uw.amend(model, task, (x, y), remove=[5, 50], labels={3: int(1 - y[3])}, **options)
    dataset = torch.utils.data.TensorDataset(x, y)
    items = [(a, b) for a, b in zip(x, y)]
    stream = torch.utils.data.DataLoader(
        dataset, sampler=torch.utils.data.SequentialSampler(range(60)), batch_size=16
    )

    for kind, data in {"items": items, "stream": stream, "dictionary": {"x": x, "labels": y}}.items():
        other = uw.amend(model, task, data, remove=[5, 50], labels={3: int(1 - y[3])}, **options)
        pairs = zip(plain.model.state_dict().values(), other.model.state_dict().values())
        assert max(float((a - b).abs().max()) for a, b in pairs) < 1e-4, kind


def test_ids_are_those_that_were_given():
    model = network()
    x, y = problem()
    ids = [f"patient-{i}" for i in range(60)]
    data = uw.Examples((x, y), ids)
    by_id = uw.unlearn(model, uw.Classification(), data, ["patient-9", "patient-3"], l2=0.01, **QUIET)
    by_position = uw.unlearn(model, uw.Classification(), (x, y), [3, 9], l2=0.01, **QUIET)
    assert torch.equal(by_id.model.head.weight, by_position.model.head.weight)
    assert by_id.to_json()["removed"] == ["patient-3", "patient-9"]
