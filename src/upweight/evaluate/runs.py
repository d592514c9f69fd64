"""One retraining: train on a subset with a seed, measure the queries. Runs in a worker process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import joblib
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from upweight._random import preserved, reseed
from upweight._trees import map_tensors
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.task import Task

__all__ = ["Finished", "NoModelError", "Run", "measure_model", "remeasure", "train_and_measure"]

BATCH = 512


class NoModelError(UpweightError):
    """A train_fn that forgot to return its model."""


@dataclass(frozen=True)
class Run:
    """One model to train: which subset, which seed."""

    subset: int
    seed: int
    key: str
    indices: np.ndarray
    labels: Mapping[int, Any]


@dataclass(frozen=True)
class Finished:
    """What came of a run: measurements in loss orientation by query name, or why there are none.

    ``model`` is a hash that tells models apart, None of one that cannot be hashed.
    """

    run: Run
    measurements: dict[str, Tensor] = field(default_factory=dict)
    model: str | None = None
    state: dict[str, Tensor] | None = None
    seconds: float = 0.0
    error: str | None = None


def train_and_measure(
    train_fn: Callable[..., Any], task: Task, queries: Mapping[str, Examples], run: Run, keep_model: bool
) -> Finished:
    """Train one model on one thread and measure it; whatever goes wrong is in the result, not raised.

    Raises:
        NoModelError: train_fn returned nothing, which no other run will do better.
    """
    started = time.perf_counter()
    try:
        # Global generators start from the seed too, for a train_fn that draws from them.
        with one_thread(), preserved():
            reseed(run.seed)
            changed = {"labels": dict(run.labels)} if run.labels else {}
            model = train_fn(run.indices, run.seed, **changed)
            if model is None:
                raise NoModelError(
                    "train_fn returned None, expected the trained model -> end it with return model"
                )
            measurements = {name: measure_model(task, model, query, name) for name, query in queries.items()}
        fingerprint = _hash(model)
        state = _state(model) if keep_model else None
    except NoModelError:
        raise
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {str(error)[:500]} ({where.name}, line {where.lineno})"
        return Finished(run, seconds=time.perf_counter() - started, error=text.replace("\n", " "))
    return Finished(run, measurements, fingerprint, state, time.perf_counter() - started)


def remeasure(
    model_fn: Callable[[], nn.Module], state: Mapping[str, Tensor], task: Task, query: Examples, name: str
) -> Tensor:
    """Measure other queries with a model that was kept."""
    with one_thread(), preserved():
        model = model_fn()
        model.load_state_dict(dict(state))
        return measure_model(task, model, query, name)


def measure_model(task: Task, model: Any, query: Examples, name: str) -> Tensor:
    """Measurements [query] in loss orientation, on the CPU, of a model in eval mode; finite ones, or an error."""
    device = torch.device("cpu")
    if isinstance(model, nn.Module):
        model.eval()
        device = next((p.device for p in model.parameters()), device)
    parts = []
    with torch.no_grad():
        for rows in query.batches(query.preferred_batch_size or BATCH):
            batch = map_tensors(rows.batch, lambda t: t.to(device))
            values = torch.as_tensor(task.measure(model, batch)).detach().cpu()
            if tuple(values.shape) != (len(rows),):
                raise UpweightError(
                    f"the measurement of {len(rows)} queries has shape {tuple(values.shape)}, expected "
                    f"[{len(rows)}] -> return one number per query"
                )
            parts.append(task.orientation * values)
    measured = torch.cat(parts)
    wrong = ~measured.isfinite()
    if wrong.any():
        first = query.ids[int(wrong.nonzero()[0, 0])]
        raise UpweightError(
            f"{int(wrong.sum())} of {len(measured)} measurements of {name!r} are NaN or infinite (first: query "
            f"{first!r}) -> the training diverged?"
        )
    return measured


def _state(model: Any) -> dict[str, Tensor]:
    if not isinstance(model, nn.Module):
        raise UpweightError(
            f"keep_models=True needs torch modules, train_fn returned {type(model).__name__} -> keep_models=False"
        )
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _hash(model: Any) -> str | None:
    """What tells one model from another; None of one that cannot be hashed."""
    if isinstance(model, nn.Module):
        return model_fingerprint(model)
    try:
        return joblib.hash(model)
    except Exception:  # whatever a foreign class does when it is taken apart: such models are not compared
        return None


@contextmanager
def one_thread():
    """One thread for torch and for BLAS, so that workers do not fight over the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)
