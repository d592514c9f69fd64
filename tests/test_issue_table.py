"""The issue table: what it holds, and that a file of it is never mistaken for another or for a whole one."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from refusals import refused
from rich.console import Console

import upweight as uw

HOSTILE = [
    "<script>alert(1)</script>",
    'a,"b"\nc',
    "=1+1",
    "\ud800",
    "naïve ☃",
    "x" * 100_000,
    "",
    "\x1b[31mred",
    7,
]


def table(ids=("a", "b", "c"), **info):
    n = len(ids)
    rows = [
        {
            "id": name,
            "position": k,
            "issue": "label",
            "is_issue": k < 2,
            "score": k / n,
            "rank": k + 1,
            "given_label": k,
            "predicted_label": 2 if k < 2 else k,
            "suggested_probability": 0.5,
            "influence": -0.25,
            "detector": "loss",
        }
        for k, name in enumerate(ids)
    ]
    rows += [{**row, "issue": "outlier", "is_issue": False, "influence": None} for row in rows]
    return uw.IssueTable.of_rows(rows, info)


def test_golden():
    found = table()
    assert repr(found) == "IssueTable of 3 training examples: 2 of 3 label, 0 of 3 outlier"
    assert len(found) == 6 and found.kinds == ["label", "outlier"] and found.ids == list("abcabc")
    assert (
        found.flagged().ids == found.flagged("label").ids == ["a", "b"] and found.flagged("outlier").ids == []
    )
    assert found.suggestions() == {"a": 2, "b": 2}
    assert found.filter("label", below=0.4).ids == ["a", "b"] and found.filter(ids=["c"]).ids == ["c", "c"]
    assert found.filter(where=lambda row: row["influence"] is None).kinds == ["outlier"]
    assert found.row(0) == {
        **{
            "id": "a",
            "position": 0,
            "issue": "label",
            "is_issue": True,
            "score": 0.0,
            "rank": 1,
            "given_label": 0,
        },
        **{"predicted_label": 2, "suggested_probability": 0.5, "influence": -0.25, "related_id": None},
        "detector": "loss",
    }


def test_a_suggestion_that_is_the_given_label_is_none():
    found = table(ids=("a", "b", "c", "d"))
    assert "c" not in found.suggestions()
    same = uw.IssueTable({**found.columns, "predicted_label": found.columns["given_label"]})
    assert same.suggestions() == {} and len(same.flagged("label")) == 2


def test_cleanlab_style_frame_is_in_the_training_order():
    found = table()
    backwards = uw.IssueTable({name: values[::-1] for name, values in found.columns.items()})
    frame = backwards.label_issues()
    assert list(frame.columns) == ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert frame.index.tolist() == ["a", "b", "c"] and frame["given_label"].tolist() == [0, 1, 2]
    assert frame["is_label_issue"].tolist() == [True, True, False] and frame["is_label_issue"].dtype == bool
    assert frame["given_label"].dtype == frame["predicted_label"].dtype == np.int64
    with refused("no label issues, only outlier"):
        found.filter("outlier").label_issues()


def test_hostile_ids_survive_the_file_and_the_csv(tmp_path):
    found = table(HOSTILE, experiment="x", detectors={"label": {"detector": "loss"}})
    path = found.save(tmp_path / "run")
    assert path == tmp_path / "run" / "issues.json"
    again = uw.IssueTable.load(tmp_path / "run")
    assert again.ids == HOSTILE * 2 and again.info["detectors"] == {"label": {"detector": "loss"}}
    for name, values in found.columns.items():
        for a, b in zip(values.tolist(), again.columns[name].tolist()):
            same = pytest.approx(a, rel=1e-6, nan_ok=True) if name in ("score", "influence") else a
            assert b == same and type(a) is type(b)
    content = json.loads(path.read_text())
    assert {"upweight", "experiment", "address", "written", "settings", "detectors", "columns"} <= set(
        content
    )
    assert content["columns"]["influence"][-1] is None and content["experiment"] == "x"
    rows = list(csv.DictReader(io.StringIO((tmp_path / "run/issues.csv").read_bytes().decode())))
    assert [row["id"] for row in rows[:3]] == HOSTILE[:3] and rows[0]["is_issue"] == "True"
    assert len(rows) == 2 * len(HOSTILE) and rows[-1]["influence"] == "" and rows[3]["id"] == "\\ud800"


def test_labels_that_are_numbers_keep_every_digit(tmp_path):
    found = table()
    exact = uw.IssueTable({**found.columns, "given_label": [0.1 + 0.2, 1e-300, -7.0, None, 2**60 + 1, 1.0]})
    exact.save(tmp_path)
    again = uw.IssueTable.load(tmp_path).columns["given_label"].tolist()
    assert again == [0.1 + 0.2, 1e-300, -7.0, None, 2**60 + 1, 1.0] and type(again[2]) is float


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    import pandas

    read = pandas.read_parquet(table(["a", 7, "c"]).to_parquet(tmp_path / "deep/t.parquet"))
    assert read["id"].tolist() == ["a", "7", "c"] * 2 and read["is_issue"].dtype == bool
    read = pandas.read_parquet(table([5, 6, 7]).to_parquet(tmp_path / "t.parquet"))
    assert read["id"].dtype == np.int64 and read["given_label"].tolist() == [0, 1, 2] * 2
    assert np.isnan(read["influence"].to_numpy()[3:]).all()


def test_a_damaged_file_is_refused(tmp_path):
    path = table().save(tmp_path)
    whole = path.read_bytes()
    with refused("no file"):
        uw.IssueTable.load(tmp_path / "elsewhere")
    number = whole.index(b'"score": [') + len(b'"score": [')
    for damaged in (
        whole[:-40],
        b"",
        b"[1, 2]",
        b"\xff" * 50,
        b'{"columns": {}}',
        b"[" * 100_000,
        whole.replace(b'"label"', b'"LABEL"'),
        whole[:number] + b"1" + whole[number + 1 :],
    ):
        assert damaged != whole
        path.write_bytes(damaged)
        with refused("damaged"):
            uw.IssueTable.load(path)


def test_it_knows_its_training_data(tmp_path):
    train = uw.Examples((torch.arange(3.0)[:, None], torch.arange(3)))
    other = uw.Examples((torch.ones(3, 1), torch.arange(3)))
    table(settings={"train": train.fingerprint()}, experiment="pets").save(tmp_path)
    assert len(uw.IssueTable.load(tmp_path, train=train)) == 6
    with pytest.raises(uw.CacheMismatchError, match=r"other training data .of the experiment 'pets'"):
        uw.IssueTable.load(tmp_path, train=other)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": None}, "lacks the column 'score'"),
        ({"score": [0.5]}, "one length"),
        ({"score": [2.0] * 6}, "score of row 0 is 2.0, expected 0 to 1"),
        ({"score": [float("nan")] * 6}, "score of row 0 is nan"),
        ({"issue": ["typo"] * 6}, "issue holds 'typo'"),
        ({"is_issue": ["yes"] * 6}, "neither true nor false"),
        ({"position": ["one"] * 6}, "no number"),
        ({"given_label": [[1]] * 6}, "holds list"),
        ({"id": [1.5] * 6}, "use integers or strings"),
    ],
)
def test_columns_that_are_none_are_refused(change, said):
    columns = {**table().columns, **change}
    with refused(said):
        uw.IssueTable({name: values for name, values in columns.items() if values is not None})


def test_unknown_kinds_are_refused():
    with refused("no kind of issue 'labels' -> one of label, near_duplicate"):
        table().filter("labels")


def test_the_terminal_is_given_no_control_codes():
    console = Console(record=True, width=120, file=io.StringIO())
    found = table(
        HOSTILE, classes=["cat", "\x1b[2Jdog", "emu"], influence={"unit": "nats"}, settings={"precision": 0.8}
    )
    console.print(found)
    text = console.export_text()
    assert (
        "\x1b" not in text
        and "cat -> emu (50%)" in text
        and "effect (nats)" in text
        and "at an expected" in text
    )
