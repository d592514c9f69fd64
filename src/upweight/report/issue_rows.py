"""The issue table for the page: columns as compact JSON, of which the browser builds only the rows it shows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from upweight.report.plain import plain
from upweight.report.queries import png_address
from upweight.report.shown import TINY, shown

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["KINDS", "issue_data", "label_text"]

KINDS = {
    "label": "label error",
    "near_duplicate": "near-duplicate",
    "outlier": "outlier",
    "harmful": "harmful",
    "rare": "rare",
}
"""What each kind of issue is called on the page."""

ROWS = 100_000
"""Rows on the page, the flagged ones and then the most severe; issues.csv holds them all."""

PICTURES = 400
"""Training examples of the table that are shown with their picture or words."""

PICTURE_BYTES = 4_000_000
"""Bytes of pictures in the table, at most."""

TEXT = ("id", "issue", "given_label", "predicted_label", "related_id", "detector")
NUMBERS = ("score", "suggested_probability", "influence")


def issue_data(content: dict[str, Any], experiment: Experiment | None) -> dict[str, Any]:
    """What the page's table is made of.

    Texts are numbers of a list of distinct texts, so that 100,000 rows stay small.

    Args:
        content: Of issues.json.
        experiment: What shows the examples and names the classes; None shows ids and numbers.

    Returns:
        ``{"texts", "columns", "flagged", "looks", ...}`` for `compact_json`, with ``"counts"``, ``"rows"`` and
        ``"all"`` for words.
    """
    columns = content["columns"]
    total = len(columns["id"])
    order = _kept(columns, total)
    texts: list[str] = []
    number: dict[str, int] = {}

    def coded(text: str) -> int:
        if text not in number:
            number[text] = len(texts)
            texts.append(text)
        return number[text]

    classes = _classes(content, experiment)
    made: dict[str, list[Any]] = {}
    for name in TEXT:
        values = columns.get(name)
        if not isinstance(values, list) or len(values) != total or all(v is None for v in values):
            continue
        kind = "label" in name
        made[name] = [
            -1 if values[k] is None else coded(label_text(values[k], classes if kind else None))
            for k in order
        ]
    for name in NUMBERS:
        values = columns.get(name)
        if isinstance(values, list) and len(values) == total:
            kept = [_number(values[k]) for k in order]
            if name == "score" or any(one is not None for one in kept):
                made[name] = kept
    flags = [bool(columns["is_issue"][k]) for k in order]
    positions = [columns["position"][k] for k in order]
    counts = _counts(columns)
    return {
        "texts": texts,
        "columns": made,
        "flagged": [int(flag) for flag in flags],
        "positions": positions,
        "looks": _looks(experiment, positions),
        "unit": plain(_unit(content), 40),
        "counts": counts,
        "rows": len(order),
        "all": total,
        "examples": len(set(map(str, columns["id"]))),
    }


def _kept(columns: dict[str, Any], total: int) -> list[int]:
    """Flagged rows first, the most severe of each first."""
    flags, scores = columns["is_issue"], columns["score"]
    severity = [_number(score) for score in scores]
    order = sorted(range(total), key=lambda k: (not flags[k], 2.0 if severity[k] is None else severity[k]))
    return order[:ROWS]


def _counts(columns: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """``{kind: (flagged, rows)}``."""
    counts: dict[str, list[int]] = {}
    for kind, flag in zip(columns["issue"], columns["is_issue"]):
        one = counts.setdefault(plain(kind, 60), [0, 0])
        one[0] += bool(flag)
        one[1] += 1
    return {kind: (one[0], one[1]) for kind, one in counts.items()}


def _classes(content: dict[str, Any], experiment: Experiment | None) -> Sequence[str] | None:
    if experiment is not None and experiment.classes is not None:
        return experiment.classes
    named = content.get("classes")
    return named if isinstance(named, list) else None


def label_text(value: Any, classes: Sequence[str] | None) -> str:
    """A label in words: its class's name if it has one."""
    if classes is not None and isinstance(value, int) and 0 <= value < len(classes):
        return plain(classes[value], 80)
    if isinstance(value, float):
        return f"{value:.4g}"
    return plain(value if isinstance(value, (str, int)) else json.dumps(value), 160)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(f"{value:.5g}")


def _unit(content: dict[str, Any]) -> str:
    influence = content.get("influence")
    return str(influence.get("unit") or "") if isinstance(influence, dict) else ""


def _looks(experiment: Experiment | None, positions: Sequence[Any]) -> dict[str, list[Any]]:
    """``{position: [picture, words, whether it is tiny]}`` of the first examples of the table."""
    if experiment is None:
        return {}
    wanted = list(dict.fromkeys(p for p in positions if isinstance(p, int) and 0 <= p < experiment.train.n))[
        :PICTURES
    ]
    looks: dict[str, list[Any]] = {}
    size = 0
    for start in range(0, len(wanted), 64):
        part = wanted[start : start + 64]
        for position, look in zip(part, shown(experiment, "train", part, side=64)):
            source = str(png_address(look.picture) or "")
            size += len(source)
            words = look.problem or (look.words if look.words != look.label else "")
            if size <= PICTURE_BYTES and (source or words):
                looks[str(position)] = [source, plain(words, 160), int(max(look.size) <= TINY)]
    return looks
