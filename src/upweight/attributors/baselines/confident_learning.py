"""Confident learning: labels that a model which did not see them contradicts with confidence."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from upweight._random import preserved, reseed
from upweight.attributors.base import Attributor
from upweight.attributors.baselines.forward import Forward, classifier
from upweight.attributors.evidence import library_versions
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.scores import SelfInfluence
from upweight.task import Task
from upweight.task.outputs import split_batch


def confident_learning(
    train: Any,
    task: Task,
    *,
    probabilities: Tensor | np.ndarray | None = None,
    train_fn: Callable[..., nn.Module] | None = None,
    folds: int = 5,
    seed: int = 0,
    rank_by: Literal["self_confidence", "normalized_margin"] = "self_confidence",
    ids: Sequence[int | str] | None = None,
    progress: bool = True,
) -> SelfInfluence:
    """Suspicion of every training label by out-of-fold probabilities, through cleanlab.

    With p_i the probabilities of a model that was not trained on example i, and y_i its label, the score is ``1 -
    p_i[y_i]`` (``rank_by="self_confidence"``) or ``(1 - p_i[y_i] + max_{k != y} p_i[k]) / 2``
    (``"normalized_margin"``); large is suspicious, no unit. ``info["flagged"]`` holds the ids that confident learning
    calls label errors, the most suspicious first: those whose class k with ``p_i[k] >= t_k``, the mean of p[k] over the
    examples labelled k, is not their label (the largest, if several reach their threshold).

    Args:
        train: a Dataset, a DataLoader, or ``(inputs, targets)``.
        task: `Classification` or `BinaryClassification`.
        probabilities: out-of-fold probabilities [n, class], for example of scikit-learn's ``cross_val_predict``.
        train_fn: instead of those, ``(indices, seed) -> model``, trained on these positions alone.
        folds: models to train; every example is predicted by the one that did not see it.
        seed: of the folds and the models.
        rank_by: what to rank by.
        ids: one id per training example; positions if None.
        progress: show progress bars (in a terminal only).

    Returns:
        `SelfInfluence`, without a unit.

    Raises:
        UpweightError: neither or both of probabilities and train_fn are given, or they do not fit the data.
        ImportError: cleanlab is missing (``pip install 'upweight[audit]'``).

    Cost: one training per fold.

    Source: *Confident Learning: Estimating Uncertainty in Dataset Labels* (arXiv 1911.00068).

    Example:
        >>> import torch, upweight as uw
        >>> y = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8], [0.1, 0.9], [0.3, 0.7]])
        >>> found = uw.confident_learning((torch.zeros(6, 1), y), uw.Classification(), probabilities=p)
        >>> found.info["flagged"], found.top_k(2).ids
        ([2], [2, 5])
    """
    known = classifier(task, "confident learning", "predicted classes with the label")
    if (probabilities is None) == (train_fn is None):
        raise UpweightError(
            f"{'neither' if train_fn is None else 'both'} of probabilities= and train_fn= given, expected one of them "
            "-> out-of-fold probabilities, or a function that trains a model"
        )
    if rank_by not in ("self_confidence", "normalized_margin"):
        raise UpweightError(f"rank_by={rank_by!r} is unknown -> 'self_confidence' or 'normalized_margin'")
    examples = Examples(train, ids)
    labels = torch.cat([split_batch(rows.batch)[2].reshape(-1).cpu() for rows in examples.batches(256)])
    whole = bool((labels == labels.long()).all()) and bool((labels >= 0).all())
    if len(labels) != examples.n or not whole:
        raise UpweightError(
            f"targets are {labels.dtype} {tuple(labels.shape)}, expected one class number from 0 up an example -> "
            "number the classes"
        )
    given = labels.long().numpy()
    if train_fn is not None:
        found = _out_of_fold(examples, known, given, train_fn, folds, seed, progress)
    else:
        found = np.asarray(torch.as_tensor(probabilities).detach().cpu().double())
    _check(found, given, examples)
    cleanlab, rank = _import("cleanlab.filter"), _import("cleanlab.rank")
    quality = rank.get_label_quality_scores(given, found, method=rank_by)
    flagged = cleanlab.find_label_issues(
        given, found, filter_by="confident_learning", return_indices_ranked_by=rank_by, n_jobs=1
    )
    info = {
        "method": "confident-learning",
        "rank_by": rank_by,
        "flagged": [examples.ids[int(position)] for position in flagged],
        "folds": folds if train_fn is not None else None,
        "seed": seed if train_fn is not None else None,
        "n": examples.n,
        "fingerprints": {"train": examples.fingerprint()},
        "versions": {**library_versions(), "cleanlab": _import("cleanlab").__version__},
    }
    return SelfInfluence(torch.from_numpy(1.0 - np.asarray(quality)), examples.ids, None, info)


def _out_of_fold(
    examples: Examples,
    task: Any,
    labels: np.ndarray,
    train_fn: Callable[..., nn.Module],
    folds: int,
    seed: int,
    progress: bool,
) -> np.ndarray:
    """Probabilities [n, class], each by a model that was not trained on the example."""
    from sklearn.model_selection import StratifiedKFold

    rarest = int(np.bincount(labels)[np.unique(labels)].min())
    if not 2 <= folds <= rarest:
        raise UpweightError(
            f"folds={folds}, expected 2 to {rarest}, the size of the rarest class, so that every fold learns every "
            "class -> fewer folds, or drop the class"
        )
    found: np.ndarray | None = None
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(labels)), labels)
    for learned, held_out in splits:
        with preserved():
            reseed(seed)
            model = train_fn(learned, seed)
        if not isinstance(model, nn.Module):
            raise UpweightError(f"train_fn returned {type(model).__name__}, expected a model -> return it")
        part = _predict(model.eval(), task, examples.take(held_out.tolist()), progress)
        found = np.zeros((len(labels), part.shape[1])) if found is None else found
        found[held_out] = part
    assert found is not None
    return found


def _predict(model: nn.Module, task: Any, data: Any, progress: bool) -> np.ndarray:
    def of_batch(model: nn.Module, batch: Any) -> Tensor:
        outputs = task.forward(model, batch)[0].double()
        if outputs.ndim == 1:
            outputs = torch.stack([torch.zeros_like(outputs), outputs], 1)
        return outputs.softmax(1)

    examples = Examples(tuple(data) if isinstance(data, list) else data)  # collated pairs come as a list
    method = Attributor(model, task, None, "auto", None, None, progress)
    values = Forward(method, model, examples).over(examples, of_batch, "probability")
    values = values.double().reshape(examples.n, -1)
    return (values / values.sum(1, keepdim=True)).numpy()


def _check(probabilities: np.ndarray, labels: np.ndarray, examples: Examples) -> None:
    if probabilities.ndim != 2 or len(probabilities) != examples.n:
        raise UpweightError(
            f"probabilities have shape {probabilities.shape}, expected [train, class] for {examples.n} examples -> one "
            "row an example"
        )
    if int(labels.max()) >= probabilities.shape[1]:
        raise UpweightError(
            f"label {int(labels.max())} has no column among the {probabilities.shape[1]} of probabilities -> number "
            "the classes from 0"
        )
    inside = np.isfinite(probabilities).all() and (probabilities >= 0).all()
    if not inside or not np.allclose(probabilities.sum(1), 1, atol=1e-3):
        row = int(np.argmax(np.abs(np.nan_to_num(probabilities.sum(1), nan=np.inf) - 1)))
        raise UpweightError(
            f"probabilities of example {examples.ids[row]} add up to {probabilities[row].sum():g}, expected 1 and none "
            "below 0 -> pass probabilities, not logits (outputs.softmax(1))"
        )
    if absent := sorted(set(range(probabilities.shape[1])) - set(labels.tolist())):
        raise UpweightError(
            f"no example has label {absent[0]} though probabilities have a column for it -> drop the column, and "
            "divide each row by its sum"
        )


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError("confident_learning needs cleanlab -> pip install 'upweight[audit]'") from error
