"""One repair of a copied model: from the change and the settings to a moved model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from upweight.budget import batch_size_for, parse_memory
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters
from upweight.repair import steps
from upweight.repair.change import Change, Weighted, changed, selected
from upweight.repair.descent import Descent, change_gradient
from upweight.repair.head import find_head
from upweight.repair.inverse import default_curvature
from upweight.repair.objective import Objective, by_parameter, losses_of, summed_gradient
from upweight.repair.options import Settings
from upweight.repair.tail import find_tail
from upweight.repair.vectors import Vector
from upweight.task import Task

MOST_IN_A_PASS = 128
"""Examples a pass: larger batches gain nothing on a CPU, and on large images their activations cost page faults."""


@dataclass(frozen=True)
class Outcome:
    """What the method did: where it was on its objective, and how its systems were solved."""

    descent: Descent
    solver: dict[str, Any]


class Work:
    """One repair of a copied model."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        examples: Examples,
        change: Change,
        settings: Settings,
        validation: Examples | None,
    ) -> None:
        self.model, self.task, self.examples, self.change = model, task, examples, change
        self.validation = validation
        head_alone = settings.method == "last_layer"
        if head_alone and settings.parameters is not None:
            raise UpweightError(
                "parameters= does not go with method='last_layer', which names them -> leave it out"
            )
        if head_alone:
            from upweight.attributors.last_layer import last_linear

            names = last_linear(model, task, examples)
            settings = replace(settings, parameters=lambda name: name in names)
        self.tracker = Tracker(model, task, examples, settings.parameters)
        if settings.curvature is None:
            settings = replace(settings, curvature=default_curvature(task, self.tracker.parameters))
        self.settings = settings
        probe = self.tracker.train(examples.take([0]), examples.ids[:1])
        chosen = batch_size_for(float(max(1, probe.nbytes)), examples.n, parse_memory(settings.memory))
        self.batch_size = settings.batch_size or min(MOST_IN_A_PASS, chosen)
        self._check_labels()
        self.start = {name: p.detach().double().clone() for name, p in self.tracker.parameters.items()}

    def run(self) -> Outcome:
        """Move the model."""
        held_out = None if self.validation is None else self._held_out
        if self.settings.method != "last_layer":
            return self._solve(*self._part(), self.settings, held_out)
        head = find_head(self.tracker, self.task, self.examples, self.batch_size)
        precise, data = head.in_double()  # its minimum is not to be missed by rounding
        tracker = Tracker(precise, self.task, data)
        own = {
            head.parameter(name): c[None] for name, c in by_parameter(self.settings.l2, self.tracker).items()
        }
        settings = replace(self.settings, parameters=None, l2=from_parameters(tracker.layers, own)[0])

        def moved() -> Tensor:
            head.take(precise)
            return self._held_out()

        outcome = self._solve(precise, tracker, data, settings, None if held_out is None else moved)
        head.take(precise)
        return outcome

    def _part(self) -> tuple[nn.Module, Tracker, Examples]:
        """The model and the data; of a model whose first layers stay as they are, the rest and what goes into it."""
        whole = self.model, self.tracker, self.examples
        if self.settings.parameters is None:
            return whole
        tail = find_tail(self.tracker, self.task, self.examples, self.batch_size, self.settings.memory)
        if tail is None:
            return whole
        return (
            tail.module,
            Tracker(tail.module, self.task, tail.examples, self.settings.parameters),
            tail.examples,
        )

    def _solve(
        self,
        model: nn.Module,
        tracker: Tracker,
        examples: Examples,
        settings: Settings,
        held_out: Callable[[], Tensor] | None,
    ) -> Outcome:
        change = self.change
        after = changed(examples, change)
        task = Weighted(self.task) if change.weights else self.task
        divisor = change.divisor(settings.convention)
        objective = Objective(
            tracker, task, after, divisor, by_parameter(settings.l2, tracker), self.batch_size
        )
        descent = Descent(
            objective,
            objective.sample(settings.search_examples, settings.seed),
            lambda: self._own_gradient(tracker, examples, objective),
            settings.finish,
            held_out,
            not change.labels and not change.weights,
            settings.step_size,
        )
        problem = steps.Problem(descent, settings, model, task, examples, after, self.task)
        return Outcome(descent, steps.run(problem))

    def _own_gradient(self, tracker: Tracker, examples: Examples, objective: Objective) -> Vector:
        """What the change alone does to the gradient at the trained weights."""
        change, task, size = self.change, self.task, self.batch_size
        leaving, entering = [], []
        if change.removed:
            leaving.append(summed_gradient(tracker, task, selected(examples, change.removed), size)[1])
        if change.labels or change.weights:
            moved = sorted({*change.labels, *change.weights})
            leaving.append(summed_gradient(tracker, task, selected(examples, moved), size)[1])
            new = changed(selected(examples, moved), _among(change, moved))
            weighted = Weighted(task) if change.weights else task
            entering.append(summed_gradient(tracker, weighted, new, size)[1])
        return change_gradient(leaving, entering, objective.penalty_gradient(), change.n, objective.divisor)

    def _held_out(self) -> Tensor:
        assert self.validation is not None
        return losses_of(self.tracker, self.task, self.validation, self.batch_size)

    def _check_labels(self) -> None:
        """The new labels must be ones that the task can have, before any time is spent."""
        if not self.change.labels:
            return
        positions = sorted(self.change.labels)
        new = selected(self.examples, positions, self.change.labels)
        self.task.check_targets(new.take(range(new.n)), new.ids, self.tracker.output_shape)


def _among(change: Change, positions: Sequence[int]) -> Change:
    """The change of labels and weights, by place among these positions."""
    place = {p: k for k, p in enumerate(positions)}
    return Change(
        len(positions),
        labels={place[p]: label for p, label in change.labels.items()},
        weights={place[p]: w for p, w in change.weights.items()},
    )
