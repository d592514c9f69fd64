"""`upweight audit`, as typed, on images, on text and on a table."""

import csv
import json
import sys
import textwrap

import pytest

import upweight as uw

IMAGES = """
import torch, upweight as uw
from torch import nn

print("printed while loading")
generator = torch.Generator().manual_seed(0)
x = torch.randn(160, 1, 5, 5, generator=generator) * 0.5
true = torch.arange(160) % 2
x += true[:, None, None, None] - 0.5
y = true.clone()
y[[4, 9, 30]] = 1 - y[[4, 9, 30]]

def train_fn(indices, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
        optimizer.step()
    return model.eval()

def made(**options):
    model = train_fn(torch.arange(100), 0)
    train = uw.Examples((x[:100], y[:100]), [f"image-{i}" for i in range(100)])
    options = {"name": "tiny images", "classes": ["dim", "bright"], "train_fn": train_fn, **options}
    return uw.Experiment(model, uw.Classification(), train, (x[100:], true[100:]), **options)

def fixed():
    return made(train_fn=None)
"""

TEXT = """
import torch, upweight as uw
from torch import nn

generator = torch.Generator().manual_seed(0)
tokens = torch.randint(2, 40, (120, 6), generator=generator)
y = torch.arange(120) % 2
tokens[y == 1] = tokens[y == 1] // 2
tokens[7], y[7] = tokens[8], 1

def show(example):
    return "<script>alert(1)</script> " + " ".join(map(str, example[0].tolist()))

class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.embed(tokens).mean(1))

def words():
    torch.manual_seed(0)
    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens[:80]), y[:80]).backward()
        optimizer.step()
    return uw.Experiment(
        model.eval(), uw.Classification(), (tokens[:80], y[:80]), (tokens[80:], y[80:]), show=show, name="words"
    )
"""

TABLE = """
import numpy as np, upweight as uw
from sklearn.linear_model import Ridge

generator = np.random.default_rng(0)
X = generator.normal(size=(90, 4))
y = X @ [1.0, -2.0, 0.5, 0.0] + 0.1 * generator.normal(size=90)
y[[3, 40]] += [5, -4]

def houses():
    fitted = uw.from_sklearn(Ridge(alpha=1.0).fit(X[:60], y[:60]), X[:60], y[:60])
    train = uw.Examples(fitted.train, [f"house-{i}" for i in range(60)])
    return uw.Experiment(
        fitted.model, fitted.task, train, fitted.tensors(X[60:], y[60:]), show=lambda row: "a house", name="houses"
    )
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    files = {"images": IMAGES, "words": TEXT, "table": TABLE}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
    yield tmp_path
    for name in files:
        sys.modules.pop(name, None)


def test_the_figures_are_those_of_audit(upweight, place):
    code, out, err = upweight("audit", "images.py:made", "--json", "--top", "3")
    assert code == 0 and "printed while loading" in err
    found = json.loads(out)
    experiment = uw.Experiment.load("images.py:made")
    by_hand = uw.audit(
        experiment.model, experiment.task, experiment.train, validation=experiment.query, progress=False
    )
    assert dict(map(tuple, found["suggestions"])) == by_hand.suggestions()
    assert {"image-4", "image-9", "image-30"} <= set(by_hand.suggestions())
    assert found["flagged"] == {kind: len(by_hand.flagged(kind)) for kind in by_hand.kinds}
    assert [row["id"] for row in found["worst"]["label"]] == by_hand.filter("label").ids[:3]
    saved = uw.IssueTable.load("runs/tiny-images", train=experiment.train)
    assert saved.ids == by_hand.ids and saved.suggestions() == by_hand.suggestions()
    assert saved.info["experiment"] == "tiny images" and saved.info["address"] == "images.py:made"
    assert saved.info["classes"] == ["dim", "bright"]
    rows = list(csv.DictReader((place / "runs/tiny-images/issues.csv").read_text().splitlines()))
    assert len(rows) == 5 * 100 and rows[0]["id"] == by_hand.ids[0]


def test_the_table_for_people(upweight, place):
    code, out, _ = upweight("audit", "images.py:made", "--out", "run", "--precision", "0.9")
    assert code == 0
    for words in (
        *("label", "near_duplicate", "outlier", "harmful", "rare", "image-4", "dim ->", "(nats)"),
        *(
            "expected precision of 90%",
            "calibrated on 60 validation labels",
            "run/issues.json",
            "run/issues.csv",
        ),
    ):
        assert words in out, words
    assert {path.name for path in (place / "run").iterdir()} == {"issues.json", "issues.csv"}


def test_folds_kinds_and_detector(upweight, place):
    code, out, _ = upweight(
        *("audit", "images.py:made", "--folds", "2", "--kinds", "label, outlier", "--json", "--no-validation")
    )
    found = json.loads(out)
    assert code == 0 and set(found["flagged"]) == {"label", "outlier"} and found["influence"] is None
    assert found["detectors"]["label"]["suggestion"] == "out-of-fold models"
    code, out, _ = upweight("audit", "images.py:fixed", "--detector", "self-influence", "--kinds", "label")
    assert code == 0 and "ranked by self_influence" in out


def test_text_with_a_copy_of_another_label(upweight, place):
    code, out, _ = upweight("audit", "words.py:words", "--kinds", "near_duplicate,label")
    assert code == 0 and "2 examples are exact copies of one with another label" in out
    assert "<script>alert(1)</script>" in out and "0, not 1" in out


def test_a_table_of_numbers(upweight, place):
    code, out, _ = upweight("audit", "table.py:houses", "--json")
    found = json.loads(out)
    assert code == 0 and {name for name, _ in found["suggestions"]} == {"house-3", "house-40"}
    assert found["worst"]["label"][0]["shown"] == "a house"
    experiment = uw.Experiment.load("table.py:houses")
    predicted = experiment.model(experiment.train.take([3])[0]).item()
    assert dict(map(tuple, found["suggestions"]))["house-3"] == pytest.approx(predicted)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("images.py:made", "--detector", "magic"), "there is no detector 'magic' -> one of auto"),
        (("images.py:made", "--kinds", "typo"), "no kind of issue 'typo'"),
        (("images.py:made", "--precision", "1.5"), "precision=1.5"),
        (("images.py:made", "--detector", "aum"), "follows the training run"),
        (("images.py:fixed", "--folds", "3"), "no train_fn"),
        (("images.py:made", "--no-validation", "--kinds", "harmful"), "harm shows on validation data"),
        (("table.py:houses", "--detector", "margin"), "Classification"),
        (("nowhere.py:x",), "nowhere.py does not exist"),
        (("images.py:mad",), "images.py has no 'mad'"),
        (("images.py:made", "--out", "images.py"), "images.py cannot be written"),
    ],
)
def test_errors_are_one_line(upweight, place, arguments, said):
    code, _, err = upweight("audit", *arguments)
    assert code == 2 and said in err and "Traceback" not in err and not (place / "runs").exists()
    assert err.strip().splitlines()[-1].startswith("error: ") and " -> " in err
    with pytest.raises(uw.UpweightError):
        upweight("audit", *arguments, "--debug")


def test_ctrl_c_says_how_to_go_on(upweight, place, monkeypatch):
    def stopped(*rest, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("upweight.repair.audit.audit", stopped)
    code, out, err = upweight("audit", "images.py:made", "--json")
    assert (code, out) == (130, "") and "go on with: upweight audit images.py:made --json" in err
