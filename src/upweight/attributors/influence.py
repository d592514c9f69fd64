"""Influence functions: what removing a training example would do to a prediction.

    scores[q, i] = (1/n) grad m_q(theta)^T (H + damping I)^-1 grad l_i(theta)

Positive: a *proponent*, whose removal is predicted to make the query's measurement worse. The unit is the measurement's own.
"Understanding Black-box Predictions via Influence Functions" (arXiv 1703.04730); with EK-FAC, "Studying Large Language
Model Generalization with Influence Functions" (arXiv 2308.03296).
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.evidence import influence_info, measure_separable_error
from upweight.attributors.tiles import ScoreTiles
from upweight.budget import batch_size_for, parse_memory
from upweight.cache import Cache, CachePass, shard_examples
from upweight.curvature import Curvature, Damping, fit_curvature
from upweight.curvature.damping import DampingLike
from upweight.data import Examples, signature
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint, model_versions
from upweight.gradients import Gradients, Tracker
from upweight.gradients.contraction import Router
from upweight.gradients.select import ParameterFilter
from upweight.gradients.separable import find_terms, may_separate
from upweight.passes import EmpiricalPass, FisherPass, Kept, ModelPass, Pass
from upweight.progress import progress_bar
from upweight.scores import Scores, SelfInfluence
from upweight.task import FisherKind, Task, resolve_fisher

CALIBRATED = ("kfac", "ekfac")
"""Curvatures whose scores are in the measurement's unit; the others only rank."""


