"""Are attributions right? Held against models that were really retrained."""

from upweight.evaluate import subsets
from upweight.evaluate.bank import RetrainingBank
from upweight.evaluate.bootstrap import Estimate
from upweight.evaluate.brittleness import Brittleness, brittleness, retrain_in
from upweight.evaluate.ceiling import NoiseCeiling, noise_ceiling
from upweight.evaluate.damping import DampingChoice, choose_damping
from upweight.evaluate.label_noise import LabelNoise, label_noise
from upweight.evaluate.lds import LDS, lds, lds_difference
from upweight.evaluate.leave_one_out import LeaveOneOut, leave_one_out
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.records import BankReport
from upweight.evaluate.removal import RemovalCurve, RemovalPlan, plan_removals, removal_curve
from upweight.evaluate.stability import Check, class_detection, model_randomisation, top_k_overlap
from upweight.evaluate.subsets import Subsets

__all__ = [
    "BankReport",
    "Brittleness",
    "Check",
    "DampingChoice",
    "Estimate",
    "LDS",
    "LabelNoise",
    "LeaveOneOut",
    "NoiseCeiling",
    "Outcomes",
    "RemovalCurve",
    "RemovalPlan",
    "RetrainingBank",
    "Subsets",
    "brittleness",
    "choose_damping",
    "class_detection",
    "label_noise",
    "lds",
    "lds_difference",
    "leave_one_out",
    "model_randomisation",
    "noise_ceiling",
    "plan_removals",
    "removal_curve",
    "retrain_in",
    "subsets",
    "top_k_overlap",
]
