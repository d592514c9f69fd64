"""Training gradients on disk, so that new queries cost no pass of the model over the training data.

Shards hold the raw factors (layer inputs and output gradients, convolutions before their windows are cut), each tensor
once even where layers share it, in float32, bfloat16, or int8 with one scale per row of the last axis; where an example
has one row only, both lossy precisions keep it in 16-bit integers. Their error is measured on the first shard and
becomes part of the evidence of a result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from upweight.curvature import Curvature
from upweight.data import Examples
from upweight.errors import CacheMismatchError, StoreError, UpweightError
from upweight.gradients import Dense, Factored, Gradients, Sparse
from upweight.gradients.blocks import Block, Piece
from upweight.gradients.operations import Patches
from upweight.passes import ModelPass, Step
from upweight.store import ShardStore

Precision: TypeAlias = Literal["float32", "bf16", "int8", "index"]
SHARD_BYTES = 32 << 20
"""Float32 bytes of one shard: what a killed process loses at most."""
ERROR_PROBE = 32
"""Examples of the first shard on which a lossy precision's error is measured."""


@dataclass(frozen=True)
class Cache:
    """Where and how to keep training gradients.

    Attributes:
        folder: a folder of its own; made if it does not exist, resumed if a run was killed.
        precision: ``"float32"`` (the model's own precision: nothing is lost), ``"bf16"`` (half the bytes), ``"int8"``
            (a quarter; but half, as bf16, where an example has one row a layer, as in an MLP, whose rounding nothing
            averages out), or ``"index"``: no factors, but the coordinates of the gradients that matter at the damping
            of the fit (`upweight.index`), for the fastest answers to new queries.
        index_error: for an index, the largest relative error that leaving coordinates out may make on a probe.

    Example:
        >>> Cache("runs/cache", precision="int8").precision
        'int8'
    """

    folder: str | os.PathLike[str]
    precision: Precision = "float32"
    index_error: float = 0.02

    def __post_init__(self) -> None:
        if self.precision not in ("float32", "bf16", "int8", "index"):
            raise UpweightError(
                f"precision={self.precision!r} is unknown -> use 'float32', 'bf16', 'int8' or 'index'"
            )
        if not 0 <= self.index_error < 1:
            raise UpweightError(
                f"index_error={self.index_error}, expected 0 <= error < 1 -> 0.02 is the default"
            )


class CachePass:
    """Training gradients from a cache; shards that are missing are computed and written as the pass reaches them.

    Args:
        cache: where and how.
        manifest: what the cache belongs to (model, data, layers).
        source: computes the shards' gradients; its batch size is the shard's number of examples.
        losses: training losses of the first examples, which tell one loss function from another of the same name.
    """

    def __init__(
        self, cache: Cache, manifest: Mapping[str, object], source: ModelPass, losses: Sequence[float]
    ) -> None:
        self.cache, self.source, self.losses = cache, source, list(losses)
        self.manifest = {**manifest, "precision": cache.precision, "shard_examples": source.batch_size}
        self.dtype = source.tracker.dtype
        self._reader: ShardStore | None = None

    def write(self, progress: Any) -> None:
        """Compute and write every shard that is not there yet.

        Args:
            progress: called with the number of examples of each shard as it is finished or found finished.
        """
        with ShardStore.open(self.cache.folder, self.manifest) as store:
            for step in self.source:
                key = _key(step.start)
                if step.start == 0 and store.has(key):
                    check_same(store.meta(key)["losses"], self.losses, "training loss", self.cache.folder)
                if not store.has(key):
                    gradients = step.load()
                    tensors, meta = encode(gradients, self.cache.precision)
                    if step.start == 0:
                        meta["losses"] = self.losses
                    if step.start == 0 and self.lossy:
                        meta["error"] = _measured_error(gradients, decode(tensors, meta, self.dtype))
                    store.write(key, tensors, meta)
                progress(step.stop - step.start)
        self._reader = None

    @property
    def lossy(self) -> bool:
        """Whether the gradients are rounded."""
        return self.cache.precision != "float32"

    @property
    def error(self) -> float | None:
        """Relative error of the stored gradients on a probe (Frobenius); None where nothing is lost."""
        return self._open().meta(_key(0)).get("error")

    def __iter__(self) -> Iterator[Step[Gradients]]:
        store = self._open()
        starts = sorted(int(key.removeprefix("part-")) for key in store.keys_done if key.startswith("part-"))
        if starts[:1] != [0]:
            raise self._lacks(0, starts[0] if starts else self.source.examples.n)
        stops = [*starts[1:], self.source.examples.n]
        for start, stop in zip(starts, stops, strict=True):
            yield Step(start, stop, lambda a=start, b=stop: self._load(a, b))

    def _load(self, start: int, stop: int) -> Gradients:
        store = self._open()
        key = _key(start)
        gradients = decode(store.read(key), store.meta(key), self.dtype, self.source.tracker.device)
        if gradients.batch != stop - start:
            raise self._lacks(start + gradients.batch, stop)
        return gradients

    def _lacks(self, start: int, stop: int) -> StoreError:
        return StoreError(
            f"{os.fspath(self.cache.folder)} lacks the gradients of training examples {start} to {stop - 1} -> fit "
            "again: they will be recomputed"
        )

    def _open(self) -> ShardStore:
        if self._reader is None:
            self._reader = ShardStore.open(self.cache.folder, self.manifest, read_only=True)
        return self._reader


