"""LDS on CIFAR-10: a ResNet-9, 3,072 images to train on, half-subsets x seeds of real retraining.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/cifar.py thin|narrow|wide [--bank FOLDER] [--subsets 50 --seeds 2]

The network of the SOURCE and ASTRA papers, trained by SGD with momentum .9, weight decay 1e-3 (on all parameters) and a
rate that rises linearly over the first fifth of the run and falls to 0 again, without augmentation. The papers' batches
of 512 at rates of up to .4 give a half-subset 75 steps, and the networks that a CPU can train learn next to nothing by
them (test accuracy .36 for `thin`, .13 for `narrow`): here it is 16 epochs of batches of 64 at rates of up to .05.

`thin` has the widths 8-16-32-64: 25 s of one thread for a half-subset, test accuracy .50. `narrow` has 16-32-64-128
(0.41 M parameters): 95 s, .55; both know .98 of their own images. `wide` has the 64-128-256-512 of the papers, which
takes a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _data import Data, cifar10
from _methods import CLASSIFICATION
from _suite import Setting, main
from _training import Checkpoint, sgd
from torch import Tensor, nn

import upweight as uw

TRAIN, QUERIES = 3072, 200
RECIPE: dict[str, Any] = {"rate": 0.05, "momentum": 0.9, "decay": 1e-3, "batch": 64, "epochs": 16}
RISE = 0.2
"""Share of the steps in which the rate rises."""
WIDTHS = {"thin": (8, 16, 32, 64), "narrow": (16, 32, 64, 128), "wide": (64, 128, 256, 512)}
# A sweep over dual inverses or diagonals of 0.4 M parameters takes hours: one damping each for the slow ones.
METHODS = {name: method for name, method in CLASSIFICATION.items() if "dual" not in name}


def triangle(done: float) -> float:
    """The rate's factor after this share of all steps."""
    return done / RISE if done < RISE else (1 - done) / (1 - RISE)


def data() -> tuple[Data, Data]:
    """3,072 images to train on and 200 queries."""
    return cifar10("train", TRAIN), cifar10("test", QUERIES)


class Unit(nn.Sequential):
    """Convolution, BatchNorm, ReLU and, if asked, pooling."""

    def __init__(self, inputs: int, outputs: int, pool: bool = False) -> None:
        layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, *([nn.MaxPool2d(2)] if pool else []))


class ResNet9(nn.Module):
    """The usual ResNet-9 of CIFAR speed runs."""

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        a, b, c, d = widths
        self.stem = nn.Sequential(Unit(3, a), Unit(a, b, pool=True))
        self.first = nn.Sequential(Unit(b, b), Unit(b, b))
        self.middle = nn.Sequential(Unit(b, c, pool=True), Unit(c, d, pool=True))
        self.second = nn.Sequential(Unit(d, d), Unit(d, d))
        self.head = nn.Linear(d, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [batch, 3, 32, 32] to logits [batch, 10]."""
        x = self.stem(x)
        x = self.middle(x + self.first(x))
        x = x + self.second(x)
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


def train(
    name: str, indices: np.ndarray, seed: int, keep_after: tuple[int, ...] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """A model trained on these images from the seed's weights, and its checkpoints after these epochs."""
    x, y = data()[0]
    torch.manual_seed(seed)
    model = ResNet9(WIDTHS[name])
    chosen = torch.from_numpy(indices)
    part = (x[chosen], y[chosen])
    kept = sgd(model, part, F.cross_entropy, seed=seed, keep_after=keep_after, schedule=triangle, **RECIPE)
    return model, kept


def train_thin(indices: np.ndarray, seed: int) -> nn.Module:
    return train("thin", indices, seed)[0]


def train_narrow(indices: np.ndarray, seed: int) -> nn.Module:
    return train("narrow", indices, seed)[0]


def train_wide(indices: np.ndarray, seed: int) -> nn.Module:
    return train("wide", indices, seed)[0]


def setting(name: str, train_fn: Any) -> Setting:
    widths = "-".join(map(str, WIDTHS[name]))
    return Setting(
        f"CIFAR-10 ResNet-9 {widths}",
        uw.Classification(),
        data,
        functools.partial(ResNet9, WIDTHS[name]),
        functools.partial(train, name),
        train_fn,
        METHODS,
        {
            "recipe": "sgd, triangle",
            **RECIPE,
            "data": "cifar10, standardised",
            "network": f"ResNet-9 {widths}",
        },
        l2=RECIPE["decay"],
        dampings=(1e-5, 1e-4, 1e-3, 1.4e-2, 1e-1),
        few_dampings=(1e-4, 1e-3),
        checkpoints=(3, 6, 9, 12, 14, 16),
    )


if __name__ == "__main__":
    trained = {"thin": train_thin, "narrow": train_narrow, "wide": train_wide}
    main({name: setting(name, train_fn) for name, train_fn in trained.items()}, 50, 2, 1)
