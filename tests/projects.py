"""What a user has in a working folder before the first command: experiments, pictures, a table, texts."""

import csv

import numpy as np
from PIL import Image

PETS = """
import sys
sys.path.insert(0, {tests!r})
from run_folders import images

def experiment():
    return images()
"""

IMAGES = """
from pathlib import Path
import torch, upweight as uw
from torch import nn

LOG = Path(__file__).with_name("log")
STOP = Path(__file__).with_name("stop")
print("printed while loading")
generator = torch.Generator().manual_seed(0)
x = torch.randn(40, 1, 5, 5, generator=generator)
y = (x[:, 0, 1:4, 1:4].mean((1, 2)) > 0).long()
train, query = (x[:30], y[:30]), (x[30:], y[30:])

def train_fn(indices, seed):
    torch.manual_seed(seed)
    with open(LOG, "a") as file:
        file.write(f"{sorted(indices.tolist())} {seed}\\n")
    print("printed while training")
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(12):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
    if STOP.exists() and len(LOG.read_text().splitlines()) >= int(STOP.read_text()):
        raise KeyboardInterrupt
    return model

def made(**options):
    torch.manual_seed(7)
    model = train_fn(torch.arange(30), 0).eval()
    LOG.unlink()
    options = {"name": "tiny images", "classes": ["dim", "bright"], "train_fn": train_fn, **options}
    return uw.Experiment(model, uw.Classification(), train, query, **options)
"""
"""Tiny images, whose training runs are logged and can be interrupted."""

TABLE = """
import numpy as np, torch, upweight as uw
from sklearn.linear_model import Ridge

generator = np.random.default_rng(0)
X, noise = generator.normal(size=(50, 4)), generator.normal(size=50)
y = X @ [1.0, -2.0, 0.5, 0.0] + noise

def train_fn(indices, seed):
    rows = np.random.default_rng(seed).choice(indices, 2 * len(indices))
    return uw.from_sklearn(Ridge(alpha=1.0).fit(X[rows], y[rows])).model

def show(row):
    return f"<b>{row[0][0]:.1f}</b>"

def houses():
    fitted = uw.from_sklearn(Ridge(alpha=1.0).fit(X[:40], y[:40]), X[:40], y[:40])
    train = uw.Examples(fitted.train, [f"house-{i}" for i in range(40)])
    query = uw.Examples(fitted.tensors(X[40:], y[40:]), [f"<script>{i}" for i in range(10)])
    methods = {
        "exact": uw.Influence(fitted.model, fitted.task, curvature="hessian", damping=0.0, l2=fitted.l2),
        "dot<i>": lambda model, task: uw.GradDot(model, task),
    }
    return uw.Experiment(
        fitted.model, fitted.task, train, query, train_fn, show, methods=methods, name="houses & <gardens>"
    )
"""
"""A table and a fitted ridge regression, with hostile names."""


def photos(place):
    generator = np.random.default_rng(0)
    for name, shade in (("dark", 40), ("light", 200)):
        (place / "photos" / name).mkdir(parents=True)
        for k in range(12):
            pixels = generator.integers(shade - 30, shade + 30, (20, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(place / "photos" / name / f"{k}.png")
    return place / "photos"


def table(place, regression=False):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 2))
    value = x @ [2, -1]
    target = value.round(3) if regression else np.where(value > 0, "yes", "no")
    with open(place / "houses.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["area", "street", "rooms", "price"])
        writer.writerows([a, f"street {k}", b, t] for k, ((a, b), t) in enumerate(zip(x, target)))
    return place / "houses.csv"


def reviews(place, labels=("bad", "good")):
    words = {labels[0]: ["dull", "slow", "poor"], labels[1]: ["bright", "quick", "fine"]}
    with open(place / "reviews.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for k in range(40):
            label = labels[k % 2]
            writer.writerow([f"a {words[label][k % 3]} film, <b>number</b> {k}", label])
    return place / "reviews.csv"


MADE = {"images": photos, "csv": table, "text": reviews, "sklearn": None}
"""{kind of template: what makes its data in a folder}"""