class Influence:
    """Influence functions with a structured curvature.

    ``scores[query, train] = (1/n) grad m_q^T (H + damping I)^-1 grad l_i``, positive for proponents, in the measurement's
    unit (the predicted change on removal) for ``"kfac"`` and ``"ekfac"``; ``"identity"`` and ``"diagonal"`` only rank.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss and what is asked of queries.
        curvature: ``"ekfac"``, ``"kfac"``, ``"diagonal"`` or ``"identity"``.
        damping: ``"auto"`` (a tenth of each layer's mean eigenvalue), a number for all layers, ``{layer: number}``, or a
            `Damping`.
        fisher: ``"exact"`` expectation over the model's predictions, ``"sampled"`` (`draws` per example), ``"empirical"``
            (the data's labels), or ``"auto"``: the most faithful that the number of classes allows.
        draws: targets per example for ``"sampled"``.
        parameters: which parameters to track: None for all trainable ones, a regular expression, or a function of the name.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        tolerance: largest relative error of a layer's approximate contraction route against the exact one, as measured on
            a probe; 0 for exact routes only. Models in float64 always take exact routes.
        seed: of sampled targets.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: the fit takes one pass over the training data (forward and backward) for K-FAC and two for EK-FAC, times the
    classes less one for the exact Fisher; scores take one pass per panel of queries. Passes after the first are read from
    memory or from the cache where they fit.

    Fails when: the model is far from a minimum or was trained so short that no curvature describes it; magnitudes are then
    off, and evaluation against retraining should decide.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3); y = (x[:, 0] > 0).long()
        >>> model = torch.nn.Linear(3, 2)
        >>> method = uw.Influence(model, uw.Classification()).fit((x, y))
        >>> scores = method.attribute((x[:2], y[:2]))
        >>> scores.values.shape, scores.unit
        (torch.Size([2, 20]), 'nats')
        >>> bool((method.self_influence().values > 0).all())
        True
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        curvature: str = "ekfac",
        damping: DampingLike = "auto",
        fisher: str = "auto",
        draws: int = 4,
        parameters: ParameterFilter = None,
        memory: int | str = "auto",
        batch_size: int | None = None,
        tolerance: float = 1e-3,
        seed: int = 0,
        autocast: torch.dtype | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(task, Task):
            raise UpweightError(f"task is {type(task).__name__}, expected a Task -> uw.Classification() for example")
        if batch_size is not None and batch_size < 1:
            raise UpweightError(f"batch_size={batch_size}, expected at least 1 -> leave it None to have it chosen")
        if draws < 1:
            raise UpweightError(f"draws={draws}, expected at least 1")
        if not 0 <= tolerance < 1:
            raise UpweightError(f"tolerance={tolerance}, expected 0 <= tolerance < 1 -> 1e-3 is the default")
        self.model, self.task, self.curvature = model, task, curvature
        self.damping = Damping.of(damping)
        self.fisher, self.draws, self.parameters = fisher, draws, parameters
        self.memory, self.batch_size, self.tolerance = parse_memory(memory), batch_size, tolerance
        self.seed, self.autocast, self.progress = seed, autocast, progress
        self._fitted: _Fitted | None = None
        self._routers: dict[str, Router] = {}

    def fit(
        self, train: Any, *, cache: Cache | str | os.PathLike[str] | None = None, ids: Sequence[int | str] | None = None
    ) -> Influence:
        """Fit the curvature to the training data.

        Args:
            train: a Dataset, a DataLoader, or ``(inputs, targets)``; the data the model was trained on, in its order.
            cache: a folder (or a `Cache`) that keeps the training gradients, so that later queries cost no pass of the
                model over the training data; a killed run resumes from it.
            ids: one id per training example; positions if None.

        Returns:
            Itself.

        Raises:
            UpweightError: what is wrong with the model, the task or the data, in one line.
        """
        started = time.perf_counter()
        examples = Examples(train, ids)
        tracker = Tracker(self.model, self.task, examples, self.parameters, self.autocast)
        probe = tracker.train(examples.take([0]), examples.ids[:1])
        example_bytes = float(max(1, probe.nbytes))
        size = examples.preferred_batch_size or self.batch_size or batch_size_for(example_bytes, examples.n, self.memory)
        training = self._training_pass(tracker, examples, size, example_bytes, cache)
        kind, columns = self._fisher_kind(tracker, examples)
        curvature, fitted_from = self._fit_curvature(tracker, examples, training, kind, columns, size)
        self._fitted = _Fitted(
            tracker=tracker,
            examples=examples,
            training=training,
            curvature=curvature,
            fisher=(kind, columns),
            batch_size=size,
            example_bytes=example_bytes,
            sample=self._sample(tracker, examples, probe, size),
            fingerprints={"model": model_fingerprint(self.model), "train": examples.fingerprint()},
            versions=model_versions(self.model),
            signature=signature(examples.take([0])),
            notes={"curvature_from": fitted_from, "fit_seconds": round(time.perf_counter() - started, 3)},
        )
        self._routers = {}
        return self

    def attribute(
        self,
        query: Any,
        *,
        per_layer: bool = False,
        out: str | os.PathLike[str] | None = None,
        ids: Sequence[int | str] | None = None,
    ) -> Scores:
        """Score every training example for every query.

        Args:
            query: queries in the form of the training data.
            per_layer: also keep each layer's part of the scores.
            out: a folder to write finished tiles of the scores to; a killed run resumes from it.
            ids: one id per query; positions if None.

        Returns:
            `Scores` [query, train].

        Raises:
            UpweightError: not fitted, or the queries do not fit the model.
        """
        fitted = self._ready()
        started = time.perf_counter()
        queries = Examples(query, ids)
        n = fitted.examples.n
        router, inverse = self._router(), fitted.curvature.inverse(self.damping)
        panel = self._panel_size(queries.n)
        names = list(fitted.tracker.layers) if per_layer else None
        grid = {"panel": panel, "step": fitted.step}
        with ScoreTiles(out, self._result_manifest(queries, per_layer), grid, queries.n, n, names, fitted.dtype) as tiles:
            with progress_bar("scores", tiles.panels * n, self.progress) as advance:
                for start, stop in tiles.panel_rows():
                    if tiles.panel_done(start, stop):
                        advance(n)
                        continue
                    preconditioned = self._preconditioned(queries, start, stop, inverse, router)
                    for step in fitted.training:
                        if not tiles.has(start, step.start):
                            train_gradients = step.load()
                            if per_layer:
                                parts = preconditioned.by_layer(train_gradients.T)
                                tiles.write(start, step.start, {name: part / n for name, part in parts.items()})
                            else:
                                scores = preconditioned @ train_gradients.T / n
                                tiles.write(start, step.start, {"": scores})
                        advance(step.stop - step.start)
            values, layers = tiles.result()
        info = self._info(fitted) | {
            "queries": queries.fingerprint(),
            "routes": dict(router.chosen),
            "separable_error": self._separable_error(queries, inverse, router),
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        return Scores(values, queries.ids, fitted.examples.ids, self._unit(self.task.unit), info, layers)

    def self_influence(self) -> SelfInfluence:
        """``(1/n) grad l_i^T (H + damping I)^-1 grad l_i``: the predicted rise of an example's own loss on its removal.

        Large for examples that the model could hardly fit without seeing them: mislabeled or rare ones. One pass over the
        training data; never an n x n matrix.
        """
        fitted = self._ready()
        inverse = fitted.curvature.inverse(self.damping)
        n = fitted.examples.n
        values = torch.zeros(n, dtype=fitted.dtype)
        with progress_bar("self-influence", n, self.progress) as advance:
            for step in fitted.training:
                for part in inverse.quadratic(step.load()).values():
                    values[step.start : step.stop] += (part / n).cpu()
                advance(step.stop - step.start)
        return SelfInfluence(values, fitted.examples.ids, self._unit("training loss"), self._info(fitted))

    def with_damping(self, damping: DampingLike) -> Influence:
        """The same fit with another damping: the eigenvalues are kept raw, so this costs no pass over the data."""
        other = copy.copy(self)
        other.damping = Damping.of(damping)
        other._routers = {}
        return other

    # Fit ---------------------------------------------------------------------------------------------------------

    def _training_pass(
        self,
        tracker: Tracker,
        examples: Examples,
        size: int,
        example_bytes: float,
        cache: Cache | str | os.PathLike[str] | None,
    ) -> Pass[Gradients]:
        if cache is None:
            model_pass = ModelPass(tracker, examples, size)
            return Kept(model_pass, self.memory / 2, lambda g: g.nbytes)
        cache = cache if isinstance(cache, Cache) else Cache(cache)
        rows = examples.preferred_batch_size or shard_examples(examples, example_bytes)
        stored = CachePass(cache, self._manifest(tracker, examples), ModelPass(tracker, examples, rows))
        with progress_bar("training gradients", examples.n, self.progress) as advance:
            stored.write(advance)
        return stored

    def _fisher_kind(self, tracker: Tracker, examples: Examples) -> tuple[FisherKind, int]:
        batch = tracker.move(examples.take(_spread(examples.n, 2)))
        with torch.no_grad():
            return resolve_fisher(self.task, self.model, batch, self.fisher, self.draws)

    def _fit_curvature(
        self,
        tracker: Tracker,
        examples: Examples,
        training: Pass[Gradients],
        kind: FisherKind,
        columns: int,
        size: int,
    ) -> tuple[Curvature, str]:
        key = f"curvature-{self.curvature}-{kind}-{columns}-{self.seed}"
        if isinstance(training, CachePass):
            known = training.read_curvature(key, list(tracker.layers))
            if known is not None:
                return known, "cache"
        passes = {"identity": 0, "ekfac": 2}.get(self.curvature, 1)
        if kind == "empirical":
            source: Any = EmpiricalPass(training)
        else:
            model_pass = FisherPass(tracker, examples, size, kind, columns, self.seed)
            keep = self.memory / 2 if passes > 1 else 0  # a single pass is never read again
            source = Kept(model_pass, keep, lambda columns: sum(g.nbytes for g in columns))
        with progress_bar(f"{self.curvature} curvature", max(1, passes) * examples.n, self.progress) as advance:
            curvature = fit_curvature(self.curvature, tracker.layers, _Walk(source, advance), examples.n, tracker.dtype)
        if isinstance(training, CachePass):
            training.write_curvature(key, curvature)
        return curvature, "cached gradients" if isinstance(training, CachePass) and kind == "empirical" else "model"

    def _sample(self, tracker: Tracker, examples: Examples, probe: Gradients, size: int) -> Gradients | None:
        """Gradients of evenly spread training examples for the layers that may have a separable route; None without any."""
        names = [name for name, block in probe.items() if may_separate(block)]
        if not names or not self.tolerance or tracker.dtype == torch.float64 or self.curvature not in CALIBRATED:
            return None
        positions = _spread(examples.n, 272)
        parts = []
        for a in range(0, len(positions), size):
            part = positions[a : a + size]
            gradients = tracker.train(examples.take(part), [examples.ids[p] for p in part])
            parts.append(Gradients({name: gradients[name] for name in names}))
        return Gradients.concatenate(parts)

    # Attribute ---------------------------------------------------------------------------------------------------

    def _router(self) -> Router:
        """The routes of this damping: found once, from the fit alone."""
        key = repr(self.damping)
        if key not in self._routers:
            fitted = self._ready()
            terms = {}
            if fitted.sample is not None:
                terms = find_terms(fitted.curvature.inverse(self.damping), fitted.sample, self.tolerance)
            self._routers[key] = Router(terms)
        return self._routers[key]

    def _preconditioned(
        self, queries: Examples, start: int, stop: int, inverse: Any, router: Router
    ) -> Gradients:
        """``(H + damping I)^-1 grad m_q`` for a panel of queries."""
        fitted = self._ready()
        parts = []
        step = min(stop - start, batch_size_for(fitted.example_bytes, stop - start, self.memory))
        for a in range(start, stop, step):
            positions = range(a, min(a + step, stop))
            query_gradients = self._query_gradients(queries, positions)
            preconditioned = inverse @ query_gradients
            parts.append(Gradients({name: router.prepare(name, block) for name, block in preconditioned.items()}))
        return Gradients.concatenate(parts).with_router(router)

    def _query_gradients(self, queries: Examples, positions: Sequence[int]) -> Gradients:
        fitted = self._ready()
        batch = queries.take(positions)
        ids = [queries.ids[p] for p in positions]
        try:
            return fitted.tracker.query(batch, ids)
        except UpweightError:
            raise
        except Exception as error:
            seen = signature(batch)
            if seen == fitted.signature:
                raise
            raise UpweightError(
                f"the model refuses the queries: one is {seen} but a training example is {fitted.signature} -> give the "
                f"queries the training data's form ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
            ) from error

    def _panel_size(self, queries: int) -> int:
        """Queries that are held preconditioned at a time: a quarter of the memory budget."""
        fitted = self._ready()
        item = torch.finfo(fitted.dtype).bits // 8
        per_query = sum(layer.numel for layer in fitted.tracker.layers.values()) * item
        return max(1, min(queries, int(self.memory / 4 / per_query)))

    def _separable_error(self, queries: Examples, inverse: Any, router: Router) -> float | None:
        fitted = self._ready()
        if not router.terms or fitted.sample is None:
            return None
        probe = self._query_gradients(queries, _spread(queries.n, 16))
        return measure_separable_error(probe, fitted.sample, inverse, router)

    # Evidence ----------------------------------------------------------------------------------------------------

    def _ready(self) -> _Fitted:
        if self._fitted is None:
            raise UpweightError("not fitted yet -> call fit(train) first")
        if model_versions(self.model) != self._fitted.versions:
            if model_fingerprint(self.model) != self._fitted.fingerprints["model"]:
                raise UpweightError("the model's weights changed since fit -> fit again")
            self._fitted.versions = model_versions(self.model)
        return self._fitted

    def _unit(self, unit: str) -> str | None:
        return unit if self.curvature in CALIBRATED else None

    def _manifest(self, tracker: Tracker, examples: Examples) -> dict[str, Any]:
        return {
            "holds": "training gradients",
            "model": model_fingerprint(self.model),
            "train": examples.fingerprint(),
            "n": examples.n,
            "task": _task_name(self.task),
            "layers": {name: [layer.how, layer.numel] for name, layer in tracker.layers.items()},
            "dtype": str(tracker.dtype),
            "autocast": str(self.autocast),
        }

    def _result_manifest(self, queries: Examples, per_layer: bool) -> dict[str, Any]:
        fitted = self._ready()
        return {
            **self._manifest(fitted.tracker, fitted.examples),
            "holds": "scores",
            "queries": queries.fingerprint(),
            "measurement": str(getattr(self.task, "measurement", "function")),
            "curvature": [self.curvature, *fitted.fisher, self.seed],
            "damping": fitted.curvature.damping(self.damping),
            "tolerance": self.tolerance,
            "per_layer": per_layer,
        }

    def _info(self, fitted: _Fitted) -> dict[str, Any]:
        return influence_info(self, fitted)


@dataclass
class _Fitted:
    """What `fit` learned."""

    tracker: Tracker
    examples: Examples
    training: Pass[Gradients]
    curvature: Curvature
    fisher: tuple[FisherKind, int]
    batch_size: int
    example_bytes: float
    sample: Gradients | None
    fingerprints: dict[str, str]
    versions: tuple[tuple[int, int], ...]
    signature: list[str]
    notes: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return self.tracker.dtype

    @property
    def step(self) -> int:
        """Training examples per tile of the scores."""
        return self.training.source.batch_size if isinstance(self.training, CachePass) else self.batch_size


class _Walk:
    """A Fisher source that reports its progress."""

    def __init__(self, source: Any, advance: Callable[[int], None]) -> None:
        self.source, self.advance = source, advance

    def __iter__(self) -> Iterator[tuple[int, Sequence[Gradients]]]:
        for step in self.source:
            yield step.start, step.load()
            self.advance(step.stop - step.start)


def _spread(n: int, count: int) -> list[int]:
    """Up to `count` positions, evenly spread over n examples."""
    return sorted({round(k * (n - 1) / max(1, count - 1)) for k in range(count)})


def _task_name(task: Task) -> str:
    return type(task).__name__
