"""The audit's effects are those of influence functions, whichever way of a measurement is better."""

import audits
import numpy as np
import pytest
import torch
from audits import QUIET, blobs, by_position, trained
from refusals import refused
from torch import nn

import upweight as uw

case = audits.case  # the fixture


@pytest.mark.parametrize("measurement", ["loss", "margin"])
def test_effects_are_those_of_influence_functions(measurement):
    data, _, validation = blobs(n=40, held_out=8, wrong=4, dtype=torch.float64)
    model = trained(data)
    task = uw.Classification(measurement)
    method = uw.Influence(model, task, curvature="ggn", damping=1e-2, **QUIET)
    table = uw.audit(model, task, data, validation=validation, influence=method, neighbours=5, **QUIET)
    assert table.info["influence"]["unit"] == task.unit and table.info["influence"]["curvature"] == "ggn"
    removed = by_position(table, "harmful", "influence")
    scores = method.fit(data).attribute(validation)
    expected = torch.stack([scores.removal_effect([i]).mean() for i in range(40)])
    np.testing.assert_allclose(removed, expected, rtol=1e-9, atol=1e-14)
    rows = table.filter("label")
    changed = [k for k in range(len(rows)) if rows.row(k)["given_label"] != rows.row(k)["predicted_label"]]
    assert len(changed) >= 3
    for k in changed:
        row = rows.row(k)
        to = (data[0][[row["position"]]], torch.tensor([row["predicted_label"]]))
        effect = method.change([row["id"]], to, validation).first_order.mean()
        assert row["influence"] == pytest.approx(float(effect), rel=1e-8)
    same = rows.filter(where=lambda row: row["given_label"] == row["predicted_label"])
    assert (same.columns["influence"] == 0).all() and len(same)


def test_which_way_is_better_does_not_change_what_is_harmful():
    data, _, validation = blobs()
    model, flagged = trained(data), {}
    for name, higher in (("loss", False), ("gain", True)):

        def measured(model, batch, sign=-1 if higher else 1):
            return sign * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

        task = uw.Classification(measured, higher_is_better=higher)
        table = uw.audit(model, task, data, validation=validation, kinds=["harmful"], **QUIET)
        flagged[name] = table.flagged().ids
        effects = table.flagged().columns["influence"]
        assert (effects > 0 if higher else effects < 0).all()
    assert flagged["loss"] == flagged["gain"] and flagged["loss"]
    wrong = set((data[1] != blobs()[1]).nonzero()[:, 0].tolist())
    assert len(wrong & set(flagged["loss"])) > 0.7 * len(flagged["loss"])


def test_a_fitted_influence_is_used_as_it_is(case):
    data, _, validation, model, _ = case
    method = uw.Influence(model, uw.Classification(), **QUIET).fit(data)
    fitted = method._fitted
    uw.audit(model, uw.Classification(), data, validation=validation, influence=method, **QUIET)
    assert method._fitted is fitted
    with refused("correction='relative'"):
        corrected = uw.Influence(model, uw.Classification(), correction="relative", **QUIET)
        uw.audit(model, uw.Classification(), data, influence=corrected, **QUIET)
    with refused("another model"):
        uw.audit(trained(data), uw.Classification(), data, influence=method, **QUIET)
