"""What the recipes of the suite share: the bank, scores kept on disk, the split of the queries, the table.

Nothing is chosen on what is reported: where a method has a choice (the damping), it is made on the queries with even
numbers, and all figures are of the queries with odd numbers.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _methods import Data, Explained, Method, as_array
from _training import Checkpoint
from torch import nn

import upweight as uw
from upweight.evaluate import LDS, Outcomes, lds, noise_ceiling, subsets
from upweight.evaluate.bootstrap import estimate_mean

FIRST_SEED = 1000
"""Seed of the first model that is explained: none of the bank's, of whose noise a method must know nothing."""

TrainFunction = Callable[..., tuple[nn.Module, list[Checkpoint]]]
Table = dict[str, np.ndarray]
"""Scores [query, train] by choice."""


@dataclass(frozen=True)
class Setting:
    """One recipe: what is trained on what, how it is measured, and which methods are compared.

    Attributes:
        train: ``(indices, seed, keep_after) -> (model, checkpoints after these epochs)``.
        train_fn: the same for the bank, ``(indices, seed) -> model``.
        settings: what decides the training, kept in the bank.
        l2: of the training objective, for the methods that take it.
        dampings: the sweep for the first model.
        few_dampings: the sweep for the others, some of the same; all of them if None.
        checkpoints: epochs after which the run of a model that is explained is kept.
        often: epochs of more checkpoints, for the methods that average over many.
        once: methods that take too long for more than the first model.
    """

    title: str
    task: uw.Task
    data: Callable[[], tuple[Data, Data]]
    network: Callable[[], nn.Module]
    train: TrainFunction
    train_fn: Callable[..., Any]
    methods: Mapping[str, Method]
    settings: dict[str, Any]
    l2: float
    dampings: tuple[float, ...]
    checkpoints: tuple[int, ...] = ()
    few_dampings: tuple[float, ...] | None = None
    often: tuple[int, ...] = ()
    once: frozenset[str] = frozenset()

    def open_bank(self, folder: Path, count: int, seeds: int, jobs: int = 1) -> uw.RetrainingBank:
        """The bank of `count` half-subsets, with all queries as "test"; seeds are the outer loop."""
        train, query = self.data()
        n = len(train[1])
        bank = uw.RetrainingBank(
            folder,
            self.train_fn,
            self.task,
            n,
            subsets=subsets.half_subsets(n, count, paired=False),
            seeds=seeds,
            model_fn=self.network,
            settings=self.settings,
            n_jobs=jobs,
        )
        bank.measure(query, "test")
        return bank

    def explained(self, number: int) -> Explained:
        """The `number`-th model of the whole training set."""
        train, query = self.data()
        seed = FIRST_SEED + number
        epochs = sorted({*self.checkpoints, *self.often})
        model, kept = self.train(np.arange(len(train[1])), seed, tuple(epochs))
        found = dict(zip(epochs, kept, strict=True)) if kept else {}
        few, often = ([found[e] for e in chosen if e in found] for chosen in (self.checkpoints, self.often))
        dampings = self.dampings if number == 0 or self.few_dampings is None else self.few_dampings
        return Explained(model, few, self.task, train, query, self.l2, dampings, number, seed, often)


# Scores ------------------------------------------------------------------------------------------------------------


