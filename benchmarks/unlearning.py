"""Unlearning Fashion-MNIST: how near to a really retrained model, and how soon.

    UPWEIGHT_DATA=FOLDER python benchmarks/unlearning.py [--bank runs/banks/unlearning] [--seeds 3] [--out unlearning]

The MLP and recipe of benchmarks/lds/fashion.py (784-512-256-128-10, 6,144 images, SGD .03, momentum .9, weight decay 1e-3,
batches of 64, 20 epochs). Forgotten are 1 %, 5 % and 10 % of the images at random, and all of one class.

Reference: retraining from scratch without them. "Matched" retraining has the same initial weights and the same order of the
data as the model itself, the forgotten images dropped from their batches, so that what differs is the data alone; the
others have another seed. Distances are relative to doing nothing (1 = as far as the model as it was):

    parameters   |theta - theta_r| / |theta_0 - theta_r|, matched
    predictions  mean total variation distance of the predicted distributions on 5,000 test images, matched
    to mean      the same against the mean prediction of the retrained models of all seeds

Methods' options were chosen on other forgotten images (10 % at random, drawn with another seed, model seed 0).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent / "lds"))
from _data import grey_images  # noqa: E402
from fashion import RECIPE, TRAIN, network  # noqa: E402

import upweight as uw  # noqa: E402
from upweight.repair.membership import membership_auroc  # noqa: E402

TEST = 5000
CLASS = 6  # shirts
SETTINGS = ("1 %", "5 %", "10 %", "one class")
L2 = RECIPE["decay"]
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient"},
    "influence, EK-FAC": {"method": "influence", "curvature": "ekfac"},
    "newton, EK-FAC": {"method": "newton", "curvature": "ekfac"},
    "newton, GGN by CG": {"method": "newton", "curvature": "ggn", "solver": "cg"},
    "trust region, EK-FAC": {"method": "trust_region", "curvature": "ekfac"},
    "corrected, EK-FAC": {"method": "corrected", "curvature": "ekfac"},
    "last layer": {"method": "last_layer"},
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
    optimizer = torch.optim.SGD(
        model.parameters(), RECIPE["rate"], RECIPE["momentum"], weight_decay=RECIPE["decay"], fused=True
    )
    for _ in range(RECIPE["epochs"]):
        for batch in torch.randperm(TRAIN, generator=generator).split(RECIPE["batch"]):
            chosen = batch[keep[batch]]
            if len(chosen):
                optimizer.zero_grad()
                F.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
    return model.eval()


def trained(bank: Path, setting: str, seed: int) -> tuple[nn.Module, float]:
    """A model from the bank, trained if it is not there; and the seconds its training took."""
    file = bank / f"{setting.replace(' ', '').replace('%', 'percent')}-{seed}.pt"
    if not file.exists():
        bank.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        model = train(np.zeros(0, dtype=int) if setting == "all" else forgotten(setting), seed)
        torch.save({"model": model.state_dict(), "seconds": time.process_time() - start}, file)
    kept = torch.load(file, weights_only=True)
    model = network()
    model.load_state_dict(kept["model"])
    return model.eval(), kept["seconds"]


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
        self.theirs = [probabilities(m, self.test[0]) for m in self.retrained]
        self.mean = torch.stack(self.theirs).mean(0)

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
        start, retrained, p = self.models[seed], self.retrained[seed], probabilities(model, self.test[0])
        p0 = probabilities(start, self.test[0])
        return {
            "parameters": float(
                (flat(model) - flat(retrained)).norm() / (flat(start) - flat(retrained)).norm()
            ),
            "predictions": total_variation(p, self.theirs[seed]) / total_variation(p0, self.theirs[seed]),
            "tv": total_variation(p, self.theirs[seed]),
            "tv_nothing": total_variation(p0, self.theirs[seed]),
            "to_mean": total_variation(p, self.mean),
            "to_mean_nothing": total_variation(p0, self.mean),
            "test": self.accuracy(model, "test") - self.accuracy(retrained, "test"),
            "test_accuracy": self.accuracy(model, "test"),
            "forgotten": self.accuracy(model, "forgotten"),
            "forgotten_retrained": self.accuracy(retrained, "forgotten"),
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
    optimizer = torch.optim.SGD(copy.parameters(), rate, RECIPE["momentum"], weight_decay=RECIPE["decay"])
    generator = torch.Generator().manual_seed(1000)
    for _ in range(epochs):
        for batch in kept[torch.randperm(len(kept), generator=generator)].split(RECIPE["batch"]):
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
    start = time.process_time()
    repair = uw.unlearn(
        setting.models[seed],
        uw.Classification(),
        setting.train,
        setting.removed,
        **{"l2": L2, "progress": False, **options},
    )
    spent = time.process_time() - start
    return repair.model, repair.seconds, {**repair.evidence, "cpu": spent}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/unlearning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("unlearning"))
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--settings", default=",".join(SETTINGS))
    parser.add_argument("--train", action="store_true", help="only fill the bank")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in arguments.settings.split(","):
        setting = Setting(arguments.bank, name, arguments.seeds)
        if arguments.train:
            print(name, f"{setting.seconds:.1f} s", flush=True)
            continue
        for seed in range(arguments.seeds):
            model = setting.models[seed]

            def note(
                method: str, found: nn.Module, seconds: float, evidence: dict[str, Any] | None = None
            ) -> None:
                row = {"setting": name, "seed": seed, "method": method, "seconds": seconds}
                row |= setting.figures(found, seed) | {"ratio": seconds / setting.seconds}
                if evidence:
                    row["trust"] = evidence["objective"]["trust_ratio"]
                    row["steps"] = [r["step_size"] for r in evidence["steps"]]
                rows.append(row)
                print(
                    f"{name:10} {seed} {method:26} par {row['parameters']:.3f} pred {row['predictions']:.3f} "
                    f"mean {row['to_mean'] / row['to_mean_nothing']:.3f} test {row['test']:+.4f} "
                    f"forg {row['forgotten']:.3f}/{row['forgotten_retrained']:.3f} mia {row['membership']:.3f}/"
                    f"{row['membership_retrained']:.3f} {seconds:.1f} s {row.get('trust')} {row.get('steps')}",
                    flush=True,
                )

            note("nothing", model, 0.0)
            note(
                "another seed's retraining", setting.retrained[(seed + 1) % arguments.seeds], setting.seconds
            )
            for epochs in (1, 4):
                note(f"fine-tuning, {epochs} epochs", *fine_tuned(model, setting, epochs))
            for method, options in METHODS.items():
                if arguments.only not in method:
                    continue
                found, seconds, evidence = apply(setting, seed, options)
                note(method, found, seconds, evidence)
                if method == "corrected, EK-FAC":
                    note("random step", random_step(model, evidence["parameters"]["moved"]), 0.0)
    if not arguments.train:
        arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
