"""What a repair did, for the record: losses of groups of examples before and after, and how sure the method was."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from upweight.curvature.l2 import describe_l2
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.repair.change import selected
from upweight.repair.measured import (
    MOST,
    Measured,
    certificate,
    group_evidence,
    kept_buffers,
    measure,
    parameter_evidence,
    predicted_change,
)
from upweight.repair.vectors import combine, norm, place, values_of
from upweight.repair.work import Outcome, Work

WORSE = 2.5
"""Standard errors of the paired differences by which accuracy must fall to be warned of: by chance, once in 160."""


def account(work: Work, outcome: Outcome, test: Examples | None) -> dict[str, Any]:
    """The evidence of a repair, JSON-able.

    Args:
        work: what was repaired; its model is after the repair, and stays so.
        outcome: what the method did.
        test: further data whose losses are reported.

    Cost: a pass with gradients over all of the data before and one after the repair, as far as the method did not
    need them itself, and a few over the groups of at most `MOST` examples.
    """
    descent, tracker, task, size = outcome.descent, work.tracker, work.task, work.batch_size
    groups = _groups(work, test)
    proof = certificate(descent, task, size)
    value, gradient = descent.objective.value_and_gradient()
    end = values_of(tracker.parameters)
    after = {name: measure(tracker, task, data, size) for name, (data, _) in groups.items()}
    u = combine(end, work.start, -1)
    place(tracker.parameters, work.start)
    try:
        before = {name: measure(tracker, task, data, size) for name, (data, _) in groups.items()}
        predicted = {
            name: predicted_change(tracker, task, data, u, size) for name, (data, _) in groups.items()
        }
    finally:
        place(tracker.parameters, end)
    _check_finite(after)
    summary = descent.summary(value)
    _warn(work, outcome, summary, before, after)
    settings, change = work.settings, work.change
    return {
        "what": change.describe(),
        "method": settings.method,
        "convention": settings.convention,
        "finish": settings.finish,
        "l2": describe_l2(settings.l2),
        "solver": outcome.solver,
        "steps": descent.records,
        "step_size_from": _chosen_by(work),
        "search_examples": {"n": descent.search.examples.n, "of": descent.objective.examples.n},
        "objective": summary,
        "residual_gradient_norm": {
            "before": norm(descent.full),
            "after": norm(gradient),
            "training_left": norm(combine(descent.full, descent.own, -1)),
        },
        "groups": {
            name: group_evidence(before[name], after[name], predicted[name], of)
            for name, (_, of) in groups.items()
        },
        "parameters": parameter_evidence(work.start, end),
        "buffers_kept": kept_buffers(work.model),
        "tied": tied_names(work.model),
        "certificate": proof.summary() if proof is not None else None,
        "coverage": {
            "parameters": tracker.coverage.parameters,
            "squared_gradient_norm": tracker.coverage.squared_norm,
        },
    }


def _chosen_by(work: Work) -> str:
    if work.settings.step_size is not None:
        return "the user"
    held_out = work.validation is not None and work.settings.method != "trust_region"
    return "held-out data" if held_out else "the changed training objective"


def _warn(
    work: Work,
    outcome: Outcome,
    summary: Mapping[str, float | None],
    before: Mapping[str, Measured],
    after: Mapping[str, Measured],
) -> None:
    """A repair that did nothing, or harm, says so; not one whose step the user fixed."""
    settings, records, risen = work.settings, outcome.descent.records, summary["actual"]
    held_out = work.validation is not None
    if settings.step_size is not None:
        return
    if records and not any(record["length"] for record in records):
        what = "lowers the held-out loss" if held_out else "has half of its predicted effect"
        _say(
            f"no step of method={settings.method!r} {what}: the model is as it was -> raise damping=, give the l2= "
            "that the training had, or use method='trust_region'"
        )
        return
    if not held_out and risen is not None and risen > 0:
        _say(
            f"the changed training objective rose by {risen:.3g} -> a smaller rate=, more search_examples=, or the l2= "
            "that the training had"
        )
    watched = [name for name in ("validation", "test") if name in before]
    if work.change.removed and not held_out:  # which the test data may well miss
        watched = []
    for name in watched or ["retained"]:
        if name not in before or before[name].correct is None:
            continue
        old, new = (which[name].correct.double() for which in (before, after))  # pyright: ignore[reportOptionalMemberAccess]
        gap = new - old
        if len(gap) > 1 and float(gap.mean()) < -WORSE * float(gap.std()) / math.sqrt(len(gap)):
            _say(
                f"accuracy on the {name} examples fell from {float(old.mean()):.1%} to {float(new.mean()):.1%}, more "
                "than chance explains -> give validation= to choose the step, a larger damping=, or the l2= that the "
                "training had"
                + (" (if many of their own labels are wrong, look at test=)" if name == "retained" else "")
            )


def _say(text: str) -> None:
    warnings.warn(text, stacklevel=6)


def _groups(work: Work, test: Examples | None) -> dict[str, tuple[Examples, int]]:
    """{group: (its examples, of how many)}."""
    found: dict[str, tuple[Examples, int]] = {}
    change = work.change
    for name, positions in {**change.groups, "retained": change.untouched}.items():
        if positions:
            few = _spread(sorted(positions))
            found[name] = selected(work.examples, few, change.labels), len(positions)
    for name, data in (("validation", work.validation), ("test", test)):
        if data is not None:
            few = data if data.n <= MOST else selected(data, _spread(range(data.n)))
            found[name] = few, data.n
    return found


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _spread(positions: Sequence[int]) -> list[int]:
    step = max(1, -(-len(positions) // MOST))
    return list(positions[::step])


def _check_finite(measured: Mapping[str, Measured]) -> None:
    for name, one in measured.items():
        if not bool(one.losses.isfinite().all()):
            raise UpweightError(
                f"{int((~one.losses.isfinite()).sum())} of {len(one.losses)} losses of the {name} examples are NaN or "
                "infinite after the repair -> raise the damping, or let the step size be chosen (step_size=None)"
            )
