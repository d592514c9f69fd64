"""An issue table for the terminal: the worst of each kind."""

from __future__ import annotations

from typing import Any

import numpy as np
from rich import box
from rich.table import Table
from rich.text import Text

from upweight.repair.issue_table import IssueTable

WORST = 5


def as_rich(table: IssueTable, worst: int = WORST, words: dict[Any, str] | None = None) -> Table:
    """The worst of each kind, those that are flagged first in bold.

    Args:
        table: The issues.
        worst: Rows of each kind.
        words: What to say of an example, by its id.
    """
    influence = table.info.get("influence") or {}
    unit = influence.get("unit")
    shown = Table(
        caption=Text(_caption(table)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    shown.add_column("issue", no_wrap=True)
    shown.add_column("example", overflow="fold")
    shown.add_column("score", justify="right", no_wrap=True)
    shown.add_column("label", overflow="fold")
    if influence:
        shown.add_column(f"effect{f' ({unit})' if unit else ''}", justify="right")
    classes = table.info.get("classes")
    for kind in table.kinds:
        rows = table.filter(kind)
        for number in range(min(worst, len(rows))):
            row = rows.row(number)
            cells = [
                Text(kind if not number else "", style="cyan"),
                _named(row["id"], (words or {}).get(row["id"])),
                Text(f"{row['score']:.3f}", style="bold" if row["is_issue"] else "dim"),
                Text(_labels(row, classes)),
            ]
            effect = row["influence"]
            shown.add_row(*cells, *([f"{effect:+.2g}" if effect is not None else "-"] if influence else []))
        shown.add_section()
    return shown


def _named(name: Any, words: str | None) -> Text:
    return Text.assemble((_clean(str(name)), "bold"), f"  {_clean(words)}" if words else "")


def _labels(row: dict[str, Any], classes: Any) -> str:
    given, other = (label_name(row[key], classes) for key in ("given_label", "predicted_label"))
    if row["issue"] == "near_duplicate":
        same = "same label" if given == other else f"{given}, not {other}"
        return f"like {_clean(str(row['related_id']))}: {same}" if row["related_id"] is not None else ""
    if row["issue"] != "label" or not given:
        return given
    chance = row["suggested_probability"]
    return (
        f"{given} -> {other}" + (f" ({chance:.0%})" if chance is not None else "")
        if other != given
        else given
    )


def label_name(label: Any, classes: Any) -> str:
    """A label's name: its class's, if it has one."""
    if label is None:
        return ""
    if classes and isinstance(label, int) and 0 <= label < len(classes):
        return _clean(str(classes[label]))
    return f"{label:.4g}" if isinstance(label, float) else str(label)


def _clean(text: str, longest: int = 60) -> str:
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: longest + 1])
    return shown if len(text) <= longest else shown[:longest] + "..."


def _caption(table: IssueTable) -> str:
    flags, issues = table.columns["is_issue"], table.columns["issue"]
    counts = ", ".join(f"{int(np.sum(flags[issues == kind])):,} {kind}" for kind in table.kinds)
    precision = (table.info.get("settings") or {}).get("precision")
    wanted = f" at an expected precision of {precision:.0%}" if precision else ""
    return (
        f"Flagged{wanted}: {counts or 'nothing'}. Score: 0 is worst. Effect: predicted change of the mean "
        "validation measurement if the example is relabelled (label) or removed."
    )
