"""Is it out? A repaired model against models that were really trained on the changed data."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.evaluate.bank import RetrainingBank
from upweight.evaluate.subsets import Subsets
from upweight.repair.change import Change
from upweight.repair.result import Repair
from upweight.repair.verification import Verification
from upweight.repair.views import Views, beside, distances, euclidean, membership, same_seed, to_mean
from upweight.task import Task


def verify(
    repair: Repair,
    model: nn.Module,
    task: Task,
    train: Any,
    train_fn: Callable[..., nn.Module],
    *,
    test: Any,
    folder: str | os.PathLike[str],
    seeds: int | Sequence[int] = 3,
    trained_with: int | None = None,
    settings: Mapping[str, Any] | None = None,
    n_jobs: int | None = None,
    progress: bool = True,
) -> Verification:
    """Train anew on the changed data, and compare.

    Args:
        repair: what `unlearn`, `relabel` or `amend` gave.
        model: the model before.
        task: its training loss.
        train: the training data before the change.
        train_fn: ``(indices, seed) -> model``, as a `RetrainingBank` takes it; with ``labels={position: label}`` too
            if labels were changed.
        test: data that was never trained on.
        folder: of the bank that keeps the retrained models; a second call trains nothing.
        seeds: of the retrained models, or how many.
        trained_with: the seed that the model itself was trained with, if it is known: the model that is retrained
            with it shares the training's noise, and is compared alone as well.
        settings: whatever decides the training, as in `RetrainingBank`.
        n_jobs: models trained at a time, as in `RetrainingBank`.
        progress: show a progress bar.

    Returns:
        `Verification`.

    Raises:
        UpweightError: weights were changed, which train_fn cannot follow; the files do not fit; or training fails.

    Cost: one training a seed, and two on halves of the data, which show that train_fn heeds its indices.
    """
    examples = train if isinstance(train, Examples) else Examples(train)
    held = test if isinstance(test, Examples) else Examples(test)
    change = repair.change
    if change.weights:
        raise UpweightError(
            f"{len(change.weights)} examples have other weights than 0 and 1, which train_fn(indices, seed) cannot be "
            "told -> verify removals and new labels"
        )
    if change.n != examples.n:
        raise UpweightError(
            f"the repair is of {change.n} training examples, and these are {examples.n} -> give the data it was made "
            "for"
        )
    bank = RetrainingBank(
        folder,
        train_fn,
        task,
        examples.n,
        subsets=subset_of(change),
        seeds=_seeds(seeds, trained_with),
        keep_models=True,
        model_fn=lambda: copy.deepcopy(model),
        settings={"repair": "changed data", **(settings or {})},
        n_jobs=n_jobs,
        progress=progress,
    )
    report = bank.run()
    if report.failed:
        seed, error = report.failed[0][1:]
        raise UpweightError(
            f"retraining with seed {seed} failed: {error} -> repair train_fn, then call it again"
        )
    try:
        retrained = {seed: bank.model(0, seed) for seed in bank.seeds}
    except RuntimeError as error:
        words = " ".join(str(error).split())[:150]
        raise UpweightError(
            f"train_fn's models are of another architecture than the repaired one ({words}) -> train the same"
        ) from error
    views = Views(task, examples, held, change)
    before, after = views.of(model), views.of(repair.model)
    theirs = {seed: views.of(one) for seed, one in retrained.items()}
    seconds = _training_seconds(bank)
    return Verification(
        parameter_distance=distances(
            before.parameters, after.parameters, [v.parameters for v in theirs.values()], euclidean
        ),
        prediction_distance=distances(
            before.predictions, after.predictions, [v.predictions for v in theirs.values()], views.gap
        ),
        to_mean_prediction=to_mean(before, after, list(theirs.values()), views.gap),
        accuracy=beside(
            {k: v.accuracy for k, v in (("before", before), ("after", after))},
            [v.accuracy for v in theirs.values()],
        ),
        loss=beside(
            {k: v.loss for k, v in (("before", before), ("after", after))}, [v.loss for v in theirs.values()]
        ),
        membership=membership(before, after, list(theirs.values())),
        seconds={
            "repair": repair.seconds,
            "retraining": seconds,
            "ratio": repair.seconds / seconds if seconds else math.nan,
        },
        seeds=list(bank.seeds),
        same_seed=None if trained_with is None else same_seed(before, after, theirs[trained_with], views.gap),
        info={
            "method": repair.method,
            "what": change.describe(),
            "fingerprints": repair.evidence["fingerprints"],
            "prediction_distance": views.words,
            "test": held.n,
        },
    )


def subset_of(change: Change) -> Subsets:
    """The changed training set, for a bank."""
    mask = np.ones((1, change.n), dtype=bool)
    mask[0, list(change.removed)] = False
    return Subsets(mask, [change.describe()], np.zeros(1, dtype=int), [dict(change.labels)])


def _training_seconds(bank: RetrainingBank) -> float:
    """What one retraining took, on the mean."""
    with bank._reading() as store:
        return float(np.mean([store.meta(run.key)["seconds"] for run in bank._plan]))


def _seeds(seeds: int | Sequence[int], trained_with: int | None) -> list[int]:
    found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    return found if trained_with is None or trained_with in found else [trained_with, *found]
