"""How many directions may an example determine? The LDS of the two duals by damping, on every bank.

    UPWEIGHT_DATA=FOLDER python benchmarks/lds/dual_damping.py digits|concrete|parkinsons|fashion|mnist-mlp [--bank F]

The Fisher matrix of one sampled label an example, and that of the given labels, inverted through their Gram matrix.
Beside every damping stands what n examples determine at it, as a share of n: sum_j s_j / (s_j + damping + l2) / n. The
first model of each recipe; the bank must have been trained by the recipe's own script. The .08 of ``damping="auto"``
was chosen on the queries with even numbers of digits, Concrete, Parkinsons and MNIST's MLP.
"""

from __future__ import annotations

from _banks import BANKS, opened, parser_for
from _methods import as_array
from _suite import split

import upweight as uw
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.krylov import lanczos_quadrature
from upweight.evaluate import lds
from upweight.gradients import Tracker
from upweight.task import FisherKind

TRIED: list[str | float] = ["auto", *(float(f"{10 ** (k / 2):.1g}") for k in range(-12, 1))]
FISHERS: tuple[FisherKind, ...] = ("sampled", "empirical")


def main() -> None:
    arguments = parser_for(BANKS, __doc__).parse_args()
    setting, outcomes = opened(arguments.setting, arguments.bank)
    run, parts = setting.explained(0), split(outcomes)
    examples = uw.Examples(run.train)
    for fisher in FISHERS:
        method = uw.Influence(
            run.model,
            run.task,
            curvature="ggn",
            solver="dual",
            fisher=fisher,
            draws=1,
            seed=run.seed,
            l2=run.l2,
            progress=False,
        ).fit(run.train)
        fisher_matrix = ExactCurvature(
            Tracker(run.model, run.task, examples), examples, fisher=fisher, draws=1, seed=run.seed, l2=run.l2
        )
        values, weights = lanczos_quadrature(fisher_matrix)
        data = (values - run.l2).clamp_min(0)
        for damping in TRIED:
            at = method.with_damping(damping)
            scores = at.attribute(run.query)
            number = next(iter(scores.info["layer_damping"].values()))
            share = float((weights * data / (data + number + run.l2)).sum()) / examples.n
            even, odd = (
                lds(as_array(scores)[p], outcomes.for_queries(p), resamples=2, ceiling=None).value
                for p in parts
            )
            name = f"auto ({number:g})" if damping == "auto" else f"{number:g}"
            print(
                f"{fisher}, {name}: {share:.3f} of a direction an example, "
                f"{even:.3f} on even queries, {odd:.3f} on odd ones",
                flush=True,
            )


if __name__ == "__main__":
    main()
