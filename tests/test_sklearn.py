"""Fitted scikit-learn models: the same predictions, and an objective that is stationary where they ended."""

import warnings

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.datasets import load_diabetes, load_iris, make_classification
from sklearn.linear_model import (
    ElasticNet,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeClassifier,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC, LinearSVR

import upweight as uw
from upweight.integrations.sklearn import from_sklearn


def two_classes():
    X, y = make_classification(120, 6, n_informative=4, flip_y=0.1, random_state=0)
    return X, np.array(["no", "yes"])[y]


def three_classes():
    X, y = load_iris(return_X_y=True)
    rng = np.random.default_rng(0)
    return X + 0.3 * rng.normal(size=X.shape), np.array([5, 2, 9])[y]


def numbers():
    X, y = load_diabetes(return_X_y=True, scaled=True)
    return X[:150] * 20, (y[:150] - 150) / 77


def two_numbers():
    X, y = numbers()
    return X, np.stack([y, np.sin(y)], 1)


TIGHT = {"tol": 1e-10, "max_iter": 20_000}
LINEAR = {
    "logistic": (LogisticRegression(C=0.7, **TIGHT), two_classes),
    "logistic without intercept": (LogisticRegression(C=0.7, fit_intercept=False, **TIGHT), two_classes),
    "logistic newton": (LogisticRegression(C=3.0, solver="newton-cg", **TIGHT), three_classes),
    "logistic liblinear": (
        LogisticRegression(C=0.7, solver="liblinear", intercept_scaling=3.0, **TIGHT),
        two_classes,
    ),
    "logistic unpenalised": (LogisticRegression(C=np.inf, **TIGHT), two_classes),
    "softmax": (LogisticRegression(C=0.7, **TIGHT), three_classes),
    "ridge": (Ridge(alpha=3.0), numbers),
    "ridge without intercept": (Ridge(alpha=3.0, fit_intercept=False), numbers),
    "ridge of two": (Ridge(alpha=3.0), two_numbers),
    "least squares": (LinearRegression(), numbers),
    "ridge classifier": (RidgeClassifier(alpha=2.0), two_classes),
    "ridge classifier of three": (RidgeClassifier(alpha=2.0), three_classes),
    "svc": (LinearSVC(C=0.3, dual=False, intercept_scaling=2.0, **TIGHT), two_classes),
    "svc of three": (LinearSVC(C=0.3, dual=False, **TIGHT), three_classes),
    "svr": (
        LinearSVR(C=0.3, epsilon=0.2, loss="squared_epsilon_insensitive", dual=False, **TIGHT),
        numbers,
    ),
}
SGD = {
    "sgd": (SGDClassifier(loss="log_loss", alpha=0.05, max_iter=300, tol=None, average=True), two_classes),
    "sgd of three": (SGDClassifier(loss="log_loss", alpha=0.05, max_iter=300, tol=None), three_classes),
    "sgd hinge": (SGDClassifier(loss="squared_hinge", alpha=0.05, max_iter=50), two_classes),
    "sgd regressor": (SGDRegressor(alpha=0.05, max_iter=300, tol=None, average=True), numbers),
    "sgd svr": (
        SGDRegressor(loss="squared_epsilon_insensitive", epsilon=0.2, alpha=0.05, max_iter=50),
        numbers,
    ),
}
SMALL = {"hidden_layer_sizes": (5, 4), "random_state": 0}
LBFGS = {"solver": "lbfgs", "tol": 1e-14, "max_iter": 20_000, "max_fun": 200_000, **SMALL}
NETWORKS = {
    "binary tanh": (MLPClassifier(activation="tanh", alpha=2.0, **LBFGS), two_classes),
    "classes logistic": (MLPClassifier(activation="logistic", alpha=0.5, **LBFGS), three_classes),
    "classes identity": (MLPClassifier(activation="identity", alpha=0.5, **LBFGS), three_classes),
    "regressor tanh": (MLPRegressor(activation="tanh", alpha=2.0, **LBFGS), numbers),
}
RELU = {
    "relu": (MLPClassifier(alpha=0.5, max_iter=20, **SMALL), three_classes),
    "relu regressor": (MLPRegressor(alpha=0.5, max_iter=20, **SMALL), numbers),
    "relu regressor of two": (MLPRegressor(alpha=0.5, max_iter=20, **SMALL), two_numbers),
}
ALL = LINEAR | SGD | NETWORKS | RELU


def fitted(name):
    estimator, data = ALL[name]
    X, y = data()
    if "random_state" in estimator.get_params():
        estimator.set_params(random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a tolerance that the solver cannot reach, few epochs
        return estimator.fit(X, y), X, y


def objective_gradient(converted):
    """The gradient of J by autograd, from its definition, and the size of an example's."""
    model, (inputs, targets) = converted.model, converted.train
    penalty = 0.0
    for name, p in model.named_parameters():
        kind = "weight$" if name.endswith("weight") else "bias$"
        penalty = penalty + converted.l2.get(kind, 0.0) * p.square().sum() / 2
    losses = converted.task.train_loss(model, (inputs, targets))
    gradient = torch.autograd.grad(losses.mean() + penalty, list(model.parameters()), retain_graph=True)
    one = torch.autograd.grad(losses[losses.argmax()], list(model.parameters()))
    flat = [torch.cat([g.reshape(-1) for g in grads]) for grads in (gradient, one)]
    return float(flat[0].norm() / flat[1].norm())


@pytest.mark.parametrize("name", ALL)
def test_predictions_are_the_same(name):
    estimator, X, y = fitted(name)
    converted = from_sklearn(estimator, X, y, check=False)
    outputs = converted.model(converted.train[0]).detach()
    if hasattr(estimator, "decision_function"):
        expected = estimator.decision_function(X).reshape(len(X), -1)
    elif hasattr(estimator, "predict_proba"):
        p = estimator.predict_proba(X)
        expected = p if outputs.shape[1] > 1 else p[:, 1:]
        outputs = outputs.softmax(1) if outputs.shape[1] > 1 else outputs.sigmoid()
    else:
        expected = estimator.predict(X).reshape(len(X), -1)
    assert np.abs(outputs.numpy() - expected).max() < 1e-10 * max(1, np.abs(expected).max())


@pytest.mark.parametrize("name", LINEAR | NETWORKS)
def test_the_objective_is_stationary_where_the_estimator_ended(name):
    """Any wrong factor of n, 2, C or the number of outputs, or a penalised intercept, would leave a gradient."""
    estimator, X, y = fitted(name)
    converted = from_sklearn(estimator, X, y)
    bound = 2e-4 if name in NETWORKS else 1e-5  # L-BFGS stops there
    assert objective_gradient(converted) < bound
    assert converted.gradient < bound


@pytest.mark.parametrize(
    "name", [name for name in LINEAR | NETWORKS if "least" not in name and "unpen" not in name]
)
def test_another_regulariser_would_not_be_stationary(name):
    """The test above must be able to fail."""
    estimator, X, y = fitted(name)
    converted = from_sklearn(estimator, X, y)
    twice = from_sklearn(estimator, X, y)
    object.__setattr__(twice, "_l2", lambda n: converted.l2_for(n // 2))
    assert objective_gradient(twice) > 5 * objective_gradient(converted) + 1e-5


def test_sgd_comes_near_the_same_objective():
    """Averaged stochastic gradients end near the minimum: the penalty is already for the mean loss."""
    for name in ("sgd", "sgd regressor"):
        estimator, X, y = fitted(name)
        converted = from_sklearn(estimator, X, y)
        assert converted.l2 == {"weight$": 0.05}
        assert converted.gradient < 0.02


def test_adam_divides_alpha_by_the_batch():
    estimator, X, y = fitted("relu")
    assert from_sklearn(estimator, X, y).l2 == {"weight$": pytest.approx(0.5 / 150)}
    estimator.set_params(batch_size=50)
    assert from_sklearn(estimator, X, y).l2 == {"weight$": pytest.approx(0.5 / 50)}
    assert from_sklearn(estimator).l2_for(1000) == {"weight$": pytest.approx(0.5 / 50)}


def test_a_network_of_two_outputs_descends_the_sum_over_them():
    """scikit-learn's reported loss averages over outputs, its gradient does not: one plain step shows which."""
    X, y = two_numbers()
    options = {
        "solver": "sgd",
        "momentum": 0.0,
        "shuffle": False,
        "batch_size": 150,
        "learning_rate_init": 1e-3,
    }
    model = MLPRegressor(
        hidden_layer_sizes=(4,), activation="tanh", alpha=0.3, random_state=0, max_iter=1, **options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = from_sklearn(model.fit(X, y), X, y)
        second = from_sklearn(model.set_params(max_iter=2).fit(X, y), X, y)
    inputs, targets = first.train
    penalty = (
        0.3 / 150 * sum(p.square().sum() for n, p in first.model.named_parameters() if "weight" in n) / 2
    )
    objective = first.task.train_loss(first.model, (inputs, targets)).mean() + penalty
    gradients = torch.autograd.grad(objective, list(first.model.parameters()))
    pairs = zip(first.model.parameters(), second.model.parameters(), gradients)
    assert max(float((b - (a - 1e-3 * g)).detach().abs().max()) for a, b, g in pairs) < 1e-12


def test_labels_become_the_numbers_of_their_classes():
    estimator, X, y = fitted("softmax")
    converted = from_sklearn(estimator, X, y)
    assert converted.classes.tolist() == [2, 5, 9]
    assert converted.train[1][[0, 60, 120]].tolist() == [1, 0, 2]


def test_a_pipeline_is_its_last_step_on_transformed_data():
    X, y = two_classes()
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.7, tol=1e-10)).fit(X * 30 + 5, y)
    converted = from_sklearn(pipeline, X * 30 + 5, y)
    outputs = converted.model(converted.tensors(X * 30 + 5, y)[0]).detach()[:, 0].numpy()
    assert np.abs(outputs - pipeline.decision_function(X * 30 + 5)).max() < 1e-10


def test_influence_takes_what_it_gives():
    estimator, X, y = fitted("softmax")
    converted = from_sklearn(estimator, X, y, measurement="margin")
    scores = uw.Influence(converted.model, converted.task).fit(converted.train).attribute(converted.train)
    assert scores.values.shape == (150, 150)
    assert scores.values.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "convention"),
    [
        (lambda: LogisticRegression(C=0.1, tol=1e-10, max_iter=5000), "sum"),
        (lambda: LinearSVC(C=0.1, tol=1e-12, max_iter=100_000, random_state=0), "sum"),
        (
            lambda: SGDClassifier(loss="log_loss", alpha=0.1, max_iter=2000, tol=None, random_state=0),
            "mean",
        ),
    ],
    ids=["logistic", "svc", "sgd"],
)
def test_a_repair_by_its_convention_is_a_refit(make, convention):
    """A refit without 50 of 150 rows: the other convention is a third of the penalty away."""
    X, y = two_classes()
    whole = from_sklearn(make().fit(X, y), X, y, check=False)
    refit = from_sklearn(make().fit(X[50:], y[50:]), X[50:], y[50:], check=False)
    assert whole.convention == refit.convention == convention

    def distance(model: torch.nn.Module) -> float:
        pairs = zip(model.parameters(), refit.model.parameters(), strict=True)
        return sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5

    found = {}
    for name in ("sum", "mean"):
        options = {"l2": whole.l2, "convention": name, "steps": 20, "damping": 0.0, "curvature": "hessian"}
        repaired = uw.unlearn(
            whole.model, whole.task, whole.train, range(50), finish=True, progress=False, **options
        )
        found[name] = distance(repaired.model) / distance(whole.model)
    other = {"sum": "mean", "mean": "sum"}[convention]
    assert found[convention] < (0.1 if convention == "mean" else 1e-3)
    assert found[other] > 0.1 and found[other] > 3 * found[convention]


def test_without_a_penalty_or_with_a_network_it_is_what_the_refit_does():
    X, y = two_classes()
    free = LogisticRegression(C=np.inf, max_iter=2000).fit(X, y)
    assert from_sklearn(free, X, y, check=False).convention == "mean"
    Xn, yn = numbers()
    assert from_sklearn(Ridge().fit(Xn, yn)).convention == "sum"
    for solver, batch, expected in (("lbfgs", 20, "sum"), ("adam", 20, "mean"), ("adam", len(X), "sum")):
        network = MLPClassifier((4,), solver=solver, batch_size=batch, max_iter=3, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network.fit(X, y == "yes")
        assert from_sklearn(network, X, y == "yes", check=False).convention == expected


def test_refused_with_the_way_out():
    X, y = two_classes()
    Xn, yn = numbers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [
            (LogisticRegression(), "not fitted"),
            (MLPClassifier(), "not fitted"),
            (ElasticNet().fit(Xn, yn), "Ridge"),
            (SVC().fit(X, y), "LinearSVC"),
            (GridSearchCV(Ridge(), {"alpha": [1, 2]}).fit(Xn, yn), "best_estimator_"),
            (LogisticRegressionCV(Cs=2, max_iter=20).fit(X, y), "C=cv.C_"),
            (LogisticRegression(class_weight="balanced").fit(X, y), "class_weight"),
            (LogisticRegression(penalty="l1", l1_ratio=1, solver="liblinear").fit(X, y), "L1"),
            (LinearSVC(loss="hinge").fit(X, y), "squared_hinge"),
            (LinearSVR().fit(Xn, yn), "squared_epsilon"),
            (SGDClassifier().fit(X, y), "log_loss"),
            (Ridge(alpha=np.array([1.0, 2.0])).fit(*two_numbers()), "one for all outputs"),
            (Ridge(positive=True).fit(Xn, yn), "positive=False"),
            (MLPClassifier(early_stopping=True, max_iter=2).fit(X, y == "yes"), "early_stopping"),
            (MLPRegressor(solver="lbfgs", max_iter=2).fit(*two_numbers()), "minimum of neither"),
            (LogisticRegression().fit(X, y).sparsify(), "densify"),
            ("a string", "PyTorch"),
        ]
    for estimator, words in cases:
        with refused(words):
            from_sklearn(estimator)


def test_refused_data():
    estimator, X, y = fitted("logistic")
    with refused("l2_for"):
        _ = from_sklearn(estimator).l2
    with refused("both"):
        from_sklearn(estimator, X)
    with refused("4 columns, expected 6"):
        from_sklearn(estimator, X[:, :4], y)
    with refused("maybe"):
        from_sklearn(estimator, X, np.where(y == "no", "maybe", y))
    with refused("119"):
        from_sklearn(estimator, X, y[:-1])


def test_sample_weights_show_in_the_gradient():
    X, y = two_classes()
    weights = np.where(y == "yes", 3.0, 1.0)
    weighted = LogisticRegression(C=0.7, tol=1e-10).fit(X, y, sample_weight=weights)
    with refused("sample weights"):
        from_sklearn(weighted, X, y)
    assert from_sklearn(weighted, X, y, check=False).gradient > 0.1
