"""Is the planner's route the fastest one? Every route of typical layers timed, the chosen one beside the best and
the worst.

    python benchmarks/contraction_routes.py

One row a layer shape and number of queries: seconds of every exact route that applies, which one the cost model
chose, and how much slower than the best it is. The cost model's rates are measured on this machine in a few
milliseconds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from upweight.gradients import Dense, Factored, Router, Sparse
from upweight.gradients.blocks import Block, Piece
from upweight.gradients.contraction import measured_rates

# name, positions, rows, columns, queries, training examples
MATRICES = [
    ("MLP 512x512", 1, 512, 512, 64, 512),
    ("MLP head 10x513", 1, 10, 513, 256, 2048),
    ("conv 32x144, 32x32", 1024, 32, 144, 16, 32),
    ("conv 128x1152, 4x4", 16, 128, 1152, 64, 64),
    ("attention 384x129, T=128", 128, 384, 129, 16, 32),
    ("mlp 512x129, T=16", 16, 512, 129, 64, 128),
    ("wide 2048x2049, T=4", 4, 2048, 2049, 8, 16),
]
TABLES = [
    ("embedding 256x128, T=128", 128, 256, 128, 16, 64),
    ("embedding 8192x64, T=32", 32, 8192, 64, 16, 64),
]


def main() -> int:
    """Time every route and print the table; 1 if the chosen route was ever the slowest by more than a tenth."""
    torch.manual_seed(0)
    rates = measured_rates("cpu", torch.float32)
    console = Console(width=150)
    console.print(
        f"{torch.get_num_threads()} threads; measured {rates.gemm / 1e9:.0f} GFLOP/s large products, "
        f"{rates.batched / 1e9:.0f} batched, {rates.bandwidth / 1e9:.0f} GB/s elementwise"
    )
    table = Table(
        "layer",
        "query",
        "n",
        "ghost ms",
        "dense ms",
        "stream ms",
        "sparse ms",
        "chosen",
        "chosen / best",
        "worst / best",
    )
    failures = 0
    for name, positions, rows, columns, queries, n in MATRICES:
        train = factored(n, positions, rows, columns)
        for kind, query in (
            ("factored", factored(queries, positions, rows, columns)),
            ("dense", Dense(torch.randn(queries, rows * columns))),
        ):
            failures += report(table, name, f"{queries} {kind}", query, train)
    for name, positions, rows, width, queries, n in TABLES:
        failures += report(
            table,
            name,
            f"{queries} sparse",
            sparse(queries, positions, rows, width),
            sparse(n, positions, rows, width),
        )
    console.print(table)
    return 1 if failures else 0


def report(table: Table, name: str, label: str, query: Block, train: Block) -> int:
    """Add one row; 1 if the choice is the worst route by accident."""
    options = Router().options(name, query, train)
    chosen = Router().route(name, query, train)
    times = {
        route: best_of(lambda r=route: Router(force=r).contract(name, query, train)) for route in options
    }
    best, worst = min(times.values()), max(times.values())
    cells = [f"{1e3 * times[r]:.2f}" if r in times else "" for r in ("ghost", "dense", "stream", "sparse")]
    table.add_row(
        name, label, str(len(train)), *cells, chosen, f"{times[chosen] / best:.2f}", f"{worst / best:.1f}"
    )
    return int(len(times) > 1 and times[chosen] >= worst and worst > 1.1 * best)


def best_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Least seconds of a few runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def factored(batch: int, positions: int, rows: int, columns: int) -> Factored:
    """Random factors."""
    return Factored((Piece(torch.randn(batch, positions, rows), torch.randn(batch, positions, columns)),))


def sparse(batch: int, positions: int, rows: int, width: int) -> Sparse:
    """Random look-ups."""
    return Sparse(
        torch.randint(rows, (batch, positions)), torch.randn(batch, positions, width), (rows, width)
    )


if __name__ == "__main__":
    sys.exit(main())
