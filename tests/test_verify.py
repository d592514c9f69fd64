"""A repaired model against models that were really retrained, on problems where the answer is known."""

import json

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from torch import nn

import upweight as uw
from upweight.repair import log
from upweight.repair.membership import membership_auroc

ALPHA, N = 2.0, 60
GONE = list(range(3, 60, 6))


def data():
    X, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[: N + 40]
    return X[order] * 20, (y[order] - 150) / 77


def fitted(indices, seed=0, labels=None):
    """Exact ridge regression, which no seed changes."""
    X, y = data()
    y = y.copy()
    for position, label in (labels or {}).items():
        y[position] = label
    estimator = Ridge(alpha=ALPHA, solver="cholesky").fit(X[indices], y[indices])
    return uw.from_sklearn(estimator).model


def ridge():
    X, y = data()
    estimator = Ridge(alpha=ALPHA, solver="cholesky").fit(X[:N], y[:N])
    converted = uw.from_sklearn(estimator, X[:N], y[:N])
    options = {"l2": converted.l2, "damping": 0.0, "convention": "sum", "progress": False}
    return converted, options, converted.tensors(X[N:], y[N:])


@pytest.mark.filterwarnings("ignore:.*seed.*:UserWarning")
@pytest.mark.parametrize("change", [{"remove": GONE}, {"labels": {5: 3.0, 9: -3.0}}])
def test_an_exact_repair_is_at_no_distance_and_doing_nothing_at_one(tmp_path, change):
    converted, options, test = ridge()
    repair = uw.amend(converted.model, converted.task, converted.train, **change, **options)
    given = {"test": test, "folder": tmp_path / "bank", "seeds": 2, "progress": False}
    found = uw.verify(repair, converted.model, converted.task, converted.train, fitted, **given)
    assert found.parameter_distance["relative"] < 1e-9 and found.prediction_distance["relative"] < 1e-9
    assert found.parameter_distance["before"] > 1e-3 and found.parameter_distance["seeds"] == 0
    assert found.to_mean_prediction["relative"] < 1e-9
    assert found.accuracy == {}
    for group, losses in found.loss.items():
        assert losses["after"] == pytest.approx(losses["retrained"], rel=1e-9), group
    assert found.seconds["ratio"] == pytest.approx(repair.seconds / found.seconds["retraining"])
    if "remove" in change:
        assert found.membership["after"] == found.membership["retrained"] != found.membership["before"]
        # By hand: what share of (forgotten, test) pairs has the forgotten one's loss lower.
        X, y = data()
        before = (fitted(range(N))(torch.as_tensor(X)).detach().numpy().ravel() - y) ** 2
        pairs = [before[i] < before[j] for i in GONE for j in range(N, N + 40)]
        assert found.membership["before"] == pytest.approx(np.mean(pairs))
    else:
        assert found.membership is None and "repaired" in found.loss
    # Doing nothing is what the distances are relative to.
    nothing = uw.amend(converted.model, converted.task, converted.train, **change, **options, step_size=1e-12)
    assert uw.verify(
        nothing, converted.model, converted.task, converted.train, fitted, **given
    ).prediction_distance["relative"] == pytest.approx(1, abs=1e-6)
    found.save(tmp_path / "repair")
    loaded = uw.Verification.load(tmp_path / "repair")
    assert loaded.to_json() == json.loads(json.dumps(found.to_json()))
    assert log.read(tmp_path / "repair/log.jsonl")[0]["action"] == "verify"
    from rich.console import Console

    console = Console(width=120)
    with console.capture() as shown:
        console.print(found)
    assert "doing nothing" in shown.get() and "retrained" in shown.get()


class Trainer:
    """A small network whose seeds differ."""

    def __init__(self, log=None):
        self.log = log

    def __call__(self, indices, seed, labels=None):
        x, y = images()
        y = y.clone()
        for position, label in (labels or {}).items():
            y[position] = label
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))
        optimizer = torch.optim.Adam(model.parameters(), 0.03)
        for _ in range(80):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[indices]), y[indices]).backward()
            optimizer.step()
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(f"{len(indices)} {seed}\n")
        return model.eval()


def images(n=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, 0] + x[:, 1] ** 2 + 0.5 * torch.randn(n, generator=generator) > 0.7).long()


