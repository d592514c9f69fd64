"""A run of the demo, on few images: what it finds, how it closes the loop, and the page that shows it."""

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from demos import QUICK
from PIL import Image
from rich.console import Console

import upweight as uw
from upweight.demo.closing import _decide, close_the_loop
from upweight.demo.data import flip_labels, printable
from upweight.demo.network import predictions, train_network
from upweight.demo.page import png, render, signed
from upweight.demo.results import Settings
from upweight.demo.run import run_demo
from upweight.demo.tables import closing_sentence
from upweight.errors import UpweightError
from upweight.repair.issue_table import IssueTable


@pytest.fixture(scope="module")
def printed():
    return io.StringIO()


@pytest.fixture(scope="module")
def run(tmp_path_factory, printed):
    settings = Settings(
        out=tmp_path_factory.mktemp("demo") / "deep" / "run",
        n=300,
        seed=3,
        queries=6,
        retrain_queries=2,
        retrain_seeds=2,
    )
    return run_demo(settings, Console(file=printed, width=120))


@pytest.fixture(scope="module")
def page(run):
    return (run.settings.out / "index.html").read_text(encoding="utf-8")


class _Tags(HTMLParser):
    """Every tag with its attributes, and all text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


# What a run finds -------------------------------------------------------------------------------------------------


def test_run_trained_on_the_seeds_flips(run):
    given, flipped = flip_labels(run.images.train.labels, 10, share=0.1, seed=3)
    assert torch.equal(run.given, given) and torch.equal(run.flipped, flipped)
    assert int(flipped.sum()) == 30


def test_figures_are_in_range(run):
    assert 0.5 < run.accuracy <= 1
    by_name = {one.name: one for one in run.detections}
    assert list(by_name) == ["self-influence", "loss", "gradient norm", "chance"]
    for one in run.detections:
        assert 0 <= one.precision <= 1 and 0 <= one.average_precision <= 1
        assert one.found[-1] == pytest.approx(1) and (np.diff(one.found) >= 0).all()
    assert by_name["self-influence"].auroc > 0.8  # far from chance even on 300 images
    assert by_name["chance"].auroc == 0.5
    assert len(run.removals) == 2 and all(len(pair.control.measured) == 2 for pair in run.removals)
    assert all(np.isfinite(pair.proponents.mean) and pair.proponents.predicted > 0 for pair in run.removals)
    assert run.scores.unit == "nats" and tuple(run.scores.values.shape) == (6, 300)


def test_scores_carry_the_images_ids(run):
    assert list(run.scores.train_ids) == list(run.images.train.ids)
    assert run.scores.query_ids == [run.images.test.ids[position] for position in run.queries.tolist()]


def test_figures_file_says_what_was_found(run):
    figures = json.loads((run.settings.out / "figures.json").read_text())
    assert figures["flipped"] == 30 and figures["seed"] == 3
    assert figures["detection"]["loss"]["auroc"] == pytest.approx(run.detections[1].auroc)
    assert figures["removal"]["queries"] == 2 and figures["removal"]["seeds"] == 2
    repair = figures["repair"]
    assert repair["test_accuracy"]["before"] == pytest.approx(run.accuracy)
    assert repair["right"] <= repair["decided"] == repair["flagged"]


def test_tables_say_what_was_found(run, printed):
    text = printed.getvalue()
    for words in ("proponents (+)", "self-influence", "gradient norm", "random images", "flipped, is"):
        assert words in text
    assert f"{run.detections[0].auroc:.4f}" in text
    assert f"{run.agreement.proponents:+.2f}" in text
    assert "index.html" in text.replace("\n", "")


def test_without_retraining_the_proof_is_left_out(tmp_path):
    printed = io.StringIO()
    run = run_demo(
        Settings(out=tmp_path, n=100, queries=3, retrain_queries=0, recipe=QUICK),
        Console(file=printed, width=80),
    )
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert run.agreement is None and run.figures()["removal"] is None
    assert "Proof 2" not in printed.getvalue() and "Does retraining" not in page


# The closed loop --------------------------------------------------------------------------------------------------


def test_the_loop_repairs_the_network_by_the_audits_suggestions_alone(run):
    """Flips are known to the test, and to nothing in the loop."""
    closing, out = run.closing, run.settings.out
    table = IssueTable.load(out)
    suggested = table.suggestions()
    truth = dict(zip(run.images.train.ids, run.images.train.labels.tolist()))
    assert uw.Decisions(out / "decisions.sqlite").labels() == suggested
    assert len(suggested) == closing.decided > 0
    assert closing.right == sum(truth[name] == label for name, label in suggested.items())
    assert closing.right > 0.7 * closing.decided
    assert list(closing.loss) == ["before", "repaired", "retrained"]
    assert closing.loss["repaired"] < closing.loss["before"]
    assert (out / "repair" / "verify.json").is_file() and closing.report == out / "report.html"
    report = closing.report.read_text(encoding="utf-8")
    assert report.count('alt="changed training example') == min(24, closing.decided)
    assert "Against real retraining" in report and "other weights" not in report


def test_what_somebody_decided_before_counts(run):
    settings = replace(run.settings, retrain_queries=0)
    decisions = uw.Decisions(settings.out / "decisions.sqlite")
    table = IssueTable.load(settings.out)
    first, second = [table.row(k)["id"] for k in range(len(table)) if table.row(k)["issue"] == "label"][:2]
    rest = [name for name in decisions.labels() if name not in (first, second)]
    decisions.set(first, "keep", reviewer="ada")
    decisions.set(second, "drop", reviewer="ada")
    model = train_network(run.images.train.inputs, run.given, 10, settings.seed)
    method = uw.Influence(model, uw.Classification(), damping=0.01)
    method.fit((run.images.train.inputs, run.given), ids=run.images.train.ids)
    closing = close_the_loop(settings, run.images, run.given, model, method)
    assert closing.decided == 1 + len(rest) and "retrained" not in closing.loss
    assert list(decisions.labels()) == rest and decisions.remove() == [second]
    other = replace(run, closing=closing)
    assert "except for 2 that somebody decided about in the explorer" in render(other)
    assert f"{len(rest)} images get another label and 1 are forgotten" in render(other)
    assert f"except for 2 that somebody decided about: {len(rest)} images were given" in closing_sentence(
        other
    )
    assert "somebody" not in closing_sentence(run) and "somebody decided" not in render(run)


def test_the_other_commands_work_on_the_demos_run(run, upweight):
    """Audit, repair and report from the shell, on the experiment that the demo wrote."""
    out = str(run.settings.out)
    experiment = uw.Experiment.load(run.closing.address)
    assert experiment.train.fingerprint() == uw.Examples((run.images.train.inputs, run.given)).fingerprint()
    assert predictions(experiment.model, run.images.test.inputs, run.images.test.labels)[
        1
    ].double().mean().item() == (pytest.approx(run.closing.loss["before"], rel=1e-5))
    code, text, _ = upweight("audit", run.closing.address, "--out", out, "--kinds", "label", "--json")
    assert code == 0 and json.loads(text)["experiment"] == experiment.name
    options = ("--method", "corrected", "--l2", "0.01", "--convention", "sum", "--json")
    code, text, _ = upweight("repair", run.closing.address, "--out", out, *options)
    assert code == 0 and "decisions.sqlite" in json.loads(text)["source"]
    code, text, _ = upweight("report", run.closing.address, "--out", out)
    assert code == 0


def test_decisions_of_a_demo_on_other_images_are_moved_away(tmp_path):
    file = tmp_path / "decisions.sqlite"
    uw.Decisions(file, "another demo").set(1, "drop")
    table = IssueTable.of_rows(
        [
            {"id": 5, "position": 5, "issue": "label", "is_issue": True, "score": 0.1, "rank": 1}
            | {"given_label": 0, "predicted_label": 3}
        ]
    )
    assert _decide(file, "this demo", table).labels() == {5: 3}
    assert uw.Decisions(tmp_path / "decisions.1.sqlite").remove() == [1]


def test_the_page_shows_the_loop_closed(run, page):
    """Suspects, decisions, and the repaired network's accuracy, beside what it was and what retraining makes of it."""
    closing = run.closing
    part = page[page.index('id="repair"') : page.index('id="proof"')]
    assert (
        f"flags {closing.flagged} labels" in part and f"{closing.right} of the {len(closing.labels)}" in part
    )
    rows = re.findall(r"<tr[^>]*><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td>", part)
    names = {"as it was trained": "before", "repaired": "repaired", "trained again": "retrained"}
    assert [(names[name], share, loss) for name, share, loss in rows] == [
        (name, f"{closing.accuracy[name]:.1%}", f"{closing.loss[name]:.3f}") for name in closing.accuracy
    ]
    shown = re.findall(r"<figcaption>(.*?)</figcaption>", part)
    assert len(shown) == min(24, closing.decided) > 0
    classes, train = run.images.classes, run.images.train
    place = train.ids.index(next(iter(closing.labels)))
    label, truth = closing.labels[train.ids[place]], int(train.labels[place])
    expected = f'<span class="soft">{classes[int(run.given[place])]}</span> → <b>{classes[label]}</b>'
    assert shown[0] == expected + (
        "" if label == truth else f' <span class="wrong">is {classes[truth]}</span>'
    )
    assert 'href="report.html"' in part and (run.settings.out / "report.html").is_file()
    left_out = replace(closing, seconds={}, left_out="<b>no</b>")
    assert "not audited: &lt;b&gt;no&lt;/b&gt;." in render(replace(run, closing=left_out))


