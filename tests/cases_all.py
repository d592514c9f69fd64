"""Every case of every family, how to parametrise over them, and a tracker for each."""

from functools import cache

import cases_attention
import cases_basic
import cases_convolution
import cases_norms
import cases_parameters
import cases_sequence
import cases_sharing
import pytest
import torch
from cases import Case
from torch import Tensor

from upweight.data import Examples
from upweight.gradients import Gradients, Tracker

FAMILIES = (
    cases_basic,
    cases_parameters,
    cases_norms,
    cases_convolution,
    cases_sequence,
    cases_attention,
    cases_sharing,
)
CASES: list[Case] = [case for family in FAMILIES for case in family.CASES]
assert len({case.name for case in CASES}) == len(CASES)
EXACT = [case for case in CASES if case.autocast is None]
WITH_OUTPUTS = [case for case in EXACT if case.kind != "functions"]
N = 5
"""Examples of a case's batch."""


def each(cases: list[Case]):
    """Parametrise over cases, by name."""
    parameters = []
    for case in cases:
        marks = [pytest.mark.filterwarnings(f"ignore:{case.warning}")] if case.warning else []
        parameters.append(pytest.param(case, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", parameters)


def named(*names: str):
    """Parametrise over the cases of these names."""
    found = [case for case in CASES if case.name in names]
    assert len(found) == len(names)
    return each(found)


@cache
def track(case: Case, dtype: torch.dtype = torch.float64, measurement: str = "loss"):
    """A case's model, batch and tracker, shared by all tests of a process."""
    model, batch = case.build(dtype), case.batch(N, dtype)
    tracker = Tracker(model, case.task(measurement), Examples(batch), case.parameters, case.autocast)
    return model, batch, tracker


def by_parameter(tracker: Tracker, gradients: Gradients) -> dict[str, Tensor]:
    """{parameter: [batch, *shape]}."""
    found = {}
    for name, layer in tracker.layers.items():
        found.update(layer.to_parameters(gradients[name].dense()))
    return {name: found[name] for name in tracker.parameters}
