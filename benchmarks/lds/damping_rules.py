"""Relative to what should a layer be damped? The LDS of K-FAC and EK-FAC by three rules, on every bank.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/damping_rules.py digits|concrete|parkinsons|fashion|mnist-mlp [--bank F]

"mean" is a multiple of each layer's mean eigenvalue, ``trace(H_l) / p_l``; "example" one of what an example adds to the
layer's trace in the mean, ``trace(H_l) / n``; "auto" the larger of .1 mean and .02 example; a number is the damping of
all layers. The first model of each recipe; the bank must have been trained by the recipe's own script. The .02 was
chosen on the queries with even numbers of the first four, before MNIST's MLP was looked at.
"""

from __future__ import annotations

from _banks import BANKS, opened, parser_for
from _methods import as_array
from _suite import split

import upweight as uw
from upweight.evaluate import lds

TRIED: list[str | float] = [
    "auto",
    *(f"{number} mean" for number in (0.01, 0.03, 0.1, 0.3, 1)),
    *(f"{number} example" for number in (0.003, 0.01, 0.02, 0.03, 0.1)),
    *(1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
]
CURVATURES = ("kfac", "ekfac")


def main() -> None:
    parser = parser_for(BANKS, __doc__)
    parser.add_argument(
        "--fisher", default="auto", help="exact, sampled (four labels an example) or empirical"
    )
    arguments = parser.parse_args()
    setting, outcomes = opened(arguments.setting, arguments.bank)
    run, parts = setting.explained(0), split(outcomes)
    options = {"fisher": arguments.fisher, "progress": False}
    for curvature in CURVATURES:
        method = uw.Influence(run.model, run.task, curvature=curvature, **options).fit(run.train)
        for damping in TRIED:
            scores = as_array(method.with_damping(damping).attribute(run.query))
            even, odd = (
                lds(scores[p], outcomes.for_queries(p), resamples=2, ceiling=None).value for p in parts
            )
            print(f"{curvature}, {damping}: {even:.3f} on even queries, {odd:.3f} on odd ones", flush=True)


if __name__ == "__main__":
    main()
