"""Which detector finds real label errors? CIFAR-10 with CIFAR-10N's human labels, and with a tenth flipped at random.

    UPWEIGHT_DATA=FOLDER python benchmarks/label_noise.py [--noise worse aggregate flips memorised] [--seeds 0 1 2]

A small convolutional network (`_cifar10n.py`) is trained on 10,000 images with the noisy labels; checkpoints are kept.
Every detector ranks the labels; average precision, AUROC and the recall among the first tenth and among as many as are
wrong are against the true labels: of one seed with a 95 % bootstrap interval over images, of several as their mean with
the least and the greatest. Out-of-fold probabilities (confident learning) are of 3 more networks, each trained on
two thirds. "memorised" is "worse" with a weight decay of 5e-4, with which most wrong labels are learnt by heart.

Choices were made beforehand: "early" is the checkpoint after 7 of 20 epochs, EL2N takes those up to epoch 3, TracIn and
AUM all of them. Trained networks and scores are kept in the bank; with them there, the table is made again in seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cifar10n import DECAY, EPOCHS, Checkpoint, Noisy, accuracy, data, network, test_data, train
from safetensors.torch import load_file, save_file
from torch import nn

import upweight as uw
from upweight.attributors.baselines.confident_learning import _out_of_fold
from upweight.repair.evidence import Evidence, Options
from upweight.repair.suspicion import suspicion
from upweight.repair.thresholds import expected_precision_cut
from upweight.repair.validation_effect import ValidationEffect

KEPT = (1, 2, 3, 5, 7, 10, 14, 20)
EARLY, EL2N_UP_TO = 7, 3
FOLDS = 3
TRUSTED = 1000
INSPECTED = 0.1
"""Share of the images after which recall is given, beside the noise rate."""
PRECISIONS = (0.5, 0.8, 0.9)
SETTINGS = {
    "worse": ("worse", DECAY),
    "aggregate": ("aggregate", DECAY),
    "flips": ("flips", DECAY),
    "memorised": ("worse", 5e-4),
}
"""What is trained: (labels, weight decay)."""
TASK = uw.Classification()

Run = tuple[nn.Module, dict[int, Checkpoint]]


# Trained networks, kept -----------------------------------------------------------------------------------------------


def trained(noise: str, images: Noisy, seed: int, bank: Path) -> Run:
    """The network trained on the noisy labels, and its checkpoints by epoch."""
    path = bank / f"{noise}-{len(images.given)}-{seed}.safetensors"
    if not path.exists():
        started = time.process_time()
        _, kept = train(images.x, images.given, seed, KEPT, decay=SETTINGS[noise][1])
        tensors = {f"{epoch}/{name}": t for epoch, (state, _) in zip(KEPT, kept) for name, t in state.items()}
        tensors |= {f"{epoch}/rate": torch.tensor(rate) for epoch, (_, rate) in zip(KEPT, kept)}
        tensors["seconds"] = torch.tensor(time.process_time() - started)
        save_file(tensors, path)
    stored = load_file(path)
    checkpoints = {}
    for epoch in KEPT:
        names = [name for name in stored if name.startswith(f"{epoch}/") and not name.endswith("/rate")]
        state = {name.split("/", 1)[1]: stored[name] for name in names}
        checkpoints[epoch] = (state, float(stored[f"{epoch}/rate"]))
    model = network()
    model.load_state_dict(checkpoints[KEPT[-1]][0])
    return model.eval(), checkpoints


def out_of_fold(noise: str, images: Noisy, seed: int, bank: Path) -> tuple[np.ndarray, float]:
    """Probabilities by networks that did not see the image, and the CPU seconds to train them."""
    path = bank / f"{noise}-{len(images.given)}-{seed}-folds.npz"
    if not path.exists():
        started = time.process_time()

        def train_fn(indices: np.ndarray, seed: int) -> nn.Module:
            return train(images.x[indices], images.given[indices], seed, decay=SETTINGS[noise][1])[0]

        examples = uw.Examples((images.x, images.given))
        found = _out_of_fold(examples, TASK, images.given.numpy(), train_fn, FOLDS, seed, False)
        np.savez(path, probabilities=found, seconds=time.process_time() - started)
    with np.load(path) as stored:
        return stored["probabilities"], float(stored["seconds"])


# Detectors ------------------------------------------------------------------------------------------------------------


def detectors(
    run: Run, images: Noisy, probabilities: np.ndarray | None, decay: float
) -> dict[str, tuple[str, Callable[[], Any]]]:
    """{name: (kind, function without arguments that returns scores [n])}; kinds are "influence" and "other"."""
    model, kept = run
    pair = (images.x, images.given)
    states, rates = [state for state, _ in kept.values()], [max(rate, 1e-6) for _, rate in kept.values()]
    early = network().eval()
    early.load_state_dict(kept[EARLY][0])
    few = [state for epoch, (state, _) in kept.items() if epoch <= EL2N_UP_TO]

    def own(method: Any) -> Callable[[], Any]:
        return lambda: method.fit(pair).self_influence().values.numpy()

    def seen(name: str, **options: Any) -> Callable[[], Any]:
        return lambda: suspicion(
            name, Evidence(model, TASK, uw.Examples(pair), Options(progress=False, **options))
        )

    quiet = {"progress": False}
    si = {
        curvature: uw.Influence(model, TASK, curvature=curvature, **quiet)
        for curvature in ("identity", "diagonal", "kfac")
    }
    fitted: list[uw.Influence] = []

    def ekfac(damping: Any) -> Any:
        """Self-influence by one fit of EK-FAC for all dampings."""
        if not fitted:
            fitted.append(uw.Influence(model, TASK, **quiet).fit(pair))
        return fitted[0].with_damping(damping).self_influence().values.numpy()

    def harm() -> Any:
        """What each image does to the mean loss of the first thousand test images, whose labels are right."""
        ekfac("auto")
        held_out = uw.Examples(tuple(t[:TRUSTED] for t in test_data()))
        return -ValidationEffect(fitted[0].with_damping(decay), held_out).removal()

    def left_out() -> Any:
        """Loss without the example itself, as predicted: its loss and its self-influence."""
        return own(uw.Loss(model, TASK, **quiet))() + ekfac(decay)

    last = r"^12\."
    traced = {"checkpoints": states, "learning_rates": rates, **quiet}
    return {
        "random": ("other", lambda: np.random.default_rng(0).random(len(images.given))),
        "loss": ("other", own(uw.Loss(model, TASK, **quiet))),
        "margin": ("other", own(uw.Margin(model, TASK, **quiet))),
        "loss, early": ("other", own(uw.Loss(early, TASK, **quiet))),
        "margin, early": ("other", own(uw.Margin(early, TASK, **quiet))),
        "EL2N": ("other", own(uw.EL2N(model, TASK, checkpoints=few, **quiet))),
        "AUM": ("other", own(uw.AUM(model, TASK, checkpoints=states, **quiet))),
        "kNN, 10": ("other", seen("knn", neighbours=10)),
        "kNN, 50": ("other", seen("knn", neighbours=50)),
        "confident learning": ("other", seen("confident_learning", probabilities=probabilities)),
        "self-influence, identity": ("influence", own(si["identity"])),
        "self-influence, diagonal": ("influence", own(si["diagonal"])),
        "self-influence, K-FAC": ("influence", own(si["kfac"])),
        "self-influence, EK-FAC": ("influence", lambda: ekfac("auto")),
        "self-influence, EK-FAC, damping = weight decay": ("influence", lambda: ekfac(decay)),
        "loss + self-influence, EK-FAC": ("influence", left_out),
        f"harm to {TRUSTED:,} clean images, EK-FAC": ("influence", harm),
        "self-influence, EK-FAC, last layer": (
            "influence",
            own(uw.Influence(model, TASK, parameters=last, **quiet)),
        ),
        "self-influence, EK-FAC, early": ("influence", own(uw.Influence(early, TASK, **quiet))),
        "TracIn": ("influence", own(uw.TracIn(model, TASK, **traced))),
        "TracIn, last layer": ("influence", own(uw.TracIn(model, TASK, parameters="last_layer", **traced))),
        "margin + kNN (mean rank)": ("other", seen("combined")),
        "margin + kNN + AUM + confident learning (mean rank)": (
            "other",
            seen("combined", checkpoints=states, probabilities=probabilities),
        ),
    }


def scored(
    noise: str,
    images: Noisy,
    run: Run,
    probabilities: np.ndarray,
    path: Path,
    names: list[str] | None,
    skip: list[str],
) -> dict[str, dict[str, Any]]:
    """{detector: scores, kind, CPU seconds}, kept one file a detector."""
    path.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, (kind, function) in detectors(run, images, probabilities, SETTINGS[noise][1]).items():
        if "confident learning" in name and probabilities is None:
            continue
        file = path / ("".join(c if c.isalnum() else "-" for c in name.lower()) + ".npz")
        if not file.exists():
            if name in skip or (names and name not in names):
                continue
            started = time.process_time()
            values = np.asarray(function(), dtype=np.float64)
            np.savez(file, values=values, seconds=time.process_time() - started)
            print(f"{noise}: {name} in {time.process_time() - started:.1f} s", file=sys.stderr, flush=True)
        with np.load(file) as stored:
            found[name] = {"values": stored["values"], "kind": kind, "seconds": float(stored["seconds"])}
    return found


# Tables ---------------------------------------------------------------------------------------------------------------


def table(found: dict[str, dict[str, Any]], wrong: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for name, one in found.items():
        inspect = [int(INSPECTED * len(wrong)), int(wrong.sum())]
        result = uw.label_noise(one["values"], wrong, inspect=inspect, resamples=1000)
        rows.append(
            {
                "detector": name,
                "kind": one["kind"],
                "auroc": [result.auroc.value, result.auroc.low, result.auroc.high],
                "average_precision": [
                    result.average_precision.value,
                    result.average_precision.low,
                    result.average_precision.high,
                ],
                "recall": [result.recall[k].value for k in inspect],
                "seconds": one["seconds"],
            }
        )
    return sorted(rows, key=lambda row: -row["average_precision"][0])


def over_seeds(tables: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The mean over seeds of every figure, of detectors scored with all of them; brackets: least and greatest."""
    by_name = [{row["detector"]: row for row in rows} for rows in tables]

    def spread(name: str, figure: str) -> list[float]:
        values = [rows[name][figure][0] for rows in by_name]
        return [float(np.mean(values)), min(values), max(values)]

    rows = [
        {
            "detector": name,
            "kind": row["kind"],
            "auroc": spread(name, "auroc"),
            "average_precision": spread(name, "average_precision"),
            "recall": np.mean([rows[name]["recall"] for rows in by_name], 0).tolist(),
            "seconds": float(np.mean([rows[name]["seconds"] for rows in by_name])),
        }
        for name, row in by_name[0].items()
        if all(name in rows for rows in by_name)
    ]
    return sorted(rows, key=lambda row: -row["average_precision"][0])


