"""The explorer without a browser: what is decided is written down, and the panels show what there is."""

import shlex
import tempfile
from pathlib import Path

import explorers
import pytest
import torch
from explorers import CLASSES, LABELS, N, experiment, filled, issues, pictures
from refusals import refused

import upweight as uw
from upweight.explorer import panels
from upweight.explorer.page import _answered, decide
from upweight.explorer.run import Run
from upweight.report import build

bundle, run = explorers.bundle, explorers.run  # the fixtures


# Decisions -----------------------------------------------------------------------------------------------------------


def event(run, number, action, **more):
    return {"action": action, "row": number, "key": run.mark(run.issues.row(number)["id"]), "seen": ""} | more


def test_each_key_writes_its_decision_and_goes_on(run):
    shown = decide(run, LABELS, "ada", event(run, 0, "keep"))
    assert 'data-row="1"' in shown
    decide(run, LABELS, "ada", event(run, 1, "relabel"))
    decide(run, LABELS, "ada", event(run, 2, "relabel", label=1))
    shown = decide(run, LABELS, "ada", event(run, 3, "drop"))
    assert "4 of 4 are decided" in shown
    found = {name: (one.action, one.label) for name, one in run.decisions.all().items()}
    assert found == {4: ("keep", None), 9: ("relabel", 1), 14: ("relabel", 1), 19: ("drop", None)}


def test_what_is_not_on_the_page_cannot_be_decided(run):
    for bad in (
        event(run, 0, "drop", key=run.mark(9)),
        event(run, 0, "drop", row=99),
        event(run, 0, "drop", row=None),
        event(run, 0, "drop", row="0"),
        event(run, 0, "relabel", label=7),
        event(run, 0, "relabel", label="1; DROP TABLE decisions"),
        event(run, 0, "relabel", label=True),
        {"action": "drop"},
    ):
        assert "notice" in decide(run, LABELS, "ada", bad)
    assert decide(run, LABELS, "ada", {"action": "explode"}) and decide(run, LABELS, "ada", {})
    assert run.decisions.history() == []


def test_the_suggestion_that_is_the_label_itself_is_refused(bundle, tmp_path):
    table = issues(bundle)
    table.columns["predicted_label"][:] = table.columns["given_label"]
    table.save(tmp_path)
    run = Run(bundle, tmp_path)
    assert "no other label suggested" in decide(run, LABELS, "ada", event(run, 0, "relabel"))
    assert "disabled> <kbd>R" not in panels.review(run, LABELS, 0) and run.decisions.history() == []


def test_somebody_elses_decision_meanwhile_is_told(run):
    run.decisions.set(4, "drop", reviewer="bob")
    shown = decide(run, LABELS, "ada", event(run, 0, "keep"))
    assert "bob decided otherwise meanwhile (drop)" in shown
    assert [one.reviewer for _, one in run.decisions.history(4)] == ["bob", "ada"]


def test_issues_of_other_data_are_refused(bundle, tmp_path):
    issues(experiment(train=pictures(N, 7))).save(tmp_path)
    with refused("about other training data"):
        Run(bundle, tmp_path)


def test_scores_of_other_data_are_refused(bundle, tmp_path):
    filled(tmp_path, bundle)
    other = Run(experiment(query=uw.Examples(pictures(12, 1), [f"q{k}" for k in range(12)])), tmp_path)
    with refused(r"is about 12 queries \(0, 1, 2, ...\), the experiment has 12 \('q0'"):
        other.scores("ekfac")


# Panels --------------------------------------------------------------------------------------------------------------


def test_an_explanation_shows_the_scores_of_the_class_asked_for(run):
    values, classes = run.scores("ekfac").values[2], torch.arange(N) % 3
    for label in range(3):
        shown = panels.explanation(run, "query:2", "ekfac", "", label, 4)
        best = values[classes == label].abs().argmax()
        assert f"{float(values[classes == label][best]):+.3g}" in shown
        assert f"{float(values[classes != label].abs().max()):.3g}" not in shown


def test_layers_computed_here_sum_to_the_scores(run):
    query = run.batch("query:0")
    whole, parts = run.live.scores("a", query), run.live.scores("a", query, per_layer=True)
    torch.testing.assert_close(sum(parts.layers.values()), whole.values)
    assert f"{float(parts.layers['3'][0].max()):+.3g}" in panels.explanation(run, "query:0", "", "3", None, 4)
    assert "no scores of layer" in panels.explanation(run, "query:0", "ekfac", "3", None, 4)


