"""What each scikit-learn estimator minimises, brought to ``(1/n) sum_i l_i(theta) + (1/2) sum_j l2_j theta_j^2``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from upweight.errors import UpweightError
from upweight.integrations.margins import EpsilonInsensitive, SignedMargins
from upweight.task import BinaryClassification, Classification, OutputTask, PerExample, Regression

L2 = Callable[[int], dict[str, float]]
"""{regular expression of parameter names: coefficient} for n training examples; biases that no expression names: 0."""

_Read = tuple[nn.Module, OutputTask, L2, "np.ndarray | None"]


def read(e: Any, measurement: str | PerExample) -> _Read:
    """The model, its task, its regulariser and its classes; refuses by name, with what to use instead."""
    name = type(e).__name__
    if name not in _READERS:
        raise UpweightError(f"from_sklearn does not take {name} -> {_WAY_OUT.get(name, _ANY_WAY_OUT)}")
    _check_fitted(e)
    return _READERS[name](e, measurement)


# Estimators --------------------------------------------------------------------------------------------------------


def _logistic(e: Any, measurement: str | PerExample) -> _Read:
    """``C sum_i l_i + |w|^2 / 2``: an l2 of 1 / (C n)."""
    _only_l2(e)
    _no_class_weight(e)
    model, classes = _linear(e), np.asarray(e.classes_)
    penalised = getattr(e, "penalty", "deprecated") is not None and np.isfinite(e.C)
    strength = 1.0 / e.C if penalised else 0.0
    if e.solver == "liblinear" and len(classes) > 2:
        raise UpweightError(
            f"LogisticRegression(solver='liblinear') fits {len(classes)} separate models, expected one softmax -> "
            "fit with solver='lbfgs'"
        )
    task = BinaryClassification(measurement) if len(classes) == 2 else Classification(measurement)
    return (
        model,
        task,
        _sum_penalty(strength, _liblinear_bias(e) if e.solver == "liblinear" else 0.0),
        classes,
    )


def _ridge(e: Any, measurement: str | PerExample) -> _Read:
    """``|y - X w|^2 + alpha |w|^2`` is 2n times ``(1/n) sum_i r_i^2 / 2 + (alpha / n) |w|^2 / 2``."""
    _no_positive(e)
    return _linear(e), Regression(0.5, measurement), _sum_penalty(_one_alpha(e)), None


def _least_squares(e: Any, measurement: str | PerExample) -> _Read:
    _no_positive(e)
    return _linear(e), Regression(0.5, measurement), _sum_penalty(0.0), None


def _ridge_classifier(e: Any, measurement: str | PerExample) -> _Read:
    """Ridge on targets of -1 and +1."""
    _no_positive(e)
    _no_class_weight(e)
    if getattr(e, "_label_binarizer", None) is not None and e._label_binarizer.y_type_.startswith(
        "multilabel"
    ):
        raise UpweightError("RidgeClassifier was fitted to several labels an example -> fit one a label")
    task = SignedMargins("squared_error", measurement)
    return _linear(e), task, _sum_penalty(_one_alpha(e)), np.asarray(e.classes_)


def _linear_svc(e: Any, measurement: str | PerExample) -> _Read:
    """``C sum_i l_i + |w|^2 / 2 + (b / s)^2 / 2`` with liblinear's intercept scaling s."""
    _no_class_weight(e)
    if e.loss != "squared_hinge" or e.penalty != "l2" or e.multi_class != "ovr":
        raise UpweightError(
            f"LinearSVC(loss={e.loss!r}, penalty={e.penalty!r}, multi_class={e.multi_class!r}) has no second "
            "derivative to use -> fit with loss='squared_hinge', penalty='l2', multi_class='ovr'"
        )
    task = SignedMargins("squared_hinge", measurement)
    return _linear(e), task, _sum_penalty(1.0 / e.C, _liblinear_bias(e)), np.asarray(e.classes_)


def _linear_svr(e: Any, measurement: str | PerExample) -> _Read:
    if e.loss != "squared_epsilon_insensitive":
        raise UpweightError(
            f"LinearSVR(loss={e.loss!r}) has no second derivative -> fit with loss='squared_epsilon_insensitive'"
        )
    task = EpsilonInsensitive(e.epsilon, measurement)
    return _linear(e), task, _sum_penalty(1.0 / e.C, _liblinear_bias(e)), None


def _sgd_classifier(e: Any, measurement: str | PerExample) -> _Read:
    """``(1/n) sum_i l_i + alpha |w|^2 / 2`` already."""
    _no_class_weight(e)
    _check_sgd(e, ("log_loss", "squared_hinge", "squared_error"))
    classes = np.asarray(e.classes_)
    if e.loss == "log_loss" and len(classes) == 2:
        task: OutputTask = BinaryClassification(measurement)
    else:
        task = SignedMargins(e.loss, measurement)
    return _linear(e), task, _mean_penalty(e), classes


