"""Every verb of the command line, as typed, on pictures, on a table, on texts and on a fitted estimator."""

import asyncio
import gc
import json
import sys

import pytest
from projects import MADE

import upweight as uw
from upweight.repair import log


async def asked(app, *paths):
    """Status and text of each path, as a page of this machine would get them."""
    httpx = pytest.importorskip("httpx", reason="pip install 'upweight[explore]'")
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:7860")
    async with client:
        return [(one.status_code, one.text) for one in [await client.get(path) for path in paths]]


EXTRAS = ("gradio", "pandas", "pyarrow", "matplotlib", "xarray", "cleanlab", "bm25s", "dask", "datasets")


class NotInstalled:
    """Finds none of the extras."""

    def find_spec(self, name, path=None, target=None):
        if name in EXTRAS:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


@pytest.mark.parametrize("missing", ["gradio", "fastapi"])
def test_the_explorer_names_the_extra_that_is_missing(upweight, place, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = upweight("explore", "pets.py:experiment", "--out", "run", "--method", "grad-dot")
    assert (code, out) == (2, "") and "Traceback" not in err
    assert err.splitlines()[-1] == f"error: the explorer needs {missing} -> pip install 'upweight[explore]'"


def test_the_other_verbs_need_no_extra(upweight, place, monkeypatch):
    for name in EXTRAS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "meta_path", [NotInstalled(), *sys.meta_path])
    typed = {
        "attribute": ("--method", "grad-dot"),
        "audit": ("--kinds", "label,near_duplicate,outlier"),
        "repair": ("--remove", "3", "--damping", "0.1"),
        "report": (),
    }
    for verb, options in typed.items():
        code, _, err = upweight(verb, "pets.py:experiment", "--out", "run", *options)
        assert code == 0, err
    assert (place / "run/report.html").is_file()


# gradio makes event loops that it never closes
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", MADE)
def test_the_loop_is_closed_from_the_command_line(upweight, place, kind, monkeypatch):
    """Suspects, a decision in the explorer, and a repaired model in the report, on the files that init writes."""
    pytest.importorskip("gradio", reason="pip install 'upweight[explore]'")
    from upweight.explorer import server

    data = () if MADE[kind] is None else ("--data", str(MADE[kind](place)))
    code, out, err = upweight("init", "mine", "--kind", kind, "--name", f"verbs_{kind}", *data, "--json")
    assert code == 0, err
    address, run = json.loads(out)["address"], f"run of {kind}"

    def typed(verb, *arguments):
        code, out, err = upweight(verb, address, "--out", run, *arguments, "--json")
        assert code == 0 and "Traceback" not in err, err
        return json.loads(out)

    assert typed("attribute", "--top", "2")["queries"][0]["proponents"]
    assert typed("evaluate", "--subsets", "4", "--seeds", "1", "--methods", "grad-dot")["methods"]
    found = typed("audit", "--kinds", "label,harmful", "--top", "3")
    first = found["worst"]["label"][0]

    answers = []

    def serve(app, opened):
        opened.close()
        answers.extend(asyncio.run(asked(app, "/", "/decisions.csv", "/picture/train/0.png")))

    monkeypatch.setattr(server, "serve", serve)
    uw.Decisions(place / run / "decisions.sqlite", f"verbs_{kind}").set(first["id"], "drop", reviewer="ada")
    typed("explore", "--method", "grad-dot")
    assert [status for status, _ in answers] == [200, 200, 200 if kind == "images" else 404]
    assert answers[1][1].splitlines()[1].startswith(f"{first['id']},drop,,ada,")

    done = typed("repair", "--damping", "0.1")
    assert done["removed"] == [first["id"]] and done["source"].endswith("decisions.sqlite")
    assert [entry["action"] for entry in log.read(place / run / "repair/log.jsonl")] == ["repair"]
    made = typed("report")
    assert made["warnings"] == [] and [one["command"].split()[-1] for one in made["missing"]] == ["--verify"]
    page = (place / run / "report.html").read_text(encoding="utf-8")
    for part in ("queries", "scores", "trust", "issues", "repair"):
        assert f'id="{part}"' in page, part
    gc.collect()
