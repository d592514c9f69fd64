"""The explorer without a browser: who may talk to it, what comes next, what is written, what can be uploaded."""

import io
import shlex
import socket
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from explorers import CLASSES, SUSPECTS, N, experiment, filled, issues, pictures
from PIL import Image
from refusals import refused

import upweight as uw
from upweight.explorer import panels, suspects
from upweight.explorer.guard import LOOPBACK, Guard
from upweight.explorer.page import _answered, decide
from upweight.explorer.run import Run
from upweight.explorer.suspects import Selection
from upweight.explorer.uploads import read_query
from upweight.report import build

LABELS = Selection("label")


@pytest.fixture
def bundle():
    return experiment()


@pytest.fixture
def run(bundle, tmp_path):
    return Run(bundle, filled(tmp_path / "run", bundle))


# Guard ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:7860", "[::1]:7860", "LOCALHOST:1"])
def test_names_of_this_machine_pass(host):
    assert Guard(None, LOOPBACK).refusal({"host": host, "origin": f"http://{host}"}, "POST") == ""


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": ""},
        {"host": "evil.example"},
        {"host": "localhost.evil.example:7860"},
        {"host": "127.0.0.1@evil.example"},
        {"host": "127.0.0.1.nip.io"},
        {"host": "192.168.0.7:7860"},
        {"host": "[::1"},
        {"host": "localhost:7860", "origin": "http://localhost:3000"},
        {"host": "localhost:7860", "origin": "null"},
        {"host": "localhost:7860", "origin": "http://evil.example"},
        {"host": "localhost:7860", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"host": "localhost:7860", "sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ],
)
def test_other_pages_are_refused(headers):
    assert Guard(None, LOOPBACK).refusal(headers, "GET")


def test_a_link_from_elsewhere_may_be_followed_but_not_post():
    followed = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    guard = Guard(None, LOOPBACK)
    assert guard.refusal(followed, "GET") == "" and guard.refusal(followed, "POST")


def test_a_server_opened_to_a_network_admits_addresses_but_no_names():
    guard = Guard(None, LOOPBACK | {"lab"}, any_address=True)
    assert guard.refusal({"host": "192.168.0.7:7860"}, "GET") == guard.refusal({"host": "lab"}, "GET") == ""
    assert guard.refusal({"host": "evil.example"}, "GET")


# What comes next -----------------------------------------------------------------------------------------------------


def walk(table, wanted, decided, row=None, by=1):
    seen = []
    while (row := suspects.step(table, wanted, decided, row, by)) is not None:
        seen.append(int(table.columns["position"][row]))
    return seen


def test_suspects_come_in_the_order_of_severity(bundle):
    table = issues(bundle)
    assert walk(table, LABELS, {}) == SUSPECTS
    assert walk(table, LABELS, {9: "any"}) == [4, 14, 19]
    assert walk(table, Selection("label", show="decided"), {9: "any"}) == [9]
    assert walk(table, Selection("label", show="all"), {9: "any"}) == SUSPECTS
    assert walk(table, Selection("label", label=1), {}) == [4, 19]
    assert len(walk(table, Selection("label", show="every"), {})) == N
    assert walk(table, Selection("outlier"), {}) == []


def test_back_leads_to_what_was_just_decided(bundle):
    table = issues(bundle)
    row = suspects.step(table, LABELS, {}, None)
    after = suspects.step(table, LABELS, {4: "any"}, row)
    assert table.columns["id"][after] == 9
    assert suspects.step(table, LABELS, {4: "any"}, after, -1) == row
    assert suspects.step(table, LABELS, {4: "any"}, row, -1) is None


def test_a_row_outside_of_the_selection_has_neighbours_by_rank(bundle):
    table = issues(bundle)
    only = Selection("label", label=2)  # example 14 alone, the third
    assert suspects.step(table, only, {}, 0, 1) == 2
    assert suspects.step(table, only, {}, 3, 1) is None
    assert suspects.step(table, only, {}, 3, -1) == 2


def test_progress_counts_suspects_of_the_selection(bundle):
    assert suspects.progress(issues(bundle), LABELS, {4: "any", 0: "any"}) == (1, 4)


