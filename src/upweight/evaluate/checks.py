"""Does a training function do what it is told? Found out from the first few models of a bank."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
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


def check_train_fn(train_fn: Any, subsets: Subsets) -> None:
    """Refuse what cannot be called, or cannot be told of changed labels."""
    if not callable(train_fn):
        raise UpweightError(
            f"train_fn is {type(train_fn).__name__}, expected a function -> def train_fn(indices, seed) that returns "
            "a trained model"
        )
    try:
        takes = inspect.signature(train_fn).parameters
    except ValueError:  # written in C: found out when it is called
        return
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
    if any(subsets.labels) and "labels" not in takes and not anything:
        raise UpweightError(
            "the subsets change labels, but train_fn takes no argument 'labels' -> def train_fn(indices, seed, "
            "labels=None), with labels a dict {position: label}"
        )


def check_inputs_matter(store: ShardStore, runs: Sequence[Run]) -> None:
    """Refuse a train_fn that ignores its indices; warn of one that ignores its seed.

    Two models count as the same if their weights (or whatever they are made of) and measurements agree to the last bit.
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


def _same(store: ShardStore, a: Run, b: Run) -> bool:
    ours, theirs = store.meta(a.key)["model"], store.meta(b.key)["model"]
    # Equal measurements are no sign by themselves: two different models may both be right on three queries.
    if ours is None or ours != theirs:
        return False
    first, second = store.read(a.key), store.read(b.key)
    return all(torch.equal(first[name], second[name]) for name in first if name in second)
