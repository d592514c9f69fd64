"""Influence functions: what removing a training example would do to a prediction.

    scores[q, i] = (1/n) grad m_q(theta)^T (H + damping I)^-1 grad l_i(theta)

Positive: a *proponent*, whose removal is predicted to make the query's measurement worse. The unit is the
measurement's own. "Understanding Black-box Predictions via Influence Functions" (arXiv 1703.04730); with EK-FAC,
"Studying Large Language Model Generalization with Influence Functions" (arXiv 2308.03296).
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from upweight._autocast import without_autocast
from upweight.attributors.base import explained_by_form
from upweight.attributors.changes import TrainingSetChanges
from upweight.attributors.corrections import Corrected, Correction, check_correction
from upweight.attributors.evidence import influence_info, measure_separable_error
from upweight.attributors.exact import check_curvature, solve_evidence, solver_settings
from upweight.attributors.fitted import CALIBRATED, Fitted, fit_influence, spread
from upweight.attributors.functional import FunctionalQueries, functional_gradients, functional_queries
from upweight.attributors.manifest import sample_of_scores, scores_manifest
from upweight.attributors.panel import gather_panel
from upweight.attributors.tiles import WHOLE, ScoreTiles, fill_tiles
from upweight.budget import KEEP_SHARE, PANEL_SHARE, batch_size_for, parse_memory
from upweight.cache import Cache
from upweight.curvature import Damping
from upweight.curvature.damping import DampingLike
from upweight.curvature.exact import EXACT_KINDS
from upweight.curvature.l2 import L2, describe_l2
from upweight.curvature.solvers import Preconditioner, Sketch, Solver
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Gradients, Router
from upweight.gradients.select import ParameterFilter
from upweight.gradients.separable import find_terms
from upweight.index import GradientIndex, WhitenedQueries, check_index_use
from upweight.passes import Kept
from upweight.progress import progress_bar
from upweight.scores import Scores, SelfInfluence
from upweight.task import Task


class Influence(TrainingSetChanges):
    """Influence functions with a structured or an exact curvature.

    ``scores[query, train] = (1/n) grad m_q^T (H + damping I)^-1 grad l_i``, positive for proponents, in the
    measurement's unit (the predicted change on removal) for ``"kfac"``, ``"ekfac"``, ``"ggn"`` and ``"hessian"``;
    ``"identity"`` and ``"diagonal"`` only rank.

    Args:
        model: a trained model in eval mode. Nothing on it is changed.
        task: its training loss and what is asked of queries.
        curvature: ``"ekfac"``, ``"kfac"``, ``"diagonal"``, ``"identity"``; or exact over all tracked parameters:
            ``"ggn"`` (the Gauss-Newton matrix) and ``"hessian"``; or ``"datainf"`` (layer by layer, ranks only).
        damping: ``"auto"`` (a tenth of each layer's mean eigenvalue, of a Kronecker layer at least a fiftieth of what
            one training example adds to it, see `upweight.curvature.damping`; for exact curvatures the damping
            whose steps fit the real loss best, see `upweight.curvature.auto_damping`, or, of a sampled or empirical
            Fisher, .08 directions an example, see `upweight.curvature.fisher_damping`), a number for all layers,
            ``"0.1 mean"`` or ``"0.01 top"`` (eigenvalue), ``{layer: any of these}``, or a `Damping`.
        solver: for exact curvatures: ``"direct"``, ``"cg"``, ``"lissa"``, ``"arnoldi"``, ``"nystrom"``, ``"astra"``,
            ``"dual"``, or an object with `name` and `solve`; None for ``"direct"`` up to 6,000 parameters where the
            dense matrix fits the memory budget, else ``"cg"``.
        preconditioner: of the solver: ``"sketch"`` (the largest eigenvalues, roughly), ``"ekfac"``, ``"kfac"``,
            ``"diagonal"``, an object with ``@``, None, or ``"auto"``: a sketch for ``"cg"``, EK-FAC for ``"astra"``.
        l2: for exact curvatures: the regulariser ``(1/2) sum_j l2_j theta_j^2`` of the training objective, which is
            part of H: one coefficient, {regular expression of parameter names: coefficient}, or a tensor [p].
        blocks: for exact curvatures: leave out what couples layers (not for ``"dual"``, groups, or ``"rescaled"``).
        correction: None; ``"rescaled"`` (RIF: the curvature without the removed example; with ``"ekfac"`` and
            ``"kfac"`` the example leaves the eigenvalues only, which corrects much less); ``"relative"`` or
            ``"relative-loss"`` (RelatIF, divided by the size of the example's step, or of its effect on its own loss;
            these only rank). See `upweight.attributors.corrections`.
        fisher: ``"exact"`` expectation over the model's predictions, ``"sampled"`` (`draws` per example),
            ``"empirical"`` (the data's labels), or ``"auto"``: the most faithful that the number of classes allows
            (always exact for ``"ggn"``).
        draws: targets per example for ``"sampled"``.
        parameters: which parameters to track: None for all trainable ones, a regular expression, or a function of
            the name.
        memory: bytes to stay within (an int, or ``"2GB"``); ``"auto"`` is half of what is free.
        batch_size: examples per forward pass; chosen from the memory budget if None. Scores do not depend on it.
        tolerance: largest relative error of a layer's approximate contraction route against the exact one, as
            measured on a probe; 0 for exact routes only. Models in float64 always take exact routes.
        seed: of sampled targets.
        autocast: dtype for `torch.autocast` in the forward pass, or None.
        progress: show progress bars (in a terminal only).

    Cost: the fit takes one pass over the training data (forward and backward) for K-FAC and two for EK-FAC, times the
    classes less one for the exact Fisher; scores take one pass per panel of queries. Passes after the first are read
    from memory or from the cache where they fit.

    Fails when: the model is far from a minimum or was trained so short that no curvature describes it; magnitudes
    are then off, and evaluation against retraining should decide.

    Example:
        >>> import torch, upweight as uw
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(20, 3)
        >>> y = (x[:, 0] > 0).long()
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
        solver: str | Solver | None = None,
        preconditioner: str | Sketch | Preconditioner | None = "auto",
        l2: L2 = 0.0,
        blocks: bool = False,
        correction: str | None = None,
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
            raise UpweightError(
                f"task is {type(task).__name__}, expected a Task -> uw.Classification() for example"
            )
        check_curvature(curvature, solver, l2, blocks)
        check_correction(correction, blocks)
        if batch_size is not None and batch_size < 1:
            raise UpweightError(f"batch_size={batch_size}, expected at least 1 -> None has it chosen")
        if draws < 1:
            raise UpweightError(f"draws={draws}, expected at least 1")
        if not 0 <= tolerance < 1:
            raise UpweightError(f"tolerance={tolerance}, expected 0 <= tolerance < 1 -> 1e-3 is the default")
        self.model, self.task, self.curvature = model, task, curvature
        self.damping = Damping.of(damping)
        self.solver, self.preconditioner, self.l2 = solver, preconditioner, l2
        self.correction, self.blocks = correction, blocks
        self.fisher, self.draws, self.parameters = fisher, draws, parameters
        self.memory, self.batch_size, self.tolerance = parse_memory(memory), batch_size, tolerance
        self.seed, self.autocast, self.progress = seed, autocast, progress
        self._fitted: Fitted | None = None
        self._routers: dict[str, Router] = {}

    @without_autocast()
    def fit(
        self,
        train: Any,
        *,
        cache: Cache | str | os.PathLike[str] | None = None,
        ids: Sequence[int | str] | None = None,
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
        self._fitted = fit_influence(self, train, cache, ids)
        self._routers = {}
        return self

    @without_autocast()
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
            query: queries in the form of the training data; or a `Functional` (or a list of them): any scalar of the
                model, as one query.
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
        queries = functional_queries(query, ids) or Examples(query, ids)
        n, names = fitted.examples.n, list(fitted.tracker.layers) if per_layer else None
        router, inverse = self._router(), fitted.curvature.inverse(self.damping)
        training: Any = self._index(per_layer) or fitted.training
        correction = Correction(self, fitted, inverse)
        grid = {"panel": self._panel_size(queries.n), "step": fitted.step}
        manifest = scores_manifest(
            self, fitted.tracker, fitted.examples, queries, per_layer, self._settings(fitted)
        )
        evidence = sample_of_scores(fitted.tracker, fitted.examples, queries, out)

        def panel(start: int, stop: int) -> Any:
            return self._preconditioned(queries, start, stop, correction.queries, router)

        def product(preconditioned: Any, corrected: Iterable[Corrected]) -> dict[str, Tensor]:
            columns: list[dict[str, Tensor]] = []
            for train_gradients, scale in corrected:
                if per_layer:
                    parts = preconditioned.by_layer(train_gradients.T)
                    columns.append({name: part / n * scale for name, part in parts.items()})
                else:
                    columns.append({WHOLE: preconditioned @ train_gradients.T / n * scale})
            return {name: torch.cat([part[name] for part in columns], 1) for name in columns[0]}

        with ScoreTiles(out, manifest, grid, fitted.tracker, queries.n, n, names, evidence) as tiles:
            fill_tiles(tiles, correction.over(training), panel, product, self.progress)
            values, layers = tiles.result()
        info = influence_info(self, fitted) | {
            "queries": queries.fingerprint(),
            "routes": dict(router.chosen),
            "separable_error": self._separable_error(queries, inverse, router),
            **solve_evidence(inverse),
            "attribute_seconds": round(time.perf_counter() - started, 3),
        }
        asked = queries if isinstance(queries, FunctionalQueries) else self.task
        unit, info["higher_is_better"] = asked.unit, asked.higher_is_better
        return Scores(values, queries.ids, fitted.examples.ids, self._unit(unit), info, layers)

    @without_autocast()
    def self_influence(self) -> SelfInfluence:
        """``(1/n) grad l_i^T (H + damping I)^-1 grad l_i``: the predicted rise of an example's own loss on its removal.

        Large for examples that the model could hardly fit without seeing them: mislabeled or rare ones. One pass
        over the training data; never an n x n matrix.
        """
        fitted = self._ready()
        inverse = fitted.curvature.inverse(self.damping)
        correction = Correction(self, fitted, inverse)
        n, index = fitted.examples.n, self._index()
        values = torch.zeros(n, dtype=fitted.dtype)
        with progress_bar("self-influence", n, self.progress) as advance:
            for step in index or fitted.training:
                parts = correction.own(step)
                for part in parts.values():
                    values[step.start : step.stop] += (part / n).cpu()
                advance(step.stop - step.start)
        info = influence_info(self, fitted) | solve_evidence(inverse)
        return SelfInfluence(values, fitted.examples.ids, self._unit("training loss"), info)

    def with_damping(self, damping: DampingLike) -> Influence:
        """The same fit with another damping: the eigenvalues are kept raw, so this costs no pass over the data."""
        other = copy.copy(self)
        other.damping = Damping.of(damping)
        other._routers = {}
        return other

    # Attribute ---------------------------------------------------------------------------------------------------

    def _router(self) -> Router:
        """The routes of this damping: found once, from the fit alone."""
        key = repr(self.damping)
        if key not in self._routers:
            fitted = self._learned()
            terms = {}
            if fitted.sample is not None and self.correction != "rescaled":  # which leaves out of the filter
                inverse: Any = fitted.curvature.inverse(self.damping)  # Kronecker, or there is no sample
                terms = find_terms(inverse, fitted.sample, self.tolerance)
            self._routers[key] = Router(terms)
        return self._routers[key]

    def _preconditioned(
        self,
        queries: Examples | FunctionalQueries,
        start: int,
        stop: int,
        apply: Callable[[Gradients], Any],
        router: Router,
    ) -> Any:
        """``(H + damping I)^-1 grad m_q`` for a panel of queries, in the form that the training gradients ask for."""
        fitted = self._learned()
        each = fitted.example_bytes + self._query_bytes()
        size = min(stop - start, batch_size_for(each, stop - start, self.memory))
        batches = [range(a, min(a + size, stop)) for a in range(start, stop, size)]
        raw = (self._query_gradients(queries, positions) for positions in batches)
        gradients = (fitted.into_eigenbasis(g) for g in raw) if fitted.rotated else raw
        if fitted.index is not None:
            return WhitenedQueries.concatenate([fitted.index.query(g) for g in gradients])
        if self.curvature in (*EXACT_KINDS, "datainf"):  # one solve, or one pass, for the whole panel
            return apply(Gradients.concatenate(list(gradients)).with_router(router))
        inverse = fitted.curvature.inverse(self.damping)
        return gather_panel((apply(g) for g in gradients), stop - start, inverse, router, self.tolerance)

    def _index(self, per_layer: bool = False) -> GradientIndex | None:
        """The index, if the fit made one and it can answer this."""
        fitted = self._learned()
        if fitted.index is None:
            return None
        check_index_use(self.curvature, per_layer)
        if fitted.curvature.damping(self.damping) != dict(fitted.index.inverse.damping):
            raise UpweightError(
                "the index was built for another damping, which its numbers contain -> fit again with this damping and "
                "another folder, or cache with precision='float32', 'bf16' or 'int8', which serve any damping"
            )
        return fitted.index

    def _query_gradients(self, queries: Examples | FunctionalQueries, positions: Sequence[int]) -> Gradients:
        fitted = self._learned()
        if isinstance(queries, FunctionalQueries):
            return functional_gradients(fitted.tracker, [queries.functionals[p] for p in positions])
        batch, ids = queries.take(positions), [queries.ids[p] for p in positions]
        return explained_by_form(batch, fitted.signature, lambda: fitted.tracker.query(batch, ids))

    def _panel_size(self, queries: int) -> int:
        """Queries that are held preconditioned at a time: their share of the memory budget.

        Every panel costs a pass. Where the training gradients do not fit into memory, the part of them that is kept is
        given up for larger panels if that leaves fewer passes to compute.
        """
        fitted = self._learned()
        panel, larger = (
            max(1, min(queries, int(self.memory * share / self._query_bytes())))
            for share in (PANEL_SHARE, PANEL_SHARE + KEEP_SHARE)
        )
        training = fitted.training
        if not isinstance(training, Kept):
            return panel
        room = self.memory * KEEP_SHARE / (fitted.example_bytes * fitted.examples.n)
        kept = max(training.share_in_memory, min(1.0, room))
        if -(-queries // panel) * (1 - kept) <= -(-queries // larger) or kept == 1:
            return panel
        training.release()
        return larger

    def _query_bytes(self) -> int:
        """Bytes of one preconditioned query."""
        tracker = self._learned().tracker
        return sum(layer.numel for layer in tracker.layers.values()) * tracker.dtype.itemsize

    def _separable_error(
        self, queries: Examples | FunctionalQueries, inverse: Any, router: Router
    ) -> float | None:
        fitted = self._learned()
        if not router.terms or fitted.sample is None:
            return None
        probe = self._query_gradients(queries, spread(queries.n, 8))
        sample = fitted.sample.rows(slice(0, None, 3))
        return measure_separable_error(probe, sample, inverse, router, self.tolerance)

    # Evidence ----------------------------------------------------------------------------------------------------

    def _ready(self) -> Fitted:
        if self._fitted is None:
            raise UpweightError("not fitted yet -> call fit(train) first")
        self._fitted.origin.check()
        return self._fitted

    def _learned(self) -> Fitted:
        assert self._fitted is not None  # the question has called `_ready`, which looks at all weights
        return self._fitted

    def _unit(self, unit: str) -> str | None:
        return unit if self.curvature in CALIBRATED and self.correction in (None, "rescaled") else None

    def _settings(self, fitted: Fitted) -> dict[str, Any]:
        """What scores depend on besides the gradients."""
        settings = {
            "curvature": [self.curvature, *fitted.fisher, self.seed],
            "damping": repr(self.damping),  # the rule: its numbers may differ in a last digit from fit to fit
            "tolerance": self.tolerance,
        }
        if self.curvature in EXACT_KINDS:
            settings |= solver_settings(fitted.curvature, self.preconditioner) | {"l2": describe_l2(self.l2)}
        if fitted.rounded:
            settings["gradients"] = fitted.rounded
        if self.correction:
            settings["correction"] = self.correction
        return settings
