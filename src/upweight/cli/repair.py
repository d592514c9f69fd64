"""`upweight repair`."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from upweight.cli.options import Address, Debug, Json, Out
from upweight.cli.session import again, open_run, session
from upweight.errors import UpweightError

if TYPE_CHECKING:
    from upweight.curvature.l2 import L2
    from upweight.experiment import Experiment
    from upweight.repair.result import Repair

LOOKED_AT = 1000
"""Training examples whose targets tell whether labels are class numbers."""
HELP = """Take bad data out of the trained model, without training it again.

Examples are forgotten ([bold]--remove[/]) or given another label ([bold]--relabel[/]). Without either, the decisions \
that were made in [bold]upweight explore[/] are carried out, or, if there are none, the suggestions of \
[bold]upweight audit[/] that pass its threshold. The parameters take one second-order step to where training without \
the change is predicted to end; the experiment's own model is not touched.

The new weights go to [bold]RUN/repair/model.safetensors[/], what was done and what it did to \
[bold]RUN/repair/repair.json[/], and a line for every action is appended to the audit log \
[bold]RUN/repair/log.jsonl[/]. With [bold]--verify[/] models are really trained again, by the experiment's train_fn, \
and the repaired one is compared with them.

[bold]Examples[/]

  [bold cyan]upweight repair mine.py:experiment --remove 3,14,159[/]
      forget three examples, named by their ids

  [bold cyan]upweight repair mine.py:experiment --relabel corrected.csv --l2 5e-4[/]
      a table with the columns id and label; 5e-4 was the weight decay, which the experiment does not say

  [bold cyan]upweight repair mine.py:experiment --verify --seeds 3[/]
      the decisions of the run folder, and how near the result is to three models trained on them

  [bold cyan]upweight repair mine.py:experiment --method corrected --json[/]
      another method; the figures for a program to read
"""


@dataclass
class _Wanted:
    """What is to be done, by id, and who says so."""

    remove: list[Any] = field(default_factory=list)
    labels: dict[Any, Any] = field(default_factory=dict)
    source: str = ""


def repair(
    experiment: Address,
    out: Out = None,
    remove: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IDS", help="Ids to forget: with commas, or a file with one a line (or a column id)."
        ),
    ] = None,
    relabel: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="New labels: a CSV with the columns id and label (numbers or class names)."
        ),
    ] = None,
    decisions: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Decisions of the explorer; RUN/decisions.sqlite if not given."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="newton, influence, gradient, trust_region, corrected, fine_tune or last_layer.",
        ),
    ] = "newton",
    curvature: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="ggn, hessian, ekfac, kfac, ...; chosen by the model's size if not given."
        ),
    ] = None,
    damping: Annotated[str, typer.Option(metavar="NUMBER", help="auto, a number, or '0.1 mean'.")] = "auto",
    l2: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Weight decay of the training objective, (l2/2) |theta|^2; the experiment's l2= if not given.",
        ),
    ] = None,
    convention: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="mean: the objective divides by what is left; sum: still by n; the experiment's if not given.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Retrain on the changed data, and compare.")
    ] = False,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, help="Models that --verify trains; two more, on halves of the data, check train_fn."
        ),
    ] = 3,
    jobs: Annotated[int, typer.Option(min=-1, help="Models trained at a time; -1: one for each core.")] = 1,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Take bad data out of the trained model, without training it again."""
    with session(json) as ours:
        bundle, folder = open_run(experiment, out)
        from upweight.report.evaluation import json_text

        ours.say(repr(bundle))
        if verify and bundle.train_fn is None:
            raise UpweightError(
                f"experiment {bundle.name!r} has no train_fn, which --verify trains with -> "
                "uw.Experiment(..., train_fn=...), or leave --verify out"
            )
        wanted = _wanted(bundle, folder, remove, relabel, decisions)
        ours.say(f"{wanted.source}: {len(wanted.remove)} to forget, {len(wanted.labels)} to relabel")
        if verify:
            _check_train_fn(bundle, wanted)
        penalty = bundle.l2 if l2 is None else l2
        done = _repaired(
            bundle, wanted, method, curvature, _number(damping), penalty, convention or bundle.convention
        )
        place = folder / "repair"
        file = done.save(place, experiment=bundle.name, address=experiment, source=wanted.source)
        ours.stopped = lambda: f"the repair is in {place}, its verification is not -> go on with: {again()}"
        ours.out.print(done.table())
        checked = None
        if verify:
            from upweight.repair.verify import verify as verified

            ours.say(f"training {seeds} model{'s' if seeds > 1 else ''} on the changed data")
            checked = verified(
                done,
                bundle.model,
                bundle.task,
                bundle.train,
                bundle.train_fn,  # pyright: ignore[reportArgumentType] - checked above
                test=bundle.query,
                folder=place / f"bank-{_name_of(done)}",
                seeds=seeds,
                n_jobs=jobs or 1,
            )
            checked.save(place)
            ours.out.print(checked.table())
        ours.out.print(Text(done.sentence()), soft_wrap=True)
        ours.out.print(Text(f"New weights: {place / 'model.safetensors'}", style="bold"), soft_wrap=True)
    if json:
        content = {
            "experiment": bundle.name,
            "address": experiment,
            "source": wanted.source,
            "files": {
                "json": str(file),
                "model": str(place / "model.safetensors"),
                "log": str(place / "log.jsonl"),
            },
            **done.to_json(),
            "verification": None if checked is None else checked.to_json(),
            "warnings": ours.warned,
        }
        typer.echo(json_text(content), nl=False)


