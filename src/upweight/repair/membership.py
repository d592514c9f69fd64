"""Can one tell what a model was trained on? The loss-threshold attack, as an AUROC."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from upweight.errors import UpweightError


def membership_auroc(members: Tensor, others: Tensor) -> float:
    """Chance that a member's loss is below that of an example that was never trained on (ties count half).

    0.5: the losses give nothing away. Forgotten examples should come to what they have in a model that never saw them,
    which need not be 0.5: they may be easier, or harder, than the others.

    Args:
        members: losses [m] of the examples that may have been trained on.
        others: losses [k] of examples of the same kind that certainly were not.

    Example:
        >>> membership_auroc(torch.tensor([0.1, 0.3]), torch.tensor([0.2, 0.4]))
        0.75

    Source: "Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting" (arXiv 1709.01604).
    """
    if not len(members) or not len(others):
        raise UpweightError(
            f"{len(members)} members and {len(others)} others, expected at least one of each -> give test data"
        )
    losses = torch.cat([members, others]).double().numpy()
    if not np.isfinite(losses).all():
        return math.nan
    ranks = rankdata(-losses)
    m, k = len(members), len(others)
    return float((ranks[:m].sum() - m * (m + 1) / 2) / (m * k))
