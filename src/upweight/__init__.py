"""Trace what a trained PyTorch model predicts to the training examples that made it predict so."""

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
    from upweight.testing import check_attributor

__version__ = version("upweight")

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
    "Scores",
    "SelfInfluence",
    "SklearnModel",
    "StoreError",
    "Task",
    "TracIn",
    "UpweightError",
    "__version__",
    "check_attributor",
    "from_sklearn",
]


def __getattr__(name: str) -> Any:
    if name == "check_attributor":  # only tests need it
        from upweight.testing import check_attributor

        return check_attributor
    raise AttributeError(f"module 'upweight' has no attribute {name!r}")
