"""The demo's page: one HTML file that needs no server, no network and no script."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from importlib import resources

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from PIL import Image
from torch import Tensor

import upweight
from upweight.demo.proof import RemovalPair
from upweight.demo.results import DemoRun
from upweight.report.charts import ticks
from upweight.scores import Ranking

NEIGHBOURS = 8
"""Proponents and opponents shown beside each query."""

SUSPECTS = 48
"""Training images shown in the grid of suspected labels."""

INNOCENT = 12
"""Suspected labels shown that were not flipped."""

CHANGED = 24
"""Relabelled and forgotten training images shown."""

_INSPECTED = 0.3
"""Share of the training labels the chart of found labels covers."""

_CURVES = {"self-influence": "a", "loss": "b", "gradient norm": "c", "chance": "d"}
"""Which colour each ranking has in the chart."""


@dataclass(frozen=True)
class _Picture:
    """A training image as the page shows it."""

    source: str
    given: str
    truth: str
    flipped: bool
    score: str
    rank: int | None = None


def render(run: DemoRun) -> str:
    """The page of a run as one HTML document; every text in it is escaped, every picture is inside it."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(signed=signed, nats=nats, percent=lambda share: f"{share:.1%}")
    suspects = _suspects(run)
    template = resources.files("upweight.demo").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        run=run,
        version=upweight.__version__,
        flips=int(run.flipped.sum()),
        queries=[_query(run, row) for row in range(len(run.queries))],
        neighbours=NEIGHBOURS,
        suspects=suspects[:SUSPECTS],
        innocent=[picture for picture in suspects[SUSPECTS:] if not picture.flipped][:INNOCENT],
        curves=[(one.name, _CURVES[one.name], _curve(one.found)) for one in run.detections],
        inspected=_INSPECTED,
        removals=_removals(run),
        together=run.agreement,
        repair=_repair(run),
        evidence=_evidence(run),
        seconds=sum(run.seconds.values()),
    )


def signed(value: float) -> str:
    """A score with its sign and two significant digits.

    >>> signed(0.2), signed(-3.2e-05), signed(0.0), signed(12.345)
    ('+0.20', '−3.2e-5', '0', '+12')
    """
    if value == 0:
        return "0"
    text = f"{value:+.0f}" if abs(value) >= 9.95 else f"{value:+#.2g}"
    return text.replace("e-0", "e-").replace("-", "−", 1 if value < 0 else 0)


def nats(value: float, digits: int) -> str:
    """A change of loss with its sign and a fixed number of digits.

    >>> nats(-0.126, 2)
    '−0.13'
    """
    return f"{value:+.{digits}f}".replace("-", "−")


def png(picture: np.ndarray) -> str:
    """A picture, uint8 [height, width, 1 or 3], as a data address of a PNG file.

    >>> png(np.zeros((2, 2, 1), np.uint8))[:26]
    'data:image/png;base64,iVBO'
    """
    file = io.BytesIO()
    Image.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _query(run: DemoRun, row: int) -> dict[str, object]:
    position = int(run.queries[row])
    label, guess = int(run.images.test.labels[position]), int(run.predicted[row])
    return {
        "source": png(run.images.test.pictures[position]),
        "id": run.images.test.ids[position],
        "label": run.images.classes[label],
        "guess": run.images.classes[guess],
        "right": label == guess,
        "loss": f"{float(run.query_losses[row]):.2g}",
        "proponents": _ranked(run, row, run.scores.top_k(NEIGHBOURS)),
        "opponents": _ranked(run, row, run.scores.bottom_k(NEIGHBOURS)),
    }


def _ranked(run: DemoRun, row: int, ranking: Ranking) -> list[_Picture]:
    pairs = zip(ranking.positions[row].tolist(), ranking.values[row].tolist(), strict=True)
    return [_picture(run, position, value) for position, value in pairs]


def _picture(run: DemoRun, position: int, score: float, rank: int | None = None) -> _Picture:
    return _Picture(
        source=png(run.images.train.pictures[position]),
        given=run.images.classes[int(run.given[position])],
        truth=run.images.classes[int(run.images.train.labels[position])],
        flipped=bool(run.flipped[position]),
        score=signed(score),
        rank=rank,
    )


