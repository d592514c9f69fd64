"""LDS on MNIST in dattri's setting: logistic regression, or an MLP, half-subsets of real retraining.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/mnist.py mnist-lr|mnist-mlp [--bank runs/banks/mnist-lr] [--seeds 1]

The first 5,000 training images and the first 500 test images, pixels standardised, batches of 64. `lr`: 784-10 without
a bias, SGD at rate .01, 20 epochs. `mlp`: 784-128-64-10, ReLU, dropout .1, SGD at rate .01 with momentum .9, 50 epochs.
The published figures are of 100 half-subsets with one seed each, and are the best of a grid of dampings on the queries
that are reported; here the damping is chosen on other queries.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _data import Data, grey_images
from _methods import CLASSIFICATION, influence
from _suite import Setting, main
from _training import Checkpoint, sgd
from torch import nn

import upweight as uw

LR: dict[str, Any] = {"rate": 0.01, "momentum": 0.0, "decay": 0.0, "batch": 64, "epochs": 20}
MLP: dict[str, Any] = {"rate": 0.01, "momentum": 0.9, "decay": 0.0, "batch": 64, "epochs": 50}
LR_GGN = {"GGN, CG": influence("ggn", dampings=(1e-3, 1e-2, 1e-1), solver="cg")}
MLP_GGN = {"GGN, CG": influence("ggn", dampings=(1e-2, 3e-2, 1e-1), solver="cg")}


def data() -> tuple[Data, Data]:
    """5,000 images to train on and 500 queries."""
    return grey_images("mnist", "train", 5000), grey_images("mnist", "test", 500)


def logistic() -> nn.Module:
    return nn.Linear(784, 10, bias=False)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(128, 64), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(64, 10),
    )  # fmt: skip


def train(
    network: Any, recipe: dict[str, Any], indices: np.ndarray, seed: int, keep_after: tuple[int, ...] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """A model trained on these images from the seed's weights, and its checkpoints after these epochs."""
    x, y = data()[0]
    torch.manual_seed(seed)  # of dropout, too
    model = network()
    chosen = torch.from_numpy(indices)
    kept = sgd(model, (x[chosen], y[chosen]), F.cross_entropy, seed=seed, keep_after=keep_after, **recipe)
    return model, kept


def train_lr(indices: np.ndarray, seed: int) -> nn.Module:
    return train(logistic, LR, indices, seed)[0]


def train_mlp(indices: np.ndarray, seed: int) -> nn.Module:
    return train(perceptron, MLP, indices, seed)[0]


def setting(name: str, network: Any, recipe: dict[str, Any], train_fn: Any, more: dict[str, Any]) -> Setting:
    epochs = recipe["epochs"]
    # Representer points and the dual need a regulariser, which this recipe has not.
    methods = {k: v for k, v in CLASSIFICATION.items() if not k.startswith("representer")}
    return Setting(
        f"MNIST {name}, dattri's setting",
        uw.Classification(),
        data,
        network,
        functools.partial(train, network, recipe),
        train_fn,
        {**methods, **more},
        {"recipe": "sgd", **recipe, "data": "mnist, standardised", "network": name},
        l2=0.0,
        dampings=(1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        checkpoints=tuple(epochs * k // 6 for k in range(1, 7)),
    )


SETTINGS = {
    "mnist-lr": setting("LR 784-10", logistic, LR, train_lr, LR_GGN),
    "mnist-mlp": setting("MLP 784-128-64-10", perceptron, MLP, train_mlp, MLP_GGN),
}

if __name__ == "__main__":
    main(SETTINGS)
