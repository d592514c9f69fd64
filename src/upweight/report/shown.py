"""How an example looks to a person: its picture, its words, its tokens, or its row of a table.

The report and the explorer show examples through this file alone. ``Experiment(show=...)`` decides; without it, inputs
shaped like images are shown as images, and vectors of features as the row of a table.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor

from upweight._trees import map_tensors, tensors_in
from upweight.errors import UpweightError
from upweight.task.outputs import split_batch

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

    from upweight.data import Examples
    from upweight.experiment import Experiment

__all__ = ["Shown", "as_picture", "describe", "drawn_in_ink", "label_name", "shown", "thumbnail", "words"]

SIDE = 128
"""Pixels a side that thumbnails are scaled down to; smaller pictures stay as they are."""

TINY = 48
"""Pictures of at most so many pixels a side are enlarged pixel by pixel."""

CHANNELS = (1, 3, 4)
"""Sizes of an axis that may be one of colours."""

SAMPLE = 64
"""Training pictures whose brightest and darkest pixels say how numbers become colours."""


@dataclass(frozen=True)
class Shown:
    """One example as a person sees it.

    Attributes:
        label: Its class by name, or its target as a number; empty if it has none.
        words: What ``show`` says, else the label.
        picture: A PNG file, or None.
        tokens: ``(text, weight)`` in reading order if ``show`` gives them, else None.
        fields: ``(name, value)`` of each feature of a table's row, else None.
        problem: Why it cannot be shown as it should; empty if it can.
    """

    label: str = ""
    words: str = ""
    picture: bytes | None = None
    tokens: list[tuple[str, float]] | None = None
    fields: list[tuple[str, float]] | None = None
    problem: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture in pixels; zeros without one."""
        if self.picture is None:
            return 0, 0
        return int.from_bytes(self.picture[16:20], "big"), int.from_bytes(self.picture[20:24], "big")


def thumbnail(experiment: Experiment, which: str, position: int, side: int = SIDE) -> bytes | None:
    r"""The picture of an example as a PNG file, or None if it has none or cannot be read.

    Args:
        experiment: Whose example.
        which: ``"train"`` or ``"query"``.
        position: Of the example in that data.
        side: Pixels a side it is scaled down to; 0 leaves it as it is.

    Example:
        >>> import torch, upweight as uw
        >>> data = torch.rand(5, 1, 8, 8), torch.tensor([0, 1, 0, 1, 1])
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        >>> experiment = uw.Experiment(model, uw.Classification(), data, data, classes=["cat", "dog"])
        >>> thumbnail(experiment, "train", 3)[:4], words(experiment, "train", 3)
        (b'\x89PNG', 'dog')
    """
    return shown(experiment, which, [position], side)[0].picture


def words(experiment: Experiment, which: str, position: int) -> str:
    """What an example says: the text of ``show``, else its class or target, else nothing.

    Args:
        experiment: Whose example.
        which: ``"train"`` or ``"query"``.
        position: Of the example in that data.
    """
    return shown(experiment, which, [position])[0].words


def shown(experiment: Experiment, which: str, positions: Sequence[int], side: int = SIDE) -> list[Shown]:
    """Examples as a person sees them; one that cannot be read says so, and stops nothing.

    Args:
        experiment: Whose examples.
        which: ``"train"`` or ``"query"``.
        positions: Of the examples in that data.
        side: Pixels a side that pictures are scaled down to; 0 leaves them as they are.

    Raises:
        UpweightError: `which` is neither, or there is no such position.
    """
    if which not in ("train", "query"):
        raise UpweightError(
            f"there are no {which!r} examples, expected 'train' or 'query' -> name one of the two"
        )
    examples: Examples = getattr(experiment, which)
    if outside := [position for position in positions if not 0 <= position < examples.n]:
        raise UpweightError(
            f"there is no {which} example at {outside[0]}, expected 0 to {examples.n - 1} -> count from 0"
        )
    return [_one(experiment, example, side) for example in _read(examples, positions)]


def describe(experiment: Experiment, example: Any, name: int | str) -> str:
    """The words of one example, or an error that names it if ``show`` raises."""
    try:
        said = None if experiment.show is None else experiment.show(example)
    except Exception as error:
        raise UpweightError(
            f"show(example) raised {type(error).__name__} on example {name!r} ({str(error).splitlines()[:1]}) -> "
            "it is given one example in the form of the data, without the batch axis"
        ) from error
    return _text(said, label_name(experiment, example))


