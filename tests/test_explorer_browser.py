"""The explorer in a real browser: pictures, keys, two reviewers at once, restarts, and data that is hostile."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import quote

import browser
import pytest
import torch
from explorers import (
    CLASSES,
    PAYLOADS,
    QUERIES,
    SUSPECTS,
    N,
    Watched,
    experiment,
    filled,
    issues,
    serving,
)

import upweight as uw
from upweight.explorer.run import Run

chromium = browser.chromium  # the fixture


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture(scope="module")
def context(chromium):
    """What pages share: above all the hundred files of gradio's page, which are then loaded once."""
    with chromium.new_context() as shared:
        yield shared


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """One server for the tests that need no more than the usual run."""
    bundle = experiment()
    run = Run(bundle, filled(tmp_path_factory.mktemp("run"), bundle))
    with serving(run) as address:
        yield run, address


@pytest.fixture
def explorer(served, tmp_path):
    """The run and its address, with nothing decided yet."""
    run, address = served
    run.decisions = uw.Decisions(tmp_path / "decisions.sqlite", run.experiment.name)
    run.issues = issues(run.experiment)
    return run, address


def test_a_prediction_is_explained_and_a_suspect_decided(context, explorer):
    """Everything once, with nothing wrong in the console and no request to elsewhere."""
    run, address = explorer
    one = Watched(context, address)
    assert one.loaded_pictures("#queries") == QUERIES
    assert one.loaded_pictures("#explanation") > 2
    one.page.click('[data-query="query:5"]')
    one.page.wait_for_selector("text=query 5")
    shown = one.page.inner_text("#explanation")
    best = run.scores("ekfac").top_k(1)
    assert f"{best.values[5, 0]:+.3g}" in shown and CLASSES[5 % 3] in shown
    one.decide()
    assert one.loaded_pictures("#review") > 2
    for key in "krd":
        one.press(key)
    one.press("ArrowLeft")
    assert one.wrong == []
    one.page.close()
    found = uw.Decisions(run.decisions.path).all()
    assert {name: (d.action, d.label, d.reviewer) for name, d in found.items()} == {
        4: ("keep", None, "ada"),
        9: ("relabel", 1, "ada"),
        14: ("drop", None, "ada"),
    }


def test_decisions_survive_a_restart_and_an_open_page_goes_on(context, folder):
    bundle = experiment()
    filled(folder, bundle)
    with serving(Run(bundle, folder)) as address:
        one = Watched(context, address)
        one.decide()
        one.press("k")
        assert one.on_screen() == 1
    port = int(address.rsplit(":", 1)[1].strip("/"))
    with serving(Run(bundle, folder), port) as address:
        two = Watched(context, address)
        two.decide()
        assert two.on_screen() == 1  # the first still to decide
        assert "1 of 4 decided" in two.page.inner_text("#review")
        two.page.get_by_role("tab", name="Decisions").click()
        two.page.wait_for_selector("#decisions .rows")
        assert "keep" in two.page.inner_text("#decisions")
        assert two.wrong == []
        one.wrong.clear()  # it saw the server go
        one.press("d")  # on a page that was opened before the restart
        one.page.close()
        two.page.close()
    assert {n: d.action for n, d in uw.Decisions(folder / "decisions.sqlite").all().items()} == {
        4: "keep",
        9: "drop",
    }


def test_two_pages_at_once_lose_nothing(context, explorer):
    run, address = explorer
    suspects = list(range(0, N, 2))
    run.issues = issues(run.experiment, suspects)
    one, two = Watched(context, address), Watched(context, address)
    two.decide()
    two.page.get_by_label("Reviewer").fill("bob")
    two.page.get_by_label("Reviewer").blur()
    one.decide()
    for _ in range(4):  # bob's page does not show yet what ada decided a moment ago
        one.press("d")
        two.press("k")
        assert "ada decided otherwise meanwhile (drop)" in two.page.inner_text("#review .notice")
        assert one.page.locator("#review .notice").count() == 0
    one.page.close()
    two.page.close()
    assert one.wrong == two.wrong == []
    history = uw.Decisions(run.decisions.path).history()
    assert sorted(d.reviewer for _, d in history) == ["ada"] * 4 + ["bob"] * 4
    assert [name for name, _ in history] == [name for name in suspects[:4] for _ in range(2)]


def test_keys_typed_in_haste_never_decide_what_is_not_on_screen(context, explorer):
    run, address = explorer
    one = Watched(context, address)
    one.decide()
    one.page.evaluate(
        """() => { for (let i = 0; i < 5; i++)
            document.body.dispatchEvent(new KeyboardEvent('keydown', {key: i % 2 ? 'd' : 'k', bubbles: true})); }"""
    )
    one.page.wait_for_function("document.querySelector('#review .review').dataset.row === '1'")
    one.page.close()
    assert [(name, d.action) for name, d in run.decisions.history()] == [(SUSPECTS[0], "keep")]