def _repaired(
    bundle: Experiment,
    wanted: _Wanted,
    method: str,
    curvature: str | None,
    damping: float | str,
    l2: L2,
    convention: str,
) -> Repair:
    from upweight.repair.amend import amend

    return amend(
        bundle.model,
        bundle.task,
        bundle.train,
        remove=wanted.remove or None,
        labels=wanted.labels or None,
        test=bundle.query,
        method=method,
        curvature=curvature,
        damping=damping,
        l2=l2,
        convention=convention,
    )


def _check_train_fn(bundle: Experiment, wanted: _Wanted) -> None:
    """Refuse before any work what retraining would refuse after the repair was made."""
    from upweight.evaluate.checks import check_train_fn
    from upweight.repair.change import read_change
    from upweight.repair.verify import subset_of

    change = read_change(bundle.train, wanted.remove or None, wanted.labels or None)
    try:
        check_train_fn(bundle.train_fn, subset_of(change))
    except UpweightError as error:
        raise UpweightError(f"--verify: {error}") from error


def _name_of(done: Repair) -> str:
    """Retrained models belong to one change of one training set."""
    from upweight.repair.verify import subset_of

    return f"{subset_of(done.change).digest(0)[:8]}-{done.evidence['fingerprints']['train'][:8]}"


# What is to be done --------------------------------------------------------------------------------------------------


def _wanted(
    bundle: Experiment, folder: Path, remove: list[str] | None, relabel: Path | None, decisions: Path | None
) -> _Wanted:
    """What the options say; else the explorer's decisions; else the audit's suggestions."""
    if remove or relabel is not None:
        if decisions is not None:
            raise UpweightError(
                "--decisions was given with --remove or --relabel, expected one of them -> leave one out"
            )
        found = _Wanted(
            source=" and ".join(["--remove"] * bool(remove) + ["--relabel"] * (relabel is not None))
        )
        found.remove = [name for one in remove or [] for name in _ids(bundle, one)]
        found.labels = _labels(bundle, relabel) if relabel is not None else {}
        return found
    file = decisions or folder / "decisions.sqlite"
    if decisions is not None and not decisions.is_file():
        raise UpweightError(f"there is no file {decisions} -> make decisions in upweight explore")
    if file.is_file():
        from upweight.explorer.decisions import Decisions

        made = Decisions(file, bundle.name)
        found = _Wanted(list(made.remove()), _numbered(bundle, made.labels()), str(file))
        if not found.remove and not found.labels and (len(made) or decisions is not None):
            raise UpweightError(
                f"nothing to do: {file} holds {len(made)} decisions, all to keep -> decide in upweight explore, or "
                "say what to remove"
            )
        if len(made):
            return found
    issues = folder / "issues.json"
    if issues.is_file():
        from upweight.repair.issue_table import IssueTable

        suggested = IssueTable.load(folder, train=bundle.train).suggestions()
        if not suggested:
            raise UpweightError(
                f"nothing to do: in {issues} no label passes the audit's threshold -> decide in upweight explore, say "
                "what to remove, or audit with a lower --precision"
            )
        return _Wanted([], _numbered(bundle, suggested), f"the suggestions of {issues}")
    raise UpweightError(
        f"nothing to do: no --remove, no --relabel, and neither decisions.sqlite nor issues.json in {folder} -> "
        "upweight audit, upweight explore, or say what to remove"
    )


