"""The result of an audit: one row per training example and kind of issue."""

from __future__ import annotations

import csv
import importlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight._files import refusing, replace_file
from upweight._ids import Id, as_array, as_ids, some
from upweight.errors import UpweightError

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

    from upweight.data import Examples

__all__ = ["COLUMNS", "KINDS", "IssueTable"]

KINDS = ("label", "near_duplicate", "outlier", "harmful", "rare")
"""Kinds of issue, in the order of the table."""

COLUMNS = {
    "id": object,
    "position": np.int64,
    "issue": object,
    "is_issue": np.bool_,
    "score": np.float64,
    "rank": np.int64,
    "given_label": object,
    "predicted_label": object,
    "suggested_probability": np.float64,
    "influence": np.float64,
    "related_id": object,
    "detector": object,
}
"""Name and dtype of every column."""


@dataclass(frozen=True, eq=False, repr=False)
class IssueTable:
    """One row per training example and kind of issue, the worst of each kind first.

    Columns, all of one length:

    * ``id``, ``position``: of the training example.
    * ``issue``: "label", "near_duplicate", "outlier", "harmful" or "rare".
    * ``is_issue``: whether it passes the threshold that the wanted precision sets.
    * ``score``: between 0 and 1, lower is more severe (as cleanlab's ``label_score``).
    * ``rank``: from 1, the most severe of its kind.
    * ``given_label``, ``predicted_label``: its label and the suggested one (for a near-duplicate, its partner's); None
      where there are none.
    * ``suggested_probability``: estimated chance that the suggested label is right; NaN where there is none.
    * ``influence``: predicted change of the mean validation measurement if the example is relabelled as suggested
      ("label") or removed (all others), as the measurement itself moves, in ``info["influence"]["unit"]``; NaN without
      validation data.
    * ``related_id``: a near-duplicate's partner.
    * ``detector``: what the score is made of.

    Attributes:
        columns: {name: array [row]}.
        info: Evidence, JSON-able: ``"settings"``, ``"detectors"`` by kind, ``"influence"``, ``"left_out"`` (kinds that
            could not be looked for, and why), ``"experiment"``, ``"address"``.

    Raises:
        UpweightError: A column is missing, has another length, or holds what it cannot.

    Example:
        >>> table = IssueTable.of_rows(
        ...     [
        ...         {"id": "a", "position": 0, "issue": "label", "is_issue": False, "score": 0.9, "rank": 2},
        ...         {
        ...             "id": "b",
        ...             "position": 1,
        ...             "issue": "label",
        ...             "is_issue": True,
        ...             "score": 0.1,
        ...             "rank": 1,
        ...             "given_label": 0,
        ...             "predicted_label": 3,
        ...             "suggested_probability": 0.8,
        ...         },
        ...     ]
        ... )
        >>> table
        IssueTable of 2 training examples: 1 of 2 label
        >>> table.flagged("label").ids, table.suggestions()
        (['b'], {'b': 3})
    """

    columns: dict[str, np.ndarray]
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", _checked(self.columns))
        object.__setattr__(self, "info", dict(self.info))

    @classmethod
    def of_rows(cls, rows: Sequence[dict[str, Any]], info: dict[str, Any] | None = None) -> IssueTable:
        """A table from rows; what a row does not say is missing (None or NaN), or an empty detector."""
        defaults = {"detector": "", "suggested_probability": np.nan, "influence": np.nan}
        columns = {name: [row.get(name, defaults.get(name)) for row in rows] for name in COLUMNS}
        return cls(columns, info or {})  # type: ignore[arg-type]

    # Reading -----------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.columns["position"])

    @property
    def ids(self) -> list[Id]:
        """The training example of every row."""
        return self.columns["id"].tolist()

    @property
    def kinds(self) -> list[str]:
        """The kinds of issue that were looked for."""
        present = set(self.columns["issue"].tolist())
        return [kind for kind in KINDS if kind in present]

    def row(self, number: int) -> dict[str, Any]:
        """One row as {column: value}; NaN is None."""
        return {name: _plain(values[number]) for name, values in self.columns.items()}

    def flagged(self, kind: str | None = None) -> IssueTable:
        """The rows that pass their threshold, of one kind or of all."""
        return self.filter(kind, flagged=True)

    def filter(
        self,
        kind: str | None = None,
        *,
        flagged: bool | None = None,
        ids: Iterable[Id] | None = None,
        below: float | None = None,
        where: Callable[[dict[str, Any]], bool] | None = None,
    ) -> IssueTable:
        """The rows that satisfy all of the conditions given, in the same order.

        Args:
            kind: The issue.
            flagged: Whether ``is_issue``.
            ids: Of training examples.
            below: Largest score.
            where: A function of a row (as `row` gives it).

        Raises:
            UpweightError: There is no such kind.
        """
        keep = np.ones(len(self), bool)
        if kind is not None:
            check_kind(kind)
            keep &= self.columns["issue"] == kind
        if flagged is not None:
            keep &= self.columns["is_issue"] == flagged
        if ids is not None:
            wanted = set(as_ids(ids, "ids"))
            keep &= np.fromiter((name in wanted for name in self.columns["id"]), bool, len(self))
        if below is not None:
            keep &= self.columns["score"] <= below
        if where is not None:
            keep &= np.fromiter((k and bool(where(self.row(i))) for i, k in enumerate(keep)), bool, len(self))
        return IssueTable({name: values[keep] for name, values in self.columns.items()}, self.info)

    def suggestions(self) -> dict[Id, Any]:
        """{id: suggested label} of the flagged label errors whose suggestion differs from the given label."""
        found = self.flagged("label").columns
        pairs = zip(found["id"], found["given_label"], found["predicted_label"])
        return {name: label for name, given, label in pairs if label is not None and label != given}

    # Writing -----------------------------------------------------------------------------------------------------

    def to_pandas(self) -> pandas.DataFrame:
        """The columns as a data frame; missing labels and partners are None, missing numbers NaN.

        Raises:
            ImportError: pandas is missing.
        """
        pd = _pandas()
        columns = {name: _compact(values) for name, values in self.columns.items()}
        return pd.DataFrame(columns, columns=list(COLUMNS))

    def label_issues(self) -> pandas.DataFrame:
        """Label errors as cleanlab's tables have them: one row a training example, in the training order.

        Columns ``is_label_issue``, ``label_score`` (lower is more severe), ``given_label``, ``predicted_label``; the
        index holds the ids.

        Raises:
            UpweightError: Label errors were not looked for.
            ImportError: pandas is missing.
        """
        found = self.filter("label").columns
        if not len(found["id"]):
            raise UpweightError(
                f"the table has no label issues, only {', '.join(self.kinds) or 'no rows'} -> audit(..., "
                "kinds=['label'])"
            )
        order = np.argsort(found["position"], kind="stable")
        named = {
            "is_label_issue": "is_issue",
            "label_score": "score",
            "given_label": "given_label",
            "predicted_label": "predicted_label",
        }
        columns = {ours: _compact(found[theirs][order]) for ours, theirs in named.items()}
        pd = _pandas()
        return pd.DataFrame(columns, index=pd.Index(as_array(found["id"][order].tolist()), name="id"))

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as CSV (UTF-8, missing values empty), replacing an older file only when complete."""
        path = _ready_for_writing(path)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(COLUMNS)
        for row in zip(*(self.columns[name].tolist() for name in COLUMNS)):
            writer.writerow(["" if value is None or value != value else value for value in row])
        replace_file(path, lambda file: file.write(text.getvalue().encode("utf-8", "backslashreplace")))
        return path

    def to_parquet(self, path: str | os.PathLike[str]) -> Path:
        """Write the rows as Parquet, replacing an older file only when complete.

        A column that mixes numbers and text (ids of both kinds) becomes text.

        Raises:
            ImportError: pandas or pyarrow is missing.
        """
        try:
            importlib.import_module("pyarrow")
        except ImportError as error:
            raise ImportError("to_parquet needs pyarrow -> pip install 'upweight[report]'") from error
        table = self.to_pandas()
        for name in ("id", "related_id", "given_label", "predicted_label"):
            kinds = {isinstance(value, str) for value in table[name] if value is not None and value == value}
            if kinds:
                whole = kinds == {False}
                table[name] = (
                    table[name] if whole else table[name].map(lambda v: None if v is None else str(v))
                )
        path = _ready_for_writing(path)
        replace_file(path, lambda file: table.to_parquet(file, index=False))
        return path

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``issues.json`` and ``issues.csv`` into a run's folder, and return the former's path.

        Args:
            folder: The run; made if need be. A path that ends in ``.json`` names the file itself.

        Raises:
            StoreError: It cannot be written.
        """
        from upweight.repair.issue_file import write

        return write(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, train: Examples | None = None) -> IssueTable:
        """Read what `save` wrote.

        Args:
            folder: The run, or the file.
            train: The training data that the table must be about; None takes any.

        Raises:
            StoreError: There is no such file, or it is damaged.
            CacheMismatchError: It is about other training data.
        """
        from upweight.repair.issue_file import read

        return read(folder, train)

    # Showing -----------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        issues, flags = self.columns["issue"], self.columns["is_issue"]
        counts = [f"{int(flags[issues == k].sum())} of {int((issues == k).sum())} {k}" for k in self.kinds]
        examples = len(set(self.columns["position"].tolist()))
        return f"IssueTable of {examples} training examples: {', '.join(counts) or 'no rows'}"

    def __rich__(self) -> Table:
        from upweight.repair.issue_display import as_rich

        return as_rich(self)


