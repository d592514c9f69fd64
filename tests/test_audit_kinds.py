"""Issues other than wrong labels that the audit finds: near-duplicates, outliers and rare examples."""

import numpy as np
import torch
from audits import QUIET, blobs, by_position, trained
from torch import nn

import upweight as uw
from upweight.repair.duplicates import gradient_cosines
from upweight.repair.evidence import Evidence, Options


def test_duplicates_with_other_labels_are_called_out():
    (x, y), _, _ = blobs(wrong=0)
    x[10], y[10] = x[20], (y[20] + 1) % 3  # an exact copy with another label,
    x[30], y[30] = x[40], y[40]  # one with the same,
    x[50], y[50] = x[60] + 1e-6, y[60]  # and a near one
    model = trained((x, y))
    table = uw.audit(model, uw.Classification(), (x, y), kinds=["near_duplicate"], **QUIET)
    rows = {row["id"]: row for row in (table.row(k) for k in range(len(table)))}
    for a, b, how in [
        (10, 20, "exact copy, other label"),
        (30, 40, "exact copy"),
        (50, 60, "embedding and gradient cosine"),
    ]:
        for i, j in ((a, b), (b, a)):
            assert (rows[i]["related_id"], rows[i]["detector"], rows[i]["is_issue"]) == (j, how, True)
            assert rows[i]["score"] < 0.01 and rows[i]["predicted_label"] == int(y[j])
    assert set(table.ids[:6]) == {10, 20, 30, 40, 50, 60}
    facts = table.info["detectors"]["near_duplicate"]
    assert (facts["exact_copies"], facts["exact_copies_with_another_label"]) == (4, 2)


def test_pairs_that_were_not_compared_are_counted(monkeypatch):
    """Only so many pairs are compared by their gradients; the others are not flagged, and the table says so."""
    (x, y), _, _ = blobs(wrong=0)
    x[50], y[50], x[30], y[30] = x[60] + 1e-6, y[60], x[40] + 2e-6, y[40]
    model = trained((x, y))

    def facts():
        table = uw.audit(model, uw.Classification(), (x, y), kinds=["near_duplicate"], **QUIET)
        return table.info["detectors"]["near_duplicate"]

    whole = facts()
    assert whole["pairs_not_compared"] == 0 and whole["flagged"] >= 4
    monkeypatch.setattr("upweight.repair.duplicates.MOST_PAIRS", 1)
    cut = facts()
    assert (cut["pairs_compared"], cut["flagged"]) == (1, 1)
    assert cut["pairs_not_compared"] == whole["pairs_compared"] - 1


def test_of_several_copies_the_contrary_one_is_named():
    x, y = torch.randn(30, 2), torch.arange(30) % 3
    x[[3, 6, 9, 10]] = x[3].clone()  # labels 0, 0, 0, 1
    table = uw.audit(trained((x, y)), uw.Classification(), (x, y), kinds=["near_duplicate"], **QUIET)
    partner = dict(zip(table.ids, table.columns["related_id"]))
    assert (partner[3], partner[6], partner[9], partner[10]) == (10, 10, 10, 3)


def test_gradient_cosines_are_those_of_autograd():
    data = blobs(dtype=torch.float64)[0]
    model = trained(data, steps=20)
    evidence = Evidence(model, uw.Classification(), uw.Examples(data), Options(**QUIET))

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    g = flat_gradients(model, loss, data)
    left, right = list(range(100)), list(range(50, 150))
    expected = nn.functional.cosine_similarity(g[left], g[right])
    np.testing.assert_allclose(gradient_cosines(evidence, left, right), expected, atol=1e-10)


def flat_gradients(model, loss, batch):
    rows = []
    for i in range(len(batch[1])):
        one = tuple(t[[i]] for t in batch)
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, one).sum(), model.parameters())])
        )
    return torch.stack(rows)


def test_an_outlier_is_found_and_copies_are_none():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(120, 5, generator=generator) * 0.1 + torch.eye(5)[torch.arange(120) % 2]
    x[7] = -3 * torch.ones(5)
    x[20:60] = x[20].clone()
    y = torch.arange(120) % 2
    model = nn.Linear(5, 2)
    table = uw.audit(model, uw.Classification(), (x, y), kinds=["outlier"], neighbours=10, **QUIET)
    assert table.ids[0] == 7 and 7 in table.flagged().ids
    assert not set(range(20, 60)) & set(table.flagged().ids)


def test_rare_examples_are_not_called_wrong():
    """A few examples of their own cluster, rightly labelled: hard, but supported by one another."""
    (x, y), _, _ = blobs(n=200, wrong=0)
    x[:4] = torch.tensor([9.0, 9.0]) + 0.1 * torch.randn(4, 2)
    y[:4] = 1
    model = trained((x, y), steps=60)
    table = uw.audit(
        model,
        uw.Classification(),
        (x, y),
        validation=(x[:4], y[:4]),
        kinds=["rare", "label"],
        neighbours=3,
        **QUIET,
    )
    own = by_position(table, "rare", "score")
    assert {0, 1, 2, 3} < set(np.argsort(own)[:5].tolist()) and not set(table.flagged("label").ids) & {
        0,
        1,
        2,
        3,
    }
