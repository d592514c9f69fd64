"""The demo's images, flipped labels and network as an `Experiment`, so that every command works on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.demo.data import ImageSet, flip_labels
from upweight.demo.network import Recipe, one_thread, train_network
from upweight.demo.results import Settings
from upweight.demo.sources import open_images

FILE = "experiment.py"
"""What `write_experiment` writes into the run's folder."""

_SOURCE = '''"""What `upweight demo` worked on, for the other commands.

upweight explore {file}:experiment --out {folder}
"""

from pathlib import Path

from upweight.demo.experiment import demo_experiment


def experiment():
    """The images, the flipped labels, and the network trained on them; it is trained when this is called."""
    return demo_experiment(data={data!r}, root={root}, n={n!r}, seed={seed!r})
'''


def demo_experiment(
    data: str | None = None, root: Path | None = None, n: int | None = None, seed: int = 0
) -> uw.Experiment:
    """What `upweight demo` works on with these settings: the same images, flips and network.

    Args:
        data: as in `Settings`.
        root: as in `Settings`.
        n: training images to take.
        seed: decides splits, flips, first weights and batches.
    """
    settings = Settings(data=data, root=root, n=n, seed=seed)
    images = open_images(data, root, n, seed)
    given, _ = flip_labels(images.train.labels, len(images.classes), settings.flip_share, seed)
    with one_thread():
        model = train_network(images.train.inputs, given, len(images.classes), seed, recipe=settings.recipe)
    return as_experiment(settings, images, given, model)


def as_experiment(settings: Settings, images: ImageSet, given: Tensor, model: nn.Module) -> uw.Experiment:
    """An experiment of what is there already; the test images are its queries."""
    train = uw.Examples((images.train.inputs, given), images.train.ids)
    query = uw.Examples((images.test.inputs, images.test.labels), images.test.ids)
    return uw.Experiment(
        model,
        uw.Classification(),
        train,
        query,
        train_fn=trainer(images, given, settings.recipe),
        classes=images.classes,
        l2=settings.recipe.weight_decay,
        methods={
            # weight decay curves the objective but is no part of any example's loss: it enters as damping
            "ekfac": lambda model, task: uw.Influence(model, task, damping=settings.recipe.weight_decay)
        },
        name=f"demo on {images.name}, {len(images.train):,} images, seed {settings.seed}",
    )


def trainer(images: ImageSet, given: Tensor, recipe: Recipe) -> Callable[..., nn.Module]:
    """``train_fn(indices, seed, labels=None)``: the demo's training on some of the images, or with other labels."""

    def train_fn(indices: np.ndarray, seed: int, labels: Mapping[int, Any] | None = None) -> nn.Module:
        left_out = np.setdiff1d(np.arange(len(given)), indices)
        y = given.clone()
        for position, label in (labels or {}).items():
            y[position] = label
        with one_thread():
            without = torch.from_numpy(left_out) if len(left_out) else None
            return train_network(images.train.inputs, y, len(images.classes), seed, without, recipe)

    return train_fn


def write_experiment(settings: Settings) -> str:
    """Write ``experiment.py`` into the run's folder; its address."""
    file = settings.out / FILE
    root = None if settings.root is None else f"Path({str(settings.root.resolve())!r})"
    text = _SOURCE.format(
        file=file, folder=settings.out, data=settings.data, root=root, n=settings.n, seed=settings.seed
    )
    if settings.root is None:
        text = text.replace("from pathlib import Path\n\n", "")
    file.write_text(text, encoding="utf-8")
    return f"{file}:experiment"
