"""Training gradients on disk: no pass over the data for new queries, what a cache is refused for, and damaged files."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from networks import Counting, N, digits, spearman, trained
from stores import flip
from torch import nn

import upweight as uw
from upweight import cache as cache_module
from upweight import index as index_module
from upweight.attributors import manifest
from upweight.cache import decode, encode
from upweight.errors import StoreError, UpweightError
from upweight.gradients import Dense, Factored, Gradients, Sparse
from upweight.gradients.blocks import Piece
from upweight.gradients.operations import Patches
from upweight.index import BLOCK, IndexedRows, WhitenedQueries

PROBES = 272 + 60
"""Examples that a fit looks at to trace the model and to try routes, on top of its passes over the data."""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Waiting for the disk is what takes time; only a power cut could tell that these tests do not wait."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of about 50 examples, so that there are several."""
    monkeypatch.setattr(cache_module, "SHARD_BYTES", 50 * 1000)


def influence(model: nn.Module | None = None, **options) -> uw.Influence:
    return uw.Influence(model or trained("mlp"), uw.Classification(), **{"progress": False, **options})


# No pass over the training data --------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8", "index"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_new_queries_cost_no_pass_over_the_training_data(fisher: str, precision: str, tmp_path, small_shards):
    model = Counting(trained("mlp"))
    train, query = digits()
    method = influence(model, fisher=fisher, memory="16MB").fit(train, cache=uw.Cache(tmp_path, precision))
    for rows in (slice(0, 10), slice(10, 24)):
        model.reset()
        method.attribute(tuple(t[rows] for t in query))
        assert (
            model.examples <= 2 * (rows.stop - rows.start) + 16
        )  # the queries, and a probe of them for the evidence
    model.reset()
    method.self_influence()
    assert model.calls == 0


@pytest.mark.parametrize("precision", ["float32", "bf16", "int8", "index"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_second_fit_needs_no_pass_at_all(fisher: str, precision: str, tmp_path, small_shards):
    """It looks at the probes only, and gives the very same scores."""
    train, query = digits()
    cache = uw.Cache(tmp_path, precision)
    scores = influence(fisher=fisher).fit(train, cache=cache).attribute(query).values
    seen, second = watched()
    method = influence(second, fisher=fisher).fit(train, cache=cache)
    assert sum(seen) <= PROBES
    found = method.attribute(query)
    assert found.info["curvature_from"] == "cache"
    assert torch.equal(found.values, scores)


def watched() -> tuple[list[int], nn.Module]:
    """A model whose fingerprint and layers are those of the plain one, and the sizes of the batches it was run on."""
    model, seen = trained("mlp"), []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen, model


def test_nor_does_a_second_process(tmp_path):
    code = f"""
        import torch, upweight as uw
        from test_cache import digits, influence, watched
        torch.set_num_threads(1)
        seen, model = watched()
        method = influence(model, fisher="empirical").fit(digits()[0], cache={str(tmp_path)!r})
        method.attribute(digits()[1]).save({str(tmp_path / "scores")!r})
        print(sum(seen))
    """
    scores = influence(fisher="empirical").fit(digits()[0], cache=tmp_path).attribute(digits()[1]).values
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= PROBES + 3 * 24
    found = uw.Scores.load(tmp_path / "scores").values
    assert float((found - scores).abs().max() / scores.abs().max()) < 1e-6


def test_a_folder_of_other_contents_is_refused(tmp_path, monkeypatch):
    """A later version may mean something else by the same tensors."""
    train, query = digits()
    influence().fit(train, cache=uw.Cache(tmp_path / "cache")).attribute(query, out=tmp_path / "scores")
    monkeypatch.setattr(manifest, "CONTENTS", manifest.CONTENTS + 1)
    with pytest.raises(uw.CacheMismatchError, match="contents is 1 there but 2 here"):
        influence().fit(train, cache=uw.Cache(tmp_path / "cache"))
    with pytest.raises(uw.CacheMismatchError, match="contents is 1 there but 2 here"):
        influence().fit(train).attribute(query, out=tmp_path / "scores")


def test_another_curvature_reads_the_gradients_of_the_first(tmp_path):
    model = Counting(trained("mlp"))
    train, query = digits()
    influence(model, fisher="empirical").fit(train, cache=tmp_path)
    for curvature in ("kfac", "diagonal", "identity"):
        model.reset()
        method = influence(model, fisher="empirical", curvature=curvature).fit(train, cache=tmp_path)
        found = method.attribute(query).values
        assert model.examples <= PROBES + 3 * len(query[1])
        fresh = influence(curvature=curvature, fisher="empirical").fit(train).attribute(query).values
        assert float((found - fresh).abs().max() / fresh.abs().max()) < 1e-5


def test_a_folder_is_a_tenth_as_large_as_the_gradients(tmp_path, small_shards):
    """Factors, not gradients; a half or a quarter of them in lossy precisions where examples have several positions."""
    train, _ = digits()
    sizes = {}
    for precision in ("float32", "bf16", "int8"):
        method = influence(trained("cnn"), fisher="empirical")
        method.fit(train, cache=uw.Cache(tmp_path / precision, precision))
        sizes[precision] = sum(p.stat().st_size for p in (tmp_path / precision / "parts").iterdir())
    assert 0.5 < sizes["bf16"] / sizes["float32"] < 0.55
    assert 0.25 < sizes["int8"] / sizes["float32"] < 0.4
    parameters = sum(p.numel() for p in trained("mlp").parameters())
    influence().fit(train, cache=tmp_path / "mlp")
    assert sum(p.stat().st_size for p in (tmp_path / "mlp" / "parts").iterdir()) < 0.1 * N * 4 * parameters


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 70])
def test_indexed_rows_give_the_products_of_what_they_hold(
    rows: int, blocks: int, precision: str, monkeypatch
):
    """Also a last shard of a single row, and more blocks than are unpacked at a time."""
    monkeypatch.setattr(index_module, "TILE_BYTES", 1)
    whitened = torch.randn(rows, blocks * BLOCK) * torch.rand(rows, 1).exp() * 100
    query = torch.randn(5, blocks * BLOCK)
    held = IndexedRows.rounded(whitened, whitened.square().sum(1), precision)
    found, exact = WhitenedQueries(query) @ held, query @ whitened.T
    assert float((found - exact).norm() / exact.norm()) < (0.02 if precision == "int8" else 0.01)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_rows_that_are_kept_unpacked_are_the_same(precision):
    whitened = torch.randn(7, 2 * BLOCK) * torch.rand(7, 1).exp() * 100
    held = IndexedRows.rounded(whitened, whitened.square().sum(1), precision)
    query = WhitenedQueries(torch.randn(5, 2 * BLOCK))
    unpacked = held.unpacked(torch.float32)
    torch.testing.assert_close(query @ unpacked.T, query @ held, rtol=1e-5, atol=1e-3)
    assert torch.equal(unpacked.self_influence, held.self_influence)


