"""How well the best possible scores could do, given that retraining itself is noisy.

rho_1   = correlation across subsets between the outcomes of two seeds, mean over queries and pairs of seeds
rho_R   = R rho_1 / (1 + (R-1) rho_1)                                              Spearman-Brown
ceiling = sqrt(rho_R)          what the noiseless truth itself would get against the mean of R seeds
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate.bootstrap import Estimate, check_options, estimate_mean
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.ranks import spearman

__all__ = ["NoiseCeiling", "block_weights", "noise_ceiling", "seeds_for", "spearman_brown"]


def spearman_brown(reliability: float, seeds: float) -> float:
    """Reliability of the mean of several seeds, from that of one.

    Example:
        >>> spearman_brown(0.75, 5)
        0.9375
    """
    return seeds * reliability / (1 + (seeds - 1) * reliability)


def seeds_for(reliability: float, ceiling: float = 0.95) -> float:
    """Seeds per subset that bring the noise ceiling to this height; infinite if one seed tells nothing.

    Example:
        >>> seeds_for(0.5), seeds_for(0.3)
        (10, 22)
    """
    if not 0 < ceiling < 1:
        raise UpweightError(f"ceiling={ceiling}, expected between 0 and 1 -> 0.95 for example")
    if not reliability > 0:
        return math.inf
    if reliability >= 1:
        return 1
    wanted = ceiling**2
    return max(1, math.ceil(wanted * (1 - reliability) / (reliability * (1 - wanted)) - 1e-9))


@dataclass(frozen=True)
class NoiseCeiling:
    """What noise in the outcomes leaves to be predicted.

    Attributes:
        reliability: rho_1, of a single seed.
        one_against_others: One seed's outcomes as if they were scores, against the mean of the others: what "exact
            retraining" would get.
        seeds: R.
    """

    reliability: Estimate
    one_against_others: float
    seeds: int

    @property
    def of_all_seeds(self) -> float:
        """rho_R, of the mean over the seeds."""
        return spearman_brown(max(self.reliability.value, 0.0), self.seeds)

    @property
    def value(self) -> float:
        """The highest LDS that any scores can be expected to reach."""
        return math.sqrt(self.of_all_seeds)

    @property
    def low(self) -> float:
        """The same at the lower end of rho_1's interval."""
        return math.sqrt(spearman_brown(min(max(self.reliability.low, 0.0), 1.0), self.seeds))

    @property
    def high(self) -> float:
        """The same at the upper end of rho_1's interval."""
        return math.sqrt(spearman_brown(min(max(self.reliability.high, 0.0), 1.0), self.seeds))


def noise_ceiling(
    outcomes: Outcomes, *, level: float = 0.95, resamples: int = 200, seed: int = 0
) -> NoiseCeiling | None:
    """The noise ceiling of a bank's outcomes; None with a single seed, which cannot tell noise from signal.

    Args:
        outcomes: From a `RetrainingBank`.
        level: Of confidence.
        resamples: Of the subsets.
        seed: Of the resampling.
    """
    check_options(level, resamples)
    outcomes = outcomes.complete()
    values = outcomes.values  # [subset, seed, query]
    seeds = values.shape[1]
    if seeds < 2:
        return None
    generator = np.random.default_rng(seed)
    weights, blocks = block_weights(outcomes, resamples, generator)
    pairs = list(combinations(range(seeds), 2))
    per_query = np.mean([spearman(values[:, a], values[:, b]) for a, b in pairs], axis=0)
    resampled = np.mean([spearman(values[:, a], values[:, b], weights) for a, b in pairs], axis=0)
    others = [
        spearman(values[:, r], np.delete(values, r, axis=1).mean(axis=1)) for r in range(seeds)
    ]  # [seed][query]
    reliability = estimate_mean(per_query, resampled, blocks, level, generator, len(outcomes.masks)).within(
        -1, 1
    )
    return NoiseCeiling(
        reliability, float(np.nanmean(others)) if np.isfinite(others).any() else math.nan, seeds
    )


def block_weights(
    outcomes: Outcomes, resamples: int, generator: np.random.Generator
) -> tuple[np.ndarray, int]:
    """How often each subset counts in each resample, [resample, subset], and the number of blocks drawn from.

    Subsets that were drawn as a pair are resampled as one.
    """
    blocks, index = np.unique(np.asarray(outcomes.blocks), return_inverse=True)
    counts = generator.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=resamples)
    return counts[:, index].astype(np.float64), len(blocks)