def _suspects(run: DemoRun) -> list[_Picture]:
    """The training images with the highest self-influence, enough of them to meet a few that were not flipped."""
    ranking = run.suspects.top_k(SUSPECTS + int(run.flipped.sum()) + INNOCENT)
    return [
        _picture(run, position, value, rank)
        for rank, (position, value) in enumerate(
            zip(ranking.positions.tolist(), ranking.values.tolist()), start=1
        )
    ]


@dataclass(frozen=True)
class _Change:
    """A training image that was decided about: its label before and after, None if it was forgotten."""

    picture: _Picture
    label: str | None

    @property
    def right(self) -> bool:
        return self.label == self.picture.truth


def _repair(run: DemoRun) -> dict[str, object] | None:
    """What was decided, image by image, and the networks before, after, and really trained again."""
    closing = run.closing
    if not closing.seconds:
        return None
    decided: dict[int | str, int | None] = {**closing.labels, **dict.fromkeys(closing.dropped)}
    place = {name: position for position, name in enumerate(run.images.train.ids)}
    first = [(place[name], label) for name, label in decided.items() if name in place][:CHANGED]
    took = {"repaired": closing.seconds.get("repair"), "retrained": closing.seconds.get("retraining")}
    called = {"before": "as it was trained", "repaired": "repaired", "retrained": "trained again"}
    return {
        "changes": [
            _Change(_picture(run, position, 0.0), None if label is None else run.images.classes[label])
            for position, label in first
        ],
        "networks": [
            (called[name], share, closing.loss[name], took.get(name))
            for name, share in closing.accuracy.items()
        ],
        "link": None if closing.report is None else closing.report.name,
    }


def _curve(found: np.ndarray) -> str:
    """Points of a line in a 100 x 100 box: labels inspected to the right, flipped labels found upwards."""
    last = round(_INSPECTED * len(found))
    steps = np.unique(np.linspace(1, last, 120).round().astype(int))
    points = ((100 * step / last, 100 - 100 * found[step - 1]) for step in steps)
    return " ".join(["0,100", *(f"{x:.2f},{y:.2f}" for x, y in points)])


def _removals(run: DemoRun) -> dict[str, object] | None:
    """The removals and where their marks stand on a common scale, in percent of its width."""
    if not run.removals:
        return None
    ends = torch.tensor([_extent(pair) for pair in run.removals])
    low, high = min(0.0, float(ends.min())), max(0.0, float(ends.max()))
    margin = 0.04 * (high - low) or 1.0
    low, high = low - margin, high + margin

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}"

    rows = []
    for pair in run.removals:
        position = int(run.queries[pair.proponents.query])
        mean, spread = pair.proponents.mean, pair.proponents.spread
        rows.append(
            {
                "pair": pair,
                "source": png(run.images.test.pictures[position]),
                "label": run.images.classes[int(run.images.test.labels[position])],
                "measured": place(mean),
                "from": place(mean - spread),
                "to": place(mean + spread),
                "predicted": place(pair.proponents.predicted),
                "control": place(pair.control.mean),
            }
        )
    marks = [
        (place(value), f"{value:+g}".replace("-", "−") if value else "0") for value in ticks(low, high, 4)
    ]
    first = run.removals[0].proponents
    return {"rows": rows, "ticks": marks, "removed": len(first.removed), "seeds": len(first.measured)}


def _extent(pair: RemovalPair) -> list[float]:
    one = pair.proponents
    return [one.mean - one.spread, one.mean + one.spread, one.predicted, pair.control.mean]


def _evidence(run: DemoRun) -> list[tuple[str, str]]:
    """What the scores say about how they were made, as words and values."""
    return [(key.replace("_", " "), _short(value)) for key, value in run.scores.info.items()]


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_short(one)}" for key, one in value.items())
    if isinstance(value, (list, tuple, Tensor)):
        return ", ".join(_short(one) for one in list(value)[:12])
    return str(value)