def test_a_digit_gives_the_class_undo_takes_it_back_and_typing_in_a_field_decides_nothing(context, explorer):
    run, address = explorer
    one = Watched(context, address)
    one.decide()
    one.page.get_by_label("Reviewer").press("d")
    one.page.get_by_label("Reviewer").blur()
    one.press("0")  # example 4 is a 1
    assert run.decisions.labels() == {4: 0}
    one.page.keyboard.press("0")  # example 9 is a 0 already: no such choice
    one.press("ArrowLeft")
    one.press("u")
    assert run.decisions.all() == {} and one.on_screen() == 0
    one.press("ArrowRight")
    assert one.on_screen() == 1 and one.wrong == []
    one.page.close()
    assert [d.action for _, d in run.decisions.history()] == ["relabel", "undecided"]


def test_filters_by_class_layer_and_number(context, explorer):
    _, address = explorer
    one = Watched(context, address)
    choose(one.page, "Training class", "owl", 0)
    one.page.wait_for_selector("text=only training examples of class owl")
    names = one.page.locator("#explanation figure .name").all_inner_texts()
    assert names and set(names) == {"owl"}
    choose(one.page, "Method", "ekfac, computed here", 0)
    choose(one.page, "Layer", "3", 0)
    one.page.wait_for_selector("text=layer 3")
    assert one.page.locator("#explanation figure").count()
    choose(one.page, "Queries of class", "dog", 0)
    one.page.wait_for_selector("text=4 of 12 queries")
    assert one.page.locator("#queries .card").count() == 4
    assert one.wrong == []
    one.page.close()


def choose(page, label, choice, number):
    page.get_by_label(label, exact=True).nth(number).click()
    page.get_by_role("option", name=choice, exact=True).click()


def test_an_uploaded_picture_is_explained_as_the_same_query_would_be(context, folder, tmp_path):
    """Pictures of 8-bit brightness come back exactly, so the scores must."""
    images, labels = pictures_of_bytes(QUERIES, 1)
    bundle = experiment(train=pictures_of_bytes(N, 0), query=(images, labels))
    run = Run(bundle, folder)
    run.live.scores("x", bundle.query.take([3]))  # fit here, not in the browser's time
    file = tmp_path / "mine.png"
    from PIL import Image

    Image.fromarray((images[3, 0] * 255).round().byte().numpy()).save(file)
    with serving(run) as address:
        one = Watched(context, address)
        one.page.get_by_text("A query of your own").click()
        one.page.set_input_files("input[type=file]", file)
        one.page.wait_for_selector("text=mine.png")
        choose(one.page, "Its class", CLASSES[int(labels[3])], 0)
        one.page.click("#ask")
        one.page.wait_for_selector("#explanation >> text=your query")
        assert one.loaded_pictures("#explanation") > 2
        scores = one.page.locator("#explanation .proponents .score").all_inner_texts()
        assert one.wrong == []
        one.page.close()
    expected = run.live.scores("y", bundle.query.take([3])).top_k(8).values[0]
    assert scores == [f"{value:+.3g}" for value in expected.tolist() if value > 0]


def pictures_of_bytes(n, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (n, 1, 8, 8), generator=generator)
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    return levels.float() / 255, torch.arange(n) % len(CLASSES)


def test_text_of_the_data_cannot_inject_markup(context, folder):
    texts = [f"{payload} {'x' * 10_000_000 if k == 0 else k}" for k, payload in enumerate(PAYLOADS * 5)]
    bundle = experiment(
        train=uw.Examples(pictures(N), texts),
        query=uw.Examples(pictures(QUERIES), texts[:QUERIES]),
        classes=PAYLOADS[:3],
        name=PAYLOADS[1],
        show=lambda example: texts[int(example[0].flatten()[0] * 7) % len(texts)],
    )
    run = Run(bundle, filled(folder, bundle), address=PAYLOADS[0])
    with serving(run, reviewer=PAYLOADS[2]) as address:
        one = Watched(context, address)
        assert PAYLOADS[0] in one.page.inner_text("#explanation")
        one.page.get_by_label("Training class", exact=True).click()
        one.page.keyboard.press("Escape")
        one.decide()
        assert PAYLOADS[1] in one.page.inner_text("#review")
        for key in ("r", "2", "d", "k"):
            one.press(key)
        one.page.get_by_role("tab", name="Decisions").click()
        one.page.wait_for_selector("#decisions .rows")
        assert PAYLOADS[2] in one.page.inner_text("#decisions")
        assert one.page.evaluate("window.harmed") is None
        assert (
            one.page.locator("#explanation script, #review script, #decisions script, svg[onload]").count()
            == 0
        )
        assert len(one.page.content()) < 3_000_000
        assert one.wrong == []
        one.page.close()
    assert len(run.decisions) == 4


