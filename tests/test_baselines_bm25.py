"""BM25 against its formula, on texts in every form, and what it refuses."""

import math

import pytest
import torch
from networks import Tagger
from refusals import refused
from small_problem import TRAIN

import upweight as uw
from upweight.testing import check_attributor

TASK = uw.Classification()
X, Y = TRAIN
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