def thresholds(
    found: dict[str, dict[str, Any]], images: Noisy, run: Run, probabilities: np.ndarray | None
) -> list[dict[str, Any]]:
    """What the wanted precision of `audit` becomes in reality, by the evidence that it is calibrated with."""
    examples, wrong = uw.Examples((images.x, images.given)), images.wrong.numpy()
    rows = []
    held_out = uw.Examples(tuple(t[:TRUSTED] for t in test_data()))
    for source, options, trusted in (
        ("neighbours", {}, None),
        (f"neighbours, {TRUSTED:,} clean images", {}, held_out),
        ("out-of-fold", {"probabilities": probabilities}, None),
    ):
        if source == "out-of-fold" and probabilities is None:
            continue
        evidence = Evidence(run[0], TASK, examples, Options(progress=False, **options), trusted)
        posterior = evidence.posterior
        assert posterior is not None
        for name in ("loss", "AUM", "confident learning"):
            if name not in found:
                continue
            for precision in PRECISIONS:
                flags = expected_precision_cut(found[name]["values"], posterior.wrong, precision)
                right = posterior.suggested[flags] == images.true.numpy()[flags]
                rows.append(
                    {
                        "evidence": source,
                        "detector": name,
                        "wanted": precision,
                        "flagged": int(flags.sum()),
                        "precision": float(wrong[flags].mean()) if flags.any() else None,
                        "recall": float(flags[wrong].mean()),
                        "suggestions_right": float(right.mean()) if flags.any() else None,
                        "noise_estimated": posterior.info["noise_rate"],
                    }
                )
    return rows


