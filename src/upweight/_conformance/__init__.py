"""The laws behind `upweight.testing.check_attributor`."""

from upweight._conformance.errors import ERROR_LAWS
from upweight._conformance.laws import SCORE_LAWS
from upweight._conformance.problem import Inapplicable, Measured, Problem, Violated
from upweight._conformance.surroundings import SURROUNDING_LAWS

LAWS = {**SCORE_LAWS, **SURROUNDING_LAWS, **ERROR_LAWS}
"""{name of a check: the law}: functions of a `Problem` that return, or raise `Violated` or `Inapplicable`."""

__all__ = ["LAWS", "Inapplicable", "Measured", "Problem", "Violated"]