def label_name(experiment: Experiment, example: Any) -> str:
    """The class of an example by its name, its target as a number, or nothing."""
    try:
        target = split_batch(example)[2]
    except UpweightError:  # no pair, and no dict with targets
        return ""
    if not isinstance(target, Tensor) or target.numel() != 1:
        return ""
    value = target.item()
    if experiment.classes is None:
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    number = int(value)
    return experiment.classes[number] if 0 <= number < len(experiment.classes) else str(value)


def _read(examples: Examples, positions: Sequence[int]) -> list[Any]:
    """The examples without their batch axis; an exception in the place of one that cannot be read."""

    def split(wanted: Sequence[int]) -> list[Any]:
        batch = examples.take(wanted)
        return [map_tensors(batch, lambda tensor, k=k: tensor[k]) for k in range(len(wanted))]

    if not len(positions):
        return []
    try:
        return split(positions)
    except Exception:  # sizes differ, or one of them is missing: each for itself
        found: list[Any] = []
        for position in positions:
            try:
                found += split([position])
            except Exception as error:
                found.append(error)
        return found


def _one(experiment: Experiment, example: Any, side: int) -> Shown:
    if isinstance(example, Exception):
        return Shown(problem=f"cannot be read: {_brief(example)}")
    label, said, problem = label_name(experiment, example), None, ""
    if experiment.show is not None:
        try:
            said = experiment.show(example)
        except Exception as error:
            problem = f"show(example) raised {_brief(error)}"
    tokens = _tokens(said)
    picture = None if isinstance(said, str) or tokens else as_picture(said)
    fields = None
    if picture is None and tokens is None:
        first = next(iter(tensors_in(example)), None)
        picture = _default_picture(experiment, first)
        if said is None and picture is None:
            fields = _fields(experiment, first)
    png = None if picture is None else _png(picture, side)
    if picture is not None and png is None:
        problem = problem or "its picture cannot be decoded"
    return Shown(label, _text(said, label), png, tokens, fields, problem)


def _text(said: Any, label: str) -> str:
    if isinstance(said, str):
        return said
    if tokens := _tokens(said):
        return "".join(text for text, _ in tokens)
    # Anything else that is no picture: its words, as print would have them.
    return label if said is None or as_picture(said) is not None else str(said)


def _tokens(said: Any) -> list[tuple[str, float]] | None:
    """``[(text, weight), ...]`` if that is what it is."""
    if not isinstance(said, (list, tuple)) or not said:
        return None
    for one in said:
        if not (isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[0], str)):
            return None
        if not isinstance(one[1], (int, float, np.number)):
            return None
    return [(text, float(weight)) for text, weight in said]


def _fields(experiment: Experiment, features: Tensor | None) -> list[tuple[str, float]] | None:
    if features is None or features.ndim != 1 or not features.is_floating_point() or not len(features):
        return None
    names = experiment.features or [f"x{k}" for k in range(len(features))]
    return list(zip(names, features.tolist()))


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


# Pictures ------------------------------------------------------------------------------------------------------------


def as_picture(value: Any, limits: tuple[np.ndarray, np.ndarray] | None = None) -> Picture | None:
    """A picture from a PIL image, or from numbers [H, W], [H, W, C] or [C, H, W]; None if it is neither.

    Args:
        value: The image. Unsigned bytes are taken as they are, numbers from 0 to 1 (or whole ones from 0 to 255)
            as brightness; anything else is stretched from its own least to its largest. What is not finite is black.
        limits: The numbers that are black and white in each channel, [C] each, instead.

    Example:
        >>> as_picture(np.array([[0.0, 1.0], [0.5, 0.25]])).size
        (2, 2)
        >>> as_picture(np.zeros((3, 20, 10))).size, as_picture(np.zeros(7)) is None
        ((10, 20), True)
    """
    from PIL.Image import Image as Picture
    from PIL.Image import fromarray

    if isinstance(value, Picture):
        return value
    if isinstance(value, Tensor):
        value = (
            value.detach().float().cpu().numpy()
            if value.is_floating_point()
            else value.detach().cpu().numpy()
        )
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "buif" or 0 in value.shape:
        return None
    pixels = _channels_last(value)
    if pixels is None:
        return None
    levels = _levels(pixels, limits)
    return fromarray(levels[..., 0] if levels.shape[2] == 1 else levels)


def _channels_last(array: np.ndarray) -> np.ndarray | None:
    """[H, W, C] of whatever order the axes are in; the first axis is that of colours if both ends may be."""
    if array.ndim == 2:
        return array[..., None]
    if array.ndim != 3:
        return None
    if array.shape[0] in CHANNELS:
        return np.moveaxis(array, 0, 2)
    return array if array.shape[2] in CHANNELS else None