def test_an_index_is_read_once_and_kept_as_far_as_memory_goes(tmp_path, monkeypatch):
    train, query = digits()
    method = influence(batch_size=16).fit(train, cache=uw.Cache(tmp_path, "index"))
    index, reads = method._fitted.index, []
    read = type(index.store).read
    monkeypatch.setattr(
        type(index.store), "read", lambda store, key: (reads.append(key), read(store, key))[1]
    )
    first = method.attribute(query).values
    assert len(reads) == len(list(index))
    again = method.attribute(query).values
    assert torch.equal(again, first)
    assert len(reads) == len(list(index))
    index.memory, index._used = 0, 0
    index._kept.clear()
    scarce = method.attribute(query).values
    assert len(reads) == 2 * len(list(index))
    assert float((scarce - first).norm() / first.norm()) < 1e-5


def test_the_index_keeps_the_ranks_and_says_what_it_leaves_out(tmp_path):
    train, query = digits()
    truth = influence().fit(train).attribute(query)
    method = influence().fit(train, cache=uw.Cache(tmp_path, "index"))
    scores = method.attribute(query)
    assert float(spearman(scores.values, truth.values).mean()) >= 0.999
    assert scores.info["training_gradients"]["precision"] == "index"
    own = method.self_influence().values
    expected = influence().fit(train).self_influence().values
    assert float((own - expected).abs().max() / expected.max()) < 1e-5
    with pytest.raises(UpweightError, match="index was built for another damping") as caught:
        method.with_damping(1e-2).attribute(query)
    assert "\n" not in str(caught.value)


# Encoding ------------------------------------------------------------------------------------------------------------


