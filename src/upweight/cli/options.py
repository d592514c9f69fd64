"""Options that mean the same in every command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Address = Annotated[
    str,
    typer.Argument(
        metavar="EXPERIMENT",
        help="path/to/file.py:name or package.module:name: an upweight.Experiment, or a function that returns one.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="RUN", help="Folder of the run; runs/ and the experiment's name if not given."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]
