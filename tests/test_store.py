"""The store keeps what it says it keeps: bit for bit, for the run it belongs to, or it says which file is damaged."""

import json
import os
import sys

import pytest
import torch
from stores import MANIFEST, assert_same, filled, flip, shard

from upweight import _files
from upweight.errors import CacheMismatchError, StoreError, UpweightError
from upweight.store import ShardStore


@pytest.fixture(autouse=True)
def synced(monkeypatch):
    """Waiting for the disk is what takes time here; only a power cut could tell that these tests do not wait."""
    names = []
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: (
            names.append(os.readlink(f"/proc/self/fd/{descriptor}")) if sys.platform == "linux" else None
        ),
    )
    return names


# What is written is what is read


def test_a_second_store_reads_what_the_first_one_wrote(tmp_path):
    filled(tmp_path / "new" / "folders")
    store = ShardStore.open(tmp_path / "new" / "folders", MANIFEST, read_only=True)
    assert store.keys_done == {"part-0", "part-1", "part-2"}
    assert store.has("part-1") and not store.has("part-9")
    assert store.meta("part-2") == {"number": 2}
    for number in range(3):
        assert_same(store.read(f"part-{number}"), shard(number))
    store.verify()


@pytest.mark.parametrize("dtype", list(_files._DTYPES), ids=str)
def test_every_dtype_and_awkward_shape_comes_back(tmp_path, dtype):
    values = (torch.arange(24) % 2).to(dtype)
    tensors = {
        "plain": values.reshape(2, 3, 4),
        "transposed": values.reshape(6, 4).T,
        "view": values[5:9],
        "strided": values[::3],
        "scalar": values[1],
        "empty": values[:0].reshape(0, 7),
        "odd": torch.arange(3, dtype=torch.int8),
    }
    with ShardStore.open(tmp_path, {}) as store:
        store.write("a", tensors)
        store.write("nothing", {})
    found = store.read("a")
    assert_same(found, tensors)
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in found.values())
    assert store.read("nothing") == {}


def test_a_parameter_with_a_graph_is_written_as_its_values(tmp_path):
    weight = torch.nn.Parameter(torch.ones(2))
    with ShardStore.open(tmp_path, {}) as store:
        store.write("a", {"w": weight * 2})
    assert store.read("a")["w"].tolist() == [2, 2]


@pytest.mark.parametrize(
    "key", ["layer1.0.conv", "a/b", "../../up", ".", "weight [0]", "größe", "%2F", "con:x"]
)
def test_any_key_stays_in_the_folder_and_apart_from_others(tmp_path, key):
    folder = tmp_path / "inner" / "store"
    with ShardStore.open(folder, {}) as store:
        store.write(key, shard(1))
        store.write("other", shard(2))
    again = ShardStore.open(folder, {}, read_only=True)
    assert again.keys_done == {key, "other"}
    assert_same(again.read(key), shard(1))
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and folder not in path.parents]
    assert outside == []


def test_changing_what_was_read_does_not_change_the_file(tmp_path):
    store = filled(tmp_path)
    store.read("part-0")["scores"].zero_()
    assert_same(store.read("part-0"), shard(0))
    store.verify()


def test_the_ledger_has_one_line_of_facts_for_every_shard(tmp_path):
    filled(tmp_path, 2)
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["part-0", "part-1"]
    for line in lines:
        path = tmp_path / line["file"]
        assert line["bytes"] == path.stat().st_size
        assert line["blake2b"] == _files.file_digest(path)
        assert line["seconds"] >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file was synced")
def test_everything_is_on_disk_before_it_counts(tmp_path, monkeypatch, synced):
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: synced.append("replace") or replace(old, new))
    with ShardStore.open(tmp_path, MANIFEST) as store:
        manifest = [f"{tmp_path}/.manifest.json.tmp", "replace", f"{tmp_path}"]
        assert synced == manifest
        del synced[:]
        parts = f"{tmp_path}/parts"
        store.write("a", shard(0))
        part = [f"{parts}/.a.safetensors.tmp", "replace", parts, f"{tmp_path}/ledger.jsonl"]
        assert synced == [*part, str(tmp_path)]  # and once, the new ledger's own name


# A folder of another run


