"""Every solver and every structured curvature against the dense damped inverse, on two small trained networks.

    python benchmarks/solver_ladder.py                            an MLP and a CNN, float32, damping 1e-3
    python benchmarks/solver_ladder.py cnn --float64 --damping 1e-4 --json out.json
    python benchmarks/solver_ladder.py --markdown out.json more.json      the tables of docs/guide/which_method.md

Truth: the Gauss-Newton matrix of all training examples as a dense float64 matrix, made by torch.func, with the
penalty of the training objective and the damping, inverted by Cholesky. Every row is a fresh interpreter; seconds are
the processor's, over all threads. A second table says how many iterations conjugate gradients take to a true residual
of 1e-6, by preconditioner and damping, in float64.
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

from rich.console import Console
from rich.table import Table

# No torch in this process: Linux counts the memory of the parent at the time of exec towards a child's peak.

HERE = Path(__file__).resolve().parent
MODELS = ("mlp", "cnn")
ROWS = (
    *("direct", "dual", "block CG, sketch", "block CG", "block CG, diagonal", "block CG, EK-FAC"),
    *("CG, one by one", "ASTRA", "Nystrom, 400", "Nystrom, 100", "Arnoldi, 100", "LiSSA, 1000 of 100"),
    *("LiSSA, 200 terms", "EK-FAC", "K-FAC", "diagonal", "DataInf", "identity"),
)
DAMPINGS = (1e-2, 1e-3, 1e-4)
"""Of the second table."""


def spawn(work: str, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one child process to its end and read its result."""
    threads = str(settings["threads"])
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    # A checkout works without being installed.
    env["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")])
    )
    command = [sys.executable, str(HERE / "_ladder.py"), work, str(folder), json.dumps(settings)]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.strip().splitlines()[-25:])
        raise SystemExit(f"{tail}\n{work} failed on {settings['model']} (exit {done.returncode})")
    return json.loads((folder / "result.json").read_text())


