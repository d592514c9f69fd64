"""The same influence by dattri, captum, pyDVL and upweight: time, peak memory, error against a dense float64 truth.

    python benchmarks/solvers_vs_peers.py small --peer-python OTHER_VENV/bin/python
    python benchmarks/solvers_vs_peers.py mlp --limit 100 --peer-python OTHER_VENV/bin/python
    python benchmarks/solvers_vs_peers.py small --only pydvl --only upweight:ggn --json out.json

`small` is an MLP of 3,010 parameters, where every operator (Hessian, Gauss-Newton, empirical Fisher, DataInf) has
a dense truth; `mlp` is 64-256-128-10, 50,826 parameters, 360 queries at once.

To time: stop everything else on the machine, leave --threads at 2 (or the number of cores), and run both workloads with
--repeat 3 --json FILE, which takes about ten minutes for `small` and at most `limit x rows x 3` for `mlp`. Every method
runs in a fresh interpreter, in turns; the least time and the greatest memory of each count. The peers go into a virtual
environment of their own, for their version pins exclude each other's:

    pip install torch safetensors scikit-learn scipy && pip install --no-deps captum==0.9.0 dattri==0.3.0 pyDVL==0.10.0
    pip install matplotlib tqdm pyyaml distributed zarr pandas pyDeprecate more-itertools cloudpickle

A method that fails, needs more than --memory-limit or does not finish within --limit seconds is shown with its error.
README.md beside this file says what is compared with what.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ekfac_vs_kronfluence import agreement
from rich.console import Console
from rich.table import Table

# No torch in this process: Linux counts the memory of the parent at the time of exec towards a child's peak.

HERE = Path(__file__).resolve().parent
DAMPING = {"small": 3e-2, "mlp": 1e-3}
ROWS = {
    "hessian": [
        "dattri:cg",
        "dattri:lissa",
        "dattri:arnoldi",
        "captum:arnoldi",
        "captum:naive",
        "pydvl:direct",
        "pydvl:cg",
        "pydvl:lissa",
        "pydvl:arnoldi",
        "upweight:hessian-direct",
        "upweight:hessian-cg",
        "upweight:hessian-lissa",
        "upweight:hessian-arnoldi",
    ],
    "fisher": [
        "pydvl:direct-fisher",
        "pydvl:cg-fisher",
        "pydvl:nystrom-fisher",
        "upweight:fisher-direct",
        "upweight:fisher-cg",
        "upweight:fisher-nystrom",
        "upweight:fisher-dual",
    ],
    "datainf": ["dattri:datainf", "upweight:datainf"],
    "ggn": [
        "pydvl:ekfac",
        "upweight:ekfac",
        "upweight:ggn-direct",
        "upweight:ggn-cg",
        "upweight:ggn-lissa",
        "upweight:ggn-arnoldi",
        "upweight:ggn-nystrom",
        "upweight:ggn-dual",
        "upweight:ggn-astra",
    ],
}
"""Rows by the operator whose dense inverse is their truth. For EK-FAC, which approximates the Gauss-Newton matrix, the
error is that of the approximation."""
TITLES = {
    "hessian": "Hessian",
    "fisher": "empirical Fisher (what pyDVL calls Gauss-Newton)",
    "datainf": "DataInf, one damping for all layers",
    "ggn": "Gauss-Newton matrix",
}


def spawn(row: str, folder: Path, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Run one child to its end, or until --limit seconds after its imports, and read its result."""
    ours = row == "prepare" or row.startswith("upweight")
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "MKL_NUM_THREADS": str(args.threads)}
    paths = [str(HERE.parent / "src")] if ours else []
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [*paths, os.environ.get("PYTHONPATH")]))
    python = sys.executable if ours else args.peer_python
    command = [python, str(HERE / "_peers.py"), row, str(folder), json.dumps(settings)]
    started, result = folder / f"{row}.started", folder / f"{row}.json"
    started.unlink(missing_ok=True)
    result.unlink(missing_ok=True)
    with (folder / f"{row}.log").open("w+") as log:
        child = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        began = None
        while child.poll() is None:
            time.sleep(0.05)
            if began is None and started.exists():
                began = time.monotonic()
            if began is not None and time.monotonic() - began > args.limit:
                child.kill()
                child.wait()
                return {"status": f"not finished in {args.limit:g} s"}
        log.seek(0)
        lines = log.read().strip().splitlines() or ["no message"]
    if child.returncode:
        if row == "prepare":
            raise SystemExit("\n".join(lines[-25:]))
        cause = lines[-1].strip() if child.returncode > 0 else f"killed by signal {-child.returncode}"
        return {"status": f"failed: {cause[:300]}", "log": lines[-25:]}
    return {"status": "ok", **json.loads(result.read_text())}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The least time and the greatest memory of several runs of one row; a run that failed stands for all."""
    for found in runs:
        if found["status"] != "ok":
            return found
    scores = [found["phases"]["score"] for found in runs]
    measured = {
        "seconds": min(s["seconds"] for s in scores),
        "cpu": min(s["cpu"] for s in scores),
        "peak_bytes": max(s["peak_bytes"] for s in scores),
        "start_bytes": runs[-1]["phases"]["start"]["peak_bytes"],
    }
    return {**runs[-1], **measured, "all_runs": scores}


def measure(name: str, folder: Path, args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Prepare a workload, run every row on it in turns, and compare with the truth."""
    damping = args.damping or DAMPING[name]
    settings = {
        "workload": name,
        "damping": damping,
        "threads": args.threads,
        "memory_limit": int(args.memory_limit * 2**30),
        "queries_at_once": 100
        if name == "small"
        else 60,  # dattri's, of which every product keeps activations
        "pydvl_batch": 1000 if name == "small" else 479,  # a divisor of n: it averages the batches' means
    }
    prepared = spawn("prepare", folder, settings, args)
    settings["lissa_scale"] = 2 * prepared["known"]["hessian_top"] + damping
    chosen = [
        row for rows in ROWS.values() for row in rows if not args.only or row.startswith(tuple(args.only))
    ]
    runs: dict[str, list[dict[str, Any]]] = {row: [] for row in chosen}
    for _ in range(args.repeat):
        for row in chosen:
            if any(found["status"] != "ok" for found in runs[row]):
                continue  # what failed once is not run again
            console.print(f"[dim]{name} {row}[/dim]", highlight=False)
            runs[row].append(spawn(row, folder, settings, args))
    found = {row: best(results) for row, results in runs.items()}
    for operator, rows in ROWS.items():
        for row in rows:
            truth = folder / (f"truth.{operator}.npy" if name == "small" else "upweight:ggn-dual.npy")
            comparable = name == "small" or (
                operator == "ggn" and found.get("upweight:ggn-dual", {}).get("seconds")
            )
            if row in found and found[row]["status"] == "ok" and comparable and truth.exists():
                found[row]["against_truth"] = agreement(folder / f"{row}.npy", truth)
    return {**prepared, "settings": settings, "limit": args.limit, "rows": found}


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    """Print one workload as a table."""
    info, known = result["workload"], result["known"]
    reference = "dense float64 truth" if name == "small" else "our dual (no dense matrix fits)"
    table = Table(
        title=f"{name}: {info['title']}, {info['source']}; {info['queries']} queries x {info['train']:,} train; "
        f"{info['parameters']:,} parameters; damping {result['settings']['damping']:g}; errors against {reference}",
        title_justify="left",
    )
    table.add_column("operator / method")
    for heading in (
        "seconds",
        "CPU s",
        "peak MB",
        "at start",
        "rel. error",
        "Spearman",
        "residual",
        "iterations",
    ):
        table.add_column(heading, justify="right")
    for operator, rows in ROWS.items():
        rows = [row for row in rows if row in result["rows"]]
        if not rows:
            continue
        spectrum = ", ".join(
            f"{end} eigenvalue {known[f'{operator}_{end}']:.2g}"
            for end in ("least", "top")
            if f"{operator}_{end}" in known
        )
        table.add_row(f"[bold]{TITLES[operator]}[/bold]" + (f" ({spectrum})" if spectrum else ""))
        for row in rows:
            table.add_row(*_cells(row, result["rows"][row]))
        table.add_section()
    console.print(table)
    for row, found in result["rows"].items():
        if found["status"] != "ok":
            console.print(f"{row}: {found['status']}", markup=False)
    console.print()


