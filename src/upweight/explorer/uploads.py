"""A query that a person brings: a picture, a row of numbers, or whatever the experiment's own ``read`` understands."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from upweight._trees import as_tensors, map_tensors
from upweight.errors import UpweightError
from upweight.experiment import Experiment
from upweight.report.shown import CHANNELS, pixel_limits

Predict = Callable[[Any], "tuple[float, float | None] | None"]

LONGEST_SIDE = 4096
"""Pixels a side of the largest picture that is read."""


@dataclass(frozen=True)
class Upload:
    """A query that was brought.

    Attributes:
        batch: In the form of the data, with a batch axis of length 1.
        words: What it is called on the page.
        picture: A PNG file, or None.
        note: How it was read, where that was a choice.
        token: Its name among the uploads.
    """

    batch: Any
    words: str
    picture: bytes | None = None
    note: str = ""
    token: str = field(default_factory=lambda: secrets.token_hex(8))


def read_query(
    experiment: Experiment, file: Path | None, text: str, target: float | None, predict: Predict
) -> Upload:
    """Make a query of what a person gave.

    Args:
        experiment: Whose ``read`` is asked first; without one, pictures and rows of numbers are understood if the
            training data are such.
        file: What was uploaded, or None.
        text: What was typed, used if there is no file.
        target: Its class number or value; what the model predicts if None.
        predict: What the model says of one query (`Live.predict`).

    Raises:
        UpweightError: It cannot be read as a query of this experiment.
    """
    given: Path | str = file if file is not None else text
    if file is None and not text.strip():
        raise UpweightError("there is nothing to read -> upload a file, or type a text or numbers")
    words = file.name if file is not None else text
    one = experiment.train.take([0])
    if experiment.read is not None:
        inputs, picture, note = _by_read(experiment, given), None, ""
        if _same_form(inputs, one):
            return Upload(map_tensors(inputs, lambda tensor: tensor[None]), words)
    else:
        inputs, picture, note = _by_default(experiment, given, one)
    if not (isinstance(one, (tuple, list)) and len(one) == 2 and isinstance(one[0], Tensor)):
        raise UpweightError(
            "the data are no pairs (input, target), so a query must be read whole -> "
            "uw.Experiment(read=function of a path or a text that returns an example in the form of the data)"
        )
    return Upload(_with_target(as_tensors(inputs), one, target, predict), words, picture, note)


def _by_read(experiment: Experiment, given: Path | str) -> Any:
    assert experiment.read is not None
    try:
        return as_tensors(experiment.read(given))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UpweightError(
            f"the experiment's read raised {type(error).__name__} ({reason}) "
            "-> it is given the path of a file, or a text"
        ) from error


def _same_form(example: Any, batch: Any) -> bool:
    """Whether it is a whole example, and not its inputs alone."""
    if isinstance(batch, Mapping):
        return isinstance(example, Mapping) and set(example) == set(batch)
    return (
        isinstance(batch, (tuple, list)) and isinstance(example, (tuple, list)) and len(example) == len(batch)
    )


def _by_default(experiment: Experiment, given: Path | str, one: Any) -> tuple[Tensor, bytes | None, str]:
    inputs = one[0] if isinstance(one, (tuple, list)) and len(one) and isinstance(one[0], Tensor) else None
    if inputs is not None and isinstance(given, Path) and (limits := pixel_limits(experiment)) is not None:
        return _picture(given, inputs[0], limits)
    if inputs is not None and isinstance(given, str) and inputs.ndim == 2 and inputs.is_floating_point():
        return _numbers(given, inputs[0]), None, ""
    kind = "a file" if isinstance(given, Path) else "a text"
    shape = "?" if inputs is None else list(inputs.shape[1:])
    raise UpweightError(
        f"{kind} cannot be read as an input of shape {shape} -> "
        "uw.Experiment(read=function of a path or a text that returns one input)"
    )


def _picture(file: Path, like: Tensor, limits: tuple[np.ndarray, np.ndarray]) -> tuple[Tensor, bytes, str]:
    """A picture in the size, colours and numbers of the training data."""
    from PIL import Image

    first = like.ndim == 2 or like.shape[0] in CHANNELS
    height, width = like.shape[-2:] if first else like.shape[:2]
    channels = 1 if like.ndim == 2 else like.shape[0] if first else like.shape[2]
    try:
        with Image.open(file) as opened:
            if max(opened.size) > LONGEST_SIDE:
                raise UpweightError(
                    f"the picture has {opened.size[0]} x {opened.size[1]} pixels, expected at most "
                    f"{LONGEST_SIDE} a side -> scale it down"
                )
            image = opened.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]).resize((width, height))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, UpweightError):
            raise
        raise UpweightError(
            f"{file.name} is no picture that can be read -> upload a PNG or JPEG file"
        ) from error
    png = io.BytesIO()
    image.save(png, "PNG")
    levels = np.asarray(image, dtype=np.float64).reshape(height, width, channels) / 255
    low, high = limits
    pixels = low + levels * (high - low)
    array = pixels[..., 0] if like.ndim == 2 else np.moveaxis(pixels, 2, 0) if first else pixels
    values = torch.from_numpy(np.ascontiguousarray(array))
    values = values if like.is_floating_point() else values.round()
    black, white = (", ".join(f"{value:.3g}" for value in side) for side in (low, high))
    note = (
        f"Scaled to {width} x {height} pixels; black became {black} and white {white}, as in the training data. "
        "uw.Experiment(read=...) reads it in a way of your own."
    )
    return values.to(like.dtype), png.getvalue(), note


def _numbers(text: str, like: Tensor) -> Tensor:
    fields = text.replace(",", " ").replace(";", " ").split()
    try:
        values = [float(one) for one in fields]
    except ValueError:
        raise UpweightError(
            f"{text[:40]!r} holds what is no number -> {len(like)} numbers with commas between them"
        ) from None
    if len(values) != len(like) or not np.isfinite(values).all():
        raise UpweightError(
            f"there are {int(np.isfinite(values).sum())} finite numbers, expected {len(like)} -> one for each column"
        )
    return torch.tensor(values, dtype=like.dtype)


def _with_target(inputs: Any, one: Any, target: float | None, predict: Predict) -> Any:
    """``(input, target)`` with a batch axis; the target is what the model predicts if it is not given."""
    like_input, like = one[0][0], one[-1][0]
    if not isinstance(inputs, Tensor) or inputs.shape != like_input.shape:
        seen = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UpweightError(
            f"the input was read as {seen}, expected a tensor of shape {list(like_input.shape)} -> change read"
        )
    inputs = inputs.to(like_input.dtype)[None]
    if like.numel() != 1:
        raise UpweightError(
            f"targets have shape {list(like.shape)}, expected one number -> read must return the whole example"
        )
    if target is None:
        guess = predict(type(one)((inputs, one[-1])))
        if guess is None:
            raise UpweightError("what the model predicts is not known for this task -> choose a target")
        target = guess[0]
    return type(one)((inputs, torch.full((1, *like.shape), target, dtype=like.dtype)))
