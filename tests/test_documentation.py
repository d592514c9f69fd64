"""What README and docs show is run, page by page, in an empty folder."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = {
    page.relative_to(ROOT).as_posix(): page
    for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
}
CODE = {name: "\n".join(BLOCK.findall(page.read_text(encoding="utf-8"))) for name, page in PAGES.items()}


@pytest.mark.parametrize("name", [name for name, code in CODE.items() if code])
def test_the_code_on_the_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(CODE[name], name, "exec"), {"__name__": "__main__"})


LINK = re.compile(r"\[[^\]]*\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [link for link in LINK.findall(text) if not (ROOT / link).exists()] == []
