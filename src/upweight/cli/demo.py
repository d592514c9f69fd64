"""`upweight demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from upweight.cli.options import Debug, Json
from upweight.cli.session import again, session

HELP = """Train on real images with some labels flipped, explain predictions, find the flips, and prove it.

A small convolutional network learns from images of which 10 % carry a wrong label. Influence functions (EK-FAC) \
then show which training images made it predict what it predicts, and which labels look wrong.

Two proofs follow: how well the flipped labels are found, beside simpler scores; and what really happens to a \
prediction when the network is trained again without the images that were said to support it. All of it is printed, \
and shown with the images in one file that needs no server: [bold]runs/demo/index.html[/]. At the end the suspected \
labels are corrected, the network is repaired without training it again, and held against one that is.

[bold]Examples[/]

  [bold cyan]upweight demo[/]
      the 1,797 handwritten digits that come with scikit-learn; a minute or two

  [bold cyan]upweight demo --root photos[/]
      your images: photos/CLASS/*.jpg, or photos/train/CLASS/* and photos/test/CLASS/*

  [bold cyan]upweight demo --data cifar10 --root ~/torchvision[/]
      a data set that torchvision has downloaded there

  [bold cyan]upweight demo --seed 7 --retrain-queries 0 --json[/]
      other flips, no retraining, and the figures for a program to read: a few seconds
"""


def demo(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="digits (the default), cifar10, mnist, fashion_mnist, or a folder of images."
        ),
    ] = None,
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Where the images are. UPWEIGHT_DATA is used if this is not given."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where index.html goes.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Decides flips, first weights and batches.")] = 0,
    n: Annotated[
        int | None,
        typer.Option("--n", min=1, help="Training images to take: all digits, 4000 of anything else."),
    ] = None,
    retrain_queries: Annotated[
        int | None,
        typer.Option(min=0, help="Queries proved by retraining: 10 for digits, 5 otherwise; 0 skips it."),
    ] = None,
    retrain_seeds: Annotated[
        int | None, typer.Option(min=1, help="Retrainings of each: 3 for digits, 2 otherwise.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Train on real images with some labels flipped, explain predictions, find the flips, and prove it."""
    from upweight.demo.results import Settings
    from upweight.demo.run import run_demo

    bundled = data == "digits" or (data is None and root is None)
    queries, seeds = (10, 3) if bundled else (5, 2)
    settings = Settings(
        data=data,
        root=None if root is None else root.expanduser(),
        out=out.expanduser(),
        n=n,
        seed=seed,
        retrain_queries=queries if retrain_queries is None else retrain_queries,
        retrain_seeds=seeds if retrain_seeds is None else retrain_seeds,
    )
    with session(json) as ours:
        ours.stopped = lambda: f"the page is written at the end -> start again with: {again()}"
        run = run_demo(settings, Console(quiet=json))
    if json:
        from upweight.report.evaluation import json_text

        files = {"html": str(settings.out / "index.html"), "report": str(settings.out / "report.html")}
        typer.echo(json_text(run.figures() | {"files": files}), nl=False)
