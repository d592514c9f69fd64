"""What `Influence.fit` does and what it learns."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from upweight.attributors.exact import fit_exact
from upweight.attributors.manifest import gradients_manifest, sample_of_task
from upweight.budget import BATCH_BYTES, KEEP_SHARE, batch_size_for
from upweight.cache import Cache, CachePass, SavedCurvature, shard_examples
from upweight.curvature import Curvature, fit_curvature
from upweight.curvature.damping import suspects
from upweight.curvature.datainf import DataInfCurvature
from upweight.curvature.exact import EXACT_KINDS
from upweight.curvature.implicit_l2 import implicit_l2_of_layer
from upweight.curvature.operators import Kronecker
from upweight.curvature.solved import SolvedCurvature
from upweight.data import Examples, signature
from upweight.fingerprint import Origin
from upweight.gradients import Gradients, Tracker
from upweight.gradients.blocks import Block
from upweight.gradients.rounding import without_effect
from upweight.gradients.separable import may_separate
from upweight.index import GradientIndex, check_index_use, probe_positions
from upweight.passes import EmpiricalPass, FisherPass, InEigenbasis, Kept, LoadedSteps, ModelPass, Pass
from upweight.progress import progress_bar
from upweight.task import FisherKind, resolve_fisher

if TYPE_CHECKING:
    from upweight.attributors.influence import Influence

KRONECKER = ("kfac", "ekfac")
CALIBRATED = (*KRONECKER, *EXACT_KINDS)
"""Curvatures whose scores are in the measurement's unit; the others only rank."""
PROBE_EXAMPLES = 264
"""Training examples on which separable routes are tried: 8 as queries, the rest as training examples."""

LAYER_VECTORS = 8
"""Numbers in float64 for every parameter of a single layer, to read an untold regulariser off it."""


@dataclass
class Fitted:
    """What `fit` learned.

    Attributes:
        tracker: captures gradients of this model.
        training: passes over its gradients.
        curvature: with raw eigenvalues.
        fisher: its kind, and columns per example.
        columns: those of the model's own distribution, with the draws that the curvature was fitted to; None where it
            has none.
        batch_size: examples per forward pass.
        example_bytes: bytes of one example's factors.
        sample: gradients of a few examples of the layers that may have a separable route, or None.
        index: whitened training gradients for new queries, or None.
        rotated: {layer: its curvature} where the training gradients are kept in the curvature's eigenbasis.
        origin: the model and the training data, with their fingerprints.
        signature: form of one training example.
        notes: further evidence.
    """

    tracker: Tracker
    training: Pass[Gradients]
    curvature: Curvature | SolvedCurvature | DataInfCurvature
    fisher: tuple[FisherKind, int]
    columns: FisherPass | None
    batch_size: int
    example_bytes: float
    sample: Gradients | None
    index: GradientIndex | None
    rotated: dict[str, Kronecker]
    origin: Origin
    signature: list[str]
    notes: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of factors and scores."""
        return self.tracker.dtype

    @property
    def examples(self) -> Examples:
        """The training data."""
        return self.origin.examples

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the model and of the training data."""
        return self.origin.fingerprints

    @property
    def rounded(self) -> str | None:
        """The precision of training gradients that a cache keeps rounded; None where they are exact."""
        if self.index is not None:
            return "index"
        stored = self.training
        return stored.cache.precision if isinstance(stored, CachePass) and stored.lossy else None

    @property
    def step(self) -> int:
        """Training examples per tile of the scores."""
        if self.index is not None:
            return int(str(self.index.manifest["shard_examples"]))
        return self.training.source.batch_size if isinstance(self.training, CachePass) else self.batch_size

    def into_eigenbasis(self, gradients: Gradients) -> Gradients:
        """Gradients rotated where the training gradients are, so that they meet without either being formed again."""
        blocks: dict[str, Block] = dict(gradients)
        blocks |= {name: layer.rotate(gradients[name]) for name, layer in self.rotated.items()}
        return Gradients(blocks, gradients.router)


