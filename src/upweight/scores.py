"""What an attribution gives back: a number for every (query, training example), and the evidence for it.

The sign never changes: positive is a **proponent** (removing that training example is predicted to make the
query's measurement worse), negative an **opponent**.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upweight._files import json_text, load_bundle, save_bundle
from upweight._ids import Id, as_array, as_ids, bytes_to_ids, ids_to_bytes, one_or_more, some
from upweight._ranking import Ranking, extremes
from upweight.errors import StoreError, UpweightError

if TYPE_CHECKING:
    import pandas
    import xarray

__all__ = ["Ranking", "Scores", "SelfInfluence"]


_FORMAT = 1


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Scores of every training example for every query, with what is needed to judge them.

    ``values[q, i]`` is positive if removing training example i is predicted to make the measurement of query q
    worse. If ``unit`` is given it is also the size of that change, and scores of several examples add up;
    if ``unit`` is None only the order within a query means something.

    Attributes:
        values: Floating point, [query, train].
        query_ids: One per row, integers or strings.
        train_ids: One per column. Given as any sequence, array or tensor; kept as a list. Examples that share
            an id are removed together by ``removal_effect``.
        unit: The measurement's unit, for example "nats".
        info: Evidence, JSON-able: method, damping, coverage, seeds, fingerprints. ``info["higher_is_better"]``
            says which direction of the measurement is the better one (missing: lower, as for a loss).
        layers: The part of each layer, [query, train] each; they sum to ``values``.

    Raises:
        UpweightError: Shapes do not match, or a value is not finite.

    Example:
        >>> values = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -0.5]])
        >>> scores = Scores(values, ["a", "b"], [10, 11, 12], unit="nats")
        >>> scores.top_k(2).ids, scores.bottom_k(1).ids
        ([[12, 10], [11, 10]], [[11], [12]])
        >>> scores.removal_effect([10, 12])
        tensor([ 2.5000, -0.5000])
        >>> scores.sum_by(["cat", "dog", "cat"]).train_ids
        ['cat', 'dog']
    """

    values: Tensor
    query_ids: Sequence[Id]
    train_ids: Sequence[Id]
    unit: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "query_ids", as_ids(self.query_ids, "query_ids"))
        object.__setattr__(self, "train_ids", as_ids(self.train_ids, "train_ids"))
        object.__setattr__(self, "info", dict(self.info))
        shape = (len(self.query_ids), len(self.train_ids))
        object.__setattr__(self, "values", _as_values(self.values, shape, "values"))
        if (position := _first_non_finite(self.values)) is not None:
            row, column = divmod(position, shape[1])
            raise UpweightError(
                f"the score of query {self.query_ids[row]!r} and training example {self.train_ids[column]!r} is "
                f"{self.values[row, column].item()} -> look for overflow in its loss, or raise the damping"
            )
        if self.layers is not None:
            layers = {
                name: _as_values(part, shape, f"layers[{name!r}]") for name, part in self.layers.items()
            }
            for name, part in layers.items():
                if _first_non_finite(part) is not None:
                    raise UpweightError(f"layer {name!r} has scores that are not finite -> raise its damping")
            object.__setattr__(self, "layers", layers)

    def top_k(self, k: int) -> Ranking[list[Id]]:
        """Proponents of every query, the largest score first.

        Args:
            k: How many; more than there are training examples gives all of them.
        """
        return self._rank(k, largest=True)

    def bottom_k(self, k: int) -> Ranking[list[Id]]:
        """Opponents of every query, the most negative score first.

        Args:
            k: How many; more than there are training examples gives all of them.
        """
        return self._rank(k, largest=False)

    def sum_by(self, labels: Iterable[Id]) -> Scores:
        """Add up the scores of the training examples that share a label: their class, source or annotator.

        For scores with a unit the sum is the first-order effect of removing the whole group.

        Args:
            labels: One per training example, in the order of ``train_ids``.

        Returns:
            Scores whose ``train_ids`` are the distinct labels, sorted (as first met if they do not compare).
        """
        labels = as_ids(labels, "labels")
        if len(labels) != len(self.train_ids):
            raise UpweightError(
                f"sum_by got {len(labels)} labels for {len(self.train_ids)} training examples -> give one for each"
            )
        groups: list[Id] = list(dict.fromkeys(labels))
        if len({isinstance(label, str) for label in groups}) == 1:
            groups = sorted(groups)  # type: ignore[type-var]
        number = {label: position for position, label in enumerate(groups)}
        columns = torch.tensor(
            [number[label] for label in labels], dtype=torch.int64, device=self.values.device
        )
        return Scores(
            _sum_columns(self.values, columns, len(groups)),
            self.query_ids,
            groups,
            self.unit,
            {**self.info, "summed": {"groups": len(groups), "train": len(labels)}},
            {name: _sum_columns(part, columns, len(groups)) for name, part in self.layers.items()}
            if self.layers is not None
            else None,
        )

    def removal_effect(self, train_ids: Iterable[Id] | Id) -> Tensor:
        """Predicted change of every query's measurement if these training examples are removed together.

        To first order that is the sum of their scores, signed as the measurement itself moves: removing
        proponents raises a loss and lowers a margin.

        Args:
            train_ids: Id or ids to remove; one that is named twice counts once.

        Returns:
            [query], in ``unit``.

        Raises:
            UpweightError: The scores have no unit, or an id is not among ``train_ids``.
        """
        if self.unit is None:
            raise UpweightError(
                f"{self.info.get('method', 'this method')} only ranks training examples, its scores are not "
                "predicted changes -> use a calibrated method such as Influence"
            )
        wanted = set(one_or_more(train_ids, "train_ids"))
        if unknown := wanted.difference(self.train_ids):
            raise UpweightError(
                f"{some(unknown)} not among the {len(self.train_ids)} train_ids ({some(self.train_ids)}) "
                "-> name examples by the ids they were given"
            )
        positions = [position for position, name in enumerate(self.train_ids) if name in wanted]
        total = self.values[:, positions].sum(dim=1, dtype=torch.float64).to(self.values.dtype)
        return -total if self.info.get("higher_is_better", False) else total

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything to one file, ``path.safetensors``, replacing an older one only when complete.

        Args:
            path: With or without the ending; missing folders are made.

        Returns:
            The file that was written.

        Raises:
            StoreError: It cannot be written, or ``info`` holds something JSON cannot.
        """
        path = _with_ending(path)
        tensors = {"values": self.values}
        tensors |= {f"layer-{number}": part for number, part in enumerate((self.layers or {}).values())}
        # Ids go beside the values as bytes, because the file's header has a size limit and there may be millions.
        tensors |= {"query_ids": ids_to_bytes(self.query_ids), "train_ids": ids_to_bytes(self.train_ids)}
        names = None if self.layers is None else list(self.layers)
        content = {"format": _FORMAT, "unit": self.unit, "info": self.info, "layers": names}
        save_bundle(path, "scores", tensors, content)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what ``save`` wrote, on the CPU, after comparing it with its checksum.

        Args:
            path: With or without the ending.

        Raises:
            StoreError: There is no such file, it is damaged, or it does not hold scores.
        """
        path = _with_ending(path)
        tensors, content = load_bundle(path, "scores")
        if content["format"] != _FORMAT:
            raise StoreError(
                f"{path} is in format {content['format']}, this version reads {_FORMAT} -> update upweight"
            )
        query_ids, train_ids = (bytes_to_ids(tensors[name]) for name in ("query_ids", "train_ids"))
        names = content["layers"]
        layers = None if names is None else {name: tensors[f"layer-{i}"] for i, name in enumerate(names)}
        return cls(tensors["values"], query_ids, train_ids, content["unit"], content["info"], layers)

    def to_pandas(self, top: int | None = None) -> pandas.DataFrame:
        """A tidy table: query_id, train_id, score, rank, unit; the rows of a query run from rank 1 down.

        Args:
            top: Keep only this many proponents of every query; None keeps all pairs.

        Raises:
            ImportError: pandas is missing.
        """
        pd = _optional("pandas")
        ranking = self.top_k(max(1, len(self.train_ids)) if top is None else top)
        queries, k = ranking.positions.shape
        return pd.DataFrame(
            {
                "query_id": np.repeat(as_array(self.query_ids), k),
                "train_id": as_array(self.train_ids)[ranking.positions.cpu().numpy().reshape(-1)],
                "score": _as_numpy(ranking.values).reshape(-1),
                "rank": np.tile(np.arange(1, k + 1), queries),
                "unit": self.unit,
            }
        )

    def to_xarray(self) -> xarray.DataArray:
        """A labelled array with dims (query, train); its attrs hold the unit and the evidence.

        Nested evidence is kept as JSON text, so that the array can be written to netCDF or Zarr.

        Raises:
            ImportError: xarray is missing.
        """
        xr = _optional("xarray")
        evidence = {"unit": self.unit, **self.info}
        plain = {k: v if type(v) in (int, float, str) else json_text(v, k) for k, v in evidence.items()}
        coords = {"query": as_array(self.query_ids), "train": as_array(self.train_ids)}
        return xr.DataArray(_as_numpy(self.values), coords, ("query", "train"), "scores", plain)

    def __repr__(self) -> str:
        queries, train = self.values.shape
        size = f"{queries} queries x {train} training examples"
        worse = "lower" if self.info.get("higher_is_better", False) else "raise"
        sign = f"positive = proponent, removing it is predicted to {worse} the query's measurement"
        return _describe("Scores", size, self.values, self.unit, self.info, sign)

    def _rank(self, k: int, *, largest: bool) -> Ranking[list[Id]]:
        positions = extremes(self.values, k, largest=largest)
        ids = [[self.train_ids[position] for position in row] for row in positions.tolist()]
        return Ranking(ids, positions, self.values.gather(1, positions))


