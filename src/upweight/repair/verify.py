"""Is it out? A repaired model against models that were really trained on the changed data."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from upweight._files import json_text, replace_file
from upweight._trees import map_tensors
from upweight.data import Examples
from upweight.errors import StoreError, UpweightError
from upweight.evaluate.bank import RetrainingBank
from upweight.evaluate.subsets import Subsets
from upweight.repair.change import Change, selected
from upweight.repair.log import append, read_json
from upweight.repair.measured import MOST, right
from upweight.repair.membership import membership_auroc
from upweight.repair.result import LOG, Repair
from upweight.task import BinaryClassification, Classification, OutputTask, Task

if TYPE_CHECKING:
    from rich.table import Table

JSON = "verify.json"
BATCH = 512


@dataclass(frozen=True)
class Verification:
    """How far a repaired model is from retraining, beside how far the unrepaired one is.

    Attributes:
        parameter_distance: ``|theta - theta_r|`` over the tracked parameters, a mean over the retrained models:
            {"before": doing nothing, "after": the repair, "seeds": between two retrained models, "relative": after /
            before}.
        prediction_distance: the same for predictions on the test data: the mean total variation distance of the
            predicted distributions (classification), else the mean absolute difference of outputs.
        to_mean_prediction: the same against the retrained models' mean prediction, in which seeds' noise cancels;
            None with one seed.
        accuracy: {"test" | "retained" | "forgotten" | "repaired": {"before", "after", "retrained"}}; of losses for
            tasks without classes.
        loss: the same for the mean training loss.
        membership: AUROC of the loss-threshold attack on the forgotten examples against the test data, {"before",
            "after", "retrained"}; None where nothing was forgotten.
        seconds: {"repair", "retraining" (one model), "ratio"}.
        seeds: of the retrained models.
        same_seed: the figures against the one retrained with the model's own seed, where that was told.
        info: what was compared.
    """

    parameter_distance: dict[str, float]
    prediction_distance: dict[str, float]
    to_mean_prediction: dict[str, float] | None
    accuracy: dict[str, dict[str, float]]
    loss: dict[str, dict[str, float]]
    membership: dict[str, float] | None
    seconds: dict[str, float]
    seeds: list[int]
    same_seed: dict[str, Any] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dict(self.__dict__.items())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``verify.json``, and append a line to the audit log ``log.jsonl``; returns the JSON file."""
        place = Path(folder).expanduser()
        content = {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.to_json(),
        }
        text = json_text(content, "the verification")
        append(place / LOG, {"action": "verify", **_logged(content)})
        replace_file(place / JSON, lambda file: file.write((text + "\n").encode()))
        return place / JSON

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Verification:
        """Read what `save` wrote."""
        names = list(cls.__dataclass_fields__)
        path = Path(folder).expanduser() / JSON
        content = read_json(path, names)
        if not isinstance(content["parameter_distance"], dict):
            raise StoreError(f"{path} is damaged -> verify again")
        return cls(**{name: content[name] for name in names})

    def sentence(self) -> str:
        """The outcome in words."""
        ratio = self.prediction_distance["relative"]
        words = f"Predictions are at {ratio:.2f} of the distance to retraining that doing nothing leaves"
        if "seeds" in self.prediction_distance:
            words += f" (two retrained models are at {self.prediction_distance['seeds_relative']:.2f} of it)"
        parameters, share = self.parameter_distance["relative"], self.seconds["ratio"]
        return f"{words}, parameters at {parameters:.2f}, in {share:.1%} of the time."

    def table(self) -> Table:
        """The figures for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"Repaired against retrained ({len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''})",
            caption=self.sentence(),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("")
        for heading in ("doing nothing", "repaired", "retrained"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, d in (
            ("parameters to retrained", self.parameter_distance),
            ("predictions to retrained", self.prediction_distance),
            ("predictions to their mean", self.to_mean_prediction or {}),
        ):
            if d:
                table.add_row(
                    name,
                    f"{d['before']:.4g}",
                    f"{d['after']:.4g}",
                    f"{d['seeds']:.4g}" if "seeds" in d else "",
                )
        for name, d in self.accuracy.items():
            table.add_row(f"accuracy, {name}", *(f"{d[key]:.2%}" for key in ("before", "after", "retrained")))
        for name, d in self.loss.items():
            table.add_row(f"loss, {name}", *(f"{d[key]:.4g}" for key in ("before", "after", "retrained")))
        if self.membership is not None:
            table.add_row(
                "membership AUROC",
                *(f"{self.membership[key]:.3f}" for key in ("before", "after", "retrained")),
            )
        table.add_row("seconds", "", f"{self.seconds['repair']:.2f}", f"{self.seconds['retraining']:.2f}")
        return table

    def __rich__(self) -> Table:
        return self.table()


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
            f"retraining with seed {seed} failed: {error} -> repair train_fn, and use a new folder"
        )
    try:
        retrained = {seed: bank.model(0, seed) for seed in bank.seeds}
    except RuntimeError as error:
        words = " ".join(str(error).split())[:150]
        raise UpweightError(
            f"train_fn's models are of another architecture than the repaired one ({words}) -> train the same"
        ) from error
    views = _Views(task, examples, held, change)
    before, after = views.of(model), views.of(repair.model)
    theirs = {seed: views.of(one) for seed, one in retrained.items()}
    seconds = _training_seconds(bank)
    return Verification(
        parameter_distance=_distances(
            before.parameters, after.parameters, [v.parameters for v in theirs.values()], _euclidean
        ),
        prediction_distance=_distances(
            before.predictions, after.predictions, [v.predictions for v in theirs.values()], views.gap
        ),
        to_mean_prediction=_to_mean(before, after, list(theirs.values()), views.gap),
        accuracy=_beside(
            {k: v.accuracy for k, v in (("before", before), ("after", after))},
            [v.accuracy for v in theirs.values()],
        ),
        loss=_beside(
            {k: v.loss for k, v in (("before", before), ("after", after))}, [v.loss for v in theirs.values()]
        ),
        membership=_membership(before, after, list(theirs.values())),
        seconds={
            "repair": repair.seconds,
            "retraining": seconds,
            "ratio": repair.seconds / seconds if seconds else math.nan,
        },
        seeds=list(bank.seeds),
        same_seed=None
        if trained_with is None
        else _same_seed(before, after, theirs[trained_with], views.gap),
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


# What a model says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """One model's parameters, its predictions on the test data, and losses and accuracies of groups of examples."""

    parameters: Tensor
    predictions: Tensor
    losses: dict[str, Tensor]
    accuracy: dict[str, float]

    @property
    def loss(self) -> dict[str, float]:
        """Mean losses."""
        return {name: float(losses.mean()) for name, losses in self.losses.items()}


