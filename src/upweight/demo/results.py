"""What a demo run found, in one object: `run.py` fills it, `tables.py` prints it, `page.py` shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from upweight.demo.data import ImageSet
from upweight.demo.network import Recipe
from upweight.demo.proof import Agreement, Detection, RemovalPair, agreement
from upweight.scores import Scores, SelfInfluence

if TYPE_CHECKING:
    from upweight.demo.closing import Closing


@dataclass(frozen=True)
class Settings:
    """What a user may choose.

    Attributes:
        data: ``"digits"``, the name of a data set, or a folder; None means digits, or whatever is in `root`.
        root: where the user's own images are.
        out: folder for the page and the figures.
        n: training images to take.
        seed: decides splits, flips, first weights and batches.
        queries: test images to explain.
        retrain_queries: explained images whose prediction is proved by retraining; 0 leaves the proof out.
        retrain_seeds: retrainings of each.
        flip_share: part of the training labels to flip.
        recipe: how the network is trained.
    """

    data: str | None = None
    root: Path | None = None
    out: Path = Path("runs/demo")
    n: int | None = None
    seed: int = 0
    queries: int = 20
    retrain_queries: int = 10
    retrain_seeds: int = 3
    flip_share: float = 0.1
    recipe: Recipe = field(default_factory=Recipe)


@dataclass(frozen=True)
class DemoRun:
    """Everything a run found.

    Attributes:
        settings: what the user chose.
        images: what the network was trained on and asked about.
        given: the labels the network was trained with, some of them flipped, int64 [train].
        flipped: which of them were flipped, bool [train].
        train_losses: loss on each given label, in nats, float [train].
        accuracy: share of all test images classified right.
        parameters: weights of the network.
        queries: positions of the explained test images, int64 [query].
        predicted: what the network says they are, int64 [query].
        query_losses: loss on their true labels, in nats, float [query].
        scores: influence of every training image on every explained one.
        suspects: influence of every training image on itself.
        detections: how well each score finds the flipped labels.
        removals: what retraining without proponents, and without random images, did.
        closing: what was done about the suspected labels.
        seconds: how long each step took.
    """

    settings: Settings
    images: ImageSet
    given: Tensor
    flipped: Tensor
    train_losses: Tensor
    accuracy: float
    parameters: int
    queries: Tensor
    predicted: Tensor
    query_losses: Tensor
    scores: Scores
    suspects: SelfInfluence
    detections: list[Detection]
    removals: list[RemovalPair]
    closing: Closing
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def agreement(self) -> Agreement | None:
        """The removals together; None if there was no retraining."""
        return agreement(self.removals) if self.removals else None

    def figures(self) -> dict[str, object]:
        """The figures that are printed, ready for JSON."""
        together = self.agreement
        return {
            "data": self.images.name,
            "train": len(self.images.train),
            "flipped": int(self.flipped.sum()),
            "seed": self.settings.seed,
            "test_accuracy": self.accuracy,
            "detection": {
                one.name: {
                    "auroc": one.auroc,
                    "precision": one.precision,
                    "average_precision": one.average_precision,
                }
                for one in self.detections
            },
            "removal": None
            if together is None
            else {
                "removed": len(self.removals[0].proponents.removed),
                "queries": len(self.removals),
                "seeds": len(self.removals[0].proponents.measured),
                **vars(together),
            },
            "repair": {
                "flagged": self.closing.flagged,
                "decided": self.closing.decided,
                "right": self.closing.right,
                "test_accuracy": self.closing.accuracy,
                "test_loss": self.closing.loss,
                "seconds": self.closing.seconds,
            },
            "seconds": self.seconds,
        }
