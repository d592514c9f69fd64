"""A bank of models retrained on subsets of the training data: the ground truth of attribution.

On disk the bank is a `ShardStore`: one shard for every finished (subset, seed), written by one process as the results
come in. Killing it loses at most the models that are being trained at that moment.
"""

from __future__ import annotations

import inspect
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
from upweight.errors import CacheMismatchError, UpweightError
from upweight.evaluate.checks import (
    check_inputs_matter,
    function_digest,
    warn_of_changed_code,
)
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.parallel import in_parallel
from upweight.evaluate.plan import Plan
from upweight.evaluate.records import BankReport, attempt_key, kept_state, later_key, plain_ids, run_key
from upweight.evaluate.runs import Finished, Run, remeasure, train_and_measure
from upweight.evaluate.subsets import Subsets, half_subsets
from upweight.progress import progress_bar
from upweight.store import ShardStore
from upweight.task import Task

__all__ = ["RetrainingBank"]

TrainFunction = Callable[..., Any]
ATTEMPTS = 2


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
        self.subsets = half_subsets(n, subsets) if isinstance(subsets, int) else subsets
        if self.subsets.n != n:
            raise UpweightError(
                f"the subsets are of {self.subsets.n} examples, but n={n} -> draw them for n={n}"
            )
        self.seeds = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UpweightError(
                f"seeds={seeds!r}, expected at least one and no repeats -> seeds=3 for example"
            )
        if any(self.subsets.labels) and "labels" not in inspect.signature(train_fn).parameters:
            raise UpweightError(
                "the subsets change labels, but train_fn takes no argument 'labels' -> def train_fn(indices, seed, "
                "labels=None), with labels a dict {position: label}"
            )
        self.folder, self.train_fn, self.task, self.n = Path(folder).expanduser(), train_fn, task, n
        self.keep_models, self.model_fn, self.settings = keep_models, model_fn, dict(settings or {})
        self.n_jobs = n_jobs if n_jobs is not None else 1 if backend == "loky" else -1
        self.backend, self.progress = backend, progress
        self._plan = Plan(self.subsets, self.seeds)
        self._queries: dict[str, Examples] = {}
        if (self.folder / "manifest.json").exists():
            with self._reading() as store:
                self._check_runs(store)

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
            self._check_query(store, name, examples)
            missing = [run for run in self._plan if store.has(run.key) and not self._has(store, run, name)]
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
            What was done, and which runs failed. A failed run (an exception, or a NaN) is tried once more.

        Raises:
            UpweightError: Nothing would be kept; every run failed; or train_fn ignores its indices.

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
            self._check_runs(store)
            for name, examples in self._queries.items():
                self._check_query(store, name, examples)
            waves = self._plan.waves()
            todo = [[run for run in wave if self._outstanding(store, run)] for wave in waves]
            with progress_bar("retraining", sum(map(len, todo)), self.progress) as advance:
                for number, wave in enumerate(todo):
                    for _ in range(ATTEMPTS):
                        wave = [run for run in wave if self._outstanding(store, run)]
                        for finished in self._in_parallel(wave):
                            self._record(store, finished)
                            trained += finished.error is None
                            if finished.error is None:
                                advance(1)
                    if number == 0:  # after the first few models, rather than after a night
                        check_inputs_matter(store, waves[0])
            failed = [
                (run.subset, run.seed, store.meta(attempt_key(run, ATTEMPTS))["error"])
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
                    f"all {planned} runs failed, {first} -> run train_fn by hand; use a new folder"
                )
            warnings.warn(
                f"{len(failed)} of {planned} runs failed twice and take part in nothing ({first})",
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
        ids: Sequence[int | str] | None = None
        seconds, outstanding = 0.0, 0
        with self._reading() as store:
            for run in self._plan:
                if not store.has(run.key):
                    outstanding += self._outstanding(store, run)
                    continue
                measured = self._read(store, run, name).double().numpy()
                seconds += store.meta(run.key)["seconds"]
                if values is None:
                    values = np.full((len(self.subsets), len(self.seeds), len(measured)), np.nan)
                    ids = self._about(store, run, name).get("ids")
                values[run.subset, self.seeds.index(run.seed)] = measured
        if outstanding or values is None:
            raise UpweightError(f"{outstanding} models are still to be trained -> bank.run()")
        info = {"bank": str(self.folder), "train_seconds": round(seconds, 1), **self.settings}
        task = self.task
        return Outcomes(
            self.subsets.masks,
            values,
            ids,
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

    def _outstanding(self, store: ShardStore, run: Run) -> bool:
        return not store.has(run.key) and not store.has(attempt_key(run, ATTEMPTS))

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
            "train_fn": function_digest(self.train_fn),
        }
        if finished.error is not None:
            attempt = 1 + store.has(attempt_key(run, 1))
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
                meta = {"fingerprint": fingerprint, **plain_ids(examples)}
                store.write(later_key(run, name), {f"query/{name}": values}, meta)
                advance(1)

    # Reading -----------------------------------------------------------------------------------------------------

    def _about(self, store: ShardStore, run: Run, name: str) -> dict[str, Any]:
        """Fingerprint and ids of the queries that a finished run measured under a name; empty if it did not."""
        if store.has(later_key(run, name)):
            return store.meta(later_key(run, name))
        return store.meta(run.key)["queries"].get(name, {})

    def _has(self, store: ShardStore, run: Run, name: str) -> bool:
        return bool(self._about(store, run, name))

    def _read(self, store: ShardStore, run: Run, name: str) -> Tensor:
        if not self._has(store, run, name):
            known = sorted(store.meta(run.key)["queries"])
            raise UpweightError(
                f"no queries are called {name!r} here (but {known}) -> bank.measure(query, {name!r})"
            )
        key = later_key(run, name) if store.has(later_key(run, name)) else run.key
        return store.read(key)[f"query/{name}"]

    def _manifest(self) -> dict[str, Any]:
        task = self.task
        return {
            "holds": "retraining bank",
            "n": self.n,
            "task": task.name,
            "measurement": str(getattr(task, "measurement", "function")),
            "higher_is_better": task.higher_is_better,
            "keep_models": self.keep_models,
            "settings": self.settings,
        }

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

    def _check_runs(self, store: ShardStore) -> None:
        """Refuse a folder whose models were trained on other subsets."""
        for run in self._plan:
            if store.has(run.key) and store.meta(run.key)["subset"] != self.subsets.digest(run.subset):
                name = self.subsets.names[run.subset]
                raise CacheMismatchError(
                    f"{self.folder} holds a model of another subset {run.subset} than {name!r} -> name another folder "
                    "(one folder serves more or fewer of the same subsets, but no others)"
                )
        warn_of_changed_code(store, self.train_fn)

    def _check_query(self, store: ShardStore, name: str, examples: Examples) -> None:
        fingerprint = examples.fingerprint()
        for run in self._plan:
            if not store.has(run.key):
                continue
            theirs = self._about(store, run, name).get("fingerprint")
            if theirs not in (None, fingerprint):
                raise CacheMismatchError(
                    f"{self.folder} measured other queries under the name {name!r} (fingerprint {theirs[:8]}, not "
                    f"{fingerprint[:8]}) -> give these another name, or the bank another folder"
                )