def check_kind(kind: str) -> None:
    """Raise unless it is one."""
    if kind not in KINDS:
        raise UpweightError(f"there is no kind of issue {kind!r} -> one of {', '.join(KINDS)}")


def _checked(columns: dict[str, Any]) -> dict[str, np.ndarray]:
    """The columns with their dtypes, in order."""
    if missing := [name for name in COLUMNS if name not in columns]:
        raise UpweightError(
            f"the table lacks the column {missing[0]!r}, expected {', '.join(COLUMNS)} -> add it"
        )
    found = {}
    for name, dtype in COLUMNS.items():
        found[name] = _column(columns[name], dtype, name)
    lengths = {name: len(values) for name, values in found.items()}
    if len(set(lengths.values())) > 1:
        raise UpweightError(f"the columns have lengths {lengths}, expected one length -> one entry a row")
    found["id"] = _objects(as_ids(found["id"].tolist(), "id"))
    if strange := set(found["issue"].tolist()) - set(KINDS):
        raise UpweightError(f"issue holds {some(map(str, strange))} -> only {', '.join(KINDS)}")
    score = found["score"]
    if not (np.isfinite(score).all() and (score >= 0).all() and (score <= 1).all()):
        bad = int(np.flatnonzero(~((score >= 0) & (score <= 1)))[0])
        raise UpweightError(
            f"the score of row {bad} is {score[bad]}, expected 0 to 1 -> lower is more severe"
        )
    return found


