"""What tests of evaluation share: a small problem to retrain on, and simulated banks whose truth is known."""

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import upweight as uw
from upweight.evaluate import Outcomes, subsets

N, QUERIES = 24, 6
TASK = uw.Classification()


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N + QUERIES, 3, generator=generator)
    y = (x[:, 0] + 0.3 * torch.randn(N + QUERIES, generator=generator) > 0).long()
    return (x[:N], y[:N]), (x[N:], y[N:])


def network():
    return torch.nn.Linear(3, 2)


class Trainer:
    """A train_fn that notes every model it trains in a file, one line each, and can be told to misbehave."""

    def __init__(self, log: Path | None = None, fault=None, pause: float = 0.0):
        self.log, self.fault, self.pause = log, fault, pause

    def __call__(self, indices, seed, labels=None):
        (x, y), _ = problem()
        y = y.clone()
        for position, label in (labels or {}).items():
            y[position] = label
        if self.fault == "indices":
            indices = np.arange(N)
        torch.manual_seed(0 if self.fault == "seed" else seed)
        time.sleep(self.pause)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{np.packbits(np.isin(np.arange(N), indices)).tobytes().hex()}-{seed}\n")
        if callable(self.fault):
            self.fault(indices, seed, model)
        return model


def bank(folder, train_fn=None, count=4, seeds=2, **options):
    options = {"subsets": subsets.half_subsets(N, count, paired=False), "progress": False, **options}
    made = uw.RetrainingBank(folder, train_fn or Trainer(), TASK, N, seeds=seeds, **options)
    made.measure(problem()[1], "queries")
    return made


def simulated(generator, n=40, queries=30, count=60, seeds=3, noise=1.0, shared=0.0, paired=False):
    """A linear truth [query, train] and outcomes that follow it but for noise of this share of its deviation.

    Its deviation over all half-subsets: over those drawn, the noise would follow the draw, and no interval knows that.
    """
    truth = generator.standard_normal((queries, n))
    masks = subsets.half_subsets(n, count, seed=int(generator.integers(1 << 31)), paired=paired).masks
    signal = (~masks).astype(float) @ truth.T  # [subset, query]
    spread = truth.std(axis=1) * n / 2 / np.sqrt(n - 1)  # each query's own
    values = signal[:, None] + noise * spread * generator.standard_normal((count, seeds, queries))
    values += shared * spread * generator.standard_normal((count, seeds, 1))
    return truth, Outcomes(masks, values, blocks=np.arange(count) // (2 if paired else 1))
