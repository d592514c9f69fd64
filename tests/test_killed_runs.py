"""A process killed with SIGKILL while it writes a cache or scores resumes without redoing what was finished."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

KILLS = 10
SCRIPT = textwrap.dedent(
    """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import torch
    import upweight as uw
    from networks import digits, trained
    from upweight import cache, store

    torch.set_num_threads(1)
    what, folder, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.fsync = lambda descriptor: None  # SIGKILL does not lose what the system holds; only a power cut would
    cache.SHARD_BYTES = 40 * 1000
    write, count = store.ShardStore.write, 0

    def counted(self, key, *rest):
        global count
        count += 1
        if count == kill_at:  # in the middle of this shard: its file is begun, its ledger line is not
            store.replace_file = lambda path, writes: (path.with_name("torn").touch(), os.kill(os.getpid(), 9))
        write(self, key, *rest)
        print(key, flush=True)

    store.ShardStore.write = counted
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


def run(what: str, folder: Path, kill_at: int) -> tuple[int, list[str]]:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, what, str(folder), str(kill_at)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode, done.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["cache", "scores"])
def test_ten_kills_lose_at_most_the_shard_at_hand(what: str, tmp_path):
    code, everything = run(what, tmp_path / "whole", 0)
    assert code == 0 and len(everything) >= KILLS
    finished: list[str] = []
    for kill in range(KILLS):  # each run finishes one shard more and is killed in the next
        code, keys = run(what, tmp_path / "killed", 2)
        assert code == -signal.SIGKILL, f"kill {kill} came too late"
        assert len(keys) == 1 and keys[0] not in finished
        finished += keys
    code, rest = run(what, tmp_path / "killed", 0)
    assert code == 0
    assert sorted(finished + rest) == sorted(everything), (
        "a finished shard was written again, or one was forgotten"
    )
    whole, resumed = (load(tmp_path / f"{name}.scores") for name in ("whole", "killed"))
    np.testing.assert_array_equal(whole, resumed)


def load(path: Path) -> np.ndarray:
    import torch

    return torch.load(path).numpy()
