"""LDS on two UCI regressions: an MLP with three hidden layers of 128, half-subsets x seeds of real retraining.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/tabular.py concrete|parkinsons [--bank runs/banks/concrete]

The recipe of the SOURCE and ASTRA papers: SGD with momentum .9, batches of 32, 20 epochs; Concrete at rate .03 with
weight decay 1e-5, Parkinsons at rate .01 with weight decay 3e-5; fresh weights for every seed. The loss is half the
squared error of the standardised target; inputs and target are standardised by the training rows. Training rows are the
first 896 (5,280) of a permutation of those outside the source's first test split, and the queries come from that split.
Parkinsons is predicted without the patient's number, its column 0; rows of one patient are on both sides of the split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _data import Data, loader
from _methods import REGRESSION, half_models
from _suite import Setting, main
from _training import Checkpoint, sgd
from torch import Tensor, nn

import upweight as uw


@dataclass(frozen=True)
class Table:
    """One data set and its recipe."""

    name: str
    train: int
    queries: int
    first_column: int
    inputs: int
    recipe: tuple[tuple[str, Any], ...]


SHARED = (("momentum", 0.9), ("batch", 32), ("epochs", 20))
CONCRETE = Table("concrete", 896, 103, 0, 8, (("rate", 0.03), ("decay", 1e-5), *SHARED))
PARKINSONS = Table("parkinsons", 5280, 200, 1, 19, (("rate", 0.01), ("decay", 3e-5), *SHARED))


@functools.cache
def data(table: Table) -> tuple[Data, Data]:
    """Rows to train on and queries, [rows, inputs] and [rows, 1]."""
    x, y, test = loader().tabular(table.name)
    x = x[:, table.first_column :]
    order = np.random.default_rng(0).permutation(len(y))
    train = order[~test[order, 0]][: table.train]
    query = order[test[order, 0]][: table.queries]

    def standard(values: np.ndarray) -> np.ndarray:
        deviation = values[train].std(axis=0)
        return (values - values[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)

    inputs = torch.from_numpy(standard(x)).float()
    targets = torch.from_numpy(standard(y.reshape(len(y), 1))).float()
    return (inputs[train], targets[train]), (inputs[query], targets[query])


def network(inputs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for width in (inputs, 128, 128):
        layers += [nn.Linear(width, 128), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(128, 1))


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets).square().mean()


def train(
    table: Table, indices: np.ndarray, seed: int, keep_after: tuple[int, ...] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """A model trained on these rows from the seed's weights, and its checkpoints after these epochs."""
    x, y = data(table)[0]
    torch.manual_seed(seed)
    model = network(table.inputs)
    chosen = torch.from_numpy(indices)
    recipe = dict(table.recipe)
    kept = sgd(model, (x[chosen], y[chosen]), half_squared_error, seed=seed, keep_after=keep_after, **recipe)
    return model, kept


def train_concrete(indices: np.ndarray, seed: int) -> nn.Module:
    return train(CONCRETE, indices, seed)[0]


def train_parkinsons(indices: np.ndarray, seed: int) -> nn.Module:
    return train(PARKINSONS, indices, seed)[0]


def setting(table: Table, train_fn: Any) -> Setting:
    recipe = dict(table.recipe)
    return Setting(
        f"{table.name.capitalize()} MLP {table.inputs}-128-128-128-1",
        uw.Regression(),
        functools.partial(data, table),
        functools.partial(network, table.inputs),
        functools.partial(train, table),
        train_fn,
        REGRESSION
        | {"Banzhaf influence, half of the data a model": half_models(functools.partial(train, table))},
        {"recipe": "sgd", **recipe, "data": f"{table.name}, standardised, split 0", "network": "128 x 3"},
        l2=recipe["decay"],
        dampings=(1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        checkpoints=(3, 6, 10, 13, 17, 20),
    )


SETTINGS = {
    "concrete": setting(CONCRETE, train_concrete),
    "parkinsons": setting(PARKINSONS, train_parkinsons),
}

if __name__ == "__main__":
    main(SETTINGS)
