"""A report's page as tests look at it without a browser."""

import json
import re
from html.parser import HTMLParser


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
