"""Scores mean what they say: order, sign, sums, ids and evidence, in memory and in a file."""

import errno
import json
import math
import os
import sys

import numpy as np
import pytest
import torch

from upweight.errors import StoreError, UpweightError
from upweight.scores import Ranking, Scores, SelfInfluence

# Two queries, five training examples: a transposed or mixed-up axis cannot go unnoticed.
VALUES = torch.tensor([[0.5, -1.0, 2.0, 0.0, -3.0], [0.0, 3.0, -0.5, 0.25, 1.0]])
TRAIN_IDS = [10, 11, 12, 13, 14]
INFO = {"method": "Influence", "damping": 1e-3, "coverage": {"parameters": 1.0}, "seeds": [0, 1]}


def scores(values=VALUES, unit="nats", info=INFO, **changes) -> Scores:
    return Scores(values, ["a", "b"], TRAIN_IDS, unit, info, **changes)


# Order


def test_top_k_are_the_proponents_of_each_query():
    ranking = scores().top_k(2)
    assert isinstance(ranking, Ranking)
    assert ranking.ids == [[12, 10], [11, 14]]
    assert ranking.positions.tolist() == [[2, 0], [1, 4]] and ranking.positions.dtype == torch.int64
    assert ranking.values.tolist() == [[2.0, 0.5], [3.0, 1.0]]


def test_bottom_k_are_the_opponents_most_negative_first():
    ranking = scores().bottom_k(2)
    assert ranking.ids == [[14, 11], [12, 10]]
    assert ranking.positions.tolist() == [[4, 1], [2, 0]]
    assert ranking.values.tolist() == [[-3.0, -1.0], [-0.5, 0.0]]


def test_more_than_there_are_gives_all_of_them():
    assert scores().top_k(100).ids == [[12, 10, 13, 11, 14], [11, 14, 13, 10, 12]]
    assert scores().bottom_k(6).ids == [row[::-1] for row in scores().top_k(5).ids]


@pytest.mark.parametrize("k", [0, -1, 2.5, "3", None])
def test_a_k_that_is_no_count_is_refused(k):
    for take in (scores().top_k, scores().bottom_k, SelfInfluence(VALUES[0], TRAIN_IDS).top_k):
        with pytest.raises(UpweightError, match=r"k is .* -> use a whole number from 1 up"):
            take(k)


def test_k_may_be_a_numpy_or_torch_integer():
    assert scores().top_k(np.int64(1)).ids == scores().top_k(torch.tensor(1)).ids == [[12], [11]]


@pytest.mark.parametrize("k", [1, 3, 40, 99, 100])
def test_equal_scores_keep_the_order_of_the_training_set(k):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (6, 100), generator=generator).float()
    values[0] = 0
    values[1] = torch.arange(100)  # and a row without ties
    tied = Scores(values, range(6), range(100))
    for ranking, sign in ((tied.top_k(k), -1), (tied.bottom_k(k), 1)):
        expected = [sorted(range(100), key=lambda i: (sign * row[i], i))[:k] for row in values.tolist()]
        assert ranking.ids == ranking.positions.tolist() == expected
        assert torch.equal(ranking.values, values.gather(1, ranking.positions))


def test_no_queries_and_no_training_examples_are_empty_answers():
    assert Scores(torch.zeros(0, 5), [], TRAIN_IDS).top_k(2).positions.shape == (0, 2)
    nothing = Scores(torch.zeros(2, 0), ["a", "b"], [])
    assert nothing.top_k(3).ids == [[], []]
    assert nothing.to_pandas().empty and nothing.sum_by([]).values.shape == (2, 0)


# Sums


def test_sum_by_adds_within_a_group_for_each_query():
    layers = {"one": VALUES * 0.25, "two": VALUES * 0.75}
    grouped = scores(layers=layers).sum_by(["dog", "cat", "dog", "ant", "cat"])
    assert grouped.train_ids == ["ant", "cat", "dog"]
    expected = torch.tensor([[0.0, -4.0, 2.5], [0.25, 4.0, -0.5]])
    assert torch.equal(grouped.values, expected)
    assert grouped.query_ids == ["a", "b"] and grouped.unit == "nats"
    assert grouped.info["method"] == "Influence" and grouped.info["summed"] == {"groups": 3, "train": 5}
    assert grouped.layers is not None and torch.equal(grouped.layers["two"], expected * 0.75)
    assert torch.equal(grouped.removal_effect("cat"), torch.tensor([-4.0, 4.0]))


