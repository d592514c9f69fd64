"""The command line: help that teaches, one line for an error a user can repair."""

import sys

import pytest

from upweight import cli
from upweight.errors import UpweightError


@pytest.fixture
def upweight(monkeypatch, capsys):
    """Run the command as typed; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["upweight", *arguments])
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setenv("NO_COLOR", "1")
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_bare_command_prints_help(upweight):
    code, out, _ = upweight()
    assert code == 0 and "Usage" in out and "demo" in out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_of_the_demo_teaches(upweight, flag):
    code, out, _ = upweight("demo", flag)
    assert code == 0
    for words in (
        "Examples",
        "upweight demo --root photos",
        "--retrain-queries",
        "UPWEIGHT_DATA",
        "runs/demo",
    ):
        assert words in out


def test_version(upweight):
    code, out, _ = upweight("--version")
    assert code == 0 and out.strip()[0].isdigit()


def test_error_is_one_line(upweight, tmp_path):
    code, out, err = upweight("demo", "--root", str(tmp_path / ("long" * 40)))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and " -> " in err and "Traceback" not in err


def test_error_with_markup_is_shown_as_it_is(upweight):
    _, _, err = upweight("demo", "--data", "[red]no")
    assert "'[red]no'" in err


def test_debug_shows_everything(upweight, tmp_path):
    with pytest.raises(UpweightError):
        upweight("demo", "--root", str(tmp_path / "missing"), "--debug")


def test_mistyped_option(upweight):
    code, _, err = upweight("demo", "--sead", "1")
    assert code == 2 and "--sead" in err and "Traceback" not in err


def test_options_reach_the_demo(upweight, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("upweight.demo.run.run_demo", lambda settings, console: seen.append(settings))
    monkeypatch.delenv("UPWEIGHT_DATA", raising=False)
    assert upweight("demo")[0] == 0
    assert upweight("demo", "--data", "mnist", "--root", str(tmp_path), "--n", "50", "--seed", "7")[0] == 0
    assert upweight("demo", "--retrain-queries", "0", "--out", "elsewhere")[0] == 0
    first, second, third = seen
    assert (first.data, first.root, str(first.out), first.seed) == (None, None, "runs/demo", 0)
    assert (first.queries, first.retrain_queries, first.retrain_seeds) == (20, 10, 3)
    assert (second.data, second.root, second.n, second.seed) == ("mnist", tmp_path, 50, 7)
    assert (second.retrain_queries, second.retrain_seeds) == (5, 2)
    assert third.retrain_queries == 0 and str(third.out) == "elsewhere"