def _column(values: Any, dtype: Any, name: str) -> np.ndarray:
    if dtype is object:
        listed = values.tolist() if isinstance(values, np.ndarray) else list(values)
        if wrong := [v for v in listed if not (v is None or isinstance(v, (str, int, float)))]:
            raise UpweightError(f"column {name!r} holds {type(wrong[0]).__name__} -> numbers, text or None")
        return _objects([None if v != v else v for v in listed])
    listed = values if isinstance(values, np.ndarray) else list(values)
    if dtype is np.bool_ and not all(isinstance(v, (bool, np.bool_)) for v in listed):
        raise UpweightError(f"column {name!r} holds what is neither true nor false -> bools")
    try:
        return np.array([np.nan if v is None else v for v in listed], dtype=dtype)
    except (TypeError, ValueError) as error:
        raise UpweightError(
            f"column {name!r} holds what is no number ({error}) -> {dtype.__name__}"
        ) from error


def _objects(values: list[Any]) -> np.ndarray:
    found = np.empty(len(values), dtype=object)
    found[:] = values
    return found


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if value != value else value


def _compact(values: np.ndarray) -> Any:
    """A column of objects that are all whole numbers, or all numbers, as such."""
    kinds = {type(value) for value in values.tolist()} if values.dtype == object else set()
    return values.astype(np.int64 if kinds == {int} else np.float64) if kinds in ({int}, {float}) else values


def _ready_for_writing(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    with refusing(path.parent, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError("this needs pandas -> pip install 'upweight[report]'") from error
    return pandas
