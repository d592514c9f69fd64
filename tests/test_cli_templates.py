"""What `upweight init` writes says what was minimised, so that a repair brings the model nearer to retraining."""

import json

import numpy as np
import pytest
from projects import MADE

import upweight as uw
from upweight.attributors.by_name import build

GONE = "448,330,133,206,323"
"""The rows of largest loss of the sklearn template: without the penalty in the curvature they throw the model far."""


@pytest.fixture
def written(upweight, place):
    """Write the file of a kind; gives its address."""

    def write(kind):
        data = () if MADE[kind] is None else ("--data", str(MADE[kind](place)))
        assert upweight("init", "mine", "--kind", kind, "--name", f"of_{kind}", *data)[0] == 0
        return f"mine/of_{kind}.py:experiment"

    return write


def repaired(upweight, *arguments):
    code, out, err = upweight("repair", *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


def test_the_repair_of_a_fitted_estimator_is_nearer_to_the_refit(upweight, written):
    address = written("sklearn")
    options = ("--remove", GONE, "--verify", "--seeds", "2", "--out")
    done = repaired(upweight, address, *options, "run")
    found = done["verification"]
    assert found["parameter_distance"]["relative"] < 0.3 and found["prediction_distance"]["relative"] < 0.3
    # train_fn fits all of the rows that it is given: two seeds find the same minimum.
    assert found["parameter_distance"]["seeds"] < 1e-6 * found["parameter_distance"]["before"]
    # What --l2 says comes first; that there is a regulariser is then read off the weights, roughly.
    told = done["evidence"]["l2"]["weight$"]
    untold = repaired(upweight, address, *options, "other", "--l2", "0")
    assert told > 0 and untold["evidence"]["l2"] == 0
    assert told < untold["evidence"]["solver"]["damping"]["weight"] < 2 * told
    assert untold["verification"]["parameter_distance"]["relative"] > found["parameter_distance"]["relative"]


def test_evaluation_of_a_fitted_estimator_has_no_noise(upweight, written):
    code, out, err = upweight("evaluate", written("sklearn"), "--subsets", "12", "--seeds", "2", "--json")
    found = json.loads(out)
    assert code == 0 and found["ceiling"]["value"] > 0.999 and "ignores its seed" not in err
    assert found["methods"][0]["name"] == "exact" and found["methods"][0]["lds"] > 0.8


@pytest.mark.parametrize("kind", MADE)
def test_the_weight_decay_of_every_template_reaches_the_repair(upweight, written, kind):
    address = written(kind)
    experiment = uw.Experiment.load(address)
    assert np.max(list(experiment.l2.values()) if kind == "sklearn" else experiment.l2) > 0
    first = str(experiment.train.ids[0])
    options = (address, "--remove", first, "--damping", "0.1", "--out", "run")
    assert repaired(upweight, *options)["evidence"]["l2"] == experiment.l2
    assert repaired(upweight, *options, "--l2", "0.5")["evidence"]["l2"] == 0.5


def test_exact_methods_by_name_take_the_experiments_weight_decay(upweight, written):
    address = written("sklearn")
    bundle = uw.Experiment.load(address)
    made = {
        spec: build(spec, bundle.model, bundle.task, bundle.methods, bundle.l2)
        for spec in ("ggn", "hessian", "ggn:l2=0.5", "ekfac", "ekfac:curvature=ggn", "grad-dot")
    }
    assert made["ggn"].l2 == made["hessian"].l2 == made["ekfac:curvature=ggn"].l2 == bundle.l2
    assert made["ggn:l2=0.5"].l2 == 0.5 and made["ekfac"].l2 == 0
    scores = [
        json.loads(upweight("attribute", address, "--method", method, "--json")[1])["queries"][0]
        for method in ("exact", "hessian:damping=0.0")
    ]
    assert scores[0] == scores[1]


def test_the_first_of_the_experiments_methods_explains_queries(upweight, written, place, monkeypatch):
    found = json.loads(upweight("attribute", written("sklearn"), "--json")[1])
    assert found["method"] == "exact" and found["info"]["curvature"] == "hessian"
    assert json.loads(upweight("attribute", written("csv"), "--json")[1])["method"] == "ekfac"
    for verb in ("attribute", "explore"):
        assert "or ekfac, if not given" in " ".join(upweight(verb, "--help")[1].replace("│", " ").split())
