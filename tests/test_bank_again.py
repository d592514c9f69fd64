"""A bank's folder that is opened again: failures get another chance, another measurement is refused or told of."""

import json
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from banks import TASK, N, Trainer, bank, problem
from refusals import refused
from sklearn.linear_model import LogisticRegression

import upweight as uw
from upweight.errors import CacheMismatchError
from upweight.evaluate import subsets
from upweight.store import _digest

# Failed runs


class Unlucky:
    """A fault that strikes the runs with seed 1 and example 0, while it is on."""

    said = "out of luck"
    on = True

    def __call__(self, indices, seed, model):
        if self.on and seed == 1 and 0 in indices:
            raise RuntimeError(self.said)


def test_a_failed_run_is_tried_again_by_every_call_and_reported_as_it_failed_last(tmp_path):
    log, fault = tmp_path / "log", Unlucky()
    made = bank(tmp_path / "bank", Trainer(log, fault), count=6)
    with pytest.warns(UserWarning, match="failed twice or more.*out of luck"):
        failed = made.run().failed
    fault.said = "a full disk"
    with pytest.warns(UserWarning, match="a full disk"):
        report = made.run()
    assert report.trained == 0 and report.finished + len(report.failed) == report.planned == 12
    assert all("a full disk" in error for _, _, error in report.failed) and len(report.failed) == len(failed)
    fault.on = False
    report = bank(tmp_path / "bank", Trainer(log, fault), count=6).run()
    assert report.trained == len(failed) and report.failed == [] and report.finished == 12
    assert np.isfinite(made.outcomes("queries").values).all()
    assert sorted(Counter(log.read_text().split()).values()) == [1] * (12 - len(failed)) + [4] * len(failed)


def test_changed_code_is_tried_twice_again(tmp_path):
    tried = []

    def train_fn(indices, seed):
        tried.append(seed)
        raise RuntimeError("the old bug")

    for expected in (4, 2):
        with refused("all 2 runs failed.*the old bug"):
            bank(tmp_path, train_fn, count=2, seeds=1).run()
        assert len(tried) == expected
        tried.clear()

    def repaired(indices, seed):
        tried.append(seed)
        if len(tried) == 1:
            raise RuntimeError("a new one")
        return Trainer()(indices, seed)

    report = bank(tmp_path, repaired, count=2, seeds=1).run()
    assert report.finished == report.trained == 2 and len(tried) == 3


def test_a_train_fn_that_returns_nothing_is_refused_at_once(tmp_path):
    trained = []

    def train_fn(indices, seed):
        trained.append(seed)

    with refused("train_fn returned None, expected the trained model"):
        bank(tmp_path, train_fn).run()
    assert trained == [0]


# The measurement


def loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def percent(model, batch):
    return 100 * (model(batch[0]).argmax(1) == batch[1]).float()


def opened(folder, task):
    made = uw.RetrainingBank(folder, Trainer(), task, N, subsets=3, seeds=1, progress=False)
    made.measure(problem()[1], "queries")
    return made


def test_another_unit_or_function_is_refused(tmp_path):
    task = uw.Task.from_functions
    opened(tmp_path, task(loss)).run()
    with pytest.raises(CacheMismatchError, match=r"unit is .loss. there but .percent. here"):
        opened(tmp_path, task(loss, percent, unit="percent"))
    with pytest.raises(CacheMismatchError, match=r"measured_by is .loss. there but .percent. here"):
        opened(tmp_path, task(loss, percent))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert opened(tmp_path, task(loss, loss)).run().trained == 0


def test_another_function_of_the_same_name_is_warned_of(tmp_path):
    opened(tmp_path / "a", uw.Task.from_functions(lambda model, batch: loss(model, batch))).run()
    with pytest.warns(UserWarning, match="the code of the measurement has changed"):
        opened(tmp_path / "a", uw.Task.from_functions(lambda model, batch: 2 * loss(model, batch)))
    opened(tmp_path / "b", uw.Classification(lambda model, batch: loss(model, batch))).run()
    with pytest.warns(UserWarning, match="the code of the measurement has changed"):
        opened(tmp_path / "b", uw.Classification(lambda model, batch: 2 * loss(model, batch)))


def one_class():
    class Mine(uw.Classification):
        def measure(self, model, batch):
            return loss(model, batch)

    return Mine()