@pytest.mark.parametrize(
    ("changed", "seen"),
    [
        ({**MANIFEST, "model": "77aa"}, ['model is "3f9a" there but "77aa" here']),
        ({**MANIFEST, "data": {"n": 13, "ids": [1, 2]}}, ["data.n is 12 there but 13 here"]),
        ({**MANIFEST, "data": {"n": 12, "ids": [2, 1]}}, ["data.ids is [1, 2] there but [2, 1] here"]),
        ({**MANIFEST, "damping": 1.0e-4}, ["damping is 0.001 there but 0.0001 here"]),
        ({**MANIFEST, "fisher": "exact"}, ['fisher is absent there but "exact" here']),
        ({"model": "3f9a", "data": {"n": 12, "ids": [1, 2]}}, ["damping is 0.001 there but absent here"]),
        ({**MANIFEST, "data": None}, ["data is {", "there but null here"]),
    ],
)
def test_another_manifest_is_refused_by_its_first_difference(tmp_path, changed, seen):
    filled(tmp_path)
    with pytest.raises(CacheMismatchError) as caught:
        ShardStore.open(tmp_path, changed)
    message = str(caught.value)
    assert all(part in message for part in [*seen, str(tmp_path), "-> name another folder"])
    assert "\n" not in message
    ShardStore.open(tmp_path, MANIFEST).close()  # and the refusal left nothing locked


def test_tuples_numpy_numbers_and_nan_in_a_manifest_compare_equal_to_themselves(tmp_path):
    manifest = {"shape": (3, 4), "tolerance": float("nan"), "n": torch.tensor(3), 5: "five"}
    filled_once = ShardStore.open(tmp_path, manifest)
    filled_once.close()
    ShardStore.open(tmp_path, manifest).close()


