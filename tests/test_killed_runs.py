"""A process killed with SIGKILL at any moment of a fit or of scores resumes without redoing what was finished."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

SHARDS = [
    ("manifest", 1),  # of the folder itself
    ("begun", 2),  # the shard's file is begun, its ledger line is not
    ("ledger", 2),  # half of its ledger line is there
    ("written", 2),  # and between two shards
    ("begun", 3),
    ("ledger", 1),
    ("written", 1),
]
MOMENTS = {
    "cache": [*SHARDS, ("fitting", 3), ("curvature", 1), ("asking", 1)],
    "scores": [*SHARDS, ("fitting", 2), ("asking", 2), ("written", 2)],
}
SCRIPT = textwrap.dedent(
    """
    import os, sys
    from collections import Counter
    sys.path.insert(0, {tests!r})
    import torch
    import upweight as uw
    from networks import digits, trained
    from upweight import cache, store
    from upweight.attributors import fitted, tiles
    from upweight.gradients import contraction

    torch.set_num_threads(1)
    what, folder, moment, number = *sys.argv[1:4], int(sys.argv[4])
    os.fsync = lambda descriptor: None  # SIGKILL does not lose what the system holds; only a power cut would
    cache.SHARD_BYTES = 40 * 1000
    # Two runs from scratch round alike only if they take the same routes: the rates of this moment would choose others.
    rates = contraction.Rates(60e9, 30e9, 20e9)
    contraction.measured_rates = tiles.measured_rates = lambda *_: rates
    seen = Counter()

    def now(here, before=lambda: None):
        seen[here] += 1
        if here == moment and seen[here] == number:
            before()
            os.kill(os.getpid(), 9)

    def wrap(owner, name, wrapper):
        inner = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: wrapper(inner, *args, **options))

    def replace_file(inner, path, writes):
        kind = "manifest" if path.name == "manifest.json" else "begun"
        now("curvature" if path.parent.parent.name == "curvature" else kind, path.with_name("torn").touch)
        return inner(path, writes)

    def append(inner, self, line):
        now("ledger", lambda: open(self.folder / "ledger.jsonl", "ab").write(line[: len(line) // 2]))
        inner(self, line)

    def write(inner, self, key, *rest):
        inner(self, key, *rest)
        print(key, flush=True)
        now("written")

    def walk(inner, self):
        for batch in inner(self):
            now("fitting")
            yield batch

    def asking(inner, *args):
        now("asking")
        return inner(*args)

    wrap(store, "replace_file", replace_file)
    wrap(store.ShardStore, "_append", append)
    wrap(store.ShardStore, "write", write)
    wrap(fitted.LoadedSteps, "__iter__", walk)
    wrap(uw.Influence, "_preconditioned", asking)
    train, query = digits()
    options = {{"fisher": "empirical", "batch_size": 50, "memory": "1MB", "progress": False}}
    method = uw.Influence(trained("mlp"), uw.Classification(), **options)
    if what == "cache":
        scores = method.fit(train, cache=folder).attribute(query)
    else:
        scores = method.fit(train).attribute(query, out=folder)
    torch.save(scores.values, folder + ".scores")
    """
)


def run(what: str, folder: Path, moment: str, number: int) -> tuple[int, list[str]]:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, what, str(folder), moment, str(number)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode, done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cache", "scores"])
def test_ten_kills_lose_at_most_the_shard_at_hand(what: str, tmp_path):
    code, everything = run(what, tmp_path / "whole", "never", 0)
    assert code == 0 and len(everything) >= 10
    finished: list[str] = []
    assert len(MOMENTS[what]) == 10
    for moment, number in MOMENTS[what]:
        code, keys = run(what, tmp_path / "killed", moment, number)
        assert code == -signal.SIGKILL, f"the run ended before the kill at {moment} {number}"
        finished += keys
    code, rest = run(what, tmp_path / "killed", "never", 0)
    assert code == 0
    assert sorted(finished + rest) == sorted(everything), (
        "a finished shard was written again, or one was forgotten"
    )
    whole, resumed = (load(tmp_path / f"{name}.scores") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole, resumed)


def load(path: Path) -> np.ndarray:
    import torch

    return torch.load(path).numpy()


def test_a_resumed_run_takes_the_routes_of_the_first(tmp_path, monkeypatch):
    """Routes are chosen by measured rates; those of a busier moment would have rounded the rest in another way."""
    import torch
    from networks import digits, trained

    import upweight as uw
    from upweight.attributors import tiles
    from upweight.gradients.contraction import Rates

    large = Rates(gemm=60e9, batched=30e9, bandwidth=20e9)
    slow = Rates(gemm=600e9, batched=3e9, bandwidth=2e9)
    train, query = digits()
    options = {"fisher": "empirical", "batch_size": 50, "tolerance": 0, "progress": False}
    method = uw.Influence(trained("mlp"), uw.Classification(), **options).fit(train)

    def scores(folder: str, rates: Rates, tiles_until_it_stops: int) -> torch.Tensor | None:
        written = tiles.ScoreTiles.write

        def write(self, *args):
            nonlocal tiles_until_it_stops
            written(self, *args)
            tiles_until_it_stops -= 1
            if not tiles_until_it_stops:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(tiles, "measured_rates", lambda *_: rates)
            patch.setattr(tiles.ScoreTiles, "write", write)
            try:
                return method.attribute(query, out=tmp_path / folder).values
            except KeyboardInterrupt:
                return None

    whole, other = scores("whole", large, -1), scores("other", slow, -1)
    assert not torch.equal(whole, other)  # or the rest shows nothing
    assert scores("stopped", large, 3) is None
    assert torch.equal(scores("stopped", slow, -1), whole)