def fit_influence(
    method: Influence,
    train: Any,
    cache: Cache | str | os.PathLike[str] | None,
    ids: Sequence[int | str] | None,
) -> Fitted:
    """Trace the model, write the cache if there is one, and fit the curvature."""
    started = time.perf_counter()
    examples = Examples(train, ids)
    tracker = Tracker(method.model, method.task, examples, method.parameters, method.autocast)
    probe = tracker.train(examples.take([0]), examples.ids[:1])
    example_bytes = float(max(1, probe.nbytes))
    chosen = batch_size_for(example_bytes, examples.n, method.memory)
    size = examples.preferred_batch_size or method.batch_size or chosen
    cache = Cache(cache) if isinstance(cache, (str, os.PathLike)) else cache
    if cache is not None and cache.precision == "index":
        check_index_use(method.curvature, per_layer=False)
    fisher: tuple[FisherKind, int]
    if method.curvature in EXACT_KINDS:
        exact = fit_exact(method, tracker, examples)
        fisher = (exact.operator.fisher, exact.operator.columns)
    elif method.curvature == "datainf":
        exact = None
        fisher = ("empirical", 1)
    else:
        exact = None
        fisher = _resolve_fisher(method, tracker, examples)
    training = _training_pass(method, tracker, examples, size, example_bytes, cache)
    saved = None
    if cache is not None:
        manifest = gradients_manifest(method, tracker, examples)
        saved = SavedCurvature(cache, manifest, sample_of_task(tracker, examples))
    index = columns = keeper = None
    rotated: dict[str, Kronecker] = {}
    if exact is not None:
        curvature, fitted_from = exact, "model"
    elif method.curvature == "datainf":
        curvature, fitted_from = DataInfCurvature.fit(training, tracker.layers), "model"
        _note_spectrum(method, curvature, tracker, examples, size)
    else:
        if fisher[0] != "empirical":
            columns = FisherPass(tracker, examples, size, *fisher, method.seed)
        elif isinstance(training, Kept):
            keeper = InEigenbasis(training)
        curvature, fitted_from = _fit_curvature(
            method, tracker, examples, training, fisher, columns, size, saved, keeper
        )
        if keeper is not None:
            layers = {name: curvature.layers[name] for name in keeper.layers}
            rotated = {name: layer for name, layer in layers.items() if isinstance(layer, Kronecker)}
        if cache is not None and cache.precision == "index":
            index = _build_index(method, tracker, examples, curvature, fisher, cache, example_bytes)
            if isinstance(training, Kept):
                training.release()  # the index answers from now on
    return Fitted(
        tracker=tracker,
        training=training,
        curvature=curvature,
        fisher=fisher,
        columns=columns,
        batch_size=size,
        example_bytes=example_bytes,
        sample=None if index is not None else _sample(method, tracker, examples, probe, size),
        index=index,
        rotated=rotated,
        origin=Origin(method.model, examples),
        signature=signature(examples.take([0])),
        notes={"curvature_from": fitted_from, "fit_seconds": round(time.perf_counter() - started, 3)},
    )


def _resolve_fisher(method: Influence, tracker: Tracker, examples: Examples) -> tuple[FisherKind, int]:
    with torch.no_grad(), tracker.quietly():
        batch = tracker.move(examples.take(spread(examples.n, 2)))
        return resolve_fisher(method.task, method.model, batch, method.fisher, method.draws)


def _training_pass(
    method: Influence,
    tracker: Tracker,
    examples: Examples,
    size: int,
    example_bytes: float,
    cache: Cache | None,
) -> Pass[Gradients]:
    if cache is None or cache.precision == "index":
        return Kept(ModelPass(tracker, examples, size), method.memory * KEEP_SHARE, lambda g: g.nbytes)
    rows = examples.preferred_batch_size or shard_examples(examples, example_bytes)
    source = ModelPass(tracker, examples, rows)
    stored = CachePass(
        cache, gradients_manifest(method, tracker, examples), source, sample_of_task(tracker, examples)
    )
    with progress_bar("training gradients", examples.n, method.progress) as advance:
        stored.write(advance)
    return stored