# Page -------------------------------------------------------------------------------------------------------------


def test_page_asks_for_nothing(page):
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]", text, re.IGNORECASE)
    assert not re.search(r"url\(|@import|javascript:", text, re.IGNORECASE)
    parsed = _Tags(page)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {
        tag for tag, _ in parsed.tags
    }
    sources = [attributes["src"] for _, attributes in parsed.tags if "src" in attributes]
    assert len(sources) > 50 and all(source.startswith("data:image/png;base64,") for source in sources)
    links = {attributes["href"] for _, attributes in parsed.tags if "href" in attributes}
    assert links == {"#queries", "#suspects", "#repair", "#proof", "report.html"}
    targets = {attributes.get("id") for _, attributes in parsed.tags}
    assert {link[1:] for link in links if link[0] == "#"} <= targets
    policies = [attributes["content"] for tag, attributes in parsed.tags if attributes.get("http-equiv")]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_page_closes_what_it_opens(page):
    for tag in ("div", "section", "article", "figure", "span", "table", "p", "main"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_page_is_for_phones_and_the_dark(page):
    assert 'name="viewport"' in page and "prefers-color-scheme: dark" in page and "max-width" in page


def test_page_shows_every_query_and_marks_flips(run, page):
    assert page.count("<article") == 6
    assert page.count("Proponents <small>") == 6 and page.count("Opponents <small>") == 6
    suspects = page[page.index('id="suspects"') : page.index("Suspected, yet not flipped")]
    first = run.suspects.top_k(48).positions
    assert suspects.count('class="thumb flipped"') == int(run.flipped[first].sum())
    innocent = page[page.index("Suspected, yet not flipped") : page.index('id="repair"')]
    assert 'class="thumb"' in innocent and "thumb flipped" not in innocent


def test_page_says_sign_and_unit(page):
    words = " ".join(_Tags(page).words)
    assert "proponent" in words and "predicted to rise" in words
    assert "opponent" in words and "predicted to fall" in words
    assert "nat" in words and "first-order" in words


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7*7 }}",
    "'; --",
    "&lt;",
    "</style>",
]


