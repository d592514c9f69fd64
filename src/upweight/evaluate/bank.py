"""A bank of models retrained on subsets of the training data: the ground truth of attribution.

On disk the bank is a `ShardStore`: one shard for every finished (subset, seed), written by one process as the results
come in. Killing it loses at most the models that are being trained at that moment.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
from torch import Tensor, nn

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.evaluate.checks import check_inputs_matter, check_train_fn
from upweight.evaluate.identity import (
    check_query,
    check_subsets,
    code_digests,
    manifest_of,
    warn_of_changed_code,
)
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.parallel import in_parallel
from upweight.evaluate.plan import Plan
from upweight.evaluate.records import (
    ATTEMPTS,
    BankReport,
    about_queries,
    attempt_key,
    failures,
    kept_state,
    later_key,
    plain_ids,
    run_key,
    tries_left,
)
from upweight.evaluate.runs import Finished, Run, remeasure, train_and_measure
from upweight.evaluate.subsets import Subsets
from upweight.progress import progress_bar
from upweight.store import ShardStore
from upweight.task import Task

__all__ = ["RetrainingBank"]

TrainFunction = Callable[..., Any]


class RetrainingBank:
    """Models retrained on subsets, each with several seeds, and what they measure on queries.

    ``outcomes(name).values[subset, seed, query]`` is the measurement in loss orientation: lower is better.

    Args:
        folder: Where finished runs are kept. Run again after a kill, the bank goes on where it stopped. It may grow by
            more seeds, and by subsets after those it has; other subsets need a folder of their own.
        train_fn: ``(indices, seed) -> model``, trained from scratch on these positions of the training set (int64
            array). The seed must decide all randomness; the global generators of torch, numpy and Python are seeded
            with it too. For changes of labels it takes ``labels={position: label}`` as well.
        task: What is measured.
        n: Training examples.
        subsets: `Subsets`, or how many random halves to draw.
        seeds: The seeds, or how many (0, 1, ...). A seed is shared by all subsets, so that part of its noise cancels.
        keep_models: Keep the weights, to measure other queries later.
        model_fn: ``() -> model`` of the same architecture, with any weights: needed only to measure with kept models.
        settings: Whatever decides the training (JSON-able). A folder made with other settings is refused.
        n_jobs: Models trained at a time, one thread each; -1 for one a core. One, or whatever a cluster has, if None.
        backend: joblib's: "loky" for processes on this machine, "dask" (with a `distributed.Client` open), "ray".
        progress: Show a progress bar with the time left (in a terminal only).

    Raises:
        UpweightError: The arguments do not fit each other.
        CacheMismatchError: The folder belongs to another bank.

    Cost: subsets times seeds trainings.

    Example:
        >>> import tempfile, torch, upweight as uw
        >>> x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> def train_fn(indices, seed):
        ...     torch.manual_seed(seed)
        ...     model = torch.nn.Linear(2, 2)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        ...     for _ in range(20):
        ...         optimizer.zero_grad()
        ...         torch.nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        ...         optimizer.step()
        ...     return model
        >>> bank = uw.RetrainingBank(
        ...     tempfile.mkdtemp(), train_fn, uw.Classification(), 30, subsets=4, seeds=2
        ... )
        >>> bank.measure((x[:3], y[:3]), "few")
        >>> print(bank.run().finished, bank.outcomes("few").values.shape)
        8 (4, 2, 3)
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        train_fn: TrainFunction,
        task: Task,
        n: int,
        *,
        subsets: Subsets | int = 100,
        seeds: int | Sequence[int] = 3,
        keep_models: bool = False,
        model_fn: Callable[[], nn.Module] | None = None,
        settings: dict[str, Any] | None = None,
        n_jobs: int | None = None,
        backend: str = "loky",
        progress: bool = True,
    ) -> None:
        if not isinstance(task, Task):
            raise UpweightError(
                f"task is {type(task).__name__}, expected a Task -> uw.Classification() for example"
            )
        self._plan = Plan.of(n, subsets, seeds)
        self.subsets, self.seeds = self._plan.subsets, self._plan.seeds
        check_train_fn(train_fn, self.subsets)
        self.folder, self.train_fn, self.task, self.n = Path(folder).expanduser(), train_fn, task, n
        self.keep_models, self.model_fn, self.settings = keep_models, model_fn, dict(settings or {})
        self.n_jobs = n_jobs if n_jobs is not None else 1 if backend == "loky" else -1
        self.backend, self.progress = backend, progress
        self._queries: dict[str, Examples] = {}
        self._code = code_digests(train_fn, task)
        if (self.folder / "manifest.json").exists():
            with self._reading() as store:
                self._check(store)

    # What a user does --------------------------------------------------------------------------------------------

    def measure(self, query: Any, name: str, *, ids: Sequence[int | str] | None = None) -> None:
        """Have every model measure these queries: those still to be trained, and those that were kept.

        Args:
            query: Queries in the form of the training data.
            name: What to call them in ``outcomes(name)``.
            ids: One id per query; positions if None.

        Raises:
            CacheMismatchError: The bank measured other queries under this name.
            UpweightError: Models are finished that did not measure these queries, and they were not kept.
        """
        examples = Examples(query, ids)
        if not self.folder.joinpath("manifest.json").exists():
            self._queries[name] = examples
            return
        with self._reading() as store:
            check_query(store, self._plan, name, examples)
            missing = [r for r in self._plan if store.has(r.key) and not about_queries(store, r, name)]
        self._queries[name] = examples
        if not missing:
            return
        if not self.keep_models or self.model_fn is None:
            del self._queries[name]
            raise UpweightError(
                f"{len(missing)} finished models did not measure {name!r} -> "
                + (
                    "pass model_fn=, a function that builds the untrained network"
                    if self.keep_models
                    else "use a new folder, with measure() before run(); keep_models=True would have allowed this"
                )
            )
        self._measure_kept(name, missing)

    def run(self) -> BankReport:
        """Train and measure whatever is missing; finished models are never trained again.

        Returns:
            What was done, and which runs failed. A failed run (an exception, or a NaN) is tried once more, and again by
            every later call: twice if train_fn was changed since.

        Raises:
            UpweightError: Nothing would be kept; every run failed; or train_fn ignores its indices or returns None.

        Warns:
            UserWarning: Runs failed, train_fn ignores its seed, or its code is not the one the folder began with.
        """
        if not self._queries and not self.keep_models:
            raise UpweightError(
                "nothing would be kept -> call measure(query, name) first, or keep_models=True"
            )
        started = time.perf_counter()
        trained = 0
        with self._writing() as store:
            self._check(store)
            for name, examples in self._queries.items():
                check_query(store, self._plan, name, examples)
            waves = self._plan.waves()
            todo = [[run for run in wave if not store.has(run.key)] for wave in waves]
            code = self._code["train_fn"]
            tries = {run.key: tries_left(store, run, code) for wave in todo for run in wave}
            with progress_bar("retraining", sum(map(len, todo)), self.progress) as advance:
                for number, wave in enumerate(todo):
                    while wave:
                        for finished in self._in_parallel(wave):
                            self._record(store, finished)
                            tries[finished.run.key] -= 1
                            trained += finished.error is None
                            if finished.error is None:
                                advance(1)
                        wave = [run for run in wave if not store.has(run.key) and tries[run.key]]
                    if number == 0:  # after the first few models, rather than after a night
                        check_inputs_matter(store, waves[0])
            failed = [
                (run.subset, run.seed, failures(store, run)[-1]["error"])
                for run in self._plan
                if not store.has(run.key)
            ]
        planned = len(self.subsets) * len(self.seeds)
        report = BankReport(trained, planned - len(failed), planned, failed, time.perf_counter() - started)
        if failed:
            subset, seed, error = failed[0]
            first = f"first: subset {subset}, seed {seed}: {error}"
            if len(failed) == planned:
                raise UpweightError(
                    f"all {planned} runs failed, {first} -> run train_fn by hand, then the bank again"
                )
            warnings.warn(
                f"{len(failed)} of {planned} runs failed twice or more and take part in nothing ({first}) -> repair "
                "train_fn, and run the bank again: it trains what is missing",
                stacklevel=2,
            )
        return report

    def outcomes(self, name: str) -> Outcomes:
        """What the models measured on the queries called `name`.

        Returns:
            `Outcomes`; NaN where a run failed twice.

        Raises:
            UpweightError: Models are still to be trained, or the name is not known.
        """
        values: np.ndarray | None = None
        about: dict[str, Any] = {}
        seconds, outstanding = 0.0, 0
        with self._reading() as store:
            for run in self._plan:
                if not store.has(run.key):
                    outstanding += len(failures(store, run)) < ATTEMPTS
                    continue
                measured = self._read(store, run, name).double().numpy()
                seconds += store.meta(run.key)["seconds"]
                if values is None:
                    values = np.full((len(self.subsets), len(self.seeds), len(measured)), np.nan)
                    about = about_queries(store, run, name)
                values[run.subset, self.seeds.index(run.seed)] = measured
        if outstanding or values is None:
            raise UpweightError(f"{outstanding} models are still to be trained -> bank.run()")
        info = {"bank": str(self.folder), "train_seconds": round(seconds, 1), **self.settings}
        info["queries"] = about["fingerprint"]
        task = self.task
        return Outcomes(
            self.subsets.masks,
            values,
            about.get("ids"),
            self.seeds,
            self.subsets.blocks,
            task.unit,
            task.higher_is_better,
            info,
            np.array([bool(changes) for changes in self.subsets.labels]),
        )

    def model(self, subset: int, seed: int) -> nn.Module:
        """A kept model, in eval mode."""
        if self.model_fn is None:
            raise UpweightError("model_fn= is not given -> pass a function that builds the untrained network")
        with self._reading() as store:
            model = self.model_fn()
            model.load_state_dict(kept_state(store.read(run_key(subset, seed))))
        return model.eval()

    # Work --------------------------------------------------------------------------------------------------------

    def _in_parallel(self, runs: Sequence[Run]) -> Iterable[Finished]:
        jobs = (
            joblib.delayed(train_and_measure)(self.train_fn, self.task, self._queries, run, self.keep_models)
            for run in runs
        )
        return in_parallel(jobs, self.backend, self.n_jobs) if runs else []

    def _record(self, store: ShardStore, finished: Finished) -> None:
        run = finished.run
        meta = {
            "subset": self.subsets.digest(run.subset) if run.subset >= 0 else "probe",
            "seconds": round(finished.seconds, 3),
            **self._code,
        }
        if finished.error is not None:
            attempt = 1 + len(failures(store, run))
            store.write(attempt_key(run, attempt), {}, {**meta, "error": finished.error})
            return
        tensors = {f"query/{name}": values for name, values in finished.measurements.items()}
        tensors |= {f"model/{name}": tensor for name, tensor in (finished.state or {}).items()}
        queries = {
            name: {"fingerprint": self._queries[name].fingerprint(), **plain_ids(self._queries[name])}
            for name in finished.measurements
        }
        store.write(run.key, tensors, {**meta, "queries": queries, "model": finished.model})

    def _measure_kept(self, name: str, runs: Sequence[Run]) -> None:
        examples, fingerprint = self._queries[name], self._queries[name].fingerprint()
        with self._writing() as store, progress_bar(name, len(runs), self.progress) as advance:
            for run in runs:
                state = kept_state(store.read(run.key))
                assert self.model_fn is not None
                values = remeasure(self.model_fn, state, self.task, examples, name)
                meta = {"fingerprint": fingerprint, **plain_ids(examples), **self._code}
                store.write(later_key(run, name), {f"query/{name}": values}, meta)
                advance(1)

    # Reading -----------------------------------------------------------------------------------------------------

    def _read(self, store: ShardStore, run: Run, name: str) -> Tensor:
        if not about_queries(store, run, name):
            known = sorted(store.meta(run.key)["queries"])
            raise UpweightError(
                f"no queries are called {name!r} here (but {known}) -> bank.measure(query, {name!r})"
            )
        key = later_key(run, name) if store.has(later_key(run, name)) else run.key
        return store.read(key)[f"query/{name}"]

    def _manifest(self) -> dict[str, Any]:
        return manifest_of(self.folder, self.task, self.n, self.keep_models, self.settings)

    @contextmanager
    def _reading(self) -> Iterator[ShardStore]:
        if not (self.folder / "manifest.json").exists():
            raise UpweightError(
                f"nothing is in {self.folder} yet -> bank.measure(query, name), then bank.run()"
            )
        yield ShardStore.open(self.folder, self._manifest(), read_only=True)

    @contextmanager
    def _writing(self) -> Iterator[ShardStore]:
        with ShardStore.open(self.folder, self._manifest()) as store:
            yield store

    def _check(self, store: ShardStore) -> None:
        check_subsets(store, self._plan, self.subsets)
        warn_of_changed_code(store, self._code)
