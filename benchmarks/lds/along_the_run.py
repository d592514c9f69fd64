"""What EK-FAC's scores are worth at every checkpoint of a run and on average, and how close its end is to a minimum.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/along_the_run.py fashion|digits [--bank runs/banks/fashion]

Prints, for the first model of a recipe: the LDS of EK-FAC with automatic damping at each of twenty checkpoints; of
their mean, of the mean with equal weights, and of parts of the run; then the norm of the training objective's gradient
at the end, and how far the best damped Gauss-Newton step on random halves of the data lowers that half's objective
(what damping="auto" of the exact curvature looks up). On the queries with even numbers, on which choices are made.
"""

from __future__ import annotations

import numpy as np
from _banks import opened, parser_for
from _methods import as_array
from _suite import FIRST_SEED, Setting

import upweight as uw
from upweight.curvature.auto_damping import Halves, auto_damping
from upweight.curvature.exact import ExactCurvature
from upweight.evaluate import Outcomes, lds
from upweight.gradients import Tracker

LENGTHS = {"fashion": 20, "digits": 300}
"""Epochs (or steps) of the run."""
CHECKPOINTS = 20


def along(setting: Setting, ends: list[int], outcomes: Outcomes) -> None:
    """LDS at every checkpoint and of means over them."""
    train, query = setting.data()
    even = np.arange(len(query[1]))[::2]
    truth = outcomes.for_queries(even)
    asked = query[0][::2], query[1][::2]
    model, kept = setting.train(np.arange(len(train[1])), FIRST_SEED, tuple(ends))
    scores, shares = [], []
    for end, (state, _) in zip(ends, kept, strict=True):
        model.load_state_dict(state)
        found = uw.Influence(model, setting.task, progress=False).fit(train).attribute(asked)
        scores.append(as_array(found))
        shares.append(scores[-1] / np.sqrt((scores[-1] ** 2).mean(1, keepdims=True)))
        print(f"after {end}: {lds(scores[-1], truth, resamples=2).value:.3f}", flush=True)
    half = CHECKPOINTS // 2
    parts = {"all": slice(None), "first half": slice(half), "second half": slice(half, None)}
    for name, part in {**parts, "every second": slice(1, None, 2)}.items():
        plain, equal = (lds(np.mean(s[part], 0), truth, resamples=2).value for s in (scores, shares))
        print(f"mean of {name}: {plain:.3f}, with equal weights {equal:.3f}")


def at_the_end(setting: Setting) -> None:
    """Whether the model that is explained is at a minimum of its objective."""
    run = setting.explained(0)
    examples = uw.Examples(run.train)
    operator = ExactCurvature(Tracker(run.model, run.task, examples), examples, l2=run.l2, memory="4GB")
    gradient = Halves(operator).gradients().mean(1)
    found = auto_damping(operator)
    after = min(found.tried.values())
    print(f"|grad J| {float(gradient.norm()):.3g}")
    print(
        f"a half's objective {found.before:.4g}, {after:.4g} after the best step (damping {found.value:.2g})"
    )


def main() -> None:
    """Parse the command line, run, print."""
    arguments = parser_for(LENGTHS, __doc__).parse_args()
    setting, outcomes = opened(arguments.setting, arguments.bank)
    length = LENGTHS[arguments.setting]
    ends = [length * k // CHECKPOINTS for k in range(1, CHECKPOINTS + 1)]
    along(setting, ends, outcomes)
    at_the_end(setting)


if __name__ == "__main__":
    main()
