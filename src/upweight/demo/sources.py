"""Where a user's own images come from: an image folder, a torchvision data set, or a folder with a `load.py`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from upweight.demo.data import ImageSet, Raw, digits, image_set
from upweight.errors import UpweightError

KNOWN = {"cifar10": "CIFAR10", "mnist": "MNIST", "fashion_mnist": "FashionMNIST"}
"""Names the demo knows, and what torchvision calls them."""

DEFAULT_TRAIN = 4000
"""Training images taken unless `--n` says otherwise, so that a demo ends in minutes."""

_INK = {"mnist", "fashion_mnist"}
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}
_TEST_FOLDERS = ("test", "val", "valid", "validation")
_LARGEST_PICTURE = 64
_HELP = "digits (needs no files), cifar10, mnist, fashion_mnist, or a folder of images"


def open_images(
    data: str | None = None, root: Path | None = None, n: int | None = None, seed: int = 0
) -> ImageSet:
    """Find the images a user asked for.

    Args:
        data: ``"digits"``, the name of a data set, or a folder; None means digits, or whatever is in `root`.
        root: the folder to look in; for a named data set the environment variable UPWEIGHT_DATA is the default.
        n: training images to take; None takes all digits, or the first 4,000 of anything else.
        seed: decides the split into training and test images where the files do not.

    Returns:
        Images to train on and to ask about.

    Raises:
        UpweightError: there is no such folder or data set, or its images cannot be used.
    """
    if n is not None and n < 1:
        raise UpweightError(f"--n {n} leaves no training images -> ask for 100 or more")
    if (data is None and root is None) or data == "digits":
        if root is not None:
            raise UpweightError(
                f"digits come with scikit-learn and are not read from {root} -> drop --root or --data"
            )
        return digits(n, seed)
    n = DEFAULT_TRAIN if n is None else n
    if data is not None and root is None and (os.sep in data or Path(data).is_dir()):
        data, root = None, Path(data)
    if root is None and (default := os.environ.get("UPWEIGHT_DATA")):
        root = Path(default)
    if root is None:
        if data in KNOWN:
            raise UpweightError(
                f"--data {data} needs to know where it is -> add --root FOLDER, or set UPWEIGHT_DATA"
            )
        raise UpweightError(f"unknown data {data!r}: neither a known name nor a folder -> try {_HELP}")
    if not root.is_dir():
        raise UpweightError(f"{root} is not a folder -> pass the folder of your images as --root")
    name = root.resolve().name if data is None else data
    if (root / "load.py").is_file():
        return _from_loader(name, root, n)
    for folder in (root / name, root):
        if _class_folders(folder) or _class_folders(folder / "train"):
            return _from_folder(name, folder, n, seed)
    if name in KNOWN:
        return _from_torchvision(name, root, n)
    raise UpweightError(
        f"no images in {root} -> expected {root}/CLASS/*.png (any image type), or train/CLASS/* and test/CLASS/*; "
        f"otherwise try {_HELP}"
    )


def _from_loader(name: str, root: Path, n: int) -> ImageSet:
    """The folder's own `load.py`: `images(name, split, n)` gives uint8 [n, height, width, channel], labels and ids."""
    loader = _import(root / "load.py")
    try:
        halves = [
            loader.images(name, split, count) for split, count in (("train", n), ("test", _held_out(n)))
        ]
    except Exception as error:  # the file is the user's, it may raise anything
        raise UpweightError(
            f"{root / 'load.py'} has no training and test images called {name!r} ({type(error).__name__}: {error}) "
            "-> pass --data with a name it knows"
        ) from error
    train, test = (Raw(np.asarray(pixels), np.asarray(labels), list(ids)) for pixels, labels, ids in halves)
    labels = range(1 + int(max(train.labels.max(), test.labels.max())))
    classes = loader.classes(name) if hasattr(loader, "classes") else [str(label) for label in labels]
    return image_set(name, classes, _small(train), _small(test), ink=name in _INK)


def _from_torchvision(name: str, root: Path, n: int) -> ImageSet:
    try:
        from torchvision import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UpweightError(
            f"no image folders in {root}, and reading {name} in its original files needs torchvision "
            "-> pip install 'upweight[vision]', or arrange the images as train/CLASS/*.png and test/CLASS/*.png"
        ) from None
    except Exception as error:  # a build for another version of torch fails in many ways
        raise UpweightError(
            f"the installed torchvision does not fit the installed torch ({error}) -> install the two together"
        ) from error
    try:
        halves = [
            getattr(datasets, KNOWN[name])(root, train=train, download=False) for train in (True, False)
        ]
    except RuntimeError as error:
        raise UpweightError(
            f"torchvision finds no {name} in {root} ({error}) -> download it there first"
        ) from error
    train, test = (_first(half, count) for half, count in zip(halves, (n, _held_out(n)), strict=True))
    return image_set(name, halves[0].classes, train, test, ink=name in _INK)


