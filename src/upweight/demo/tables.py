"""The demo's tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from upweight.demo.data import ImageSet
from upweight.demo.proof import Removal
from upweight.demo.results import DemoRun
from upweight.scores import Ranking

_SUSPECTS = 12


def print_setup(
    console: Console,
    images: ImageSet,
    flipped: Tensor,
    model: nn.Module,
    accuracy: float,
    seconds: dict[str, float],
) -> None:
    """What was trained on what."""
    parameters = sum(weight.numel() for weight in model.parameters())
    height, width = images.train.inputs.shape[2:]
    console.print(
        f"[bold]{escape(images.name)}[/]: {len(images.train):,} training images of {height} x {width} pixels in "
        f"{len(images.classes)} classes; {int(flipped.sum())} of their labels were flipped on purpose.\n"
        f"A convolutional network of {parameters:,} weights, trained in {seconds['train the network']:.1f} s, "
        f"classifies {accuracy:.1%} of {len(images.test):,} unseen images right.",
        highlight=False,
    )


def print_findings(console: Console, run: DemoRun, page: Path) -> None:
    """Everything after training: the explained images, the suspects and the proof."""
    shown = 3 if console.width >= 110 else 2
    console.print(_queries(run, shown), _suspects(run), _detections(run), sep="\n")
    if run.removals:
        console.print(_removals(run))
        console.print(removal_sentence(run), highlight=False)
    if run.closing.seconds:
        console.print(_closing(run))
    console.print(closing_sentence(run), highlight=False)
    steps = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in run.seconds.items())
    console.print(f"\n[dim]{steps}; {sum(run.seconds.values()):.0f} s in all[/]", highlight=False)
    console.print(f"[bold]Open {escape(str(page))}[/] to see the images.", highlight=False, soft_wrap=True)
    if run.closing.report is not None:
        console.print(
            f"[bold]{escape(str(run.closing.report))}[/] reports audit and repair. Decide yourself: "
            f"[cyan]upweight explore {escape(run.closing.address)} --out {escape(str(run.settings.out))}[/]",
            highlight=False,
            soft_wrap=True,
        )


def removal_sentence(run: DemoRun) -> str:
    """The proof by retraining in words."""
    together = run.agreement
    if together is None:
        return ""
    removed = len(run.removals[0].proponents.removed)
    return (
        f"Without their {removed} top proponents {together.wins} of {len(run.removals)} images lost more than without "
        f"{removed} random images of the same class: on average {together.proponents:+.2f} against "
        f"{together.control:+.2f} nats, predicted {together.predicted:+.2f} against {together.predicted_control:+.2f} "
        f"(correlation {together.correlation:.2f}; one predicted nat turned out to be {together.slope:.2f})."
    )


def closing_sentence(run: DemoRun) -> str:
    """The repair in words."""
    closing, flips = run.closing, int(run.flipped.sum())
    if closing.left_out:
        return f"The labels were not audited: {escape(closing.left_out)}."
    if not closing.seconds:
        return f"The audit flags {closing.flagged} of the labels, and nothing was decided about them."
    people = f", except for {closing.by_people} that somebody decided about" if closing.by_people else ""
    gone = f" and {len(closing.dropped)} were forgotten" if closing.dropped else ""
    words = (
        f"The audit flags {closing.flagged} labels; its suggestions were accepted unseen{people}: "
        f"{len(closing.labels)} images were given another label{gone}; {closing.right} of the new labels are the true "
        f"ones ({flips} had been flipped). The network was then "
        f"repaired without training it again: mean loss of the test images {closing.loss['before']:.3f} nats before, "
        f"{closing.loss['repaired']:.3f} after"
    )
    if "retrained" not in closing.loss:
        return f"{words}."
    return f"{words}; {closing.loss['retrained']:.3f} if it is really trained again on the same decisions."


def _closing(run: DemoRun) -> Table:
    closing, seeds = run.closing, run.settings.retrain_seeds
    table = _table(
        "From scores to action: audit, relabel, repair",
        "Repaired: a few preconditioned steps (EK-FAC) on the corrected labels, no training from scratch. Retrained: "
        f"on the same decisions, mean of {seeds} seed{'s' if seeds > 1 else ''}; the seconds are of one training. A "
        "network this small trains about as quickly as it is repaired; what repair saves grows with the training.",
    )
    for heading in ("network", "test accuracy", "test loss in nats", "seconds"):
        table.add_column(heading, justify="left" if heading == "network" else "right")
    for name in closing.accuracy:
        took = closing.seconds.get({"repaired": "repair", "retrained": "retraining"}.get(name, ""))
        table.add_row(
            {"before": "as it was trained"}.get(name, name),
            f"{closing.accuracy[name]:.1%}",
            f"{closing.loss[name]:.3f}",
            "" if took is None else f"{took:.1f}",
        )
    return table


def _queries(run: DemoRun, shown: int) -> Table:
    table = _table(
        "Which training images made it predict this?",
        "Labels of training images, each with the predicted change of the test image's loss, in nats, if that one is "
        "removed and the network trained again: + rises, - falls. [magenta]*[/] marks a label flipped on purpose.",
    )
    table.add_column("test image", justify="right")
    table.add_column("is → says")
    table.add_column("loss", justify="right")
    table.add_column("proponents (+)", style="cyan")
    table.add_column("opponents (-)", style="yellow")
    for row, position in enumerate(run.queries.tolist()):
        label, guess = int(run.images.test.labels[position]), int(run.predicted[row])
        table.add_row(
            escape(str(run.images.test.ids[position])),
            f"{_name(run, label)} → [bold red]{_name(run, guess)}[/]"
            if guess != label
            else _name(run, label),
            f"{float(run.query_losses[row]):.2f}",
            _ranked(run, row, run.scores.top_k(shown)),
            _ranked(run, row, run.scores.bottom_k(shown)),
        )
    return table


def _ranked(run: DemoRun, row: int, ranking: Ranking[list[int | str]]) -> str:
    return "  ".join(
        f"{_name(run, int(run.given[position]))}{'[magenta]*[/]' if run.flipped[position] else ''} "
        f"[dim]{value:+.3f}[/]"
        for position, value in zip(ranking.positions[row].tolist(), ranking.values[row].tolist())
    )


def _suspects(run: DemoRun) -> Table:
    table = _table(
        "Which training labels look wrong? (highest self-influence first)",
        "Self-influence: predicted rise of an image's own loss, in nats, if it is removed. It is high for what "
        "the network learns from this image alone: a wrong label, or a rare image.",
    )
    for heading in ("rank", "training image", "given label", "truth", "self-influence", "loss"):
        table.add_column(heading, justify="left" if heading in ("given label", "truth") else "right")
    ranking = run.suspects.values.argsort(descending=True)[:_SUSPECTS].tolist()
    for rank, position in enumerate(ranking, start=1):
        flipped = bool(run.flipped[position])
        truth = f"flipped, is {_name(run, int(run.images.train.labels[position]))}" if flipped else "as given"
        table.add_row(
            str(rank),
            escape(str(run.images.train.ids[position])),
            _name(run, int(run.given[position])),
            f"[magenta]{truth}[/]" if flipped else truth,
            f"{float(run.suspects.values[position]):.3f}",
            f"{float(run.train_losses[position]):.2f}",
        )
    return table


def _detections(run: DemoRun) -> Table:
    count = int(run.flipped.sum())
    table = _table(
        f"Proof 1: how well are the {count} flipped labels found?",
        f"AUROC: chance that a flipped label ranks above an unflipped one. Precision: flipped labels among the "
        f"first {count}. Average precision: over all ranks.",
    )
    for heading in ("ranked by", "AUROC", f"precision at {count}", "average precision"):
        table.add_column(heading, justify="left" if heading == "ranked by" else "right")
    for one in run.detections:
        figures = f"{one.auroc:.4f}", f"{one.precision:.3f}", f"{one.average_precision:.3f}"
        table.add_row(one.name, *figures, style="bold" if one is run.detections[0] else None)
    return table


def _removals(run: DemoRun) -> Table:
    first = run.removals[0].proponents
    seeds = len(first.measured)
    over = f", mean and standard deviation over {seeds} seeds," if seeds > 1 else ""
    table = _table(
        "Proof 2: does retraining do what was predicted?",
        f"Change of the test image's loss in nats{over} when {len(first.removed)} training images are left out.",
    )
    columns = ("without its top proponents", "predicted", "without random images", "predicted")
    for heading in ("test image", "is", *columns):
        table.add_column(heading, justify="left" if heading == "is" else "right")
    for pair in run.removals:
        position = int(run.queries[pair.proponents.query])
        table.add_row(
            escape(str(run.images.test.ids[position])),
            _name(run, int(run.images.test.labels[position])),
            _measured(pair.proponents),
            f"{pair.proponents.predicted:+.2f}",
            _measured(pair.control),
            f"{pair.control.predicted:+.2f}",
        )
    together = run.agreement
    if together is not None:
        means: Sequence[float] = (
            together.proponents,
            together.predicted,
            together.control,
            together.predicted_control,
        )
        table.add_section()
        table.add_row("mean", "", *(f"{value:+.2f}" for value in means), style="bold")
    return table


def _measured(removal: Removal) -> str:
    mean = f"{removal.mean:+.2f}"
    return f"{mean} ± {removal.spread:.2f}" if len(removal.measured) > 1 else mean


def _name(run: DemoRun, label: int) -> str:
    return escape(run.images.classes[label])


def _table(title: str, caption: str) -> Table:
    return Table(
        title=f"\n{title}",
        title_style="bold",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
