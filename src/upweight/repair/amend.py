"""Take a change of the training set into a trained model without training it again.

unlearn   examples go                  relabel    examples get other labels
reweight  examples get other weights   amend      any of these at once
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from upweight.attributors.evidence import library_versions
from upweight.budget import batch_size_for, parse_memory
from upweight.curvature.l2 import describe_l2
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters
from upweight.repair import steps
from upweight.repair.change import Change, Weighted, changed, read_change, selected
from upweight.repair.descent import Descent, change_gradient
from upweight.repair.head import find_head
from upweight.repair.inverse import default_curvature
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
from upweight.repair.objective import Objective, by_parameter, losses_of, summed_gradient
from upweight.repair.options import Options, Settings, read_options
from upweight.repair.result import Repair
from upweight.repair.vectors import Vector, combine, norm
from upweight.task import Task

SLOWEST_PASS = 512


def unlearn(
    model: nn.Module,
    task: Task,
    train: Any,
    remove: Any,
    *,
    validation: Any = None,
    test: Any = None,
    **options: Unpack[Options],
) -> Repair:
    """A model that has forgotten these training examples, without training it again.

    The parameters move by ``+(1/N) (H' + damping I)^-1 sum_removed g_i`` with the curvature H' of what stays
    (Newton), or by another of the `Options` methods.

    Args:
        model: the trained model, in eval mode. It stays as it is.
        task: its training loss.
        train: the data it was trained on, in any form that `Examples` reads; `Examples` themselves to give ids.
        remove: ids of the examples to forget (positions, if the data has no ids of its own).
        validation: held-out data that chooses the step size; without it, the changed training objective does.
        test: data whose losses are reported before and after; it decides nothing.
        options: see `upweight.repair.options.Options`.

    Returns:
        `Repair`: the new model, and the evidence.

    Raises:
        UpweightError: what is wrong with the model, the data, the ids or the options, in one line.

    Cost: the curvature's fit, one pass over the training data for the gradient and a few forward passes for the step
        size
    and the evidence.

    Fails when: the network is far from convex in the change (much is removed, or training was short): the trust
    ratio and the residual gradient then say so, and `verify` says how far the result is from real retraining.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(30, 2, dtype=torch.float64)
        >>> y = x @ torch.ones(2, 1, dtype=torch.float64) + torch.randn(30, 1)
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> _ = model.weight.data.copy_(torch.linalg.lstsq(x, y).solution.T)
        >>> repair = uw.unlearn(model, uw.Regression(), (x, y), [3, 5, 7], damping=0.0)
        >>> keep = [i for i in range(30) if i not in (3, 5, 7)]
        >>> retrained = torch.linalg.lstsq(x[keep], y[keep]).solution.T
        >>> bool((repair.model.weight - retrained).abs().max() < 1e-12)
        True

    Source: "Certified Data Removal from Machine Learning Models" (arXiv 1911.03030), "Machine Unlearning of Features
        and
    Labels" (arXiv 2108.11577).
    """
    return amend(model, task, train, remove=remove, validation=validation, test=test, **options)


def relabel(
    model: nn.Module,
    task: Task,
    train: Any,
    labels: Mapping[Any, Any],
    *,
    validation: Any = None,
    test: Any = None,
    **options: Unpack[Options],
) -> Repair:
    """A model as if these training examples had had other labels, without training it again.

    The parameters move by ``+(1/n) (H' + damping I)^-1 sum_i (g_i - g~_i)``, with g~ the gradient at the new label.

    Args:
        model: the trained model, in eval mode. It stays as it is.
        task: its training loss.
        train: the data it was trained on, with the labels it was trained on.
        labels: {id: new label}, class numbers or target values.
        validation: held-out data that chooses the step size: that of its lowest loss.
        test: data whose losses are reported before and after; it decides nothing.
        options: see `upweight.repair.options.Options`.

    Returns:
        `Repair`: the new model, and the evidence.

    Raises:
        UpweightError: what is wrong with the model, the data, the labels or the options, in one line.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(40, 2)
        >>> y = (x[:, 0] > 0).long()
        >>> y[:4] = 1 - y[:4]
        >>> model = torch.nn.Linear(2, 2)
        >>> optimizer = torch.optim.LBFGS(model.parameters(), max_iter=50)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = torch.nn.functional.cross_entropy(model(x), y)
        ...     loss = loss + 0.005 * sum((p**2).sum() for p in model.parameters())
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> repair = uw.relabel(
        ...     model, uw.Classification(), (x, y), {i: int(1 - y[i]) for i in range(4)}, l2=0.01
        ... )
        >>> repaired = repair.evidence["groups"]["repaired"]
        >>> bool(repaired["loss_after"] < repaired["loss_before"])
        True

    Source: "Machine Unlearning of Features and Labels" (arXiv 2108.11577).
    """
    return amend(model, task, train, labels=labels, validation=validation, test=test, **options)


def reweight(
    model: nn.Module,
    task: Task,
    train: Any,
    weights: Mapping[Any, float],
    *,
    validation: Any = None,
    test: Any = None,
    **options: Unpack[Options],
) -> Repair:
    """A model as if these training examples had counted otherwise: 0 removes one, 0.5 is a soft removal, 2 doubles it.

    Args:
        model: the trained model, in eval mode. It stays as it is.
        task: its training loss.
        train: the data it was trained on.
        weights: {id: weight >= 0}.
        validation: held-out data that chooses the step size: that of its lowest loss.
        test: data whose losses are reported before and after; it decides nothing.
        options: see `upweight.repair.options.Options`.

    Returns:
        `Repair`: the new model, and the evidence.

    Raises:
        UpweightError: what is wrong with the model, the data, the weights or the options, in one line.
    """
    return amend(model, task, train, weights=weights, validation=validation, test=test, **options)


def amend(
    model: nn.Module,
    task: Task,
    train: Any,
    *,
    remove: Any = None,
    labels: Mapping[Any, Any] | None = None,
    weights: Mapping[Any, float] | None = None,
    validation: Any = None,
    test: Any = None,
    **options: Unpack[Options],
) -> Repair:
    """Removals, new labels and new weights at once, as a review of the data brings them: see `unlearn` and `relabel`.

    Args:
        model: the trained model, in eval mode. It stays as it is.
        task: its training loss.
        train: the data it was trained on.
        remove: ids to forget.
        labels: {id: new label}.
        weights: {id: new weight}.
        validation: held-out data that chooses the step size.
        test: data whose losses are reported before and after; it decides nothing.
        options: see `upweight.repair.options.Options`.

    Returns:
        `Repair`: the new model, and the evidence.

    Raises:
        UpweightError: what is wrong with the model, the data, the change or the options, in one line.
    """
    started, worked = time.perf_counter(), time.process_time()
    settings = read_options(options)
    if not isinstance(task, Task):
        raise UpweightError(
            f"task is {type(task).__name__}, expected a Task -> uw.Classification() for example"
        )
    examples = train if isinstance(train, Examples) else Examples(train)
    change = read_change(examples, remove, labels, weights)
    change.divisor(settings.convention)
    copied = copied_model(model)
    with _as_it_was(model, copied):
        work = _Work(copied, task, examples, change, settings, _opened(validation, "validation"))
        outcome = work.run()
        seconds, processor = time.perf_counter() - started, time.process_time() - worked
        groups = work.groups(_opened(test, "test"))
        evidence = work.evidence(outcome, groups)
    return Repair(
        model=copied,
        change=change,
        method=settings.method,
        evidence={
            **evidence,
            "seconds": round(seconds, 3),
            "processor_seconds": round(processor, 3),
            "evidence_seconds": round(time.perf_counter() - started - seconds, 3),
            "fingerprints": {
                "before": model_fingerprint(model),
                "after": model_fingerprint(copied),
                "train": examples.fingerprint(),
            },
            "versions": library_versions(),
        },
    )


@dataclass(frozen=True)
class _Outcome:
    """What the method did: where it was on its objective, and how its systems were solved."""

    descent: Descent
    solver: dict[str, Any]


class _Work:
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
        self.batch_size = settings.batch_size or min(SLOWEST_PASS, chosen)
        self._check_labels()
        self.start = {name: p.detach().double().clone() for name, p in self.tracker.parameters.items()}

    def run(self) -> _Outcome:
        """Move the model."""
        held_out = None if self.validation is None else self._held_out
        if self.settings.method != "last_layer":
            return self._solve(self.model, self.tracker, self.examples, self.settings, held_out)
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

    def _solve(
        self,
        model: nn.Module,
        tracker: Tracker,
        examples: Examples,
        settings: Settings,
        held_out: Callable[[], Tensor] | None,
    ) -> _Outcome:
        change = self.change
        after = changed(examples, change)
        task = Weighted(self.task) if change.weights else self.task
        divisor = change.divisor(settings.convention)
        objective = Objective(
            tracker, task, after, divisor, by_parameter(settings.l2, tracker), self.batch_size
        )
        descent = Descent(
            objective,
            self._own_gradient(tracker, examples, objective),
            settings.finish,
            held_out,
            not change.labels and not change.weights,
            settings.step_size,
        )
        problem = steps.Problem(descent, settings, model, task, examples, after, self.task)
        return _Outcome(descent, steps.run(problem))

    def _own_gradient(self, tracker: Tracker, examples: Examples, objective: Objective) -> Vector:
        """What the change alone does to the gradient at the trained weights."""
        change, task, size = self.change, self.task, self.batch_size
        leaving, entering = [], []
        if change.removed:
            leaving.append(summed_gradient(tracker, task, selected(examples, change.removed), size))
        if change.labels or change.weights:
            moved = sorted({*change.labels, *change.weights})
            leaving.append(summed_gradient(tracker, task, selected(examples, moved), size))
            new = changed(selected(examples, moved), _among(change, moved))
            weighted = Weighted(task) if change.weights else task
            entering.append(summed_gradient(tracker, weighted, new, size))
        return change_gradient(leaving, entering, objective.penalty_gradient(), change.n, objective.divisor)

    def _held_out(self) -> Tensor:
        assert self.validation is not None
        return losses_of(self.tracker, self.task, self.validation, self.batch_size)

    # Evidence ------------------------------------------------------------------------------------------------------

    def groups(self, test: Examples | None) -> dict[str, tuple[Examples, int]]:
        """{group: (its examples, of how many)}."""
        found: dict[str, tuple[Examples, int]] = {}
        for name, positions in {**self.change.groups, "retained": self.change.untouched}.items():
            if not positions:
                continue
            few = _spread(sorted(positions))
            found[name] = selected(self.examples, few, self.change.labels), len(positions)
        for name, data in (("validation", self.validation), ("test", test)):
            if data is not None:
                few = data if data.n <= MOST else selected(data, _spread(range(data.n)))
                found[name] = few, data.n
        return found

    def evidence(self, outcome: _Outcome, groups: Mapping[str, tuple[Examples, int]]) -> dict[str, Any]:
        """JSON-able."""
        descent, tracker, task, size = outcome.descent, self.tracker, self.task, self.batch_size
        objective = descent.objective
        proof = certificate(descent, task, size)
        residual_after = norm(objective.gradient())
        end = {name: p.detach().double().clone() for name, p in tracker.parameters.items()}
        after = {name: measure(tracker, task, data, size) for name, (data, _) in groups.items()}
        u = combine(end, self.start, -1)
        self._place(self.start)
        try:
            before = {name: measure(tracker, task, data, size) for name, (data, _) in groups.items()}
            predicted = {
                name: predicted_change(tracker, task, data, u, size) for name, (data, _) in groups.items()
            }
        finally:
            self._place(end)
        _check_finite(after)
        settings, records = self.settings, descent.records
        return {
            "what": self.change.describe(),
            "method": settings.method,
            "convention": settings.convention,
            "finish": settings.finish,
            "l2": describe_l2(settings.l2),
            "solver": outcome.solver,
            "steps": records,
            "step_size_from": "the user"
            if settings.step_size is not None
            else "held-out data"
            if self.validation is not None and settings.method != "trust_region"
            else "the changed training objective",
            "objective": descent.summary(),
            "residual_gradient_norm": {
                "before": norm(descent.full),
                "after": residual_after,
                "training_left": norm(combine(descent.full, descent.own, -1)),
            },
            "groups": {
                name: group_evidence(before[name], after[name], predicted[name], of)
                for name, (_, of) in groups.items()
            },
            "parameters": parameter_evidence(self.start, end),
            "buffers_kept": kept_buffers(self.model),
            "tied": tied_names(self.model),
            "certificate": proof.summary() if proof is not None else None,
            "coverage": {
                "parameters": tracker.coverage.parameters,
                "squared_gradient_norm": tracker.coverage.squared_norm,
            },
        }

    def _place(self, values: Vector) -> None:
        from upweight.repair.vectors import place

        place(self.tracker.parameters, values)

    def _check_labels(self) -> None:
        """The new labels must be ones that the task can have, before any time is spent."""
        if not self.change.labels:
            return
        positions = sorted(self.change.labels)
        new = selected(self.examples, positions, self.change.labels)
        self.task.check_targets(new.take(range(new.n)), new.ids, self.tracker.output_shape)


def copied_model(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model, without gradients."""
    if not isinstance(model, nn.Module):
        raise UpweightError(
            f"the model is {type(model).__name__}, expected a torch.nn.Module -> uw.from_sklearn converts "
            "scikit-learn's"
        )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise UpweightError(
            f"the model cannot be copied ({type(error).__name__}: {str(error)[:150]}) -> remove what cannot (old-style "
            "weight_norm, tensors with a graph behind them), or give a copy of your own making"
        ) from error
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def tied_names(model: nn.Module) -> list[list[str]]:
    """Names that share one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@contextmanager
def _as_it_was(model: nn.Module, copied: nn.Module) -> Iterator[None]:
    """Buffers of the copy stay as they were, whatever forward passes do to them."""
    buffers = {name: b.detach().clone() for name, b in copied.named_buffers()}
    try:
        yield
    finally:
        for name, b in copied.named_buffers():
            if name in buffers and buffers[name].shape == b.shape:
                b.copy_(buffers[name])


def _among(change: Change, positions: Sequence[int]) -> Change:
    """The change of labels and weights, by place among these positions."""
    place = {p: k for k, p in enumerate(positions)}
    return Change(
        len(positions),
        labels={place[p]: label for p, label in change.labels.items()},
        weights={place[p]: w for p, w in change.weights.items()},
    )


def _spread(positions: Sequence[int]) -> list[int]:
    step = max(1, -(-len(positions) // MOST))
    return list(positions[::step])


def _opened(data: Any, what: str) -> Examples | None:
    if data is None:
        return None
    try:
        return data if isinstance(data, Examples) else Examples(data)
    except UpweightError as error:
        raise UpweightError(f"{what}: {error}") from error


def _check_finite(measured: Mapping[str, Measured]) -> None:
    for name, one in measured.items():
        if not bool(one.losses.isfinite().all()):
            raise UpweightError(
                f"{int((~one.losses.isfinite()).sum())} of {len(one.losses)} losses of the {name} examples are NaN or "
                "infinite after the repair -> raise the damping, or let the step size be chosen (step_size=None)"
            )
