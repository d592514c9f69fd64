"""LDS on digits: an MLP 64-256-128-10 against 50 half-subsets x 3 seeds of real retraining.

    python benchmarks/lds/digits.py [--bank runs/banks/digits] [--jobs 2] [--json out.json] [--subsets 50 --seeds 3]

The training objective is the mean cross-entropy over the subset plus (l2/2) ||theta||^2 over all parameters, l2 = 1e-3,
so its curvature is H + l2 I: a method that is told nothing of l2 has it within its damping. Every model starts from
fresh weights of its seed and is trained by full-batch Adam, 300 steps, learning rate 1e-2 falling to 0 along a cosine.
Data: scikit-learn's digits, divided by 16, 1437 to train on and 360 queries, split by a permutation of seed 0.

Nothing is chosen on what is reported: a method with several dampings is run with the one that is best on the queries
with even numbers, and its figure is that of the queries with odd numbers. Methods without a choice are reported on the
odd ones too, so that all figures are of the same queries.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import upweight as uw
from upweight.evaluate import Outcomes, lds, lds_difference, noise_ceiling, subsets

L2 = 1e-3
STEPS = 300
RATE = 1e-2
DAMPINGS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
TASK = uw.Classification()

Data = tuple[Tensor, Tensor]
Factory = Callable[[nn.Module, Data, Data], Any]
"""Fits a method to a model and gives back its scores of the queries: ``(model, train, query) -> Scores``."""


def data() -> tuple[Data, Data]:
    """1437 training images and 360 queries."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.data).float()[order] / 16
    y = torch.from_numpy(digits.target).long()[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
    """Minimise the subset's mean cross-entropy + (L2/2) ||theta||^2 from the seed's weights."""
    x, y = (tensor[indices] for tensor in data()[0])
    torch.manual_seed(seed)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        (F.cross_entropy(model(x), y) + L2 / 2 * penalty).backward()
        optimizer.step()
    return model.eval()


def open_bank(
    folder: Path, count: int = 50, seeds: int = 3, jobs: int = 1, keep: bool = False
) -> uw.RetrainingBank:
    """The bank of half-subsets, with the 360 queries as "test"."""
    bank = uw.RetrainingBank(
        folder,
        train_fn,
        TASK,
        1437,
        subsets=subsets.half_subsets(1437, count, paired=False),
        seeds=seeds,
        keep_models=keep,
        model_fn=network,
        settings={"l2": L2, "steps": STEPS, "rate": RATE, "optimizer": "full-batch Adam, cosine"},
        n_jobs=jobs,
    )
    bank.measure(data()[1], "test")
    return bank


# Methods -----------------------------------------------------------------------------------------------------------


def influence(curvature: str, damping: float | str = "auto", **options: Any) -> Factory:
    """`Influence` with one damping; more options (solver, l2) are handed on.

    The exact curvature, for example: ``influence("ggn", 1e-3, solver="dual", l2=L2)``.
    """

    def score(model: nn.Module, train: Data, query: Data) -> uw.Scores:
        method = uw.Influence(model, TASK, curvature=curvature, damping=damping, progress=False, **options)  # type: ignore[arg-type]
        return method.fit(train).attribute(query)

    return score


def sweep(curvature: str, **options: Any) -> dict[str, Factory]:
    """One factory for each damping."""
    return {f"{damping:g}": influence(curvature, damping, **options) for damping in DAMPINGS}


def random_scores(model: nn.Module, train: Data, query: Data) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(query[1]), len(train[1])))


