"""A small convolutional network and the one recipe that trains it, quick enough to train it dozens of times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum, clipped gradients and a one-cycle learning rate.

    `weight_decay` makes the objective ``mean loss + weight_decay/2 * |theta|^2``: it keeps the network from learning
    wrong labels by heart, and the optimum well enough determined for a prediction of what moves it.
    """

    epochs: int = 20
    batch_size: int = 128
    fewest_batches: int = 10
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.01
    largest_gradient: float = 2.0


def convolutional_network(shape: Sequence[int], classes: int, seed: int) -> nn.Sequential:
    """Convolutions that halve the image until about 4 x 4 pixels are left, then two linear layers.

    Args:
        shape: channels, height and width of an image.
        classes: how many classes to tell apart.
        seed: decides the first weights; the global random state is left alone.

    >>> sum(weight.numel() for weight in convolutional_network((1, 8, 8), classes=10, seed=0).parameters())
    9802
    """
    channels, height, width = shape
    stride, features = (2, 16) if min(height, width) > 16 else (1, 8)
    with torch.device("meta"):  # no memory and no random numbers yet
        layers: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1, stride=stride), nn.ReLU()]
        height, width = -(-height // stride), -(-width // stride)
        while min(height, width) > 4:
            layers += [nn.Conv2d(features, 2 * features, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            features, height, width = 2 * features, height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(features * height * width, 32), nn.ReLU(), nn.Linear(32, classes)]
    model = nn.Sequential(*layers).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
    return model


def train_network(
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    seed: int = 0,
    without: Tensor | None = None,
    recipe: Recipe | None = None,
) -> nn.Sequential:
    """Train a network from scratch.

    The same seed gives the same first weights and the same batches, whichever examples are left out: those only lose
    their vote. Two trainings therefore differ by what was removed and by nothing else, and since the sum over the rest
    is still divided by the full number, this is the removal that influence scores predict.

    Args:
        inputs: images, float [n, channel, height, width].
        labels: given classes, int64 [n].
        classes: how many classes there are.
        seed: decides first weights and the order of batches.
        without: positions to leave out, int64 [k].
        recipe: how to train.

    Returns:
        The trained network, in evaluation mode.
    """
    recipe = recipe or Recipe()
    votes = torch.ones(len(labels))
    if without is not None:
        votes[without] = 0.0
    model = convolutional_network(inputs.shape[1:], classes, seed)
    batches = max(recipe.fewest_batches, -(-len(labels) // recipe.batch_size))
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.learning_rate,
        total_steps=recipe.epochs * batches,
        pct_start=0.2,
        cycle_momentum=False,
    )
    order = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        for batch in torch.randperm(len(labels), generator=order).tensor_split(batches):
            losses = cross_entropy(model(inputs[batch]), labels[batch], reduction="none")
            optimizer.zero_grad()
            (losses @ votes[batch] / len(batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.largest_gradient)
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predictions(model: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The class the model finds likeliest [n], and its loss on the given labels [n] in nats."""
    logits = torch.cat([model(batch) for batch in inputs.split(1000)])
    return logits.argmax(1), cross_entropy(logits, labels, reduction="none")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread, as is quickest for a network this small and gives the same bits on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def side_by_side(
    work: Callable[[Job], Result], jobs: Sequence[Job], advance: Callable[[], None] = lambda: None
) -> list[Result]:
    """Do the same work for many jobs, one on each core.

    Args:
        work: what to do with a job; it must not touch anything shared.
        jobs: what to do it with.
        advance: called after every job.

    Returns:
        What each job gave, in their order.
    """

    def one(job: Job) -> Result:
        result = work(job)
        advance()
        return result

    cores = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(cores, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(one, jobs))
