"""The command line: help that teaches, one line for an error a user can repair."""

import json
import subprocess
import sys

import pytest

from upweight.errors import UpweightError


def test_bare_command_prints_help(upweight):
    code, out, _ = upweight()
    assert code == 0 and "Usage" in out
    assert all(command in out for command in ("demo", "attribute", "evaluate", "path/to/file.py:name"))


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


@pytest.mark.parametrize("command", ["attribute", "audit", "evaluate"])
def test_help_of_the_commands_on_an_experiment_teaches(upweight, command):
    code, out, _ = upweight(command, "--help")
    assert code == 0
    for words in (
        "Examples",
        f"upweight {command} examples/digits_experiment.py",
        "--out",
        "--json",
        "--debug",
    ):
        assert words in out


def test_help_and_version_come_without_pytorch():
    script = (
        "import sys; from upweight import cli\n"
        "for sys.argv in (['upweight', '--help'], ['upweight', 'evaluate', '-h'], ['upweight', '--version']):\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "slow = {'torch', 'scipy', 'sklearn', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {slow}' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and "Usage" in done.stdout, done.stderr


def test_an_unforeseen_error_is_one_line_too(upweight, monkeypatch):
    def fail(*rest):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("upweight.demo.run.run_demo", fail)
    code, out, err = upweight("demo")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: RuntimeError: two lines (") and "--debug" in err
    with pytest.raises(RuntimeError):
        upweight("demo", "--debug")


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


def test_the_demo_tells_programs_and_ends_on_ctrl_c(upweight, monkeypatch, tmp_path):
    from types import SimpleNamespace

    def told(settings, console):
        console.print("a table")
        return SimpleNamespace(figures=lambda: {"test_accuracy": 0.5})

    monkeypatch.setattr("upweight.demo.run.run_demo", told)
    code, out, _ = upweight("demo", "--out", str(tmp_path), "--json")
    found = json.loads(out)
    assert code == 0 and found["test_accuracy"] == 0.5
    assert found["files"]["html"] == str(tmp_path / "index.html")
    assert upweight("demo", "--out", str(tmp_path))[1] == "a table\n"

    def interrupted(settings, console):
        raise KeyboardInterrupt

    monkeypatch.setattr("upweight.demo.run.run_demo", interrupted)
    code, out, err = upweight("demo", "--json")
    assert (code, out) == (130, "") and "start again with: upweight demo --json" in err


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
