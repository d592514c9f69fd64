"""`upweight init`."""

from __future__ import annotations

import keyword
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from upweight.cli.options import Debug, Json
from upweight.cli.session import printable, session

HELP = """Write a commented experiment file for your own project.

An experiment says what your model, its task and its data are, in about a hundred lines of plain Python: run it as it \
is to see that everything works, then put your own network and training in the places marked CHANGE.

[bold]Examples[/]

  [bold cyan]upweight init --kind sklearn[/]
      ./experiment.py with data that comes with scikit-learn: runs at once

  [bold cyan]upweight init --kind images --data ~/photos[/]
      for images in ~/photos/CLASS/*.jpg

  [bold cyan]upweight init houses --kind csv --data houses.csv[/]
      houses/experiment.py, for a table whose last column is to be predicted

  [bold cyan]upweight init --kind text --data reviews.csv[/]
      for a table with the columns text and label

  [bold cyan]upweight init --kind huggingface --data imdb[/]
      for a classifier from Hugging Face, on data of the hub

Then: [bold]upweight attribute experiment.py:experiment[/]; and evaluate, audit, explore, repair and report likewise.
"""

MODEL = "distilbert-base-uncased"
"""What the Hugging Face template starts from."""


VERBS = ("attribute", "evaluate", "audit", "explore", "repair", "report")
"""What to do with the file, in this order."""


class Kind(str, Enum):
    """Which template."""

    images = "images"
    csv = "csv"
    text = "text"
    huggingface = "huggingface"
    sklearn = "sklearn"


DATA = {"images": "photos", "csv": "data.csv", "text": "texts.csv", "huggingface": "imdb", "sklearn": ""}
"""Where the data is if nobody says so."""


def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where experiment.py goes.", show_default=False)
    ] = Path(),
    kind: Annotated[Kind, typer.Option(help="What your data is.")] = Kind.images,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where it is: a folder of images, a CSV file, or a name on Hugging Face's hub.",
        ),
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Of the file, without .py, and of the experiment; that is named after its folder if not given.",
        ),
    ] = "experiment",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a commented experiment file for your own project."""
    with session(json) as ours:
        file = write(folder.expanduser(), kind.value, data, name, force)
        address = f"{file}:experiment"
        commands = [shlex.join(["upweight", verb, address]) for verb in VERBS]
        ours.out.print(Text.assemble("Wrote ", (printable(str(file)), "bold")), soft_wrap=True)
        ours.out.print(Text("Look for CHANGE in it, then:"))
        for command in commands:
            ours.out.print(Text(f"  {printable(command)}", style="cyan"), soft_wrap=True)
    if json:
        from upweight.report.evaluation import json_text

        content = {"file": str(file), "kind": kind.value, "address": address, "commands": commands}
        typer.echo(json_text(content), nl=False)


def write(
    folder: Path, kind: str, data: str | None = None, name: str = "experiment", force: bool = False
) -> Path:
    """Write the file.

    Args:
        folder: Where; made if need be.
        kind: Of `Kind`.
        data: Where the data is.
        name: Of the file without its ending, which Python must be able to import.
        force: Replace a file that is there.

    Raises:
        UpweightError: The name cannot be imported, the file is there already, or it cannot be written.
    """
    from importlib import resources

    from upweight._files import refusing, replace_file
    from upweight.errors import UpweightError

    if not name.isidentifier() or keyword.iskeyword(name):
        raise UpweightError(
            f"the name {name!r} cannot be imported, expected letters, digits and underscores -> --name my_experiment"
        )
    file = folder / f"{name}.py"
    if file.exists() and not force:
        raise UpweightError(f"{file} is there already -> --force replaces it, --name writes another")
    if kind == "sklearn" and data is not None:
        raise UpweightError(
            "--data is not used by the sklearn template -> load your data in its function data()"
        )
    text = (
        resources.files("upweight.cli")
        .joinpath("templates")
        .joinpath(f"{kind}.template")
        .read_text(encoding="utf-8")
    )
    if data is not None and kind != "huggingface":
        # Commands may run elsewhere than this one.
        data = str(Path(data).expanduser().resolve())
    # The run's folder is named after the experiment: two projects must not share runs/experiment.
    title = name if name != "experiment" else folder.resolve().name or name
    values = {"FILE": file.name, "DATA": repr(data or DATA[kind]), "MODEL": repr(MODEL), "NAME": repr(title)}
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    with refusing(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
    replace_file(file, lambda stream: stream.write(text.encode()))
    return file
