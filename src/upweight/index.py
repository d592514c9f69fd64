"""An index of the training gradients: new queries cost one matrix product, without the model and without their factors.

In the eigenbasis of the curvature a score is a plain inner product of *whitened* gradients,

    scores[q, i] = (1/n) sum_j  (v_qj / sqrt(Lambda_j + damping)) (g_ij / sqrt(Lambda_j + damping)),

and a coordinate carries a share of about ``(Lambda_j / (Lambda_j + damping))^2`` of it. Spectra are heavy-tailed, so
some of the coordinates carry nearly all. The index keeps as many as a probe of real gradients asks for, as int8 with
one scale per block of 256 coordinates of similar size or as bfloat16, whichever takes fewer bytes, and says what
error that makes.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from upweight.curvature import Curvature, Inverse
from upweight.curvature.operators import damped_inverse
from upweight.errors import UpweightError
from upweight.gradients import Gradients
from upweight.passes import Pass, Step
from upweight.store import ShardStore

if TYPE_CHECKING:
    from typing_extensions import Self

BLOCK = 256
"""Coordinates that share one scale."""
SHARES = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
"""Shares of the coordinates that are tried on the probe, fewest first."""
LEAST_SPEARMAN = 0.9993
"""Mean rank correlation per query that an index must reach on the probe (0.999 is what is promised of new queries)."""
PROBE_QUERIES, PROBE_TRAIN = 12, 96
TILE_BYTES = 8 << 20
"""Bytes of the coordinates that are unpacked at a time."""
_COORDINATES = "coordinates"


class Rows:
    """Training gradients as the right operand of ``queries @ rows.T``."""

    @property
    def T(self) -> Self:
        """Itself."""
        return self


@dataclass(frozen=True)
class IndexedRows(Rows):
    """Whitened gradients of some training examples.

    Attributes:
        steps: [example, coordinate], int8 steps or bfloat16 values.
        scale: [example, block], what one step is worth (1 for bfloat16).
        self_influence: [example], ``g^T (H + damping I)^-1 g`` over all coordinates.
    """

    steps: Tensor
    scale: Tensor
    self_influence: Tensor

    def unpacked(self, dtype: torch.dtype) -> UnpackedRows:
        """The same as numbers of this precision."""
        blocks = self.steps.to(dtype).unflatten(1, (-1, BLOCK)).mul_(self.scale[..., None])
        return UnpackedRows(blocks.flatten(1), self.self_influence)

    @staticmethod
    def rounded(whitened: Tensor, self_influence: Tensor, precision: str) -> IndexedRows:
        """Whitened gradients [example, coordinate] rounded to ``"int8"`` or ``"bf16"``."""
        blocks = whitened.unflatten(1, (-1, BLOCK))
        if precision == "bf16":
            return IndexedRows(whitened.to(torch.bfloat16), blocks.new_ones(1, 1), self_influence)
        scale = blocks.abs().amax(2) / 127
        steps = torch.where(scale[..., None] > 0, blocks / scale[..., None], 0).round_().to(torch.int8)
        return IndexedRows(steps.flatten(1), scale, self_influence)


@dataclass(frozen=True)
class UnpackedRows(Rows):
    """Whitened gradients of some training examples, as numbers: what is read again and again, while memory lasts.

    Attributes:
        values: [example, coordinate].
        self_influence: [example], as in `IndexedRows`.
    """

    values: Tensor
    self_influence: Tensor


@dataclass(frozen=True)
class WhitenedQueries:
    """Whitened query gradients [query, coordinate]."""

    values: Tensor

    @cached_property
    def blocks(self) -> Tensor:
        """[block, query, coordinate in block], for rows that are still packed."""
        return self.values.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()

    @staticmethod
    def concatenate(parts: Sequence[WhitenedQueries]) -> WhitenedQueries:
        """All queries of several batches."""
        return parts[0] if len(parts) == 1 else WhitenedQueries(torch.cat([p.values for p in parts]))

    def __matmul__(self, rows: IndexedRows | UnpackedRows) -> Tensor:
        """Inner products [query, example], a few blocks at a time: the floats they unpack to stay in the cache."""
        if isinstance(rows, UnpackedRows):
            return (rows.values @ self.values.mT).mT  # this way round it is a third faster
        count, queries = len(rows.steps), self.blocks.shape[1]
        out = self.blocks.new_zeros(queries, count)
        step = max(1, TILE_BYTES // (count * max(BLOCK, queries) * self.blocks.element_size()))
        for a in range(0, len(self.blocks), step):
            columns = rows.steps[:, a * BLOCK : (a + step) * BLOCK]
            unpacked = columns.to(self.blocks.dtype).unflatten(1, (-1, BLOCK))  # [example, block, coordinate]
            dots = torch.bmm(self.blocks[a : a + step], unpacked.permute(1, 2, 0))  # [block, query, example]
            scale = rows.scale if rows.scale.shape[1] == 1 else rows.scale[:, a : a + step]
            out += dots.mul_(scale.mT[:, None]).sum(0)
        return out


class GradientIndex:
    """Whitened training gradients on disk, their most important coordinates only.

    Args:
        folder: where it is.
        manifest: what it belongs to; includes the damping, which the whitening contains.
        inverse: the damped inverse curvature it was built with.
        memory: bytes of rows that may be kept in memory, unpacked, once they were read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Mapping[str, object],
        inverse: Inverse,
        memory: float = 0,
    ) -> None:
        self.folder, self.manifest, self.inverse, self.memory = folder, manifest, inverse, memory
        self._kept: dict[int, UnpackedRows] = {}
        self._used = 0
        store = ShardStore.open(folder, manifest, read_only=True)
        self.store = store
        self.coordinates = store.read(_COORDINATES)["coordinates"]
        self.facts = store.meta(_COORDINATES)
        self._weight = _importance(inverse.curvature, inverse.damping).sqrt()

    @staticmethod
    def build(
        folder: str | os.PathLike[str],
        manifest: Mapping[str, object],
        inverse: Inverse,
        training: Pass[Gradients],
        probe: Gradients,
        tolerance: float,
        progress: Callable[[int], None],
        memory: float = 0,
    ) -> GradientIndex:
        """Choose the coordinates on a probe of training gradients, then write every shard that is not there yet.

        Args:
            folder: where it goes.
            manifest: what it belongs to.
            inverse: the damped inverse curvature.
            training: the training gradients.
            probe: gradients of a few training examples, among them the stand-ins for queries.
            tolerance: largest relative error of the probe's scores that leaving coordinates out may make.
            progress: called with the number of examples of each finished shard.
            memory: bytes of rows that may be kept in memory once they were read.
        """
        with ShardStore.open(folder, manifest) as store:
            if not store.has(_COORDINATES):
                coordinates, facts = choose_coordinates(inverse, probe, tolerance)
                store.write(_COORDINATES, {"coordinates": coordinates}, facts)
            coordinates = store.read(_COORDINATES)["coordinates"]
            precision = str(store.meta(_COORDINATES)["stored_as"])
            for step in training:
                key = f"part-{step.start:09d}"
                if not store.has(key):
                    whole = whiten(inverse, step.load())
                    rows = IndexedRows.rounded(_pick(whole, coordinates), whole.square().sum(1), precision)
                    store.write(key, {"steps": rows.steps, "scale": rows.scale, "self": rows.self_influence})
                progress(step.stop - step.start)
        return GradientIndex(folder, manifest, inverse, memory)

    def __iter__(self) -> Iterator[Step[IndexedRows | UnpackedRows]]:
        starts = sorted(
            int(key.removeprefix("part-")) for key in self.store.keys_done if key.startswith("part-")
        )
        stops = [*starts[1:], int(str(self.manifest["n"]))]
        for start, stop in zip(starts, stops, strict=True):
            yield Step(start, stop, lambda s=start: self._load(s))

    def _load(self, start: int) -> IndexedRows | UnpackedRows:
        if start in self._kept:
            return self._kept[start]
        tensors = self.store.read(f"part-{start:09d}")
        rows = IndexedRows(tensors["steps"], tensors["scale"], tensors["self"])
        dtype = rows.self_influence.dtype
        size = rows.steps.numel() * dtype.itemsize
        if self._used + size > self.memory:
            return rows
        self._used += size
        self._kept[start] = rows.unpacked(dtype)
        return self._kept[start]

    def query(self, gradients: Gradients) -> WhitenedQueries:
        """Query gradients in the form that is multiplied with the rows of this index."""
        whole = whiten(self.inverse, gradients)
        picked = _pick(whole, self.coordinates)
        told = expected_loss(whole, picked, self._weight, self.coordinates)
        error = float(told.square().mean().sqrt()) * float(self.facts.get("scale", 1.0))
        most = float(str(self.manifest["index_error"]))
        if error > 2 * most:
            warnings.warn(
                f"these queries are unlike training data: {error:.0%} of their scores may be what the index left out, "
                f"expected {most:.0%} -> cache with precision='int8' or 'float32', which keep everything",
                stacklevel=6,
            )
        return WhitenedQueries(picked)


