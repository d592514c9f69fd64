"""What tests of the explorer share: small experiments with an issue table, a server in a thread, and a browser."""

import asyncio
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import upweight as uw
from upweight.explorer.run import Run
from upweight.explorer.suspects import Selection
from upweight.repair.issue_table import IssueTable

CLASSES = ["cat", "dog", "owl"]
N, QUERIES = 30, 12
SUSPECTS = [4, 9, 14, 19]  # positions, the worst first
LABELS = Selection("label")
PAYLOADS = [
    "<script>window.harmed=1</script>",
    "</script><script>window.harmed=2</script>",
    '"><img src=x onerror="window.harmed=3">',
    "${window.harmed=4}",
    "{{#each}} {{{constructor}}} `${window.harmed=5}`",
    "<svg onload=window.harmed=6> &lt;b&gt; \u202e ünïcode 漢字 \ud800",
]


def pictures(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % len(CLASSES)
    images = torch.rand(n, 1, 8, 8, generator=generator)
    images[torch.arange(n), 0, :, labels * 2] += 1.0
    return images / 2, labels


def experiment(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, len(CLASSES))).eval()
    train = options.pop("train", pictures(N, 0))
    query = options.pop("query", pictures(QUERIES, 1))
    options = {"classes": CLASSES, "name": "pets"} | options
    return uw.Experiment(model, uw.Classification(), train, query, **options)


def issues(bundle, suspects=SUSPECTS):
    """A table in which these positions look mislabelled, in this order, as the next class."""
    labels = [int(label) for label in bundle.train.take(range(bundle.train.n))[1]]
    order = [*suspects, *(p for p in range(bundle.train.n) if p not in suspects)]
    rows = [
        {
            "id": bundle.train.ids[position],
            "position": position,
            "issue": "label",
            "is_issue": position in suspects,
            "score": (rank + 1) / (bundle.train.n + 1),
            "rank": rank + 1,
            "given_label": labels[position],
            "predicted_label": (labels[position] + 1) % len(CLASSES),
            "suggested_probability": 0.9,
            "influence": -0.01,
            "detector": "loss",
        }
        for rank, position in enumerate(order)
    ]
    settings = {"train": bundle.train.fingerprint()}
    return IssueTable.of_rows(rows, {"settings": settings, "experiment": bundle.name})


def filled(folder, bundle):
    """The folder of a run with scores and issues."""
    method = uw.Influence(bundle.model, bundle.task, damping=0.1, progress=False).fit(bundle.train)
    method.attribute(bundle.query, ids=bundle.query.ids).save(folder / "scores" / "ekfac")
    issues(bundle).save(folder)
    return folder


@pytest.fixture
def bundle():
    """An experiment."""
    return experiment()


@pytest.fixture
def run(bundle, tmp_path):
    """A run of it, with scores and issues."""
    return Run(bundle, filled(tmp_path / "run", bundle))


@contextmanager
def serving(run, port=0, reviewer="ada"):
    """The explorer in a thread; gives its address."""
    uvicorn = pytest.importorskip("uvicorn", reason="pip install 'upweight[explore]'")
    pytest.importorskip("gradio", reason="pip install 'upweight[explore]'")
    from upweight.explorer.server import application, listen

    opened, servers = listen("127.0.0.1", port), []

    async def built():  # where no event loop is running, gradio makes some that it never closes
        return application(run, reviewer=reviewer)

    def serve():
        app = asyncio.run(built())
        options = {"log_level": "warning", "timeout_graceful_shutdown": 1, "lifespan": "on"}
        servers.append(uvicorn.Server(uvicorn.Config(app, **options)))
        servers[0].run(sockets=[opened])

    thread = threading.Thread(target=serve)
    thread.start()
    while not servers or not servers[0].started:
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        servers[0].should_exit = True
        thread.join(60)
        opened.close()


class Watched:
    """A page of the browser, and whatever went wrong on it."""

    def __init__(self, browser, address, **options):
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(60_000)
        self.wrong, self.address = [], address
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on(
            "dialog", lambda dialog: (self.wrong.append(f"dialog: {dialog.message}"), dialog.dismiss())
        )
        self.page.on("request", self._request)
        self.page.on("response", self._response)
        self.page.goto(address)
        self.page.wait_for_selector("#explanation .uw")

    def _console(self, message):
        if message.type == "error":
            self.wrong.append(f"console: {message.text}")

    def _request(self, request):
        if not request.url.startswith((self.address, "data:", "blob:")):
            self.wrong.append(f"request to {request.url[:200]}")

    def _response(self, response):
        if response.status >= 400:
            self.wrong.append(f"{response.status} for {response.url[:200]}")

    def decide(self, name="Review"):
        self.page.get_by_role("tab", name=name).click()
        self.page.wait_for_selector("#review .uw:visible")

    def press(self, key):
        """Press a key and wait for the panel that answers it."""
        before = self.page.get_attribute("#review .uw", "data-serial")
        self.page.keyboard.press(key)
        self.page.wait_for_function(
            "before => document.querySelector('#review .uw')?.dataset.serial !== before", arg=before
        )

    def on_screen(self):
        """The row of the suspect that is shown."""
        return int(self.page.get_attribute("#review .review", "data-row"))

    def loaded_pictures(self, where):
        """How many pictures there are in a part of the page, once every one of them is drawn."""
        self.page.wait_for_function(
            "where => [...document.querySelectorAll(where + ' img')].filter(one => one.checkVisibility())"
            ".every(one => (one.scrollIntoView(), one.complete && one.naturalWidth > 0))",
            arg=where,
        )
        return self.page.locator(f"{where} img").count()