class ScoreFolder:
    """Scores of every method for every model, kept so that a table can be made again as the bank grows."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        self.folder, self.setting = folder, setting
        folder.mkdir(parents=True, exist_ok=True)
        self._models: dict[int, Explained] = {}

    def get(self, name: str, number: int) -> tuple[Table, float]:
        """Scores by choice, and the CPU seconds that fit and first scores took."""
        path = self.folder / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{number}.npz"
        if not path.exists():
            self._score(name, number, path)
        with np.load(path) as stored:
            made_with = json.loads(str(stored["settings"]))
            if made_with != self._settings():
                raise SystemExit(
                    f"{path} is of another setting: {made_with} -> name another folder with --scores"
                )
            tables = {key[1:]: stored[key].astype(np.float64) for key in stored.files if key[0] == "="}
            return tables, float(stored["seconds"])

    def _score(self, name: str, number: int, path: Path) -> None:
        if number not in self._models:
            self._models = {number: self.setting.explained(number)}  # one at a time in memory
        run = self._models[number]
        started, seconds, tables = time.process_time(), math.nan, {}
        for choice, scores in self.setting.methods[name](run):
            seconds = time.process_time() - started if not tables else seconds
            tables[f"={choice}"] = as_array(scores).astype(np.float32)
        partial = path.with_suffix(".partial.npz")
        settings = json.dumps(self._settings())
        np.savez(partial, allow_pickle=False, settings=settings, seconds=seconds, **tables)
        os.replace(partial, path)
        print(f"model {number}: {name}, {seconds:.1f} s", file=sys.stderr, flush=True)

    def _settings(self) -> dict[str, Any]:
        return dict(self.setting.settings)


# Table -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table: a method with one model and with the mean of several."""

    method: str
    one: LDS
    several: LDS | None
    choices: tuple[str, str]
    seconds: float
    sweep: dict[str, float]
    each: list[float]

    def as_json(self) -> dict[str, Any]:
        figures = {
            name: {"value": r.value, "low": r.low, "high": r.high, "share": r.corrected, "median": r.median}
            for name, r in (("one", self.one), ("several", self.several))
            if r is not None
        }
        rest = {"choices": self.choices, "cpu_seconds": self.seconds, "sweep": self.sweep, "each": self.each}
        return {"method": self.method, **figures, **rest}


def split(outcomes: Outcomes) -> tuple[np.ndarray, np.ndarray]:
    """Queries to choose on (even numbers) and queries to report (odd ones)."""
    queries = np.arange(outcomes.values.shape[2])
    return queries[::2], queries[1::2]


def rows_of(name: str, scores: list[tuple[Table, float]], outcomes: Outcomes) -> list[Row]:
    """The rows of one method: one for its automatic choice and one for the best of its sweep, if it has them."""
    even, odd = split(outcomes)
    chosen_on, reported = outcomes.for_queries(even), outcomes.for_queries(odd)
    ceiling = noise_ceiling(reported)
    tables = [table for table, _ in scores]
    shared = [key for key in tables[0] if all(key in table for table in tables)]
    mean = {key: np.mean([table[key] for table in tables], axis=0) for key in shared}

    def value(table: np.ndarray) -> float:
        return lds(table[even], chosen_on, resamples=2, ceiling=ceiling).value

    sweep = {key: value(tables[0][key]) for key in tables[0]}
    sweep_mean = {key: value(mean[key]) for key in mean} if len(tables) > 1 else sweep
    rows = []
    for kind in ["", "auto", "chosen"]:
        if kind == "chosen":
            numbers = [key for key in sweep if key not in ("", "auto")]
            if not numbers:
                continue
            of_mean = [key for key in numbers if key in sweep_mean]
            keys = max(numbers, key=sweep.__getitem__), max(of_mean, key=sweep_mean.__getitem__)
        elif kind in sweep:
            keys = kind, kind
        else:
            continue
        rows.append(
            Row(
                name + (f", damping {kind}" if kind else ""),
                lds(tables[0][keys[0]][odd], reported, ceiling=ceiling),
                lds(mean[keys[1]][odd], reported, ceiling=ceiling) if len(tables) > 1 else None,
                keys,
                scores[0][1],
                sweep if kind == "chosen" else {},
                [
                    lds(table[keys[0]][odd], reported, resamples=2, ceiling=ceiling).value
                    for table in tables
                    if keys[0] in table
                ],
            )
        )
    return rows


def heading(title: str, outcomes: Outcomes) -> str:
    """What the table is of, and its noise ceiling."""
    reported = outcomes.for_queries(split(outcomes)[1])
    count, seeds, queries = reported.complete().values.shape
    text = f"{title}: {count} half-subsets x {seeds} seeds, {queries} reported queries."
    ceiling = noise_ceiling(reported)
    if ceiling is None:
        return text + " One seed: no noise ceiling."
    return (
        f"{text}\nNoise ceiling {ceiling.value:.3f} [{ceiling.low:.3f}, {ceiling.high:.3f}]; one seed against the "
        f"others {ceiling.one_against_others:.3f}; reliability of one seed {ceiling.reliability}."
    )


