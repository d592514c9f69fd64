"""The demo from start to finish; `run_demo` reads like the few lines a user writes for a model of their own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import upweight as uw
from upweight.demo import tables
from upweight.demo.closing import close_the_loop
from upweight.demo.data import flip_labels
from upweight.demo.network import one_thread, predictions, train_network
from upweight.demo.page import render
from upweight.demo.proof import RemovalPair, chance, detection, removal_proof
from upweight.demo.results import DemoRun, Settings
from upweight.demo.sources import open_images
from upweight.errors import UpweightError

LEARNED = 0.1
"""Share of the way from the commonest label to all labels that a network must have come to be worth explaining."""


def run_demo(settings: Settings, console: Console) -> DemoRun:
    """Train, explain, find the flipped labels, prove it by retraining, print tables and write the page.

    Args:
        settings: what the user chose.
        console: where tables go.

    Returns:
        Everything the run found; ``index.html`` and ``figures.json`` are in the folder ``settings.out``, and what the
        other commands read and write: ``experiment.py``, scores, issues, decisions, the repair and ``report.html``.

    Raises:
        UpweightError: the images or the folder cannot be used.
    """
    page = _writable(settings.out) / "index.html"
    clock = _Clock()

    with clock("read the images"):
        images = open_images(settings.data, settings.root, settings.n, settings.seed)
        classes = len(images.classes)
        given, flipped = flip_labels(images.train.labels, classes, settings.flip_share, settings.seed)
        train = (images.train.inputs, given)
    with clock("train the network"), one_thread():
        model = train_network(*train, classes, settings.seed, recipe=settings.recipe)
    fitted, train_losses = predictions(model, *train)
    _check_learned(fitted, given, settings.seed)
    predicted, losses = predictions(model, images.test.inputs, images.test.labels)
    right = predicted == images.test.labels
    asked = choose_queries(losses, right, settings.queries, settings.seed)
    queries = (images.test.inputs[asked], images.test.labels[asked])
    tables.print_setup(console, images, flipped, model, float(right.float().mean()), clock.seconds)

    task = uw.Classification()
    with clock("fit EK-FAC"):
        # Weight decay curves the objective but is no part of any example's loss, so it enters as damping.
        method = uw.Influence(model, task, damping=settings.recipe.weight_decay, seed=settings.seed).fit(
            train, ids=images.train.ids
        )
    with clock("score the queries"):
        scores = method.attribute(queries, ids=[images.test.ids[position] for position in asked.tolist()])
    with clock("self-influence"):
        suspects = method.self_influence()
    with clock("gradient norm"):
        squared_norms = uw.Influence(model, task, curvature="identity").fit(train).self_influence()

    detections = [
        detection("self-influence", suspects.values, flipped),
        detection("loss", train_losses, flipped),
        detection("gradient norm", squared_norms.values, flipped),
        chance(flipped),
    ]
    with clock("retrain for the proof"):
        removals = _prove(settings, train, classes, scores, queries, console)
    with clock("audit, repair, report"), one_thread():
        closing = close_the_loop(settings, images, given, model, method)
    run = DemoRun(
        settings=settings,
        images=images,
        given=given,
        flipped=flipped,
        train_losses=train_losses,
        accuracy=float(right.float().mean()),
        parameters=sum(weight.numel() for weight in model.parameters()),
        queries=asked,
        predicted=predicted[asked],
        query_losses=losses[asked],
        scores=scores,
        suspects=suspects,
        detections=detections,
        removals=removals,
        closing=closing,
        seconds=clock.seconds,
    )
    _write(page, render(run))
    _write(page.with_name("figures.json"), json.dumps(run.figures(), indent=2) + "\n")
    tables.print_findings(console, run, page)
    return run


def _check_learned(fitted: Tensor, given: Tensor, seed: int) -> None:
    """Refuse to explain a network that says the same of every image."""
    accuracy = float((fitted == given).float().mean())
    commonest = float(given.bincount().max()) / len(given)
    if accuracy < commonest + LEARNED * (1 - commonest):
        raise UpweightError(
            f"the network learned nothing: it has {accuracy:.1%} of its training labels right, and the commonest label "
            f"alone is {commonest:.1%} of them -> --seed {seed + 1}, or more images with --n"
        )


def choose_queries(losses: Tensor, right: Tensor, count: int, seed: int) -> Tensor:
    """Which test images to explain: misclassified ones, the worst first, then ordinary ones drawn at random.

    Misclassified ones take at most six places in ten, so that a weak network's page still shows what it gets right.

    Args:
        losses: loss of each test image, in nats, [test].
        right: whether each is classified right, [test].
        count: images to explain.
        seed: draws the ordinary ones.

    Returns:
        Positions [count], fewer if there are fewer images.

    >>> choose_queries(
    ...     torch.tensor([0.1, 3.0, 0.2, 2.0]), torch.tensor([True, False, True, False]), 3, seed=0
    ... ).tolist()
    [1, 3, 0]
    """
    order = losses.argsort(descending=True)
    wrong, ordinary = order[~right[order]], torch.nonzero(right).flatten()
    ordinary = ordinary[torch.from_numpy(np.random.default_rng([seed, 3]).permutation(len(ordinary)))]
    most = max(round(0.6 * count), count - len(ordinary))
    wrong = wrong[:most]
    return torch.cat([wrong, ordinary[: count - len(wrong)]])


def _prove(
    settings: Settings,
    train: tuple[Tensor, Tensor],
    classes: int,
    scores: uw.Scores,
    queries: tuple[Tensor, Tensor],
    console: Console,
) -> list[RemovalPair]:
    """Retrain without a fifth of an average class, for queries spread evenly over the explained ones."""
    asked, seeds = min(settings.retrain_queries, len(queries[1])), settings.retrain_seeds
    if asked < 1 or seeds < 1:
        return []
    rows = np.linspace(0, len(queries[1]) - 1, asked).round().astype(int).tolist()
    removed = max(1, round(len(train[1]) / classes / 5))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(f"retrain without {removed} images", total=seeds * (1 + 2 * asked))
        return removal_proof(
            scores,
            queries,
            train,
            classes,
            rows,
            removed,
            range(settings.seed, settings.seed + seeds),
            settings.recipe,
            advance=lambda: progress.advance(bar),
        )


class _Clock:
    """Times named steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UpweightError(
            f"{file} cannot be written ({error.strerror}) -> make room, or choose another --out"
        ) from error


def _writable(folder: Path) -> Path:
    """The folder, made if need be and proved writable before any time is spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UpweightError(
            f"{folder} cannot be written ({error.strerror}) -> choose another folder with --out"
        ) from error
    return folder
