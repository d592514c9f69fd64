"""Checkpoints of a training run: read without running code, and loaded only where they belong."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from upweight.errors import StoreError, UpweightError

StateDict: TypeAlias = Mapping[str, Tensor]
Checkpoint: TypeAlias = "StateDict | str | os.PathLike[str] | nn.Module | Callable[[], StateDict]"
"""A state dict, a file that holds one, a model that has one, or a function that returns one."""

_NESTED = ("state_dict", "model_state_dict", "model")


def as_checkpoints(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """A list of checkpoints, at least one; raise if it is something else, such as a single checkpoint."""
    if isinstance(checkpoints, (Mapping, str, os.PathLike, nn.Module)) or not isinstance(
        checkpoints, Sequence
    ):
        raise UpweightError(
            f"checkpoints is {type(checkpoints).__name__}, expected a list of state dicts, files or functions -> "
            "put it into a list"
        )
    if not checkpoints:
        raise UpweightError("the list of checkpoints is empty, expected at least one -> [model.state_dict()]")
    return list(checkpoints)


def read_checkpoint(checkpoint: Checkpoint, number: int) -> StateDict:
    """The state dict of a checkpoint; `number` names it in errors.

    Raises:
        UpweightError: it is no state dict.
        StoreError: the file is missing, damaged, or holds more than tensors.
    """
    found: Any = checkpoint
    if isinstance(found, (str, os.PathLike)):
        found = _read_file(Path(found).expanduser(), number)
    elif isinstance(found, nn.Module):
        found = found.state_dict()
    elif callable(found):
        found = found()
    if isinstance(found, nn.Module):
        found = found.state_dict()
    for key in _NESTED:  # training loops write the model's state beside the optimiser's
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise UpweightError(
            f"checkpoint {number} is {type(found).__name__}, expected a state dict with tensors by name -> "
            "model.state_dict()"
        )
    return found


def load_checkpoint(model: nn.Module, state: StateDict, number: int) -> None:
    """Copy a state dict into a model; raise, naming what differs, unless names and shapes are the model's own."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    given = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    missing = [name for name in own if name not in given]
    foreign = [name for name in given if name not in own]
    shapes = [
        f"{name} {list(given[name].shape)} for {list(t.shape)}"
        for name, t in own.items()
        if name in given and given[name].shape != t.shape
    ]
    differences = [
        f"{what} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("lacks", missing), ("has besides", foreign), ("has shape", shapes))
        if names
    ]
    if differences:
        raise UpweightError(
            f"checkpoint {number} is of another architecture than the model: it {'; '.join(differences)} -> give "
            "checkpoints of this model's own training run"
        )
    for name, tensor in given.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UpweightError(
                f"checkpoint {number} holds NaN or infinity in {name} -> leave it out, with its learning rate"
            )
    model.load_state_dict(state, strict=True)


def _read_file(path: Path, number: int) -> Any:
    if not path.is_file():
        raise StoreError(f"checkpoint {number}: there is no file {path} -> check its name")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - weights_only runs no code
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        why = str(error).splitlines()[0][:120]
    except Exception as error:  # the unpickler's own, of a file that holds more than tensors
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    raise StoreError(
        f"checkpoint {number}: {path} cannot be read as tensors ({why}) -> save model.state_dict() with "
        "safetensors.torch.save_file"
    )
