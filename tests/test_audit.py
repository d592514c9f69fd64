"""The audit at its edges: few examples, one class, no features, bad input; it changes nothing and can be saved."""

import audits
import numpy as np
import pytest
import torch
from audits import QUIET, blobs, trained
from refusals import refused
from torch import nn

import upweight as uw

case = audits.case  # the fixture


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_few_examples(n):
    (x, y), _, validation = blobs(n=n, wrong=0)
    table = uw.audit(trained((x, y), steps=5), uw.Classification(), (x, y), validation=validation, **QUIET)
    assert len(table.filter("label")) == n and not table.flagged("label").ids
    if n == 1:
        assert "outlier" in table.info["left_out"] and not table.flagged("near_duplicate").ids


def test_one_class_alone():
    x, y = torch.randn(40, 2), torch.zeros(40, dtype=torch.long)
    table = uw.audit(trained((x, y)), uw.Classification(), (x, y), **QUIET)
    assert not table.flagged("label").ids and set(table.filter("label").columns["predicted_label"]) == {0}


def test_a_model_without_a_linear_layer_has_labels_but_no_neighbours():
    model = nn.Sequential(nn.Conv1d(1, 3, 2), nn.Flatten()).eval()
    x, y = torch.randn(40, 1, 2), torch.arange(40) % 3
    table = uw.audit(model, uw.Classification(), (x, y), **QUIET)
    assert {"near_duplicate", "outlier", "harmful"} == set(table.info["left_out"])
    assert "which was trained on these labels" in table.info["detectors"]["label"]["suggestion"]
    with refused("linear layer"):
        uw.audit(model, uw.Classification(), (x, y), kinds=["outlier"], **QUIET)


def test_nothing_is_changed(case):
    data, _, validation, model, _ = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    table = uw.audit(model, uw.Classification(), data, validation=validation, **QUIET)
    again = uw.audit(model, uw.Classification(), data, validation=validation, **QUIET)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(random) and all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules()) and not model.training
    for name, values in table.columns.items():
        np.testing.assert_array_equal(values, again.columns[name])


def test_saved_and_loaded_it_is_the_same(case, tmp_path):
    data, _, validation, model, _ = case
    table = uw.audit(model, uw.Classification(), data, validation=validation, **QUIET)
    table.save(tmp_path)
    again = uw.IssueTable.load(tmp_path, train=uw.Examples(data))
    assert again.suggestions() == table.suggestions() and again.info["settings"]["n"] == 150
    assert again.info["influence"] == table.info["influence"]
    frame = table.label_issues()
    assert len(frame) == 150 and frame["is_label_issue"].sum() == len(table.flagged("label"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"detector": "magic"}, "no detector 'magic' -> one of auto, self_influence"),
        ({"kinds": ["label", "typo"]}, "no kind of issue 'typo'"),
        ({"kinds": ["harmful"]}, "harm shows on validation data"),
        ({"precision": 0.0}, "precision=0.0, expected 0 < precision < 1"),
        ({"precision": float("nan")}, "precision=nan"),
        ({"neighbours": 0}, "neighbours=0"),
        ({"detector": "aum", "kinds": ["label"]}, "'aum' follows the training run"),
        ({"detector": "tracin", "kinds": ["label"]}, "follows the training run"),
        ({"detector": "el2n", "kinds": ["label"]}, "follows the training run"),
        ({"probabilities": torch.ones(3, 3) / 3, "kinds": ["label"]}, r"shape \(3, 3\), expected \(150, 3\)"),
        ({"probabilities": torch.ones(150, 3), "kinds": ["label"]}, "add up to 3, expected 1"),
        ({"probabilities": torch.full((150, 3), torch.nan), "kinds": ["label"]}, "add up to nan"),
        ({"train_fn": lambda i, s: None, "kinds": ["label"]}, "train_fn returned NoneType"),
        ({"train_fn": lambda i, s: None, "folds": 99, "kinds": ["label"]}, "folds=99, expected 2 to"),
        ({"ids": ["a"] * 150}, "ids repeat"),
    ],
)
def test_refusals(case, options, said):
    data, _, _, model, _ = case
    with refused(said):
        uw.audit(model, uw.Classification(), data, **options, **QUIET)


def test_bad_data_is_refused_by_name(case):
    (x, y), _, validation, model, _ = case
    holes, far, unlike = x.clone(), y.clone(), (validation[0][:, :1], validation[1])
    holes[17] = torch.nan
    far[17] = 7
    ids = [f"image {i}" for i in range(len(y))]
    for data in ((holes, y), (x, far)):
        with refused("image 17"):
            uw.audit(model, uw.Classification(), data, ids=ids, **QUIET)
    with refused("refuses the queries"):
        uw.audit(model, uw.Classification(), (x, y), validation=unlike, **QUIET)
    with refused("nan"):
        uw.audit(model, uw.Classification(), (x, y), validation=(holes[15:20], y[15:20]), **QUIET)
    numbers = torch.randn(40, 1)
    numbers[3] = torch.nan
    with refused("example 3 is nan"):
        uw.audit(nn.Linear(2, 1), uw.Regression(), (x[:40], numbers), **QUIET)