@dataclass(frozen=True, eq=False, repr=False)
class SelfInfluence:
    """How much each training example supports its own prediction; mislabeled examples stand out at the top.

    Attributes:
        values: Floating point, [train]: the score of every training example for itself.
        train_ids: One per value, integers or strings.
        unit: The unit of the training loss, or None if only the order means something.
        info: Evidence, JSON-able.

    Raises:
        UpweightError: Shapes do not match, or a value is not finite.

    Example:
        >>> SelfInfluence(torch.tensor([0.1, 0.9, 0.4]), ["a", "b", "c"]).top_k(2).ids
        ['b', 'c']
    """

    values: Tensor
    train_ids: Sequence[Id]
    unit: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_ids", as_ids(self.train_ids, "train_ids"))
        object.__setattr__(self, "info", dict(self.info))
        object.__setattr__(self, "values", _as_values(self.values, (len(self.train_ids),), "values"))
        if (position := _first_non_finite(self.values)) is not None:
            raise UpweightError(
                f"the self-influence of training example {self.train_ids[position]!r} is "
                f"{self.values[position].item()} -> look for overflow in its loss, or raise the damping"
            )

    def top_k(self, k: int) -> Ranking[Id]:
        """The k most suspicious training examples, the largest self-influence first (all, if k is larger)."""
        positions = extremes(self.values[None], k, largest=True)[0]
        return Ranking([self.train_ids[p] for p in positions.tolist()], positions, self.values[positions])

    def __repr__(self) -> str:
        size = f"{len(self.train_ids)} training examples"
        sign = "large = suspicious, the model could hardly fit it without seeing it"
        return _describe("SelfInfluence", size, self.values, self.unit, self.info, sign)


