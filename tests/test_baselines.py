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
from upweight.testing import check_attributor

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


# Similarity -------------------------------------------------------------------------------------------------------


def test_similarity_is_the_cosine_of_what_the_last_layer_sees():
    model = small()
    body = model[:-1]
    f, q = (F.normalize(body(x).detach(), dim=1) for x in (X, QUERY[0]))
    scores = uw.EmbeddingSimilarity(model, TASK, batch_size=5).fit(TRAIN).attribute(QUERY)
    torch.testing.assert_close(scores.values, q @ f.T, rtol=1e-10, atol=1e-12)
    assert scores.info["features_of"].endswith("weight")


def test_neighbours_disagree_where_labels_differ():
    """Three tight clusters, one example of which has another label: all its neighbours disagree, a third of theirs."""
    angles = torch.tensor([0.0, 0.01, 0.02, 0.03, 2.0, 2.01, 2.02, 2.03, 4.0, 4.01, 4.02, 4.03])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    y = torch.arange(12) // 4
    y[5] = 0
    method = uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, neighbours=3, memory=2000).fit((x, y))
    third = 1 / 3
    expected = torch.tensor([0, 0, 0, 0, third, 1, third, third, 0, 0, 0, 0])
    torch.testing.assert_close(method.self_influence().values, expected)
    with refused("have no 12 neighbours each"):
        uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, neighbours=12).fit((x, y)).self_influence()
    with refused("GiB, expected at most"):
        uw.EmbeddingSimilarity(nn.Linear(2, 3), TASK, memory=50).fit((x, y))
    regression = uw.EmbeddingSimilarity(nn.Linear(2, 2), uw.Regression(), neighbours=2).fit((x, x))
    with refused("expected one class label an example"):
        regression.self_influence()


