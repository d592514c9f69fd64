"""`upweight report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from upweight.cli.options import Debug, Json, Out
from upweight.cli.session import open_run, printable, session

HELP = """Make one page of everything a run has found.

[bold]RUN/report.html[/] is one file that opens in any browser, also without a network, on a phone, light or dark: a \
summary in words, queries beside the training examples that spoke for and against them, how the scores are spread, how \
far to trust them, the table of issues, repairs before and after, and how all of it was made. It shows whatever the \
folder holds, and says which command makes what is missing.

[bold]Examples[/]

  [bold cyan]upweight report mine.py:experiment --out runs/mine[/]
      of what attribute, evaluate, audit and repair have put into that folder

  [bold cyan]upweight report --out runs/mine[/]
      without the experiment: examples are known by their ids, and nothing is loaded or trained

  [bold cyan]upweight report mine.py:experiment --json[/]
      the name of the file, and what is missing, for a program to read
"""


def report(
    experiment: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPERIMENT]",
            help="path/to/file.py:name or package.module:name, to show examples as they look; else by their ids.",
            show_default=False,
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Make one page of everything a run has found."""
    with session(json) as ours:
        from upweight.errors import UpweightError
        from upweight.report.page import write
        from upweight.report.summary import missing

        if experiment is None and out is None:
            raise UpweightError(
                "neither an experiment nor a folder is named, expected at least one -> upweight report --out runs/NAME"
            )
        bundle = None
        if experiment is None:
            folder = Path(out or "").expanduser()
        elif out is not None and not out.expanduser().is_dir():
            # Before the experiment is loaded, which may train a model.
            raise UpweightError(
                f"there is no run folder {out} -> upweight attribute {experiment} --out {out} makes it"
            )
        else:
            bundle, folder = open_run(experiment, out)
            ours.say(repr(bundle))
        file, run = write(folder, bundle)
        lacking = missing(run, experiment or "")
        for notice in run.notices:
            ours.warn(notice, UserWarning, "")
        for what, command in lacking:
            ours.out.print(
                Text(printable(f"not there yet: {what} -> {command}"), style="dim"), soft_wrap=True
            )
        ours.out.print(Text(f"Open {printable(str(file))}", style="bold"), soft_wrap=True)
    if json:
        from upweight.report.evaluation import json_text

        content = {
            "report": str(file),
            "experiment": run.name if bundle is None else bundle.name,
            "address": experiment,
            "bytes": file.stat().st_size,
            "missing": [{"what": what, "command": command} for what, command in lacking],
            "warnings": run.notices,
        }
        typer.echo(json_text(content), nl=False)
