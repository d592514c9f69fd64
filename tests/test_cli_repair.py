"""`upweight repair`, as typed, on images and on a table."""

import json
import sys
import textwrap

import pytest
import torch
from projects import IMAGES, TABLE

import upweight as uw
from upweight.cli import repair as module
from upweight.repair import log

RELABELLED = """
def corrected(indices, seed, labels=None):
    global y
    kept = y.clone()
    for position, label in (labels or {}).items():
        y[position] = label
    try:
        return train_fn(indices, seed)
    finally:
        y = kept

def again():
    return made(train_fn=corrected)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, text in {"images.py": IMAGES + RELABELLED, "table.py": TABLE}.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    yield tmp_path
    for name in ("images", "table"):
        sys.modules.pop(name, None)


def test_forgetting_writes_weights_evidence_and_the_log(upweight, place):
    code, out, err = upweight("repair", "images.py:made", "--remove", "3,14", "--out", "run", "--json")
    assert code == 0, err
    found = json.loads(out[out.index("{") :])
    assert found["removed"] == [3, 14] and found["source"] == "--remove" and found["verification"] is None
    experiment = uw.Experiment.load("images.py:made")
    by_hand = uw.unlearn(
        experiment.model, experiment.task, experiment.train, [3, 14], test=experiment.query, progress=False
    )
    loaded = uw.Repair.load(place / "run/repair", experiment.model)
    for a, b in zip(loaded.model.state_dict().values(), by_hand.model.state_dict().values()):
        assert torch.equal(a, b)
    assert found["evidence"]["groups"]["test"]["actual"] == by_hand.evidence["groups"]["test"]["actual"]
    (line,) = log.read(place / "run/repair/log.jsonl")
    assert line["removed"] == [3, 14] and line["address"] == "images.py:made" and line["source"] == "--remove"
    code, out, _ = upweight(
        "repair", "images.py:made", "--remove", "5", "--out", "run", "--method", "last_layer"
    )
    assert code == 0 and "forgotten" in out and "by last_layer" in out and "model.safetensors" in out
    assert len(log.read(place / "run/repair/log.jsonl")) == 2


def test_a_table_of_new_labels_with_names_of_classes(upweight, place):
    experiment = uw.Experiment.load("images.py:made")
    given = experiment.train.take(range(30))[1]
    names = ["dim", "bright"]
    (place / "new.csv").write_text(f"label,id\n{names[int(1 - given[2])]},2\n{int(1 - given[4])},4\n")
    code, out, err = upweight("repair", "images.py:again", "--relabel", "new.csv", "--out", "run", "--json")
    assert code == 0, err
    assert json.loads(out[out.index("{") :])["relabelled"] == [[2, int(1 - given[2])], [4, int(1 - given[4])]]
    (place / "gone.txt").write_text("7\n9\n")
    code, out, _ = upweight(
        "repair", "images.py:again", "--relabel", "new.csv", "--remove", "gone.txt", "--out", "run", "--json"
    )
    found = json.loads(out[out.index("{") :])
    assert code == 0 and found["removed"] == [7, 9] and len(found["relabelled"]) == 2
    assert found["source"] == "--remove and --relabel"


def test_verification_trains_and_compares(upweight, place):
    arguments = (
        "repair",
        "images.py:again",
        "--remove",
        "3,14,20",
        "--out",
        "run",
        "--verify",
        "--seeds",
        "2",
    )
    code, out, err = upweight(*arguments, "--json")
    assert code == 0, err
    found = json.loads(out[out.index("{") :])["verification"]
    assert found["seeds"] == [0, 1] and set(found["accuracy"]) == {"test", "retained", "forgotten"}
    assert (place / "run/repair/verify.json").is_file()
    assert [line["action"] for line in log.read(place / "run/repair/log.jsonl")] == ["repair", "verify"]
    trained = len((place / "log").read_text().splitlines())
    code, out, _ = upweight(*arguments)
    assert code == 0 and "doing nothing" in out and trained >= 2
    assert not (place / "log").exists()  # nothing is trained twice
    # Another change has a bank of its own.
    code, _, err = upweight(
        "repair", "images.py:again", "--remove", "5", "--out", "run", "--verify", "--seeds", "1"
    )
    assert code == 0, err
    assert len(list((place / "run/repair").glob("bank-*"))) == 2


def test_ctrl_c_leaves_the_repair_and_the_models(upweight, place):
    (place / "stop").write_text("2")
    arguments = ("repair", "images.py:again", "--remove", "3,14", "--out", "run", "--verify")
    code, _, err = upweight(*arguments)
    assert code == 130 and "Traceback" not in err
    assert "the repair is in run/repair, its verification is not -> go on with: upweight repair" in err
    assert (place / "run/repair/repair.json").is_file()


def test_a_table_is_named_by_its_ids(upweight, place):
    code, out, err = upweight(
        "repair",
        "table.py:houses",
        "--remove",
        "house-3,house-9",
        "--l2",
        "0.025",
        "--convention",
        "sum",
        "--json",
    )
    assert code == 0, err
    found = json.loads(out[out.index("{") :])
    assert found["removed"] == ["house-3", "house-9"]
    assert found["evidence"]["certificate"]["bent"] == 0  # ridge regression
    (place / "new.csv").write_text("id,label\nhouse-1,2.5\n")
    code, out, err = upweight("repair", "table.py:houses", "--relabel", "new.csv", "--json")
    assert code == 0 and json.loads(out[out.index("{") :])["relabelled"] == [["house-1", 2.5]], err


def test_decisions_come_before_suggestions(upweight, place):
    decisions = pytest.importorskip("upweight.explorer.decisions")
    given = uw.Experiment.load("images.py:made").train.take(range(30))[1]
    made = decisions.Decisions(place / "run/decisions.sqlite", "tiny images")
    made.set(3, "drop", reviewer="ada")
    made.set(4, "relabel", label=int(1 - given[4]), reviewer="ada")
    made.set(5, "keep", reviewer="bob")
    code, out, err = upweight("repair", "images.py:made", "--out", "run", "--json")
    assert code == 0, err
    found = json.loads(out[out.index("{") :])
    assert found["removed"] == [3] and found["relabelled"] == [[4, int(1 - given[4])]]
    assert found["source"] == "run/decisions.sqlite"
    other = decisions.Decisions(place / "kept.sqlite")
    other.set(5, "keep")
    code, _, err = upweight("repair", "images.py:made", "--decisions", "kept.sqlite", "--out", "run")
    assert code == 2 and "1 decisions, all to keep" in err


def test_suggestions_of_the_audit(upweight, place):
    pytest.importorskip("upweight.repair.issue_table")
    experiment = uw.Experiment.load("images.py:made")
    table = uw.audit(experiment.model, experiment.task, experiment.train, progress=False)
    table.save(place / "run")
    code, out, err = upweight("repair", "images.py:made", "--out", "run", "--json")
    if table.suggestions():
        assert code == 0, err
        assert dict(map(tuple, json.loads(out[out.index("{") :])["relabelled"])) == table.suggestions()
    else:
        assert code == 2


def test_an_audit_that_suggests_nothing(upweight, place):
    experiment = uw.Experiment.load("images.py:made")
    table = uw.audit(experiment.model, experiment.task, experiment.train, precision=0.9999, progress=False)
    assert not table.suggestions()
    table.save(place / "run")
    code, _, err = upweight("repair", "images.py:made", "--out", "run")
    assert code == 2 and "no label passes the audit's threshold" in err


def test_errors_are_one_line(upweight, place):
    (place / "bad.csv").write_text("number,class\n1,2\n")
    (place / "short.csv").write_text("id,label\n1\n")
    (place / "twice.csv").write_text("id,label\n1,0\n1,1\n")
    (place / "words.csv").write_text("id,label\n1,cat\n")
    (place / "empty.csv").write_text("id,label\n")
    (place / "third.csv").write_text("id,label\n1,2\n")
    (place / "half.csv").write_text("id,label\n1,0.5\n")
    for label in ("nan", "inf", "-inf", "1e999"):
        (place / f"{label}.csv").write_text(f"id,label\n1,{label}\n")
    (place / "bytes.csv").write_bytes(b"id,label\n1,\xff\xfe\n")
    for arguments, said in [
        ((), "nothing to do: no --remove"),
        (("--remove", "99"), "99 not among the 30 training ids"),
        (("--remove", "a"), "'a' not among"),
        (("--remove", ","), "nothing would change"),
        (("--relabel", "none.csv"), "none.csv cannot be read"),
        (("--relabel", "bad.csv"), "expected id and label"),
        (("--relabel", "short.csv"), "line 2 has 1 columns"),
        (("--relabel", "twice.csv"), "names 1 twice"),
        (("--relabel", "words.csv"), "the label 'cat' is no number, or one of ['dim', 'bright']"),
        (("--relabel", "empty.csv"), "names no example"),
        (("--relabel", "third.csv"), "third.csv, line 2: the label 2 is none of the 2 classes"),
        (("--relabel", "half.csv"), "the label 0.5 is none of the 2 classes"),
        (("--relabel", "nan.csv"), "nan.csv, line 2: the label 'nan' is not finite"),
        (("--relabel", "inf.csv"), "the label 'inf' is not finite"),
        (("--relabel", "-inf.csv"), "the label '-inf' is not finite"),
        (("--relabel", "1e999.csv"), "the label '1e999' is not finite"),
        (("--remove", "²"), "'²' not among"),
        (("--relabel", "bytes.csv"), "no text in UTF-8"),
        (("--decisions", "none.sqlite"), "there is no file none.sqlite"),
        (("--remove", "1", "--decisions", "none.sqlite"), "expected one of them"),
        (("--remove", "1", "--method", "magic"), "method='magic' is unknown"),
        (("--remove", "1", "--curvature", "magic"), "curvature='magic' is unknown"),
        (("--remove", "1", "--damping", "much"), "damping='much'"),
        (("--remove", "1", "--convention", "magic"), "convention='magic' is unknown"),
    ]:
        code, out, err = upweight("repair", "images.py:made", "--out", "run", *arguments)
        assert code == 2 and said in err.splitlines()[-1], (arguments, err)
        assert err.splitlines()[-1].startswith("error: ") and " -> " in err.splitlines()[-1]
        assert not (place / "run/repair").exists() and "Traceback" not in err
    with open(place / "images.py", "a") as file:
        file.write("\ndef fixed():\n    return made(train_fn=None)\n")
    code, _, err = upweight("repair", "images.py:fixed", "--remove", "1", "--verify")
    assert code == 2 and "has no train_fn" in err.splitlines()[-1]
    code, out, _ = upweight("repair", "--help")
    assert code == 0 and "--remove" in out and "audit log" in out


def test_a_train_fn_that_takes_no_labels_is_refused_before_any_work(upweight, place):
    given = uw.Experiment.load("images.py:made").train.take(range(30))[1]
    (place / "new.csv").write_text(f"id,label\n2,{int(1 - given[2])}\n")
    (place / "same.csv").write_text(f"id,label\n2,{int(given[2])}\n")
    options = ("--out", "run", "--damping", "0.1", "--verify", "--seeds", "1")
    code, _, err = upweight("repair", "images.py:made", "--relabel", "new.csv", *options)
    assert (
        code == 2
        and "--verify: the subsets change labels, but train_fn takes no argument 'labels'"
        in err.splitlines()[-1]
    )
    assert not (place / "run/repair").exists()
    code, _, err = upweight("repair", "images.py:made", "--remove", "3", "--relabel", "same.csv", *options)
    assert code == 0, err  # no label is changed


def test_the_experiment_says_the_convention(upweight, place):
    """A model of scikit-learn, whose refits keep the whole penalty: the other convention ends elsewhere."""
    assert upweight("init", "sk", "--kind", "sklearn")[0] == 0
    arguments = ("repair", "sk/experiment.py:experiment", "--remove", "3,4", "--json")
    found = json.loads(upweight(*arguments, "--verify", "--seeds", "1")[1])
    assert found["evidence"]["convention"] == "sum"
    assert found["verification"]["parameter_distance"]["relative"] < 0.02
    again = json.loads(upweight(*arguments, "--convention", "mean")[1])
    assert again["evidence"]["convention"] == "mean"


@pytest.mark.parametrize(
    ("targets", "label", "known"),
    [
        (torch.tensor([0, 1, 1]), 2, False),
        (torch.tensor([0.0, 1.0, 1.0]), 2, False),
        (torch.tensor([0.3, 0.9, 0.1]), 0.7, True),
        (torch.tensor([0, 1, 3]), 3, True),
        (torch.tensor([0, 1, 1]), 1, True),
    ],
)
def test_a_label_is_a_class_where_those_of_the_data_are(targets, label, known):
    task = uw.BinaryClassification()
    bundle = uw.Experiment(
        torch.nn.Linear(1, 1),
        task,
        (torch.ones(3, 1), targets),
        (torch.ones(3, 1), targets),
        classes=["a", "b"],
    )
    if known:
        assert module._of_a_class(bundle, label, "here") == label
    else:
        with pytest.raises(uw.UpweightError, match="none of the 2 classes"):
            module._of_a_class(bundle, label, "here")