def _levels(pixels: np.ndarray, limits: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """Brightness as bytes, [H, W, C]."""
    if pixels.dtype == np.uint8 and limits is None:
        return pixels
    low, high = _limits(pixels) if limits is None else limits
    span = np.where(high > low, high - low, 1.0)
    with np.errstate(invalid="ignore", over="ignore"):
        share = (pixels.astype(np.float64) - low) / span
    return np.nan_to_num(255 * share.clip(0, 1), nan=0.0).round().astype(np.uint8)


def _limits(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Black and white of each channel: 0 and 1, or 0 and 255, where the numbers fit; else nearly their extremes."""
    finite = pixels[np.isfinite(pixels)]
    channels = pixels.shape[-1]
    if pixels.dtype == bool or not len(finite) or (finite.min() >= 0 and finite.max() <= 1):
        return np.zeros(channels), np.ones(channels)
    if finite.min() >= 0 and finite.max() <= 255 and (finite == np.round(finite)).all():
        return np.zeros(channels), np.full(channels, 255.0)
    flat = np.where(np.isfinite(pixels), pixels, np.nan).reshape(-1, channels)
    return np.nanquantile(flat, 0.001, axis=0), np.nanquantile(flat, 0.999, axis=0)


_LIMITS: WeakKeyDictionary[Any, tuple[np.ndarray, np.ndarray] | None] = WeakKeyDictionary()
"""What is black and white in an experiment's inputs: the same for all of them, as they are compared by eye."""


def pixel_limits(experiment: Experiment) -> tuple[np.ndarray, np.ndarray] | None:
    """The numbers that are black and white in each channel of the inputs, [C] each; None if they are no images."""
    if experiment not in _LIMITS:
        _LIMITS[experiment] = _data_limits(experiment)
    return _LIMITS[experiment]


def _default_picture(experiment: Experiment, first: Tensor | None) -> Picture | None:
    """The inputs as an image, if they have the shape of one."""
    if first is None or not _image_shaped(first):
        return None
    limits = None if first.dtype.itemsize == 1 else pixel_limits(experiment)
    pixels = _channels_last(
        first.detach().float().cpu().numpy() if first.is_floating_point() else first.cpu().numpy()
    )
    if limits is not None and (pixels is None or pixels.shape[2] != len(limits[0])):
        limits = None
    return as_picture(first, limits)


def _image_shaped(tensor: Tensor) -> bool:
    """Colours and two axes of at least 4 pixels; or two axes of at least 8, of which none is over 4 times the other."""
    if tensor.is_complex():
        return False
    if tensor.ndim == 3:
        height, width = tensor.shape[1:] if tensor.shape[0] in CHANNELS else tensor.shape[:2]
        return (tensor.shape[0] in CHANNELS or tensor.shape[2] in CHANNELS) and min(height, width) >= 4
    return tensor.ndim == 2 and min(tensor.shape) >= 8 and max(tensor.shape) <= 4 * min(tensor.shape)


def _data_limits(experiment: Experiment) -> tuple[np.ndarray, np.ndarray] | None:
    count = min(SAMPLE, experiment.train.n)
    positions = np.linspace(0, experiment.train.n - 1, count).round().astype(int).tolist()
    arrays = []
    for example in _read(experiment.train, positions):
        first = None if isinstance(example, Exception) else next(iter(tensors_in(example)), None)
        if first is not None and _image_shaped(first):
            array = first.detach().float().cpu().numpy() if first.is_floating_point() else first.cpu().numpy()
            pixels = _channels_last(array)
            arrays += [] if pixels is None else [pixels.reshape(-1, pixels.shape[2])]
    if not arrays or len({array.shape[1] for array in arrays}) != 1:
        return None
    return _limits(np.concatenate(arrays)[:, None])


def drawn_in_ink(looks: Sequence[Shown]) -> bool:
    """Whether the pictures are small bright strokes on black, as of digits: a light page shows them dark on light."""
    from PIL.Image import open as opened

    pngs = [look.picture for look in looks if look.picture is not None and max(look.size) <= TINY][:64]
    borders = []
    for png in pngs:
        picture = opened(io.BytesIO(png))
        if picture.mode != "L":
            return False
        pixels = np.asarray(picture)
        borders.append(np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).mean())
    return len(pngs) > 0 and float(np.median(borders)) < 40


def _png(picture: Picture, side: int) -> bytes | None:
    """The picture as a PNG file, scaled down if it is large; None if it cannot be decoded."""
    file = io.BytesIO()
    try:
        if picture.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            picture = picture.convert("RGB")
        if side and max(picture.size) > side:
            picture = picture.convert("RGBA" if "A" in picture.mode or picture.mode == "P" else "RGB")
            picture.thumbnail((side, side))
        picture.save(file, "PNG")
    except Exception:  # decoders read here what nobody has read before, and raise whatever they like
        return None
    return file.getvalue()