def _cells(row: str, found: dict[str, Any]) -> list[str]:
    """One line of the table."""
    label = f"  {row.replace(':', ' ', 1).replace('-', ' ', 1)}"
    if found["status"] != "ok":
        return [label, found["status"].partition(":")[0]]
    compared, solve = found.get("against_truth"), found.get("solve") or {}
    return [
        label,
        f"{found['seconds']:.2f}",
        f"{found['cpu']:.2f}",
        f"{found['peak_bytes'] / 1e6:.0f}",
        f"{found['start_bytes'] / 1e6:.0f}",
        f"{compared['error']:.1e}" if compared else "",
        f"{compared['spearman']:.4f}" if compared else "",
        f"{solve['residual_max']:.1e}" if "residual_max" in solve else "",
        f"{solve['iterations']}" if solve.get("iterations") else "",
    ]


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", nargs="?", default="all", choices=[*DAMPING, "all"])
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--repeat", type=int, default=1, metavar="K", help="runs of each; the least time counts"
    )
    parser.add_argument("--threads", type=int, default=2, metavar="T")
    parser.add_argument(
        "--limit", type=float, default=100.0, metavar="SECONDS", help="for each method, after imports"
    )
    parser.add_argument(
        "--memory-limit", type=float, default=12.0, metavar="GIB", help="for each method; 0 for none"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="PREFIX",
        help="rows that begin so: pydvl, upweight:ggn, ... (repeatable)",
    )
    parser.add_argument("--damping", type=float, default=0.0, help="instead of the workload's own number")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers")
    parser.add_argument(
        "--folder", type=Path, help="keep models, truths and scores here, and reuse the models"
    )
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in DAMPING if args.workload == "all" else (args.workload,):
            folder = (args.folder or Path(temporary)).resolve() / name
            folder.mkdir(parents=True, exist_ok=True)
            results[name] = measure(name, folder, args, console)
            show(console, name, results[name])
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
