"""What happens to a store when it is killed, when its disk is full or forbidden, and when two write at once."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from stores import MANIFEST, assert_same, filled, shard

from upweight import _files
from upweight.errors import StoreError
from upweight.store import ShardStore


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Waiting for the disk is what takes time here; only a power cut could tell that these tests do not wait."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


# Killed


WRITER = """
    import os, signal, sys, torch
    from pathlib import Path
    from upweight.store import ShardStore
    sys.path.insert(0, sys.argv[1])
    from stores import MANIFEST, shard

    def write_all(folder, die_at):
        steps = 0
        def step(*_):
            nonlocal steps
            steps += 1
            if steps == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
        # Every call after which the disk looks different; an append can also be cut in half.
        def around(name):
            real = getattr(os, name) if name == "replace" else lambda descriptor: None
            def counted(*arguments):
                step()
                result = real(*arguments)
                step()
                return result
            setattr(os, name, counted)
        around("fsync"), around("replace")
        real_append = ShardStore._append
        def append(self, line):
            if steps + 1 == die_at:
                with open(self.folder / "ledger.jsonl", "ab") as file:
                    file.write(line[: len(line) // 2])
            step()
            real_append(self, line)
        ShardStore._append = append
        with ShardStore.open(folder, MANIFEST) as store:
            for number in range(12):
                if not store.has(f"part-{number}"):
                    store.write(f"part-{number}", shard(number), {"number": number})
                    with open(f"{folder}.returned", "a") as file:
                        file.write(f"part-{number} ")

    # One process imports torch, then forks a writer for each moment.
    for die_at in map(int, sys.argv[3:]):
        child = os.fork()
        if not child:
            write_all(f"{sys.argv[2]}/{die_at}", die_at)
            os._exit(0)
        print(die_at, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

# A shard takes 9 steps (before and after the file's fsync, its replace, the folder's fsync and the ledger's fsync,
# and half a ledger line), the manifest 6, and the first ledger line 2 more; these fall on every kind of step.
MOMENTS = [3, 7, 10, 13, 24, 35, 46, 66, 77, 108]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills with SIGKILL, which this system does not have")
def test_killed_at_ten_moments_it_resumes_without_redoing_a_finished_shard(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    arguments = [str(Path(__file__).parent), str(tmp_path), *map(str, MOMENTS)]
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), *arguments],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [text for moment in MOMENTS for text in (str(moment), str(-signal.SIGKILL))]

    filled(tmp_path / "whole", 12)
    parts = {path.name: path.read_bytes() for path in (tmp_path / "whole" / "parts").iterdir()}
    found = set()
    for moment in MOMENTS:
        folder = tmp_path / str(moment)
        returned = tmp_path / f"{moment}.returned"
        returned = set(returned.read_text().split()) if returned.exists() else set()
        with ShardStore.open(folder, MANIFEST) as store:
            done = store.keys_done
            assert returned <= done and len(done - returned) <= 1
            before = {key: (folder / "parts" / f"{key}.safetensors").stat() for key in done}
            for number in range(12):
                if not store.has(f"part-{number}"):
                    store.write(f"part-{number}", shard(number), {"number": number})
        for key, old in before.items():
            new = (folder / "parts" / f"{key}.safetensors").stat()
            assert (new.st_ino, new.st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
        assert {path.name: path.read_bytes() for path in (folder / "parts").iterdir()} == parts
        resumed = ShardStore.open(folder, MANIFEST, read_only=True)
        resumed.verify()
        assert [resumed.meta(f"part-{number}") for number in range(12)] == [{"number": n} for n in range(12)]
        found.add(len(done))
    assert len(found) >= 6  # the moments did fall apart


# Disks and folders that will not


class FullDisk:
    """A file on a disk with room for a few bytes more."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            self.file.write(bytes(data)[: self.room] if len(data) + self.room > 0 else b"")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


def fill_disk(monkeypatch, module, room):
    """Files that this module opens for writing find a full disk."""

    def open_full(path, mode, **options):
        file = open(path, mode, **options)  # noqa: SIM115
        return file if "r" in mode else FullDisk(file, room)

    monkeypatch.setattr(module, "open", open_full, raising=False)


def assert_full(caught, path):
    message = str(caught.value)
    assert str(path) in message and "No space left on device" in message and "\n" not in message
    assert "-> free some space" in message and "finished shards are kept" in message


def assert_kept_then_resumable(folder, store):
    """Finished shards are intact, no leftovers lie about, and the missing one can be written afterwards."""
    assert store.keys_done == {"part-0"}
    assert [path.name for path in folder.rglob("*.tmp")] == []
    store.verify()
    store.write("part-1", shard(1), {"number": 1})
    store.close()
    again = ShardStore.open(folder, MANIFEST, read_only=True)
    again.verify()
    assert_same(again.read("part-1"), shard(1))
    assert len((folder / "ledger.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("room", [0, 100, 4000])
def test_a_disk_that_fills_up_in_a_shard(tmp_path, monkeypatch, room):
    store = ShardStore.open(tmp_path, MANIFEST)
    store.write("part-0", shard(0), {"number": 0})
    with monkeypatch.context() as patched:
        fill_disk(patched, _files, room)
        with pytest.raises(StoreError) as caught:
            store.write("part-1", shard(1), {"number": 1})
    assert_full(caught, tmp_path / "parts" / "part-1.safetensors")
    assert_kept_then_resumable(tmp_path, store)


@pytest.mark.parametrize("room", [0, 50])
def test_a_disk_that_fills_up_in_the_ledger(tmp_path, monkeypatch, room):
    store = ShardStore.open(tmp_path, MANIFEST)
    store.write("part-0", shard(0), {"number": 0})
    with monkeypatch.context() as patched:
        fill_disk(patched, sys.modules["upweight.store"], room)
        with pytest.raises(StoreError) as caught:
            store.write("part-1", shard(1), {"number": 1})
    assert_full(caught, tmp_path / "ledger.jsonl")
    assert_kept_then_resumable(tmp_path, store)


def test_a_file_system_that_really_is_full(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a small file system")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("this machine does not let root mount a small file system")
    try:
        with ShardStore.open(folder, MANIFEST) as store:
            store.write("part-0", shard(0))
            with pytest.raises(StoreError) as caught:
                store.write("big", {"x": torch.zeros(100_000)})
            assert_full(caught, folder / "parts" / "big.safetensors")
            store.write("part-1", shard(1))
        store.verify()
        assert store.keys_done == {"part-0", "part-1"}
    finally:
        subprocess.run(["umount", folder], check=True)


def test_an_interrupt_leaves_no_half_file(tmp_path, monkeypatch):
    store = ShardStore.open(tmp_path, MANIFEST)
    store.write("part-0", shard(0), {"number": 0})

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.write("part-1", shard(1))
    assert_kept_then_resumable(tmp_path, store)


@pytest.mark.parametrize("below", ["", "cache", "deep/er"])
def test_a_folder_that_is_or_lies_below_a_file(tmp_path, below):
    (tmp_path / "file").write_text("not a folder")
    folder = tmp_path / "file" / below
    with pytest.raises(StoreError) as caught:
        ShardStore.open(folder, MANIFEST)
    assert str(folder) in str(caught.value) and "-> name a folder that can be written" in str(caught.value)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch, number):
    def refused(*_, **__):
        raise OSError(number, os.strerror(number))

    store = ShardStore.open(tmp_path / "opened", MANIFEST)
    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(StoreError, match=f"{os.strerror(number)} -> name a folder that can be written"):
        ShardStore.open(tmp_path / "new", MANIFEST)
    with pytest.raises(StoreError, match=rf"part-0\.safetensors cannot be written: {os.strerror(number)}"):
        store.write("part-0", shard(0))
    assert store.keys_done == set()


# Two writers


def test_two_writers_are_one_too_many_but_readers_are_welcome(tmp_path):
    first = ShardStore.open(tmp_path, MANIFEST)
    first.write("part-0", shard(0))
    with pytest.raises(StoreError, match="is being written by another process -> wait for it") as caught:
        ShardStore.open(tmp_path, MANIFEST)
    assert str(tmp_path) in str(caught.value)
    reader = ShardStore.open(tmp_path, MANIFEST, read_only=True)
    assert_same(reader.read("part-0"), shard(0))
    first.close()
    assert_same(first.read("part-0"), shard(0))
    with ShardStore.open(tmp_path, MANIFEST) as second:
        second.write("part-1", shard(1))
    first.close()  # a second close is harmless


def test_a_process_that_holds_the_lock_is_noticed_and_a_dead_one_is_not(tmp_path):
    code = f"""
        import sys, time
        from filelock import FileLock
        lock = FileLock({str(tmp_path / ".lock")!r})
        lock.acquire()
        print("locked", flush=True)
        time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(StoreError, match="another process"):
            ShardStore.open(tmp_path, MANIFEST)
    finally:
        holder.kill()
        holder.communicate()
    ShardStore.open(tmp_path, MANIFEST).close()