def test_seeds_accuracies_and_one_bank_for_all(tmp_path):
    train, test = images(), images(200, 1)
    trainer = Trainer(tmp_path / "log")
    model = trainer(np.arange(80), 5)
    repair = uw.unlearn(model, uw.Classification(), train, list(range(0, 80, 8)), l2=1e-3, progress=False)
    given = {"test": test, "folder": tmp_path / "bank", "seeds": [0, 1], "trained_with": 5, "progress": False}
    found = uw.verify(repair, model, uw.Classification(), train, trainer, **given)
    assert found.seeds == [5, 0, 1] and found.prediction_distance["seeds"] > 0
    trained = (tmp_path / "log").read_text().splitlines()
    assert sorted(trained[1:]).count("70 5") == 1 and sum(line.startswith("70 ") for line in trained) == 3
    again = uw.verify(repair, model, uw.Classification(), train, trainer, **given)
    assert (tmp_path / "log").read_text().splitlines() == trained  # nothing is trained twice
    assert again.accuracy == found.accuracy
    # Against the models themselves, by hand.
    kept = np.setdiff1d(np.arange(80), range(0, 80, 8))
    theirs = [Trainer()(kept, seed) for seed in (5, 0, 1)]
    with torch.no_grad():
        right = [float((m(test[0]).argmax(1) == test[1]).double().mean()) for m in theirs]
        p = [m(test[0]).double().softmax(1) for m in (model, *theirs)]
    assert found.accuracy["test"]["retrained"] == pytest.approx(np.mean(right))
    gaps = [float((p[0] - q).abs().sum(1).mean() / 2) for q in p[1:]]
    assert found.prediction_distance["before"] == pytest.approx(np.mean(gaps), rel=1e-6)
    assert found.same_seed["prediction_distance"]["before"] == pytest.approx(gaps[0], rel=1e-6)
    center = sum(p[1:]) / 3
    assert found.to_mean_prediction["before"] == pytest.approx(
        float((p[0] - center).abs().sum(1).mean() / 2), rel=1e-6
    )
    assert set(found.accuracy) == {"test", "retained", "forgotten"}
    model.train()
    uw.verify(repair, model, uw.Classification(), train, trainer, **given)
    assert model.training  # as it was


def test_membership_is_the_chance_of_a_lower_loss():
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 6, 30) / 10, generator.integers(2, 9, 40) / 10
    by_hand = np.mean([(a < b) + 0.5 * (a == b) for a in members for b in others])
    assert membership_auroc(torch.as_tensor(members), torch.as_tensor(others)) == pytest.approx(by_hand)
    assert np.isnan(membership_auroc(torch.tensor([float("nan")]), torch.tensor([1.0])))
    with refused("0 members and 2 others"):
        membership_auroc(torch.zeros(0), torch.zeros(2))


def test_what_cannot_be_verified_is_refused(tmp_path):
    converted, options, test = ridge()
    given = {"test": test, "folder": tmp_path / "bank", "seeds": 1, "progress": False}
    model, task, train = converted.model, converted.task, converted.train
    soft = uw.reweight(model, task, train, {3: 0.5}, **options)
    with refused("1 examples have other weights"):
        uw.verify(soft, model, task, train, fitted, **given)
    gone = uw.unlearn(model, task, train, GONE, **options)
    with refused("of 60 training examples, and these are 30"):
        uw.verify(gone, model, task, tuple(t[:30] for t in train), fitted, **given)
    labels = uw.relabel(model, task, train, {3: 1.0}, **options)
    with refused("train_fn takes no argument 'labels'"):
        uw.verify(labels, model, task, train, lambda indices, seed: fitted(indices), **given)

    def failing(indices, seed):
        raise ValueError("no memory")

    with refused("runs failed.*no memory"):
        uw.verify(gone, model, task, train, failing, **given)

    def wider(indices, seed):
        torch.manual_seed(seed + int(np.sum(indices)))
        return nn.Linear(10, 2).double()

    with refused("another architecture"):
        uw.verify(gone, model, task, train, wider, **{**given, "folder": tmp_path / "wider"})
    (tmp_path / "repair").mkdir()
    (tmp_path / "repair/verify.json").write_text('{"seeds": [1]}')
    with refused("holds no 'parameter_distance'"):
        uw.Verification.load(tmp_path / "repair")
