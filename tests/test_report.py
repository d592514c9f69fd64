"""The report without a browser: it is made of whatever is there, escaped, and never stopped by a file."""

import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from refusals import refused
from run_folders import (
    HOSTILE,
    evaluation,
    everything,
    hostile,
    images,
    issues,
    put,
    repair,
    verification,
    write_scores,
)

import upweight as uw
from upweight.evaluate.outcomes import Outcomes
from upweight.fingerprint import model_fingerprint
from upweight.report import build, summary
from upweight.report.calibration import POINTS, calibration
from upweight.report.issue_rows import issue_data
from upweight.report.queries import cards, concentration
from upweight.report.run_files import read_run


class Page(HTMLParser):
    """What a browser would make of the page: its tags, and its words outside script and style."""

    def __init__(self, file):
        super().__init__()
        self.html = file.read_text(encoding="utf-8")
        self.tags, self.words, self.ids, self._inside = [], [], set(), None
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids.add(attrs.get("id"))
        self._inside = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.words.append(data)

    @property
    def data(self):
        found = re.search(
            r'<script type="application/json" id="issue-data">(.*?)</script>', self.html, re.DOTALL
        )
        return json.loads(found[1])


def test_everything_is_there_with_the_right_numbers(tmp_path):
    experiment = images()
    page = Page(build(everything(tmp_path, experiment), experiment))
    assert {"queries", "scores", "trust", "issues", "repair", "made"} <= page.ids and "more" not in page.ids
    for words in (
        "30 training examples were scored for each of 6 queries by ekfac",
        "The best method is ekfac.",
        "of 30 training examples",
        "accuracy on the test data went from 90.0% to 95.0%",
        "predictions keep 25% of the distance",
        "noise ceiling of 0.800 (0.700 to 0.900)",
        "Slope 0.50, correlation 1.00, 21 pairs",
        "0.300 to 0.500",
        "0.400",
        "needs <classes>",
        "−1.5",
        "0.01 after; training itself had left 0.02",
        "membership inference AUROC",
    ):
        assert words in page.text, words
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 6
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(sources) > 6 and all(one.startswith("data:image/png;base64,iVBOR") for one in sources)


def test_the_neighbours_are_those_of_the_scores(tmp_path):
    experiment = images()
    write_scores(tmp_path, experiment)
    scores = uw.Scores.load(tmp_path / "scores/ekfac")
    for card in cards(scores, experiment, neighbours=3):
        row = scores.values[card.id]
        order = torch.argsort(row, descending=True)
        assert [one.id for one in card.proponents] == order[:3].tolist()
        assert [one.id for one in card.opponents] == order.flip(0)[:3].tolist()
        assert [one.score for one in card.proponents] == pytest.approx(row[order[:3]].tolist())
        assert max(float(one.share) for one in card.proponents + card.opponents) == 100
        guess = experiment.model(experiment.query.take([card.id])[0]).argmax().item()
        assert card.guess == experiment.classes[guess]
        assert card.right == (guess == experiment.query.take([card.id])[1].item())
    assert cards(scores, experiment)[0].right is False


def test_sides_hold_only_their_own_sign():
    experiment = images()
    values = torch.full((6, 30), 0.25)
    scores = uw.Scores(values, range(6), range(30), "nats")
    assert all(len(card.proponents) == 8 and not card.opponents for card in cards(scores, experiment))
    assert all(
        not card.proponents and not card.opponents
        for card in cards(uw.Scores(0 * values, range(6), range(30)), None)
    )


def test_concentration_counts_what_makes_half():
    values = torch.tensor([[4.0, 3, 2, 1, -9], [10, 1, 1, 1, 1], [1, 1, 1, 1, 0], [-1, 0, 0, 0, 0]])
    # 4 + 3 of 10; 10 of 14; 1 + 1 of 4; the last has no proponents
    assert concentration(uw.Scores(values[:1], [0], range(5))) == 2
    assert concentration(uw.Scores(values, range(4), range(5))) == 2
    assert concentration(uw.Scores(values[1:2], [0], range(5))) == 1
    assert concentration(uw.Scores(values[3:], [0], range(5))) is None


