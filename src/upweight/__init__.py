"""Trace what a trained PyTorch model predicts to the training examples that made it predict so."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from upweight.attributors.functional import Functional
from upweight.attributors.gradient_similarity import GradCos, GradDot
from upweight.attributors.group import GroupEffect
from upweight.attributors.influence import Influence
from upweight.attributors.representer import Representer
from upweight.attributors.tracin import TracIn
from upweight.cache import Cache
from upweight.curvature import Damping
from upweight.data import Examples
from upweight.errors import CacheMismatchError, StoreError, UpweightError
from upweight.integrations.sklearn import SklearnModel, from_sklearn
from upweight.scores import Ranking, Scores, SelfInfluence
from upweight.task import BinaryClassification, Classification, Regression, Task

if TYPE_CHECKING:
    from upweight.attributors.damping_curve import damping_curve
    from upweight.evaluate import RetrainingBank, label_noise, lds, leave_one_out, removal_curve
    from upweight.testing import check_attributor

__version__ = version("upweight")

# Imported when first asked for: attribution alone does without what evaluation and its tests bring.
_LAZY = {
    "check_attributor": "upweight.testing",
    "damping_curve": "upweight.attributors.damping_curve",
    "RetrainingBank": "upweight.evaluate",
    "label_noise": "upweight.evaluate",
    "lds": "upweight.evaluate",
    "leave_one_out": "upweight.evaluate",
    "removal_curve": "upweight.evaluate",
}

__all__ = [
    "BinaryClassification",
    "Cache",
    "CacheMismatchError",
    "Classification",
    "Damping",
    "Examples",
    "Functional",
    "GradCos",
    "GradDot",
    "GroupEffect",
    "Influence",
    "Ranking",
    "Regression",
    "Representer",
    "RetrainingBank",
    "Scores",
    "SelfInfluence",
    "SklearnModel",
    "StoreError",
    "Task",
    "TracIn",
    "UpweightError",
    "__version__",
    "check_attributor",
    "damping_curve",
    "from_sklearn",
    "label_noise",
    "lds",
    "leave_one_out",
    "removal_curve",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'upweight' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