@pytest.mark.parametrize(
    "labels",
    [[7, 3, 7, 3, 3], np.array([7, 3, 7, 3, 3]), torch.tensor([7, 3, 7, 3, 3]), (7.0, 3.0, 7.0, 3.0, 3.0)],
    ids=["list", "array", "tensor", "floats"],
)
def test_labels_come_in_any_sequence(labels):
    grouped = scores().sum_by(labels)
    assert grouped.train_ids == [3, 7]
    assert grouped.values.tolist() == [[-4.0, 2.5], [4.25, -0.5]]


def test_labels_of_both_kinds_keep_the_order_they_are_met_in():
    assert scores().sum_by(["x", 1, "a", 0, 1]).train_ids == ["x", 1, "a", 0]


def test_many_small_scores_add_up_as_if_in_float64():
    values = torch.full((70, 20_000), 0.1)
    total = Scores(values, range(70), range(20_000)).sum_by([0] * 20_000).values
    exact = float(values[0, 0]) * 20_000
    torch.testing.assert_close(total, torch.full((70, 1), exact), rtol=1e-7, atol=0)


def test_sum_by_needs_one_label_for_each_example():
    with pytest.raises(UpweightError, match="3 labels for 5 training examples"):
        scores().sum_by([1, 2, 3])
    with pytest.raises(UpweightError, match=r"labels\[1\] is nan -> use integers or strings"):
        scores().sum_by([1, math.nan, 1, 1, 1])


def test_removal_effect_is_the_sum_of_what_is_removed():
    assert scores().removal_effect([12, 14]).tolist() == [-1.0, 0.5]
    assert scores().removal_effect([12, 14, 12]).tolist() == [-1.0, 0.5]
    assert scores().removal_effect({14, 12}).tolist() == [-1.0, 0.5]
    assert scores().removal_effect(torch.tensor([12, 14])).tolist() == [-1.0, 0.5]
    assert (
        scores().removal_effect(13).tolist() == scores().removal_effect(np.int64(13)).tolist() == [0.0, 0.25]
    )
    assert scores().removal_effect([]).tolist() == [0.0, 0.0]
    assert scores(VALUES.double()).removal_effect([10]).dtype == torch.float64


def test_removing_a_proponent_lowers_a_measurement_that_should_be_high():
    margin = scores(info={"higher_is_better": True})
    assert margin.removal_effect([12]).tolist() == [-2.0, 0.5]
    assert margin.top_k(1).ids == scores().top_k(1).ids
    assert "predicted to lower" in repr(margin) and "predicted to raise" in repr(scores())


def test_copies_that_share_an_id_are_removed_together():
    copies = Scores(VALUES, ["a", "b"], ["x", "y", "x", "z", "z"], "nats")
    assert copies.removal_effect("x").tolist() == [2.5, -0.5]


def test_removal_effect_refuses_what_it_cannot_know():
    with pytest.raises(UpweightError, match=r"Influence only ranks .* -> use a calibrated method"):
        scores(unit=None).removal_effect([10])
    with pytest.raises(UpweightError, match="99 not among the 5 train_ids"):
        scores().removal_effect([10, 99])
    with pytest.raises(UpweightError, match="'10' not among"):
        scores().removal_effect("10")


# What goes in


@pytest.mark.parametrize(
    ("ids", "kept"),
    [
        (range(5), [0, 1, 2, 3, 4]),
        (np.arange(5, dtype=np.int32), [0, 1, 2, 3, 4]),
        (torch.arange(5), [0, 1, 2, 3, 4]),
        (np.array([0.0, 1.0, 2.0, 3.0, 4.0]), [0, 1, 2, 3, 4]),
        (np.array(list("abcde")), ["a", "b", "c", "d", "e"]),
        ([np.int64(3), np.str_("x"), 2.0, torch.tensor(7), "größe"], [3, "x", 2, 7, "größe"]),
    ],
    ids=["range", "int32", "tensor", "floats", "strings", "mixed"],
)
def test_ids_become_plain_integers_and_strings(ids, kept):
    made = Scores(VALUES, ["a", "b"], ids)
    assert made.train_ids == kept
    assert [type(name) for name in made.train_ids] == [type(name) for name in kept]


@pytest.mark.parametrize("bad", [1.5, math.nan, math.inf, None, (1, 2), b"x", torch.tensor([1, 2])], ids=repr)
def test_ids_of_another_kind_are_refused(bad):
    with pytest.raises(UpweightError, match=r"train_ids\[3\] is .* -> use integers or strings"):
        Scores(VALUES, ["a", "b"], [0, 1, 2, bad, 4])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_score_that_is_not_finite_is_refused_with_its_ids(bad, dtype):
    values = VALUES.to(dtype, copy=True)
    values[1, 3] = bad
    with pytest.raises(UpweightError, match=f"query 'b' and training example 13 is {bad} ->"):
        scores(values)
    with pytest.raises(UpweightError, match="layer 'conv' has scores that are not finite"):
        scores(layers={"fc": VALUES, "conv": values})
    with pytest.raises(UpweightError, match=f"training example 13 is {bad} ->"):
        SelfInfluence(values[1], TRAIN_IDS)


