"""EK-FAC influence, upweight against kronfluence: same weights, data, threads, damping; each in its own process.

    python benchmarks/ekfac_vs_kronfluence.py                       all three workloads
    python benchmarks/ekfac_vs_kronfluence.py mlp --repeat 3 --json out.json
    python benchmarks/ekfac_vs_kronfluence.py gpt --only kronfluence --peer-python OTHER_VENV/bin/python

Both use the empirical Fisher in float32 on the same Linear and Conv2d modules. Every run is a fresh interpreter; of
--repeat runs the least time of each phase counts. README.md beside this file says what is measured and how.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata

# No torch in this process: Linux counts the memory of the parent at the time of exec towards a child's peak.

HERE = Path(__file__).resolve().parent
WORKLOADS = ("mlp", "resnet9", "gpt")
RUNNERS = ("kronfluence", "upweight", "upweight-lean", "upweight-cache")
"""With the default memory budget (gradients stay in memory), with no more than the peer needs, with a cache."""


def spawn(kind: str, workload: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run one child process to its end and read its result."""
    keys = ("threads", "tolerance", "precision", "lean", "damping", "peer_fit_batch", "peer_train_batch")
    settings = {"workload": workload, **{key: getattr(args, key) for key in keys}}
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    # A checkout works without being installed; kronfluence's interpreter need not know upweight.
    paths = [str(HERE.parent / "src")] if kind.startswith("upweight") else []
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    python = args.peer_python if kind == "kronfluence" else sys.executable
    command = [python, str(HERE / "_runners.py"), kind, str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-25:])
        hint = (
            " -> pip install 'upweight[bench]', or --peer-python" if "No module named 'kronf" in tail else ""
        )
        raise SystemExit(f"{tail}\n{kind} failed on {workload} (exit {done.returncode}){hint}")
    return json.loads((folder / f"{kind}.json").read_text())


