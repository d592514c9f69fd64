"""Near-duplicates: examples that the network sees alike, and that pull at it alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from upweight._trees import digest_of, map_tensors
from upweight.data import Examples
from upweight.gradients import Tracker
from upweight.gradients.rowwise import paired
from upweight.repair.evidence import Evidence
from upweight.task.outputs import OutputTask, split_batch

CLOSE = 0.1
"""Largest distance of near-duplicates, as a share of the median distance to the nearest neighbour."""
ALIKE = 0.9
"""Smallest cosine of the gradients of near-duplicates with the same label."""
MOST_PAIRS = 5000
"""Pairs whose gradients are compared."""


def near_duplicates(evidence: Evidence) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Columns [n] about every example and its nearest neighbour, and how they were judged.

    The score is the cosine distance of the embeddings over the median distance to a nearest neighbour, 1 at most. A
    pair is flagged if its inputs are equal; or if the score is at most `CLOSE` and, where the labels are equal, the
    cosine of the gradients is at least `ALIKE` (equal inputs with different labels pull in different directions).
    """
    examples, labels, neighbours = evidence.examples, evidence.labels, evidence.neighbours
    n = examples.n
    partner, copies = _exact_copies(examples, evidence)
    score = np.ones(n)
    if neighbours is not None:
        distance = np.maximum(1 - neighbours.cosines[:, 0], 0)
        usual = float(np.median(distance)) or float(distance.max()) or 1.0
        score = np.minimum(distance / usual, 1.0)
        partner = np.where(partner < 0, neighbours.positions[:, 0], partner)
    score[copies] = 0.0
    known = partner >= 0
    same = np.ones(n, bool)
    if labels.kind != "none":
        same[known] = labels.values[known] == labels.values[partner[known]]
    close = (score <= CLOSE) & known
    alike = np.flatnonzero(close & ~copies & same)
    compared = alike[np.argsort(score[alike], kind="stable")][:MOST_PAIRS]
    cosine = np.full(n, np.nan)
    if len(compared):
        cosine[compared] = gradient_cosines(evidence, compared, partner[compared])
    flags = copies | (close & ~same) | (np.nan_to_num(cosine, nan=-1.0) >= ALIKE)
    other = "" if labels.kind == "none" else ", other label"
    how = np.where(copies, "exact copy", "embedding and gradient cosine").astype(object)
    rows = {
        "score": score,
        "is_issue": flags,
        "related": np.where(known, partner, -1),
        "detector": np.where(same, how, how + other),
    }
    info = {
        "threshold": f"equal inputs, or a distance of at most {CLOSE:g} of the median one to a nearest neighbour, with "
        f"a gradient cosine of at least {ALIKE:g} where the labels are equal",
        "exact_copies": int(copies.sum()),
        "exact_copies_with_another_label": int((copies & ~same).sum()),
        "pairs_compared": len(compared),
        # Beyond MOST_PAIRS nothing is flagged, and that must be told.
        "pairs_not_compared": len(alike) - len(compared),
    }
    return rows, info


def gradient_cosines(evidence: Evidence, left: Any, right: Any) -> np.ndarray:
    """Cosines of the training gradients of pairs of examples, by positions, [pair]; 1 if both vanish, 0 if one does."""
    examples = evidence.examples
    tracker = Tracker(evidence.model, evidence.task, examples)
    found = []
    for start in range(0, len(left), 64):
        sides = [
            tracker.train(examples.take(p), [examples.ids[i] for i in p])
            for p in (list(map(int, side[start : start + 64])) for side in (left, right))
        ]
        norms = [paired(side, side).double().clamp_min(0).sqrt() for side in sides]
        size = norms[0] * norms[1]
        tiny = torch.finfo(sides[0].dtype).tiny ** 0.5
        cosine = torch.where(size > tiny, paired(*sides).double() / size.clamp_min(tiny), 0.0)
        both = (norms[0] <= tiny) & (norms[1] <= tiny)
        found.append(torch.where(both, 1.0, cosine).clamp(-1, 1).cpu().numpy())
    return np.concatenate(found)


def _exact_copies(examples: Examples, evidence: Evidence) -> tuple[np.ndarray, np.ndarray]:
    """Another example with the same inputs (with another label, if there is one), or -1, [n]; and whether, [n]."""
    has_targets, labels = isinstance(evidence.task, OutputTask), evidence.labels
    groups: dict[str, list[int]] = {}
    for rows in examples.batches(256):
        inputs: Any = rows.batch
        if has_targets:
            positional, keywords, _ = split_batch(rows.batch)
            inputs = [list(positional), keywords]
        for k in range(len(rows)):
            one = map_tensors(inputs, lambda tensor, k=k: tensor[k])
            groups.setdefault(digest_of(one), []).append(rows.start + k)
    partner = np.full(examples.n, -1)
    for members in groups.values():
        firsts = {}  # the first of each label
        for i in members:
            firsts.setdefault(None if labels.kind == "none" else labels.values[i], i)
        for i in members if len(members) > 1 else []:
            contrary = [
                j for j in firsts.values() if labels.kind != "none" and labels.values[j] != labels.values[i]
            ]
            partner[i] = contrary[0] if contrary else members[members[0] == i]
    return partner, partner >= 0