def _sgd_regressor(e: Any, measurement: str | PerExample) -> _Read:
    _check_sgd(e, ("squared_error", "squared_epsilon_insensitive"))
    squared = e.loss == "squared_error"
    task = Regression(0.5, measurement) if squared else EpsilonInsensitive(e.epsilon, measurement)
    return _linear(e), task, _mean_penalty(e), None


def _mlp_classifier(e: Any, measurement: str | PerExample) -> _Read:
    if getattr(e._label_binarizer, "y_type_", "").startswith("multilabel"):
        raise UpweightError(
            "MLPClassifier was fitted to several labels an example -> fit one network a label"
        )
    classes = np.asarray(e.classes_)
    task = BinaryClassification(measurement) if len(classes) == 2 else Classification(measurement)
    return _network(e), task, _network_penalty(e), classes


def _mlp_regressor(e: Any, measurement: str | PerExample) -> _Read:
    """Half the squared error, summed over outputs as its gradient is (the loss that is reported averages)."""
    if getattr(e, "loss", "squared_error") != "squared_error":
        raise UpweightError(f"MLPRegressor(loss={e.loss!r}) is not taken -> fit with loss='squared_error'")
    if e.n_outputs_ > 1 and e.solver == "lbfgs":
        raise UpweightError(
            f"MLPRegressor(solver='lbfgs') with {e.n_outputs_} outputs averages over them in its loss but sums in its "
            "gradient, so that it ends at a minimum of neither -> fit with solver='adam', or one network an output"
        )
    return _network(e), Regression(0.5, measurement), _network_penalty(e), None


_READERS: dict[str, Callable[[Any, str | PerExample], _Read]] = {
    "LogisticRegression": _logistic,
    "LogisticRegressionCV": lambda e, m: _refuse_cv(e, "LogisticRegression", "C=cv.C_"),
    "Ridge": _ridge,
    "RidgeCV": lambda e, m: _refuse_cv(e, "Ridge", "alpha=cv.alpha_"),
    "RidgeClassifier": _ridge_classifier,
    "RidgeClassifierCV": lambda e, m: _refuse_cv(e, "RidgeClassifier", "alpha=cv.alpha_"),
    "LinearRegression": _least_squares,
    "LinearSVC": _linear_svc,
    "LinearSVR": _linear_svr,
    "SGDClassifier": _sgd_classifier,
    "SGDRegressor": _sgd_regressor,
    "MLPClassifier": _mlp_classifier,
    "MLPRegressor": _mlp_regressor,
}
_ANY_WAY_OUT = (
    "fit LogisticRegression, Ridge, LinearRegression, LinearSVC, LinearSVR, SGDClassifier or an MLP, or write the "
    "model in PyTorch"
)
_NO_CURVATURE = (
    "its loss or penalty has no second derivative: fit Ridge, LogisticRegression or LinearSVC instead"
)
_INSIDE = "pass the estimator that it holds, fitted (for example search.best_estimator_)"
_WAY_OUT = {
    **dict.fromkeys(
        ("Lasso", "ElasticNet", "LassoCV", "ElasticNetCV", "Perceptron", "HuberRegressor"), _NO_CURVATURE
    ),
    **dict.fromkeys(("PassiveAggressiveClassifier", "QuantileRegressor", "SGDOneClassSVM"), _NO_CURVATURE),
    **dict.fromkeys(("GridSearchCV", "RandomizedSearchCV", "CalibratedClassifierCV"), _INSIDE),
    **dict.fromkeys(("OneVsRestClassifier", "OneVsOneClassifier", "TransformedTargetRegressor"), _INSIDE),
    **dict.fromkeys(("MultiOutputClassifier", "MultiOutputRegressor", "ClassifierChain"), _INSIDE),
    **dict.fromkeys(
        ("SVC", "SVR", "NuSVC", "NuSVR"), "a kernel machine has no weight vector: fit LinearSVC or LinearSVR"
    ),
}


# Models --------------------------------------------------------------------------------------------------------------


def _linear(e: Any) -> nn.Linear:
    """``f(x) = coef_ x + intercept_``."""
    coef = _dense_coef(e.coef_)
    bias = np.atleast_1d(np.asarray(e.intercept_, dtype=np.float64))
    model = nn.Linear(coef.shape[1], coef.shape[0], bias=bool(e.fit_intercept)).double()
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(coef))
        if e.fit_intercept:
            model.bias.copy_(torch.as_tensor(np.broadcast_to(bias, coef.shape[:1]).copy()))
    return model


