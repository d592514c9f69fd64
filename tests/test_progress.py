"""Progress bars: how many, how long yet, and nothing at all where nobody watches."""

import io
import sys

import pytest
import torch

import upweight as uw
from upweight.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def fitted_quietly(monkeypatch):
    """What a fit, scores and self-influence write to this standard error."""

    def run(stream: io.StringIO, progress: bool) -> str:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "100")
        torch.manual_seed(0)
        data = torch.randn(30, 3), torch.randint(2, (30,))
        method = uw.Influence(torch.nn.Linear(3, 2), uw.Classification(), batch_size=5, progress=progress)
        method.fit(data).attribute(data)
        method.self_influence()
        return stream.getvalue()

    return run


def test_a_terminal_sees_what_is_done_and_how_long_it_will_take(fitted_quietly):
    shown = fitted_quietly(Terminal(), True)
    for words in ("ekfac curvature", "scores", "self-influence", "30/30", "left"):
        assert words in shown


def test_a_file_and_whoever_asks_for_silence_see_nothing(fitted_quietly):
    assert fitted_quietly(io.StringIO(), True) == ""
    assert fitted_quietly(Terminal(), False) == ""


def test_the_time_left_is_estimated(monkeypatch):
    from rich.progress import Progress

    now, bars = [0.0], []
    enter = Progress.__enter__

    def started(bar):
        bar.get_time = lambda: now[0]
        bars.append(bar)
        return enter(bar)

    monkeypatch.setattr(Progress, "__enter__", started)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("models", 10, True) as advance:
        for _ in range(4):
            now[0] += 2.0
            advance(1)
        assert bars[0].tasks[0].time_remaining == 12


def test_work_within_work_is_a_line_of_the_same_display(monkeypatch):
    from rich.progress import Progress

    bars, lines = [], []
    enter = Progress.__enter__
    monkeypatch.setattr(Progress, "__enter__", lambda bar: bars.append(bar) or enter(bar))
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("scores", 10, True) as advance:
        with progress_bar("product", 4, True) as inner:
            inner(3)
            lines += [(task.description, task.completed) for task in bars[0].tasks]
        advance(10)
        lines += [(task.description, task.completed) for task in bars[0].tasks]
    assert len(bars) == 1 and lines == [("scores", 0), ("product", 3), ("scores", 10)]
    with progress_bar("models", 1, True):
        assert len(bars) == 2  # the first one is gone


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_products_that_take_long_are_shown(curvature, monkeypatch):
    """Automatic damping and conjugate gradients make many of them before the first score."""
    torch.manual_seed(0)
    data = torch.randn(30, 3), torch.randint(2, (30,))
    method = uw.Influence(torch.nn.Linear(3, 2), uw.Classification(), curvature=curvature, solver="cg")
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("upweight.curvature.exact.SLOW", -1.0)
    method.fit(data).attribute(data)
    assert f"{curvature}, product" in sys.stderr.getvalue()
    assert "30/30" in sys.stderr.getvalue()
