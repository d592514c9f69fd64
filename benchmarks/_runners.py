"""What runs in a process of its own: prepare a workload, or fit and score with one library and measure it.

    python benchmarks/_runners.py prepare|kronfluence|upweight|upweight-lean|upweight-cache FOLDER SETTINGS_AS_JSON

Started by ekfac_vs_kronfluence.py. The result is FOLDER/KIND.json, and the scores are FOLDER/KIND.scores.npy and
FOLDER/KIND.further.npy, as predicted changes on removal.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _workloads import Workload, load, per_example_loss, prepare
from torch import Tensor


class Phases:
    """Wall and CPU seconds of each phase, and the peak memory of the process at its end."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def mark(self, name: str, work: Callable[[], Any] = lambda: None) -> Any:
        """Run `work`, measure it, and return what it returns."""
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        result = work()
        seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes on macOS and KiB elsewhere
        self.rows[name] = {"seconds": seconds, "cpu": cpu, "peak_bytes": after.ru_maxrss * unit}
        return result


def run_kronfluence(
    workload: Workload, folder: Path, settings: dict, phases: Phases
) -> tuple[Tensor, Tensor, dict]:
    """Fit, score, and score 16 further queries with kronfluence."""
    from importlib.metadata import version

    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from kronfluence.utils.dataset import DataLoaderKwargs
    from torch.utils.data import TensorDataset

    class PeerTask(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            return per_example_loss(model, batch).sum()

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return per_example_loss(model, batch).sum()

        def get_influence_tracked_modules(self) -> list[str]:
            return workload.tracked

    class Rows(TensorDataset):
        def __getitems__(self, rows: list[int]) -> tuple[Tensor, ...]:
            index = torch.tensor(rows)  # a whole batch at once, to spare it the collation of single rows
            return tuple(tensor[index] for tensor in self.tensors)

    spec, task = workload.spec, PeerTask()
    fit_batch = settings["peer_fit_batch"] or spec.peer_fit_batch
    train_batch = settings["peer_train_batch"] or spec.peer_train_batch
    train, query, further = Rows(*workload.train), Rows(*workload.query), Rows(*workload.further)
    factor_args = FactorArguments(strategy="ekfac", use_empirical_fisher=True, has_shared_parameters=False)
    score_args = ScoreArguments(damping_factor=settings["damping"] or spec.damping)
    model = prepare_model(workload.model, task)
    analyzer = Analyzer("run", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder / "peer"))
    analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=lambda batch: batch))

    def fit() -> None:
        analyzer.fit_all_factors("f", train, per_device_batch_size=fit_batch, factor_args=factor_args)

    def score(name: str, data: Rows) -> None:
        analyzer.compute_pairwise_scores(
            name,
            "f",
            data,
            train,
            # All queries in one batch: a second one would cost another pass over the training data.
            per_device_query_batch_size=len(data),
            per_device_train_batch_size=train_batch,
            score_args=score_args,
        )

    phases.mark("start")
    phases.mark("fit", fit)
    phases.mark("score", lambda: score("first", query))
    phases.mark("further", lambda: score("second", further))
    scores, more = (analyzer.load_pairwise_scores(name)["all_modules"] for name in ("first", "second"))
    factors = analyzer.load_lambda_matrices("f")
    counts = factors["num_lambda_processed"]
    means = {name: (sums / counts[name]).mean().item() for name, sums in factors["lambda_matrix"].items()}
    extra = {"version": version("kronfluence"), "lambda_means": means, "batches": [fit_batch, train_batch]}
    # Its scores are plain products with the inverse; the predicted change on removal has a 1/n inside.
    return scores / spec.train, more / spec.train, extra


def run_upweight(
    workload: Workload, folder: Path | None, settings: dict, phases: Phases, memory: str = "auto"
) -> tuple[Tensor, Tensor, dict]:
    """Fit, score, and score 16 further queries with upweight; a cache goes to `folder` if there is one."""
    import upweight as uw

    task = uw.Task.from_functions(per_example_loss) if workload.name == "gpt" else uw.Classification()
    tracked = set(workload.tracked)
    method = uw.Influence(
        workload.model,
        task,
        curvature="ekfac",
        fisher="empirical",
        damping=settings["damping"] or workload.spec.damping,
        parameters=lambda name: name.rpartition(".")[0] in tracked,
        tolerance=settings["tolerance"],
        memory=memory,
        progress=False,
    )
    cache = None if folder is None else uw.Cache(folder / "cache", precision=settings["precision"])
    phases.mark("start")
    phases.mark("fit", lambda: method.fit(workload.train, cache=cache))
    scores = phases.mark("score", lambda: method.attribute(workload.query))
    more = phases.mark("further", lambda: method.attribute(workload.further))
    return scores.values, more.values, {"version": uw.__version__, "info": scores.info}


def main() -> None:
    """Do what the command line says and write the result."""
    kind, folder, settings = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    if kind == "prepare":
        from _roofline import bound

        if not (folder / "workload.json").exists():
            prepare(settings["workload"], folder)
        workload = load(folder)
        result = {"workload": workload.info, "tracked": workload.tracked, "bound": bound(workload)}
    else:
        workload, phases = load(folder), Phases()
        with tempfile.TemporaryDirectory(dir=folder) as name:
            scratch = Path(name)
            if kind == "kronfluence":
                scores, more, extra = run_kronfluence(workload, scratch, settings, phases)
            else:
                cached = scratch if kind == "upweight-cache" else None
                lean = settings["lean"] or workload.spec.lean
                memory = lean if kind == "upweight-lean" else "auto"
                scores, more, extra = run_upweight(workload, cached, settings, phases, memory)
        import numpy as np  # after the measurement

        np.save(folder / f"{kind}.scores.npy", scores.float().numpy())
        np.save(folder / f"{kind}.further.npy", more.float().numpy())
        result = {"phases": phases.rows, "torch": torch.__version__, **extra}
    (folder / f"{kind}.json").write_text(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
