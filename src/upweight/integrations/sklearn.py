"""Fitted scikit-learn models as PyTorch models: the same predictions, the same loss, the same regulariser.

scikit-learn's objectives differ in what they sum, average and penalise. All are brought to the library's form

    J(theta) = (1/n) sum_i l_i(theta) + (1/2) sum_j l2_j theta_j^2

of which the fitted coefficients are the minimum, so that influence functions need no guessing about factors of n.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.integrations.objectives import L2, read
from upweight.task import OutputTask, PerExample

STATIONARY = 0.02
"""Largest |gradient of the objective| over the root mean square gradient of an example that passes for a minimum."""
GRADIENT_BATCH = 128
"""Examples whose gradients are held at once while the objective's is added up."""


@dataclass(frozen=True)
class SklearnModel:
    """A scikit-learn model in PyTorch, in float64.

    Attributes:
        model: gives the estimator's decision values (logits) or predictions.
        task: its loss, and what is asked of queries.
        classes: the class labels in the order of the outputs, or None for a regression.
        train: the training data as tensors (inputs, targets), or None if it was not given.
        gradient: size of the objective's gradient at the fitted coefficients over that of one example's (0 at a
            minimum), or None without training data.
    """

    model: nn.Module
    task: OutputTask
    classes: np.ndarray | None
    train: tuple[Tensor, Tensor] | None
    gradient: float | None
    _l2: L2 = field(repr=False)
    _transform: Callable[[Any], Any] = field(repr=False)

    @property
    def l2(self) -> dict[str, float]:
        """{regular expression of parameter names: coefficient} of the regulariser, for the mean loss.

        Raises:
            UpweightError: no training data was given, on whose size the coefficients depend.
        """
        if self.train is None:
            raise UpweightError(
                "the regulariser of the mean loss depends on the number of training examples, which the estimator does "
                "not keep -> uw.from_sklearn(estimator, X, y), or .l2_for(n)"
            )
        return self.l2_for(len(self.train[1]))

    @property
    def convention(self) -> str:
        """What a refit without some rows divides by, for `unlearn` and `relabel`: their ``convention=``.

        ``"sum"`` where the penalty is beside a sum of losses, as C and Ridge's alpha are: with fewer rows, it weighs as
        much as before. ``"mean"`` where it is beside their mean (SGD's alpha), or there is none.
        """
        n = 10**6 if self.train is None else len(self.train[1])
        return "sum" if self._l2(n) != self._l2(max(1, n - 1)) else "mean"

    def l2_for(self, n: int) -> dict[str, float]:
        """The same for n training examples."""
        return self._l2(n)

    def tensors(self, X: Any, y: Any) -> tuple[Tensor, Tensor]:
        """scikit-learn's X, y as the tensors (inputs, targets) that the model and the task take.

        Labels become class numbers in the order of `classes`; a pipeline's transformers are applied.

        Raises:
            UpweightError: sparse or non-numeric X, another number of columns, or a label that was not trained on.
        """
        inputs = _matrix(self._transform(X))
        expected = next(iter(self.model.parameters())).shape[1]
        if inputs.shape[1] != expected:
            raise UpweightError(
                f"X has {inputs.shape[1]} columns, expected {expected} -> give the features that the estimator was "
                "fitted with"
            )
        targets = np.asarray(y)
        if len(targets) != len(inputs):
            raise UpweightError(
                f"X has {len(inputs)} rows but y {len(targets)}, expected as many -> align them"
            )
        if self.classes is None:
            return inputs, torch.as_tensor(targets.astype(np.float64))
        return inputs, torch.as_tensor(_numbers(targets, self.classes))


