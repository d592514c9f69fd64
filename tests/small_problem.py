"""A float64 network of four inputs and three classes, a few examples for it, and its influence functions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upweight as uw

CURVATURES = ("ekfac", "kfac", "diagonal", "identity")


def small(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs)).double().eval()


def data(n: int, seed: int, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, outputs, (n,), generator=generator)


TRAIN, QUERY = data(15, 1), data(4, 2)


def influence(model: nn.Module, task: uw.Task | None = None, **options) -> uw.Influence:
    return uw.Influence(model, task or uw.Classification(), **{"damping": 1e-2, **options})


def logits(model: nn.Module | None = None) -> Tensor:
    """Of the training examples, by the small network if no other is given."""
    return (model or small())(TRAIN[0]).detach()


def cross_entropy(model: nn.Module, batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
