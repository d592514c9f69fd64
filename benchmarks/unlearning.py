"""Unlearning Fashion-MNIST: how near to a really retrained model, and how soon.

    UPWEIGHT_DATA=FOLDER python benchmarks/unlearning.py [--bank runs/banks/unlearning] [--seeds 3] [--out unlearning]

The MLP of benchmarks/lds/fashion.py (784-512-256-128-10) on 6,144 images: SGD with momentum .9, weight decay 5e-3,
batches of 64, 20 epochs, the rate falling from .03 to 0 along a cosine, so that training ends near a minimum and not
in the middle of its own noise. Forgotten are 1 %, 5 % and 10 % of the images at random, and all of one class.

Reference: retraining from scratch without them. "Matched" retraining has the same initial weights and the same order
of the data as the model itself, the forgotten images dropped from their batches, so that what differs is the data
alone. Distances are to the matched model, relative to doing nothing (1: as far from it as the model as it was):

    parameters   |theta - theta_r| / |theta_0 - theta_r|
    forgotten    the same for the mean total variation distance of the predicted distributions on the forgotten images
    test         the same on 5,000 test images

Beside them stands what a model that was retrained with another seed has: of its distance, nothing is the data's.

Options were chosen on other forgotten images (10 % at random, drawn with another seed) and model seed 0, by the
distance of predictions on the forgotten ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "lds"))
from _data import grey_images
from fashion import TRAIN, network

import upweight as uw
from upweight.curvature.solvers.cg import ConjugateGradient
from upweight.repair.membership import membership_auroc

TEST = 5000
CLASS = 6  # shirts
SETTINGS = ("1 %", "5 %", "10 %", "one class")
RATE, MOMENTUM, L2, BATCH, EPOCHS = 0.03, 0.9, 5e-3, 64, 20
EKFAC: dict[str, Any] = {"curvature": "ekfac", "curvature_examples": 1500}
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient"},
    "last layer": {"method": "last_layer"},
    "influence, EK-FAC": {"method": "influence", "damping": 1e-2, "step_size": 1.0, **EKFAC},
    "newton, EK-FAC": {"method": "newton", "damping": 1e-2, "step_size": 1.0, **EKFAC},
    "newton, EK-FAC, line search": {"method": "newton", "damping": 1e-2, **EKFAC},
    "trust region, EK-FAC": {"method": "trust_region", "damping": 1e-2, "steps": 8, **EKFAC},
    "corrected, EK-FAC": {"method": "corrected", "damping": 1e-2, "steps": 3, **EKFAC},
    "fine-tuning by EK-FAC": {"method": "fine_tune", "damping": 1e-2, "steps": 2, **EKFAC},
    "newton, GGN by CG on half the data": {
        "method": "newton",
        "damping": 1e-2,
        "step_size": 1.0,
        "curvature": "ggn",
        "curvature_examples": 3000,
        "solver": ConjugateGradient(rtol=0.03, max_iter=30),
        "memory": "3GB",
    },
    "newton, GGN by CG": {
        "method": "newton",
        "damping": 1e-2,
        "step_size": 1.0,
        "curvature": "ggn",
        "solver": ConjugateGradient(rtol=0.03, max_iter=100),
        "memory": "3GB",
    },
}


def forgotten(setting: str) -> np.ndarray:
    """Positions of the images to forget, ascending."""
    if setting == "one class":
        return np.flatnonzero(grey_images("fashion_mnist", "train", TRAIN)[1].numpy() == CLASS)
    share, seed = (0.1, 1) if setting == "tuning" else (float(setting.split()[0]) / 100, 0)
    return np.sort(np.random.default_rng(seed).permutation(TRAIN)[: round(share * TRAIN)])


def train(removed: np.ndarray, seed: int) -> nn.Module:
    """Trained as the recipe says; the order is that of all images, without those that are removed."""
    x, y = grey_images("fashion_mnist", "train", TRAIN)
    torch.manual_seed(seed)
    model = network()
    keep = torch.ones(TRAIN, dtype=torch.bool)
    keep[torch.from_numpy(removed)] = False
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=L2, fused=True)
    done, total = 0, EPOCHS * TRAIN // BATCH
    for _ in range(EPOCHS):
        for batch in torch.randperm(TRAIN, generator=generator).split(BATCH):
            optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * done / total)) / 2
            done += 1
            chosen = batch[keep[batch]]
            if len(chosen):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
    return model.eval()


def trained(bank: Path, setting: str, seed: int) -> tuple[nn.Module, float]:
    """A model from the bank, trained if it is not there; and the seconds its training took."""
    file = bank / f"{setting.replace(' ', '').replace('%', 'percent')}-{seed}.safetensors"
    if not file.exists():
        bank.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        model = train(np.zeros(0, dtype=int) if setting == "all" else forgotten(setting), seed)
        seconds = torch.tensor(time.process_time() - start)
        save_file({**model.state_dict(), "seconds": seconds}, file)
    kept = load_file(file)
    seconds = float(kept.pop("seconds"))
    model = network()
    model.load_state_dict(kept)
    return model.eval(), seconds


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).double().softmax(1)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum(1).mean() / 2)


class Setting:
    """One set of images to forget: the models that were retrained without them, and what they say."""

    def __init__(self, bank: Path, name: str, seeds: int) -> None:
        self.name, self.removed = name, forgotten(name)
        self.train = grey_images("fashion_mnist", "train", TRAIN)
        self.test = grey_images("fashion_mnist", "test", TEST)
        self.models = [trained(bank, "all", s)[0] for s in range(seeds)]
        found = [trained(bank, name, s) for s in range(seeds)]
        self.retrained = [model for model, _ in found]
        self.seconds = float(np.mean([seconds for _, seconds in found]))

    def accuracy(self, model: nn.Module, which: str) -> float:
        x, y = self.test
        if which == "test":
            if self.name == "one class":  # of the classes that are left
                x, y = x[y != CLASS], y[y != CLASS]
        elif which == "forgotten":
            x, y = (t[torch.from_numpy(self.removed)] for t in self.train)
        return float((probabilities(model, x).argmax(1) == y).double().mean())

    def membership(self, model: nn.Module) -> float:
        x, y = (t[torch.from_numpy(self.removed)] for t in self.train)
        xt, yt = self.test
        if self.name == "one class":
            xt, yt = xt[yt == CLASS], yt[yt == CLASS]
        with torch.no_grad():
            mine, others = (F.cross_entropy(model(a), b, reduction="none") for a, b in ((x, y), (xt, yt)))
        return membership_auroc(mine, others)

    def figures(self, model: nn.Module, seed: int) -> dict[str, float]:
        """How far a model is from retraining, and doing nothing from it."""
        start, retrained = self.models[seed], self.retrained[seed]
        found = {
            "parameters": float(
                (flat(model) - flat(retrained)).norm() / (flat(start) - flat(retrained)).norm()
            )
        }
        for name, x in (("forgotten", self.train[0][torch.from_numpy(self.removed)]), ("test", self.test[0])):
            p, p0, theirs = (probabilities(m, x) for m in (model, start, retrained))
            found[f"{name}_gap"], found[f"{name}_nothing"] = (
                total_variation(p, theirs),
                total_variation(p0, theirs),
            )
            found[name] = found[f"{name}_gap"] / found[f"{name}_nothing"]
        for name in ("test", "forgotten"):
            found[f"{name}_accuracy"] = self.accuracy(model, name)
            found[f"{name}_accuracy_retrained"] = self.accuracy(retrained, name)
        return {
            **found,
            "membership": self.membership(model),
            "membership_retrained": self.membership(retrained),
        }


def fine_tuned(
    model: nn.Module, setting: Setting, epochs: int, rate: float = 3e-3
) -> tuple[nn.Module, float]:
    """The baseline: the same optimiser at a lower rate on the kept images."""
    start = time.process_time()
    copy = network()
    copy.load_state_dict(model.state_dict())
    kept = torch.from_numpy(np.setdiff1d(np.arange(TRAIN), setting.removed))
    x, y = setting.train
    optimizer = torch.optim.SGD(copy.parameters(), rate, MOMENTUM, weight_decay=L2)
    generator = torch.Generator().manual_seed(1000)
    for _ in range(epochs):
        for batch in kept[torch.randperm(len(kept), generator=generator)].split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(copy(x[batch]), y[batch]).backward()
            optimizer.step()
    return copy.eval(), time.process_time() - start


def random_step(model: nn.Module, length: float) -> nn.Module:
    """A step of the same length in a random direction."""
    copy = network()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(p.shape, generator=generator) for p in copy.parameters()]
    size = float(torch.cat([s.flatten() for s in steps]).norm())
    with torch.no_grad():
        for p, s in zip(copy.parameters(), steps):
            p += length / size * s
    return copy.eval()


def apply(setting: Setting, seed: int, options: dict[str, Any]) -> tuple[nn.Module, float, dict[str, Any]]:
    repair = uw.unlearn(
        setting.models[seed],
        uw.Classification(),
        setting.train,
        setting.removed,
        **{"l2": L2, "progress": False, **options},
    )
    return repair.model, repair.evidence["processor_seconds"], repair.evidence


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/unlearning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("unlearning"))
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--train", action="store_true", help="only fill the bank")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files hold, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([row for file in arguments.table for row in json.loads(file.read_text())]))
        return
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.settings.split(","):
        setting = Setting(arguments.bank, name, arguments.seeds)
        if arguments.train:
            print(name, f"{setting.seconds:.1f} s", flush=True)
            continue
        for seed in range(arguments.seeds):
            for method, model, seconds, evidence in attempts(setting, seed):
                row = {"setting": name, "seed": seed, "method": method, "seconds": seconds}
                row |= setting.figures(model, seed) | {"ratio": seconds / setting.seconds}
                row |= {"evidence_seconds": evidence["evidence_processor_seconds"] if evidence else 0.0}
                if evidence:
                    row |= {"trust": evidence["objective"]["trust_ratio"]}
                    row |= {"steps": [r["step_size"] for r in evidence["steps"]]}
                rows.append(row)
                print(line(row), flush=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def attempts(setting: Setting, seed: int) -> Iterator[tuple[str, nn.Module, float, dict[str, Any] | None]]:
    """(method, its model, seconds, evidence) of doing nothing, of retraining with another seed, and of every method."""
    model, others = setting.models[seed], setting.retrained
    yield "nothing", model, 0.0, None
    yield "retrained, another seed", others[(seed + 1) % len(others)], setting.seconds, None
    for epochs in (1, 4):
        yield f"fine-tuning, {epochs} epochs", *fine_tuned(model, setting, epochs), None
    moved = 0.0
    for method, options in METHODS.items():
        found, seconds, evidence = apply(setting, seed, options)
        moved = max(moved, evidence["parameters"]["moved"])
        yield method, found, seconds, evidence
    yield "random step, the longest", random_step(model, moved), 0.0, None


def line(row: dict[str, Any]) -> str:
    distances = " ".join(f"{key} {row[key]:.3f}" for key in ("parameters", "forgotten", "test"))
    beside = " ".join(
        f"{key} {row[key]:.4f} ({row[key + '_retrained']:.4f})"
        for key in ("test_accuracy", "forgotten_accuracy", "membership")
    )
    more = f"{row['seconds']:.1f} s, {row['ratio']:.0%} {row.get('trust')} {row.get('steps')}"
    return f"{row['setting']:10} {row['seed']} {row['method']:34} {distances} {beside} {more}"


def table(rows: list[dict[str, Any]]) -> str:
    """Means over seeds (of the seconds the median) as Markdown, a table for each setting."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        seeds = len({row["seed"] for row in mine})
        words = "parameters | forgotten | test | test accuracy | on the forgotten | membership | time ratio | evidence"
        parts.append(
            f"**{setting}** ({seeds} seeds)\n\n| method | {words} |\n|---|---|---|---|---|---|---|---|---|"
        )
        means = {
            key: float(np.mean([row[key] for row in mine])) for key in mine[0] if key.endswith("_retrained")
        }
        parts[-1] += (
            f"\n| retrained, matched | 0 | 0 | 0 | {means['test_accuracy_retrained']:.4f} | "
            f"{means['forgotten_accuracy_retrained']:.3f} | {means['membership_retrained']:.3f} | 1 | |"
        )
        for method in dict.fromkeys(row["method"] for row in mine):
            those = [row for row in mine if row["method"] == method]
            m = {key: float(np.mean([row[key] for row in those])) for key in KEYS}
            ratio = float(np.median([row["ratio"] for row in those]))
            parts[-1] += (
                f"\n| {method} | {m['parameters']:.2f} | {m['forgotten']:.2f} | {m['test']:.2f} | "
                f"{m['test_accuracy']:.4f} | {m['forgotten_accuracy']:.3f} | {m['membership']:.3f} | {ratio:.2f} | "
                f"{m['evidence_seconds']:.1f} s |"
            )
    return "\n\n".join(parts)


KEYS = (
    "parameters",
    "forgotten",
    "test",
    "test_accuracy",
    "forgotten_accuracy",
    "membership",
    "evidence_seconds",
)


if __name__ == "__main__":
    main()