def test_the_store_answers_after_a_restart_without_new_training_gradients(run, bundle):
    first = run.live.scores("a", run.batch("query:1")).values
    store = run.folder / "store" / "ekfac"
    files = {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}
    again = Run(bundle, run.folder).live.scores("a", run.batch("query:1")).values
    torch.testing.assert_close(again, first)
    assert files and files == {file: file.stat().st_mtime_ns for file in store.rglob("*.safetensors")}


@pytest.mark.parametrize("key", ["query:99", "query:-1", "query:", "nonsense", "upload:gone"])
def test_a_query_that_is_not_there_is_refused(run, key):
    with refused("there is no query|is gone"):
        panels.explanation(run, key, "ekfac", "", None, 4)


def test_a_prediction_is_wrong_only_where_it_can_be_right():
    """A number is never exactly what was predicted, which is no mistake."""
    x = torch.randn(N, 3)
    values = uw.Experiment(torch.nn.Linear(3, 1), uw.Regression(), (x, x[:, :1]), (x, x[:, :1]))
    classes = experiment()
    for bundle, marked in ((values, {False}), (classes, {True, False})):
        with tempfile.TemporaryDirectory() as folder:
            run = Run(bundle, Path(folder), method="grad-dot")
            shown = [panels.explanation(run, f"query:{k}", "", "", None, 4) for k in range(6)]
        assert all("The model says" in one for one in shown)
        assert {"class=wrong" in one for one in shown} == marked


def test_what_is_kept_of_an_example_is_small(tmp_path):
    """Thousands of looks stay in memory: neither texts of megabytes nor a thousand columns may."""
    data = torch.zeros(N, 2000), torch.arange(N) % 3
    run = Run(experiment(train=data, query=data), tmp_path)
    assert len(run.shown("train", [3])[0].fields) == 24
    run = Run(experiment(show=lambda example: "long " * 2_000_000), tmp_path)
    (look,) = run.shown("train", [3])
    assert len(look.words) < 500 and "more characters" in look.words
    assert run.shown("train", [3])[0] is look


def test_commands_can_be_typed_as_they_are_shown(tmp_path):
    folder = tmp_path / "my run; rm"
    run = Run(experiment(), folder, "my code/pets.py:experiment")
    words = shlex.split(panels.apply_command(run))
    assert words == ["upweight", "repair", "my code/pets.py:experiment", "--out", str(folder)]
    assert "upweight audit &#39;my code/pets.py:experiment&#39;" in panels.review(run, LABELS, None)


class Files(torch.utils.data.Dataset):
    """Pictures, some of which are gone."""

    def __init__(self, images, labels):
        self.images, self.labels, self.gone = images, labels, set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, k):
        if k in self.gone:
            raise FileNotFoundError(f"no file {k}.png <b>here</b>")
        return self.images[k], int(self.labels[k])


def test_pictures_that_are_gone_break_neither_the_explorer_nor_the_report(tmp_path):
    train, query = Files(*pictures(N, 0)), Files(*pictures(12, 1))
    filled(tmp_path, experiment(train=train, query=query))
    bundle = experiment(train=train, query=query)  # which has seen the first ones only
    train.gone, query.gone = {9}, {3}
    said = []
    run = Run(bundle, tmp_path, say=said.append)
    assert "issues.json was not compared" in said[0] and "FileNotFoundError" in said[0]
    assert run.classes("query") == [] and run.classes("train")  # the table knows the latter
    shown = panels.review(run, LABELS, 1)
    assert "cannot be read: FileNotFoundError: no file 9.png &lt;b&gt;here" in shown
    assert "The model says" not in panels.explanation(run, "query:3", "ekfac", "", None, 4)
    assert "The model says" in panels.explanation(run, "query:5", "ekfac", "", None, 4)
    assert "no file 3.png" in panels.query_list(run, None, 0, "query:0")
    answer = _answered(lambda: panels.explanation(run, "query:5", "", "", None, 4))()
    assert "FileNotFoundError: no file 9.png &lt;b&gt;" in answer  # it cannot be computed, and says why
    page = build(tmp_path, bundle).read_text(encoding="utf-8")
    assert "the training data cannot be read whole (FileNotFoundError" in page and "<b>here" not in page
    assert 'id="queries"' in page and 'id="issues"' in page


def test_classes_are_named_as_the_experiment_names_them(run):
    assert run.classes("train") == [(name, number) for number, name in enumerate(CLASSES)]
