"""Run folders as the commands write them, made by hand: small, hostile, or very long."""

import json
import os

import numpy as np
import torch
from torch import nn

import upweight as uw

KINDS = {
    "label": "self_influence",
    "near_duplicate": "cosine",
    "outlier": "knn",
    "harmful": "ekfac",
    "rare": "ekfac",
}
HOSTILE = [
    "<script>window.hit = 1</script>",
    "</script><script>window.hit = 2</script>",
    "<img src=x onerror='window.hit = 3'>",
    "]]><!-- --!><b>bold</b>",
    "\u202egnp.exe\u2066 \x00\x1b[31m \ud800",
    "ünïcode 漢字 עברית 👩‍👩‍👧 &amp; \u2028 line",
    "{{ 7 * 7 }} {% raw %} ${7*7}",
    "'\" onmouseover=window.hit=4 x='",
]


def images(classes=("cat", "dog"), **options):
    """An experiment on 30 small colour pictures, untrained."""
    torch.manual_seed(0)
    x, y = torch.rand(36, 3, 8, 8), torch.arange(36) % 2
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).eval()
    options = {"name": "pets", "classes": list(classes), **options}
    return uw.Experiment(model, uw.Classification(), (x[:30], y[:30]), (x[30:], y[30:]), **options)


def write_scores(folder, experiment, name="ekfac", unit="nats"):
    values = torch.randn(experiment.query.n, experiment.train.n, generator=torch.Generator().manual_seed(1))
    info = {"method": "influence", "damping": 0.1, "fingerprints": {"train": experiment.train.fingerprint()}}
    ids = list(experiment.query.ids), list(experiment.train.ids)
    return uw.Scores(values, *ids, unit, info).save(folder / "scores" / name)


def issues(n, ids=None, labels=("cat", "dog"), **content):
    """issues.json as audit writes it: n training examples, five kinds of issue each."""
    generator = np.random.default_rng(0)
    ids = list(range(n)) if ids is None else ids
    rows = []
    for kind, detector in KINDS.items():
        scores = np.sort(generator.random(n).round(6))
        for rank, (score, p) in enumerate(zip(scores.tolist(), generator.permutation(n).tolist()), 1):
            of_label = kind == "label"
            rows.append(
                {
                    "id": ids[p],
                    "position": p,
                    "issue": kind,
                    "is_issue": score < 0.2,
                    "score": score,
                    "rank": rank,
                    "given_label": labels[p % len(labels)],
                    "predicted_label": labels[(p + 1) % len(labels)] if of_label else None,
                    "suggested_probability": 0.75 if of_label else None,
                    "influence": (p % 7 - 3) * 1e-3,
                    "related_id": ids[(p + 1) % n] if kind == "near_duplicate" else None,
                    "detector": detector,
                }
            )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        "upweight": "0.1.0",
        "experiment": "pets",
        "address": "pets.py:experiment",
        "written": "2026-01-01T00:00:00+00:00",
        "settings": {"precision": 0.8},
        "detectors": {"label": {"name": "self_influence"}},
        "influence": {"unit": "nats"},
        "columns": columns,
        **content,
    }


def group(before, after, predicted, **more):
    changes = {"actual": after - before, "predicted": predicted, "first_order": predicted}
    return {"n": 10, "of": 10, "loss_before": before, "loss_after": after, **changes, **more}


def repair(**content):
    test = group(0.5, 0.25, -0.2, accuracy_before=0.9, accuracy_after=0.95)
    return {
        "upweight": "0.1.0",
        "experiment": "pets",
        "written": "2026-01-01T00:00:00+00:00",
        "method": "newton",
        "removed": [],
        "relabelled": [[3, 1], [4, 0]],
        "reweighted": [],
        "evidence": {
            "what": "2 examples relabelled",
            "seconds": 1.5,
            "groups": {"repaired": group(2.0, 0.5, -1.2), "test": test},
            "objective": {"predicted": -0.1, "actual": -0.09, "trust_ratio": 0.9},
            "residual_gradient_norm": {"before": 0.1, "after": 0.01, "training_left": 0.02},
            "certificate": None,
        },
        **content,
    }


