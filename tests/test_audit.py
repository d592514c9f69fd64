"""The audit: its numbers are those of the methods it is made of, and it finds what was planted."""

import numpy as np
import pytest
import torch
from refusals import refused
from scipy.stats import rankdata
from torch import nn

import upweight as uw
from upweight.repair.duplicates import gradient_cosines
from upweight.repair.evidence import Evidence, Options
from upweight.repair.neighbours import nearest, votes
from upweight.repair.suspicion import DETECTORS, suspicion

QUIET = {"progress": False}


def blobs(n=150, classes=3, wrong=12, seed=0, held_out=60, dtype=torch.float32):
    """Three clear classes in the plane, some labels moved on by one: (x, y), true labels, (validation)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.tensor([[1.0, 0.0], [-0.5, 0.87], [-0.5, -0.87]], dtype=dtype)[:classes]
    true = torch.arange(n + held_out) % classes
    x = centres[true] + 0.7 * torch.randn(n + held_out, 2, generator=generator, dtype=dtype)
    given = true[:n].clone()
    flipped = torch.randperm(n, generator=generator)[:wrong]
    given[flipped] = (given[flipped] + 1) % classes
    return (x[:n], given), true[:n], (x[n:], true[n:])


def trained(data, outputs=3, steps=150, kept=None, task=None, width=16, seed=0):
    torch.manual_seed(seed)
    x = data[0]
    model = nn.Sequential(nn.Linear(x.shape[1], width), nn.Tanh(), nn.Linear(width, outputs)).to(x.dtype)
    task = task or uw.Classification()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, weight_decay=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        task.train_loss(model, data).mean().backward()
        optimizer.step()
        if kept is not None and step in (10, 40, 100):
            kept.append({k: v.clone() for k, v in model.state_dict().items()})
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def case():
    data, true, validation = blobs()
    checkpoints = []
    model = trained(data, kept=checkpoints)
    return data, true, validation, model, checkpoints


def by_position(table, kind, column):
    rows = table.filter(kind).columns
    return rows[column][np.argsort(rows["position"])]


# Label errors --------------------------------------------------------------------------------------------------------


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
    table = uw.audit(model, uw.Classification(), (x, y), kinds=["label"], log=log, ids=ids, **QUIET)
    assert table.info["detectors"]["label"]["detector"] == "aum"
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
    assert facts["suggestion"] == "out-of-fold models" and facts["detector"] == "confident_learning"
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


# Influence -----------------------------------------------------------------------------------------------------------


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


# Duplicates, outliers, rare ------------------------------------------------------------------------------------------


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
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")  # noqa: E731
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


# Other tasks ---------------------------------------------------------------------------------------------------------


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


# Edges ---------------------------------------------------------------------------------------------------------------


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
