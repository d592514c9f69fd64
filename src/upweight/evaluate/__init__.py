"""Are attributions right? Held against models that were really retrained."""

from upweight.evaluate import subsets
from upweight.evaluate.bank import BankReport, RetrainingBank
from upweight.evaluate.bootstrap import Estimate
from upweight.evaluate.ceiling import NoiseCeiling, noise_ceiling
from upweight.evaluate.lds import LDS, lds, lds_difference
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.subsets import Subsets

__all__ = [
    "BankReport",
    "Estimate",
    "LDS",
    "NoiseCeiling",
    "Outcomes",
    "RetrainingBank",
    "Subsets",
    "lds",
    "lds_difference",
    "noise_ceiling",
    "subsets",
]
