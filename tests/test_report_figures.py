"""The report's figures are those of the scores, outcomes and issues that it is made of."""

import numpy as np
import pytest
import torch
from run_folders import evaluation, images, issues, put, write_scores

import upweight as uw
from upweight.evaluate.outcomes import Outcomes
from upweight.report.calibration import POINTS, calibration
from upweight.report.issue_rows import issue_data
from upweight.report.queries import cards, concentration
from upweight.report.run_files import read_run


def test_the_neighbours_are_those_of_the_scores(tmp_path):
    experiment = images()
    write_scores(tmp_path, experiment)
    scores = uw.Scores.load(tmp_path / "scores/ekfac")
    for card in cards(scores, experiment, neighbours=3):
        row = scores.values[card.id]
        order = torch.argsort(row, descending=True)
        assert [one.id for one in card.proponents] == order[:3].tolist()
        assert [one.id for one in card.opponents] == order.flip(0)[:3].tolist()
        assert [one.score for one in card.proponents] == pytest.approx(row[order[:3]].tolist())
        assert max(float(one.share) for one in card.proponents + card.opponents) == 100
        guess = experiment.model(experiment.query.take([card.id])[0]).argmax().item()
        assert card.guess == experiment.classes[guess]
        assert card.right == (guess == experiment.query.take([card.id])[1].item())
    assert cards(scores, experiment)[0].right is False


def test_sides_hold_only_their_own_sign():
    experiment = images()
    values = torch.full((6, 30), 0.25)
    scores = uw.Scores(values, range(6), range(30), "nats")
    assert all(len(card.proponents) == 8 and not card.opponents for card in cards(scores, experiment))
    assert all(
        not card.proponents and not card.opponents
        for card in cards(uw.Scores(0 * values, range(6), range(30)), None)
    )


def test_concentration_counts_what_makes_half():
    values = torch.tensor([[4.0, 3, 2, 1, -9], [10, 1, 1, 1, 1], [1, 1, 1, 1, 0], [-1, 0, 0, 0, 0]])
    # 4 + 3 of 10; 10 of 14; 1 + 1 of 4; the last has no proponents
    assert concentration(uw.Scores(values[:1], [0], range(5))) == 2
    assert concentration(uw.Scores(values, range(4), range(5))) == 2
    assert concentration(uw.Scores(values[1:2], [0], range(5))) == 1
    assert concentration(uw.Scores(values[3:], [0], range(5))) is None


def test_calibration_recovers_a_known_slope():
    generator = np.random.default_rng(0)
    masks = generator.random((40, 12)) < 0.5
    values = generator.normal(size=(20, 12))
    offsets = generator.normal(size=(1, 1, 20))  # each query's own level cancels
    actual = 0.5 * ((~masks) @ values.T)[:, None, :] + offsets
    found = calibration(
        uw.Scores(torch.tensor(values), range(20), range(12), "nats"), Outcomes(masks, actual)
    )
    assert found["slope"] == pytest.approx(0.5, abs=1e-12) and found["correlation"] == pytest.approx(
        1, abs=1e-12
    )
    assert found["pairs"] == 800 and len(found["points"]) == POINTS
    assert all(y == pytest.approx(0.5 * x, rel=2e-3) for x, y in found["points"])
    scores = uw.Scores(torch.tensor(values), range(20), range(12))
    assert calibration(scores, Outcomes(masks, actual)) is None  # only ranks
    flat = uw.Scores(torch.zeros(20, 12), range(20), range(12), "nats")
    assert calibration(flat, Outcomes(masks, actual)) is None


def test_methods_come_before_baselines_and_the_best_first(tmp_path):
    experiment = images()
    for name in ("loss", "random", "grad-dot", "ggn+damping=0.1"):
        write_scores(tmp_path, experiment, name)
    put(tmp_path, "evaluate.json", evaluation(("ggn:damping=0.1", "loss")))
    assert read_run(tmp_path, experiment).method == "ggn:damping=0.1"
    (tmp_path / "evaluate.json").unlink()
    assert read_run(tmp_path, experiment).method in ("grad-dot", "ggn+damping=0.1")


def test_issue_rows_are_counted_cut_and_sorted(monkeypatch):
    monkeypatch.setattr("upweight.report.issue_rows.ROWS", 40)
    content = issues(30)
    data = issue_data(content, None)
    flags = np.array(content["columns"]["is_issue"])
    kinds = np.array(content["columns"]["issue"])
    assert data["counts"] == {kind: (int(flags[kinds == kind].sum()), 30) for kind in dict.fromkeys(kinds)}
    assert (data["rows"], data["all"], data["examples"]) == (40, 150, 30)
    assert sum(data["flagged"]) == min(40, flags.sum())
    scores = np.array(data["columns"]["score"])
    assert (np.diff(scores[: sum(data["flagged"])]) >= 0).all()
    texts = data["texts"]
    assert {texts[k] for k in data["columns"]["given_label"]} <= {"cat", "dog"}


def test_class_numbers_are_named(tmp_path):
    content = issues(30, labels=(0, 1))
    assert set(issue_data(content, images())["texts"]) >= {"cat", "dog"}
    assert set(issue_data({**content, "classes": ["no", "yes"]}, None)["texts"]) >= {"no", "yes"}
    regression = issues(30, labels=(0.25, None))
    assert "0.25" in issue_data(regression, None)["texts"]
