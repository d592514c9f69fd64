"""The demo's proof: are the flipped labels found, and does retraining without the proponents do what was predicted?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from upweight.demo.network import Recipe, predictions, side_by_side, train_network
from upweight.scores import Scores


@dataclass(frozen=True)
class Detection:
    """How well one score finds the flipped labels when the highest are looked at first.

    Attributes:
        name: the score.
        auroc: chance that a flipped label ranks above an unflipped one; 0.5 is guessing.
        precision: share of flipped labels among the first k, k being how many were flipped.
        average_precision: precision averaged over the ranks of all flipped labels.
        found: share of the flipped labels found after looking at the first 1, 2, ... n examples, float [n].
    """

    name: str
    auroc: float
    precision: float
    average_precision: float
    found: np.ndarray


def detection(name: str, suspicion: Tensor, flipped: Tensor) -> Detection:
    """Compare a suspicion for each example [n] with whether its label was flipped [n].

    >>> detection("loss", torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, False, False, True])).auroc
    0.5
    """
    suspicion, flipped = suspicion.double().cpu(), flipped.cpu()
    hits = flipped[suspicion.argsort(descending=True, stable=True)].double()
    count = int(hits.sum())
    return Detection(
        name=name,
        auroc=float(roc_auc_score(flipped.numpy(), suspicion.numpy())),
        precision=float(hits[:count].mean()),
        average_precision=float(average_precision_score(flipped.numpy(), suspicion.numpy())),
        found=(hits.cumsum(0) / count).numpy(),
    )


def chance(flipped: Tensor) -> Detection:
    """What looking at the examples in random order finds on average."""
    share = float(flipped.double().mean())
    return Detection("chance", 0.5, share, share, np.linspace(1 / len(flipped), 1, len(flipped)))


@dataclass(frozen=True)
class Removal:
    """What leaving some training images out does to one query's loss, in nats: predicted, and seen after retraining.

    Attributes:
        query: row of the query in the scores.
        removed: positions of the training images left out.
        predicted: the sum of their scores.
        measured: loss without them minus loss with them, one entry per seed.
    """

    query: int
    removed: tuple[int, ...]
    predicted: float
    measured: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The measured change, averaged over seeds."""
        return float(np.mean(self.measured))

    @property
    def spread(self) -> float:
        """Standard deviation of the measured change from seed to seed; 0 with one seed."""
        return float(np.std(self.measured, ddof=1)) if len(self.measured) > 1 else 0.0


@dataclass(frozen=True)
class RemovalPair:
    """One query without its top proponents, and without as many random images that carry the same labels."""

    proponents: Removal
    control: Removal


def removal_proof(
    scores: Scores,
    queries: tuple[Tensor, Tensor],
    train: tuple[Tensor, Tensor],
    classes: int,
    rows: Sequence[int],
    removed: int,
    seeds: Sequence[int],
    recipe: Recipe | None = None,
    advance: Callable[[], None] = lambda: None,
) -> list[RemovalPair]:
    """Retrain without each query's top proponents, and without random images of the same class, and compare.

    Args:
        scores: influence of the training images on the queries, in nats.
        queries: their inputs and true labels.
        train: inputs and given labels.
        classes: how many classes there are.
        rows: the queries to prove, as rows of `scores`.
        removed: training images to leave out.
        seeds: each is one more retraining of everything, with its own first weights and batches; the first also draws
            the random images.
        recipe: how the explained network was trained.
        advance: called after every training.

    Returns:
        One pair per query. It costs ``len(seeds) * (1 + 2 * len(rows))`` trainings.
    """
    top = scores.top_k(removed).positions
    generator = np.random.default_rng([seeds[0], 2])
    subsets: list[tuple[int, Tensor]] = []
    for row in rows:
        control = same_labels(top[row], train[1], generator)
        subsets += [(row, top[row]), (row, control)]

    def losses(job: tuple[int, Tensor | None]) -> Tensor:
        seed, without = job
        return predictions(train_network(*train, classes, seed, without, recipe), *queries)[1].double()

    variants = [None, *(subset for _, subset in subsets)]
    jobs = [(seed, without) for seed in seeds for without in variants]
    table = torch.stack(side_by_side(losses, jobs, advance)).view(len(seeds), len(variants), -1)
    change = table[:, 1:] - table[:, :1]  # [seed, subset, query], against the same seed with all the data
    removals = [
        Removal(
            row,
            tuple(subset.tolist()),
            float(scores.values[row, subset].sum()),
            tuple(change[:, j, row].tolist()),
        )
        for j, (row, subset) in enumerate(subsets)
    ]
    return [RemovalPair(*pair) for pair in zip(removals[::2], removals[1::2], strict=True)]


def same_labels(positions: Tensor, labels: Tensor, generator: np.random.Generator) -> Tensor:
    """As many random examples of each label as there are among `positions`, drawn without repetition."""
    drawn = [
        generator.choice(torch.nonzero(labels == label).flatten().numpy(), size=int(count), replace=False)
        for label, count in zip(*labels[positions].unique(return_counts=True), strict=True)
    ]
    return torch.from_numpy(np.concatenate(drawn))


@dataclass(frozen=True)
class Agreement:
    """All removals of the proof together: how far predictions and retraining agree.

    Attributes:
        proponents: mean measured change without the proponents, in nats.
        control: mean measured change without random images of the same class, in nats.
        predicted: mean predicted change without the proponents, in nats.
        predicted_control: mean predicted change without the random images, in nats.
        wins: queries that lost more without their proponents than without random images.
        correlation: Pearson correlation of predicted and measured changes over all removals.
        slope: measured change per predicted change (least squares through the origin); 1 is a perfect size.
    """

    proponents: float
    control: float
    predicted: float
    predicted_control: float
    wins: int
    correlation: float
    slope: float


def agreement(pairs: Sequence[RemovalPair]) -> Agreement:
    """Sum up the proof."""
    predicted = np.array([[pair.proponents.predicted, pair.control.predicted] for pair in pairs])
    measured = np.array([[pair.proponents.mean, pair.control.mean] for pair in pairs])
    return Agreement(
        *measured.mean(0).tolist(),
        *predicted.mean(0).tolist(),
        wins=int((measured[:, 0] > measured[:, 1]).sum()),
        correlation=float(np.corrcoef(predicted.ravel(), measured.ravel())[0, 1]),
        slope=float((predicted * measured).sum() / np.square(predicted).sum()),
    )
