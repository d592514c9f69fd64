"""Real label errors, found, corrected and taken into the model without training it again.

    UPWEIGHT_DATA=FOLDER python benchmarks/repair_labels.py [--noise worse] [--bank runs/banks/repair] [--out
    repair_labels]

CIFAR-10 with the human labels of CIFAR-10N, 10,000 images, the network and recipe of benchmarks/_cifar10n.py. The k
% most suspicious images (by the trained model's own loss) are shown to a reviewer, who gives the verified label: k =
2, 5, 10, 20 and 40. The model is then repaired on these decisions, or trained again on them from scratch with the
same seed.

    recovered = (accuracy after repair - before) / (accuracy after retraining - before)

on 5,000 test images with their true labels, over 3 seeds. Seconds are processor time on one thread: of amending the
model, which is held against retraining, and beside it of measuring the evidence afterwards, which retraining has not.
Options were chosen on another draw of the recipe (seed 100, budget 10 %), not on the seeds that are reported.
--control changes a single label: what the best method then gains is further training, not the corrected labels.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from _cifar10n import BATCH, DECAY, MOMENTUM, Noisy, accuracy, data, network, test_data, train
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import upweight as uw

N = 10_000
BUDGETS = (0.02, 0.05, 0.10, 0.20, 0.40)
EKFAC: dict[str, Any] = {
    "curvature": "ekfac",
    "fisher": "sampled",
    "draws": 1,
    "curvature_examples": 500,
    "damping": 1e-2,
}
LATER = (
    r"^(6|10|12)\."  # the last convolution and the two linear layers, 85 thousand of 90 thousand parameters
)
CONTROLLED = "fine-tuning by EK-FAC, later layers"
METHODS: dict[str, dict[str, Any]] = {
    "gradient": {"method": "gradient"},
    "last layer": {"method": "last_layer"},
    "influence, EK-FAC": {"method": "influence", **EKFAC},
    "newton, EK-FAC": {"method": "newton", **EKFAC},
    "trust region, EK-FAC": {"method": "trust_region", "steps": 4, **EKFAC},
    "fine-tuning by EK-FAC": {"method": "fine_tune", "steps": 1.2, "rate": 2e-3, **EKFAC},
    CONTROLLED: {
        "method": "fine_tune",
        "parameters": LATER,
        "steps": 2.5,
        "rate": 2e-3,
        **EKFAC,
        "damping": 3e-3,
    },
    "fine-tuning by EK-FAC, 3 passes": {
        "method": "fine_tune",
        "steps": 3,
        "rate": 2e-3,
        **EKFAC,
        "damping": 3e-3,
    },
}


def trained(bank: Path, name: str, x: Tensor, y: Tensor, seed: int) -> tuple[nn.Module, float]:
    """A model from the bank, trained if it is not there; and the seconds its training took."""
    file = bank / f"{name}.safetensors"
    if not file.exists():
        bank.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        model, _ = train(x, y, seed)
        seconds = torch.tensor(time.process_time() - start)
        save_file({**model.state_dict(), "seconds": seconds}, file)
    kept = load_file(file)
    seconds = float(kept.pop("seconds"))
    model = network()
    model.load_state_dict(kept)
    return model.eval().to(memory_format=torch.channels_last), seconds


@torch.no_grad()
def suspects(model: nn.Module, images: Noisy) -> np.ndarray:
    """Positions, the largest loss first."""
    parts = zip(images.x.split(500), images.given.split(500))
    losses = torch.cat([F.cross_entropy(model(a), b, reduction="none") for a, b in parts])
    return losses.argsort(descending=True, stable=True).numpy()


def decided(images: Noisy, order: np.ndarray, budget: float) -> tuple[Tensor, dict[int, int]]:
    """The labels after the review of the first suspects, and the changes."""
    labels = images.given.clone()
    first = torch.from_numpy(order[: round(budget * len(labels))].copy())
    labels[first] = images.true[first]
    changes = {int(p): int(labels[p]) for p in first if labels[p] != images.given[p]}
    return labels, changes


def fine_tuned(
    model: nn.Module, x: Tensor, y: Tensor, seconds: float, rate: float
) -> tuple[nn.Module, float]:
    """The baseline: SGD on the corrected labels for as many seconds, at a rate that falls linearly to 0."""
    start, tuned = time.process_time(), copy.deepcopy(model)
    optimizer = torch.optim.SGD(tuned.parameters(), rate, MOMENTUM, weight_decay=DECAY, fused=True)
    generator = torch.Generator().manual_seed(2000)
    spent = 0.0
    while spent < seconds:
        for batch in torch.randperm(len(y), generator=generator).split(BATCH):
            spent = time.process_time() - start
            if spent >= seconds:
                break
            optimizer.param_groups[0]["lr"] = rate * (1 - spent / seconds)
            optimizer.zero_grad()
            F.cross_entropy(tuned(x[batch]), y[batch]).backward()
            optimizer.step()
    return tuned.eval(), time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--noise", default="worse")
    parser.add_argument("--bank", type=Path, default=Path("runs/banks/repair"))
    parser.add_argument("--out", type=Path, default=Path("repair_labels"))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--budgets", default=",".join(map(str, BUDGETS)))
    parser.add_argument(
        "--methods", nargs="*", default=[""], help="only methods whose name holds one of these"
    )
    parser.add_argument("--train", action="store_true", help="only fill the bank")
    parser.add_argument("--control", action="store_true", help="one changed label only, and stop")
    parser.add_argument("--table", type=Path, nargs="+", help="print what these files hold, and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table([row for file in arguments.table for row in json.loads(file.read_text())]))
        return
    torch.set_num_threads(1)
    images, (xt, yt) = data(arguments.noise, N), test_data()
    fast = images.x.contiguous(
        memory_format=torch.channels_last
    )  # half again as fast on a CPU, as the training has it
    images = Noisy(fast, images.given, images.true)
    rows: list[dict[str, Any]] = []
    for seed in map(int, arguments.seeds.split(",")):
        before, _ = trained(arguments.bank, f"{arguments.noise}-{seed}-given", images.x, images.given, seed)
        order, start = suspects(before, images), accuracy(before, xt, yt)
        if arguments.control:
            one = dict(list(decided(images, order, BUDGETS[0])[1].items())[:1])
            options = {"l2": DECAY, "progress": False, **METHODS[CONTROLLED]}
            repair = uw.relabel(before, uw.Classification(), (images.x, images.given), one, **options)
            after = accuracy(repair.model, xt, yt)
            print(
                f"{arguments.noise}-{seed}, {CONTROLLED}, one label changed: {start:.4f} -> {after:.4f}",
                flush=True,
            )
            continue
        for budget in map(float, arguments.budgets.split(",")):
            labels, changes = decided(images, order, budget)
            name = f"{arguments.noise}-{seed}-{round(100 * budget)}"
            retrained, whole = trained(arguments.bank, name, images.x, labels, seed)
            best = accuracy(retrained, xt, yt)
            print(
                f"{name}: {len(changes)} labels changed, {start:.4f} -> {best:.4f} in {whole:.1f} s",
                flush=True,
            )
            if arguments.train:
                continue
            chosen = {name: m for name, m in METHODS.items() if any(w in name for w in arguments.methods)}
            for method, model, seconds, evidence in attempts(before, images, labels, changes, whole, chosen):
                after = accuracy(model, xt, yt)
                row = {"noise": arguments.noise, "seed": seed, "budget": budget, "changed": len(changes)}
                row |= {"method": method, "before": start, "retrained": best, "after": after}
                row |= {"recovered": (after - start) / (best - start)}
                row |= {"seconds": seconds, "ratio": seconds / whole, "evidence_seconds": evidence}
                rows.append(row)
                shares = (
                    f"{row['recovered']:+.2f} {seconds:6.2f} s {row['ratio']:.1%} (evidence {evidence:.2f} s)"
                )
                print(f"  {method:36} {after:.4f} {shares}", flush=True)
            arguments.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")


def attempts(
    before: nn.Module,
    images: Noisy,
    labels: Tensor,
    changes: dict[int, int],
    whole: float,
    methods: dict[str, dict[str, Any]],
) -> Iterator[tuple[str, nn.Module, float, float]]:
    """(method, repaired model, its seconds, those of its evidence) of every method, and of fine-tuning for as long."""
    data = (images.x, images.given)
    for method, options in methods.items():
        repair = uw.relabel(
            before, uw.Classification(), data, changes, **{"l2": DECAY, "progress": False, **options}
        )
        found = repair.evidence
        yield method, repair.model, found["processor_seconds"], found["evidence_processor_seconds"]
    for share in (0.05, 0.10):
        tuned = fine_tuned(before, images.x, labels, share * whole, 0.03)
        yield f"fine-tuning, {share:.0%} of time", *tuned, 0.0


def table(rows: list[dict[str, Any]]) -> str:
    """Accuracies, and shares recovered, as Markdown: means over seeds for each budget, and of all of them together.

    The share is that of the summed gains: small gains of small budgets are mostly noise, and do not count as much.
    """
    budgets = sorted({row["budget"] for row in rows})
    seeds = sorted({row["seed"] for row in rows})

    def of(method: str, budget: float | None = None) -> list[dict[str, Any]]:
        return [r for r in rows if r["method"] == method and budget in (None, r["budget"])]

    def mean(those: list[dict[str, Any]], key: str) -> float:
        return float(np.mean([r[key] for r in those]))

    def share(those: list[dict[str, Any]]) -> float:
        return sum(r["after"] - r["before"] for r in those) / sum(r["retrained"] - r["before"] for r in those)

    first = next(iter(rows))["method"]
    lines = [
        "| method | "
        + " | ".join(f"{b:.0%}" for b in budgets)
        + " | recovered, all | of retraining's time | measuring the evidence |",
        "|---|" + "---|" * (len(budgets) + 3),
    ]
    lines.append(
        "| before | " + " | ".join(f"{mean(of(first, b), 'before'):.4f}" for b in budgets) + " | 0 | 0 | |"
    )
    lines.append(
        "| retrained | "
        + " | ".join(f"{mean(of(first, b), 'retrained'):.4f}" for b in budgets)
        + " | 1 | 1 | |"
    )
    for method in dict.fromkeys(r["method"] for r in rows):
        cells = [f"{mean(of(method, b), 'after'):.4f} ({share(of(method, b)):+.2f})" for b in budgets]
        whole = of(method)
        lines.append(
            f"| {method} | "
            + " | ".join(cells)
            + f" | {share(whole):+.2f} | {mean(whole, 'ratio'):.1%} | {mean(whole, 'evidence_seconds'):.1f} s |"
        )
    return f"{len(seeds)} seeds\n\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
