"""CIFAR-10 with CIFAR-10N's human labels, and a small network that learns from them: what two benchmarks share.

    images = data("worse", 10_000)              # .x, .given (the annotators' labels), .true, .wrong
    model, checkpoints = train(images.x, images.given, seed=0, keep_after=(1, 2, 4))

Images are the first rows of CIFAR-10's official (shuffled) order, so a prefix is a random sample. Pixels are divided by
255 and standardised by channel (MEAN, DEVIATION). ``UPWEIGHT_DATA`` names the folder that holds the data's ``load.py``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EPOCHS, BATCH, RATE, MOMENTUM, DECAY = 20, 128, 0.05, 0.9, 0.01

Checkpoint = tuple[dict[str, Tensor], float]
"""Weights, and the learning rate with which they were trained."""


@dataclass(frozen=True)
class Noisy:
    """Images, [n, 3, 32, 32] float32, with the labels that were given and the true ones, [n] int64."""

    x: Tensor
    given: Tensor
    true: Tensor

    @property
    def wrong(self) -> Tensor:
        """Whose given label is wrong, [n] bool."""
        return self.given != self.true


def data(noise: str, n: int = 10_000, seed: int = 0) -> Noisy:
    """The first `n` training images with labels of one kind.

    Args:
        noise: ``"worse"`` (the worst of three annotators, 40 % wrong), ``"aggregate"`` (their majority, 9 %),
            ``"random"`` (the first of the three, 17 %), ``"flips"`` (a tenth of the true labels, drawn by the seed,
            changed to any other class with equal chances), or ``"clean"``.
        n: how many images.
        seed: of the flips.
    """
    x, true = _images("train", n)
    if noise == "clean":
        return Noisy(x, true, true)
    if noise == "flips":
        generator = torch.Generator().manual_seed(seed)
        flipped = torch.randperm(n, generator=generator)[: n // 10]
        given = true.clone()
        given[flipped] = (true[flipped] + torch.randint(1, 10, (len(flipped),), generator=generator)) % 10
        return Noisy(x, given, true)
    columns = {"worse": "worse_label", "aggregate": "aggre_label", "random": "random_label1"}
    if noise not in columns:
        raise SystemExit(f"noise {noise!r} is unknown -> one of {', '.join([*columns, 'flips', 'clean'])}")
    labels = _loader().cifar10n()
    assert (labels["clean_label"][:n] == true.numpy()).all(), (
        "the rows of the labels are not those of the images"
    )
    return Noisy(x, torch.from_numpy(labels[columns[noise]][:n]), true)


def test_data(n: int = 5_000) -> tuple[Tensor, Tensor]:
    """The first `n` test images, and their true labels."""
    return _images("test", n)


def network() -> nn.Sequential:
    """Three convolutions with pooling and two linear layers: 89,834 parameters, no normalisation layers."""
    widths, layers = (3, 16, 32, 64), []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10))


def train(
    x: Tensor,
    y: Tensor,
    seed: int,
    keep_after: Sequence[int] = (),
    *,
    epochs: int = EPOCHS,
    decay: float = DECAY,
) -> tuple[nn.Module, list[Checkpoint]]:
    """The network trained on these images and labels: SGD, a cosine from RATE to 0, no augmentation.

    Weight decay is added to the gradient as decay * theta; DECAY keeps the network from learning wrong labels by heart
    (5e-4 lets it: it then agrees with nine in ten of them). The seed decides the first weights and the batches.

    Returns:
        The model in eval mode, and checkpoints after the epochs in `keep_after` (0: before the first).
    """
    torch.manual_seed(seed)
    model = network().to(memory_format=torch.channels_last)  # half again as fast on a CPU
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=decay, fused=True)
    images = x.contiguous(memory_format=torch.channels_last)
    generator, kept = torch.Generator().manual_seed(seed), []
    per_epoch = math.ceil(len(y) / BATCH)
    for epoch in range(epochs + 1):
        if epoch:
            for step, batch in enumerate(torch.randperm(len(y), generator=generator).split(BATCH)):
                done = ((epoch - 1) * per_epoch + step) / (epochs * per_epoch)
                optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done)) / 2
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), y[batch]).backward()
                optimizer.step()
        if epoch in keep_after:
            state = {k: v.detach().clone().contiguous() for k, v in model.state_dict().items()}
            kept.append((state, float(optimizer.param_groups[0]["lr"])))
    return model.to(memory_format=torch.contiguous_format).eval(), kept


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images whose largest logit is that of `y`."""
    hits = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(500), y.split(500)))
    return hits / len(y)


@functools.cache
def _images(split: str, n: int) -> tuple[Tensor, Tensor]:
    images, labels, _ = _loader().images("cifar10", split, n=n)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255)
    shape = (1, 3, 1, 1)
    return ((x - torch.tensor(MEAN).view(shape)) / torch.tensor(DEVIATION).view(shape)).contiguous(), (
        torch.from_numpy(labels)
    )


@functools.cache
def _loader() -> ModuleType:
    folder = os.environ.get("UPWEIGHT_DATA")
    path = Path(folder or ".") / "load.py"
    if not folder or not path.is_file():
        raise SystemExit(f"UPWEIGHT_DATA={folder} holds no load.py -> name a folder that does")
    spec = importlib.util.spec_from_file_location("upweight_data_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