class SavedCurvature:
    """Curvatures kept beside a cache, so that a second process need not fit again.

    Args:
        cache: the cache they belong to.
        manifest: what they were fitted on.
        losses: training losses of the first examples.
    """

    def __init__(self, cache: Cache, manifest: Mapping[str, object], losses: Sequence[float]) -> None:
        self.folder, self.losses = Path(cache.folder) / "curvature", list(losses)
        self.manifest = {**manifest, "holds": "curvature", "precision": cache.precision}

    def read(self, key: str, names: list[str], device: torch.device) -> Curvature | None:
        """The curvature of this key on `device`, or None."""
        if not self.folder.exists():
            return None
        store = ShardStore.open(self.folder, self.manifest, read_only=True)
        if not store.has(key):
            return None
        meta = store.meta(key)
        check_same(meta["losses"], self.losses, "training loss", self.folder)
        # Copied out of the mapped file into aligned memory, where products round as they did for the run that fitted.
        state = {name: tensor.to(device, copy=True) for name, tensor in store.read(key).items()}
        return Curvature.from_state(meta["kind"], names, state, meta["info"])

    def write(self, key: str, curvature: Curvature) -> None:
        """Keep a curvature."""
        with ShardStore.open(self.folder, self.manifest) as store:
            if not store.has(key):
                state = curvature.state() or {"none": torch.zeros(1)}
                meta = {"kind": curvature.kind, "info": curvature.info, "losses": self.losses}
                store.write(key, state, meta)


def check_same(
    stored: Sequence[float], now: Sequence[float], what: str, folder: str | os.PathLike[str]
) -> None:
    """Raise if numbers that a folder's content was computed with are not today's, up to rounding."""
    place, way_out = os.fspath(folder), "name another folder, or delete this one to have it rebuilt"
    if len(stored) != len(now):
        raise CacheMismatchError(f"{place} was written for other data or by another version -> {way_out}")
    for one, other in zip(stored, now, strict=True):
        if abs(one - other) > 1e-5 + 1e-3 * max(abs(one), abs(other)):
            raise CacheMismatchError(
                f"{place} belongs to another {what}: an example has {one:g} there but {other:g} here -> {way_out}"
            )


def shard_examples(examples: Examples, bytes_per_example: float) -> int:
    """Examples of one shard, from the gradients' size alone: a resumed run cuts the data where the first one did."""
    return max(1, min(examples.n, int(SHARD_BYTES / bytes_per_example)))


def _key(start: int) -> str:
    return f"part-{start:09d}"


