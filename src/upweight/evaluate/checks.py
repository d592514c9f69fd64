"""Does a training function do what it is told? Found out from the first few models of a bank."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from upweight.errors import UpweightError
from upweight.evaluate.runs import Run
from upweight.evaluate.subsets import Subsets
from upweight.store import ShardStore

DIFFERENT = 0.2
"""Two subsets tell whether train_fn heeds its indices if they differ in at least this share of the examples."""


def most_different(subsets: Subsets) -> tuple[int, int | None]:
    """The first subset without changes of labels and the one least like it, or None if all are much like it."""
    plain = [s for s, labels in enumerate(subsets.labels) if not labels] or [0]
    first = plain[0]
    differing = (subsets.masks[plain] ^ subsets.masks[first]).mean(axis=1)
    other = int(np.argmax(differing))
    return first, plain[other] if differing[other] >= DIFFERENT else None


def check_inputs_matter(store: ShardStore, runs: Sequence[Run]) -> None:
    """Refuse a train_fn that ignores its indices; warn of one that ignores its seed.

    Two models count as the same if all their measurements (and their weights) agree to the last bit.
    """
    done = [run for run in runs if store.has(run.key)]
    for number, a in enumerate(done):
        for b in done[:number]:
            same_data = np.array_equal(a.indices, b.indices)
            differing = len(np.setxor1d(a.indices, b.indices))
            if not _same(store, a, b):
                continue
            if a.seed == b.seed and differing >= 2 and not same_data:
                raise UpweightError(
                    f"train_fn ignores its indices: trained on {len(a.indices)} and on {len(b.indices)} examples, "
                    f"{differing} of them in one set only, it gave the same model to the last bit -> train on the "
                    "examples at `indices`, and name a new folder"
                )
            if a.seed != b.seed and same_data:
                warnings.warn(
                    f"train_fn ignores its seed: seeds {b.seed} and {a.seed} gave the same model to the last bit, so "
                    "more seeds say nothing about noise -> seed initialisation and data order with it (or seeds=1, if "
                    "training is meant to be deterministic)",
                    stacklevel=4,
                )


def function_digest(function: Callable[..., Any]) -> str:
    """Hash of a function's source; empty where there is none to be found."""
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        return ""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


def warn_of_changed_code(store: ShardStore, train_fn: Callable[..., Any]) -> None:
    """Warn if the finished models were trained by other code."""
    ours = function_digest(train_fn)
    theirs = {store.meta(key)["train_fn"] for key in store.keys_done if key.startswith("run-")}
    if ours and theirs - {ours, ""}:
        warnings.warn(
            f"the code of train_fn has changed since models in {store.folder} were trained -> if it trains differently "
            "now, name another folder",
            stacklevel=4,
        )


def _same(store: ShardStore, a: Run, b: Run) -> bool:
    if store.meta(a.key)["model"] != store.meta(b.key)["model"]:
        return False
    ours, theirs = store.read(a.key), store.read(b.key)
    names = [name for name in ours if name.startswith("query/") and name in theirs]
    # Scikit-learn models have no fingerprint: without queries there is nothing to compare.
    if not names and store.meta(a.key)["model"] is None:
        return False
    return all(torch.equal(ours[name], theirs[name]) for name in names)
