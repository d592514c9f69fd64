"""`upweight explore`."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer
from rich.text import Text

from upweight.cli.options import Address, Debug, Json, Out
from upweight.cli.session import again, open_run, session

HELP = """Look at scores, and decide about suspected labels, in a local web page.

Pick a query, or bring one of your own, and see its [bold]proponents and opponents[/]; filter by class and layer. \
Step through what [bold]upweight audit[/] suspects and decide: [bold]K[/] keeps an example, [bold]R[/] relabels it as \
suggested, a [bold]digit[/] gives it another class, [bold]D[/] drops it, [bold]U[/] takes it back, arrows step.

Every decision is at once in [bold]RUN/decisions.sqlite[/], with who made it; two people may decide at the same time. \
[bold]upweight repair[/] applies them without retraining.

The page is for this machine alone, unless --host opens it. It needs: pip install 'upweight\\[explore]'.

[bold]Examples[/]

  [bold cyan]upweight audit mine.py:experiment --out runs/mine[/]
  [bold cyan]upweight explore mine.py:experiment --out runs/mine[/]
      the suspects of that run, at http://127.0.0.1:7860 or the next free port

  [bold cyan]upweight explore mine.py:experiment --out runs/mine --reviewer ada --open[/]
      decisions carry this name, and the browser opens

  [bold cyan]upweight repair mine.py:experiment --out runs/mine[/]
      apply what was decided
"""


def explore(
    experiment: Address,
    out: Out = None,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Method for queries without saved scores; a wrong name lists them. The first of the experiment's "
            "methods=, or ekfac, if not given.",
        ),
    ] = None,
    reviewer: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who decides; your user name if not given.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 lets everybody on the network see and decide.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; the first free one from 7860 if not given.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Look at scores, and decide about suspected labels, in a local web page."""
    with session(json) as ours:
        bundle, folder = open_run(experiment, out)
        from upweight.evaluate.comparison import default_methods
        from upweight.explorer.run import Run
        from upweight.explorer.server import application, is_loopback, listen, serve

        ours.say(repr(bundle))
        run = Run(bundle, folder, experiment, method or default_methods(bundle)[0], ours.say)
        opened = listen(host, port)
        try:
            app = application(run, host, reviewer if reviewer is not None else _user())
        except BaseException:
            opened.close()
            raise
        name, number = opened.getsockname()[:2]
        url = f"http://{f'[{name}]' if ':' in name else name}:{number}/"
        if not is_loopback(host):
            ours.warn(
                f"the page listens on {host}: whoever reaches this machine can see the data and decide. "
                "There is no password.",
                UserWarning,
                "",
            )
        text = Text.assemble(("Open ", "bold"), (url, "bold cyan"), ("   Ctrl-C ends it", "dim"))
        ours.out.print(text, soft_wrap=True)
    if json:
        from upweight.report.evaluation import json_text

        content = {
            "experiment": bundle.name,
            "run": str(folder),
            "url": url,
            "decisions": str(run.decisions.path),
        }
        typer.echo(json_text(content), nl=False)
    with session(json) as ours:  # another one: the lines above are out before the first request
        if open_browser:
            import webbrowser

            webbrowser.open(url)
        serve(app, opened)
        text = f"{len(run.decisions)} examples are decided, in {run.decisions.path} -> go on with: {again()}"
        ours.say(text)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without a name, as in some containers
        return ""
