"""`upweight audit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from upweight.cli.options import Address, Debug, Json, Out
from upweight.cli.session import again, open_run, printable, session

if TYPE_CHECKING:
    from upweight.experiment import Experiment
    from upweight.repair.issue_table import IssueTable

HELP = """What is wrong with the training data?

Five kinds of issue, each with a score for every training example, 0 for the worst: [bold]label[/] (the label looks \
wrong; another one is suggested), [bold]near_duplicate[/], [bold]outlier[/], [bold]harmful[/] (without it the model is \
predicted to do better on the experiment's queries) and [bold]rare[/] (hard, but likely right: worth keeping).

Labels are flagged so far down the list as --precision allows: at 0.8, four in five of the flagged are expected to be \
wrong. That expectation is calibrated on the experiment's queries, whose labels are taken to be right; without \
them (--no-validation) on the clearest training examples, and not at all where a weak model looks like wrong labels.

The worst of each kind are printed; all are written to [bold]RUN/issues.json[/], which upweight.IssueTable.load and \
[bold]upweight repair[/] read, and to issues.csv.

[bold]Examples[/]

  [bold cyan]upweight audit examples/digits_experiment.py:experiment[/]
      everything, in a few seconds

  [bold cyan]upweight audit mine.py:experiment --kinds label --folds 3 --precision 0.9[/]
      label errors alone, judged by three models that are trained without the examples they judge: slower, and the
      better answer for a model that has learnt its labels by heart

  [bold cyan]upweight audit mine.py:experiment --json | jq '.suggestions'[/]
      the suggested labels for a program to read
"""


def audit(
    experiment: Address,
    out: Out = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAMES",
            help="Which issues, with commas between them or the option repeated; all if not given.",
        ),
    ] = None,
    detector: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of label errors; auto: the best by our benchmarks. A wrong name lists them.",
        ),
    ] = "auto",
    precision: Annotated[
        float, typer.Option(help="Share of the flagged that should really be wrong, between 0 and 1.")
    ] = 0.8,
    folds: Annotated[
        int,
        typer.Option(min=0, help="Models trained by train_fn to judge what they have not seen; 0: none."),
    ] = 0,
    validation: Annotated[
        bool, typer.Option(help="Take the queries, and their labels, as held-out data to be trusted.")
    ] = True,
    neighbours: Annotated[
        int | None,
        typer.Option(min=1, help="How many nearest training examples to ask; 10 to 50 if not given."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Rows of each kind that are printed.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds and whatever else is random.")] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """What is wrong with the training data?"""
    with session(json) as ours:
        bundle, folder = open_run(experiment, out)
        from upweight.errors import UpweightError
        from upweight.repair.audit import audit as audited
        from upweight.repair.issue_display import as_rich
        from upweight.repair.issue_table import IssueTable

        ours.say(repr(bundle))
        ours.stopped = lambda: f"nothing was written -> go on with: {again()}"
        if folds and bundle.train_fn is None:
            raise UpweightError(
                f"--folds {folds} needs to train models, but the experiment has no train_fn -> add one"
            )
        names = [name.strip() for one in kinds or [] for name in one.split(",") if name.strip()]
        table = audited(
            bundle.model,
            bundle.task,
            bundle.train,
            validation=bundle.query if validation else None,
            kinds=names or None,
            detector=detector.strip().lower().replace("-", "_"),
            precision=precision,
            train_fn=bundle.train_fn if folds else None,
            folds=folds or 3,
            neighbours=neighbours,
            seed=seed,
        )
        about = {"experiment": bundle.name, "address": experiment, "classes": bundle.classes}
        table = IssueTable(table.columns, table.info | about)
        file = table.save(folder)
        shown = {kind: _worst(table, kind, top) for kind in table.kinds}
        words = _words(bundle, [row for rows in shown.values() for row in rows])
        ours.out.print(Text("\nWhat is wrong with the training data?", style="bold"))
        ours.out.print(as_rich(table, top, words))
        for line in _sentences(table):
            ours.out.print(Text(printable(line)), soft_wrap=True)
        ours.out.print(Text(f"All issues: {file}, {file.with_suffix('.csv')}"), soft_wrap=True)
    if json:
        from upweight.report.evaluation import json_text

        content = {
            "experiment": bundle.name,
            "address": experiment,
            "files": {"json": str(file), "csv": str(file.with_suffix(".csv"))},
            **{
                key: table.info.get(key)
                for key in ("settings", "detectors", "influence", "left_out", "classes")
            },
            "flagged": {kind: len(table.flagged(kind)) for kind in table.kinds},
            "worst": {
                kind: [row | {"shown": words[row["id"]]} for row in rows] for kind, rows in shown.items()
            },
            "suggestions": [[name, label] for name, label in table.suggestions().items()],
        }
        typer.echo(json_text(content), nl=False)


def _worst(table: IssueTable, kind: str, top: int) -> list[dict[str, Any]]:
    rows = table.filter(kind)
    return [rows.row(k) for k in range(min(top, len(rows)))]


def _words(experiment: Experiment, rows: list[dict[str, Any]]) -> dict[Any, str]:
    """What to say of each of these examples, by id; nothing where the label says it all."""
    positions = sorted({row["position"] for row in rows})
    said = experiment.describe(experiment.train, positions)
    ids = experiment.train.ids
    return {
        ids[p]: " ".join(printable(words).split()) if experiment.show is not None else ""
        for p, words in zip(positions, said)
    }


def _sentences(table: IssueTable) -> list[str]:
    """How the labels were judged, and what was left out."""
    lines = []
    label = table.info["detectors"].get("label")
    if label is not None:
        said = f"Labels are ranked by {label['detector']}"
        if "calibration" in label:
            said += (
                f"; threshold and suggestions by {label['suggestion']}, calibrated on {label['calibration']}"
            )
        lines.append(said + ".")
        if "withheld" in label:
            lines.append(f"No label is flagged: {label['withheld']}.")
    duplicates = table.info["detectors"].get("near_duplicate", {})
    if missed := duplicates.get("pairs_not_compared"):
        lines.append(
            f"{missed:,} pairs that look alike are not flagged: only the closest {duplicates['pairs_compared']:,} were "
            "compared by their gradients."
        )
    if copies := duplicates.get("exact_copies_with_another_label"):
        lines.append(f"{copies} examples are exact copies of one with another label.")
    lines += [f"left out: {kind}: {why}" for kind, why in table.info.get("left_out", {}).items()]
    return lines
