"""Handwritten digits that come with scikit-learn, and a small network: an experiment that runs in under a minute.

upweight attribute examples/digits_experiment.py:experiment
upweight evaluate examples/digits_experiment.py:experiment --subsets 16 --seeds 2
"""

from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import nn

import upweight as uw

TRAIN, QUERIES, STEPS = 1000, 60, 150


@lru_cache
def digits():
    """Images [1797, 64] in 0 to 1 and their labels; some in random order to train on, some to ask about."""
    images, labels = (torch.as_tensor(a) for a in load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 16, labels[order]
    train, query = slice(0, TRAIN), slice(TRAIN, TRAIN + QUERIES)
    return (images[train], labels[train]), (images[query], labels[query])


def train_fn(indices, seed, labels=None):
    """Train from scratch on the images at these positions; the seed decides the first weights and the batches.

    A repair is checked with other labels, {position: label}.
    """
    images, given = digits()[0][0], digits()[0][1].clone()
    for position, label in (labels or {}).items():
        given[position] = label
    images, targets = images[indices], given[indices]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    for _ in range(STEPS):
        batch = torch.randint(len(targets), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), targets[batch]).backward()
        optimizer.step()
    return model.eval()


def show(example):
    """One digit as a picture; its class is named beside it."""
    image, _ = example
    return image.reshape(8, 8)


def experiment():
    """What the command line is given. A function: nothing is trained before it is called."""
    train, query = digits()
    return uw.Experiment(
        model=train_fn(torch.arange(TRAIN), seed=0),
        task=uw.Classification(),
        train=train,
        query=query,
        train_fn=train_fn,
        show=show,
        classes=[str(digit) for digit in range(10)],
        l2=1e-3,
        methods={
            # weight decay 1e-3 is part of what was minimised, so it belongs to the curvature
            "ekfac": lambda model, task: uw.Influence(model, task, damping=1e-3),
            "ekfac-auto": lambda model, task: uw.Influence(model, task),
            "grad-dot": lambda model, task: uw.GradDot(model, task),
        },
        name="digits",
    )
