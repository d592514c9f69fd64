"""Methods and baselines beside each other: LDS against one bank of retrained models, with intervals and ceiling."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from upweight._file_names import file_name
from upweight.attributors.by_name import BASELINES, METHODS, build, key_of, own_name
from upweight.errors import UpweightError
from upweight.evaluate import subsets as draw
from upweight.evaluate.bank import RetrainingBank
from upweight.evaluate.bootstrap import Estimate
from upweight.evaluate.ceiling import NoiseCeiling, noise_ceiling
from upweight.evaluate.lds import LDS, lds, lds_difference
from upweight.evaluate.outcomes import Outcomes
from upweight.evaluate.records import BankReport
from upweight.experiment import Experiment
from upweight.scores import Scores

__all__ = ["Compared", "Comparison", "Plan", "compare", "default_methods", "scored"]

QUERIES = "query"
"""What the bank calls the experiment's queries."""

DEFAULT = ("ekfac", "grad-dot", "grad-cos")
"""What is evaluated if the experiment names no methods of its own."""


@dataclass(frozen=True)
class Plan:
    """What to retrain.

    Attributes:
        subsets: How many random subsets of the training data.
        seeds: Models trained on each.
        fraction: Share of the training data in a subset.
        seed: Of the drawing of subsets.
        jobs: Models trained at a time.
    """

    subsets: int = 50
    seeds: int = 3
    fraction: float = 0.5
    seed: int = 0
    jobs: int = 1


@dataclass(frozen=True)
class Compared:
    """One method or baseline.

    Attributes:
        name: What it was asked for by.
        baseline: Whether it is one that is shown unasked.
        lds: How well it predicts retrained models.
        scores: What it said.
        seconds: Time to fit and attribute.
    """

    name: str
    baseline: bool
    lds: LDS
    scores: Scores
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """Methods in descending order of their LDS, with what they are judged by.

    Attributes:
        experiment: What was evaluated.
        plan: What was retrained.
        rows: Methods and baselines, the best first.
        ceiling: The highest LDS that noise in retraining lets any scores reach; None with one seed.
        outcomes: What the retrained models measured.
        bank: What the bank did.
        left_out: ``{baseline: why}`` of those that do not apply.
        gains: ``{method: LDS above the best baseline's}``, on the same resamples; empty without a baseline.
    """

    experiment: Experiment
    plan: Plan
    rows: list[Compared]
    ceiling: NoiseCeiling | None
    outcomes: Outcomes
    bank: BankReport
    left_out: dict[str, str] = field(default_factory=dict)
    gains: dict[str, Estimate] = field(default_factory=dict)

    @property
    def best_baseline(self) -> Compared | None:
        """The baseline with the highest LDS."""
        return next((row for row in self.rows if row.baseline), None)

    @property
    def subsets(self) -> int:
        """Subsets that all seeds of were trained on."""
        return self.rows[0].lds.subsets

    def sentence(self) -> str:
        """The result in words."""
        best = next((row for row in self.rows if not row.baseline), self.rows[0])
        text = f"The best method is {best.name}: LDS {best.lds.score}"
        if self.ceiling is not None and np.isfinite(best.lds.corrected):
            text += (
                f", {best.lds.corrected:.0%} of what noise in retraining allows ({self.ceiling.value:.3f})"
            )
        baseline = self.best_baseline
        if baseline is None or best.baseline:
            return text + "."
        gain = self.gains[best.name]
        if gain.low > 0:
            return f"{text}. It beats the best baseline, {baseline.name}, by {gain}."
        verdict = "falls behind" if gain.high < 0 else "is not shown to beat"
        return f"{text}. It {verdict} the best baseline, {baseline.name} (difference {gain})."


def default_methods(experiment: Experiment) -> list[str]:
    """The experiment's own methods, or the usual ones."""
    return list(experiment.methods or DEFAULT)


def scored(experiment: Experiment, spec: str) -> tuple[Scores, float]:
    """Scores of every query by a method, and the seconds it took.

    Raises:
        UpweightError: There is no such method, or it refuses the experiment.
    """
    started = time.perf_counter()
    method = build(spec, experiment.model, experiment.task, experiment.methods, experiment.l2)
    scores = method.fit(experiment.train).attribute(experiment.query)
    if not isinstance(scores, Scores):
        raise UpweightError(
            f"{spec} gave {type(scores).__name__}, expected Scores -> see uw.check_attributor"
        )
    seconds = time.perf_counter() - started
    # A method may read the queries in a form of its own, such as texts: which they were is known here.
    return replace(scores, info=scores.info | {"queries": experiment.query.fingerprint()}), seconds