def report(title: str, rows: list[Row], outcomes: Outcomes) -> str:
    """The table as Markdown."""
    models = max(len(row.each) for row in rows)
    several = f" mean of {models} models | share |" if models > 1 else ""
    lines = [
        heading(title, outcomes),
        "",
        f"| method | one model | share of ceiling |{several} fit + score, CPU s |",
        "|---|---|---|" + ("---|---|" if models > 1 else "") + "---|",
    ]
    for row in rows:
        chosen = f" ({row.choices[0]})" if row.choices[0] not in ("", "auto") else ""
        cells = [f"{row.method}{chosen}", _figure(row.one), _share(row.one)]
        if row.several is not None:
            other = f" ({row.choices[1]})" if row.choices[1] != row.choices[0] else ""
            cells += [_figure(row.several) + other, _share(row.several)]
        elif several:
            cells += ["–", "–"]
        lines.append("| " + " | ".join([*cells, f"{row.seconds:.1f}"]) + " |")
    lines += ["", "The sweeps, one model, on the queries with even numbers:", ""]
    for row in rows:
        if row.sweep:
            values = ", ".join(f"{k}: {v:.3f}" for k, v in row.sweep.items())
            lines.append(f"- {row.method.removesuffix(', damping chosen')}: {values}")
    return "\n".join(lines)


def held_out(setting: Setting, outcomes: Outcomes) -> str:
    """What a linear regression of the bank's own outcomes predicts of subsets that it has not seen."""
    train, query = setting.data()
    odd = split(outcomes)[1]
    made = uw.Datamodel(None, setting.task, outcomes=outcomes.for_queries(odd), estimator="ridge").fit(train)
    info = made.attribute(tuple(part[odd] for part in query)).info
    each = np.asarray(info["held_out_lds_by_query"])
    found = estimate_mean(each, None, 0, 0.95, np.random.default_rng(0))
    return (
        f"A datamodel (ridge regression of this bank's outcomes on its subsets) has {found} on subsets held out "
        "(interval over queries)."
    )


def _share(result: LDS) -> str:
    return "–" if math.isnan(result.corrected) else f"{result.corrected:.2f}"


def _figure(result: LDS) -> str:
    return f"{result.value:.3f} [{result.low:.3f}, {result.high:.3f}]"


def main(settings: Mapping[str, Setting], count: int = 100, seeds: int = 5, models: int = 5) -> None:
    """Command line of a recipe: train what is missing in the bank, score, print the table."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = next(iter(settings)) if len(settings) == 1 else None
    parser.add_argument("setting", nargs="?" if default else None, choices=list(settings), default=default)
    parser.add_argument("--bank", type=Path, help="runs/banks/SETTING if not given")
    parser.add_argument("--scores", type=Path, help="where scores are kept; BANK-scores if not given")
    parser.add_argument("--subsets", type=int, default=count)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--models", type=int, default=models, help="models whose scores are averaged")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", nargs="*", help="only methods whose name holds one of these words")
    parser.add_argument("--only", choices=["bank", "scores", "table"], help="one of the steps alone")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    only, setting = arguments.only, settings[arguments.setting]
    folder = arguments.bank or Path("runs/banks") / arguments.setting
    opened = setting.open_bank(folder, arguments.subsets, arguments.seeds, arguments.jobs)
    if only in (None, "bank"):
        print(opened.run(), file=sys.stderr)
    if only == "bank":
        return
    kept = ScoreFolder(arguments.scores or folder.with_name(folder.name + "-scores"), setting)
    words = [word.lower() for word in arguments.methods or [""]]
    names = [name for name in setting.methods if any(word in name.lower() for word in words)]
    scores: dict[str, list[tuple[Table, float]]] = {}
    for number in range(arguments.models):  # models are the outer loop: each is trained once
        for name in names:
            if number and name in setting.once:
                continue
            found = kept.get(name, number)
            if only != "scores":
                scores.setdefault(name, []).append(found)
    if only == "scores":
        return
    outcomes = opened.outcomes("test")
    rows = [row for name in names for row in rows_of(name, scores[name], outcomes)]
    print(report(setting.title, rows, outcomes), "", held_out(setting, outcomes), sep="\n")
    if arguments.json is not None:
        content = {
            "setting": setting.title,
            "settings": outcomes.info,
            "rows": [row.as_json() for row in rows],
        }
        arguments.json.write_text(json.dumps(content, indent=1))