def test_calibration_recovers_a_known_slope():
    generator = np.random.default_rng(0)
    masks = generator.random((40, 12)) < 0.5
    values = generator.normal(size=(20, 12))
    offsets = generator.normal(size=(1, 1, 20))  # each query's own level cancels
    actual = 0.5 * ((~masks) @ values.T)[:, None, :] + offsets
    found = calibration(
        uw.Scores(torch.tensor(values), range(20), range(12), "nats"), Outcomes(masks, actual)
    )
    assert found["slope"] == pytest.approx(0.5, abs=1e-12) and found["correlation"] == pytest.approx(
        1, abs=1e-12
    )
    assert found["pairs"] == 800 and len(found["points"]) == POINTS
    assert all(y == pytest.approx(0.5 * x, rel=2e-3) for x, y in found["points"])
    scores = uw.Scores(torch.tensor(values), range(20), range(12))
    assert calibration(scores, Outcomes(masks, actual)) is None  # only ranks
    flat = uw.Scores(torch.zeros(20, 12), range(20), range(12), "nats")
    assert calibration(flat, Outcomes(masks, actual)) is None


PARTS = {
    "queries": lambda folder, experiment: write_scores(folder, experiment),
    "trust": lambda folder, experiment: put(folder, "evaluate.json", evaluation()),
    "issues": lambda folder, experiment: put(folder, "issues.json", issues(30)),
    "repair": lambda folder, experiment: put(folder, "repair/repair.json", repair()),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_is_a_report_that_says_what_is_missing(tmp_path, part):
    experiment = images()
    PARTS[part](tmp_path, experiment)
    page = Page(build(tmp_path, experiment))
    assert {part, "made", "more"} <= page.ids and not set(PARTS) - {part} & page.ids
    commands = {"queries": "attribute", "trust": "evaluate", "issues": "audit", "repair": "repair"}
    for other, verb in commands.items():
        command = (
            f"upweight {verb} pets.py:experiment --out {tmp_path}"
            if part in ("trust", "issues")
            else f"upweight {verb} "
        )
        assert (command in page.text) == (other != part or verb == "repair")  # repair asks to be verified
    assert ("--verify" in page.text) == (part == "repair")


def test_without_the_experiment_examples_are_ids(tmp_path):
    build(everything(tmp_path, images()))
    page = Page(tmp_path / "report.html")
    assert "known by their ids" in page.text and not [1 for tag, _ in page.tags if tag == "img"]
    assert "upweight report" in page.text and page.data["looks"] == {}


def test_a_folder_with_nothing_is_refused(tmp_path):
    with refused("holds nothing to report -> upweight attribute, evaluate"):
        build(tmp_path)
    with refused("the run folder .*nowhere does not exist -> upweight attribute"):
        build(tmp_path / "nowhere")
    with refused("is a file"):
        build(put(tmp_path, "file", "x"))
    put(tmp_path, "issues.json", "{")
    with refused("holds nothing to report .issues.json cannot be read"):
        build(tmp_path)
    assert not (tmp_path / "report.html").exists()


DAMAGED = {
    "not JSON": "{",
    "not text": "\x00\x01",
    "a list": "[]",
    "empty": "",
    "deep": "[" * 100_000,
    "other keys": '{"columns": 3, "methods": 3, "method": 3, "evidence": 3, "experiment": "pets"}',
    "rows of other lengths": json.dumps(
        {"columns": {**issues(3)["columns"], "score": [0.5]}, "methods": [3, None, {}]}
    ),
    "wrong kinds": json.dumps(
        {
            "experiment": ["pets"],
            "methods": [{"name": {}, "lds": "high", "per_query": 7, "calibration": {"points": [1, "a"]}}],
            "columns": {name: [None, {}, []] for name in issues(1)["columns"]},
            "method": {},
            "evidence": {"groups": {"test": {"n": "many", "actual": {}}}, "seconds": "long", "objective": 3},
            "seconds": [],
            "accuracy": {"test": 3},
            "seeds": 5,
        }
    ),
    "a false seal": json.dumps({**issues(3), "sha256": "0" * 64, "methods": []}),
}


@pytest.mark.parametrize("file", ["evaluate.json", "issues.json", "repair/repair.json", "repair/verify.json"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_a_notice_and_stops_nothing(tmp_path, file, what):
    experiment = images()
    everything(tmp_path, experiment)
    put(tmp_path, file, DAMAGED[what])
    page = Page(build(tmp_path, experiment))
    assert "queries" in page.ids
    harmless = file != "issues.json" and what in ("a false seal", "rows of other lengths")
    if not harmless:
        assert "Note." in page.text and file in page.text
    if file == "issues.json":
        assert "issues" not in page.ids


def test_a_damaged_score_file_is_a_notice_and_another_is_taken(tmp_path):
    experiment = images()
    write_scores(tmp_path, experiment, "ggn")
    (tmp_path / "scores/ekfac.safetensors").write_bytes(b"nonsense")
    put(tmp_path, "evaluate.json", evaluation())  # whose best method is the damaged one
    page = Page(build(tmp_path, experiment))
    assert "by ggn" in page.text and "scores/ekfac.safetensors is left out" in page.text


def test_methods_come_before_baselines_and_the_best_first(tmp_path):
    experiment = images()
    for name in ("loss", "random", "grad-dot", "ggn-damping=0.1"):
        write_scores(tmp_path, experiment, name)
    put(tmp_path, "evaluate.json", evaluation(("ggn:damping=0.1", "loss")))
    assert read_run(tmp_path, experiment).method == "ggn:damping=0.1"
    (tmp_path / "evaluate.json").unlink()
    assert read_run(tmp_path, experiment).method in ("grad-dot", "ggn-damping=0.1")


def test_what_belongs_to_another_experiment_is_left_out(tmp_path):
    experiment = images()
    everything(tmp_path, experiment)
    other = images(name="houses")
    page = Page(build(tmp_path, other))
    for name in ("evaluate.json", "issues.json"):
        assert f"{name} was written for the experiment 'pets', not for 'houses'" in page.text
    x, y = experiment.train.take(range(30))
    changed = uw.Experiment(experiment.model, experiment.task, (1 - x, y), experiment.query, name="pets")
    run = read_run(tmp_path, changed)
    assert run.scores is None and "of other training examples" in run.notices[0]
    smaller = uw.Experiment(experiment.model, experiment.task, (x[:9], y[:9]), experiment.query, name="pets")
    assert read_run(tmp_path, smaller).issues is None
    put(tmp_path, "issues.json", issues(30, settings={"train": "another fingerprint"}))
    assert "issues.json is about other training data" in " ".join(read_run(tmp_path, experiment).notices)


def test_a_verification_of_an_earlier_repair_is_left_out(tmp_path):
    """Repairing again without --verify leaves verify.json behind, which is about the repair before."""
    experiment = images()
    everything(tmp_path, experiment)

    def marked(after):
        return {"before": "a", "after": after, "train": experiment.train.fingerprint()}

    def written(content, after):
        return {**content, "evidence": {**content["evidence"], "fingerprints": marked(after)}}

    put(tmp_path, "repair/verify.json", {**verification(), "info": {"fingerprints": marked("b")}})
    put(tmp_path, "repair/repair.json", written(repair(), "b"))
    assert "Against real retraining" in Page(build(tmp_path, experiment)).text
    put(tmp_path, "repair/repair.json", written(repair(removed=[7]), "c"))
    page = Page(build(tmp_path, experiment))
    assert "Against real retraining" not in page.text and "keep 25%" not in page.text
    assert "repair/verify.json is about another repair" in page.text and "--verify" in page.text
    (tmp_path / "repair/repair.json").unlink()
    assert "Against real retraining" not in Page(build(tmp_path, experiment)).text


def test_a_repair_of_other_data_is_left_out_and_figures_of_other_weights_are_told(tmp_path):
    experiment = images()
    everything(tmp_path, experiment)
    evidence = repair()["evidence"]
    put(tmp_path, "repair/repair.json", repair(evidence={**evidence, "fingerprints": {"train": "other"}}))
    page = Page(build(tmp_path, experiment))
    assert "repair/repair.json is about other training data" in page.text and "repair" not in page.ids
    mine = {"train": experiment.train.fingerprint(), "before": model_fingerprint(experiment.model)}
    put(tmp_path, "repair/repair.json", repair(evidence={**evidence, "fingerprints": mine}))
    assert not [n for n in read_run(tmp_path, experiment).notices if "weights" in n]
    method = uw.GradDot(experiment.model, experiment.task, progress=False).fit(experiment.train)
    method.attribute(experiment.query).save(tmp_path / "scores" / "ekfac")
    experiment.model[1].bias.data += 1.0  # trained again since
    notices = read_run(tmp_path, experiment).notices
    for name in ("scores/ekfac.safetensors", "repair/repair.json"):
        assert any(n.startswith(f"{name} was made with other weights") for n in notices), name


def test_the_repair_shows_what_was_changed(tmp_path):
    experiment = images()
    put(tmp_path, "repair/repair.json", repair(removed=[7, "gone"], reweighted=[[9, 0.5]]))
    page = Page(build(tmp_path, experiment))
    part = page.html[page.html.index('id="repair"') :]
    assert part.count('alt="changed training example') == 4  # of 3, 4, 7 and 9; "gone" is not in the data
    assert "dog → dog" in page.text and "cat → cat" in page.text  # labels are k % 2, and became 1 and 0
    assert "dog forgotten" in page.text and "dog weight 0.5" in page.text and "gone" in page.text
    many = [[k, 1 - k % 2] for k in range(30)]
    put(tmp_path, "repair/repair.json", repair(relabelled=many))
    page = Page(build(tmp_path, experiment))
    assert page.html.count('alt="changed training example') == 24
    assert "The first 24 of 30 changed examples" in page.text
    page = Page(build(tmp_path))  # without the experiment: ids and numbers
    assert "→ 1" in page.text and "<img" not in page.html


def test_commands_can_be_typed_as_they_are_shown(tmp_path):
    folder = tmp_path / "my run; rm"
    put(folder, "issues.json", issues(30, address="my code/pets.py:experiment"))
    commands = [command for _, command in summary.missing(read_run(folder))]
    assert commands and all(
        shlex.split(one)[2:5] == ["my code/pets.py:experiment", "--out", str(folder)] for one in commands
    )


def test_verifying_names_what_was_repaired(tmp_path):
    """Without the options of the repair, `repair --verify` would make another one, and verify that."""

    def command(**content):
        put(tmp_path, "repair/repair.json", repair(**content))
        (text,) = [one for what, one in summary.missing(read_run(tmp_path)) if "really retrained" in what]
        return shlex.split(text)[5:]

    ids = [3, 14, "a b;c"]
    assert command(removed=ids, source="--remove") == ["--remove", "3,14,a b;c", "--verify"]
    assert command(source="RUN/decisions.sqlite") == ["--verify"]
    both = command(removed=list(range(99)), source="--remove and --relabel", method="corrected")
    assert both == ["--remove", "FILE", "--relabel", "FILE", "--method", "corrected", "--verify"]


def test_issue_rows_are_counted_cut_and_sorted(monkeypatch):
    monkeypatch.setattr("upweight.report.issue_rows.ROWS", 40)
    content = issues(30)
    data = issue_data(content, None)
    flags = np.array(content["columns"]["is_issue"])
    kinds = np.array(content["columns"]["issue"])
    assert data["counts"] == {kind: (int(flags[kinds == kind].sum()), 30) for kind in dict.fromkeys(kinds)}
    assert (data["rows"], data["all"], data["examples"]) == (40, 150, 30)
    assert sum(data["flagged"]) == min(40, flags.sum())
    scores = np.array(data["columns"]["score"])
    assert (np.diff(scores[: sum(data["flagged"])]) >= 0).all()
    texts = data["texts"]
    assert {texts[k] for k in data["columns"]["given_label"]} <= {"cat", "dog"}


def test_class_numbers_are_named(tmp_path):
    content = issues(30, labels=(0, 1))
    assert set(issue_data(content, images())["texts"]) >= {"cat", "dog"}
    assert set(issue_data({**content, "classes": ["no", "yes"]}, None)["texts"]) >= {"no", "yes"}
    regression = issues(30, labels=(0.25, None))
    assert "0.25" in issue_data(regression, None)["texts"]


def test_hostile_data_is_text_and_nothing_else(tmp_path):
    experiment = hostile(tmp_path)
    file = build(tmp_path, experiment)
    assert file.stat().st_size < 1_000_000
    page = Page(file)
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "issue-data"}, {}]
    allowed = {"src": "data:image/png", "href": "#"}
    for tag, attributes in page.tags:
        assert tag not in ("iframe", "object", "embed", "link", "base", "form", "a:script", "i:onerror")
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in allowed:
                assert value.startswith(allowed[name])
    assert "<script>window.hit = 1</script>" in page.text and "{{ 7 * 7 }}" in page.text
    assert "(10,000,000 characters, the first 600 shown)" in page.text or "characters, the first" in page.text
    for hidden in "\u202e\u2066\x00\x1b":
        assert hidden not in page.html
    assert "漢字" in page.text and "עברית" in page.text
    data = page.data
    assert HOSTILE[0] in data["texts"] and all("\u202e" not in text for text in data["texts"])


def test_the_page_asks_for_nothing(tmp_path):
    file = build(everything(tmp_path, images()), images())
    html = file.read_text(encoding="utf-8")
    assert re.findall(r"https?://|url\(|@import|<link", html) == []
    policy = next(
        a["content"] for tag, a in Page(file).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith(
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-"
    )
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
