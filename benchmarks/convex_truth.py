"""Convex ground truth: predicted effects of removals against really refitting, exactly, in float64.

    python benchmarks/convex_truth.py [--out FOLDER] [--json FILE] [--quick]

Three tables. Leave-one-out and a group of 5 % on the digits (softmax regression, 1,437 images); then the regime of many
parameters and weak regularisation, n of the order of d, where first-order influence falls short: real change against
predicted change for influence, rescaled influence (RIF) and Newton, with the slopes. `--out` also draws them
(needs matplotlib).

Refits go to a gradient of 1e-13 and keep dividing the sum of losses by n.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from refits import Softmax  # the refits that the tests use

import upweight as uw

TINY = 1e-10
"""Enough damping for the direction that a softmax leaves free: the same constant on all intercepts."""
ESTIMATES = {"first_order": "influence", "rescaled": "RIF", "newton": "Newton"}


@dataclass(frozen=True)
class Problem:
    """A fitted regression and its queries."""

    name: str
    fit: Softmax
    theta: Tensor
    X: Tensor
    y: Tensor

    @staticmethod
    def of(name: str, X: Tensor, y: Tensor, Xq: Tensor, yq: Tensor, l2: float) -> Problem:
        fit = Softmax(X, y, l2)
        return Problem(name, fit, fit.fit(), Xq, yq)

    def influence(self, correction: str | None = None) -> uw.Influence:
        model = nn.Linear(self.theta.shape[1] - 1, len(self.theta)).double()
        with torch.no_grad():
            model.weight.copy_(self.theta[:, :-1])
            model.bias.copy_(self.theta[:, -1])
        binary = self.fit.outputs == 1
        task = uw.BinaryClassification() if binary else uw.Classification()
        options: dict[str, Any] = {"damping": 0.0 if binary else TINY, "l2": {"weight": self.fit.l2}}
        method = uw.Influence(model, task, curvature="ggn", solver="direct", correction=correction, **options)
        return method.fit((self.fit.X[:, :-1].contiguous(), self.fit.y))

    def real(self, groups: list[list[int]], newton: bool) -> Tensor:
        """Real changes of the query losses [group, query]."""
        weights = torch.ones(len(groups), self.fit.n, dtype=torch.float64)
        for row, group in zip(weights, groups, strict=True):
            row[group] = 0
        refits = self.fit.refit(self.theta, weights, newton=newton)
        return self.fit.losses(refits, self.X, self.y) - self.fit.losses(self.theta, self.X, self.y)


@dataclass(frozen=True)
class Agreement:
    """Predicted against real.

    Attributes:
        slope: of the real change on the predicted one, through the origin: 1 is right, above 1 says too little.
        pearson: correlation.
        error: relative root mean square error.
    """

    slope: float
    pearson: float
    error: float

    @staticmethod
    def of(predicted: Tensor, real: Tensor) -> Agreement:
        p, r = predicted.flatten(), real.flatten()
        return Agreement(
            float(p @ r / (p @ p)), float(np.corrcoef(p, r)[0, 1]), float((p - r).norm() / r.norm())
        )


def digits(l2: float, queries: int = 60) -> Problem:
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    X, y = torch.from_numpy(data.data / 16)[order], torch.from_numpy(data.target).long()[order]
    end = 1437 + queries
    return Problem.of(f"digits, l2 {l2:g}", X[:1437], y[:1437], X[1437:end], y[1437:end], l2)


def high_dimension(n: int, d: int, l2: float, queries: int = 100) -> Problem:
    """A logistic regression on Gaussian inputs, with labels from a logistic model of strength 2."""
    generator = torch.Generator().manual_seed(n + d)
    X = torch.randn(n + queries, d, generator=generator, dtype=torch.float64)
    direction = torch.randn(d, generator=generator, dtype=torch.float64)
    logits = 2 * X @ (direction / direction.norm())
    y = (torch.rand(n + queries, generator=generator) < logits.sigmoid()).long()
    return Problem.of(f"n = {n}, d = {d}, l2 {l2:g}", X[:n], y[:n], X[n:], y[n:], l2)


def leave_one_out(problem: Problem, removed: int, newton: bool = False) -> dict[str, tuple[Tensor, Tensor]]:
    """{estimate: (predicted, real)} for single removals, [removed, query]."""
    ids = torch.randperm(problem.fit.n, generator=torch.Generator().manual_seed(1))[:removed].tolist()
    real = problem.real([[i] for i in ids], newton)
    query = (problem.X, problem.y)
    out = {}
    for name, correction in (("first_order", None), ("rescaled", "rescaled")):
        out[name] = (problem.influence(correction).attribute(query).values[:, ids].T, real)
    return out


def groups_out(problem: Problem, size: int, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """{estimate: (predicted, real)} for groups removed together, [group, query]; estimates bend with the loss."""
    generator = torch.Generator().manual_seed(2)
    groups = [torch.randperm(problem.fit.n, generator=generator)[:size].tolist() for _ in range(count)]
    real = problem.real(groups, newton=True)
    method = problem.influence()
    effects = [method.removal(group, (problem.X, problem.y)) for group in groups]
    found = {name: torch.stack([e.effect(name, second_order=False) for e in effects]) for name in ESTIMATES}
    bent = torch.stack([e.effect("newton") for e in effects])
    return {name: (p, real) for name, p in found.items()} | {"Newton, 2nd order": (bent, real)}


def show(console: Console, title: str, rows: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> dict[str, Any]:
    table = Table("problem", "estimate", "slope real/predicted", "Pearson", "relative error", title=title)
    record: dict[str, Any] = {}
    for problem, found in rows.items():
        for name, (predicted, real) in found.items():
            agreement = Agreement.of(predicted, real)
            record.setdefault(problem, {})[name] = asdict(agreement)
            values = f"{agreement.slope:.4f}", f"{agreement.pearson:.5f}", f"{agreement.error:.2%}"
            table.add_row(problem, ESTIMATES.get(name, name), *values)
        table.add_section()
    console.print(table)
    return record


def draw(rows: dict[str, dict[str, tuple[Tensor, Tensor]]], path: Path) -> None:
    """Real against predicted, one row of panels a problem, with the slope in each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(rows), len(ESTIMATES), figsize=(9.5, 3.1 * len(rows)), squeeze=False)
    for line, (problem, found) in zip(axes, rows.items(), strict=True):
        real = next(iter(found.values()))[1]
        reach = 1.05 * float(
            torch.cat([torch.stack(found[n]).abs().flatten() for n in ESTIMATES]).quantile(0.999)
        )
        for axis, (name, label) in zip(line, ESTIMATES.items(), strict=True):
            predicted, agreement = found[name][0], Agreement.of(*found[name])
            axis.axhline(0, color="0.85", lw=0.8, zorder=0)
            axis.axvline(0, color="0.85", lw=0.8, zorder=0)
            axis.plot([-reach, reach], [-reach, reach], color="0.35", lw=1, ls="--", label="real = predicted")
            axis.scatter(
                predicted.flatten(), real.flatten(), s=5, alpha=0.35, lw=0, color="#3b5bdb", rasterized=True
            )
            ends = np.array([-reach, reach])
            label_slope = f"slope {agreement.slope:.2f}"
            axis.plot(ends, agreement.slope * ends, color="#e8590c", lw=1.6, label=label_slope)
            axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
            axis.legend(loc="upper left", fontsize=7.5, frameon=False)
            axis.set_title(f"{label}\n{problem}" if axis is line[0] else label, fontsize=9.5)
            axis.tick_params(labelsize=8)
        line[0].set_ylabel("real change of the loss, nats", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("predicted change, nats", fontsize=9)
    figure.suptitle(
        "Removing 5 % of the training set, logistic regression with n of the order of d", fontsize=11
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for convex_truth.png")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--quick", action="store_true", help="fewer removals, for a check that it runs")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console, started = Console(), time.perf_counter()
    removed, count = (20, 4) if arguments.quick else (200, 30)
    images = [digits(1e-2)] if arguments.quick else [digits(1e-2), digits(1e-3)]
    wide = [high_dimension(400, 100, 1e-2), high_dimension(300, 100, 1e-3), high_dimension(150, 100, 1e-3)]
    one = {p.name: leave_one_out(p, removed) for p in images}
    five = {p.name: groups_out(p, p.fit.n // 20, 1) for p in images}
    high_one = {p.name: leave_one_out(p, min(removed, p.fit.n), newton=True) for p in wide}
    high = {p.name: groups_out(p, p.fit.n // 20, count) for p in wide}
    record = {
        "leave one out": show(console, f"digits: {removed} removals, one at a time", one),
        "five percent": show(console, "digits: 5 % removed together", five),
        "high dimension, leave one out": show(console, "n of the order of d: one at a time", high_one),
        "high dimension, five percent": show(console, f"n of the order of d: {count} groups of 5 %", high),
        "environment": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": arguments.threads,
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
    console.print(f"{record['seconds']} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        draw(high, arguments.out / "convex_truth.png")
        console.print(f"figure in {arguments.out / 'convex_truth.png'}")


if __name__ == "__main__":
    main()
