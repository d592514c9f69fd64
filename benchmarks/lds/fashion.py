"""LDS on Fashion-MNIST: an MLP 784-512-256-128-10, 6,144 images to train on, half-subsets x seeds of real retraining.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/fashion.py [--bank runs/banks/fashion] [--subsets 100 --seeds 5]

The recipe of the SOURCE and ASTRA papers: SGD at rate .03 with momentum .9 and weight decay 1e-3 (on all parameters),
batches of 64, 20 epochs, fresh weights for every seed. 200 test images are measured: choices are made on those with
even numbers, and the other 100 are reported.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _data import Data, grey_images
from _methods import ALONG_THE_RUN, CLASSIFICATION, CORRECTED, influence, over_checkpoints, solved, tracin
from _suite import Setting, main
from _training import Checkpoint, sgd
from torch import nn

import upweight as uw
from upweight.curvature.solvers import Arnoldi, Astra, Lissa, Nystrom

TRAIN, QUERIES = 6144, 200
RECIPE: dict[str, Any] = {"rate": 0.03, "momentum": 0.9, "decay": 1e-3, "batch": 64, "epochs": 20}


def data() -> tuple[Data, Data]:
    """6,144 images to train on and 200 queries."""
    return grey_images("fashion_mnist", "train", TRAIN), grey_images("fashion_mnist", "test", QUERIES)


def network() -> nn.Module:
    widths = (784, 512, 256, 128)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def train(
    indices: np.ndarray, seed: int, keep_after: tuple[int, ...] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """A model trained on these images from the seed's weights, and its checkpoints after these epochs."""
    x, y = data()[0]
    torch.manual_seed(seed)
    model = network()
    chosen = torch.from_numpy(indices)
    kept = sgd(model, (x[chosen], y[chosen]), F.cross_entropy, seed=seed, keep_after=keep_after, **RECIPE)
    return model, kept


def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
    return train(indices, seed)[0]


ONCE = {
    **ALONG_THE_RUN,
    **CORRECTED,
    "EK-FAC, one sampled label": influence("ekfac", fisher="sampled", draws=1),
    "GGN, exact": influence("ggn", solver="cg", l2=True, dampings=(1e-2, 3e-2, 1e-1)),
    "GGN in blocks, exact": solved("cg", 3e-2, blocks=True),
    "GGN, Arnoldi of rank 200": solved(Arnoldi(rank=200), 3e-2),
    "GGN, Nyström of rank 200": solved(Nystrom(rank=200), 3e-2),
    "Hessian, Arnoldi of rank 200": solved(Arnoldi(rank=200), 0.1, "hessian", (0.3, 1.0)),
    "GGN, 100 steps of ASTRA": solved(Astra(iterations=100), 3e-2),
    "GGN, 200 steps of LiSSA": solved(Lissa(depth=200, batch_size=256), 3e-2),
    "TracIn, projected to 512 numbers": tracin(projection=512),
}
SETTING = Setting(
    "Fashion-MNIST MLP 784-512-256-128-10",
    uw.Classification(),
    data,
    network,
    train,
    train_fn,
    {
        **CLASSIFICATION,
        "EK-FAC, every second epoch, equal weights": over_checkpoints("ekfac", (1e-4,), equal=True),
        **ONCE,
    },
    {
        "recipe": "sgd",
        **RECIPE,
        "data": "fashion_mnist, black at 0, standardised",
        "network": "784-512-256-128-10",
    },
    l2=RECIPE["decay"],
    dampings=(1e-5, 1e-4, 1e-3, 5.2e-3, 3e-2),
    few_dampings=(1e-5, 1e-4, 1e-3),
    checkpoints=(3, 6, 10, 13, 17, 20),
    often=tuple(range(2, 21, 2)),
    once=frozenset({*ONCE, "diagonal", "GGN, one sampled label, dual", "empirical Fisher, dual"}),
)

if __name__ == "__main__":
    main({"fashion": SETTING})
