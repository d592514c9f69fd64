"""What people decided about training examples: keep, relabel or drop, in one SQLite file that only ever grows."""

from __future__ import annotations

import csv
import io
import json
import math
import operator
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock

from upweight._files import refusing, replace_file
from upweight._ids import Id, as_ids
from upweight.errors import StoreError, UpweightError

__all__ = ["Decision", "Decisions"]

Label = int | float | str

ACTIONS = ("keep", "relabel", "drop")
"""What can be done with a suspected example."""

_UNDECIDED = "undecided"
_FORMAT = "1"
_WAIT = 30.0
"""Seconds a write waits for another program's."""

_TABLES = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE decisions (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL, action TEXT NOT NULL, label TEXT, reviewer TEXT NOT NULL, at TEXT NOT NULL
);
CREATE INDEX latest ON decisions (id, number);
"""


@dataclass(frozen=True)
class Decision:
    """What one person decided about one training example.

    Attributes:
        action: "keep", "relabel" or "drop".
        label: The new label if it is "relabel", else None.
        reviewer: Who decided; may be empty.
        at: When, in ISO 8601 and UTC.
    """

    action: str
    label: Label | None
    reviewer: str
    at: str


class Decisions:
    """Decisions about training examples, on disk as soon as they are made.

    Every decision is appended with who made it and when; the latest about an example counts, and the others stay
    readable as its history. Any number of threads and programs may write at the same time and lose nothing.

    Args:
        path: The SQLite file, ``decisions.sqlite`` in a run's folder. It is made by the first decision.
        experiment: The name of the experiment the ids belong to; a file of another one is refused. Not compared if
            None.

    Raises:
        StoreError: The file is damaged, of another experiment, or cannot be read.

    Example:
        >>> import tempfile
        >>> decisions = Decisions(tempfile.mkdtemp() + "/decisions.sqlite")
        >>> decisions.set(7, "relabel", label=3, reviewer="ada")
        >>> decisions.set("cat.png", "drop")
        >>> decisions.set(7, "relabel", label=5, reviewer="bob")
        >>> decisions.labels(), decisions.remove()
        ({7: 5}, ['cat.png'])
        >>> [decision.reviewer for _, decision in decisions.history(7)]
        ['ada', 'bob']
    """

    def __init__(self, path: str | os.PathLike[str], experiment: str | None = None) -> None:
        self.path = Path(path).expanduser()
        self.experiment = experiment
        if self.path.exists():
            self._check()

    def set(self, id: Id, action: str, label: Label | None = None, reviewer: str = "") -> None:
        """Append a decision; it is on disk when this returns.

        Args:
            id: The training example, by the id it was given.
            action: "keep", "relabel" or "drop".
            label: The new label, for "relabel" only: a class number as the training data has it, or a value.
            reviewer: Who decides.

        Raises:
            UpweightError: There is no such action, or it and the label do not belong together.
            StoreError: The file cannot be written.
        """
        if action not in ACTIONS:
            raise UpweightError(f"action {action!r} is unknown -> use one of {', '.join(map(repr, ACTIONS))}")
        if (action == "relabel") != (label is not None):
            raise UpweightError(
                f"{action!r} of example {id!r} came with label {label!r} -> 'relabel' takes a new label, "
                "'keep' and 'drop' take none"
            )
        self._append(id, action, None if label is None else _plain(label), reviewer)

    def clear(self, id: Id, reviewer: str = "") -> None:
        """Take a decision back: the example is undecided again. The history keeps both.

        Args:
            id: The training example.
            reviewer: Who takes it back.
        """
        self._append(id, _UNDECIDED, None, reviewer)

    def all(self) -> dict[Id, Decision]:
        """The latest decision about every example that has one, in the order in which they were made."""
        latest = "SELECT max(number) FROM decisions GROUP BY id"
        rows = self._rows(f"SELECT * FROM decisions WHERE number IN ({latest}) ORDER BY number")
        return {name: decision for name, decision in rows if decision.action != _UNDECIDED}

    def history(self, id: Id | None = None) -> list[tuple[Id, Decision]]:
        """Every decision ever made, the first one first.

        Args:
            id: Only those about this example. A decision taken back shows as the action "undecided".
        """
        if id is None:
            return self._rows("SELECT * FROM decisions ORDER BY number")
        return self._rows("SELECT * FROM decisions WHERE id = ? ORDER BY number", (_key(id),))

    def remove(self) -> list[Id]:
        """The ids to drop, as `unlearn` takes them."""
        return [name for name, decision in self.all().items() if decision.action == "drop"]

    def labels(self) -> dict[Id, Label]:
        """The new labels ``{id: label}``, as `relabel` takes them."""
        return {name: decision.label for name, decision in self.all().items() if decision.label is not None}

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """The latest decisions as a table: id, action, label, reviewer, at.

        Args:
            path: Also write it there, if given.

        Returns:
            The table as CSV.
        """
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["id", "action", "label", "reviewer", "at"])
        for name, one in self.all().items():
            table.writerow([name, one.action, "" if one.label is None else one.label, one.reviewer, one.at])
        if path is not None:
            file = Path(path).expanduser()
            with refusing(file, "written"):
                file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, lambda out: out.write(text.getvalue().encode("utf-8", "backslashreplace")))
        return text.getvalue()

    def __len__(self) -> int:
        """How many examples are decided."""
        return len(self.all())

    def __repr__(self) -> str:
        actions = [decision.action for decision in self.all().values()]
        counted = ", ".join(f"{actions.count(action)} {action}" for action in ACTIONS)
        return f"Decisions in {self.path}: {counted}"

    def _append(self, id: Id, action: str, label: Label | None, reviewer: str) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        row = (_key(id), action, None if label is None else json.dumps(label), _clean(reviewer), now)
        if not self.path.exists():
            self._create()
        with self._open() as database, database:
            database.execute(
                "INSERT INTO decisions (id, action, label, reviewer, at) VALUES (?, ?, ?, ?, ?)", row
            )

    def _rows(self, query: str, values: tuple[str, ...] = ()) -> list[tuple[Id, Decision]]:
        if not self.path.exists():
            return []
        with self._open() as database:
            rows = database.execute(query, values).fetchall()
            return [(json.loads(name), _read(*rest)) for _, name, *rest in rows]

    def _create(self) -> None:
        """Make the file aside and give it its name when it is complete, so that nobody ever meets half of it."""
        with refusing(self.path, "written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                if self.path.exists():
                    return
                temporary = self.path.with_name(f".{self.path.name}.tmp")
                temporary.unlink(missing_ok=True)
                with closing(sqlite3.connect(temporary)) as database:
                    database.executescript(_TABLES)
                    database.execute("INSERT INTO facts VALUES ('format', ?)", (_FORMAT,))
                    if self.experiment is not None:
                        database.execute("INSERT INTO facts VALUES ('experiment', ?)", (self.experiment,))
                    database.commit()
                    database.execute("PRAGMA journal_mode = WAL")  # readers never wait for a writer
                os.replace(temporary, self.path)

    def _check(self) -> None:
        with self._open() as database:
            if self.path.stat().st_size == 0:  # SQLite would take it for a new database
                raise sqlite3.DatabaseError("it is empty")
            found = database.execute("PRAGMA quick_check").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            facts = dict(database.execute("SELECT name, value FROM facts").fetchall())
        if facts.get("format") != _FORMAT:
            raise StoreError(
                f"{self.path} is in format {facts.get('format')}, this version reads {_FORMAT} -> update upweight"
            )
        other = facts.get("experiment")
        if None not in (other, self.experiment) and other != self.experiment:
            raise StoreError(
                f"{self.path} holds decisions about experiment {other!r}, this is {self.experiment!r} "
                "-> name another folder"
            )

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for every call: they are cheap, and no thread can get in another's way."""
        try:
            with closing(sqlite3.connect(self.path, timeout=_WAIT)) as database:
                database.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut
                yield database
        except sqlite3.OperationalError as error:
            if "no such table" in str(error) or "no such column" in str(error):
                raise StoreError(_damaged(self.path, error)) from error
            raise StoreError(
                f"{self.path} cannot be used: {error} -> check its permissions and the space on its disk, "
                "and close programs that hold it"
            ) from error
        except (sqlite3.Error, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StoreError(_damaged(self.path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"{path} is damaged, or does not hold decisions of ours ({error}) -> put a backup in its place, "
        "or move it away and decide again"
    )


def _key(id: Id) -> str:
    """An id as text that still knows whether it was a number."""
    (plain,) = as_ids([id], "id")
    return json.dumps(plain)


def _plain(label: Label) -> Label:
    value = label if isinstance(label, int | float | str) else operator.methodcaller("item")(label)
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise UpweightError(f"the new label is {label!r} -> give a class number, a finite value, or a name")
    return int(value) if isinstance(value, int) else float(value) if isinstance(value, float) else value


def _clean(reviewer: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in str(reviewer))[:200]


def _read(action: str, label: str | None, reviewer: str, at: str) -> Decision:
    if action not in (*ACTIONS, _UNDECIDED):
        raise sqlite3.DatabaseError(f"action {action!r}")
    return Decision(action, None if label is None else json.loads(label), reviewer, at)