def test_hostile_names_are_text(run):
    classes = tuple((HOSTILE * 2)[:10])
    test = replace(run.images.test, ids=['<b onclick="x">'] * len(run.images.test))
    page = render(replace(run, images=replace(run.images, name="<h1>&", classes=classes, test=test)))
    parsed = _Tags(page)
    assert not {"script", "b onclick"} & {tag for tag, _ in parsed.tags}
    assert not any(key.startswith("on") for _, attributes in parsed.tags for key in attributes)
    assert all(attributes["src"].startswith("data:") for tag, attributes in parsed.tags if tag == "img")
    assert page.count("</style>") == 1 and "49" not in re.findall(r"<b>(.*?)</b>", page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<h1>&" in "".join(parsed.words)


def test_hostile_names_do_not_reach_the_terminal():
    assert printable("a\x1b]0;title\x07b\nc") == "a?]0;title?b?c"
    assert printable("Größe 犬") == "Größe 犬"


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_survive(channels):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    file = io.BytesIO(base64.b64decode(png(picture).removeprefix("data:image/png;base64,")))
    assert np.array_equal(np.asarray(Image.open(file)).reshape(5, 7, channels), picture)


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.50"), (-0.0123, "−0.012"), (1e-7, "+1.0e-7"), (-31.4, "−31"), (0.0, "0")]
)
def test_signed(value, text):
    assert signed(value) == text


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UpweightError, match=r"cannot be written .*-> choose another folder with --out"):
        run_demo(Settings(out=tmp_path / "file" / "run"), Console(file=io.StringIO()))


def test_fewer_test_images_than_queries(tmp_path):
    settings = Settings(out=tmp_path, n=60, retrain_queries=30, retrain_seeds=1, recipe=QUICK)
    run = run_demo(settings, Console(file=io.StringIO()))
    assert int(run.flipped.sum()) == 6 and len(run.queries) == len(run.images.test) == len(run.removals) == 15