def verification():
    distance = {"before": 2.0, "after": 0.5, "seeds": 0.4, "relative": 0.25}
    return {
        "parameter_distance": distance,
        "prediction_distance": distance,
        "to_mean_prediction": None,
        "accuracy": {"test": {"before": 0.9, "after": 0.95, "retrained": 0.96}},
        "loss": {},
        "membership": {"before": 0.8, "after": 0.55, "retrained": 0.5},
        "seconds": {"repair": 1.5, "retraining": 30.0, "ratio": 0.05},
        "seeds": [0, 1],
    }


def evaluation(names=("ekfac", "loss"), **content):
    def row(name, value, baseline):
        points = [[x / 10, x / 20] for x in range(-10, 11)]
        shown = {"unit": "nats", "pairs": 21, "slope": 0.5, "correlation": 1.0, "points": points}
        return {
            "name": name,
            "baseline": baseline,
            "lds": value,
            "low": value - 0.1,
            "high": value + 0.1,
            "median": value,
            "share_of_ceiling": value / 0.8,
            "above_best_baseline": None if baseline else {"value": 0.3, "low": 0.1, "high": 0.5},
            "per_query": [value - 0.2, value, value + 0.2],
            "seconds": 0.1,
            "calibration": None if baseline else shown,
        }

    return {
        "upweight": "0.1.0",
        "experiment": "pets",
        "address": "pets.py:experiment",
        "written": "2026-01-01T00:00:00+00:00",
        "sentence": "The best method is ekfac.",
        "measurement_unit": "nats",
        "subsets": 16,
        "seeds": 2,
        "fraction": 0.5,
        "queries": 6,
        "level": 0.95,
        "ceiling": {"value": 0.8, "low": 0.7, "high": 0.9},
        "methods": [row(names[0], 0.4, False), row(names[1], 0.1, True)],
        "left_out": {"margin": "needs <classes>"},
        "warnings": [],
        **content,
    }


def put(folder, name, content):
    file = folder / name
    os.makedirs(file.parent, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def everything(folder, experiment):
    """All that a run folder may hold."""
    write_scores(folder, experiment)
    put(folder, "evaluate.json", evaluation())
    put(folder, "issues.json", issues(experiment.train.n))
    put(folder, "repair/repair.json", repair())
    put(folder, "repair/verify.json", verification())
    put(
        folder,
        "repair/log.jsonl",
        json.dumps({"at": "2026-01-01", "action": "repair", "method": "newton"}) + "\n",
    )
    return folder


def hostile(tmp_path, size=10_000_000):
    """Hostile names, classes, ids and texts everywhere, one of them very long."""
    rows = torch.arange(30.0)[:, None].repeat(1, 2)
    ids = [f"{HOSTILE[k % len(HOSTILE)].replace(chr(0xD800), '')} {k}" for k in range(30)]
    texts = [HOSTILE[k % len(HOSTILE)] for k in range(29)] + ["<i>" * (size // 3)]

    def show(example):
        return texts[int(example[0][0])]

    experiment = uw.Experiment(
        nn.Linear(2, 2),
        uw.Classification(),
        uw.Examples((rows, torch.arange(30) % 2), ids),
        uw.Examples((rows[24:], torch.arange(6) % 2), ids[:6]),
        show=show,
        classes=HOSTILE[:2],
        name=HOSTILE[1],
    )
    everything(tmp_path, experiment)
    for name, content in {
        "evaluate.json": evaluation((HOSTILE[0], HOSTILE[2]), sentence=HOSTILE[1], warnings=HOSTILE),
        "issues.json": issues(30, ids, HOSTILE, address=HOSTILE[1], detectors={HOSTILE[0]: HOSTILE[1]}),
        "repair/repair.json": repair(method=HOSTILE[1], source=HOSTILE[2] * 1000),
    }.items():
        put(tmp_path, name, {**content, "experiment": experiment.name})
    put(tmp_path, "repair/log.jsonl", "\n".join(json.dumps({"action": one}) for one in HOSTILE) + "\n{half")
    return experiment
