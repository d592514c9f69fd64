"""The parts of the page as HTML. Every text of the data passes through Jinja's escaping."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FunctionLoader, StrictUndefined
from torch import Tensor

from upweight.errors import UpweightError
from upweight.explorer import suspects
from upweight.explorer.run import Run
from upweight.explorer.suspects import Selection
from upweight.explorer.words import short
from upweight.report.shown import Shown

QUERIES = 40
"""Queries on one page of the list."""

LATEST = 200
"""Decisions listed; the table has all of them."""

_SERIAL = itertools.count(1)  # so that a panel always differs from the one before, and the page notices


@lru_cache(1)
def _environment() -> Environment:
    folder = resources.files("upweight.explorer").joinpath("assets")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters.update(short=short, signed=signed, json=json.dumps)
    return environment


def render(template: str, **values: Any) -> str:
    """A part of the page."""
    return _environment().get_template(template).render(serial=next(_SERIAL), **values)


def signed(value: float) -> str:
    """A score with its sign.

    >>> signed(0.01234), signed(-3.0)
    ('+0.0123', '-3')
    """
    return f"{value:+.3g}"


def message(text: str) -> str:
    """A panel that says only this."""
    return render("message.html", text=text)


def query_list(run: Run, label: int | None, page: int, chosen: str) -> str:
    """Queries to choose from, one page of them.

    Args:
        run: Whose.
        label: Only those of this class; None for all.
        page: Which page, from 0; one that does not exist is the nearest that does.
        chosen: Key of the query that is explained.
    """
    labels = run.labels("query") if label is not None else None
    n = run.experiment.query.n
    rows = np.arange(n) if labels is None else np.flatnonzero(labels == label)
    pages = max(1, -(-len(rows) // QUERIES))
    page = min(max(page, 0), pages - 1)
    on_page = rows[page * QUERIES : (page + 1) * QUERIES].tolist()
    cards = [
        {"key": f"query:{row}", "id": run.experiment.query.ids[row], **_look(one, "query", row)}
        for row, one in zip(on_page, run.shown("query", on_page))
    ]
    return render("queries.html", cards=cards, page=page, pages=pages, found=len(rows), chosen=chosen, n=n)


def explanation(run: Run, key: str, method: str, layer: str, label: int | None, count: int) -> str:
    """One query with its proponents and opponents.

    Args:
        run: Whose.
        key: ``query:ROW`` or ``upload:TOKEN``.
        method: A file of saved scores, or empty for the method that answers here.
        layer: Only this layer's part of the scores; empty for all of it.
        label: Only training examples of this class; None for all.
        count: Proponents, and opponents, at most.

    Raises:
        UpweightError: It cannot be answered.
    """
    upload = run.upload(key)
    if upload is not None or not method:
        scores, row, method = run.live.scores(key, run.batch(key), per_layer=bool(layer)), 0, run.live.name
    else:
        scores, row = run.scores(method), run.row(key)
    values = scores.values[row] if not layer else (scores.layers or {}).get(layer, [None] * (row + 1))[row]
    if values is None:
        has = ", ".join(scores.layers or {}) or "no layers"
        return message(f"{method} has no scores of layer {layer!r}; it has {has}. Choose all layers.")
    predicted = _predicted(run, key)
    if upload is None:
        look = {
            "id": run.experiment.query.ids[run.row(key)],
            **_look(run.shown("query", [run.row(key)])[0], "query", run.row(key)),
        }
    else:
        look = {"id": "your query", "words": short(upload.words), "label": "", "fields": None, "problem": ""}
        look["picture"] = f"picture/upload/{upload.token}.png" if upload.picture else None
    decided = run.decisions.all()
    sides = []
    for name, largest in (("proponents", True), ("opponents", False)):
        positions, found = _extremes(run, values, label, count, largest)
        cards = [
            {
                "id": run.experiment.train.ids[position],
                "score": value,
                "decision": _decision(run, decided.get(run.experiment.train.ids[position])),
                **_look(one, "train", position),
            }
            for position, value, one in zip(positions, found, run.shown("train", positions))
        ]
        sides.append({"name": name, "cards": cards})
    return render(
        "explanation.html",
        query=look,
        predicted=None if predicted is None else (run.name(predicted[0]), predicted[1]),
        sides=sides,
        largest=max((abs(card["score"]) for side in sides for card in side["cards"]), default=0.0) or 1.0,
        unit=scores.unit,
        worse="lower" if scores.info.get("higher_is_better") else "raise",
        method=method,
        layer=layer,
        note="" if upload is None else upload.note,
        n=len(scores.train_ids),
        only="" if label is None else run.name(label),
    )


def _predicted(run: Run, key: str) -> tuple[float, float | None] | None:
    """What the model says of a query; None of one that cannot be read, whose saved scores are still of use."""
    try:
        return run.live.predict(run.batch(key))
    except UpweightError:
        raise
    except Exception:
        return None


def _extremes(
    run: Run, values: Tensor, label: int | None, count: int, largest: bool
) -> tuple[list[int], list[float]]:
    """Positions and scores of the strongest proponents, or opponents, of one class or of all."""
    positions = torch.arange(len(values))
    labels = run.labels("train") if label is not None else None
    if labels is not None:
        positions = torch.from_numpy(np.flatnonzero(labels == label))
    among = values.cpu()[positions]
    among, positions = (
        (among[among > 0], positions[among > 0]) if largest else (among[among < 0], positions[among < 0])
    )
    best = among.topk(min(count, len(among)), largest=largest)
    return positions[best.indices].tolist(), best.values.tolist()


def review(run: Run, wanted: Selection, row: int | None, notice: str = "") -> str:
    """One suspect, what is known of it, and what can be decided.

    Args:
        run: With an issue table.
        wanted: What is stepped through.
        row: The row of the table; None if there is none left.
        notice: What to say above it.
    """
    table = run.issues
    if table is None:
        return render("empty.html", command=_command(run, "audit"))
    decided = run.decisions.all()
    done, total = suspects.progress(table, wanted, decided)
    if row is None:
        return render(
            "done.html", done=done, total=total, notice=notice, wanted=wanted, apply=apply_command(run)
        )
    issue = table.row(row)
    position, name = int(issue["position"]), issue["id"]
    related = run.position.get(issue["related_id"]) if issue["related_id"] is not None else None
    given, suggested = issue["given_label"], issue["predicted_label"]
    strip = suspects.upcoming(table, wanted, decided, row)
    looks = run.shown("train", [int(table.columns["position"][one]) for one in strip])
    return render(
        "review.html",
        row=row,
        key=run.mark(name),
        example={"id": name, **_look(run.shown("train", [position])[0], "train", position, large=True)},
        issue=issue,
        kind=KINDS.get(issue["issue"], issue["issue"]),
        given=run.name(given),
        suggested=run.name(suggested) if suggested != given else "",
        unit=_influence_unit(table.info),
        related=None
        if related is None
        else {"id": issue["related_id"], **_look(run.shown("train", [related])[0], "train", related)},
        compare=[
            _typical(run, label) for label in dict.fromkeys([given, suggested]) if isinstance(label, int)
        ],
        decision=_decision(run, decided.get(name)),
        classes=[(text, number) for text, number in run.classes("train")] if isinstance(given, int) else [],
        strip=[
            {
                "row": one,
                "decided": table.columns["id"][one] in decided,
                **_look(look, "train", int(table.columns["position"][one])),
            }
            for one, look in zip(strip, looks)
        ],
        done=done,
        total=total,
        notice=notice,
    )


KINDS = {
    "label": "suspected label",
    "near_duplicate": "near-duplicate",
    "outlier": "outlier",
    "harmful": "harmful to validation",
    "rare": "influential but rare",
}
"""Kinds of issue in words."""


def decisions(run: Run) -> str:
    """Every decision, the latest first, and what to do with them."""
    found = run.decisions.all()
    counts = {
        action: sum(one.action == action for one in found.values()) for action in ("relabel", "drop", "keep")
    }
    latest = list(found.items())[::-1][:LATEST]
    positions = [run.position.get(name) for name, _ in latest]
    looks = [
        _look(run.shown("train", [position])[0], "train", position) if position is not None else None
        for position in positions
    ]
    rows = [
        {"id": name, "decision": _decision(run, one), "look": look}
        for (name, one), look in zip(latest, looks)
    ]
    return render("decisions.html", rows=rows, counts=counts, total=len(found), apply=apply_command(run))


def apply_command(run: Run) -> str:
    """What to type to apply the decisions."""
    return _command(run, "repair")


def _command(run: Run, verb: str) -> str:
    return shlex.join(["upweight", verb, run.address, "--out", str(run.folder)])


def _typical(run: Run, label: Any) -> dict[str, Any]:
    assert run.issues is not None
    positions = suspects.typical(run.issues, label)
    return {
        "label": run.name(label),
        "cards": [
            _look(one, "train", position) for position, one in zip(positions, run.shown("train", positions))
        ],
    }


def _look(one: Shown, which: str, position: int, large: bool = False) -> dict[str, Any]:
    """How an example looks: the address of its picture, or its fields, or its words."""
    size = "/large" if large else ""
    return {
        "label": one.label,
        "words": one.words,
        "picture": f"picture/{which}/{position}.png{size}" if one.picture else None,
        "fields": None
        if one.fields is None
        else [(short(name, 40), f"{value:.4g}") for name, value in one.fields],
        "problem": one.problem,
    }


def _decision(run: Run, one: Any) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "action": one.action,
        "label": run.name(one.label) if one.label is not None else "",
        "reviewer": one.reviewer,
        "at": one.at[:16].replace("T", " "),
        "moment": one.at,
    }


def _influence_unit(info: dict[str, Any]) -> str:
    influence = info.get("influence")
    return str(influence.get("unit") or "") if isinstance(influence, dict) else ""


def choices(pairs: Sequence[tuple[str, int]], everything: str = "all classes") -> list[tuple[str, int]]:
    """Classes for a list to choose from, cut to a readable length; -1 stands for all of them."""
    return [(everything, -1), *((short(name, 60), number) for name, number in pairs)]
