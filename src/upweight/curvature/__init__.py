"""What stands in for the Hessian, and how to apply its damped inverse."""

from upweight.curvature.curvature import Curvature, Inverse
from upweight.curvature.damping import Damping
from upweight.curvature.fit import KINDS, fit_curvature

__all__ = ["KINDS", "Curvature", "Damping", "Inverse", "fit_curvature"]
