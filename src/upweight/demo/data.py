"""The demo's images: scikit-learn's digits, or a user's own (`sources.py`), and the labels flipped on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from upweight.errors import UpweightError

NETWORK_SIDE = 32
"""Larger images are scaled down to this many pixels a side before the network sees them."""

FEWEST_IMAGES = 10
"""Images each split must have: a network trained on fewer says nothing."""


@dataclass(frozen=True)
class Raw:
    """Images as they were read: uint8 pixels [n, height, width, channel], labels [n], and an id for each."""

    pixels: np.ndarray
    labels: np.ndarray
    ids: Sequence[int | str]

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in (1, 3):
            raise UpweightError(
                f"images came as {pixels.dtype} of shape {pixels.shape} "
                "-> give uint8 of [images, height, width, 1 or 3]"
            )
        if not len(pixels) == len(self.labels) == len(self.ids):
            raise UpweightError(
                f"there are {len(pixels)} images, {len(self.labels)} labels and {len(self.ids)} ids "
                "-> give one of each for every image"
            )


@dataclass(frozen=True)
class Split:
    """One half of an `ImageSet`.

    Attributes:
        inputs: what the network sees, float [n, channel, height, width], each channel standardised.
        labels: the true classes, int64 [n].
        pictures: what a person sees, uint8 [n, height, width, channel].
        ids: a name for each image: its row, or its path in the folder it came from.
    """

    inputs: Tensor
    labels: Tensor
    pictures: np.ndarray
    ids: Sequence[int | str]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageSet:
    """Images to train on and images to ask about.

    Attributes:
        name: what the set is called.
        classes: the name of each class.
        train: images the network learns from.
        test: images it has never seen; queries come from here.
        ink: strokes on an empty ground (digits, clothes), which a light page shows dark on light.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    ink: bool = False


def digits(n: int | None = None, seed: int = 0) -> ImageSet:
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn; a fifth of them is kept for testing.

    >>> images = digits(n=100)
    >>> images.train.inputs.shape, images.train.pictures.dtype, len(images.test)
    (torch.Size([100, 1, 8, 8]), dtype('uint8'), 25)
    """
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)  # ink in 16 steps
    pixels = (np.asarray(flat) * (255 / 16)).round().astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(labels)
    order = np.random.default_rng(seed).permutation(len(pixels))
    held_out = len(order) // 5
    train, test = order[held_out:][:n], order[:held_out]
    if n is not None:
        test = test[: max(FEWEST_IMAGES, n // 4)]
    split = [Raw(pixels[rows], labels[rows], rows.tolist()) for rows in (train, test)]
    return image_set("digits", [str(digit) for digit in range(10)], *split, ink=True)


def image_set(name: str, classes: Sequence[str], train: Raw, test: Raw, ink: bool = False) -> ImageSet:
    """Check what was read and standardise it by the training images' own mean and spread, channel by channel."""
    for split, raw in (("training", train), ("test", test)):
        if len(raw.labels) < FEWEST_IMAGES:
            raise UpweightError(
                f"{name} has {len(raw.labels)} {split} images, the demo needs at least {FEWEST_IMAGES} "
                "-> add images, or raise --n"
            )
        if not 0 <= raw.labels.min() <= raw.labels.max() < len(classes):
            raise UpweightError(
                f"the {split} labels of {name} run from {raw.labels.min()} to {raw.labels.max()}, but it has "
                f"{len(classes)} class names -> number the classes from 0"
            )
    seen = np.unique(train.labels)
    if len(seen) < 2:
        raise UpweightError(
            f"all {len(train.labels)} training images of {name} are of one class ({classes[int(seen[0])]!r}), "
            "a classifier needs two or more -> add images of another class, or raise --n"
        )
    if len(unseen := np.setdiff1d(test.labels, seen)):
        raise UpweightError(
            f"class {classes[int(unseen[0])]!r} of {name} has test images but no training images "
            "-> add some, or raise --n"
        )
    inputs = _inputs(train.pixels)
    mean = inputs.mean((0, 2, 3), keepdim=True)
    spread = inputs.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
    return ImageSet(
        name=printable(name),
        classes=tuple(printable(label) for label in classes),
        train=_split(train, (inputs - mean) / spread),
        test=_split(test, (_inputs(test.pixels) - mean) / spread),
        ink=ink,
    )


def flip_labels(labels: Tensor, classes: int, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Give a share of the examples another class, drawn evenly from the rest.

    Args:
        labels: true classes, int64 [n].
        classes: how many classes there are.
        share: part of the examples to flip.
        seed: decides which examples are flipped, and to what.

    Returns:
        The given labels, int64 [n], and which of them are wrong, bool [n].

    >>> given, flipped = flip_labels(torch.arange(10), classes=10, share=0.2)
    >>> int(flipped.sum()), bool(((given != torch.arange(10)) == flipped).all())
    (2, True)
    """
    generator = np.random.default_rng([seed, 1])
    chosen = generator.choice(len(labels), size=round(share * len(labels)), replace=False)
    given, flipped = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    steps = torch.from_numpy(generator.integers(1, classes, size=len(chosen)))
    given[chosen] = (labels[chosen] + steps) % classes
    flipped[chosen] = True
    return given, flipped


def printable(name: str) -> str:
    """The name with line breaks, terminal codes and other unprintable characters shown as question marks.

    >>> printable("cat" + chr(27) + "[31m")
    'cat?[31m'
    """
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def _inputs(pixels: np.ndarray) -> Tensor:
    inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    if max(inputs.shape[2:]) > NETWORK_SIDE:
        side = (NETWORK_SIDE, NETWORK_SIDE)
        inputs = torch.nn.functional.interpolate(inputs, side, mode="bilinear", antialias=True)
    return inputs.contiguous()


def _split(raw: Raw, inputs: Tensor) -> Split:
    return Split(inputs, torch.from_numpy(np.asarray(raw.labels, dtype=np.int64)), raw.pixels, raw.ids)
