"""A score matrix written tile by tile, into memory or into a folder from which a killed run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from upweight.cache import check_same
from upweight.gradients import Tracker
from upweight.gradients.contraction import Rates, assuming, measured_rates
from upweight.passes import Pass
from upweight.progress import progress_bar
from upweight.store import ShardStore

WHOLE = ""
"""Name of the total score among the parts of a tile."""

Queries = TypeVar("Queries")
Loaded = TypeVar("Loaded")


class ScoreTiles:
    """Scores [query, train], and their parts by layer, filled one tile at a time.

    Tiles go panel of queries by panel, and within a panel step of training examples by step.

    Args:
        folder: where finished tiles go, or None for memory only.
        manifest: what the scores belong to.
        grid: ``panel`` queries by ``step`` training examples a tile. A folder that was begun with another panel
            keeps it, so that a run resumes on a machine with other memory.
        tracker: of the gradients: products are computed on its device and in its dtype. The rates measured for these
            choose the products' routes; a folder keeps them, too, so that all of its tiles are rounded alike.
        queries: number of queries.
        n: number of training examples.
        layers: names of the layers to keep parts of, or None.
        evidence: {what: numbers} that tell apart runs whose manifests are equal, such as the first losses.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        manifest: Mapping[str, Any],
        grid: dict[str, int],
        tracker: Tracker,
        queries: int,
        n: int,
        layers: Sequence[str] | None,
        evidence: Mapping[str, list[float]],
    ) -> None:
        self.queries, self.n, self.layers = queries, n, layers
        self.evidence = dict(evidence)
        self.panel, self.step = grid["panel"], grid["step"]
        self.rates: Rates | None = None
        self._store: ShardStore | None = None
        self._values: dict[str, Tensor] = {}
        self._dtype = tracker.dtype
        if folder is not None:
            rates = asdict(measured_rates(str(tracker.device), tracker.dtype))
            begun = _begun_with(Path(folder)) or {"panel": self.panel, "rates": rates}
            self.panel, self.rates = begun["panel"], Rates(**begun["rates"])
            self._store = ShardStore.open(folder, {**manifest, "grid": {**begun, "step": self.step}})
            self._check_evidence(self._store)
        else:
            self._values = {name: torch.empty(queries, n, dtype=self._dtype) for name in self._names()}

    @property
    def panels(self) -> int:
        """Number of panels of queries."""
        return -(-self.queries // self.panel)

    def panel_rows(self) -> Iterator[tuple[int, int]]:
        """First and last query of each panel."""
        for start in range(0, self.queries, self.panel):
            yield start, min(start + self.panel, self.queries)

    def panel_done(self, start: int, stop: int) -> bool:
        """Whether every tile of a panel is finished."""
        return self._store is not None and all(self.has(start, t) for t in range(0, self.n, self.step))

    def has(self, query: int, train: int) -> bool:
        """Whether the tile that begins at this query and training example is finished."""
        return self._store is not None and self._store.has(_key(query, train))

    def write(self, query: int, train: int, parts: dict[str, Tensor]) -> None:
        """Finish a tile from its parts by layer, or from its total alone (named ``""``)."""
        if WHOLE not in parts:
            parts = {WHOLE: torch.stack(list(parts.values())).sum(0), **parts}
        if self._store is not None:
            tile = {name or "total": part for name, part in parts.items()}
            self._store.write(_key(query, train), tile, self.evidence)
            return
        self._place(query, train, parts)

    def result(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """The whole matrix and its parts by layer."""
        if self._store is not None:
            self._values = {
                name: torch.empty(self.queries, self.n, dtype=self._dtype) for name in self._names()
            }
            for key in sorted(self._store.keys_done):
                query, train = (int(part[1:]) for part in key.split("-"))
                tile = self._store.read(key)
                self._place(
                    query, train, {"" if name == "total" else name: part for name, part in tile.items()}
                )
        layers = {name: self._values[name] for name in self.layers} if self.layers is not None else None
        return self._values[WHOLE], layers

    def _check_evidence(self, store: ShardStore) -> None:
        for key in sorted(store.keys_done)[:1]:
            for what, stored in store.meta(key).items():
                try:
                    check_same(stored, self.evidence[what], what, store.folder)
                except BaseException:
                    store.close()
                    raise

    def _place(self, query: int, train: int, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            rows, columns = part.shape
            self._values[name][query : query + rows, train : train + columns] = part.to(self._dtype)

    def _names(self) -> list[str]:
        return [WHOLE, *(self.layers or ())]

    def __enter__(self) -> ScoreTiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._store is not None:
            self._store.close()


def fill_tiles(
    tiles: ScoreTiles,
    training: Pass[Loaded],
    panel: Callable[[int, int], Queries],
    product: Callable[[Queries, Loaded], dict[str, Tensor]],
    progress: bool,
) -> None:
    """Fill the tiles that are not finished: one pass over the training data for every panel of queries.

    Args:
        tiles: where the scores go.
        training: a pass over the training examples.
        panel: what belongs to the queries from the first number to before the second.
        product: a tile's scores, by layer or as a total named ``""``, of a panel and of what a step of the pass loads.
        progress: show a progress bar.
    """
    with progress_bar("scores", tiles.panels * tiles.n, progress) as advance, assuming(tiles.rates):
        for start, stop in tiles.panel_rows():
            if tiles.panel_done(start, stop):
                advance(tiles.n)
                continue
            queries = panel(start, stop)
            for step in training:
                if not tiles.has(start, step.start):
                    tiles.write(start, step.start, product(queries, step.load()))
                advance(step.stop - step.start)
            del queries  # before the next panel is made, or two would be held


def _key(query: int, train: int) -> str:
    return f"q{query:09d}-t{train:09d}"


def _begun_with(folder: Path) -> dict[str, Any] | None:
    """What the first run of a folder chose for all of them."""
    try:
        grid = json.loads((folder / "manifest.json").read_text())["manifest"]["grid"]
        rates = Rates(**{name: float(rate) for name, rate in grid["rates"].items()})
        return {"panel": int(grid["panel"]), "rates": asdict(rates)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # nothing there yet, or nothing readable: opening it will say so
