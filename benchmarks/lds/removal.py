"""What really happens when a query's top proponents go: removal curves and brittleness on the digits, by retraining.

    python benchmarks/lds/removal.py [--bank runs/banks/removal] [--queries 10] [--seeds 3] [--jobs 2]

The setting is that of digits.py; the model explained is its first. Queries are evenly spaced among those that this
model predicts right. "random" removes as many random examples of the classes that EK-FAC's proponents have. Nothing is
chosen on the figures: dampings are automatic.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from _methods import as_array
from digits import SETTING, train_fn

import upweight as uw
from upweight.evaluate import brittleness, plan_removals, removal_curve, retrain_in

SIZES = (7, 14, 72, 144)
"""Half a per cent, one, five and ten of the training images."""
LARGEST = 288
METHODS = {
    "EK-FAC": partial(uw.Influence, curvature="ekfac"),
    "exact GGN": partial(uw.Influence, curvature="ggn", solver="cg", l2=SETTING.l2),
    "gradient dot": uw.GradDot,
    "embedding similarity": uw.EmbeddingSimilarity,
    "same class": uw.SameClass,
}
FLIPPING = ("EK-FAC", "exact GGN", "gradient dot")


def is_wrong(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return (model(batch[0]).argmax(1) != batch[1]).float()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/removal"))
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    run = SETTING.explained(0)
    with torch.no_grad():
        right = np.flatnonzero(run.model(run.query[0]).argmax(1) == run.query[1])
    chosen = right[np.linspace(0, len(right) - 1, options.queries).round().astype(int)]
    asked = run.query[0][chosen], run.query[1][chosen]
    n = len(run.train[1])
    scores = {
        name: method(run.model, run.task, progress=False).fit(run.train).attribute(asked)
        for name, method in METHODS.items()
    }

    plan = plan_removals(
        scores["EK-FAC"],
        SIZES,
        classes=run.train[1],
        baselines={name: as_array(found) for name, found in scores.items() if name != "EK-FAC"},
    )
    settings = {"seeds": options.seeds, "n_jobs": options.jobs, "settings": SETTING.settings}
    bank = uw.RetrainingBank(
        options.bank / "curve",
        train_fn,
        run.task,
        n,
        subsets=plan.subsets,
        **settings,
    )
    bank.measure(asked, "queries")
    print(bank.run(), flush=True)
    curve = removal_curve(plan, bank.outcomes("queries"))
    print(f"\n| removed | {' | '.join(f'{k}' for k in SIZES)} | area |\n|---|{'---|' * (len(SIZES) + 1)}")
    for kind, row in zip(curve.kinds, curve.changes, strict=True):
        name = "EK-FAC" if kind == "proponents" else kind
        print(f"| {name} | {' | '.join(map(str, row))} | {curve.areas[kind]} |")
    print(f"\nSlope of measured on predicted changes, EK-FAC: {curve.slope:.2f}", flush=True)

    for name in FLIPPING:
        folder = options.bank / name.replace(" ", "-")
        retrain = retrain_in(folder, train_fn, uw.Classification(is_wrong), n, asked, **settings)
        print(f"{name}: {brittleness(scores[name], retrain, LARGEST)}", flush=True)


if __name__ == "__main__":
    main()