def _first(dataset: Any, n: int) -> Raw:
    pixels = np.asarray(dataset.data[:n], dtype=np.uint8)
    return Raw(
        pixels if pixels.ndim == 4 else pixels[..., None], np.asarray(dataset.targets[:n]), range(len(pixels))
    )


def _from_folder(name: str, folder: Path, n: int, seed: int) -> ImageSet:
    """`train/CLASS/*` and `test/CLASS/*`, or only `CLASS/*`, of which a fifth is kept for testing."""
    generator = np.random.default_rng(seed)
    train_folder = folder / "train"
    if classes := _class_folders(train_folder):
        held_out = [folder / split for split in _TEST_FOLDERS if (folder / split).is_dir()]
        files = _image_files(train_folder, classes)
        tests = _image_files(held_out[0], classes) if held_out else []
    else:
        classes, files, tests = _class_folders(folder), _image_files(folder, _class_folders(folder)), []
    files, tests = _shuffled(files, generator), _shuffled(tests, generator)
    if not tests:
        tests, files = files[: len(files) // 5], files[len(files) // 5 :]
    if not files:
        raise UpweightError(
            f"no images under {folder} -> expected files such as {folder}/{classes[0]}/0001.png"
        )
    if len(classes) < 2:
        raise UpweightError(
            f"{folder} has one class only ({classes[0]!r}) -> a classifier needs a second class folder"
        )
    files, tests = files[:n], tests[: _held_out(n)]
    side = _side([file for file, _ in files])
    train, test = (_read(half, folder, side) for half in (files, tests))
    return image_set(name, classes, train, test)


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    reserved = {"train", *_TEST_FOLDERS}
    found = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    return [name for name in found if name not in reserved and any(map(_is_image, (folder / name).iterdir()))]


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and file.is_file()


def _image_files(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """Every image of every class with its label, in alphabetical order."""
    strangers = set(_class_folders(folder)) - set(classes)
    if strangers:
        raise UpweightError(
            f"{folder / min(strangers)} is a class the training images do not have -> rename or move it"
        )
    return [
        (file, label)
        for label, name in enumerate(classes)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if _is_image(file)
    ]


def _shuffled(files: list[tuple[Path, int]], generator: np.random.Generator) -> list[tuple[Path, int]]:
    return [files[row] for row in generator.permutation(len(files))]


def _read(files: list[tuple[Path, int]], folder: Path, side: int) -> Raw:
    def picture(file: Path) -> np.ndarray:
        image = Image.open(file).convert("RGB")
        return np.asarray(ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR))

    pixels = (
        np.stack([_guarded(picture, file) for file, _ in files])
        if files
        else np.empty((0, side, side, 3), np.uint8)
    )
    ids = [file.relative_to(folder).as_posix() for file, _ in files]
    return Raw(pixels, np.array([label for _, label in files], dtype=np.int64), ids)


def _side(files: list[Path]) -> int:
    """The median short side of the images, within what a page can show and a small network can use."""

    def short_side(file: Path) -> int:
        with Image.open(file) as image:
            return min(image.size)

    return int(np.clip(np.median([_guarded(short_side, file) for file in files]), 8, _LARGEST_PICTURE))


def _guarded(read: Callable[[Path], Any], file: Path) -> Any:
    try:
        return read(file)
    except OSError as error:
        raise UpweightError(f"{file} cannot be read as an image ({error}) -> replace or remove it") from error


def _small(raw: Raw) -> Raw:
    """Large pictures cut down to what a page can show."""
    pixels = raw.pixels
    stride = -(-max(pixels.shape[1:3]) // _LARGEST_PICTURE)
    if stride == 1:
        return raw
    height, width = (stride * (size // stride) for size in pixels.shape[1:3])
    blocks = pixels[:, :height, :width].reshape(
        len(pixels), height // stride, stride, width // stride, stride, pixels.shape[3]
    )
    return Raw(blocks.mean((2, 4)).astype(np.uint8), raw.labels, raw.ids)


def _held_out(n: int) -> int:
    return max(20, n // 4)


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("upweight_demo_loader", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UpweightError(
            f"{file} cannot be imported ({type(error).__name__}: {error}) -> repair it"
        ) from error
    return module