@pytest.mark.parametrize("values", [VALUES.T, VALUES[0], VALUES[:, :4], VALUES[None], VALUES.long()])
def test_values_of_another_shape_or_kind_are_refused(values):
    with pytest.raises(UpweightError, match="but the ids make it 2 x 5 ->"):
        scores(values)
    with pytest.raises(UpweightError, match=r"layers\['fc'\] is"):
        scores(layers={"fc": values})


def test_scores_do_not_share_their_evidence_or_their_graph():
    info, ids = dict(INFO), list(TRAIN_IDS)
    made = Scores((VALUES.clone().requires_grad_() * 1), ["a", "b"], ids, info=info)
    info["damping"], ids[0] = 5, 99
    assert made.info["damping"] == 1e-3 and made.train_ids[0] == 10
    assert not made.values.requires_grad
    with pytest.raises(AttributeError):
        made.unit = "bits"  # type: ignore[misc]


# Files


def assert_same(found: Scores, expected: Scores):
    assert torch.equal(found.values, expected.values) and found.values.dtype == expected.values.dtype
    assert (found.query_ids, found.train_ids) == (expected.query_ids, expected.train_ids)
    assert (found.unit, found.info) == (expected.unit, expected.info)
    assert (found.layers is None) == (expected.layers is None)
    for (name, part), (other, wanted) in zip((found.layers or {}).items(), (expected.layers or {}).items()):
        assert name == other and torch.equal(part, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("unit", ["nats", None])
def test_a_saved_file_holds_everything(tmp_path, dtype, unit):
    values = (VALUES.double() / 3).to(dtype)
    half = (values.double() / 2).to(dtype)
    saved = Scores(
        values, [3, 1], ["x", "größe", 5, '"', ""], unit, INFO, {"b.weight": half, "a": half, "": values}
    )
    path = saved.save(tmp_path / "made" / "here")
    assert path == tmp_path / "made" / "here.safetensors"
    assert_same(Scores.load(path), saved)
    assert_same(Scores.load(str(path.with_suffix(""))), saved)
    assert [file.name for file in path.parent.iterdir()] == ["here.safetensors"]


def test_transposed_values_empty_scores_and_numpy_evidence_survive(tmp_path):
    odd = Scores(
        VALUES.T.contiguous().T, range(2), range(5), info={"loss": np.float32(0.5), "n": torch.tensor(3)}
    )
    back = Scores.load(odd.save(tmp_path / "odd"))
    assert torch.equal(back.values, VALUES) and back.info == {"loss": 0.5, "n": 3} and back.layers is None
    empty = Scores(torch.zeros(0, 5), [], TRAIN_IDS, layers={})
    assert_same(Scores.load(empty.save(tmp_path / "empty")), empty)


def test_dots_in_a_name_stay_and_saving_again_replaces(tmp_path):
    path = scores().save(tmp_path / "run.v1")
    assert path.name == "run.v1.safetensors"
    loaded = Scores.load(path)
    changed = scores(VALUES + 1)
    assert changed.save(path) == path
    assert_same(Scores.load(path), changed)
    assert_same(loaded, scores())  # what was loaded before is not the file's


def test_any_other_safetensors_reader_finds_the_values(tmp_path):
    from safetensors import safe_open

    with safe_open(scores().save(tmp_path / "a"), framework="np") as file:
        assert np.array_equal(file.get_tensor("values"), VALUES.numpy())
        assert json.loads(file.metadata()["scores"])["unit"] == "nats"


def test_a_flipped_byte_anywhere_names_the_file(tmp_path):
    path = scores(layers={"fc": VALUES}).save(tmp_path / "a")
    whole = path.read_bytes()
    for position in [*range(0, len(whole), 2), len(whole) - 1]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(StoreError) as caught:
            Scores.load(path)
        assert str(path) in str(caught.value) and "->" in str(caught.value) and "\n" not in str(caught.value)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"a\.safetensors is damaged"):
            Scores.load(path)
    path.write_bytes(whole)
    Scores.load(path)


def test_files_that_are_not_ours_are_refused(tmp_path):
    from safetensors.torch import save_file

    other = tmp_path / "model.safetensors"
    save_file({"values": VALUES}, other)
    with pytest.raises(StoreError, match=r"model\.safetensors is damaged, or does not hold scores of ours"):
        Scores.load(other)
    with pytest.raises(StoreError, match=r"there is no file .*absent\.safetensors -> check its name"):
        Scores.load(tmp_path / "absent")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(StoreError, match="there is no file"):
        Scores.load(tmp_path / "folder")