def _as_values(values: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    values = torch.as_tensor(values).detach()
    if not values.is_floating_point() or tuple(values.shape) != shape:
        expected = " x ".join(map(str, shape))
        raise UpweightError(
            f"{name} is {values.dtype} of shape {tuple(values.shape)}, but the ids make it {expected} -> give "
            "floating point scores with one id for each row and column"
        )
    return values


def _first_non_finite(values: Tensor) -> int | None:
    """Flat position of the first NaN or infinity; looks closer only if the extremes (which keep NaN) show one."""
    if not values.numel() or torch.stack(torch.aminmax(values)).isfinite().all():
        return None
    return int(values.isfinite().logical_not().reshape(-1).nonzero()[0])


def _sum_columns(values: Tensor, columns: Tensor, groups: int) -> Tensor:
    """Sum the columns with the same number, in float64, a few rows at a time."""
    total = values.new_zeros(len(values), groups)
    for block, sums in zip(values.split(64), total.split(64)):
        sums.copy_(sums.double().index_add_(1, columns, block.double()))
    return total


def _describe(
    name: str, size: str, values: Tensor, unit: str | None, info: Mapping[str, Any], sign: str
) -> str:
    lines = [f"{name} of {size}, {str(values.dtype).removeprefix('torch.')}", f"  sign: {sign}"]
    lines.append(f"  unit: {unit if unit is not None else 'none, only the order means something'}")
    for key in ("method", "curvature", "damping", "coverage"):
        if key in info:
            lines.append(f"  {key}: {_brief(info[key])}")
    return "\n".join(lines)


def _brief(value: object) -> str:
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _with_ending(path: str | os.PathLike[str]) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def _as_numpy(values: Tensor) -> np.ndarray:
    values = values.cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"this needs {name} -> pip install 'upweight[report]'") from error
