"""LDS on digits: an MLP 64-256-128-10 against 50 half-subsets x 3 seeds of real retraining.

    python benchmarks/lds/digits.py [--bank runs/banks/digits] [--jobs 2] [--json out.json] [--models 5]

The training objective is the mean cross-entropy over the subset plus (l2/2) ||theta||^2 over all parameters, l2 = 1e-3,
so its curvature is H + l2 I: a method that is told nothing of l2 has it within its damping. Every model starts from
fresh weights of its seed and is trained by full-batch Adam, 300 steps, learning rate 1e-2 falling to 0 along a cosine.
Checkpoints are kept after every fifth of the steps, and after every tenth for the rows that say so. "Banzhaf influence"
explains models of its own, each trained on half of the images: every two of them on the two halves of one division.
Data: scikit-learn's digits, divided by 16, 1437 to train on and 360 queries, split by a permutation of seed 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from _methods import CLASSIFICATION, Data, half_models, influence, over_checkpoints
from _suite import Setting, main
from _training import Checkpoint
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw

L2 = 1e-3
STEPS = 300
RATE = 1e-2
DAMPINGS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def data() -> tuple[Data, Data]:
    """1437 training images and 360 queries."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.data).float()[order] / 16
    y = torch.from_numpy(digits.target).long()[order]
    return (x[:1437], y[:1437]), (x[1437:], y[1437:])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def train(
    indices: np.ndarray, seed: int, keep_after: Sequence[int] = ()
) -> tuple[nn.Module, list[Checkpoint]]:
    """Minimise the subset's mean cross-entropy + (L2/2) ||theta||^2 from the seed's weights; keep these steps."""
    x, y = (tensor[indices] for tensor in data()[0])
    torch.manual_seed(seed)
    model, kept = network(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for step in range(STEPS):
        rate = optimizer.param_groups[0]["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        penalty = sum(p.square().sum() for p in model.parameters())
        (F.cross_entropy(model(x), y) + L2 / 2 * penalty).backward()
        optimizer.step()
        if step + 1 in keep_after:
            kept.append(({k: v.detach().clone() for k, v in model.state_dict().items()}, rate))
    return model.eval(), kept


def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
    return train(indices, seed)[0]


# TracIn is left out: the steps of Adam are not gradients.
METHODS = {name: method for name, method in CLASSIFICATION.items() if not name.startswith("TracIn")} | {
    "GGN, exact": influence("ggn", solver="cg", l2=True, dampings=(1e-3, 3e-3)),
    "GGN, exact, mean over checkpoints": over_checkpoints("ggn", (), solver="cg", l2=True),
    "GGN, exact, ten checkpoints, equal weights": over_checkpoints("ggn", (), True, solver="cg", l2=True),
    "EK-FAC, ten checkpoints, equal weights": over_checkpoints("ekfac", equal=True),
    "Banzhaf influence, half of the data a model": half_models(train, dampings=(3e-4, 1e-3, 3e-3)),
}
SETTING = Setting(
    "Digits MLP 64-256-128-10",
    uw.Classification(),
    data,
    network,
    train,
    train_fn,
    METHODS,
    {"l2": L2, "steps": STEPS, "rate": RATE, "optimizer": "full-batch Adam, cosine"},
    l2=L2,
    dampings=DAMPINGS,
    checkpoints=tuple(STEPS * k // 5 for k in range(1, 6)),
    often=tuple(STEPS * k // 10 for k in range(1, 11)),
    once=frozenset({"GGN, exact, ten checkpoints, equal weights"}),
)

if __name__ == "__main__":
    main({"digits": SETTING}, count=50, seeds=3)