def encode(gradients: Gradients, precision: Precision) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Blocks as named tensors and a JSON-able description of how they fit together."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}

    def put(tensor: Tensor) -> str:
        identity = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if identity not in names:  # the input that three projections share is stored once
            name = names[identity] = f"t{len(names)}"
            _pack(tensors, name, tensor, precision)
        return names[identity]

    layers: dict[str, Any] = {}
    for layer, block in gradients.items():
        if isinstance(block, Factored):
            pieces = [
                {
                    "rows": put(p.rows),
                    "cols": put(p.cols),
                    "patches": _geometry(p.patches),
                    "windows": list(p.windows),
                    "swapped": p.swapped,
                    "real": None if p.real is None else put(p.real),
                }
                for p in block.pieces
            ]
            layers[layer] = {"kind": "factored", "pieces": pieces, "groups": block.groups, "ones": block.ones}
        elif isinstance(block, Sparse):
            layers[layer] = {
                "kind": "sparse",
                "ids": put(block.ids),
                "rows": put(block.rows),
                "table": block.table,
            }
        else:
            layers[layer] = {"kind": "dense", "values": put(block.dense())}
    return tensors, {"layers": layers}


def decode(
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Gradients:
    """The gradients that `encode` wrote, in `dtype` on `device`."""
    ready: dict[str, Tensor] = {}

    def get(name: str) -> Tensor:
        if name not in ready:
            ready[name] = _unpack(tensors, name, dtype).to(device)
        return ready[name]

    blocks: dict[str, Block] = {}
    for layer, spec in meta["layers"].items():
        if spec["kind"] == "factored":
            pieces = tuple(
                Piece(
                    get(p["rows"]),
                    get(p["cols"]),
                    _patches(p["patches"]),
                    tuple(p["windows"]),
                    p.get("swapped", False),
                    None if p["real"] is None else get(p["real"]),
                )
                for p in spec["pieces"]
            )
            blocks[layer] = Factored(pieces, spec["groups"], spec["ones"])
        elif spec["kind"] == "sparse":
            blocks[layer] = Sparse(get(spec["ids"]), get(spec["rows"]), tuple(spec["table"]))
        else:
            blocks[layer] = Dense(get(spec["values"]))
    return Gradients(blocks)


def _pack(tensors: dict[str, Tensor], name: str, tensor: Tensor, precision: Precision) -> None:
    if not tensor.is_floating_point() or precision == "float32":
        tensors[name] = tensor
        return
    single = tensor[0].numel() == tensor.shape[-1]
    if precision == "bf16" and not single:
        tensors[name] = tensor.to(torch.bfloat16)
        return
    # One row an example is few bytes, but no sum over positions averages its rounding out: it gets 16 bits in any case.
    most, dtype = (32767, torch.int16) if single else (127, torch.int8)
    flat = tensor.float()
    # A bfloat16 scale keeps float32's range (float16 would underflow for small gradients); rounding uses that very
    # scale, one step up so that no value leaves the integers' range.
    scale = (flat.abs().amax(-1, keepdim=True) / most * (1 + 2**-7)).to(torch.bfloat16)
    divisor = scale.float()
    steps = torch.where(divisor > 0, flat / divisor, torch.zeros_like(flat))
    tensors[name] = steps.round_().clamp_(-most, most).to(dtype)
    tensors[f"{name}.scale"] = scale


def _unpack(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    stored = tensors[name]
    if f"{name}.scale" in tensors:
        return stored.to(dtype).mul_(tensors[f"{name}.scale"].to(dtype))
    return stored.to(dtype) if stored.is_floating_point() else stored


def _measured_error(exact: Gradients, stored: Gradients) -> float:
    probe = slice(0, ERROR_PROBE)
    difference = norm = 0.0
    for name in exact:
        true = exact[name][probe].dense().double()
        difference += float((stored[name][probe].dense().double() - true).square().sum())
        norm += float(true.square().sum())
    return (difference / norm) ** 0.5 if norm > 0 else 0.0


def _geometry(patches: Patches | None) -> list[Any] | None:
    if patches is None:
        return None
    return [
        list(patches.kernel),
        list(patches.stride),
        [list(p) for p in patches.padding],
        list(patches.dilation),
    ]


def _patches(geometry: list[Any] | None) -> Patches | None:
    if geometry is None:
        return None
    kernel, stride, padding, dilation = geometry
    pairs = tuple((low, high) for low, high in padding)
    return Patches(tuple(kernel), tuple(stride), pairs, tuple(dilation))