def another_class():
    class Mine(uw.Classification):
        def measure(self, model, batch):
            return 2 * loss(model, batch)

    return Mine()


def test_another_class_of_the_same_name_is_warned_of(tmp_path):
    opened(tmp_path, one_class()).run()
    with pytest.warns(UserWarning, match="the code of the measurement has changed"):
        opened(tmp_path, another_class())


def test_a_folder_of_an_earlier_version_still_opens(tmp_path):
    task = uw.Task.from_functions(loss, unit="nats")
    opened(tmp_path, task).run()
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    for key in ("unit", "measured_by"):
        del content["manifest"][key]
    del content["blake2b"]
    content["blake2b"] = _digest(json.dumps(content, sort_keys=True))
    path.write_text(json.dumps(content))
    again = opened(tmp_path, task)
    assert again.run().trained == 0 and again.outcomes("queries").unit == "nats"
    with refused("higher_is_better"):
        opened(tmp_path, uw.Task.from_functions(loss, higher_is_better=True))


# Models that are not torch's


def right(model, batch):
    return torch.as_tensor(model.predict(batch[0].numpy()) == batch[1].numpy()).float()


def sklearn_bank(folder, train_fn, measure=right, seeds=1):
    task = uw.Task.from_functions(right, measure)
    made = uw.RetrainingBank(folder, train_fn, task, N, subsets=2, seeds=seeds, progress=False)
    x, y = problem()[1]
    made.measure((x[:3], y[:3]), "three")
    return made


def fitted(indices, seed):
    x, y = problem()[0]
    return LogisticRegression().fit(x[indices].numpy(), y[indices].numpy())


def test_equal_coarse_measurements_are_no_sign_of_ignored_indices(tmp_path):
    made = sklearn_bank(tmp_path, fitted, lambda model, batch: torch.ones(len(batch[0])))
    assert made.run().finished == 2


def test_a_foreign_model_that_ignores_its_indices_is_still_refused(tmp_path):
    with refused("train_fn ignores its indices"):
        sklearn_bank(tmp_path / "a", lambda indices, seed: fitted(np.arange(N), seed)).run()
    with pytest.warns(UserWarning, match="ignores its seed"):
        sklearn_bank(tmp_path / "b", fitted, seeds=2).run()


class Closed:
    """A model that cannot be taken apart."""

    def __reduce__(self):
        raise TypeError("no")

    def predict(self, x):
        return np.ones(len(x))


def test_models_that_cannot_be_hashed_are_not_compared(tmp_path):
    assert sklearn_bank(tmp_path, lambda indices, seed: Closed()).run().finished == 2


# Arguments


def test_numpy_numbers_count_subsets_and_seeds(tmp_path):
    made = bank(tmp_path, subsets=np.int64(4), seeds=np.int64(3))
    assert len(made.subsets) == 4 and made.seeds == [0, 1, 2]
    with refused("subsets is ndarray, expected Subsets or how many"):
        bank(tmp_path, subsets=np.ones((3, N), dtype=bool))
    with refused("train_fn is str, expected a function"):
        uw.RetrainingBank(tmp_path, "train", TASK, N)


def test_a_train_fn_with_keywords_takes_labels(tmp_path):
    y = problem()[0][1]
    chosen = subsets.full(N) + subsets.label_changes(N, [{i: 1 - int(y[i]) for i in range(N)}])
    made = bank(tmp_path, lambda indices, seed, **kw: Trainer()(indices, seed, **kw), subsets=chosen, seeds=1)
    made.run()
    plain, changed = made.outcomes("queries").means
    assert plain.mean() < 0.7 < changed.mean()


@pytest.mark.parametrize("kind", [np.int64, torch.tensor, np.array, int], ids=lambda kind: kind.__name__)
def test_labels_may_be_of_numpy_or_torch(kind, tmp_path):
    chosen = subsets.full(N) + subsets.label_changes(N, [{np.int64(3): kind(1)}])
    assert chosen.labels[1] == {3: 1} and type(chosen.labels[1][3]) is int
    assert chosen.digest(1) == subsets.label_changes(N, [{3: 1}]).digest(0)
    assert bank(tmp_path, subsets=chosen, seeds=1).run().finished == 2
    with refused("label of example 3 is .*expected a number or a string"):
        subsets.label_changes(N, [{3: [0, 1]}])
