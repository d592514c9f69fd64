"""Which suspect comes next: the rows of an issue table that a reviewer steps through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight._ids import Id

if TYPE_CHECKING:
    from upweight.repair.issue_table import IssueTable

SHOW = {
    "undecided": "still to decide",
    "all": "all suspects",
    "decided": "decided",
    "every": "every example",
}
"""What a reviewer may step through: those that pass the threshold, except for "every"."""


@dataclass(frozen=True)
class Selection:
    """What a reviewer wants to see.

    Attributes:
        kind: The kind of issue.
        label: Only examples that carry this label; None for all.
        show: A key of `SHOW`.
    """

    kind: str
    label: int | None = None
    show: str = "undecided"


def in_order(table: IssueTable, wanted: Selection) -> np.ndarray:
    """Row numbers of the table, the most severe first; those decided and those not are both among them."""
    columns = table.columns
    keep = columns["issue"] == wanted.kind
    if wanted.show != "every":
        keep &= columns["is_issue"]
    if wanted.label is not None:
        keep &= columns["given_label"] == wanted.label
    rows = np.flatnonzero(keep)
    return rows[np.argsort(columns["rank"][rows], kind="stable")]


def step(
    table: IssueTable,
    wanted: Selection,
    decided: Mapping[Id, Any],
    row: int | None = None,
    by: int = 1,
) -> int | None:
    """The row that comes after (or before) another one.

    Args:
        table: The issues.
        wanted: What to step through.
        decided: The examples that have a decision.
        row: Where one is; None for before the first. It need not be among those wanted.
        by: 1 forward, -1 backward, 0 to stay if the row is among those wanted.

    Returns:
        A row number, or None if there is none in that direction.
    """
    rows = in_order(table, wanted)
    ids = table.columns["id"]
    if wanted.show == "decided" or (
        wanted.show == "undecided" and by >= 0
    ):  # back leads to what was just decided
        keep = [(ids[one] in decided) == (wanted.show == "decided") for one in rows.tolist()]
        if row is not None and by != 0:  # where one stands stays in the order, decided or not
            keep = [kept or one == row for kept, one in zip(keep, rows.tolist())]
        rows = rows[np.array(keep, dtype=bool)]
    if not len(rows):
        return None
    if row is None:
        return int(rows[0])
    if row in rows:
        place = int(np.flatnonzero(rows == row)[0]) + by
    else:  # filters changed meanwhile: the nearest by rank
        rank = table.columns["rank"]
        place = int(np.searchsorted(rank[rows], rank[row])) - (1 if by < 0 else 0)
    return int(rows[place]) if 0 <= place < len(rows) else None


def upcoming(
    table: IssueTable, wanted: Selection, decided: Mapping[Id, Any], row: int, count: int = 12
) -> list[int]:
    """The rows around this one: two before it, and the next ones."""
    rows = in_order(table, wanted)
    if wanted.show in ("undecided", "decided"):
        ids = table.columns["id"]
        rows = np.array(
            [r for r in rows.tolist() if r == row or (ids[r] in decided) == (wanted.show == "decided")],
            dtype=np.int64,
        )
    if row not in rows:
        return rows[:count].tolist()
    place = int(np.flatnonzero(rows == row)[0])
    start = max(0, min(place - 2, len(rows) - count))
    return rows[start : start + count].tolist()


def progress(table: IssueTable, wanted: Selection, decided: Mapping[Id, Any]) -> tuple[int, int]:
    """How many of the suspects wanted are decided, and how many there are."""
    everything = Selection(wanted.kind, wanted.label, "every" if wanted.show == "every" else "all")
    ids = table.columns["id"][in_order(table, everything)]
    return sum(name in decided for name in ids), len(ids)


def typical(table: IssueTable, label: Any, count: int = 4) -> list[int]:
    """Positions of the least suspicious training examples that carry a label, to compare with."""
    columns = table.columns
    rows = np.flatnonzero((columns["issue"] == "label") & (columns["given_label"] == label))
    rows = rows[np.argsort(-columns["rank"][rows], kind="stable")][:count]
    return columns["position"][rows].tolist()