def every_block() -> Gradients:
    shared = torch.randn(6, 4, 5)
    patches = Patches((2, 2), (1, 1), ((1, 0), (0, 1)), (1, 1))
    real = torch.rand(6, 4) > 0.3
    vectors = [Piece(torch.randn(6, 1, 3), torch.randn(6, 1, 5)) for _ in range(2)]
    return Gradients(
        {
            "query": Factored((Piece(torch.randn(6, 4, 3), shared),), 1, True),
            "key": Factored((Piece(torch.randn(6, 4, 3), shared, real=real),)),
            "twice": Factored(tuple(vectors)),
            "conv": Factored((Piece(torch.randn(6, 12, 4), torch.randn(6, 1, 3, 4, 2), patches, (3, 4)),), 2, True),
            "table": Sparse(torch.randint(0, 9, (6, 4)), torch.randn(6, 4, 3), (9, 3)),
            "norm": Dense(torch.randn(6, 7)),
            "dead": Factored((Piece(torch.zeros(6, 4, 3), shared),)),
        }
    )  # fmt: skip


@pytest.mark.parametrize(("precision", "most"), [("float32", 0), ("bf16", 6e-3), ("int8", 2e-2)])
def test_every_kind_of_block_survives(precision: str, most: float):
    gradients = every_block()
    tensors, meta = encode(gradients, precision)
    again = decode(tensors, meta, torch.float32)
    assert list(again) == list(gradients)
    for name in gradients:
        exact, found = gradients[name].dense(), again[name].dense()
        assert type(again[name]) is type(gradients[name]) and found.dtype == torch.float32
        assert float((found - exact).norm()) <= most * float(exact.norm())
    assert torch.equal(again["key"].real(), gradients["key"].real())
    assert sum(t.shape == (6, 4, 5) for t in tensors.values()) == 1  # what three layers share is stored once


def test_one_row_an_example_gets_16_bits_and_tiny_gradients_do_not_vanish():
    for precision in ("bf16", "int8"):
        rows = torch.randn(6, 1, 64) * 10.0 ** torch.arange(-30, 30, 10)[:, None, None]
        rows[2] = 0
        block = Gradients({"layer": Factored((Piece(rows, torch.randn(6, 1, 5)),))})
        tensors, meta = encode(block, precision)
        found = decode(tensors, meta, torch.float32)["layer"].pieces[0].rows
        error = (found - rows).flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1).clamp_min(1e-38)
        assert float(error.max()) < 1e-4 and (found[2] == 0).all()


# Damage --------------------------------------------------------------------------------------------------------------


def copy_of(folder: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(folder, to, ignore=shutil.ignore_patterns(".lock"))
    return to


def test_a_flipped_byte_in_any_shard_is_reported_with_its_name(tmp_path, small_shards):
    train, query = digits()
    folder = tmp_path / "cache"
    influence(fisher="empirical").fit(train, cache=folder)
    shards = sorted(folder.rglob("*.safetensors"))
    assert len(shards) >= 8 and any("curvature" in str(path) for path in shards)
    for number, shard in enumerate(shards):
        damaged = copy_of(folder, tmp_path / str(number))
        path = damaged / shard.relative_to(folder)
        flip(path, (7919 * (number + 1)) % path.stat().st_size)
        with pytest.raises(StoreError) as caught:
            influence(fisher="empirical").fit(train, cache=damaged).attribute(query)
        message = str(caught.value)
        assert (
            str(path) in message
            and "damaged" in message
            and "-> delete it" in message
            and "\n" not in message
        )


def test_a_flipped_byte_in_any_tile_is_reported_with_its_name(tmp_path):
    train, query = digits()
    method = influence(batch_size=100).fit(train)
    folder = tmp_path / "scores"
    scores = method.attribute(query, out=folder).values
    tiles = sorted((folder / "parts").iterdir())
    assert len(tiles) == 5
    for number, tile in enumerate(tiles):
        damaged = copy_of(folder, tmp_path / str(number))
        path = damaged / "parts" / tile.name
        flip(path, -5)
        with pytest.raises(StoreError) as caught:
            method.attribute(query, out=damaged)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        path.unlink()  # the way out that the message names
        assert torch.equal(method.attribute(query, out=damaged).values, scores)


@pytest.mark.parametrize("which", [0, 1, -1])
def test_a_shard_that_disappears_is_missed_then_recomputed(which: int, tmp_path, small_shards):
    train, query = digits()
    method = influence().fit(train, cache=tmp_path)
    truth = method.attribute(query).values
    shards = sorted((tmp_path / "parts").glob("part-*.safetensors"))
    for fresh_reader in (False, True):
        shards[which].unlink()
        if fresh_reader:
            method._fitted.training._reader = None
        with pytest.raises(StoreError) as caught:
            method.attribute(query)
        assert (
            str(tmp_path) in str(caught.value)
            and "-> " in str(caught.value)
            and "\n" not in str(caught.value)
        )
        method = influence().fit(train, cache=tmp_path)
        assert torch.equal(method.attribute(query).values, truth)
