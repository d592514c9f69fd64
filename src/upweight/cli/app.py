"""The command line: `upweight` alone prints help, and every error a user can repair is one line."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from upweight.cli import attribute, audit, demo, evaluate, explore, init, repair, report
from upweight.errors import UpweightError

HELP = """Which training examples made a PyTorch model predict this, and how far may I trust that answer?

Start with [bold]upweight demo[/]: it needs no files and takes a minute or two.

For your own project, [bold]upweight init[/] writes a file to start from. The other commands take an \
[bold]EXPERIMENT[/], the few lines of Python that say what your model, its task and its data are: \
[bold]path/to/file.py:name[/] or [bold]package.module:name[/].

[bold]Example[/]

  [bold cyan]upweight init --kind sklearn[/]
  [bold cyan]upweight attribute experiment.py:experiment[/]
  [bold cyan]upweight audit experiment.py:experiment[/]
  [bold cyan]upweight report experiment.py:experiment[/]
      a file to start from, proponents and opponents, suspected labels, and one page of it all
"""

app = typer.Typer(
    name="upweight",
    add_completion=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True, help=HELP)
def _upweight(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    """The command line's first word."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("upweight"))
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


for _command, _short in (
    (demo, "Train on real images, explain predictions, find flipped labels, and prove it."),
    (init, "Write a commented experiment file for your own project."),
    (attribute, "Which training examples made the model predict this?"),
    (evaluate, "Is the answer right? Methods and baselines against models that are really retrained."),
    (audit, "What is wrong with the training data? Label errors, duplicates, outliers, harmful examples."),
    (explore, "Look at scores, and decide about suspected labels, in a local web page."),
    (repair, "Take bad data out of the trained model, without training it again."),
    (report, "One page of everything a run has found."),
):
    _name = _command.__name__.rpartition(".")[2]
    app.command(_name, help=_command.HELP, short_help=_short)(getattr(_command, _name))


def main() -> None:
    """Run the command line.

    An error a user can repair becomes one line and exit code 2, any other one line and exit code 1, unless --debug is
    on. A run that was interrupted ends with exit code 130.
    """
    try:
        app()
    except UpweightError as error:
        if "--debug" in sys.argv:
            raise
        _fail(str(error), 2)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error) or "no message"
        _fail(
            f"{type(error).__name__}: {text} ({last.filename}, line {last.lineno}) -> --debug shows it all", 1
        )


def _fail(message: str, code: int) -> None:
    shown = "".join(letter if letter.isprintable() else " " for letter in message)
    Console(stderr=True, soft_wrap=True).print(
        Text.assemble(("error: ", "bold red"), " ".join(shown.split()))
    )
    raise SystemExit(code) from None
