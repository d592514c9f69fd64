"""`upweight evaluate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from upweight.cli.options import Address, Debug, Json, Out
from upweight.cli.session import again, open_run, session

if TYPE_CHECKING:
    from upweight.evaluate.bootstrap import Estimate
    from upweight.evaluate.ceiling import NoiseCeiling
    from upweight.evaluate.comparison import Comparison

HELP = """Is the answer right? Hold methods against models that were really retrained.

The model is trained again on random parts of its training data, by the experiment's train_fn. Each method has said \
which training examples matter to which query, and so what each of those models should do. The rank correlation \
between that and what they really do is its [bold]LDS[/] (1 at best, 0 for random scores). Retraining with another \
seed gives another model, which no scores can predict: the [bold]ceiling[/] is what the truth itself would get. \
Simple baselines are shown beside the methods, unasked.

Finished models are kept in [bold]RUN/bank[/]. Stopped at any moment, the same command goes on where it was; with \
more subsets, seeds or methods it trains only what is new. The table is printed, and written with figures to \
[bold]RUN/evaluate.html[/], evaluate.json and evaluate-*.png.

[bold]Examples[/]

  [bold cyan]upweight evaluate examples/digits_experiment.py:experiment --subsets 16 --seeds 2[/]
      a first look in under a minute

  [bold cyan]upweight evaluate mine.py:experiment --out runs/mine --methods ekfac,ggn:damping=0.01 --jobs -1[/]
      two methods of your choice, retraining on every core

  [bold cyan]upweight evaluate mine.py:experiment --json | jq '.methods[] | {name, lds}'[/]
      the figures for a program to read
"""


def evaluate(
    experiment: Address,
    out: Out = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="NAME or NAME:OPTION=VALUE, with commas between methods or the option repeated. The experiment's own, "
            "or ekfac, grad-dot and grad-cos, if not given.",
        ),
    ] = None,
    subsets: Annotated[
        int, typer.Option(min=4, help="Random subsets of the training data to retrain on.")
    ] = 50,
    seeds: Annotated[
        int, typer.Option(min=1, help="Models trained on each; 2 or more give the ceiling.")
    ] = 3,
    fraction: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the training data in each subset.")
    ] = 0.5,
    seed: Annotated[int, typer.Option(min=0, help="Decides which subsets are drawn.")] = 0,
    jobs: Annotated[int, typer.Option(min=-1, help="Models trained at a time; -1: one for each core.")] = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Is the answer right? Hold methods against models that were really retrained."""
    with session(json) as ours:
        bundle, folder = open_run(experiment, out)
        from upweight.evaluate.comparison import Plan, compare
        from upweight.report.evaluation import as_json, json_text, write

        ours.say(repr(bundle))
        ours.stopped = lambda: _how_to_go_on(folder)
        own = bundle.methods or {}
        asked = [name for one in methods or [] for name in ([one] if one in own else one.split(","))]
        names = [name.strip() for name in asked if name.strip()]
        plan = Plan(subsets, seeds, fraction, seed, jobs or 1)
        comparison = compare(bundle, folder, names or None, plan, say=ours.say)
        files = write(comparison, folder, experiment, ours.warned)
        if "lds" not in files:
            ours.warn("no figures: matplotlib is missing -> pip install 'upweight[report]'", UserWarning, "")
        ours.out.print(_table(comparison))
        ours.out.print(Text(comparison.sentence()), soft_wrap=True)
        for name, why in comparison.left_out.items():
            ours.out.print(Text(f"left out: {name}: {why}", style="dim"), soft_wrap=True)
        ours.out.print(Text(f"Open {files['html']}", style="bold"), soft_wrap=True)
    if json:
        typer.echo(json_text(as_json(comparison, experiment, ours.warned) | {"files": files}), nl=False)


def _how_to_go_on(folder: Path) -> str:
    ledger = folder / "bank" / "ledger.jsonl"
    lines = ledger.read_text(encoding="utf-8").splitlines() if ledger.is_file() else []
    kept = sum('"run-' in line for line in lines)
    return f"{kept} models are kept in {folder / 'bank'} -> go on with: {again()}"


def _span(estimate: Estimate | NoiseCeiling, form: str) -> str:
    """Its interval; nothing where there is none, as of fewer than five subsets."""
    return f" ({estimate.low:{form}}, {estimate.high:{form}})" if math.isfinite(estimate.low) else ""


def _table(comparison: Comparison) -> Table:
    ceiling, lds = comparison.ceiling, comparison.rows[0].lds
    plan = comparison.plan
    noise = (
        f"noise ceiling {ceiling.value:.3f}{_span(ceiling, '.3f')}"
        if ceiling is not None
        else "no noise ceiling: that takes 2 seeds or more"
    )
    table = Table(
        title=Text(f"\nIs the answer right? ({comparison.experiment.name})", style="bold"),
        title_justify="left",
        caption=Text(
            f"{lds.subsets} subsets of {plan.fraction:.0%} x {plan.seeds} seeds, {len(lds.per_query)} queries; "
            f"{noise}. "
            "LDS: rank correlation of predicted and real retraining, 0 for random scores. Dim: baselines; the last "
            "column is the difference to the best of them."
        ),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", overflow="fold")
    for heading in ("LDS", f"{lds.level:.0%} interval", "of ceiling", "above baseline"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        gain = comparison.gains.get(row.name)
        table.add_row(
            Text(row.name),
            f"{row.lds.value:.3f}",
            f"{row.lds.low:.2f} to {row.lds.high:.2f}" if math.isfinite(row.lds.low) else "-",
            f"{row.lds.corrected:.0%}" if math.isfinite(row.lds.corrected) else "-",
            "" if gain is None else f"{gain.value:+.2f}{_span(gain, '+.2f')}",
            style="dim" if row.baseline else None,
        )
    return table
