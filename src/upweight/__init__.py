"""Trace what a trained PyTorch model predicts to the training examples that made it predict so."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upweight.attributors.banzhaf import BanzhafInfluence
    from upweight.attributors.baselines.aum import AUM
    from upweight.attributors.baselines.bm25 import BM25
    from upweight.attributors.baselines.confident_learning import confident_learning
    from upweight.attributors.baselines.el2n import EL2N
    from upweight.attributors.baselines.embedding import EmbeddingSimilarity
    from upweight.attributors.baselines.grad_norm import GradNorm
    from upweight.attributors.baselines.loss import Loss
    from upweight.attributors.baselines.margin import Margin
    from upweight.attributors.baselines.random_scores import Random
    from upweight.attributors.baselines.same_class import SameClass
    from upweight.attributors.damping_curve import damping_curve
    from upweight.attributors.datamodel import Datamodel
    from upweight.attributors.ensemble import Ensemble
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
    from upweight.evaluate import RetrainingBank, label_noise, lds, leave_one_out, removal_curve
    from upweight.experiment import Experiment
    from upweight.explorer.decisions import Decisions
    from upweight.integrations.sklearn import SklearnModel, from_sklearn
    from upweight.repair.amend import amend, relabel, reweight, unlearn
    from upweight.repair.audit import audit
    from upweight.repair.issue_table import IssueTable
    from upweight.repair.result import Repair
    from upweight.repair.verification import Verification
    from upweight.repair.verify import verify
    from upweight.scores import Ranking, Scores, SelfInfluence
    from upweight.task import BinaryClassification, Classification, Regression, Task
    from upweight.testing import check_attributor

__version__ = version("upweight")

# Imported when first asked for: `upweight --help` needs no PyTorch, and attribution not what evaluation brings.
_LAZY = {
    "AUM": "upweight.attributors.baselines.aum",
    "BM25": "upweight.attributors.baselines.bm25",
    "BanzhafInfluence": "upweight.attributors.banzhaf",
    "BinaryClassification": "upweight.task",
    "Cache": "upweight.cache",
    "CacheMismatchError": "upweight.errors",
    "Classification": "upweight.task",
    "Damping": "upweight.curvature",
    "Datamodel": "upweight.attributors.datamodel",
    "Decisions": "upweight.explorer.decisions",
    "EL2N": "upweight.attributors.baselines.el2n",
    "EmbeddingSimilarity": "upweight.attributors.baselines.embedding",
    "Ensemble": "upweight.attributors.ensemble",
    "Examples": "upweight.data",
    "Experiment": "upweight.experiment",
    "Functional": "upweight.attributors.functional",
    "GradCos": "upweight.attributors.gradient_similarity",
    "GradDot": "upweight.attributors.gradient_similarity",
    "GradNorm": "upweight.attributors.baselines.grad_norm",
    "GroupEffect": "upweight.attributors.group",
    "Influence": "upweight.attributors.influence",
    "IssueTable": "upweight.repair.issue_table",
    "Loss": "upweight.attributors.baselines.loss",
    "Margin": "upweight.attributors.baselines.margin",
    "Random": "upweight.attributors.baselines.random_scores",
    "Ranking": "upweight.scores",
    "Regression": "upweight.task",
    "Repair": "upweight.repair.result",
    "Representer": "upweight.attributors.representer",
    "RetrainingBank": "upweight.evaluate",
    "SameClass": "upweight.attributors.baselines.same_class",
    "Scores": "upweight.scores",
    "SelfInfluence": "upweight.scores",
    "SklearnModel": "upweight.integrations.sklearn",
    "StoreError": "upweight.errors",
    "Task": "upweight.task",
    "TracIn": "upweight.attributors.tracin",
    "UpweightError": "upweight.errors",
    "audit": "upweight.repair.audit",
    "Verification": "upweight.repair.verification",
    "amend": "upweight.repair.amend",
    "check_attributor": "upweight.testing",
    "confident_learning": "upweight.attributors.baselines.confident_learning",
    "damping_curve": "upweight.attributors.damping_curve",
    "from_sklearn": "upweight.integrations.sklearn",
    "label_noise": "upweight.evaluate",
    "lds": "upweight.evaluate",
    "leave_one_out": "upweight.evaluate",
    "relabel": "upweight.repair.amend",
    "removal_curve": "upweight.evaluate",
    "reweight": "upweight.repair.amend",
    "unlearn": "upweight.repair.amend",
    "verify": "upweight.repair.verify",
}

__all__ = [
    "AUM",
    "BM25",
    "BanzhafInfluence",
    "BinaryClassification",
    "Cache",
    "CacheMismatchError",
    "Classification",
    "Damping",
    "Datamodel",
    "Decisions",
    "EL2N",
    "EmbeddingSimilarity",
    "Ensemble",
    "Examples",
    "Experiment",
    "Functional",
    "GradCos",
    "GradDot",
    "GradNorm",
    "GroupEffect",
    "Influence",
    "IssueTable",
    "Loss",
    "Margin",
    "Random",
    "Ranking",
    "Regression",
    "Repair",
    "Representer",
    "RetrainingBank",
    "SameClass",
    "Scores",
    "SelfInfluence",
    "SklearnModel",
    "StoreError",
    "Task",
    "TracIn",
    "UpweightError",
    "Verification",
    "__version__",
    "audit",
    "amend",
    "check_attributor",
    "confident_learning",
    "damping_curve",
    "from_sklearn",
    "label_noise",
    "lds",
    "leave_one_out",
    "relabel",
    "removal_curve",
    "reweight",
    "unlearn",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'upweight' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
