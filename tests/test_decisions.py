"""Decisions: nothing is lost, whoever writes and however the program ends, and a bad file is never believed."""

import csv
import io
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from refusals import refused

import upweight as uw


@pytest.fixture
def file(tmp_path):
    return tmp_path / "run" / "decisions.sqlite"


def test_ids_and_labels_come_back_as_what_they_were(file):
    decisions = uw.Decisions(file)
    labels = {7: 3, "7": "cat", "ü'); DROP TABLE decisions; --": 0, "": 2.5, -1: "", "\ud800": 1}
    for name, label in labels.items():
        decisions.set(name, "relabel", label)
    decisions.set(np.int64(8), "relabel", torch.tensor(4))
    found = uw.Decisions(file).labels()
    assert found == labels | {8: 4}
    assert [type(key) for key in found] == [type(key) for key in [*labels, 8]]
    assert all(type(value) in (int, float, str) for value in found.values())


def test_the_latest_decision_counts_and_the_history_keeps_all(file):
    before = datetime.now(timezone.utc)
    decisions = uw.Decisions(file)
    decisions.set(1, "drop", reviewer="ada")
    decisions.set(2, "keep", reviewer="ada")
    decisions.set(1, "relabel", 4, reviewer="bob")
    decisions.clear(2, reviewer="eve")
    assert list(decisions.all()) == [1]
    latest = decisions.all()[1]
    assert (latest.action, latest.label, latest.reviewer) == ("relabel", 4, "bob")
    assert abs((datetime.fromisoformat(latest.at) - before).total_seconds()) < 60
    assert (decisions.remove(), decisions.labels(), len(decisions)) == ([], {1: 4}, 1)
    assert [(name, one.action, one.reviewer) for name, one in decisions.history()] == [
        (1, "drop", "ada"),
        (2, "keep", "ada"),
        (1, "relabel", "bob"),
        (2, "undecided", "eve"),
    ]
    assert [one.action for _, one in decisions.history(2)] == ["keep", "undecided"]


def test_no_file_is_no_decisions_and_reading_makes_none(file):
    decisions = uw.Decisions(file)
    assert decisions.all() == {} and decisions.history() == [] and len(decisions) == 0
    assert decisions.to_csv() == "id,action,label,reviewer,at\n"
    assert not file.parent.exists()
    uw.Decisions(file).set(1, "keep")
    assert len(decisions) == 1  # opened before the file was there


def test_a_table_holds_every_decision(file, tmp_path):
    decisions = uw.Decisions(file)
    decisions.set('a,"b"\nc', "relabel", "x;y", reviewer="ü")
    decisions.set(3, "drop")
    text = decisions.to_csv(tmp_path / "new" / "table.csv")
    assert (tmp_path / "new" / "table.csv").read_text(encoding="utf-8") == text
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[:4] for row in rows] == [
        ["id", "action", "label", "reviewer"],
        ['a,"b"\nc', "relabel", "x;y", "ü"],
        ["3", "drop", "", ""],
    ]


WRITER = """
import sys
from upweight.explorer.decisions import Decisions
decisions = Decisions(sys.argv[1])
for number in range(20):
    decisions.set(number, "keep", reviewer=sys.argv[2])
"""


def test_two_programs_at_once_lose_nothing(file):
    """Both also race for making the file."""
    command = [sys.executable, "-c", WRITER, str(file)]
    writers = [subprocess.Popen([*command, name], stderr=subprocess.PIPE) for name in ("ada", "bob")]
    assert [writer.communicate(timeout=600)[1].decode() for writer in writers] == ["", ""]
    history = uw.Decisions(file).history()
    assert sorted((one.reviewer, name) for name, one in history) == [
        (who, number) for who in ("ada", "bob") for number in range(20)
    ]


def test_threads_that_race_for_making_the_file_lose_nothing(file):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: uw.Decisions(file).set(number, "drop"), range(24)))
    assert sorted(uw.Decisions(file).remove()) == list(range(24))


def test_a_killed_program_keeps_what_set_returned_from(file):
    code = WRITER + "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code, str(file), "ada"], timeout=600)
    assert killed.returncode == -9
    assert len(uw.Decisions(file)) == 20


@pytest.mark.parametrize(
    ("action", "label", "message"),
    [
        ("delete", None, "'delete' is unknown"),
        ("undecided", None, "'undecided' is unknown"),
        ("relabel", None, "'relabel' of example 1 came with label None"),
        ("keep", 3, "'keep' of example 1 came with label 3"),
        ("relabel", float("nan"), "the new label is nan"),
        ("relabel", True, "the new label is True"),
    ],
)
def test_what_is_no_decision_is_refused_and_not_written(file, action, label, message):
    with refused(message):
        uw.Decisions(file).set(1, action, label)
    assert not file.exists()


def test_an_id_that_is_none_is_refused(file):
    with refused(r"id\[0\] is 1.5"):
        uw.Decisions(file).set(1.5, "keep")


def test_another_experiment_is_refused(file):
    uw.Decisions(file, "pets").set(1, "keep")
    assert len(uw.Decisions(file, "pets")) == len(uw.Decisions(file)) == 1
    with refused("about experiment 'pets', this is 'cars'"):
        uw.Decisions(file, "cars")


def write_with_another_program(file, statement):
    with closing(sqlite3.connect(file)) as database, database:
        database.execute(statement)


def without_tables(file):
    file.unlink()
    write_with_another_program(file, "CREATE TABLE x (y)")


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "text": lambda file: file.write_bytes(b"id,action\n1,keep\n" * 50),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:5000]),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "no tables": without_tables,
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_refused(file, kind):
    decisions = uw.Decisions(file)
    for number in range(20):
        decisions.set(number, "keep", reviewer="somebody with a long name")
    DAMAGES[kind](file)
    with refused("cannot be used" if kind == "folder" else "is damaged, or does not hold decisions"):
        uw.Decisions(file)


def test_what_another_program_wrote_into_the_file_is_refused(file):
    decisions = uw.Decisions(file)
    decisions.set(1, "keep")
    write_with_another_program(file, "UPDATE decisions SET action = 'burn'")
    with refused("damaged.*'burn'"):
        decisions.all()


def test_a_newer_format_is_refused(file):
    uw.Decisions(file).set(1, "keep")
    write_with_another_program(file, "UPDATE facts SET value = '2' WHERE name = 'format'")
    with refused("is in format 2, this version reads 1"):
        uw.Decisions(file)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with refused("cannot be written"):
        uw.Decisions(tmp_path / "taken" / "decisions.sqlite").set(1, "keep")
