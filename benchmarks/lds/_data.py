"""Data sets of the suite: tensors read through the folder that UPWEIGHT_DATA names, which holds a ``load.py``."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

Data = tuple[Tensor, Tensor]

# Mean and standard deviation of the pixels, between 0 and 1, that are customary for these sets.
PIXELS = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}
CIFAR10_MEAN, CIFAR10_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@functools.cache
def loader() -> ModuleType:
    """The module ``load.py`` of the data folder."""
    folder = os.environ.get("UPWEIGHT_DATA")
    path = Path(folder or ".") / "load.py"
    if not folder or not path.is_file():
        raise SystemExit(f"UPWEIGHT_DATA={folder} holds no load.py -> name a folder that does")
    spec = importlib.util.spec_from_file_location("upweight_data_load", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def grey_images(name: str, split: str, count: int, standardise: bool = True) -> Data:
    """The first `count` images of "mnist" or "fashion_mnist", [count, 784] float32, and their labels."""
    images, labels, _ = loader().images(name, split, n=count)
    x = torch.from_numpy(images).reshape(count, -1).float()
    floor = float(x.mode().values.mode().values)
    # One copy of Fashion-MNIST has greys from 23 to 242, along a curve that is not known: its black is put to 0, and
    # 255 stays. The rest of the curve is left as it is, and cannot be undone without the original.
    if floor > 0:
        x = ((x - floor) * (255 / (255 - floor))).clamp(min=0)
    x = x / 255
    if standardise:
        mean, deviation = PIXELS[name]
        x = (x - mean) / deviation
    return x, torch.from_numpy(labels)


@functools.cache
def cifar10(split: str, count: int) -> Data:
    """The first `count` images of CIFAR-10, standardised, [count, 3, 32, 32] float32, and their labels."""
    images, labels, _ = loader().images("cifar10", split, n=count)
    x = torch.from_numpy(images).float() / 255
    x = (x - torch.tensor(CIFAR10_MEAN)) / torch.tensor(CIFAR10_DEVIATION)
    return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


@functools.cache
def shakespeare(length: int, count: int, queries: int) -> tuple[Tensor, Tensor, str]:
    """Windows of tiny Shakespeare: [count, length + 1] and [queries, length + 1] numbers of characters, and these.

    The windows to train on do not overlap and are the text's first; the queries are its last.
    """
    text = loader().text("tinyshakespeare")
    alphabet = "".join(sorted(set(text)))
    number = {character: k for k, character in enumerate(alphabet)}
    numbers = torch.tensor([number[character] for character in text])
    windows = numbers[: len(numbers) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    return windows[:count], windows[-queries:], alphabet