def fastest(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result out of several runs: the least time of each phase, and the greatest peak memory."""
    every = [run["phases"] for run in runs]
    phases = {
        name: {
            "seconds": min(phases[name]["seconds"] for phases in every),
            "cpu": min(phases[name]["cpu"] for phases in every),
            "peak_bytes": max(phases[name]["peak_bytes"] for phases in every),
        }
        for name in every[0]
    }
    whole = min(phases["fit"]["seconds"] + phases["score"]["seconds"] for phases in every)
    return {**runs[-1], "phases": phases, "whole": whole, "all_runs": every}


def agreement(ours: Path, theirs: Path) -> dict[str, float]:
    """Mean and least per-query Spearman, and relative Frobenius error, of two saved score matrices."""
    a, b = np.load(ours).astype(np.float64), np.load(theirs).astype(np.float64)
    ra, rb = (rankdata(scores, axis=1) - (scores.shape[1] + 1) / 2 for scores in (a, b))
    spearman = (ra * rb).sum(1) / np.sqrt((ra**2).sum(1) * (rb**2).sum(1))
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    return {
        "spearman": spearman.mean().item(),
        "spearman_least": spearman.min().item(),
        "error": error.item(),
    }


def measure(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare one workload, run each library on it, and compare the matrices."""
    prepared = spawn("prepare", name, folder, args)
    kinds = [kind for kind in RUNNERS if args.only is None or kind.startswith(args.only)]
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(
        args.repeat
    ):  # in turns, so that a busy moment of the machine does not hit one library only
        for kind in kinds:
            runs[kind].append(spawn(kind, name, folder, args))
    compared = {}
    if len(kinds) == len(RUNNERS):
        for kind in kinds[1:]:
            pairs = {
                p: (folder / f"{kind}.{p}.npy", folder / f"kronfluence.{p}.npy")
                for p in ("scores", "further")
            }
            compared[kind] = {part: agreement(*pair) for part, pair in pairs.items()}
    return {**prepared, "runs": {kind: fastest(found) for kind, found in runs.items()}, "agreement": compared}


def _seconds(value: float) -> str:
    return f"{value * 1e3:.1f} ms" if value < 0.1 else f"{value:.2f} s"


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one workload as a table."""
    info, bound, peer = result["workload"], result["bound"], result["runs"].get("kronfluence")
    table = Table(
        title=f"{name}: {info['title']}, {info['source']}; {info['queries']} queries x {info['train']:,} train; "
        f"{len(result['tracked'])} layers, {info['parameters']:,} parameters",
        title_justify="left",
    )
    table.add_column("")
    times = ("fit", "score", "whole job", "times faster", "16 more", "times faster")
    for heading in (*times, "peak MB", "at start", "x bound", "Spearman", "rel. error"):
        table.add_column(heading, justify="right")
    for kind, run in result["runs"].items():
        phases, against = run["phases"], result["agreement"].get(kind)
        further, versus = phases["further"]["seconds"], peer if kind != "kronfluence" else None
        table.add_row(
            f"{kind} {run['version']}",
            _seconds(phases["fit"]["seconds"]),
            _seconds(phases["score"]["seconds"]),
            _seconds(run["whole"]),
            f"{versus['whole'] / run['whole']:.1f}" if versus else "",
            _seconds(further),
            f"{versus['phases']['further']['seconds'] / further:.1f}" if versus else "",
            f"{phases['score']['peak_bytes'] / 1e6:.0f}",
            f"{phases['start']['peak_bytes'] / 1e6:.0f}",
            f"{run['whole'] / bound['seconds']:.2f}",
            f"{against['scores']['spearman']:.5f}" if against else "",
            f"{against['scores']['error']:.1e}" if against else "",
        )
    table.add_section()
    least, more = _seconds(bound["seconds"]), _seconds(bound["seconds_further"])
    table.add_row("lower bound, exact", "", "", least, "", more, "", "", "", "1.00")
    if bound["seconds_separable"] < 0.98 * bound["seconds"]:
        near = bound["seconds_separable"]
        share = f"{near / bound['seconds']:.2f}"
        table.add_row("lower bound, rank 4", "", "", _seconds(near), "", "", "", "", "", share)
    console.print(table)
    parts = ", ".join(f"{stage} {flops / 1e9:.3g}" for stage, flops in bound["flops"].items())
    console.print(f"Bound in GFLOP: {parts}; matrix products ran at {bound['gemm_rate'] / 1e9:.0f} GFLOP/s.")
    for kind, found in result["agreement"].items():
        worst, further = found["scores"]["spearman_least"], found["further"]
        console.print(
            f"{kind}: worst query Spearman {worst:.5f}; the 16 more: mean {further['spearman']:.5f}, "
            f"relative error {further['error']:.1e}."
        )
    console.print()


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", default="all", choices=[*WORKLOADS, "all"])
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="K", help="runs of each; the least time counts"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="T")
    parser.add_argument("--only", choices=["kronfluence", "upweight"], help="run one library only")
    parser.add_argument("--damping", type=float, default=0.0, help="instead of the workload's own number")
    parser.add_argument(
        "--tolerance", type=float, default=1e-3, help="upweight's, for approximate contraction"
    )
    parser.add_argument(
        "--precision",
        default="index",
        choices=["float32", "bf16", "int8", "index"],
        help="upweight's cache",
    )
    parser.add_argument(
        "--lean", default="", help="memory budget of upweight-lean, instead of the workload's"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has kronfluence")
    parser.add_argument("--peer-fit-batch", type=int, default=0, help="kronfluence's batch size for factors")
    parser.add_argument(
        "--peer-train-batch", type=int, default=0, help="kronfluence's training batch in scoring"
    )
    parser.add_argument("--folder", type=Path, help="keep workloads and scores here, and reuse the workloads")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in WORKLOADS if args.workload == "all" else (args.workload,):
            folder = (args.folder or Path(temporary)).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            results[name] = measure(name, args, folder)
            show(console, name, results[name])
            if args.json:  # after each workload, so that a run that is stopped keeps what it has
                args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
