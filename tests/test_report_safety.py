"""The report's page escapes whatever it is given, and asks for nothing from elsewhere."""

import re

from report_pages import Page
from run_folders import HOSTILE, everything, hostile, images

from upweight.report import build


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