def whiten(inverse: Inverse, gradients: Gradients) -> Tensor:
    """``Q^T g / sqrt(Lambda + damping)`` over all layers, [example, parameter]."""
    parts = []
    for name, block in gradients.items():
        layer = inverse.curvature.layers[name]
        root = damped_inverse(layer.eigenvalues.flatten(), inverse.damping[name]).sqrt()
        parts.append(layer.coordinates(block).mul_(root))
    return torch.cat(parts, 1)


def choose_coordinates(inverse: Inverse, probe: Gradients, tolerance: float) -> tuple[Tensor, dict[str, Any]]:
    """The fewest most important coordinates whose scores of the probe are within `tolerance` of all coordinates'.

    Returns:
        Their positions, most important first, padded with -1 to whole blocks; and how well they do: their ``share``,
        what they are ``stored_as``, ``relative_error`` (Frobenius) and mean per-query ``spearman``, rounding included.
    """
    whitened = whiten(inverse, probe)
    stride = max(1, len(whitened) // PROBE_QUERIES)
    query = whitened[::stride][:PROBE_QUERIES]
    exact = query @ whitened.mT
    order = _importance(inverse.curvature, inverse.damping).argsort(descending=True, stable=True)
    coordinates, facts = order, {}
    options = [(share * size, share, name) for share in SHARES for name, size in (("int8", 1), ("bf16", 2))]
    for _, share, name in sorted(options):  # fewest bytes first
        chosen = order[: math.ceil(share * len(order))]
        coordinates = torch.full((-(-len(chosen) // BLOCK) * BLOCK,), -1)
        coordinates[: len(chosen)] = chosen.cpu()
        rows = IndexedRows.rounded(_pick(whitened, coordinates), whitened[:, 0], name)
        scores = WhitenedQueries(_pick(query, coordinates)) @ rows
        error, agreement = _relative(scores, exact), _ranks_agree(scores, exact)
        facts = {"share": share, "stored_as": name, "relative_error": error, "spearman": agreement}
        if error <= tolerance and agreement >= LEAST_SPEARMAN:
            break
    weight = _importance(inverse.curvature, inverse.damping).sqrt()
    told = float(expected_loss(query, _pick(query, coordinates), weight, coordinates).square().mean())
    scale = facts["relative_error"] / math.sqrt(told) if told > 0 else 1.0
    return coordinates, {**facts, "scale": scale, "probe": list(exact.shape)}


def expected_loss(whitened: Tensor, picked: Tensor, weight: Tensor, coordinates: Tensor) -> Tensor:
    """Relative error of each query's scores without the coordinates that are left out [query], up to one factor.

    A training gradient's whitened coordinate has the mean square ``Lambda / (Lambda + damping)``: if coordinates were
    uncorrelated, a score would have the mean square ``sum_j v_j^2 Lambda_j / (Lambda_j + damping)``.

    Args:
        whitened: queries v [query, parameter].
        picked: the coordinates of theirs that are kept, as `_pick` gives them.
        weight: ``Lambda / (Lambda + damping)`` [parameter].
        coordinates: positions of those that are kept.
    """
    kept = picked.square() @ weight[coordinates.clamp_min(0).to(weight.device)]
    share = kept / (whitened.square() @ weight).clamp_min(torch.finfo(whitened.dtype).tiny)
    return (1 - share).clamp_min(0).sqrt()


def _importance(curvature: Curvature, damping: Mapping[str, float]) -> Tensor:
    parts = []
    for name, layer in curvature.layers.items():
        values = layer.eigenvalues.flatten()
        parts.append((values / (values + damping[name])).square())
    return torch.cat(parts)


def _pick(whitened: Tensor, coordinates: Tensor) -> Tensor:
    """These columns, zeros where the position is -1."""
    coordinates = coordinates.to(whitened.device)
    picked = whitened[:, coordinates.clamp_min(0)]
    return picked.mul_(coordinates >= 0)


def _ranks_agree(scores: Tensor, exact: Tensor) -> float:
    """Mean over queries of the rank correlation."""
    from scipy.stats import rankdata  # a second and 50 MB, which only this check needs

    ranks = [
        np.corrcoef(rankdata(a), rankdata(b))[0, 1] for a, b in zip(scores.cpu(), exact.cpu(), strict=True)
    ]
    return float(np.mean(ranks))


def _relative(scores: Tensor, exact: Tensor) -> float:
    norm = float(exact.norm())
    return float((scores - exact).norm()) / norm if norm > 0 else 0.0


def check_index_use(kind: str, per_layer: bool) -> None:
    """Raise where an index cannot answer."""
    if kind not in ("kfac", "ekfac"):
        raise UpweightError(
            f"an index needs an eigenbasis, curvature={kind!r} has none -> use 'ekfac', or precision='int8'"
        )
    if per_layer:
        raise UpweightError(
            "an index keeps no layers apart -> cache with precision='float32', 'bf16' or 'int8'"
        )


def probe_positions(n: int) -> Sequence[int]:
    """Evenly spread training examples for `choose_coordinates`."""
    count = min(n, PROBE_TRAIN)
    return sorted({round(k * (n - 1) / max(1, count - 1)) for k in range(count)})