def measure(model: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one model, find the truth, run every row."""
    dtype = "float64" if args.float64 else "float32"
    settings = {"model": model, "threads": args.threads, "dtype": dtype, "damping": args.damping}
    known = folder / f"prepared.{args.damping:g}.json"
    if not known.exists():
        known.write_text(json.dumps(spawn("prepare", folder, {**settings, "dampings": [args.damping]})))
    info = json.loads(known.read_text())
    rows = {}
    for row in args.rows or ROWS:
        rows[row] = spawn("row", folder, {**settings, "row": row})
    steps = {} if args.rows else spawn("iterations", folder, {**settings, "dampings": list(DAMPINGS)})
    return {"model": info, "dtype": dtype, "damping": args.damping, "rows": rows, "iterations": steps}


def show(console: Console, result: dict[str, Any]) -> None:
    """Print one model as two tables."""
    info = result["model"]
    table = Table(
        title=f"{info['title']}, {info['parameters']:,} parameters, digits, {info['queries']} queries x "
        f"{info['train']:,} train; {result['dtype']}, damping {result['damping']:g}, l2 {info['l2']:g}\n"
        f"(loss {info['loss']:.3f}, gradient {info['gradient']:.0e}, accuracy {info['accuracy']:.1%})",
        title_justify="left",
    )
    table.add_column("")
    for heading in (
        "rel. error",
        "Spearman",
        "products",
        "iterations",
        "residual",
        "fit",
        "score",
        "peak + MB",
    ):
        table.add_column(heading, justify="right")
    for name, row in result["rows"].items():
        if "refused" in row:
            table.add_row(name, f"refused: {row['refused'][:70]}")
            continue
        table.add_row(
            name,
            "" if row["error"] is None else f"{row['error']:.1e}",
            f"{row['spearman']:.4f}",
            f"{row['products']:,.0f}" if row["products"] else "",
            str(row["iterations"] or ""),
            "" if row["residual"] is None else f"{row['residual']:.0e}" + ("" if row["converged"] else " !"),
            f"{row['fit']:.2f} s",
            f"{row['score']:.2f} s",
            f"{(row['peak_bytes'] - row['start_bytes']) / 1e6:.0f}",
            end_section=name == "LiSSA, 200 terms",
        )
    console.print(table)
    if any(row.get("warnings") for row in result["rows"].values()):
        console.print("! not converged to what the solver promises, and the solver warned.")
    if result["iterations"]:
        steps = Table(
            title=f"{info['title']}: iterations (products) to a true residual of 1e-6, "
            f"float64, {info['queries']} queries",
            title_justify="left",
        )
        steps.add_column("damping")
        for damping in DAMPINGS:
            steps.add_column(f"{damping:g}", justify="right")
        for name, found in result["iterations"].items():
            cells = [
                f"{f['iterations']} ({f['products']:,.0f})" + ("" if f["converged"] else " !")
                for f in found.values()
            ]
            steps.add_row(name, *cells)
        console.print(steps)
    console.print()


# ---------------------------------------------------------------------------------------------- tables for the docs

NAMES = {
    "block CG, sketch": "**`cg`, the default**",
    "block CG": "`cg` without preconditioner",
    "block CG, diagonal": "`cg`, diagonal",
    "block CG, EK-FAC": "`cg`, EK-FAC",
    "CG, one by one": "`cg`, not in blocks, without",
    "Nystrom, 400": "`nystrom`, rank 400",
    "Nystrom, 100": "`nystrom`, rank 100",
    "Arnoldi, 100": "`arnoldi`, rank 100",
    "LiSSA, 1000 of 100": "`lissa`, 1,000 terms of 100 examples",
    "LiSSA, 200 terms": "`lissa`, 200 terms of all",
    **{name: f"`{name.lower()}`" for name in ("direct", "dual", "ASTRA", "diagonal", "identity")},
    **{"EK-FAC": "`ekfac`", "K-FAC": "`kfac`"},
}
STEPS = {
    "CG, one by one": "plain",
    "block CG": "block",
    "block CG, diagonal": "block, diagonal",
    "block CG, EK-FAC": "block, EK-FAC",
    "CG one by one, sketch": "plain, sketch",
    "block CG, sketch": "**block, sketch**: the default",
}


def merged(files: list[Path]) -> dict[str, Any]:
    """What several runs found, the last one that has a row or the second table of a model counting."""
    out: dict[str, Any] = {}
    for file in files:
        for model, found in json.loads(file.read_text()).items():
            known = out.setdefault(model, {"rows": {}, "iterations": {}})
            known["model"] = found["model"]
            known["rows"] |= found["rows"]
            known["iterations"] = found["iterations"] or known["iterations"]
    return out


def markdown(results: dict[str, Any]) -> str:
    """Both tables, of all models side by side."""
    heads = {model: found["model"]["title"].split()[0] for model, found in results.items()}
    columns = [f"{head}: error | rank | products | seconds | peak MB" for head in heads.values()]
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (5 * len(columns))]
    for row in ROWS:
        cells = [cell for found in results.values() for cell in _cells(found["rows"][row])]
        lines.append(f"| {NAMES.get(row, row)} | " + " | ".join(cells) + " |")
    dampings = [f"{damping:g}" for damping in DAMPINGS]
    titles = [f"{head}, damping {damping}" for head in heads.values() for damping in dampings]
    lines += ["", "| | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
    for step, label in STEPS.items():
        found = [results[model]["iterations"][step][damping] for model in heads for damping in dampings]
        cells = [
            f"{f['iterations']} ({f['products']:,.0f})" + ("" if f["converged"] else " !") for f in found
        ]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    """Error, rank correlation, products, seconds and memory of one row."""
    if "refused" in row:
        return ["refused", "", "", "", ""]
    error = ""
    if row["error"] is not None:
        error = f"{row['error']:.0e}".replace("e-0", "e-") if row["error"] < 0.01 else f"{row['error']:.2g}"
    return [
        error + (" !" if row["converged"] is False else ""),
        f"{row['spearman']:.3f}",
        f"{row['products']:,.0f}" if row["products"] else "",
        f"{row['fit'] + row['score']:.2g}",
        f"{(row['peak_bytes'] - row['start_bytes']) / 1e6:.0f}",
    ]


def main() -> None:
    """Parse the command line, run, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="all", choices=[*MODELS, "all"])
    parser.add_argument("--damping", type=float, default=1e-3)
    parser.add_argument(
        "--float64", action="store_true", help="models and data in float64 instead of float32"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, metavar="ROW", help="only these, and no second table"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="T")
    parser.add_argument(
        "--folder", type=Path, help="keep the trained models and the truth here, and reuse them"
    )
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="JSON", help="measure nothing; tables of these files"
    )
    args = parser.parse_args()
    if args.markdown:
        print(markdown(merged(args.markdown)))
        return
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    results = {}
    for model in MODELS if args.model == "all" else (args.model,):
        with tempfile.TemporaryDirectory() as temporary:
            folder = (args.folder or Path(temporary)).resolve() / model
            folder.mkdir(parents=True, exist_ok=True)
            results[model] = measure(model, args, folder)
        show(console, results[model])
        if args.json:  # after each model, so that a run that is stopped keeps what it has
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