def _ids(bundle: Experiment, text: str) -> list[Any]:
    """Ids from ``3,14`` or from a file: one a line, or the column id of a CSV."""
    path = Path(text).expanduser()
    if path.suffix and path.is_file():
        rows = list(_rows(path))
        first = [name.strip() for name in rows[0]] if rows else []
        column = first.index("id") if "id" in first else 0
        names = [row[column] for row in rows[1 if "id" in first else 0 :] if len(row) > column]
    else:
        names = text.split(",")
    return [_known(bundle, name.strip()) for name in names if name.strip()]


def _labels(bundle: Experiment, path: Path) -> dict[Any, Any]:
    """{id: label} from a CSV with these columns."""
    rows = list(_rows(path))
    first = [name.strip() for name in rows[0]] if rows else []
    if not {"id", "label"} <= set(first):
        raise UpweightError(
            f"{path} has the columns {first}, expected id and label -> name them in the first line"
        )
    at, new = first.index("id"), first.index("label")
    found: dict[Any, Any] = {}
    for number, row in enumerate(rows[1:], 2):
        if len(row) <= max(at, new):
            raise UpweightError(
                f"{path}, line {number} has {len(row)} columns, expected {len(first)} -> id,label on every line"
            )
        name = _known(bundle, row[at].strip())
        if name in found:
            raise UpweightError(f"{path} names {name!r} twice (line {number}) -> each example once")
        found[name] = _label(bundle, row[new].strip(), f"{path}, line {number}")
    if not found:
        raise UpweightError(f"{path} names no example, expected lines of id,label -> write some")
    return found


def _rows(path: Path) -> Iterable[list[str]]:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UpweightError(f"{path} cannot be read ({error.strerror}) -> check the file") from error
    except UnicodeDecodeError as error:
        raise UpweightError(f"{path} is no text in UTF-8 -> save it as CSV (UTF-8)") from error
    return [row for row in csv.reader(text.splitlines()) if row]


def _known(bundle: Experiment, name: str) -> Any:
    """An id as the training data has it: text, or the integer that the text writes."""
    ids = bundle.train.ids
    if not isinstance(ids, range) and name in ids:
        return name
    return int(name) if name.removeprefix("-").isdecimal() else name


def _label(bundle: Experiment, text: str, where: str) -> Any:
    """A label as a number: a class name, or a number."""
    if bundle.classes is not None and text in bundle.classes:
        return list(bundle.classes).index(text)
    try:
        value = float(text)
    except ValueError as error:
        known = "" if bundle.classes is None else f", or one of {list(bundle.classes)[:6]}"
        raise UpweightError(
            f"{where}: the label {text!r} is no number{known} -> write the class's number"
        ) from error
    if not math.isfinite(value):
        raise UpweightError(
            f"{where}: the label {text!r} is not finite, expected a number -> leave the line out to keep the label"
        )
    return _of_a_class(bundle, int(value) if value == int(value) else value, where)


def _of_a_class(bundle: Experiment, label: Any, where: str) -> Any:
    """The label, if it can be one: a class's number where those of the training data are."""
    if bundle.classes is None or label in range(len(bundle.classes)):
        return label
    from torch import Tensor

    from upweight.task.outputs import split_batch

    seen = split_batch(bundle.train.take(range(min(bundle.train.n, LOOKED_AT))))[2]
    if isinstance(seen, Tensor) and all(
        value in range(len(bundle.classes)) for value in seen.flatten().tolist()
    ):
        raise UpweightError(
            f"{where}: the label {label!r} is none of the {len(bundle.classes)} classes -> a number from 0 to "
            f"{len(bundle.classes) - 1}, or one of {list(bundle.classes)[:6]}"
        )
    return label


def _numbered(bundle: Experiment, labels: dict[Any, Any]) -> dict[Any, Any]:
    """Labels that are class names as class numbers."""
    return {
        name: (_label if isinstance(label, str) else _of_a_class)(bundle, label, f"example {name!r}")
        for name, label in labels.items()
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