def from_sklearn(
    estimator: Any,
    X: Any = None,
    y: Any = None,
    *,
    measurement: str | PerExample = "loss",
    check: bool = True,
) -> SklearnModel:
    """A fitted scikit-learn model as a PyTorch model with its loss and its regulariser.

    Taken are LogisticRegression, Ridge, LinearRegression, RidgeClassifier, LinearSVC (squared hinge), LinearSVR
    (squared epsilon-insensitive), SGDClassifier and SGDRegressor (with those losses, log loss or squared error),
    MLPClassifier, MLPRegressor, and pipelines that end in one of them (the transformers are held fixed).

    Args:
        estimator: the fitted estimator.
        X: the training inputs [n, features] it was fitted with; needed for `SklearnModel.l2` and `SklearnModel.train`.
        y: the training targets [n].
        measurement: what is asked of queries, as in the task (`Classification`, `BinaryClassification`, `Regression`).
        check: refuse a linear model whose objective has no minimum at the fitted coefficients, for then it was fitted
            otherwise: with sample weights, to other data, or not to convergence.

    Returns:
        `SklearnModel`, with ``.model``, ``.task``, ``.l2`` and ``.train`` for `Influence`.

    Raises:
        UpweightError: the estimator is not fitted, not supported (with what to use instead), or not at its minimum.

    Example:
        >>> import upweight as uw
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.linear_model import LogisticRegression
        >>> X, y = load_iris(return_X_y=True)
        >>> estimator = LogisticRegression(C=2.0, tol=1e-8, max_iter=1000).fit(X, y)
        >>> converted = uw.from_sklearn(estimator, X, y)
        >>> converted.l2
        {'weight$': 0.0033...}
        >>> type(converted.task).__name__, bool(converted.gradient < 1e-6)
        ('Classification', True)
    """
    estimator, transform = _final_step(estimator)
    name = type(estimator).__name__
    model, task, l2, classes = read(estimator, measurement)
    converted = SklearnModel(model.eval(), task, classes, None, None, l2, transform)
    if X is None and y is None:
        return converted
    if X is None or y is None:
        raise UpweightError("only one of X and y was given -> from_sklearn(estimator, X, y) with both")
    train = converted.tensors(X, y)
    gradient = _relative_gradient(converted, train)
    if check and isinstance(model, nn.Linear) and not name.startswith("SGD") and gradient > STATIONARY:
        raise UpweightError(
            f"the objective's gradient at the fitted coefficients is {gradient:.2g} times an example's, expected at "
            f"most {STATIONARY:g}: {name} was fitted with sample weights, to other data, or not to convergence -> fit "
            "without sample_weight, with a smaller tol and a larger max_iter, or pass check=False"
        )
    return SklearnModel(model, task, classes, train, gradient, l2, transform)


def _final_step(estimator: Any) -> tuple[Any, Callable[[Any], Any]]:
    """A pipeline's last step, and what its transformers do to X."""
    if type(estimator).__name__ != "Pipeline":
        return estimator, lambda X: X
    steps = [step for _, step in estimator.steps[:-1]]
    for step in steps:
        if hasattr(step, "fit_resample"):
            raise UpweightError(
                f"the pipeline's step {type(step).__name__} changes which examples are trained on -> resample first, "
                "and pass the resampled data and the last step"
            )
    inner, before = _final_step(estimator.steps[-1][1])
    transformers = estimator[:-1]
    return inner, lambda X: before(transformers.transform(X) if len(steps) else X)


def _matrix(X: Any) -> Tensor:
    if hasattr(X, "toarray"):
        raise UpweightError("X is sparse, expected an array -> X.toarray()")
    try:
        values = np.array(X, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UpweightError(
            f"X is not numeric ({str(error)[:80]}) -> encode it, or pass the whole pipeline that does"
        ) from error
    if values.ndim != 2:
        raise UpweightError(f"X has shape {values.shape}, expected [n, features] -> X.reshape(n, -1)")
    return torch.as_tensor(values)


def _numbers(labels: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Class numbers [n] of labels."""
    if labels.ndim != 1:
        raise UpweightError(f"y has shape {labels.shape}, expected one label an example -> y.ravel()")
    position = {label: k for k, label in enumerate(classes.tolist())}
    unknown = sorted({str(label) for label in labels.tolist() if label not in position})
    if unknown:
        raise UpweightError(
            f"y has the labels {unknown[:5]}, expected some of {list(position)[:10]} -> drop examples of classes that "
            "the estimator was not fitted with"
        )
    return np.array([position[label] for label in labels.tolist()], dtype=np.int64)


def _relative_gradient(converted: SklearnModel, train: tuple[Tensor, Tensor]) -> float:
    """``|grad J| / rms_i |grad l_i|``, the penalty in J."""
    examples = Examples(train)
    tracker = Tracker(converted.model, converted.task, examples)
    mean = {name: torch.zeros_like(p) for name, p in tracker.parameters.items()}
    squared = 0.0
    for rows in examples.batches(GRADIENT_BATCH):
        gradients = tracker.train(rows.batch, range(rows.start, rows.stop))
        for name, layer in tracker.layers.items():
            dense = gradients[name].dense()
            squared += float(dense.square().sum()) / examples.n
            for parameter, total in layer.to_parameters(dense.sum(0, keepdim=True) / examples.n).items():
                mean[parameter] += total[0]
    for pattern, coefficient in converted.l2_for(examples.n).items():
        for name, parameter in tracker.parameters.items():
            if re.search(pattern, name):
                mean[name] += coefficient * parameter.detach()
    norm = math.sqrt(sum(float(total.square().sum()) for total in mean.values()))
    return norm / math.sqrt(squared) if squared > 0 else 0.0