class _Views:
    def __init__(self, task: Task, examples: Examples, test: Examples, change: Change) -> None:
        self.task = task
        self.groups = {"test": test}
        retained = change.untouched
        if retained:
            step = max(1, -(-len(retained) // MOST))
            self.groups["retained"] = selected(examples, retained[::step])
        for name, positions in change.groups.items():
            self.groups[name] = selected(examples, sorted(positions), change.labels)

    @property
    def words(self) -> str:
        """What the distance of predictions is."""
        if isinstance(self.task, (Classification, BinaryClassification)):
            return "mean total variation distance of predicted distributions"
        return (
            "mean absolute difference of outputs"
            if isinstance(self.task, OutputTask)
            else "mean |difference of losses|"
        )

    def gap(self, a: Tensor, b: Tensor) -> float:
        """The mean distance of predictions [test, outputs]."""
        share = 0.5 if isinstance(self.task, Classification) else 1.0
        return float(share * (a - b).abs().flatten(1).sum(1).mean())

    @torch.no_grad()
    def of(self, model: nn.Module) -> _View:
        """What a model says, in eval mode."""
        trained = model.training
        model.eval()
        try:
            losses, accuracy, predictions = {}, {}, torch.zeros(0)
            for name, data in self.groups.items():
                found = [
                    self._batch(model, rows.batch)
                    for rows in data.batches(data.preferred_batch_size or BATCH)
                ]
                losses[name] = torch.cat([loss for loss, _, _ in found])
                if found[0][1] is not None:
                    accuracy[name] = float(
                        torch.cat([r for _, r, _ in found if r is not None]).double().mean()
                    )
                if name == "test":
                    predictions = torch.cat([p for _, _, p in found])
        finally:
            model.train(trained)
        flat = torch.cat([p.detach().double().cpu().flatten() for p in model.parameters()])
        return _View(flat, predictions, losses, accuracy)

    def _batch(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None, Tensor]:
        first = next(model.parameters())
        real = first.dtype in (torch.float32, torch.float64)
        batch = map_tensors(
            batch, lambda t: t.to(first.device, first.dtype if real and t.is_floating_point() else t.dtype)
        )
        if not isinstance(self.task, OutputTask):
            losses = self.task.train_loss(model, batch).double().cpu()
            return losses, None, losses[:, None]
        outputs, targets = self.task.forward(model, batch)
        losses = self.task.loss(outputs, targets).double().cpu()
        if isinstance(self.task, Classification):
            return losses, right(self.task, outputs, targets).cpu(), outputs.double().softmax(1).cpu()
        if isinstance(self.task, BinaryClassification):
            return losses, right(self.task, outputs, targets).cpu(), outputs.double().sigmoid().cpu()[:, None]
        return losses, None, outputs.double().cpu().reshape(len(outputs), -1)


# Figures -------------------------------------------------------------------------------------------------------------


def _distances(
    before: Tensor, after: Tensor, theirs: Sequence[Tensor], gap: Callable[[Tensor, Tensor], float]
) -> dict[str, float]:
    """Mean distances to the retrained models, and of those to one another."""
    nothing = float(np.mean([gap(before, one) for one in theirs]))
    repaired = float(np.mean([gap(after, one) for one in theirs]))
    found = {"before": nothing, "after": repaired, "relative": repaired / nothing if nothing else math.nan}
    if len(theirs) > 1:
        pairs = [gap(a, b) for k, a in enumerate(theirs) for b in theirs[:k]]
        found["seeds"] = float(np.mean(pairs))
        found["seeds_relative"] = found["seeds"] / nothing if nothing else math.nan
    return found


def _to_mean(
    before: _View, after: _View, theirs: Sequence[_View], gap: Callable[[Tensor, Tensor], float]
) -> dict[str, float] | None:
    """Distances to the mean prediction; "seeds": a retrained model's from the mean of the others."""
    if len(theirs) < 2:
        return None
    stack = torch.stack([v.predictions for v in theirs])
    center = stack.mean(0)
    nothing, repaired = gap(before.predictions, center), gap(after.predictions, center)
    left_out = [gap(one, (stack.sum(0) - one) / (len(stack) - 1)) for one in stack]
    return {
        "before": nothing,
        "after": repaired,
        "relative": repaired / nothing if nothing else math.nan,
        "seeds": float(np.mean(left_out)),
    }


def _same_seed(
    before: _View, after: _View, theirs: _View, gap: Callable[[Tensor, Tensor], float]
) -> dict[str, Any]:
    return {
        "parameter_distance": _distances(
            before.parameters, after.parameters, [theirs.parameters], _euclidean
        ),
        "prediction_distance": _distances(before.predictions, after.predictions, [theirs.predictions], gap),
    }


def _beside(
    ours: Mapping[str, Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> dict[str, dict[str, float]]:
    """{group: {"before", "after", "retrained" (the mean), "spread" (the standard deviation over seeds)}}."""
    found: dict[str, dict[str, float]] = {}
    for name in ours["before"]:
        retrained = [one[name] for one in theirs]
        found[name] = {key: values[name] for key, values in ours.items()}
        found[name]["retrained"] = float(np.mean(retrained))
        if len(retrained) > 1:
            found[name]["spread"] = float(np.std(retrained, ddof=1))
    return found


def _membership(before: _View, after: _View, theirs: Sequence[_View]) -> dict[str, float] | None:
    if "forgotten" not in before.losses:
        return None
    area = {
        v: membership_auroc(x.losses["forgotten"], x.losses["test"])
        for v, x in (("before", before), ("after", after))
    }
    area["retrained"] = float(
        np.mean([membership_auroc(x.losses["forgotten"], x.losses["test"]) for x in theirs])
    )
    return area


def _euclidean(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm())


def _training_seconds(bank: RetrainingBank) -> float:
    """What one retraining took, on the mean."""
    with bank._reading() as store:
        return float(np.mean([store.meta(run.key)["seconds"] for run in bank._runs()]))


def _seeds(seeds: int | Sequence[int], trained_with: int | None) -> list[int]:
    found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    return found if trained_with is None or trained_with in found else [trained_with, *found]


def _logged(content: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("parameter_distance", "prediction_distance", "accuracy", "membership", "seconds", "seeds", "info")
    return {key: content[key] for key in keys}
