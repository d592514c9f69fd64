"""Jobs in this process, in others on this machine, or on a cluster: whatever joblib calls a backend."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool

from upweight.errors import UpweightError

__all__ = ["in_parallel"]


def in_parallel(jobs: Iterable[Any], backend: str, n_jobs: int) -> Iterator[Any]:
    """Results as they come in, one by one, in any order.

    Args:
        jobs: `joblib.delayed` calls.
        backend: "loky", "dask" (with a `distributed.Client` open), "ray", or another that joblib knows.
        n_jobs: At a time; -1 for as many as there is room for.
    """
    if backend == "ray":
        from ray.util.joblib import register_ray  # type: ignore[import-not-found]

        register_ray()
    limit = {"inner_max_num_threads": 1} if backend == "loky" and n_jobs != 1 else {}
    try:
        with joblib.parallel_config(backend, n_jobs=n_jobs, **limit):
            # One job a batch: what is finished comes back at once, and is safe.
            parallel = joblib.Parallel(return_as="generator_unordered", batch_size=1)  # pyright: ignore[reportArgumentType]
        yield from parallel(jobs)
    except BrokenProcessPool as error:
        raise UpweightError(
            "a worker process died (out of memory?) -> use fewer n_jobs and run again: finished models are kept"
        ) from error
