"""Is the score the real change? Predicted against actual leave-one-out, on a model that can be refitted exactly.

    python examples/calibration.py [--out calibration.png] [--removals 100]

A softmax regression on scikit-learn's digits is fitted again without each of many training images, and the real change
of every query's loss is held against the score. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import upweight as uw

TRAIN, QUERIES = 400, 40
PANELS = {"influence": None, "rescaled influence": "rescaled"}


def fit(X: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """scikit-learn adds the losses up: leaving one out changes nothing else in the objective (fixed sum)."""
    return LogisticRegression(C=1.0, tol=1e-9, max_iter=5000).fit(X, y)


def losses(model: LogisticRegression, X: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -model.predict_log_proba(X)[np.arange(len(y)), y]


def agreement(predicted: np.ndarray, real: np.ndarray) -> tuple[float, float]:
    """Slope of real on predicted through the origin, and the correlation."""
    a, b = predicted.ravel(), real.ravel()
    return float(a @ b / (a @ a)), float(np.corrcoef(a, b)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("calibration.png"))
    parser.add_argument("--removals", type=int, default=100)
    arguments = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order] / 16, labels[order]
    X, y, Xq, yq = images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]
    model = fit(X, y)
    unsure = np.argsort(-losses(model, Xq, yq))[:QUERIES]
    Xq, yq = Xq[unsure], yq[unsure]

    converted = uw.from_sklearn(model, X, y)
    scores = {}
    for name, correction in PANELS.items():
        # a tiny damping for the one direction that a softmax leaves free: the same constant on all intercepts
        method = uw.Influence(
            converted.model,
            converted.task,
            curvature="hessian",
            damping=1e-9,
            l2=converted.l2,
            correction=correction,
            progress=False,
        )
        scores[name] = method.fit(converted.train).attribute(converted.tensors(Xq, yq)).values.numpy()

    # the images that matter most to any query, and as many at random
    most = np.argsort(-np.abs(scores["influence"]).max(0))
    half = arguments.removals // 2
    chosen = np.concatenate(
        [most[:half], np.random.default_rng(1).choice(most[half:], arguments.removals - half, replace=False)]
    )
    before = losses(model, Xq, yq)
    real = np.stack(
        [losses(fit(np.delete(X, i, 0), np.delete(y, i)), Xq, yq) - before for i in chosen], axis=1
    )
    draw({name: values[:, chosen] for name, values in scores.items()}, real, arguments.out)


def draw(scores: dict[str, np.ndarray], real: np.ndarray, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(scores), figsize=(8.6, 4.2), sharey=True)
    every = [real, *scores.values()]
    limits = 1.1 * min(values.min() for values in every), 1.05 * max(values.max() for values in every)
    for axis, (name, predicted) in zip(axes, scores.items(), strict=True):
        slope, pearson = agreement(predicted, real)
        print(f"{name}: slope {slope:.3f}, Pearson {pearson:.4f}, {real.size:,} pairs")
        axis.axhline(0, color="0.85", lw=0.8, zorder=0)
        axis.axvline(0, color="0.85", lw=0.8, zorder=0)
        axis.plot(limits, limits, color="0.35", lw=1, ls="--", label="real = predicted")
        axis.scatter(predicted.ravel(), real.ravel(), s=7, alpha=0.4, lw=0, color="#3b5bdb")
        axis.set(xlim=limits, ylim=limits, aspect="equal")
        axis.set_title(f"{name}: slope {slope:.2f}, Pearson {pearson:.3f}", fontsize=10)
        axis.set_xlabel("predicted change of the query's loss, nats", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("real change after refitting without the image, nats", fontsize=9)
    axes[0].legend(loc="upper left", fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
