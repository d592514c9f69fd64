"""`upweight attribute` and `upweight evaluate`, as typed, on images and on a table."""

import json
import sys
import textwrap
from html.parser import HTMLParser

import numpy as np
import pytest
from projects import IMAGES, TABLE

import upweight as uw
from upweight.attributors import by_name
from upweight.evaluate import comparison
from upweight.report import evaluation

QUICK = ("--subsets", "6", "--seeds", "2")


REAL_FIGURES, REAL_BASELINES = evaluation.figures, by_name.BASELINES
STAND_IN = {"identity-baseline": ("GradDot", {}), "classifiers-only": ("Representer", {})}
"""Two baselines for all: one that always applies, and one for classifiers."""


def with_baselines(monkeypatch, baselines):
    monkeypatch.setattr(by_name, "BASELINES", baselines)
    monkeypatch.setattr(comparison, "BASELINES", baselines)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working folder with the experiments' files; loading them leaves no trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(evaluation, "figures", lambda comparison: {})  # as without matplotlib, and quicker
    with_baselines(monkeypatch, STAND_IN)
    for name, text in {"images.py": IMAGES, "table.py": TABLE}.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    yield tmp_path
    for name in ("images", "table"):
        sys.modules.pop(name, None)


def trained(place):
    return (place / "log").read_text().splitlines()


def test_the_figures_are_those_of_lds_by_hand(upweight, place):
    code, out, _ = upweight("evaluate", "images.py:made", *QUICK, "--methods", "ekfac,grad-cos", "--json")
    assert code == 0
    found = json.loads(out)
    experiment = uw.Experiment.load("images.py:made")
    bank = uw.RetrainingBank(
        place / "runs/tiny-images/bank",
        experiment.train_fn,
        experiment.task,
        30,
        subsets=6,
        seeds=2,
        settings={"fraction": 0.5, "train": experiment.train.fingerprint()},
        progress=False,
    )
    outcomes = bank.outcomes("query")
    for name, made in {
        "ekfac": uw.Influence(experiment.model, experiment.task),
        "grad-cos": uw.GradCos(experiment.model, experiment.task),
        "identity-baseline": uw.GradDot(experiment.model, experiment.task),
    }.items():
        by_hand = uw.lds(made.fit(experiment.train).attribute(experiment.query), outcomes)
        row = next(row for row in found["methods"] if row["name"] == name)
        assert row["lds"] == pytest.approx(by_hand.value, abs=1e-12)
        assert (row["low"], row["high"]) == (by_hand.low, by_hand.high)
        assert row["share_of_ceiling"] == pytest.approx(by_hand.value / found["ceiling"]["value"])
        assert row["baseline"] == (name == "identity-baseline")
        np.testing.assert_array_equal(np.array(row["per_query"], float), by_hand.per_query)
        saved = uw.Scores.load(place / "runs/tiny-images/scores" / name)
        assert saved.values.shape == (10, 30)
    values = [row["lds"] for row in found["methods"]]
    assert values == sorted(values, reverse=True) and len(values) == 4
    assert (found["bank"]["finished"], found["subsets"], found["train"], found["queries"]) == (12, 6, 30, 10)


def test_the_table_the_files_and_a_run_that_is_finished(upweight, place, monkeypatch):
    monkeypatch.setattr(evaluation, "figures", REAL_FIGURES)
    code, out, err = upweight("evaluate", "images.py:made", *QUICK, "--out", "run")
    assert code == 0 and "12 trained now" in err
    for words in (
        "ekfac",
        "grad-dot",
        "identity-baseline",
        "6 subsets of 50% x 2 seeds",
        "noise ceiling",
        "evaluate.html",
    ):
        assert words in out
    assert {path.name for path in (place / "run").iterdir()} == {
        *("bank", "scores", "evaluate.json", "evaluate.html", "evaluate-lds.png", "evaluate-queries.png")
    }
    first = json.loads((place / "run/evaluate.json").read_text())
    assert (place / "run/evaluate-lds.png").read_bytes().startswith(b"\x89PNG")
    before = trained(place)
    code, out, err = upweight("evaluate", "images.py:made", *QUICK, "--out", "run", "--json")
    again = json.loads(out)
    assert "0 trained now" in err and not (place / "log").exists() and len(before) == 12
    assert [row["lds"] for row in again["methods"]] == [row["lds"] for row in first["methods"]]


def test_a_run_that_is_stopped_goes_on_where_it_was(upweight, place):
    (place / "stop").write_text("5")
    code, out, err = upweight("evaluate", "images.py:made", *QUICK, "--out", "run", "--json")
    assert code == 130 and out == "" and "Traceback" not in err
    said = err.strip().splitlines()[-1]
    assert said.startswith(
        "stopped: 4 models are kept in run/bank -> go on with: upweight evaluate images.py:made"
    )
    (place / "stop").unlink()
    stopped = trained(place)
    code, resumed, _ = upweight("evaluate", "images.py:made", *QUICK, "--out", "run", "--json")
    assert code == 0 and json.loads(resumed)["bank"]["trained_now"] == 8
    assert len(set(stopped[:4]) | set(trained(place))) == 12 and len(trained(place)) == 8
    _, whole, _ = upweight("evaluate", "images.py:made", *QUICK, "--out", "other", "--json")
    rows = [[(row["name"], row["lds"]) for row in json.loads(text)["methods"]] for text in (resumed, whole)]
    assert rows[0] == rows[1]


