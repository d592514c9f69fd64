"""Inner products of query gradients and training gradients at one point of training, streamed in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight.attributors.base import Attributor, explained_by_form
from upweight.attributors.last_layer import parameter_filter
from upweight.attributors.manifest import sample_of_scores, scores_manifest
from upweight.attributors.tiles import WHOLE, ScoreTiles, fill_tiles
from upweight.budget import KEEP_SHARE, PANEL_SHARE, batch_size_for
from upweight.curvature.operators import Identity
from upweight.data import Examples, signature
from upweight.gradients import Gradients, Tracker
from upweight.passes import Kept, ModelPass, Pass, Step
from upweight.progress import progress_bar

Transform = Callable[[Gradients], Gradients]


class Source:
    """Per-example gradients of a model over training and query examples, never all of them at once.

    Args:
        method: whose task and options are used.
        model: the model at this point of training.
        examples: the training data.
        transform: what is done to gradients before they meet (normalised, projected), or None.
        keep: bytes of training gradients that may be kept for the next pass.
    """

    def __init__(
        self,
        method: Attributor,
        model: nn.Module,
        examples: Examples,
        transform: Transform | None = None,
        keep: float | None = None,
    ) -> None:
        self.method, self.examples = method, examples
        self.transform: Transform = transform or (lambda gradients: gradients)
        chosen = parameter_filter(method.parameters, model, method.task, examples, method.autocast)
        self.tracker = Tracker(model, method.task, examples, chosen, method.autocast)
        probe = self.tracker.train(examples.take([0]), examples.ids[:1])
        self.signature = signature(examples.take([0]))
        self.example_bytes = float(max(1, probe.nbytes))
        chosen_size = batch_size_for(self.example_bytes, examples.n, method.memory)
        self.batch_size = examples.preferred_batch_size or method.batch_size or chosen_size
        budget = method.memory * KEEP_SHARE if keep is None else keep
        passes = _Transformed(ModelPass(self.tracker, examples, self.batch_size), self.transform)
        self.training: Kept[Gradients] = Kept(passes, budget, lambda gradients: gradients.nbytes)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of gradients and scores."""
        return self.tracker.dtype

    def inner_products(
        self, queries: Examples, per_layer: bool, out: str | os.PathLike[str] | None, settings: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """``<v_q, g_i>`` [query, train], and its part by layer if asked for.

        Args:
            queries: the queries.
            per_layer: whether to keep each layer's part.
            out: a folder to write finished tiles to, or None.
            settings: what else the tiles in that folder depend on.
        """
        names = list(self.tracker.layers) if per_layer else None
        grid = {"panel": self.panel_size(queries.n), "step": self.batch_size}
        manifest = scores_manifest(self.method, self.tracker, self.examples, queries, per_layer, settings)
        evidence = sample_of_scores(self.tracker, self.examples, queries, out)

        def panel(start: int, stop: int) -> Gradients:
            return self.query_gradients(queries, start, stop)

        def product(query: Gradients, train: Gradients) -> dict[str, Tensor]:
            return query.by_layer(train.T) if per_layer else {WHOLE: query @ train.T}

        n = self.examples.n
        with ScoreTiles(out, manifest, grid, self.tracker, queries.n, n, names, evidence) as tiles:
            fill_tiles(tiles, self.training, panel, product, self.method.progress)
            return tiles.result()

    def squared_norms(self) -> Tensor:
        """``<g_i, g_i>`` [train]."""
        values = torch.zeros(self.examples.n, dtype=self.dtype)
        with progress_bar("self-influence", self.examples.n, self.method.progress) as advance:
            for step in self.training:
                values[step.start : step.stop] = squared_norms(step.load()).cpu()
                advance(step.stop - step.start)
        return values

    def query_gradients(self, queries: Examples, start: int, stop: int) -> Gradients:
        """``grad m_q`` of a panel of queries, a few at a time."""
        size = min(stop - start, batch_size_for(self.example_bytes, stop - start, self.method.memory))
        batches = (range(a, min(a + size, stop)) for a in range(start, stop, size))
        return Gradients.gather(
            (self._query_batch(queries, positions) for positions in batches), stop - start
        )

    def _query_batch(self, queries: Examples, positions: Sequence[int]) -> Gradients:
        batch, ids = queries.take(positions), [queries.ids[p] for p in positions]
        return self.transform(
            explained_by_form(batch, self.signature, lambda: self.tracker.query(batch, ids))
        )

    def panel_size(self, queries: int) -> int:
        """Queries that are held at a time, as factors and multiplied out: their share of the memory budget."""
        numbers = sum(layer.numel for layer in self.tracker.layers.values())
        per_query = numbers * torch.finfo(self.dtype).bits // 8 + self.example_bytes
        return max(1, min(queries, int(self.method.memory * PANEL_SHARE / per_query)))


class _Transformed:
    """A pass whose gradients are transformed as they are loaded."""

    def __init__(self, source: Pass[Gradients], transform: Transform) -> None:
        self.source, self.transform = source, transform

    def __iter__(self) -> Iterator[Step[Gradients]]:
        for step in self.source:
            yield Step(step.start, step.stop, lambda s=step: self.transform(s.load()))


def squared_norms(gradients: Gradients) -> Tensor:
    """``|g|^2`` of every example, [batch]."""
    parts: Sequence[Tensor] = [Identity().quadratic(block, 0.0) for block in gradients.values()]
    return torch.stack(list(parts)).sum(0)


def add_layers(
    total: dict[str, Tensor] | None, layers: Mapping[str, Tensor] | None, weight: float
) -> dict[str, Tensor] | None:
    """``total + weight layers``, layer by layer; None where there are none."""
    if layers is None:
        return total
    if total is None:
        return {name: weight * part for name, part in layers.items()}
    return {name: total[name] + weight * part for name, part in layers.items()}