def test_a_hundred_thousand_rows_are_stepped_through_at_once():
    n = 100_000
    bundle = experiment(train=(torch.zeros(n, 64), torch.arange(n) % 3))
    table = issues(bundle, range(0, n, 2))
    decided = dict.fromkeys(range(0, n, 4))
    started = time.process_time()
    row = suspects.step(table, LABELS, decided, n // 4)
    suspects.upcoming(table, LABELS, decided, row)
    suspects.progress(table, LABELS, decided)
    assert time.process_time() - started < 1.0


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


# Uploads -------------------------------------------------------------------------------------------------------------


def test_a_row_of_numbers_is_a_query(tmp_path):
    data = torch.randn(N, 3), torch.arange(N) % 2
    bundle = uw.Experiment(torch.nn.Linear(3, 2), uw.Classification(), data, data)
    predict = Run(bundle, tmp_path).live.predict
    upload = read_query(bundle, None, "0.5, -1; 2e-1", None, predict)
    torch.testing.assert_close(upload.batch[0], torch.tensor([[0.5, -1.0, 0.2]]))
    assert upload.batch[1].tolist() == [int(bundle.model(upload.batch[0]).argmax())]
    assert read_query(bundle, None, "1 2 3", 1.0, predict).batch[1].tolist() == [1]
    for text, message in (
        ("", "nothing to read"),
        ("1, 2", "2 finite numbers, expected 3"),
        ("1, 2, nan", "2 finite numbers, expected 3"),
        ("1, 2, cat", "what is no number"),
    ):
        with refused(message):
            read_query(bundle, None, text, None, predict)


def test_what_is_no_picture_is_refused(run, bundle, tmp_path):
    file = tmp_path / "x.png"
    for content in (b"", b"<svg onload=alert(1)>", png((50, 50))[:500]):
        file.write_bytes(content)
        with refused("x.png is no picture that can be read"):
            read_query(bundle, file, "", None, run.live.predict)
    file.write_bytes(png((5000, 2)))
    with refused("5000 x 2 pixels, expected at most 4096"):
        read_query(bundle, file, "", None, run.live.predict)


def png(size=(20, 10)):
    out = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_a_picture_of_another_size_is_scaled_and_its_reading_told(run, bundle, tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(png())
    upload = read_query(bundle, file, "", 2.0, run.live.predict)
    assert upload.batch[0].shape == (1, 1, 8, 8) and upload.batch[1].tolist() == [2]
    assert "Scaled to 8 x 8 pixels; black became" in upload.note and upload.picture[:4] == b"\x89PNG"


def test_read_is_the_users_own(tmp_path):
    data = torch.zeros(N, 5, dtype=torch.int64), torch.arange(N) % 2
    model = torch.nn.Sequential(torch.nn.Embedding(9, 2), torch.nn.Flatten(), torch.nn.Linear(10, 2))

    def read(given):
        return torch.tensor([int(word) for word in given.split()])

    bundle = uw.Experiment(model, uw.Classification(), data, data, read=read)
    predict = Run(bundle, tmp_path).live.predict
    assert read_query(bundle, None, "1 2 3 4 5", 0.0, predict).batch[0].tolist() == [[1, 2, 3, 4, 5]]
    with refused("read raised ValueError"):
        read_query(bundle, None, "no numbers", None, predict)
    with refused(r"was read as \[2\], expected a tensor of shape \[5\]"):
        read_query(bundle, None, "1 2", None, predict)
    without = uw.Experiment(model, uw.Classification(), data, data)
    with refused("a text cannot be read as an input of shape"):
        read_query(without, None, "1 2 3 4 5", None, predict)


def test_read_must_be_a_function(bundle):
    with refused("the experiment's read is str, expected a function"):
        experiment(read="no")


# Command line --------------------------------------------------------------------------------------------------------

FILE = """
from explorers import experiment
def raises():
    raise RuntimeError("no data today")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return "mine.py:experiment"


def test_help_teaches(upweight):
    code, out, _ = upweight("explore", "--help")
    assert code == 0 and "Examples" in out and "decisions.sqlite" in out and "--host" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py:experiment"], "missing.py"),
        (["mine.py:nothing"], "nothing"),
        (["mine.py:raises"], "no data today"),
        (["mine.py:experiment", "--method", "magic"], "there is no method 'magic'"),
        (["mine.py:experiment", "--host", "no.such.host.invalid"], "is not known"),
        (["mine.py:experiment", "--host", "192.0.2.1"], "is no address of this machine"),
    ],
)
def test_what_is_wrong_is_one_line(upweight, file, arguments, message):
    code, out, err = upweight("explore", *arguments, "--out", "run")
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in err and "->" in err


def test_a_taken_port_is_refused_if_it_was_asked_for_and_else_another_is_found(upweight, file, monkeypatch):
    from upweight.explorer import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = upweight("explore", file, "--port", str(port), "--out", "run")
        assert code == 2 and f"port {port} is taken" in err
        monkeypatch.setattr(server, "PORT", port)
        with server.listen("127.0.0.1", None) as found, server.listen("127.0.0.1", None) as third:
            # Two explorers that start at the same time: the second sees that the first has the port.
            assert third.getsockname()[1] > found.getsockname()[1] > port


def test_decisions_of_another_experiment_are_refused(upweight, file, tmp_path):
    uw.Decisions(tmp_path / "run" / "decisions.sqlite", "cars").set(1, "keep")
    code, _, err = upweight("explore", file, "--out", "run")
    assert code == 2 and "about experiment 'cars', this is 'pets'" in err


def test_classes_are_named_as_the_experiment_names_them(run):
    assert run.classes("train") == [(name, number) for number, name in enumerate(CLASSES)]
