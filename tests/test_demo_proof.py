"""What proves the demo's claims: detection of the flips, and networks trained again without proponents."""

import numpy as np
import pytest
import torch
from demos import QUICK

from upweight.demo.data import digits
from upweight.demo.network import predictions, train_network
from upweight.demo.proof import Removal, RemovalPair, agreement, chance, detection, removal_proof, same_labels
from upweight.demo.run import choose_queries
from upweight.scores import Scores


def test_detection_by_hand():
    suspicion = torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2])
    flipped = torch.tensor([False, True, True, False, False])
    one = detection("made up", suspicion, flipped)
    assert one.auroc == pytest.approx(5 / 6)  # of six pairs only (2, 3) is in the wrong order
    assert one.precision == pytest.approx(1 / 2)
    assert one.average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert one.found.tolist() == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_chance_is_the_share_of_flips():
    one = chance(torch.tensor([True] + [False] * 9))
    assert (one.auroc, one.precision, one.average_precision) == (0.5, 0.1, 0.1)
    assert one.found[-1] == 1


def test_random_images_carry_the_labels_of_the_proponents():
    labels = torch.arange(60) % 3
    positions = torch.tensor([0, 3, 6, 1, 4, 2])
    drawn = same_labels(positions, labels, np.random.default_rng(0))
    assert len(set(drawn.tolist())) == 6
    assert torch.equal(labels[drawn].bincount(), labels[positions].bincount())


def test_removal_is_measured_against_the_same_seed():
    images = digits(n=80, seed=1)
    train = (images.train.inputs, images.train.labels)
    queries = (images.test.inputs[:3], images.test.labels[:3])
    values = torch.randn(3, 80)
    scores = Scores(values, range(3), range(80), "nats")
    pairs = removal_proof(scores, queries, train, 10, rows=[2, 0], removed=5, seeds=[4, 9], recipe=QUICK)
    assert [pair.proponents.query for pair in pairs] == [2, 0]
    removal = pairs[0].proponents
    top = values[2].topk(5)
    assert removal.removed == tuple(top.indices.tolist())
    assert removal.predicted == pytest.approx(float(top.values.sum()), rel=1e-5)
    for seed, measured in zip([4, 9], removal.measured, strict=True):
        full, less = (train_network(*train, 10, seed, without, QUICK) for without in (None, top.indices))
        change = predictions(less, *queries)[1] - predictions(full, *queries)[1]
        assert measured == pytest.approx(float(change[2]), abs=1e-5)


def test_agreement_by_hand():
    pairs = [
        RemovalPair(Removal(0, (1,), 2.0, (0.8, 1.2)), Removal(0, (2,), 0.0, (0.1,))),
        RemovalPair(Removal(1, (1,), 4.0, (2.0,)), Removal(1, (2,), 1.0, (2.5,))),
    ]
    together = agreement(pairs)
    assert together.wins == 1
    assert together.proponents == pytest.approx(1.5) and together.control == pytest.approx(1.3)
    assert together.predicted == pytest.approx(3.0) and together.predicted_control == pytest.approx(0.5)
    assert together.slope == pytest.approx((2 * 1 + 4 * 2 + 1 * 2.5) / (4 + 16 + 1))
    assert pairs[0].proponents.spread == pytest.approx(np.std([0.8, 1.2], ddof=1))


def test_misclassified_queries_come_first():
    losses, right = torch.rand(50), torch.rand(50) < 0.8
    chosen = choose_queries(losses, right, 20, seed=0)
    assert len(set(chosen.tolist())) == 20
    wrong = int((~right).sum())
    assert not right[chosen[: min(wrong, 12)]].any() and right[chosen[min(wrong, 12) :]].all()
    assert losses[chosen[:wrong]].tolist() == sorted(losses[chosen[:wrong]].tolist(), reverse=True)
    assert len(choose_queries(losses, right, 500, seed=0)) == 50