def test_a_newer_format_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("upweight.scores._FORMAT", 2)
    path = scores().save(tmp_path / "a")
    monkeypatch.undo()
    with pytest.raises(StoreError, match="is in format 2, this version reads 1 -> update upweight"):
        Scores.load(path)


def test_a_file_that_cannot_be_written_says_why_and_keeps_the_old_one(tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="info is not JSON"):
        scores(info={"f": print}).save(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file cannot be written: .* -> name a folder"):
        scores().save(tmp_path / "file" / "a")
    path = scores().save(tmp_path / "b")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(
            StoreError, match=r"b\.safetensors cannot be written: No space left .* -> free some space"
        ):
            scores(VALUES + 1).save(path)
    assert_same(Scores.load(path), scores())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.safetensors", "file"]


# Tables


def test_to_pandas_is_tidy_and_ranked():
    table = scores().to_pandas()
    assert list(table.columns) == ["query_id", "train_id", "score", "rank", "unit"]
    assert len(table) == 10 and set(table["unit"]) == {"nats"}
    assert list(table["query_id"]) == ["a"] * 5 + ["b"] * 5
    assert list(table["rank"]) == [1, 2, 3, 4, 5] * 2
    assert list(table["train_id"]) == [12, 10, 13, 11, 14, 11, 14, 13, 10, 12]
    assert list(table["score"]) == [2.0, 0.5, 0.0, -1.0, -3.0, 3.0, 1.0, 0.25, 0.0, -0.5]


def test_to_pandas_keeps_to_the_top_and_to_the_kinds_of_ids():
    mixed = Scores(VALUES.bfloat16(), [0, "b"], [10, "x", 12, 13, 14])
    table = mixed.to_pandas(top=2)
    assert list(table["query_id"]) == [0, 0, "b", "b"]
    assert list(table["train_id"]) == [12, 10, "x", 14]
    assert list(table["score"]) == [2.0, 0.5, 3.0, 1.0] and table["unit"].isna().all()


def test_to_xarray_has_names_coordinates_and_evidence():
    array = scores(VALUES.double()).to_xarray()
    assert array.dims == ("query", "train") and array.shape == (2, 5) and array.dtype == np.float64
    assert float(array.sel(query="b", train=13)) == 0.25
    assert list(array["train"].values) == TRAIN_IDS
    assert array.attrs["unit"] == "nats" and array.attrs["damping"] == 1e-3
    assert json.loads(array.attrs["coverage"]) == {"parameters": 1.0}
    assert all(isinstance(value, int | float | str) for value in scores(unit=None).to_xarray().attrs.values())


@pytest.mark.parametrize("name", ["pandas", "xarray"])
def test_a_missing_package_names_the_extra(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"this needs {name} -> pip install 'upweight\[report\]'"):
        getattr(scores(), f"to_{name}")()


# Self-influence and what a person sees


def test_self_influence_puts_the_most_suspicious_first():
    values = SelfInfluence(torch.tensor([0.25, 2.0, -1.0, 2.0]), ["a", "b", "c", "d"], "nats", INFO)
    ranking = values.top_k(3)
    assert ranking.ids == ["b", "d", "a"]
    assert ranking.positions.tolist() == [1, 3, 0] and ranking.values.tolist() == [2.0, 2.0, 0.25]
    assert values.top_k(9).ids == ["b", "d", "a", "c"]
    with pytest.raises(UpweightError, match="but the ids make it 3 ->"):
        SelfInfluence(torch.zeros(4), [1, 2, 3])


def test_texts_tell_size_sign_unit_and_evidence():
    text = repr(scores())
    for part in (
        "2 queries x 5 training examples, float32",
        "positive = proponent",
        "unit: nats",
        "method: Influence",
        "damping: 0.001",
        "coverage: parameters 1",
    ):
        assert part in text
    assert "only the order means something" in repr(scores(unit=None))
    assert "5 training examples" in repr(SelfInfluence(VALUES[0], TRAIN_IDS)) and "suspicious" in repr(
        SelfInfluence(VALUES[0], TRAIN_IDS)
    )
    assert repr(scores().top_k(2)) == (
        "Ranking 2 x 2, best first, as id (score)\n  12 (+2), 10 (+0.5)\n  11 (+3), 14 (+1)"
    )
    assert "12 (+2), 10 (+0.5)" in repr(SelfInfluence(VALUES[0], TRAIN_IDS).top_k(2))
    assert repr(Scores(VALUES.repeat(4, 2), range(8), range(10)).top_k(9)).count("...") == 6
