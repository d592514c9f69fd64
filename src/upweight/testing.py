"""`check_attributor`: the laws that every attributor must obey, ours or anybody's, run on a small problem.

A law is checked from the outside, through the four calls that all attributors share (``__init__``, ``fit``,
``attribute``, ``self_influence``), against nothing but other answers of the same attributor and plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from upweight._conformance import LAWS, Inapplicable, Measured, Problem, Violated
from upweight.errors import UpweightError
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task

__all__ = ["AttributorLike", "Check", "ConformanceError", "ConformanceReport", "check_attributor"]

Status = Literal["passed", "failed", "not applicable"]


class AttributorLike(Protocol):
    """What `check_attributor` calls."""

    def fit(self, train: Any) -> Any:
        """Learn what is needed from the training data."""
        ...

    def attribute(self, query: Any) -> Scores:
        """Score every training example for every query."""
        ...

    def self_influence(self) -> SelfInfluence:
        """Score every training example for itself, or raise an `UpweightError` that says why there is no such score."""
        ...


class ConformanceError(UpweightError, AssertionError):
    """An attributor breaks a law that all attributors obey."""


@dataclass(frozen=True)
class Check:
    """One law, and how the attributor fared.

    Attributes:
        name: its name, for `skip`.
        law: what must hold, in words.
        status: ``"passed"``, ``"failed"`` or ``"not applicable"``.
        detail: what was found, or why the law does not apply.
        error: the largest relative error that was measured, or None where nothing is measured.
        tolerance: what it may be.
    """

    name: str
    law: str
    status: Status
    detail: str = ""
    error: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        measured = "" if self.error is None else f" (error {self.error:.1e}, tolerance {self.tolerance:.0e})"
        return f"{self.status:14}  {self.name}{measured}{': ' + self.detail if self.detail else ''}"


@dataclass(frozen=True)
class ConformanceReport:
    """All checks of one attributor, in order; print it, or look checks up by name.

    Attributes:
        attributor: name of its class.
        checks: one per law.
    """

    attributor: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "failed"]

    def __getitem__(self, name: str) -> Check:
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(f"there is no check {name!r}, only {[check.name for check in self.checks]}")

    def __str__(self) -> str:
        return "\n".join([f"{self.attributor}: {self._summary()}", *(f"  {check}" for check in self.checks)])

    def __rich__(self) -> Table:
        table = Table(title=f"{self.attributor}: {self._summary()}", title_justify="left")
        for column in ("check", "result", "error", "what must hold, what was found"):
            table.add_column(column)
        colours = {"passed": "green", "failed": "bold red", "not applicable": "dim"}
        for check in self.checks:
            colour = colours[check.status]
            error = "" if check.error is None else f"{check.error:.1e}"
            words = escape(check.law + (f" [{check.detail}]" if check.detail else ""))
            table.add_row(check.name, f"[{colour}]{check.status}[/]", error, words)
        return table

    def print(self) -> None:
        """Print the table of checks."""
        Console().print(self)

    def _summary(self) -> str:
        counts = {s: sum(c.status == s for c in self.checks) for s in ("passed", "failed", "not applicable")}
        return ", ".join(f"{count} {status}" for status, count in counts.items())


def check_attributor(
    make: Callable[[nn.Module, Task], AttributorLike],
    train: Any = None,
    query: Any = None,
    *,
    model: nn.Module | None = None,
    task: Task | None = None,
    skip: Collection[str] = (),
    tolerance: float | None = None,
    raise_on_failure: bool = True,
) -> ConformanceReport:
    """Run an attributor through the laws that every attributor obeys.

    What an attributor claims is read off its results: only scores with a unit must be predicted changes, only one
    that offers ``per_layer=`` must have layers that add up, only one that has ``with_damping`` a limit of large
    damping. A law that does not apply is reported as such, with the reason.

    Args:
        make: ``(model, task) -> attributor``, unfitted. It is called many times, also with models of which a part is
            frozen, so let it derive what it needs (checkpoints, say) from the model that it is given.
        train: training data as tensors or arrays (``(inputs, targets)`` or a dict); a small classification problem
            if None. Eight to thirty examples will do.
        query: queries in the same form, of another number than the training examples.
        model: the model that belongs to the data, in eval mode.
        task: its task.
        skip: names of checks to leave out.
        tolerance: largest relative error of an equality; 1e-8 for models in float64 and 5e-3 for others if None.
        raise_on_failure: raise if any check fails; False to look at the report instead.

    Returns:
        The report.

    Raises:
        ConformanceError: a check failed; an `UpweightError` and an `AssertionError` that names every failure.
        UpweightError: the arguments do not fit together.

    Cost: about forty fits on the data given.

    Example:
        >>> import upweight as uw
        >>> report = uw.check_attributor(uw.GradDot)
        >>> report.passed, report["sign"].status, report["damping limit"].status
        (True, 'passed', 'not applicable')
    """
    problem = Problem.of(make, train, query, model, task, tolerance)
    if unknown := set(skip) - set(LAWS):
        raise UpweightError(
            f"skip names {sorted(unknown)}, but the checks are {list(LAWS)} -> use their names"
        )
    checks = tuple(
        Check(name, _words(law), "not applicable", "left out by the caller")
        if name in skip
        else _run(name, law, problem)
        for name, law in LAWS.items()
    )
    report = ConformanceReport(problem.attributor_name(), checks)
    if raise_on_failure and not report.passed:
        failures = "; ".join(f"[{check.name}] {check.detail}" for check in report.failures)
        raise ConformanceError(
            f"{report.attributor} fails {len(report.failures)} of {len(checks)} checks: {failures} -> print the report "
            "of check_attributor(..., raise_on_failure=False)"
        )
    return report


def _run(name: str, law: Callable[[Problem], Measured | None], problem: Problem) -> Check:
    try:
        measured = law(problem)
    except Inapplicable as reason:
        return Check(name, _words(law), "not applicable", str(reason))
    except Violated as failure:
        return Check(name, _words(law), "failed", str(failure), failure.error, failure.tolerance)
    except Exception as error:  # an attributor may fail in any way: that is a finding too
        first = (str(error).splitlines() or [""])[0][:200]
        return Check(name, _words(law), "failed", f"raised {type(error).__name__}: {first}")
    if measured is None:
        return Check(name, _words(law), "passed")
    return Check(name, _words(law), "passed", "", measured.error, measured.tolerance)


def _words(law: Callable[..., object]) -> str:
    return " ".join((law.__doc__ or "").split())
