"""The demo's last step, from scores to action: audit, decide, repair, and compare with really retraining."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

import upweight as uw
from upweight.demo.data import ImageSet
from upweight.demo.experiment import as_experiment, write_experiment
from upweight.demo.network import one_thread, predictions
from upweight.demo.results import Settings
from upweight.errors import StoreError, UpweightError
from upweight.repair.issue_table import IssueTable
from upweight.repair.verify import subset_of

REVIEWER = "upweight demo"
"""Under whose name the demo accepts suggestions."""

MOST_SCORES = 2_000_000
"""Scores of test images are kept for the report and the explorer up to this number."""


@dataclass(frozen=True)
class Closing:
    """What the last step did.

    Attributes:
        address: of the experiment, for the other commands.
        report: the page of the run.
        flagged: labels that the audit flags.
        decided: images that were decided about otherwise than to keep them.
        right: how many of those got their true label back.
        labels: the new labels by the images' ids.
        dropped: ids of the images that were to be forgotten.
        by_people: images that somebody decided about in the explorer.
        accuracy: share of test images classified right "before", "repaired" and "retrained" (mean over seeds).
        loss: mean loss of the test images, in nats, likewise.
        seconds: of the "repair", and of one "retraining".
        left_out: why nothing was done; empty if something was.
    """

    address: str
    report: Path | None
    flagged: int
    decided: int
    right: int
    accuracy: dict[str, float]
    loss: dict[str, float]
    seconds: dict[str, float]
    left_out: str = ""
    labels: dict[int | str, int] = field(default_factory=dict)
    dropped: list[int | str] = field(default_factory=list)
    by_people: int = 0


def close_the_loop(
    settings: Settings, images: ImageSet, given: Tensor, model: nn.Module, method: uw.Influence
) -> Closing:
    """Audit the labels, accept what is suggested, repair the network, and hold it against retraining.

    Nothing here knows which labels were flipped, or sees a test image, until the outcome is measured. Decisions that
    somebody made in the explorer before count as they are.

    Args:
        settings: what the user chose.
        images: what the network was trained on.
        given: the labels it was trained with.
        model: the network.
        method: fitted to them.
    """
    experiment = as_experiment(settings, images, given, model)
    address, out = write_experiment(settings), settings.out
    if len(images.test) * len(images.train) <= MOST_SCORES:
        method.attribute(experiment.query).save(out / "scores" / "ekfac")
    before = _measured(model, images)
    try:
        table = uw.audit(model, experiment.task, experiment.train, kinds=["label"], seed=settings.seed)
    except UpweightError as error:
        return Closing(address, None, 0, 0, 0, {"before": before[0]}, {"before": before[1]}, {}, str(error))
    about = {"experiment": experiment.name, "address": address, "classes": list(images.classes)}
    table = IssueTable(table.columns, table.info | about)
    table.save(out)
    decisions = _decide(out / "decisions.sqlite", experiment.name, table)
    labels, dropped = decisions.labels(), decisions.remove()
    accuracy, loss, seconds = {"before": before[0]}, {"before": before[1]}, {}
    place = {name: position for position, name in enumerate(images.train.ids)}
    right = sum(int(images.train.labels[place[name]]) == label for name, label in labels.items())
    if labels or dropped:
        repaired = uw.amend(
            model,
            experiment.task,
            experiment.train,
            remove=dropped or None,
            labels=labels or None,
            test=experiment.query,
            method="corrected",
            l2=settings.recipe.weight_decay,
            convention="sum",  # those left out of a training of the demo's lose their vote, and no more
            seed=settings.seed,
            progress=False,
        )
        repaired.save(out / "repair", experiment=experiment.name, address=address, source="decisions.sqlite")
        accuracy["repaired"], loss["repaired"] = _measured(repaired.model, images)
        seconds["repair"] = repaired.seconds
        if settings.retrain_queries and settings.retrain_seeds:
            checked = _verify(settings, experiment, repaired)
            accuracy["retrained"] = checked.accuracy["test"]["retrained"]
            loss["retrained"] = checked.loss["test"]["retrained"]
            seconds["retraining"] = checked.seconds["retraining"]
    from upweight.report import build

    report = build(out, experiment)
    decided = len(labels) + len(dropped)
    flagged = len(table.flagged("label"))
    numbers = {name: int(label) for name, label in labels.items()}
    by_people = sum(one.reviewer != REVIEWER for one in decisions.all().values())
    return Closing(
        address, report, flagged, decided, right, accuracy, loss, seconds, "", numbers, dropped, by_people
    )


def _decide(file: Path, experiment: str, table: IssueTable) -> uw.Decisions:
    """Accept every suggestion about an image that nobody has decided about."""
    try:
        decisions = uw.Decisions(file, experiment)
    except StoreError:  # of a demo with other images, or damaged: kept, out of the way
        number = next(k for k in range(1, 10**6) if not file.with_name(f"decisions.{k}.sqlite").exists())
        for ending in ("-wal", "-shm", ""):
            old = file.with_name(file.name + ending)
            if old.exists():
                old.replace(file.with_name(f"decisions.{number}.sqlite{ending}"))
        decisions = uw.Decisions(file, experiment)
    suggested = table.suggestions()
    for name, decision in decisions.all().items():
        if decision.reviewer == REVIEWER and suggested.get(name) != decision.label:
            decisions.clear(name, REVIEWER)  # an earlier version's
    decided = decisions.all()
    for name, label in suggested.items():
        if name not in decided:
            decisions.set(name, "relabel", label, REVIEWER)
    return decisions


def _verify(settings: Settings, experiment: uw.Experiment, repaired: uw.Repair) -> uw.Verification:
    assert experiment.train_fn is not None
    name = f"bank-{subset_of(repaired.change).digest(0)[:8]}-{repaired.evidence['fingerprints']['train'][:8]}"
    with one_thread():
        checked = uw.verify(
            repaired,
            experiment.model,
            experiment.task,
            experiment.train,
            experiment.train_fn,
            test=experiment.query,
            folder=settings.out / "repair" / name,
            seeds=range(settings.seed, settings.seed + settings.retrain_seeds),
            trained_with=settings.seed,
            settings={"recipe": repr(settings.recipe)},
            progress=False,
        )
    checked.save(settings.out / "repair")
    return checked


@torch.no_grad()
def _measured(model: nn.Module, images: ImageSet) -> tuple[float, float]:
    guessed, losses = predictions(model, images.test.inputs, images.test.labels)
    return float((guessed == images.test.labels).float().mean()), float(losses.double().mean())
