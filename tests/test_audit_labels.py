"""Label errors: the audit finds and mends what was planted, and every detector is what it is called."""

import audits
import numpy as np
import torch
from audits import QUIET, trained
from scipy.stats import rankdata
from torch import nn

import upweight as uw
from upweight.repair.evidence import Evidence, Options
from upweight.repair.neighbours import nearest, votes
from upweight.repair.suspicion import DETECTORS, suspicion

case = audits.case  # the fixture


def test_the_flips_are_found_and_mended(case):
    data, true, validation, model, checkpoints = case
    wrong = set((data[1] != true).nonzero()[:, 0].tolist())
    for detector in DETECTORS:
        table = uw.audit(
            model,
            uw.Classification(),
            data,
            validation=validation,
            kinds=["label"],
            detector=detector,
            checkpoints=checkpoints,
            **QUIET,
        )
        found = set(table.flagged("label").ids)
        assert len(found & wrong) >= 0.8 * len(found) and len(found & wrong) >= 9, detector
        assert all(label == int(true[i]) for i, label in table.suggestions().items() if i in wrong)
        assert table.info["detectors"]["label"]["detector"] == detector


def test_every_detector_is_what_it_is_called(case):
    (x, y), _, _, model, checkpoints = case
    task, n = uw.Classification(), len(y)
    p = torch.softmax(torch.randn(n, 3, generator=torch.Generator().manual_seed(3)), 1)
    few = {"checkpoints": checkpoints, **QUIET}
    evidence = Evidence(
        model,
        task,
        uw.Examples((x, y)),
        Options(probabilities=p, learning_rates=[0.3, 0.2, 0.1], neighbours=10, **few),
    )
    traced = {"learning_rates": [0.3, 0.2, 0.1], **few}
    own = {
        "loss": uw.Loss(model, task, **QUIET),
        "margin": uw.Margin(model, task, **QUIET),
        "self_influence": uw.Influence(model, task, **QUIET),
        "aum": uw.AUM(model, task, **few),
        "el2n": uw.EL2N(model, task, **few),
        "tracin": uw.TracIn(model, task, **traced),
        "tracin_last_layer": uw.TracIn(model, task, parameters="last_layer", **traced),
        "knn": uw.EmbeddingSimilarity(model, task, neighbours=10, **QUIET),
    }
    expected = {name: method.fit((x, y)).self_influence().values for name, method in own.items()}
    expected["confident_learning"] = uw.confident_learning((x, y), task, probabilities=p).values
    for name, values in expected.items():
        np.testing.assert_allclose(suspicion(name, evidence), values, rtol=1e-5, atol=1e-7, err_msg=name)
    ranked = [rankdata(expected[k]) for k in ("margin", "knn", "aum", "confident_learning")]
    np.testing.assert_allclose(
        rankdata(suspicion("combined", evidence)), rankdata(np.mean(ranked, 0)), atol=2
    )
    assert set(expected) | {"combined"} == set(DETECTORS)


def test_a_log_of_margins_needs_no_checkpoints(case):
    (x, y), _, _, model, _ = case
    log, ids = uw.AUM.log(), [f"image {i}" for i in range(len(y))]
    log.record(ids, model(x), y)
    options = {"kinds": ["label"], "log": log, "ids": ids, **QUIET}
    table = uw.audit(model, uw.Classification(), (x, y), **options)
    assert table.info["detectors"]["label"]["detector"] == "combined"
    table = uw.audit(model, uw.Classification(), (x, y), detector="aum", **options)
    margins = uw.Margin(model, uw.Classification(), **QUIET).fit((x, y)).self_influence()
    assert table.ids == [ids[i] for i in margins.top_k(len(y)).positions.tolist()]


def test_the_table_is_in_the_detectors_order_and_says_where_suggestions_come_from(case):
    data, _, _, model, _ = case
    table = uw.audit(model, uw.Classification(), data, kinds=["label"], detector="loss", **QUIET)
    losses = uw.Loss(model, uw.Classification(), **QUIET).fit(data).self_influence()
    assert table.ids == losses.top_k(len(data[1])).ids
    assert table.columns["rank"].tolist() == list(range(1, len(data[1]) + 1))
    assert (np.diff(table.columns["score"]) >= 0).all() and np.isnan(table.columns["influence"]).all()
    assert "neighbours" in table.info["detectors"]["label"]["suggestion"]
    flags = table.columns["is_issue"]
    assert flags[: flags.sum()].all() and "influence" not in table.info


def test_out_of_fold_models_judge_what_they_have_not_seen(case):
    data, true, validation, model, _ = case
    seen = []

    def train_fn(indices, seed):
        seen.append(set(indices.tolist()))
        return trained((data[0][indices], data[1][indices]), steps=60, seed=seed)

    table = uw.audit(
        model,
        uw.Classification(),
        data,
        validation=validation,
        kinds=["label"],
        train_fn=train_fn,
        folds=2,
        **QUIET,
    )
    assert len(seen) == 2 and seen[0] | seen[1] == set(range(150)) and not seen[0] & seen[1]
    facts = table.info["detectors"]["label"]
    assert facts["suggestion"] == "out-of-fold models" and facts["detector"] == "combined"
    assert facts["calibration"] == "120 validation labels, taken to be right"
    wrong = (data[1] != true).nonzero()[:, 0].tolist()
    assert len(set(table.flagged().ids) & set(wrong)) >= 9


def test_votes_and_neighbours_by_hand():
    features = nn.functional.normalize(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    cosines = (features @ features.T).fill_diagonal_(-9)
    found = nearest(features, 5)
    assert found.positions.tolist() == cosines.topk(5).indices.tolist()
    labels = np.arange(30) % 3
    share = votes(found, labels, 3)
    np.testing.assert_allclose(share.sum(1), 1)
    counts = np.stack([(labels[found.positions] == k).sum(1) for k in range(3)], 1)
    np.testing.assert_allclose(share, (counts + 1 / 3) / 6)
    others = nearest(features, 3, features[:4])
    assert others.positions[:, 0].tolist() == [0, 1, 2, 3]
