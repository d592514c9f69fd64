"""Take a change of the training set into a trained model without training it again.

unlearn   examples go                  relabel    examples get other labels
reweight  examples get other weights   amend      any of these at once
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from typing_extensions import Unpack

from upweight._autocast import without_autocast
from upweight.attributors.evidence import library_versions
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.repair.account import account
from upweight.repair.change import read_change
from upweight.repair.options import Options, read_options
from upweight.repair.result import Repair
from upweight.repair.work import Work
from upweight.task import Task


@without_autocast()
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


@without_autocast()
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
        labels: {id: new label}, class numbers or target values. A task of your own functions does not say which tensor
            of ``(x, y, w)`` they belong to: give such data as a dict with the targets as ``"labels"``.
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


@without_autocast()
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
        weights: {id: weight >= 0}, real numbers of any type.
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
    change = read_change(examples, remove, labels, weights, task)
    change.divisor(settings.convention)
    copied = copied_model(model)
    with _as_it_was(model, copied):
        work = Work(copied, task, examples, change, settings, _opened(validation, "validation"))
        outcome = work.run()
        amended, processor = time.perf_counter(), time.process_time()
        evidence = account(work, outcome, _opened(test, "test"))
        fingerprints = {
            "before": model_fingerprint(model),
            "after": model_fingerprint(copied),
            "train": examples.fingerprint(),
        }
    return Repair(
        model=copied,
        change=change,
        method=settings.method,
        evidence={
            **evidence,
            "seconds": round(amended - started, 3),
            "evidence_seconds": round(time.perf_counter() - amended, 3),
            "processor_seconds": round(processor - worked, 3),
            "evidence_processor_seconds": round(time.process_time() - processor, 3),
            "fingerprints": fingerprints,
            "versions": library_versions(),
        },
    )


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


def _opened(data: Any, what: str) -> Examples | None:
    if data is None:
        return None
    try:
        return data if isinstance(data, Examples) else Examples(data)
    except UpweightError as error:
        raise UpweightError(f"{what}: {error}") from error
