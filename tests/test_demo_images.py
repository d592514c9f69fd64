"""The demo on a user's own images: folders, loaders, torchvision, and what goes wrong with them."""

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from upweight.demo.results import Settings
from upweight.demo.run import run_demo
from upweight.demo.sources import open_images
from upweight.errors import UpweightError


def _photos(folder: Path, counts: dict[str, int], size=(12, 9)) -> None:
    generator = np.random.default_rng(0)
    for hue, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., hue % 3] += 160
            Image.fromarray(pixels).save(folder / name / f"{number:03d}.png")


def test_class_folders_are_split_by_the_seed(tmp_path):
    _photos(tmp_path, {"cat": 40, "dog": 30})
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    images, same, other = (open_images(root=tmp_path, seed=seed) for seed in (0, 0, 1))
    assert images.classes == ("cat", "dog") and images.name == tmp_path.name
    assert (len(images.train), len(images.test)) == (56, 14)
    assert not set(images.train.ids) & set(images.test.ids)
    assert images.train.ids == same.train.ids != other.train.ids
    assert images.train.pictures.shape == (56, 9, 9, 3) and images.train.inputs.shape == (56, 3, 9, 9)
    names = [images.classes[label] for label in images.train.labels.tolist()]
    assert all(identity.startswith(name) for identity, name in zip(images.train.ids, names, strict=True))
    assert images.train.inputs.mean().abs() < 1e-5 and (images.train.inputs.std() - 1).abs() < 0.02


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_train_and_test_folders(tmp_path, held_out):
    _photos(tmp_path / "train", {"cat": 30, "dog": 30}, size=(100, 120))
    _photos(tmp_path / held_out, {"cat": 8, "dog": 8}, size=(80, 90))
    images = open_images("pets", tmp_path, n=20)
    assert images.name == "pets" and (len(images.train), len(images.test)) == (20, 16)
    assert images.train.pictures.shape[1:] == (64, 64, 3) and images.train.inputs.shape[2:] == (32, 32)
    assert all(identity.startswith(held_out) for identity in images.test.ids)


LOADER = """
import numpy as np

def images(name, split="train", n=None):
    if name != "blobs":
        raise KeyError(name)
    labels = np.arange(n) % 3
    pixels = np.full((n, 70, 70, 1), 40, np.uint8) + 60 * labels[:, None, None, None].astype(np.uint8)
    return pixels, labels, np.arange(n)
"""


def test_folder_with_a_loader(tmp_path, monkeypatch):
    (tmp_path / "load.py").write_text(LOADER)
    monkeypatch.setenv("UPWEIGHT_DATA", str(tmp_path))
    images = open_images("blobs", n=40)
    assert images.classes == ("0", "1", "2") and len(images.train) == 40
    assert images.train.pictures.shape == (40, 35, 35, 1)
    assert open_images(n=50).name == "digits"  # the variable changes only what was asked for by name
    with pytest.raises(UpweightError, match=r"no training and test images called 'nope'"):
        open_images("nope")


class _Downloaded:
    """What torchvision gives for a data set on disk."""

    classes = ("plane", "car")

    def __init__(self, root, train, download):
        assert not download
        if not (root / "batches").exists():
            raise RuntimeError("Dataset not found")
        self.data = np.zeros((200 if train else 100, 28, 28), np.uint8)
        self.data[::2] = 200
        self.targets = [0, 1] * (100 if train else 50)


def test_torchvision_data_set(tmp_path, monkeypatch):
    datasets = SimpleNamespace(MNIST=_Downloaded)
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(datasets=datasets))
    with pytest.raises(UpweightError, match=r"torchvision finds no mnist in .*-> download it there first"):
        open_images("mnist", tmp_path)
    (tmp_path / "batches").touch()
    images = open_images("mnist", tmp_path, n=60)
    assert images.classes == ("plane", "car") and images.ink
    assert images.train.pictures.shape == (60, 28, 28, 1) and len(images.test) == 20


def test_torchvision_is_asked_for_only_when_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UpweightError, match=r"needs torchvision -> pip install 'upweight\[vision\]'"):
        open_images("cifar10", tmp_path)
    _photos(tmp_path / "cifar10", {"plane": 30, "car": 30})
    assert open_images("cifar10", tmp_path).classes == ("car", "plane")


def test_demo_on_photos(tmp_path):
    _photos(tmp_path / "photos", {"[red]hot": 30, "<green>": 30, "blue": 30})
    settings = Settings(
        root=tmp_path / "photos", out=tmp_path / "out", queries=4, retrain_queries=1, retrain_seeds=1
    )
    printed = io.StringIO()
    run = run_demo(settings, Console(file=printed, width=120))
    assert run.images.classes == ("<green>", "[red]hot", "blue")
    assert "[red]hot" in printed.getvalue()
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "&lt;green&gt;" in page and "<green>" not in page


def _one_class(folder):
    _photos(folder, {"cat": 30})


def _few(folder):
    _photos(folder, {"cat": 4, "dog": 4})


def _stranger(folder):
    _photos(folder / "train", {"cat": 30, "dog": 30})
    _photos(folder / "test", {"cow": 10})


def _broken(folder):
    _photos(folder, {"cat": 30, "dog": 30})
    for file in (folder / "cat").iterdir():
        file.write_bytes(b"no image")


def _broken_loader(folder):
    (folder / "load.py").write_text("1/0")


def _wrong_pixels(folder):
    (folder / "load.py").write_text(LOADER.replace("return pixels", "return pixels / 255"))


def _wrong_classes(folder):
    (folder / "load.py").write_text(LOADER + "\n\ndef classes(name):\n    return ['a', 'b']\n")


@pytest.mark.parametrize(
    ("arrange", "arguments", "message"),
    [
        (None, {"data": "nope"}, r"unknown data 'nope'.*-> try digits"),
        (None, {"data": "cifar10"}, r"--data cifar10 needs to know where.*-> add --root"),
        (None, {"root": "missing"}, r"missing is not a folder ->"),
        (None, {"data": "digits", "root": "."}, r"digits come with scikit-learn.*-> drop --root"),
        (None, {"n": 5}, r"digits has 5 training images.*at least 10 ->"),
        (None, {"n": 0}, r"--n 0 leaves no training images ->"),
        (None, {"root": "."}, r"no images in .*-> expected"),
        (_one_class, {"root": "."}, r"one class only \('cat'\) -> "),
        (_few, {"root": "."}, r"7 training images, the demo needs at least 10 ->"),
        (_stranger, {"root": "."}, r"cow is a class the training images do not have ->"),
        (_broken, {"root": "."}, r"cat.*\.png cannot be read as an image .*->"),
        (
            _broken_loader,
            {"data": "blobs", "root": "."},
            r"load\.py cannot be imported \(ZeroDivisionError.*->",
        ),
        (_wrong_pixels, {"data": "blobs", "root": "."}, r"float64 of shape .*-> give uint8"),
        (_wrong_classes, {"data": "blobs", "root": "."}, r"from 0 to 2, but it has 2 class names ->"),
    ],
)
def test_errors_name_cause_and_way_out(tmp_path, monkeypatch, arrange, arguments, message):
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    if arrange is not None:
        arrange(tmp_path)
    if "root" in arguments:
        arguments = {**arguments, "root": tmp_path / arguments["root"]}
    with pytest.raises(UpweightError, match=message) as caught:
        open_images(**arguments)
    assert "\n" not in str(caught.value)