def markdown(noise: str, facts: dict[str, Any]) -> str:
    def three(v: list[float]) -> str:
        return f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]"

    tenth, rate = f"{INSPECTED:.0%}", f"{facts['noise']:.0%}"
    lines = [
        f"\n### {noise}: {facts['noise']:.1%} of {facts['n']:,} labels wrong\n",
        *(
            f"Seed {run['seed']}: test accuracy {run['test_accuracy']:.1%}; the network agrees with "
            f"{run['given_fitted']:.1%} of the given labels, with {run['wrong_fitted']:.1%} of the wrong ones."
            for run in facts["runs"]
        ),
        f"\n| detector | average precision | AUROC | recall at {tenth} | at {rate} | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        name = f"**{row['detector']}**" if row["kind"] == "influence" else row["detector"]
        lines.append(
            f"| {name} | {three(row['average_precision'])} | {three(row['auroc'])} | {row['recall'][0]:.3f} | "
            f"{row['recall'][1]:.3f} | {row['seconds']:.1f} |"
        )
    lines += [
        f"\nSeed {facts['runs'][0]['seed']}:",
        "\n| threshold by | detector | wanted precision | flagged | real precision | recall | suggestions right |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in facts["thresholds"]:
        real, right = (
            "-" if row[key] is None else f"{row[key]:.2f}" for key in ("precision", "suggestions_right")
        )
        lines.append(
            f"| {row['evidence']} | {row['detector']} | {row['wanted']:.2f} | {row['flagged']:,} | {real} | "
            f"{row['recall']:.2f} | {right} |"
        )
    return "\n".join(lines)


def measured(noise: str, images: Noisy, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One trained network: how well it learned, and every detector's figures."""
    run = trained(noise, images, seed, arguments.bank)
    folds = "confident learning" not in arguments.skip
    probabilities, fold_seconds = out_of_fold(noise, images, seed, arguments.bank) if folds else (None, 0.0)
    folder = arguments.bank / f"scores-{noise}-{arguments.n}-{seed}"
    found = scored(noise, images, run, probabilities, folder, arguments.only, arguments.skip)
    for name in ("confident learning", "margin + kNN + AUM + confident learning (mean rank)"):
        if name in found:
            found[name]["seconds"] += fold_seconds
    wrong = images.wrong
    return {
        "seed": seed,
        "test_accuracy": accuracy(run[0], *test_data()),
        "given_fitted": accuracy(run[0], images.x, images.given),
        "wrong_fitted": accuracy(run[0], images.x[wrong], images.given[wrong]),
        "rows": table(found, wrong.numpy()),
        "thresholds": thresholds(found, images, run, probabilities) if seed == arguments.seeds[0] else [],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--noise", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of trained networks")
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/cifar10n"))
    parser.add_argument("--skip", nargs="+", default=[], metavar="DETECTOR", help="do not score these")
    parser.add_argument("--only", nargs="+", metavar="DETECTOR", help="score only these, beside what is kept")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.bank.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = {}
    for noise in arguments.noise:
        images = data(SETTINGS[noise][0], arguments.n)
        runs = [measured(noise, images, seed, arguments) for seed in arguments.seeds]
        tables = [run["rows"] for run in runs]
        facts[noise] = {
            "n": arguments.n,
            "noise": float(images.wrong.float().mean()),
            "recipe": {"epochs": EPOCHS, "decay": SETTINGS[noise][1]},
            "runs": runs,
            "rows": over_seeds(tables) if len(tables) > 1 else tables[0],
            "thresholds": runs[0]["thresholds"],
        }
        print(markdown(noise, facts[noise]), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