def compare(
    experiment: Experiment,
    folder: Path,
    methods: Sequence[str] | None = None,
    plan: Plan | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run or resume the bank in ``folder/bank``, score every method and every baseline that applies, and compare.

    Methods are scored before anything is retrained, so that one that refuses the experiment says so at once.

    Args:
        experiment: With its ``train_fn``.
        folder: Of the run: ``bank/``, and ``scores/NAME.safetensors``.
        methods: Names, as `build` takes them; the experiment's own or the usual ones if None.
        plan: What to retrain.
        progress: Show progress bars (in a terminal only).
        say: Told in a few words what happens next.

    Raises:
        UpweightError: The experiment cannot be retrained, a method refuses it, or the bank does.
    """
    plan = plan or Plan()
    if experiment.train_fn is None:
        raise UpweightError(
            f"the experiment {experiment.name!r} has no train_fn, which evaluation needs -> "
            "uw.Experiment(..., train_fn=train_fn) with def train_fn(indices, seed) that returns a trained model"
        )
    chosen = draw.half_subsets(experiment.train.n, plan.subsets, fraction=plan.fraction, seed=plan.seed)
    results, left_out = _all_scores(experiment, methods, folder, say)
    bank = RetrainingBank(
        folder / "bank",
        experiment.train_fn,
        experiment.task,
        experiment.train.n,
        subsets=chosen,
        seeds=plan.seeds,
        settings={"fraction": plan.fraction, "train": experiment.train.fingerprint()},
        n_jobs=plan.jobs,
        progress=progress,
    )
    bank.measure(experiment.query, QUERIES)
    say(f"retrain {plan.subsets} subsets x {plan.seeds} seeds = {plan.subsets * plan.seeds} models")
    report = bank.run()
    outcomes = bank.outcomes(QUERIES)
    say(str(report).splitlines()[0])
    return _judged(experiment, plan, results, left_out, outcomes, report)


NEED_MORE = {
    "el2n": "needs checkpoints of the training run -> uw.EL2N(..., checkpoints=) among the experiment's methods=",
    "aum": "needs checkpoints or a log of the training -> uw.AUM(..., checkpoints=) among the experiment's methods=",
    "confident-learning": "says which labels are wrong and nothing of a query -> upweight audit",
}
"""Baselines that an experiment alone does not allow."""


def _all_scores(
    experiment: Experiment, methods: Sequence[str] | None, folder: Path, say: Callable[[str], None]
) -> tuple[dict[str, tuple[Scores, float]], dict[str, str]]:
    """Scores by name, and why a baseline that nobody asked for is left out."""
    asked = list(dict.fromkeys(methods or default_methods(experiment)))
    results: dict[str, tuple[Scores, float]] = {}
    left_out: dict[str, str] = {}
    for name in asked:
        say(f"score by {name}")
        results[name] = scored(experiment, name)
    for name in _unasked(experiment, asked):
        try:
            results[name] = scored(experiment, name)
        except (UpweightError, ImportError) as error:
            left_out[name] = " ".join(str(error).split())
    left_out |= {name: why for name, why in NEED_MORE.items() if name not in map(key_of, results)}
    for name, (scores, _) in results.items():
        scores.save(folder / "scores" / file_name(name))
    return results, left_out


def _unasked(experiment: Experiment, asked: Sequence[str]) -> list[str]:
    import upweight

    return [
        name
        for name, (attributor, _) in BASELINES.items()
        if name not in {key_of(one) for one in asked}
        and hasattr(upweight, attributor)
        and (name != "bm25" or experiment.holds_text())
    ]


def _judged(
    experiment: Experiment,
    plan: Plan,
    results: Mapping[str, tuple[Scores, float]],
    left_out: dict[str, str],
    outcomes: Outcomes,
    report: BankReport,
) -> Comparison:
    ceiling = noise_ceiling(outcomes)
    rows = [
        Compared(name, is_baseline(name, experiment), lds(scores, outcomes, ceiling=ceiling), scores, seconds)
        for name, (scores, seconds) in results.items()
    ]
    rows.sort(key=lambda row: -np.nan_to_num(row.lds.value, nan=-2.0))
    baseline = next((row for row in rows if row.baseline), None)
    gains = {
        row.name: lds_difference(row.scores, baseline.scores, outcomes)
        for row in rows
        if baseline is not None and not row.baseline
    }
    return Comparison(experiment, plan, rows, ceiling, outcomes, report, left_out, gains)


def is_baseline(name: str, experiment: Experiment) -> bool:
    """Whether a name is that of a baseline, and not of the experiment's own method."""
    key = key_of(name.split(":")[0])
    return key in BASELINES and key not in METHODS and own_name(name, experiment.methods) is None
