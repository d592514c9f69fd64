"""A run's folder as the explorer sees it: scores, suspects, decisions and pictures, read when they are asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from upweight._ids import Id, some
from upweight.errors import CacheMismatchError, UpweightError
from upweight.evaluate.comparison import file_name
from upweight.experiment import Experiment
from upweight.explorer.decisions import Decisions
from upweight.explorer.live import Live
from upweight.explorer.uploads import Upload
from upweight.explorer.words import short
from upweight.report.shown import Shown, shown
from upweight.scores import Scores
from upweight.task.outputs import split_batch

if TYPE_CHECKING:
    from upweight.repair.issue_table import IssueTable

UPLOADS = 64
"""Uploaded queries kept in memory."""

LARGE = 512
"""Pixels a side that the picture of one example is scaled down to."""

SMALL, SMALL_KEPT, LARGE_KEPT = 128, 4096, 32
"""Pixels a side of the small pictures, and how many of each size stay in memory."""

FIELDS = 24
"""Columns of a table's row that are shown."""


class Run:
    """What the explorer shows.

    Args:
        experiment: What the run is about.
        folder: The run's.
        address: Of the experiment, for the commands that the page names.
        method: Answers queries that no file of scores has.
        say: Told what takes long.

    Raises:
        StoreError: A file of the run is damaged, or of another experiment.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        address: str = "EXPERIMENT",
        method: str = "ekfac",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.experiment, self.folder, self.address = experiment, folder, address
        self.decisions = Decisions(folder / "decisions.sqlite", experiment.name)
        self.issues = self._read_issues(say)
        self.live = Live(experiment, folder / "store" / file_name(method), method, say)
        self.uploads: OrderedDict[str, Upload] = OrderedDict()
        self._lock = threading.Lock()
        self._shown = lru_cache(SMALL_KEPT)(self._show)
        self._large = lru_cache(LARGE_KEPT)(self._show)
        self._scores = lru_cache(4)(self._read_scores)

    def _read_issues(self, say: Callable[[str], None]) -> IssueTable | None:
        """The issue table, if there is one; of data that cannot be read whole it is taken to be about them."""
        from upweight.repair.issue_table import IssueTable

        if not (self.folder / "issues.json").exists():
            return None
        try:
            return IssueTable.load(self.folder, train=self.experiment.train)
        except UpweightError:
            raise
        except Exception as error:  # a picture that is gone, say
            say(
                f"issues.json was not compared with the training data: {type(error).__name__}: {str(error)[:200]}"
            )
            return IssueTable.load(self.folder)

    # Scores ------------------------------------------------------------------------------------------------------

    @cached_property
    def saved(self) -> list[str]:
        """Methods whose scores are in the folder."""
        return sorted(file.stem for file in (self.folder / "scores").glob("*.safetensors"))

    def scores(self, name: str) -> Scores:
        """Saved scores of every query.

        Raises:
            UpweightError: They are damaged, or of other queries or training examples.
        """
        if name not in self.saved:
            raise UpweightError(
                f"there are no scores {name!r} in {self.folder / 'scores'} -> one of {', '.join(self.saved)}"
            )
        return self._scores(name)

    def _read_scores(self, name: str) -> Scores:
        file = self.folder / "scores" / f"{name}.safetensors"
        scores = Scores.load(file)
        for what, theirs, ours in (
            ("training examples", scores.train_ids, self.experiment.train.ids),
            ("queries", scores.query_ids, self.experiment.query.ids),
        ):
            if list(theirs) != list(ours):
                raise CacheMismatchError(
                    f"{file} is about {len(theirs)} {what} ({some(theirs)}), the experiment has {len(ours)} "
                    f"({some(ours)}) -> upweight attribute again, or name that experiment's folder"
                )
        return scores

    # Examples ----------------------------------------------------------------------------------------------------

    def shown(self, which: str, positions: Sequence[int]) -> list[Shown]:
        """How examples look, small; each is read once."""
        return [self._shown(which, int(position), SMALL) for position in positions]

    def picture(self, which: str, name: str, large: bool = False) -> bytes | None:
        """The picture of an example, or of an upload, as a PNG file; None if it has none."""
        if which == "upload":
            upload = self.uploads.get(name)
            return None if upload is None else upload.picture
        try:
            one = self._large(which, int(name), LARGE) if large else self._shown(which, int(name), SMALL)
            return one.picture
        except (ValueError, UpweightError):
            return None

    def _show(self, which: str, position: int, side: int) -> Shown:
        with self._lock:  # a data set that reads files may not like two threads
            one = shown(self.experiment, which, [position], side)[0]
        # Thousands of these are kept: none of them with a text of megabytes.
        said = "" if one.words == one.label else short(one.words)
        kept = {"words": said, "tokens": None, "fields": one.fields and one.fields[:FIELDS]}
        return replace(one, label=short(one.label, 60), problem=short(one.problem), **kept)

    def labels(self, which: str) -> np.ndarray | None:
        """The class number of every example, int64 [n], or None if the targets are no classes.

        Labels of training examples come from the issue table if there is one: then no example need be read.
        """
        return self._train_labels if which == "train" else self._query_labels

    @cached_property
    def _train_labels(self) -> np.ndarray | None:
        table, n = self.issues, self.experiment.train.n
        if table is not None:
            given = dict(zip(table.columns["position"].tolist(), table.columns["given_label"].tolist()))
            labels = [given.get(position) for position in range(n)]
            if all(isinstance(label, int) for label in labels):
                return np.array(labels, dtype=np.int64)
        return _classes_of(self.experiment.train)

    @cached_property
    def _query_labels(self) -> np.ndarray | None:
        return _classes_of(self.experiment.query)

    def classes(self, which: str) -> list[tuple[str, int]]:
        """Names and numbers of the classes there are, for a list to choose from."""
        labels = self.labels(which)
        return (
            [] if labels is None else [(self.name(number), number) for number in np.unique(labels).tolist()]
        )

    def name(self, label: Any) -> str:
        """A label in words."""
        if label is None:
            return ""
        names = self.experiment.classes
        whole = isinstance(label, int) or (isinstance(label, float) and label.is_integer())
        if names is not None and whole and 0 <= int(label) < len(names):
            return short(names[int(label)], 60)
        return f"{label:.4g}" if isinstance(label, float) else short(label, 60)

    # Queries -----------------------------------------------------------------------------------------------------

    def add(self, upload: Upload) -> str:
        """Keep an uploaded query; its key."""
        with self._lock:
            self.uploads[upload.token] = upload
            while len(self.uploads) > UPLOADS:
                self.uploads.popitem(last=False)
        return f"upload:{upload.token}"

    def upload(self, key: str) -> Upload | None:
        """The uploaded query of a key, or None if the key is that of a query of the experiment.

        Raises:
            UpweightError: It is no longer in memory.
        """
        kind, _, token = key.partition(":")
        if kind != "upload":
            return None
        if token not in self.uploads:
            raise UpweightError("this uploaded query is gone: the server was restarted -> upload it again")
        return self.uploads[token]

    def row(self, key: str) -> int:
        """The position of a query of the experiment."""
        kind, _, number = key.partition(":")
        n = self.experiment.query.n
        if kind != "query" or not number.isdecimal() or int(number) >= n:
            raise UpweightError(
                f"there is no query {key[:40]!r}, expected query:0 to query:{n - 1} -> choose one"
            )
        return int(number)

    def batch(self, key: str) -> Any:
        """A query in the form of the data, with a batch axis of length 1."""
        upload = self.upload(key)
        return self.experiment.query.take([self.row(key)]) if upload is None else upload.batch

    # Decisions ---------------------------------------------------------------------------------------------------

    @cached_property
    def position(self) -> dict[Id, int]:
        """The position of every training example by its id."""
        return {name: position for position, name in enumerate(self.experiment.train.ids)}

    @staticmethod
    def mark(name: Id) -> str:
        """A short sign of an id, by which the page says which example it shows."""
        return hashlib.blake2b(json.dumps(name).encode(), digest_size=12).hexdigest()


def _classes_of(examples: Any) -> np.ndarray | None:
    """The class number of every example, if that is what the targets are, and all can be read."""
    found: list[np.ndarray] = []
    try:
        for rows in examples.batches(examples.preferred_batch_size or 1024):
            numbers = _whole_numbers(split_batch(rows.batch)[2], rows.stop - rows.start)
            if numbers is None:
                return None
            found.append(numbers)
    except (
        Exception
    ):  # whatever a data set raises, a picture that is gone above all: the page does without classes
        return None
    labels = np.concatenate(found)
    return labels if len(np.unique(labels)) <= 1000 else None


def _whole_numbers(targets: Any, n: int) -> np.ndarray | None:
    """The targets of n examples as class numbers, or None if they are none."""
    if not isinstance(targets, Tensor) or targets.is_complex() or targets.numel() != n:
        return None
    values = targets.reshape(-1).cpu().numpy()
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        return None
    return values.astype(np.int64)