_ACTIVATIONS: Mapping[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


def _network(e: Any) -> nn.Sequential:
    """The network up to its logits: the output activation belongs to the loss."""
    if getattr(e, "early_stopping", False):
        raise UpweightError(
            f"{type(e).__name__}(early_stopping=True) was trained on a random part of X that it does not keep -> split "
            "off the validation data yourself and fit with early_stopping=False"
        )
    modules: list[nn.Module] = []
    for coef, intercept in zip(e.coefs_, e.intercepts_, strict=True):
        layer = nn.Linear(coef.shape[0], coef.shape[1]).double()
        with torch.no_grad():
            layer.weight.copy_(torch.as_tensor(np.asarray(coef, dtype=np.float64).T.copy()))
            layer.bias.copy_(torch.as_tensor(np.asarray(intercept, dtype=np.float64)))
        modules += [layer, _ACTIVATIONS[e.activation]()]
    return nn.Sequential(*modules[:-1])


def _dense_coef(coef: Any) -> np.ndarray:
    if hasattr(coef, "toarray"):
        raise UpweightError("coef_ is sparse, expected an array -> estimator.densify() first")
    return np.atleast_2d(np.asarray(coef, dtype=np.float64))


# Regularisers --------------------------------------------------------------------------------------------------------


def _sum_penalty(weights: float, bias: float = 0.0) -> L2:
    """The penalty of an objective that sums losses: the mean loss has 1/n of it."""
    parts = {"weight$": weights, "bias$": weights * bias}
    return lambda n: {pattern: value / n for pattern, value in parts.items() if value}


def _mean_penalty(e: Any) -> L2:
    alpha = float(e.alpha) if e.penalty == "l2" else 0.0
    return lambda n: {"weight$": alpha} if alpha else {}


def _network_penalty(e: Any) -> L2:
    """scikit-learn adds ``alpha / (2 m) |W|^2`` to the mean loss of a batch of m; L-BFGS takes all n at once."""

    def l2(n: int) -> dict[str, float]:
        batch = (
            n if e.solver == "lbfgs" else min(200, n) if e.batch_size == "auto" else min(int(e.batch_size), n)
        )
        return {"weight$": e.alpha / batch} if e.alpha else {}

    return l2


def _liblinear_bias(e: Any) -> float:
    """Liblinear's intercept is the weight of a constant feature, and is penalised like the others."""
    return 1.0 / float(e.intercept_scaling) ** 2 if e.fit_intercept else 0.0


# Checks --------------------------------------------------------------------------------------------------------------


def _check_fitted(e: Any) -> None:
    if not hasattr(e, "coef_") and not hasattr(e, "coefs_"):
        raise UpweightError(f"this {type(e).__name__} is not fitted -> call estimator.fit(X, y) first")


def _refuse_cv(e: Any, plain: str, how: str) -> _Read:
    raise UpweightError(
        f"{type(e).__name__} chose its regularisation on the same data -> fit {plain}({how}) with the choice, and "
        "pass that"
    )


def _only_l2(e: Any) -> None:
    penalty = getattr(e, "penalty", "deprecated")
    if penalty in ("l1", "elasticnet") or (penalty == "deprecated" and e.l1_ratio):
        raise UpweightError(
            f"{type(e).__name__} has an L1 penalty, which has no second derivative -> fit with "
            "an L2 penalty (l1_ratio=0)"
        )


def _no_class_weight(e: Any) -> None:
    if e.class_weight is not None:
        raise UpweightError(
            f"{type(e).__name__}(class_weight={e.class_weight!r}) weights its examples, expected equal weights -> fit "
            "with class_weight=None, or write the weighted loss as a Task"
        )


def _no_positive(e: Any) -> None:
    if getattr(e, "positive", False):
        raise UpweightError(
            f"{type(e).__name__}(positive=True) is constrained: its coefficients are no stationary point -> fit with "
            "positive=False"
        )


def _one_alpha(e: Any) -> float:
    alpha = np.asarray(e.alpha, dtype=np.float64)
    if alpha.size != 1:
        raise UpweightError(
            f"{type(e).__name__} has {alpha.size} values of alpha, expected one for all outputs -> fit one model "
            "an output"
        )
    return float(alpha.reshape(()))


def _check_sgd(e: Any, losses: tuple[str, ...]) -> None:
    if e.loss not in losses or e.penalty not in ("l2", None) or e.early_stopping:
        raise UpweightError(
            f"{type(e).__name__}(loss={e.loss!r}, penalty={e.penalty!r}, early_stopping={e.early_stopping}) is not "
            f"taken -> fit with a loss of {list(losses)}, penalty='l2' and early_stopping=False"
        )
