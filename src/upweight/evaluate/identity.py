"""Whose folder is it? What a bank's folder belongs to, and what is refused or warned of if it is another's."""

from __future__ import annotations

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from upweight.data import Examples
from upweight.errors import CacheMismatchError
from upweight.evaluate.records import about_queries
from upweight.evaluate.runs import Run
from upweight.evaluate.subsets import Subsets
from upweight.store import ShardStore
from upweight.task import Task

__all__ = ["check_query", "check_subsets", "code_digests", "manifest_of", "warn_of_changed_code"]

LATER_KEYS = ("unit", "measured_by")
"""What the folders of earlier versions do not say."""


def manifest_of(
    folder: Path, task: Task, n: int, keep_models: bool, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What must be equal for a folder's models to be used again; what an older folder does not say is not asked."""
    code = task.measured_by
    manifest = {
        "holds": "retraining bank",
        "n": n,
        "task": task.name,
        "measurement": str(getattr(task, "measurement", "function")),
        "higher_is_better": task.higher_is_better,
        "unit": task.unit,
        "measured_by": None if code is None else getattr(code, "__name__", type(code).__name__),
        "keep_models": keep_models,
        "settings": dict(settings),
    }
    said = _said(folder)
    return {key: value for key, value in manifest.items() if key in said or key not in LATER_KEYS}


def _said(folder: Path) -> set[str]:
    """The keys that a folder's manifest has; all, where there is none to be read, which the store then says."""
    try:
        return {*json.loads((folder / "manifest.json").read_bytes())["manifest"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {*LATER_KEYS}


def check_subsets(store: ShardStore, runs: Iterable[Run], subsets: Subsets) -> None:
    """Refuse a folder whose models were trained on other subsets."""
    for run in runs:
        if store.has(run.key) and store.meta(run.key)["subset"] != subsets.digest(run.subset):
            raise CacheMismatchError(
                f"{store.folder} holds a model of another subset {run.subset} than {subsets.names[run.subset]!r} -> "
                "name another folder (one folder serves more or fewer of the same subsets, but no others)"
            )


def check_query(store: ShardStore, runs: Iterable[Run], name: str, examples: Examples) -> None:
    """Refuse queries if others were measured under their name."""
    fingerprint = examples.fingerprint()
    for run in runs:
        theirs = about_queries(store, run, name).get("fingerprint") if store.has(run.key) else None
        if theirs not in (None, fingerprint):
            raise CacheMismatchError(
                f"{store.folder} measured other queries under the name {name!r} (fingerprint {theirs[:8]}, not "
                f"{fingerprint[:8]}) -> give these another name, or the bank another folder"
            )


def code_digests(train_fn: Callable[..., Any], task: Task) -> dict[str, str]:
    """Hashes of the user's code that decides what a shard holds."""
    code = task.measured_by
    return {"train_fn": function_digest(train_fn), "measure": "" if code is None else function_digest(code)}


def function_digest(function: Callable[..., Any]) -> str:
    """Hash of the source of a function or a class; empty where there is none to be found."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def warn_of_changed_code(store: ShardStore, digests: Mapping[str, str]) -> None:
    """Warn if the finished models were trained, or measured, by other code."""
    done = [store.meta(key) for key in store.keys_done if key.startswith(("run-", "later-"))]
    for name, what, otherwise in (
        ("train_fn", "train_fn", "it trains differently"),
        ("measure", "the measurement", "it measures something else"),
    ):
        theirs = {meta.get(name, "") for meta in done}
        if digests[name] and theirs - {digests[name], ""}:
            warnings.warn(
                f"the code of {what} has changed since models in {store.folder} were trained -> if {otherwise} now, "
                "name another folder",
                stacklevel=4,
            )