def _fit_curvature(
    method: Influence,
    tracker: Tracker,
    examples: Examples,
    training: Pass[Gradients],
    fisher: tuple[FisherKind, int],
    columns: FisherPass | None,
    size: int,
    saved: SavedCurvature | None,
    keeper: InEigenbasis | None,
) -> tuple[Curvature, str]:
    if tracker.padded and tracker.task.mask is None and method.curvature in KRONECKER:
        warnings.warn(
            f"examples are padded to the longest of their batch and the task has no mask: {method.curvature} counts "
            "padding, and depends on the batches -> task.mask = lambda batch: ..., 1 for real positions, 0 for padding",
            stacklevel=4,
        )
    kind = fisher[0]
    key = f"{method.curvature}-{kind}-{fisher[1]}-{method.seed}"
    known = saved.read(key, list(tracker.layers), tracker.device) if saved is not None else None
    if known is not None:
        _note_spectrum(method, known, tracker, examples, size)
        return known, "cache"
    passes = {"identity": 0, "ekfac": 2}.get(method.curvature, 1)
    lossy = isinstance(training, CachePass) and training.lossy
    if columns is None:
        # The curvature's inverse would magnify the rounding of a lossy cache: better run the model once more.
        again = Kept(ModelPass(tracker, examples, size), method.memory * KEEP_SHARE, lambda g: g.nbytes)
        source: Any = EmpiricalPass(again if lossy else training)
    else:
        keep = method.memory * KEEP_SHARE if passes > 1 else 0  # a single pass is never read again
        source = Kept(columns, keep, lambda columns: sum(g.nbytes for g in columns))
    total = max(1, passes) * examples.n
    with progress_bar(f"{method.curvature} curvature", total, method.progress) as advance:
        walk = LoadedSteps(source, advance)
        curvature = fit_curvature(method.curvature, tracker.layers, walk, examples.n, tracker.dtype, keeper)
    _note_spectrum(method, curvature, tracker, examples, size)
    if saved is not None:
        saved.write(key, curvature)
    from_cache = kind == "empirical" and isinstance(training, CachePass) and not lossy
    return curvature, "cached gradients" if from_cache else "model"


def _note_spectrum(
    method: Influence,
    curvature: Curvature | DataInfCurvature,
    tracker: Tracker,
    examples: Examples,
    size: int,
) -> None:
    """What an automatic damping needs to know, unless a cached curvature brought it along."""
    info = curvature.info
    info.setdefault("examples", examples.n)
    if "without_effect" not in info:
        doubtful = suspects(curvature.spectra(), torch.finfo(tracker.computes).eps)
        info["without_effect"] = without_effect(tracker, examples, doubtful)
    layers = list(tracker.layers.values())
    room = LAYER_VECTORS * 8 * layers[0].numel <= method.memory * KEEP_SHARE
    if not isinstance(curvature, Curvature) or method.curvature == "identity":
        return
    if len(layers) == 1 and room and "implicit_l2" not in info:
        info["implicit_l2"] = implicit_l2_of_layer(curvature, tracker, examples, size)


def _build_index(
    method: Influence,
    tracker: Tracker,
    examples: Examples,
    curvature: Curvature,
    fisher: tuple[FisherKind, int],
    cache: Cache,
    example_bytes: float,
) -> GradientIndex:
    check_index_use(method.curvature, per_layer=False)
    inverse = curvature.inverse(method.damping)
    rows = examples.preferred_batch_size or shard_examples(examples, example_bytes)
    manifest = {
        **gradients_manifest(method, tracker, examples),
        "holds": "index",
        "curvature": [method.curvature, *fisher, method.seed],
        "damping": dict(inverse.damping),
        "index_error": cache.index_error,
        "shard_examples": rows,
    }
    positions = probe_positions(examples.n)
    probe = tracker.train(examples.take(positions), [examples.ids[p] for p in positions])
    with progress_bar("index", examples.n, method.progress) as advance:
        training = ModelPass(tracker, examples, rows)
        keep = min(BATCH_BYTES, method.memory * KEEP_SHARE)  # unpacked they are larger than on disk
        return GradientIndex.build(
            cache.folder, manifest, inverse, training, probe, cache.index_error, advance, keep
        )


def _sample(
    method: Influence, tracker: Tracker, examples: Examples, probe: Gradients, size: int
) -> Gradients | None:
    """Gradients of evenly spread training examples for the layers that may have a separable route; None without any."""
    names = [name for name, block in probe.items() if may_separate(block)]
    exact = method.tolerance == 0 or tracker.dtype == torch.float64
    if not names or exact or method.curvature not in KRONECKER:
        return None
    positions = spread(examples.n, PROBE_EXAMPLES)
    parts = []
    for a in range(0, len(positions), size):
        part = positions[a : a + size]
        gradients = tracker.train(examples.take(part), [examples.ids[p] for p in part])
        parts.append(Gradients({name: gradients[name] for name in names}))
    return Gradients.concatenate(parts)


def spread(n: int, count: int) -> list[int]:
    """Up to `count` positions, evenly spread over n examples."""
    return sorted({round(k * (n - 1) / max(1, count - 1)) for k in range(count)})
