"""`upweight explore`, as typed: its help, and what it refuses to start with."""

import socket

import pytest

import upweight as uw

FILE = """
from explorers import experiment
def raises():
    raise RuntimeError("no data today")
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FILE)
    return "mine.py:experiment"


def test_help_teaches(upweight):
    code, out, _ = upweight("explore", "--help")
    assert code == 0 and "Examples" in out and "decisions.sqlite" in out and "--host" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.py:experiment"], "missing.py"),
        (["mine.py:nothing"], "nothing"),
        (["mine.py:raises"], "no data today"),
        (["mine.py:experiment", "--method", "magic"], "there is no method 'magic'"),
        (["mine.py:experiment", "--host", "no.such.host.invalid"], "is not known"),
        (["mine.py:experiment", "--host", "192.0.2.1"], "is no address of this machine"),
    ],
)
def test_what_is_wrong_is_one_line(upweight, file, arguments, message):
    code, out, err = upweight("explore", *arguments, "--out", "run")
    assert code == 2 and out == "" and "Traceback" not in err
    assert message in err and "->" in err


def test_a_taken_port_is_refused_if_it_was_asked_for_and_else_another_is_found(upweight, file, monkeypatch):
    from upweight.explorer import server

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = upweight("explore", file, "--port", str(port), "--out", "run")
        assert code == 2 and f"port {port} is taken" in err
        monkeypatch.setattr(server, "PORT", port)
        with server.listen("127.0.0.1", None) as found, server.listen("127.0.0.1", None) as third:
            # Two explorers that start at the same time: the second sees that the first has the port.
            assert third.getsockname()[1] > found.getsockname()[1] > port


def test_decisions_of_another_experiment_are_refused(upweight, file, tmp_path):
    uw.Decisions(tmp_path / "run" / "decisions.sqlite", "cars").set(1, "keep")
    code, _, err = upweight("explore", file, "--out", "run")
    assert code == 2 and "about experiment 'cars', this is 'pets'" in err
