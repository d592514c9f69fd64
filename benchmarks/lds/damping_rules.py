"""Relative to what should a layer be damped? The LDS of K-FAC and EK-FAC by three rules, on every bank.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/damping_rules.py digits|concrete|parkinsons|fashion|mnist-mlp [--bank F]

"mean" is a multiple of each layer's mean eigenvalue, ``trace(H_l) / p_l``; "example" one of what an example adds to the
layer's trace in the mean, ``trace(H_l) / n``; "auto" the larger of .1 mean and .02 example; a number is the damping of
all layers. The first model of each recipe; the bank must have been trained by the recipe's own script. The .02 was
chosen on the queries with even numbers of the first four, before MNIST's MLP was looked at.
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

import torch
from _methods import as_array
from _suite import Setting, split

import upweight as uw
from upweight.evaluate import lds

RECIPES = {
    "digits": ("digits", 50, 3),
    "concrete": ("tabular", 100, 5),
    "parkinsons": ("tabular", 100, 5),
    "fashion": ("fashion", 100, 5),
    "mnist-mlp": ("mnist", 100, 1),
}
"""Module, and the subsets and seeds of its bank."""
TRIED: list[str | float] = [
    "auto",
    *(f"{number} mean" for number in (0.01, 0.03, 0.1, 0.3, 1)),
    *(f"{number} example" for number in (0.003, 0.01, 0.02, 0.03, 0.1)),
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
]
CURVATURES = ("kfac", "ekfac")


def recipe(name: str) -> tuple[Setting, int, int]:
    """The setting of this name, and the size of its bank."""
    module, count, seeds = RECIPES[name]
    found = importlib.import_module(module)
    return (found.SETTINGS[name] if hasattr(found, "SETTINGS") else found.SETTING), count, seeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("setting", choices=list(RECIPES))
    parser.add_argument("--bank", type=Path, help="runs/banks/SETTING if not given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setting, count, seeds = recipe(arguments.setting)
    bank = setting.open_bank(arguments.bank or Path("runs/banks") / arguments.setting, count, seeds)
    outcomes = bank.outcomes("test")
    run, parts = setting.explained(0), split(outcomes)
    for curvature in CURVATURES:
        method = uw.Influence(run.model, run.task, curvature=curvature, progress=False).fit(run.train)
        for damping in TRIED:
            scores = as_array(method.with_damping(damping).attribute(run.query))
            even, odd = (
                lds(scores[p], outcomes.for_queries(p), resamples=2, ceiling=None).value for p in parts
            )
            print(f"{curvature}, {damping}: {even:.3f} on even queries, {odd:.3f} on odd ones", flush=True)


if __name__ == "__main__":
    main()