class Tagger(nn.Module):
    """A linear layer at every position, averaged afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 6), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.embed(tokens)).mean(1)


def test_features_at_several_positions_are_averaged_over_the_mask():
    torch.manual_seed(0)
    model, tokens = Tagger(), torch.randint(20, (7, 5))
    y = torch.arange(7) % 3
    task = uw.Classification()
    features = F.normalize(model.embed(tokens).detach().mean(1), dim=1)
    found = uw.EmbeddingSimilarity(model, task).fit((tokens, y)).attribute((tokens, y)).values
    torch.testing.assert_close(found, features @ features.T)
    task.mask = lambda batch: (batch[0] > 4).to(torch.int64)
    kept = (tokens > 4)[..., None]
    means = (model.embed(tokens).detach() * kept).sum(1) / kept.sum(1).clamp_min(1)
    features = F.normalize(means, dim=1)
    found = uw.EmbeddingSimilarity(model, task).fit((tokens, y)).attribute((tokens, y)).values
    torch.testing.assert_close(found, features @ features.T)


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


# BM25 -------------------------------------------------------------------------------------------------------------

TEXTS = ["the cat sat on the mat", "a dog sat", "the dog ran and ran", "birds fly"]


def by_hand(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    documents = [text.split() for text in TEXTS]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        total = 0.0
        for token in query.split():
            having = sum(token in d for d in documents)
            idf = math.log(1 + (len(documents) - having + 0.5) / (having + 0.5))
            count = document.count(token)
            total += idf * count / (count + k1 * (1 - b + b * len(document) / mean)) if having else 0.0
        scores.append(total)
    return scores


def test_bm25_is_the_formula():
    pytest.importorskip("bm25s", reason="the extra [text]")
    queries = ["the dog dog ran", "zebra", "the cat sat on the mat"]
    method = uw.BM25(None, TASK).fit(TEXTS, ids=list("abcd"))
    scores = method.attribute(queries)
    expected = torch.tensor([by_hand(query) for query in queries])
    torch.testing.assert_close(scores.values, expected, rtol=1e-6, atol=1e-6)
    assert scores.train_ids == list("abcd") and scores.unit is None and not scores.values[1].any()
    other = uw.BM25(None, TASK, k1=1.0, b=0.2).fit(TEXTS).attribute(queries).values
    torch.testing.assert_close(other, torch.tensor([by_hand(q, 1.0, 0.2) for q in queries]))


def test_bm25_reads_texts_in_every_form():
    pytest.importorskip("bm25s", reason="the extra [text]")
    words = sorted({word for text in TEXTS for word in text.split()})
    ids = [[words.index(word) for word in text.split()] for text in TEXTS]
    padded = torch.zeros(4, 6, dtype=torch.int64)
    mask = torch.zeros(4, 6)
    for row, text in enumerate(ids):
        padded[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
    y = torch.zeros(4, dtype=torch.int64)
    expected = uw.BM25(None, TASK).fit(TEXTS).attribute(TEXTS).values

    def decode(batch):
        return [" ".join(words[i] for i in row[keep]) for row, keep in zip(batch[0], batch[1] > 0)]

    forms = {
        "token ids": (ids, {}),
        "pairs": (list(zip(TEXTS, [0, 1, 2, 3])), {}),
        "a dict": ({"input_ids": padded, "attention_mask": mask, "labels": y}, {}),
        "a function": ((padded, mask, y), {"text": decode}),
    }
    for what, (data, options) in forms.items():
        found = uw.BM25(None, TASK, **options).fit(data).attribute(data).values
        assert torch.equal(found, expected), what


def test_bm25_refuses():
    pytest.importorskip("bm25s", reason="the extra [text]")
    for data in ((X, Y), X):
        with refused("no texts are found in the data"):
            uw.BM25(None, TASK).fit(data)
    with refused("not fitted yet"):
        uw.BM25(None, TASK).attribute(TEXTS)
    with refused("has no self-influence"):
        uw.BM25(None, TASK).fit(TEXTS).self_influence()
    with refused("holds a token"):
        uw.BM25(None, TASK).fit(["", "!"])
    with refused("the data is empty"):
        uw.BM25(None, TASK).fit([])
    with refused("1 texts were read of 4 examples"):
        uw.BM25(None, TASK, text=lambda batch: ["x"]).fit(TEXTS)
    with refused("expected k1 > 0"):
        uw.BM25(None, TASK, b=2)


def test_bm25_obeys_the_laws():
    pytest.importorskip("bm25s", reason="the extra [text]")
    torch.manual_seed(0)
    model = Tagger().double().eval()
    train, query = ((torch.randint(20, (n, 5)), torch.arange(n) % 3) for n in (9, 4))
    report = check_attributor(uw.BM25, train, query, model=model, task=TASK)
    assert report["sign"].status == report["duplicates"].status == "passed"


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


# Confident learning -----------------------------------------------------------------------------------------------


def test_confident_learning_flags_by_the_class_thresholds():
    pytest.importorskip("cleanlab", reason="the extra [audit]")
    generator = np.random.default_rng(0)
    y = np.arange(60) % 3
    p = (
        generator.dirichlet(np.ones(3), 60)
        + 0.8 * np.eye(3)[np.where(generator.random(60) < 0.8, y, (y + 1) % 3)]
    )
    p /= p.sum(1, keepdims=True)
    thresholds = np.array([p[y == k, k].mean() for k in range(3)])
    confident = np.where(p >= thresholds, p, -1)
    flagged = {i for i in range(60) if confident[i].max() > 0 and confident[i].argmax() != y[i]}
    found = uw.confident_learning((torch.zeros(60, 1), torch.from_numpy(y)), TASK, probabilities=p)
    assert set(found.info["flagged"]) == flagged and len(flagged) > 3
    torch.testing.assert_close(found.values, torch.from_numpy(1 - p[np.arange(60), y]))
    order = found.values[found.info["flagged"]]
    assert bool((order[:-1] >= order[1:]).all())
    margin = uw.confident_learning(
        (torch.zeros(60, 1), torch.from_numpy(y)), TASK, probabilities=p, rank_by="normalized_margin"
    )
    others = np.where(np.eye(3, dtype=bool)[y], -1, p).max(1)
    torch.testing.assert_close(margin.values, torch.from_numpy((1 - p[np.arange(60), y] + others) / 2))


def test_confident_learning_refuses():
    pytest.importorskip("cleanlab", reason="the extra [audit]")
    p = torch.full((len(Y), 3), 1 / 3)
    for options in ({}, {"probabilities": p, "train_fn": lambda indices, seed: small()}):
        with refused("expected one of them"):
            uw.confident_learning(TRAIN, TASK, **options)
    for wrong, message in (
        (p[:-1], "expected \\[train, class\\]"),
        (logits(), "not logits"),
        (p[:, :2] * 1.5, "label 2 has no column"),
        (torch.full((len(Y), 4), 0.25), "no example has label 3"),
    ):
        with refused(message):
            uw.confident_learning(TRAIN, TASK, probabilities=wrong)
    with refused("the size of the rarest class"):
        uw.confident_learning(TRAIN, TASK, train_fn=lambda indices, seed: small(), folds=50)
    with refused("train_fn returned int"):
        uw.confident_learning(TRAIN, TASK, train_fn=lambda indices, seed: 1, folds=2)


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
