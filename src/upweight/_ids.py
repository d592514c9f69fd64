"""Names of examples: plain integers and strings, whatever they came in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from upweight.errors import UpweightError

Id = int | str


def as_ids(ids: Iterable[Id], name: str) -> list[Id]:
    """A list of plain ints and strings, whatever sequence, array, tensor or column they came in."""
    items = ids.tolist() if isinstance(ids, Tensor | np.ndarray) else list(ids)
    if all(type(item) is int or type(item) is str for item in items):
        return items
    plain: list[Id] = []
    for position, item in enumerate(items):
        value: object = np.asarray(item).item() if np.ndim(item) == 0 else item
        if isinstance(value, bool):
            raise UpweightError(
                f"{name}[{position}] is {value}, expected ids: a mask names none -> the ids where it is true, such as "
                "mask.nonzero()"
            )
        # A float comes from a column of integers that has, or had, gaps in it.
        if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            plain.append(int(value))
        elif isinstance(value, str):
            plain.append(value)
        else:
            raise UpweightError(f"{name}[{position}] is {item!r} -> use integers or strings")
    return plain


def one_or_more(ids: Iterable[Id] | Id, name: str) -> list[Id]:
    """The same of a single id too: a plain one, a NumPy scalar, or an array or tensor without axes.

    Raises:
        UpweightError: It is no id, and nothing that ids could be in: a float, say, or a truth value.

    >>> one_or_more(torch.tensor(3), "ids"), one_or_more("scan-7", "ids"), one_or_more([3, 4], "ids")
    ([3], ['scan-7'], [3, 4])
    """
    alone = ids.item() if isinstance(ids, Tensor | np.ndarray | np.generic) and ids.ndim == 0 else ids
    if isinstance(alone, int | str) and not isinstance(alone, bool):
        return as_ids([alone], name)
    if not isinstance(alone, Iterable):
        raise UpweightError(
            f"{name} is {alone!r}, expected an integer, a string, or several of them -> name examples by the ids they "
            "were given"
        )
    return as_ids(alone, name)


def some(ids: Iterable[Id]) -> str:
    """The first three of them, for an error."""
    shown = [repr(name) for _, name in zip(range(4), ids)]
    return ", ".join(shown[:3]) + (", ..." if len(shown) > 3 else "")


def positions_of(known: Sequence[Id], ids: Iterable[Id] | Id) -> list[int]:
    """Positions of the training examples with these ids, in the ids' order."""
    wanted = one_or_more(ids, "ids")
    if not wanted:
        raise UpweightError("no ids were given, expected at least one -> name the examples to remove")
    if len(set(wanted)) != len(wanted):
        raise UpweightError("an id is given twice, expected each example once -> set(ids)")
    if isinstance(known, range):
        position: dict[Id, int] = {
            name: known.index(name) for name in wanted if isinstance(name, int) and name in known
        }
    else:
        every = {name: k for k, name in enumerate(known)}
        position = {name: every[name] for name in wanted if name in every}
    if unknown := [name for name in wanted if name not in position]:
        raise UpweightError(
            f"{some(unknown)} not among the {len(known)} training ids ({some(known)}) -> name examples by the ids they "
            "were given"
        )
    return [position[name] for name in wanted]


def ids_to_bytes(ids: Sequence[Id]) -> Tensor:
    """JSON as a uint8 tensor, to be kept in a file of tensors."""
    return torch.frombuffer(bytearray(json.dumps(ids), "utf-8"), dtype=torch.uint8)


def bytes_to_ids(text: Tensor) -> list[Id]:
    """The inverse of `ids_to_bytes`."""
    return json.loads(text.numpy().tobytes())


def as_array(ids: Sequence[Id]) -> np.ndarray:
    """Ids as a column; mixed kinds stay what they are instead of all becoming text."""
    mixed = len({type(name) for name in ids}) > 1
    return np.array(ids, dtype=object if mixed else None)
