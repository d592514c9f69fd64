"""The benchmark suite's harness: choices are made on even queries, figures are of odd ones, scores are kept."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import upweight as uw
from upweight.evaluate import Outcomes, lds, subsets

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "lds"))

import _suite
import _training

N, QUERIES = 30, 8


@pytest.fixture
def linear_truth():
    """Outcomes that are sums of the true effects, and those effects."""
    generator = np.random.default_rng(0)
    effects = generator.standard_normal((QUERIES, N))
    masks = subsets.half_subsets(N, 40, paired=False).masks
    losses = (~masks).astype(float) @ effects.T
    return Outcomes(masks, np.stack([losses, losses], axis=1)), effects


def test_the_damping_is_chosen_on_queries_that_are_not_reported(linear_truth):
    outcomes, effects = linear_truth
    right_on_even, right_on_odd = -effects.copy(), -effects.copy()
    right_on_even[::2], right_on_odd[1::2] = effects[::2], effects[1::2]
    auto = np.random.default_rng(1).standard_normal(effects.shape)
    table = {"auto": auto, "0.1": right_on_even, "0.2": right_on_odd}
    automatic, chosen = _suite.rows_of("method", [(table, 1.0)], outcomes)
    assert automatic.choices == ("auto", "auto") and chosen.choices == ("0.1", "0.1")
    assert chosen.one.value == pytest.approx(-1.0)  # honest: what it was chosen on is not what is reported
    assert chosen.sweep["0.1"] == pytest.approx(1.0)
    odd = np.arange(1, QUERIES, 2)
    assert automatic.one.value == lds(auto[odd], outcomes.for_queries(odd)).value


def test_several_models_are_averaged_over_the_choices_that_all_have(linear_truth):
    outcomes, effects = linear_truth
    noise = np.random.default_rng(2).standard_normal(effects.shape) * 5
    tables = [
        {"auto": effects + noise, "0.1": effects, "0.2": noise},
        {"auto": effects - noise, "0.2": noise},
    ]
    automatic, chosen = _suite.rows_of("method", [(table, 1.0) for table in tables], outcomes)
    assert automatic.several is not None and automatic.several.value == pytest.approx(1.0)
    assert automatic.one.value < 0.9 and len(automatic.each) == 2
    assert chosen.choices == ("0.1", "0.2") and len(chosen.each) == 1
    text = _suite.report("Title", [automatic, chosen], outcomes)
    assert (
        "method, damping chosen (0.1)" in text
        and "mean of 2 models" in text
        and "Noise ceiling 1.000" in text
    )


def test_scores_are_computed_once_and_refused_by_another_setting(tmp_path):
    calls = []

    def method(run):
        calls.append(run.seed)
        yield "", np.full((2, 3), float(run.seed))

    def train(indices, seed, keep_after):
        return nn.Linear(1, 1), []

    x, y = torch.zeros(3, 1), torch.zeros(3, 1)
    setting = _suite.Setting(
        "none", uw.Regression(), lambda: ((x, y), (x[:2], y[:2])), lambda: nn.Linear(1, 1), train, train,
        {"method": method}, {"epochs": 1}, 0.0, (),
    )  # fmt: skip
    for _ in range(2):
        tables, _ = _suite.ScoreFolder(tmp_path, setting).get("method", 1)
        assert tables[""].tolist() == [[1001.0] * 3] * 2
    assert calls == [1001]
    with pytest.raises(SystemExit, match="another setting"):
        _suite.ScoreFolder(tmp_path, dataclasses.replace(setting, settings={"epochs": 2})).get("method", 1)


def test_sgd_is_torchs_own_on_the_seeds_batches():
    x, y = torch.randn(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 2
    loss = nn.functional.cross_entropy
    recipe = {"rate": 0.1, "momentum": 0.9, "decay": 1e-2, "batch": 4, "epochs": 3}
    torch.manual_seed(0)
    ours = nn.Linear(3, 2)
    theirs = nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    kept = _training.sgd(ours, (x, y), loss, seed=5, keep_after=(1, 3), **recipe)
    velocity = [torch.zeros_like(p) for p in theirs.parameters()]
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        order = torch.randperm(10, generator=generator)
        for chosen in (order[:4], order[4:8]):
            gradients = torch.autograd.grad(loss(theirs(x[chosen]), y[chosen]), list(theirs.parameters()))
            with torch.no_grad():
                for p, g, v in zip(theirs.parameters(), gradients, velocity):
                    v.mul_(0.9).add_(g + 1e-2 * p)
                    p -= 0.1 * v
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
        torch.testing.assert_close(kept[-1][0][name], value)
    assert [rate for _, rate in kept] == [0.1, 0.1] and not ours.training