def pictures(n):
    return torch.arange(n * 64.0).reshape(n, 64) / 7, torch.arange(n) % len(CLASSES)


def test_a_page_of_another_site_is_refused(explorer):
    _, address = explorer
    own = address.split("//")[1].strip("/")

    def status(path="", **headers):
        request = urllib.request.Request(address + path, headers={"Host": own} | headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code

    assert status() == status("decisions.csv") == status("picture/train/0.png") == 200
    assert status(Origin=f"http://{own}") == 200
    for path in ("", "config", "decisions.csv", "picture/train/0.png", "gradio_api/info"):
        assert status(path, Host="evil.example") == 403
        assert status(path, Host="127.0.0.1.evil.example") == 403
        assert status(path, Origin="http://evil.example") == 403
        assert status(path, Origin="null") == 403
    elsewhere = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert status("picture/train/0.png", **elsewhere) == 403
    assert threading.active_count() < 60


def test_no_file_can_be_read_through_the_server(explorer):
    """Neither of the run's folder nor of the machine: not by our routes, and not by gradio's."""
    run, address = explorer
    run.decisions.set(4, "keep")
    files = ["/etc/passwd", str(run.folder / "issues.json"), str(run.decisions.path), "tests/explorers.py"]
    routes = [
        "gradio_api/file={}",
        "file={}",
        "gradio_api/stream/{}",
        "static/{}",
        "assets/{}",
        "{}",
        "picture/train/{}",
    ]
    tried = [route.format(quote(file, safe=safe)) for route in routes for file in files for safe in ("", "/")]
    ups = "../" * 12
    tried += [route.format(quote(f"{ups}etc/passwd", safe="")) for route in routes]
    tried += [
        "picture/train/99.png",
        "picture/train/-1.png",
        "picture/train/..%2f..%2fetc.png",
        "picture/code/0.png",
    ]
    tried += ["picture/upload/0.png", "gradio_api/proxy=http://example.com/", "picture/train/0.png/large/x"]
    for path in tried:
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(address + path, timeout=60).close()
        with refusal.value as answer:
            text = answer.read()
            assert answer.code in (400, 403, 404, 405, 422), (path, answer.code)
        assert b"root:" not in text and b"sha256" not in text and b"SQLite" not in text


def test_a_run_without_anything_says_what_to_do(chromium, folder):
    run = Run(experiment(), folder, "mine.py:experiment")
    with serving(run) as address:
        one = Watched(chromium, address, viewport={"width": 390, "height": 844}, color_scheme="dark")
        assert one.page.locator("#explanation figure").count()  # computed here
        one.page.get_by_role("tab", name="Review").click()
        one.page.wait_for_selector("text=upweight audit mine.py:experiment --out")
        wide = one.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")
        assert wide <= 0 and one.wrong == []
        one.page.close()


def test_the_command_serves_and_ends_cleanly_by_ctrl_c(tmp_path):
    (tmp_path / "mine.py").write_text("from explorers import experiment\nprint('noise')\n")
    command = [
        sys.executable,
        "-m",
        "upweight.cli",
        "explore",
        "mine.py:experiment",
        "--out",
        "run",
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": tmp_path}
    with subprocess.Popen([*command, "--host", "0.0.0.0"], env=environment, **options) as server:
        lines = []
        while not lines or lines[-1].strip() != "}":
            lines.append(server.stdout.readline())
            assert lines[-1], server.stderr.read()
        said = json.loads("".join(lines))
        assert said["experiment"] == "pets" and said["url"].startswith("http://0.0.0.0:")
        address = said["url"].replace("0.0.0.0", "127.0.0.1")
        with urllib.request.urlopen(wait_for(address), timeout=60) as answer:
            assert answer.status == 200
        server.send_signal(signal.SIGINT)
        rest, notes = server.communicate(timeout=120)
    assert (server.returncode, rest) == (0, "")
    assert "whoever reaches this machine can see the data" in notes and "Traceback" not in notes
    assert "0 examples are decided" in notes and "go on with: upweight explore mine.py:experiment" in notes


def wait_for(address):
    """The address, once somebody answers there."""
    host, port = address.split("//")[1].strip("/").split(":")
    for _ in range(600):
        with socket.socket() as one:
            if one.connect_ex((host, int(port))) == 0:
                return address
        time.sleep(0.1)
    raise AssertionError("nobody answers")
