"""``issues.json``: an issue table on disk, with the experiment it belongs to and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import upweight
from upweight._files import json_text, refusing, replace_file
from upweight.errors import CacheMismatchError, StoreError, UpweightError
from upweight.repair.issue_table import COLUMNS, IssueTable

if TYPE_CHECKING:
    from upweight.data import Examples

NAME = "issues.json"
EVIDENCE = ("experiment", "address", "settings", "detectors", "influence", "left_out", "classes")
"""Entries of a table's info that the file keeps beside the columns."""


def write(table: IssueTable, folder: str | os.PathLike[str]) -> Path:
    """See `IssueTable.save`."""
    path = _file(folder)
    with refusing(path.parent, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    columns = {
        name: [_short(value, dtype is np.float64) for value in table.columns[name].tolist()]
        for name, dtype in COLUMNS.items()
    }
    text = json.dumps(columns)
    content = {
        "upweight": upweight.__version__,
        "experiment": "",
        "address": "",
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "settings": {},
        "detectors": {},
        **{key: table.info[key] for key in EVIDENCE if key in table.info},
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    head = json_text(content, "info")
    whole = head[:-1] + ', "columns": ' + text + "}\n"  # ids are ASCII in JSON, whatever they hold
    replace_file(path, lambda file: file.write(whole.encode()))
    table.to_csv(path.with_suffix(".csv"))
    return path


def read(folder: str | os.PathLike[str], train: Examples | None = None) -> IssueTable:
    """See `IssueTable.load`."""
    path = _file(folder)
    if not path.is_file():
        raise StoreError(f"there is no file {path} -> upweight audit writes it, or name another folder")
    with refusing(path, "read"):
        data = path.read_bytes()
    try:
        content = json.loads(data)
        columns = content["columns"]
        mark = hashlib.sha256(json.dumps(columns).encode()).hexdigest()
        whole = mark == content["sha256"] and set(columns) == set(COLUMNS)
        info = {key: content[key] for key in EVIDENCE if key in content}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, f"{type(error).__name__}: {str(error)[:80]}") from error
    if not whole:
        raise _damaged(path, "its checksum is wrong")
    try:
        table = IssueTable(columns, info)
    except UpweightError as error:
        raise _damaged(path, str(error)[:200].replace(" -> ", ": ")) from error
    if train is not None:
        theirs = dict(info.get("settings") or {}).get("train")
        if theirs != train.fingerprint():
            name = info.get("experiment") or "no name"
            raise CacheMismatchError(
                f"{path} is about other training data (of the experiment {str(name)[:60]!r}) than the {train.n} "
                "examples at hand -> audit again, or name that experiment's folder"
            )
    return table


def _file(folder: str | os.PathLike[str]) -> Path:
    path = Path(folder).expanduser()
    return path if path.suffix == ".json" else path / NAME


def _short(value: Any, estimated: bool) -> Any:
    """Missing as null, and estimates with no more digits than anybody knows; labels keep all of theirs."""
    if value is None or value != value:
        return None
    return float(f"{value:.7g}") if estimated else value


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged, or no issue table of ours ({why}) -> audit again")