def test_a_run_grows_but_refuses_what_does_not_belong_to_it(upweight, place):
    upweight("evaluate", "images.py:made", *QUICK, "--out", "run", "--methods", "grad-dot")
    code, out, _ = upweight(
        *(
            "evaluate",
            "images.py:made",
            "--subsets",
            "8",
            "--seeds",
            "2",
            "--out",
            "run",
            "--methods",
            "grad-dot",
            "--json",
        )
    )
    assert code == 0 and json.loads(out)["bank"]["trained_now"] == 4
    code, out, err = upweight("evaluate", "images.py:made", *QUICK, "--out", "run", "--fraction", "0.7")
    assert code == 2 and "fraction" in err and " -> " in err and err.splitlines()[-1].startswith("error: ")
    code, _, err = upweight("evaluate", "table.py:houses", *QUICK, "--out", "run")
    assert code == 2 and err.splitlines()[-1].startswith("error: ")


def test_the_baselines_are_shown_unasked(upweight, place, monkeypatch):
    with_baselines(monkeypatch, REAL_BASELINES)
    arguments = ("--subsets", "6", "--seeds", "2", "--methods", "grad-dot", "--json")
    found = json.loads(upweight("evaluate", "images.py:made", *arguments)[1])
    names = {row["name"]: row["baseline"] for row in found["methods"]}
    shown = {"random", "loss", "margin", "grad-norm", "same-class", "embedding-similarity"}
    assert names == {"grad-dot": False, **dict.fromkeys(shown, True)}
    assert set(found["left_out"]) == {"aum", "confident-learning", "el2n"}
    found = json.loads(upweight("evaluate", "table.py:houses", *arguments)[1])
    assert {row["name"] for row in found["methods"]} == {"grad-dot"} | shown - set(found["left_out"])
    assert "margin" in found["left_out"] and "random" not in found["left_out"]
    # Asked for, one that does not apply is an error.
    code, _, err = upweight("evaluate", "table.py:houses", *QUICK, "--methods", "grad-dot,margin")
    assert code == 2 and err.splitlines()[-1].startswith("error: ")


def test_one_seed_has_no_ceiling(upweight, place):
    arguments = ("evaluate", "images.py:made", "--subsets", "6", "--seeds", "1", "--methods", "ekfac")
    code, out, _ = upweight(*arguments)
    assert code == 0 and "no noise ceiling" in out and "matplotlib" not in out
    found = json.loads(upweight(*arguments, "--json")[1])
    assert found["ceiling"] is None and found["methods"][0]["share_of_ceiling"] is None


def test_nothing_is_retrained_before_a_method_refuses(upweight, place):
    for methods, said in [
        ("ekfac,magic", "there is no method 'magic' -> one of"),
        ("ekfac:damping=-3", "-3"),
    ]:
        code, _, err = upweight("evaluate", "images.py:made", *QUICK, "--methods", methods)
        assert code == 2 and said in err.splitlines()[-1]
    with open(place / "images.py", "a") as file:
        file.write("\ndef fixed():\n    return made(train_fn=None)\n")
    code, _, err = upweight("evaluate", "images.py:fixed", *QUICK)
    assert code == 2 and "has no train_fn" in err.splitlines()[-1]
    assert not (place / "log").exists() and not list(place.glob("runs/*/bank"))


