"""The report's queries: each beside the training examples that spoke for and against its prediction."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup

from upweight.report.plain import plain
from upweight.report.shown import Shown, shown
from upweight.scores import Scores

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["Card", "Neighbour", "cards", "concentration", "looks", "png_address"]

QUERIES = 12
"""Queries shown."""

PREDICTED = 4000
"""Queries whose prediction is looked at, to show misclassified ones first."""

COLUMNS = 7
"""Features of a table's row that are shown."""

WORDS = 600
"""Characters of a text that are shown."""


@dataclass(frozen=True)
class Neighbour:
    """A training example beside a query."""

    id: int | str
    score: float
    share: str
    look: Shown
    source: Markup | None


@dataclass(frozen=True)
class Card:
    """A query and its neighbours.

    Attributes:
        id: Of the query.
        look: How it looks.
        source: Its picture as a data address.
        guess: What the model predicts; empty if that is not known.
        right: Whether that is what the query's label says; None if that means nothing here.
        proponents, opponents: The strongest first.
        features: Names of the columns shown, where the inputs are rows of a table.
    """

    id: int | str
    look: Shown
    source: Markup | None
    guess: str
    right: bool | None
    proponents: list[Neighbour]
    opponents: list[Neighbour]
    features: list[str] = field(default_factory=list)


def png_address(png: bytes | None) -> Markup | None:
    """A PNG file as a data address, which needs no escaping."""
    if png is None:
        return None
    return Markup("data:image/png;base64," + base64.b64encode(png).decode("ascii"))


def cards(scores: Scores, experiment: Experiment | None, neighbours: int = 8) -> list[Card]:
    """The queries to show, misclassified ones first, then those that depend most on single training examples.

    Args:
        scores: Of all queries, for the experiment's data if there is one.
        experiment: What shows the examples; without it there are only ids.
        neighbours: Proponents and opponents of each.
    """
    guesses = _guesses(experiment)
    chosen = _chosen(scores, guesses)
    top, bottom = scores.top_k(neighbours), scores.bottom_k(neighbours)
    wanted = sorted(
        {p for ranking in (top, bottom) for row in chosen for p in ranking.positions[row].tolist()}
    )
    seen = dict(zip(wanted, looks(experiment, "train", wanted)))
    asked = looks(experiment, "query", chosen)
    found = []
    for row, look in zip(chosen, asked):
        largest = float(scores.values[row].abs().max())

        def side(ranking: Any, sign: int, row: int = row, largest: float = largest) -> list[Neighbour]:
            pairs = zip(ranking.positions[row].tolist(), ranking.values[row].tolist())
            return [
                Neighbour(
                    scores.train_ids[p],
                    value,
                    f"{100 * abs(value) / largest:.1f}",
                    seen[p],
                    png_address(seen[p].picture),
                )
                for p, value in pairs
                if sign * value > 0
            ]

        guess, right = guesses.get(row, ("", None))
        proponents, opponents = side(top, 1), side(bottom, -1)
        found.append(
            Card(
                scores.query_ids[row],
                look,
                png_address(look.picture),
                guess,
                right,
                proponents,
                opponents,
                _features(look, proponents + opponents),
            )
        )
    return found


def concentration(scores: Scores) -> int | None:
    """How many proponents make up half of all positive scores of a query: the median over (at most 500) queries."""
    rows = scores.values[:: max(1, len(scores.query_ids) // 500)].double().clamp_min(0)
    total = rows.sum(1)
    rows = rows[total > 0]
    if not len(rows):
        return None
    reached = rows.sort(dim=1, descending=True).values.cumsum(1) < rows.sum(1, keepdim=True) / 2
    return int(reached.sum(1).double().median()) + 1


def looks(experiment: Experiment | None, which: str, positions: Sequence[int]) -> list[Shown]:
    """Examples as the page shows them, cut to a readable length; empty without an experiment."""
    if experiment is None:
        return [Shown() for _ in positions]
    found: list[Shown] = []
    for start in range(0, len(positions), 64):
        found += shown(experiment, which, positions[start : start + 64])
    return [
        Shown(
            plain(look.label, 60),
            plain(look.words, WORDS),
            look.picture,
            _cut(look.tokens),
            look.fields,
            plain(look.problem, 200),
        )
        for look in found
    ]


def _cut(tokens: list[tuple[str, float]] | None) -> list[tuple[str, float]] | None:
    """Tokens up to so many characters, their weights between -1 and 1."""
    if tokens is None:
        return None
    largest = max((abs(w) for _, w in tokens if math.isfinite(w)), default=0.0) or 1.0
    kept, length = [], 0
    for text, weight in tokens:
        if length >= WORDS:
            kept.append(("…", 0.0))
            break
        length += len(text)
        kept.append((plain(text, WORDS), weight / largest if math.isfinite(weight) else 0.0))
    return kept


def _features(look: Shown, neighbours: list[Neighbour]) -> list[str]:
    """The columns in which the rows shown differ most from the query, of those that all of them have."""
    if not look.fields:
        return []
    rows = [look.fields, *(one.look.fields for one in neighbours if one.look.fields)]
    if len({len(row) for row in rows}) != 1:
        return []
    values = np.array([[value for _, value in row] for row in rows], dtype=np.float64)
    spread = np.nan_to_num(values.std(axis=0) / (np.abs(values).max(axis=0) + 1e-12))
    kept = np.sort(np.argsort(-spread, kind="stable")[:COLUMNS])
    return [look.fields[k][0] for k in kept.tolist()]


def _chosen(scores: Scores, guesses: dict[int, tuple[str, bool | None]]) -> list[int]:
    """Misclassified queries are half of those shown, if there are so many; the rest have the largest scores."""
    strength = scores.values.abs().amax(dim=1)
    order = torch.argsort(strength, descending=True, stable=True).tolist()
    wrong = [row for row in order if guesses.get(row, ("", None))[1] is False][: QUERIES // 2]
    return wrong + [row for row in order if row not in set(wrong)][: QUERIES - len(wrong)]


def _guesses(experiment: Experiment | None) -> dict[int, tuple[str, bool | None]]:
    """What the model predicts for each query, and whether that is right; empty where it cannot be asked."""
    from upweight.task import BinaryClassification, Classification, Regression

    if experiment is None or not isinstance(
        experiment.task, (BinaryClassification, Classification, Regression)
    ):
        return {}
    found: dict[int, tuple[str, bool | None]] = {}
    try:
        for rows in experiment.query.batches(experiment.query.preferred_batch_size or 256):
            with torch.no_grad():
                outputs, targets = experiment.task.forward(experiment.model, rows.batch)
            for k, position in enumerate(range(rows.start, rows.stop)):
                if position >= PREDICTED:
                    return found
                found[position] = _guess(experiment, outputs[k], targets[k])
    except Exception:  # a query that cannot be read, data on another device: the page does without
        return found
    return found


def _guess(experiment: Experiment, output: torch.Tensor, target: torch.Tensor) -> tuple[str, bool | None]:
    from upweight.task import BinaryClassification, Regression

    if isinstance(experiment.task, Regression):
        return (f"{float(output):.4g}" if output.numel() == 1 else "", None)
    if output.numel() == 1 or isinstance(experiment.task, BinaryClassification):
        if output.numel() != 1:
            return "", None
        number, truth = int(float(output) > 0), int(float(target) > 0.5)
    else:
        if target.numel() != 1:
            return "", None
        number, truth = int(output.argmax()), int(target)
    names = experiment.classes
    return plain(names[number] if names is not None and number < len(names) else number, 60), number == truth
