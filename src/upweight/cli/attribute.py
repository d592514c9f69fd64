"""`upweight attribute`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from upweight.cli.options import Address, Debug, Json, Out
from upweight.cli.session import open_run, printable, session

if TYPE_CHECKING:
    from upweight.experiment import Experiment
    from upweight.scores import Scores

HELP = """Which training examples made the model predict this?

Every training example gets a score for every query of the experiment. Positive marks a [bold]proponent[/]: without it \
the query's measurement is predicted to become worse. Negative marks an [bold]opponent[/]. The first ones of each are \
printed; all scores go to [bold]RUN/scores/METHOD.safetensors[/], which upweight.Scores.load reads.

[bold]Examples[/]

  [bold cyan]upweight attribute examples/digits_experiment.py:experiment[/]
      the five strongest proponents and opponents of the first queries, by the experiment's own method

  [bold cyan]upweight attribute mine.py:experiment --method ggn:damping=0.01 --top 10 --out runs/mine[/]
      another method, with an option of its own, into a folder of your choice

  [bold cyan]upweight attribute mine.py:experiment --json > scores.json[/]
      the same for a program to read

Whether to believe it: [bold]upweight evaluate[/].
"""


def attribute(
    experiment: Address,
    out: Out = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A method, NAME or NAME:OPTION=VALUE; a wrong name lists them. The first of the experiment's "
            "methods=, or ekfac, if not given.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Proponents and opponents of each query.")] = 5,
    queries: Annotated[
        int, typer.Option(min=1, help="Queries printed; all are scored, and all are in the JSON.")
    ] = 10,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Which training examples made the model predict this?"""
    with session(json) as ours:
        bundle, folder = open_run(experiment, out)
        from upweight._file_names import file_name
        from upweight.evaluate.comparison import default_methods, scored

        ours.say(repr(bundle))
        method = method or default_methods(bundle)[0]
        scores, seconds = scored(bundle, method)
        file = scores.save(folder / "scores" / file_name(method))
        found = _found(bundle, scores, top, len(scores.query_ids) if json else queries)
        ours.out.print(_table(scores, found, method))
        rows, columns = scores.values.shape
        ours.out.print(f"[dim]{rows} queries x {columns:,} training examples in {seconds:.1f} s[/]")
        ours.out.print(Text(f"All scores: {file}"), soft_wrap=True)
    if json:
        from upweight.report.evaluation import json_text

        content = {
            "experiment": bundle.name,
            "address": experiment,
            "method": method,
            "unit": scores.unit,
            "scores": str(file),
            "seconds": round(seconds, 3),
            "info": scores.info,
            "queries": found,
        }
        typer.echo(json_text(content), nl=False)


def _found(experiment: Experiment, scores: Scores, top: int, count: int) -> list[dict[str, Any]]:
    """The first and last of each query, in words."""
    rankings = {"proponents": scores.top_k(top), "opponents": scores.bottom_k(top)}
    rows = range(min(count, len(scores.query_ids)))
    wanted = sorted({p for one in rankings.values() for row in rows for p in one.positions[row].tolist()})
    shown = dict(zip(wanted, experiment.describe(experiment.train, wanted)))
    asked = experiment.describe(experiment.query, list(rows))

    def ranked(side: str, row: int) -> list[dict[str, Any]]:
        ranking = rankings[side]
        return [
            {"id": scores.train_ids[position], "shown": shown[position], "score": value}
            for position, value in zip(ranking.positions[row].tolist(), ranking.values[row].tolist())
            if (value > 0 if side == "proponents" else value < 0)
        ]

    return [
        {
            "id": scores.query_ids[row],
            "shown": asked[row],
            "proponents": ranked("proponents", row),
            "opponents": ranked("opponents", row),
        }
        for row in rows
    ]


def _table(scores: Scores, found: list[dict[str, Any]], method: str) -> Table:
    unit = (
        f"Predicted change of the query's measurement if the example is removed, in {scores.unit}."
        if scores.unit
        else "These scores have no unit: only their order within a query means something."
    )
    table = Table(
        title=Text(f"\nWhich training examples made it predict this? ({method})", style="bold"),
        title_justify="left",
        caption=Text(f"{unit} + worse without it, - better without it."),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_lines=True,
        pad_edge=False,
    )
    table.add_column("query")
    table.add_column("proponents (+)", style="cyan")
    table.add_column("opponents (-)", style="yellow")
    for query in found:
        sides = (_lines(query[side]) for side in ("proponents", "opponents"))
        table.add_row(_named(query), *sides)
    return table


def _lines(ranked: list[dict[str, Any]]) -> Text:
    return Text("\n").join(
        Text.assemble((f"{one['score']:+.3g}", "dim"), "  ", _named(one)) for one in ranked
    )


def _named(one: dict[str, Any]) -> Text:
    words = " ".join(printable(one["shown"]).split())
    return Text.assemble(
        (printable(str(one["id"])), "bold"), f"  {words[:60]}{'...' if len(words) > 60 else ''}"
    )