def test_runs_that_fail_are_warned_of_in_one_line_and_in_the_report(upweight, place):
    with open(place / "images.py", "a") as file:
        file.write(
            "\ndef failing(indices, seed):\n"
            "    if seed == 1 and 0 in indices and 1 in indices: raise ValueError('no <luck>')\n"
            "    return train_fn(indices, seed)\n"
            "def unlucky():\n    return made(train_fn=failing)\n"
        )
    code, out, err = upweight("evaluate", "images.py:unlucky", "--subsets", "12", "--seeds", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["bank"]["failed"] and found["subsets_dropped"] == len(found["bank"]["failed"])
    warning, missing = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert "no figures: matplotlib is missing -> pip install" in missing
    assert "failed twice" in warning and found["warnings"] == [warning.removeprefix("warning: ")]
    assert "no &lt;luck&gt;" in (place / "runs/tiny-images/evaluate.html").read_text()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_is_complete_escaped_and_light_and_dark(upweight, place):
    code, out, err = upweight(
        "evaluate", "table.py:houses", "--subsets", "30", "--seeds", "3", "--out", "run"
    )
    assert code == 0, err
    text = (place / "run/evaluate.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not [
        key for _, attributes in page.tags for key in attributes if key in ("src", "href") or key[:2] == "on"
    ]
    assert "http" not in text.replace("http-equiv", "") and "prefers-color-scheme: dark" in text
    words = " ".join(page.words)
    for shown in ("houses & <gardens>", "dot<i>", "<script>", "<b>", "noise ceiling", "classifiers-only"):
        assert shown in words
    # The exact influence of ridge regression is nearly the truth, and the best.
    found = json.loads((place / "run/evaluate.json").read_text())
    best = found["methods"][0]
    assert best["name"] == "exact" and best["lds"] > 0.8 * found["ceiling"]["value"]
    assert best["above_best_baseline"]["value"] == pytest.approx(
        best["lds"] - max(row["lds"] for row in found["methods"] if row["baseline"])
    )
    assert "Classification" in found["left_out"]["classifiers-only"]
    assert "left out: classifiers-only" in out and found["query_ids"][3] == "<script>3"
    assert found["sentence"] in words and "The best method is exact" in words


def test_attribute_prints_and_keeps_the_scores(upweight, place):
    code, out, _ = upweight("attribute", "images.py:made", "--out", "run", "--top", "2", "--queries", "3")
    assert code == 0 and "proponents" in out and "nats" in out and ("dim" in out or "bright" in out)
    code, out, err = upweight("attribute", "images.py:made", "--out", "run", "--top", "4", "--json")
    found = json.loads(out)
    assert "printed while loading" in err and len(found["queries"]) == 10
    experiment = uw.Experiment.load("images.py:made")
    by_hand = (
        uw.Influence(experiment.model, experiment.task).fit(experiment.train).attribute(experiment.query)
    )
    assert uw.Scores.load(found["scores"]).values.equal(by_hand.values)
    for row, query in enumerate(found["queries"]):
        positive = int((by_hand.values[row] > 0).sum())
        assert [one["id"] for one in query["proponents"]] == by_hand.top_k(4).ids[row][:positive]
        assert [one["score"] for one in query["opponents"]] == by_hand.bottom_k(4).values[row].tolist()
        label = int(experiment.query.take([row])[1])
        assert query["shown"] == ["dim", "bright"][label]


def test_attribute_on_a_table_names_rows_by_their_ids(upweight, place):
    code, out, _ = upweight("attribute", "table.py:houses", "--method", "exact", "--queries", "2")
    assert code == 0 and "house-" in out and "<script>1" in out and "<b>" in out and "<script>2" not in out
    code, out, _ = upweight("attribute", "table.py:houses", "--method", "dot<i>", "--json")
    assert code == 0 and json.loads(out)["unit"] is None
    assert json.loads(out)["scores"].startswith("runs/houses----gardens-/scores/dot-i-~")
    assert uw.Scores.load(place / json.loads(out)["scores"]).unit is None


@pytest.mark.parametrize("command", ["attribute", "evaluate"])
def test_errors_of_the_experiment_are_one_line(upweight, place, command):
    (place / "raises.py").write_text("x = 1\ny = {}['key']\n")
    for address, said in [
        ("raises.py:experiment", "raised KeyError: 'key' (line 2: y = {}['key'])"),
        ("nowhere.py:experiment", "nowhere.py does not exist"),
        ("images.py:mad", "images.py has no 'mad'"),
        ("images.py:x", "expected an upweight.Experiment"),
    ]:
        code, out, err = upweight(command, address)
        assert code == 2 and said in err and "Traceback" not in err
        assert err.strip().splitlines()[-1].startswith("error: ") and "Experiment '" not in out
    with pytest.raises(uw.UpweightError):
        upweight(command, "raises.py:experiment", "--debug")
    (place / "taken").touch()
    code, _, err = upweight(command, "images.py:made", "--out", "taken")
    assert code == 2 and "taken cannot be written" in err


@pytest.mark.slow
def test_worker_processes_import_the_file_and_give_the_same(upweight, place):
    one = upweight("evaluate", "images.py:made", *QUICK, "--out", "one", "--json")[1]
    code, two, _ = upweight("evaluate", "images.py:made", *QUICK, "--out", "two", "--json", "--jobs", "2")
    assert code == 0
    rows = [[(row["name"], row["lds"]) for row in json.loads(text)["methods"]] for text in (one, two)]
    assert rows[0] == rows[1]


def test_a_method_may_read_the_queries_in_a_form_of_its_own(upweight, place):
    """Its fingerprint of them is then another than the bank's, as that of the texts which BM25 reads."""
    with open(place / "images.py", "a") as file:
        file.write(
            "\nclass Reader(uw.GradDot):\n"
            "    def attribute(self, query):\n"
            "        found = super().attribute(query)\n"
            "        return uw.Scores(found.values, found.query_ids, found.train_ids, None, {'queries': 'words'})\n"
            "def read():\n    return made(methods={'words': Reader})\n"
        )
    code, _, err = upweight("evaluate", "images.py:read", *QUICK, "--json")
    assert code == 0, err
    experiment = uw.Experiment.load("images.py:read")
    saved = uw.Scores.load(place / "runs/tiny-images/scores/words")
    assert saved.info["queries"] == experiment.query.fingerprint()