METHODS: dict[str, Factory | dict[str, Factory]] = {
    "random": random_scores,
    "gradient dot": influence("identity"),
    "diagonal, damping auto": influence("diagonal"),
    "diagonal, damping chosen": sweep("diagonal"),
    "K-FAC, damping auto": influence("kfac"),
    "K-FAC, damping chosen": sweep("kfac"),
    "EK-FAC, damping auto": influence("ekfac"),
    "EK-FAC, damping chosen": sweep("ekfac"),
    "EK-FAC empirical, damping chosen": sweep("ekfac", fisher="empirical"),
    "exact GGN, damping 1e-3": influence("ggn", 1e-3, solver="dual", l2=L2),
    "exact GGN, damping 3e-3": influence("ggn", 3e-3, solver="dual", l2=L2),
    "exact GGN, damping auto": influence("ggn", solver="dual", l2=L2),
    "exact GGN, damping chosen": sweep("ggn", solver="dual", l2=L2),
    "DataInf, damping auto": influence("datainf"),
}
"""What the table lists. A dict of factories is a choice, made on the queries that are not reported."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    method: str
    damping: str
    value: float
    low: float
    high: float
    corrected: float
    median: float
    seconds: float
    scores: np.ndarray
    sweep: dict[str, float]


def evaluate(
    name: str, method: Factory | dict[str, Factory], models: list[nn.Module], outcomes: Outcomes
) -> Row:
    """Score with the mean over `models`, choose on even queries if there is a choice, report on odd ones."""
    train, query = data()
    queries = np.arange(len(query[1]))
    even, odd = queries[::2], queries[1::2]
    started = time.perf_counter()
    tables = {
        key: sum(_table(factory(model, train, query)) for model in models) / len(models)
        for key, factory in (method.items() if isinstance(method, dict) else [("", method)])
    }
    seconds = (time.perf_counter() - started) / len(tables)
    ceiling = noise_ceiling(outcomes.for_queries(odd))
    tried = {k: lds(t[even], outcomes.for_queries(even), resamples=2).value for k, t in tables.items()}
    best = max(tried, key=lambda key: tried[key])
    result = lds(tables[best][odd], outcomes.for_queries(odd), ceiling=ceiling)
    return Row(
        name,
        best,
        result.value,
        result.low,
        result.high,
        result.corrected,
        result.median,
        seconds,
        tables[best][odd],
        tried if len(tried) > 1 else {},
    )


def _table(scores: Any) -> np.ndarray:
    return scores.values.double().numpy() if isinstance(scores, uw.Scores) else scores


def report(rows: list[Row], outcomes: Outcomes) -> str:
    """The table as Markdown, with the ceiling and the difference from the best row on the same resamples."""
    odd = outcomes.for_queries(np.arange(1, outcomes.values.shape[2], 2))
    ceiling = noise_ceiling(odd)
    subsets_used, seeds, queries = odd.complete().values.shape
    lines = [f"Digits MLP, {subsets_used} half-subsets x {seeds} seeds, {queries} reported queries."]
    if ceiling is not None:
        lines.append(
            f"Noise ceiling {ceiling.value:.3f} [{ceiling.low:.3f}, {ceiling.high:.3f}]; one seed against the others "
            f"{ceiling.one_against_others:.3f}; reliability of one seed {ceiling.reliability}."
        )
    best = max(rows, key=lambda row: row.value)
    lines += [
        "",
        "| method | LDS | share of ceiling | behind the best | fit + score, s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        behind = "" if row is best else str(lds_difference(best.scores, row.scores, odd, resamples=300))
        chosen = f" ({row.damping})" if row.damping else ""
        lines.append(
            f"| {row.method}{chosen} | {row.value:.3f} [{row.low:.3f}, {row.high:.3f}] | {row.corrected:.3f} "
            f"| {behind} | {row.seconds:.1f} |"
        )
    for row in rows:
        if row.sweep:
            lines.append(
                f"\n{row.method}, on the other queries: "
                + ", ".join(f"{k}: {v:.3f}" for k, v in row.sweep.items())
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/digits"))
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--models", type=int, default=1, help="models of the whole training set to average scores over"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--methods", nargs="*", help="only methods whose name holds one of these words")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bank = open_bank(arguments.bank, arguments.subsets, arguments.seeds, arguments.jobs)
    print(bank.run(), file=sys.stderr)
    outcomes = bank.outcomes("test")
    # The models that are explained have seeds of their own: nothing is known of the bank's noise.
    models = [train_fn(np.arange(1437), 1000 + m) for m in range(arguments.models)]
    rows = []
    for name, method in METHODS.items():
        if not arguments.methods or any(word.lower() in name.lower() for word in arguments.methods):
            rows.append(evaluate(name, method, models, outcomes))
            print(f"{rows[-1].value:.3f}  {name}", file=sys.stderr)
    print(report(rows, outcomes))
    if arguments.json is not None:
        content = [{k: v for k, v in vars(row).items() if k != "scores"} for row in rows]
        arguments.json.write_text(json.dumps({"rows": content, "settings": outcomes.info}, indent=1))


if __name__ == "__main__":
    main()