def test_a_newer_format_is_a_mismatch(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.store._SCHEMA", 2)
    filled(tmp_path)
    monkeypatch.undo()
    with pytest.raises(CacheMismatchError, match="format 2, this version reads 1"):
        ShardStore.open(tmp_path, MANIFEST)


def test_a_manifest_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(StoreError, match=r"manifest\.json is damaged, or not a manifest of ours"):
        ShardStore.open(tmp_path, MANIFEST)
    assert (tmp_path / "manifest.json").read_text() == '{"name": "a web page"}'


def test_shards_without_a_manifest_are_refused(tmp_path):
    filled(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        ShardStore.open(tmp_path, MANIFEST)


def test_reading_only_needs_a_store_and_makes_none(tmp_path):
    with pytest.raises(StoreError, match=r"has no manifest\.json"):
        ShardStore.open(tmp_path / "absent", MANIFEST, read_only=True)
    assert not (tmp_path / "absent").exists()


# Damage


@pytest.mark.parametrize("where", [0, 9, 200, -1], ids=["length", "header", "middle", "last"])
def test_a_flipped_byte_in_a_shard_names_the_file(tmp_path, where):
    filled(tmp_path)
    path = tmp_path / "parts" / "part-1.safetensors"
    flip(path, where)
    store = ShardStore.open(tmp_path, MANIFEST, read_only=True)
    assert_same(store.read("part-0"), shard(0))
    for check in (lambda: store.read("part-1"), store.verify):
        with pytest.raises(StoreError, match="damaged") as caught:
            check()
        assert str(path) in str(caught.value)
        assert "-> delete it and run again: it will be recomputed" in str(caught.value)
    # The way out that the message promises:
    path.unlink()
    with ShardStore.open(tmp_path, MANIFEST) as store:
        assert store.keys_done == {"part-0", "part-2"}
        store.write("part-1", shard(1))
    store.verify()
    assert_same(store.read("part-1"), shard(1))


def test_a_shortened_shard_is_damaged_too(tmp_path):
    filled(tmp_path)
    os.truncate(tmp_path / "parts" / "part-2.safetensors", 100)
    store = ShardStore.open(tmp_path, MANIFEST, read_only=True)
    with pytest.raises(StoreError, match=r"part-2\.safetensors is damaged"):
        store.read("part-2")


def test_verify_counts_the_damaged_and_names_the_missing(tmp_path):
    store = filled(tmp_path)
    (tmp_path / "parts" / "part-0.safetensors").unlink()
    flip(tmp_path / "parts" / "part-2.safetensors", -1)
    with pytest.raises(StoreError, match=r"part-0\.safetensors is missing .*\(and 1 more"):
        store.verify()
    with pytest.raises(StoreError, match=r"part-0\.safetensors is missing"):
        ShardStore.read(store, "part-0")


def test_verification_can_be_skipped_and_happens_once(tmp_path, monkeypatch):
    store = filled(tmp_path)
    digests = []
    digest = _files.file_digest
    monkeypatch.setattr("upweight.store.file_digest", lambda path: digests.append(path.name) or digest(path))
    store.read("part-0", verify=False)
    assert digests == []
    store.read("part-0")
    store.read("part-0")
    store.read("part-1")
    assert digests == ["part-0.safetensors", "part-1.safetensors"]


@pytest.mark.parametrize("name", ["manifest.json", "ledger.jsonl"])
def test_any_flipped_byte_in_the_bookkeeping_names_the_file(tmp_path, name):
    filled(tmp_path, 2)
    path = tmp_path / name
    size = path.stat().st_size
    for position in [*range(0, size - 3, 3), size - 3, size - 2, size - 1]:
        flip(path, position)
        with pytest.raises(StoreError) as caught:
            ShardStore.open(tmp_path, MANIFEST, read_only=True)
        assert str(path) in str(caught.value) and not isinstance(caught.value, CacheMismatchError)
        flip(path, position)
    ShardStore.open(tmp_path, MANIFEST, read_only=True).verify()


def test_opening_a_damaged_store_does_not_lock_it(tmp_path):
    filled(tmp_path)
    flip(tmp_path / "ledger.jsonl", 5)
    for _ in range(2):
        with pytest.raises(StoreError, match="line 1 -> delete that line") as caught:
            ShardStore.open(tmp_path, MANIFEST)
    assert (
        caught.tb is not None
    )  # which keeps the failed store alive; it still must have let go of the folder
    flip(tmp_path / "ledger.jsonl", 5)
    ShardStore.open(tmp_path, MANIFEST).close()


def test_only_a_writer_removes_what_a_killed_run_left(tmp_path):
    filled(tmp_path)
    left = [tmp_path / ".manifest.json.tmp", tmp_path / "parts" / ".part-7.safetensors.tmp"]
    for path in left:
        path.write_bytes(b"half")
    ShardStore.open(tmp_path, MANIFEST, read_only=True).verify()
    assert all(path.exists() for path in left)
    ShardStore.open(tmp_path, MANIFEST).close()
    assert not any(path.exists() for path in left)


def test_a_ledger_torn_anywhere_in_its_last_line_costs_that_shard_only(tmp_path):
    filled(tmp_path, 3)
    ledger = tmp_path / "ledger.jsonl"
    whole = ledger.read_bytes()
    second_end = whole.rindex(b"\n", 0, -1) + 1
    for length in range(second_end, len(whole)):
        ledger.write_bytes(whole[:length])
        store = ShardStore.open(tmp_path, MANIFEST, read_only=True)
        assert store.keys_done == {"part-0", "part-1"}
    assert ledger.read_bytes() == whole[:-1]  # reading only repaired nothing
    with ShardStore.open(tmp_path, MANIFEST) as store:
        store.write("part-2", shard(2), {"number": 2})
    store.verify()
    assert len(ledger.read_bytes().splitlines()) == 3


# Wrong use


def test_writing_twice_or_without_the_lock_is_refused(tmp_path):
    with ShardStore.open(tmp_path, MANIFEST) as store:
        store.write("part-0", shard(0))
        with pytest.raises(StoreError, match=r"'part-0' of .* is already finished"):
            store.write("part-0", shard(1))
    with pytest.raises(StoreError, match="not open for writing"):
        store.write("part-1", shard(1))
    with pytest.raises(StoreError, match="not open for writing"):
        ShardStore.open(tmp_path, MANIFEST, read_only=True).write("part-1", shard(1))
    assert_same(store.read("part-0"), shard(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.read("absent"), "no finished shard 'absent'"),
        (lambda store: store.meta("absent"), "no finished shard 'absent'"),
        (lambda store: store.write("", {}), "has 0 characters"),
        (lambda store: store.write("x" * 201, {}), "has 201 characters"),
        (
            lambda store: store.write("a", {"z": torch.zeros(1, dtype=torch.complex64)}),
            "'z' is torch.complex64",
        ),
        (lambda store: store.write("a", {}, {"f": print}), "meta is not JSON"),
        (lambda store: ShardStore.open("unused", {"f": {1, 2}}), "manifest is not JSON"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_the_store_as_it_was(tmp_path, call, message):
    with ShardStore.open(tmp_path, MANIFEST) as store:
        with pytest.raises(UpweightError, match=message) as caught:
            call(store)
        assert "->" in str(caught.value) and "\n" not in str(caught.value)
        assert store.keys_done == set() and list((tmp_path / "parts").iterdir()) == []


def test_threads_may_write_at_the_same_time(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    with ShardStore.open(tmp_path, MANIFEST) as store, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.write(f"part-{number}", shard(number)), range(40)))
    again = ShardStore.open(tmp_path, MANIFEST, read_only=True)
    again.verify()
    assert len(again.keys_done) == 40
    assert_same(again.read("part-17"), shard(17))


def test_its_text_says_where_and_how_far(tmp_path):
    store = filled(tmp_path, 2)
    assert repr(store) == f"ShardStore({str(tmp_path)!r}, 2 shards done, reading only)"
