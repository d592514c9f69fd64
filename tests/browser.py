"""A real headless Chromium that reaches nothing but the page it is given."""

import os
import shutil

import pytest


def executable():
    """Chromium's path, None for Playwright's own; skips where there is neither."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = os.environ.get("PLAYWRIGHT_CHROMIUM") or next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if path is None:
        with api.sync_playwright() as playwright:
            if not os.path.exists(playwright.chromium.executable_path):
                pytest.skip("there is no Chromium: install it, or name one in PLAYWRIGHT_CHROMIUM")
    return path


@pytest.fixture(scope="module")
def chromium():
    """A browser for a module's tests."""
    path = executable()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a sandbox: tests often run as root, where Chromium refuses to start with one.
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


class Opened:
    """A page that was opened, and everything it did that it should not."""

    def __init__(self, browser, file, width=1200, height=900, dark=False):
        scheme = "dark" if dark else "light"
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True
        )
        self.page = self.context.new_page()
        self.requests, self.errors = [], []
        self.page.route(lambda url: not url.startswith(("file:", "data:")), self._refuse)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(file.as_uri())

    def _refuse(self, route):
        self.errors.append(f"asked for {route.request.url}")
        route.abort()

    def check(self):
        """No request but the file itself, no message on the console, nothing injected that ran."""
        outside = [url for url in self.requests if not url.startswith(("file:", "data:"))]
        assert outside == [] and self.errors == []
        assert sum(url.startswith("file:") for url in self.requests) == 1
        assert self.page.evaluate("window.hit") is None
        self.context.close()
