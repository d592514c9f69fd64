"""The baselines against what they are by definition, and what they refuse."""

import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import digits, mlp, trained
from refusals import refused
from sklearn.metrics import roc_auc_score
from small_problem import QUERY, TRAIN, logits, small
from torch import nn

import upweight as uw
from upweight.attributors.baselines.aum import MarginLog

TASK = uw.Classification()
X, Y = TRAIN


def margins(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """One example at a time, in Python."""
    return torch.stack(
        [row[k] - max(v for j, v in enumerate(row) if j != k) for row, k in zip(z, y.tolist())]
    )


def early(count: int = 2) -> list[nn.Module]:
    models = []
    for seed in range(count):
        model = small()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        models.append(model)
    return models


def error_norms(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (z.softmax(1) - torch.eye(z.shape[1], dtype=z.dtype)[y]).square().sum(1).sqrt()


DEFINITIONS = {
    "loss": (lambda: uw.Loss(small(), TASK), lambda: F.cross_entropy(logits(), Y, reduction="none")),
    "margin": (lambda: uw.Margin(small(), TASK), lambda: -margins(logits(), Y)),
    "grad-norm": (
        lambda: uw.GradNorm(small(), TASK),
        lambda: uw.GradDot(small(), TASK).fit(TRAIN).self_influence().values,
    ),
    "el2n": (
        lambda: uw.EL2N(small(), TASK, checkpoints=early()),
        lambda: sum(error_norms(logits(m), Y) for m in early()) / 2,
    ),
    "aum": (
        lambda: uw.AUM(small(), TASK, checkpoints=early(3)),
        lambda: -sum(margins(logits(m), Y) for m in early(3)) / 3,
    ),
}


@pytest.mark.parametrize("name", list(DEFINITIONS))
def test_scores_are_the_definition_and_the_same_for_every_query(name):
    make, definition = DEFINITIONS[name]
    method, expected = make().fit(TRAIN), definition()
    own = method.self_influence()
    torch.testing.assert_close(own.values, expected, rtol=1e-10, atol=1e-12)
    scores = method.attribute(QUERY, ids=[f"q{i}" for i in range(len(QUERY[1]))])
    assert torch.equal(scores.values, own.values.expand(len(QUERY[1]), -1))
    assert scores.unit is own.unit is None and scores.info["method"] == name
    assert scores.info["control"] == "the same scores for every query"
    assert {"n", "fingerprints", "versions", "higher_is_better", "queries"} <= set(scores.info)


def test_one_logit_has_the_margin_and_error_of_its_two_classes():
    x, y = torch.tensor([[2.0], [-1.0], [0.5]]), torch.tensor([1.0, 1.0, 0.0])
    binary = uw.BinaryClassification()
    assert uw.Margin(nn.Identity(), binary).fit((x, y)).self_influence().values.tolist() == [-2.0, 1.0, 0.5]
    model = nn.Linear(1, 1, bias=False)
    found = uw.EL2N(model, binary, checkpoints=[{"weight": torch.ones(1, 1)}]).fit((x, y)).self_influence()
    two = torch.cat([torch.zeros_like(x), x], 1)
    torch.testing.assert_close(found.values, error_norms(two, y.long()))


def test_tasks_without_classes_are_refused():
    for make in (
        uw.Margin,
        lambda m, t: uw.EL2N(m, t, checkpoints=[m]),
        lambda m, t: uw.AUM(m, t, checkpoints=[m]),
    ):
        with refused("expected Classification or BinaryClassification"):
            make(small(), uw.Regression())
    with refused("at least two"):
        uw.Margin(nn.Linear(1, 1), TASK).fit((torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)))


# Refusals that all of them share ----------------------------------------------------------------------------------


def test_what_a_forward_pass_shows_is_refused():
    x = X.clone()
    x[3] = torch.nan
    ids = [f"image {i}" for i in range(len(x))]
    with refused("the loss of example image 3 is nan: its input holds NaN"):
        uw.Loss(small(), TASK).fit((x, Y), ids=ids)
    with refused("BatchNorm is in train mode"):
        uw.Loss(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), TASK).fit((X.float(), Y))
    averaged = uw.Task.from_functions(lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    with refused("expected one number per example"):
        uw.Loss(small(), averaged).fit(TRAIN)

    def relative_to_the_batch(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses - losses.mean()

    with refused("in one batch and"):
        uw.Loss(small(), uw.Task.from_functions(relative_to_the_batch)).fit(TRAIN)
    with refused("has label 7, expected 0 to 2"):
        uw.Margin(small(), TASK).fit((X, torch.full_like(Y, 7)))


def test_a_changed_model_is_noticed():
    method = uw.Loss(small(), TASK).fit(TRAIN)
    with torch.no_grad():
        next(method.model.parameters()).mul_(2)
    with refused("weights changed since fit"):
        method.self_influence()


def test_a_model_written_to_behind_torch_is_noticed():
    method = uw.Loss(small(), TASK).fit(TRAIN)
    bias = [p for p in method.model.parameters() if p.ndim == 1][-1]
    bias.data[:] = bias.data.flip(0)
    with refused("weights changed since fit"):
        method.self_influence()


@pytest.mark.parametrize(("make", "extra"), [("BM25", "text"), ("confident_learning", "audit")])
def test_a_missing_library_names_its_extra(monkeypatch, make, extra):
    def missing(name):
        raise ImportError(name)

    module = {
        "BM25": "upweight.attributors.baselines.bm25",
        "confident_learning": "upweight.attributors.baselines.confident_learning",
    }[make]
    loaded = importlib.import_module(module)
    monkeypatch.setattr(loaded, "importlib", type("Missing", (), {"import_module": staticmethod(missing)}))
    with pytest.raises(ImportError, match=rf"upweight\[{extra}\]"):
        if make == "BM25":
            uw.BM25(None, TASK)
        else:
            uw.confident_learning(TRAIN, TASK, probabilities=logits().softmax(1))


# AUM --------------------------------------------------------------------------------------------------------------


def test_a_log_of_shuffled_batches_is_the_mean_over_checkpoints(tmp_path):
    log, ids = uw.AUM.log(), [f"image-{i}" for i in range(len(Y))]
    generator = torch.Generator().manual_seed(0)
    for number, model in enumerate(early(3)):
        for part in torch.randperm(len(Y), generator=generator).split(5):
            log.record([ids[i] for i in part.tolist()], logits(model)[part], Y[part])
        if number == 1:  # the run is interrupted, and goes on
            log = MarginLog.load(log.save(tmp_path / "margins.safetensors"))
    method = uw.AUM(small(), TASK, log=log).fit(TRAIN, ids=ids)
    expected = DEFINITIONS["aum"][1]()
    torch.testing.assert_close(method.self_influence().values, expected, rtol=1e-12, atol=1e-12)
    assert method.attribute(QUERY).info["logged_epochs"] == [3, 3] and len(log) == len(Y)


def test_logs_that_do_not_fit_are_refused():
    log = uw.AUM.log()
    log.record(range(4), logits()[:4], Y[:4])
    with refused(f"{len(Y) - 4} of {len(Y)} training examples were never logged"):
        uw.AUM(small(), TASK, log=log).fit(TRAIN)
    with refused("3 ids, logits"):
        log.record(range(3), logits()[:4], Y[:4])
    with refused("the margin of example 1 is nan"):
        log.record([0, 1], torch.tensor([[1.0, 0.0], [torch.nan, 0.0]]), torch.tensor([0, 0]))
    for options in ({}, {"log": log, "checkpoints": [small()]}):
        with refused("expected one of them"):
            uw.AUM(small(), TASK, **options)
    with refused("the list of checkpoints is empty"):
        uw.EL2N(small(), TASK, checkpoints=[])


# Random -----------------------------------------------------------------------------------------------------------


def test_random_scores_are_independent_standard_normals():
    """Each bound is passed by chance in fewer than one of 10,000 seeds, and this one is fixed."""
    x = torch.arange(400.0)[:, None]
    task, model = uw.Regression(), nn.Linear(1, 1)
    values = [uw.Random(model, task, seed=s).fit((x, x)).attribute((x, x)).values for s in (0, 1)]
    n = values[0].numel()
    for v in values:
        assert abs(float(v.mean())) < 4 / math.sqrt(n) and abs(float(v.var()) - 1) < 4 * math.sqrt(2 / n)
        assert abs(float((v * v.T).mean()) - 1 / 400) < 4.5 * math.sqrt(2 / n)  # (q, i) and (i, q)
        assert float(v.mean(0).std()) < 1.25 / 20 and float(v.mean(1).std()) < 1.25 / 20
    assert abs(float((values[0] * values[1]).mean())) < 4 / math.sqrt(n)
    assert torch.equal(values[0], uw.Random(model, task).fit((x, x)).attribute((x, x)).values)
    own = uw.Random(model, task).fit((x, x)).self_influence()
    assert torch.equal(own.values, values[0].diagonal())


# Mislabeled digits ------------------------------------------------------------------------------------------------


def test_detectors_find_mislabeled_digits():
    """A tenth of 500 digits relabelled, a network trained on them: floors well under what was measured."""
    (x, clean), query = digits()
    generator = torch.Generator().manual_seed(1)
    flipped = torch.randperm(500, generator=generator)[:50]
    y = clean.clone()
    y[flipped] = (y[flipped] + torch.randint(1, 10, (50,), generator=generator)) % 10
    wrong = (y != clean).numpy()
    log, checkpoints = uw.AUM.log(), []

    def train(indices, seed, epochs=15, watch=False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = mlp()
            optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
            for epoch in range(epochs):
                for part in torch.as_tensor(indices)[torch.randperm(len(indices))].split(50):
                    optimiser.zero_grad()
                    outputs = model(x[part])
                    F.cross_entropy(outputs, y[part]).backward()
                    optimiser.step()
                    if watch:
                        log.record(part.tolist(), outputs, y[part])
                if watch and epoch in (2, 4):
                    checkpoints.append({k: v.clone() for k, v in model.state_dict().items()})
        return model.eval()

    model = train(range(500), 0, watch=True)
    detectors = {
        "loss": uw.Loss(model, TASK),
        "margin": uw.Margin(model, TASK),
        "gradient norm": uw.GradNorm(model, TASK),
        "EL2N": uw.EL2N(model, TASK, checkpoints=checkpoints),
        "AUM": uw.AUM(model, TASK, log=log),
        "neighbours": uw.EmbeddingSimilarity(model, TASK),
    }
    auroc = {k: roc_auc_score(wrong, m.fit((x, y)).self_influence().values) for k, m in detectors.items()}
    auroc["random"] = roc_auc_score(wrong, uw.Random(model, TASK).fit((x, y)).self_influence().values)
    assert min(auroc[name] for name in detectors) > 0.9 and 0.35 < auroc["random"] < 0.65, auroc
    assert uw.AUM(model, TASK, log=log).fit((x, y)).attribute(query).info["logged_epochs"] == [15, 15]
    pytest.importorskip("cleanlab", reason="the extra [audit]")
    found = uw.confident_learning((x, y), TASK, train_fn=lambda i, s: train(i, s), folds=3)
    assert roc_auc_score(wrong, found.values) > 0.95
    flagged = np.zeros(500, bool)
    flagged[found.info["flagged"]] = True
    assert wrong[flagged].mean() > 0.5 and flagged[wrong].mean() > 0.7


def test_a_trained_network_is_left_alone():
    """Baselines of a convolutional network with a norm, in float32, whatever the batches."""
    (x, y), query = digits()
    model = trained("cnn")
    found = [uw.Loss(model, TASK, batch_size=b).fit((x, y)).self_influence().values for b in (7, 500)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert uw.EmbeddingSimilarity(model, TASK).fit((x, y)).attribute(query).values.abs().max() <= 1 + 1e-5
