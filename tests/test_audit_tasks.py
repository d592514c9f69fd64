"""The audit of other tasks than classes of points: regression, binary labels, functions of one's own, text."""

import numpy as np
import pytest
import torch
from audits import QUIET, blobs, by_position, trained
from refusals import refused
from torch import nn

import upweight as uw


def test_regression_by_its_residuals():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    y = (x @ torch.tensor([1.0, -2.0, 0.5]) + 0.1 * torch.randn(200, generator=generator))[:, None]
    wrong = [5, 50, 150]
    y[wrong] += torch.tensor([[4.0], [-5.0], [3.0]])
    model = nn.Linear(3, 1)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(200, 1)], 1), y).solution
    model.weight.data, model.bias.data = solution[:3].T.contiguous(), solution[3]
    for detector in ("auto", "loss", "self_influence", "knn", "combined"):
        table = uw.audit(
            model, uw.Regression(), (x, y), validation=(x[:30], y[:30]), detector=detector, **QUIET
        )
        assert table.kinds == ["label", "near_duplicate", "outlier", "harmful", "rare"]
        if detector in ("auto", "loss"):
            assert sorted(table.flagged("label").ids) == wrong
            expected = {i: pytest.approx(model(x[i]).item(), rel=1e-5) for i in wrong}
            assert table.suggestions() == expected
    given = by_position(table, "label", "given_label")
    np.testing.assert_allclose(given.astype(float), y[:, 0], rtol=1e-6)
    for detector in ("margin", "confident_learning"):
        with refused("Regression"):
            uw.audit(model, uw.Regression(), (x, y), kinds=["label"], detector=detector, **QUIET)


def test_several_numbers_an_example_and_tasks_of_functions_have_no_label_to_suggest():
    x, y = torch.randn(60, 3), torch.randn(60, 2) * 0.1
    y[9] += 50
    model = nn.Linear(3, 2)
    own = uw.Task.from_functions(lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1))
    for task in (uw.Regression(), own):
        table = uw.audit(model, task, (x, y), **QUIET)
        assert table.flagged("label").ids == [9] and table.suggestions() == {}
        assert set(table.columns["given_label"]) == {None} and "harmful" in table.info["left_out"]
        with refused("this task has not"):
            uw.audit(model, task, (x, y), kinds=["label"], detector="knn", **QUIET)


def test_binary_classification_and_streams_and_dicts():
    (x, y), true, validation = blobs(classes=2)
    model = trained((x, y.float()), outputs=1, task=uw.BinaryClassification())
    task = uw.BinaryClassification()
    held_out = (validation[0], validation[1].float())
    table = uw.audit(model, task, (x, y.float()), validation=held_out, **QUIET)
    wrong = set((y != true).nonzero()[:, 0].tolist())
    found = set(table.flagged("label").ids)
    assert len(found & wrong) >= 9 and len(found - wrong) <= 3
    assert all(label in (0, 1) for label in table.suggestions().values())

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, points):
            return self.inner(points)

    batches = [
        {"points": x[a : a + 40], "labels": y[a : a + 40].float()} for a in range(0, len(y), 40)
    ]  # a stream
    streamed = uw.audit(
        Named().eval(), task, batches_of(batches), validation=held_out_dict(held_out), **QUIET
    )
    for name in ("id", "is_issue", "predicted_label", "related_id"):
        assert streamed.columns[name].tolist() == table.columns[name].tolist(), name
    np.testing.assert_allclose(
        streamed.columns["influence"], table.columns["influence"], rtol=1e-3, atol=1e-8
    )


def batches_of(batches):
    class Stream:
        def __iter__(self):
            return iter(batches)

    return Stream()


def held_out_dict(pair):
    return {"points": pair[0], "labels": pair[1]}


def test_text():
    torch.manual_seed(0)
    tokens = torch.randint(2, 30, (120, 6))
    y = (tokens < 10).sum(1).gt(1).long()
    y[4] = 1 - y[4]

    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(30, 8), nn.Linear(8, 2)

        def forward(self, tokens):
            return self.head(self.embed(tokens).mean(1))

    model = Bag()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens), y).backward()
        optimizer.step()
    table = uw.audit(model.eval(), uw.Classification(), (tokens, y), detector="loss", kinds=None, **QUIET)
    assert (
        table.kinds == ["label", "near_duplicate", "outlier", "rare"] and 4 in table.filter("label").ids[:3]
    )
