"""A file of the run that is damaged or belongs to another never stops the report: it is left out, which is told."""

import json

import pytest
from report_pages import Page
from run_folders import evaluation, everything, images, issues, put, repair, verification, write_scores

import upweight as uw
from upweight.fingerprint import model_fingerprint
from upweight.report import build
from upweight.report.run_files import read_run

DAMAGED = {
    "not JSON": "{",
    "not text": "\x00\x01",
    "a list": "[]",
    "empty": "",
    "deep": "[" * 100_000,
    "other keys": '{"columns": 3, "methods": 3, "method": 3, "evidence": 3, "experiment": "pets"}',
    "rows of other lengths": json.dumps(
        {"columns": {**issues(3)["columns"], "score": [0.5]}, "methods": [3, None, {}]}
    ),
    "wrong kinds": json.dumps(
        {
            "experiment": ["pets"],
            "methods": [{"name": {}, "lds": "high", "per_query": 7, "calibration": {"points": [1, "a"]}}],
            "columns": {name: [None, {}, []] for name in issues(1)["columns"]},
            "method": {},
            "evidence": {"groups": {"test": {"n": "many", "actual": {}}}, "seconds": "long", "objective": 3},
            "seconds": [],
            "accuracy": {"test": 3},
            "seeds": 5,
        }
    ),
    "a false seal": json.dumps({**issues(3), "sha256": "0" * 64, "methods": []}),
}


@pytest.mark.parametrize("file", ["evaluate.json", "issues.json", "repair/repair.json", "repair/verify.json"])
@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_file_is_a_notice_and_stops_nothing(tmp_path, file, what):
    experiment = images()
    everything(tmp_path, experiment)
    put(tmp_path, file, DAMAGED[what])
    page = Page(build(tmp_path, experiment))
    assert "queries" in page.ids
    harmless = file != "issues.json" and what in ("a false seal", "rows of other lengths")
    if not harmless:
        assert "Note." in page.text and file in page.text
    if file == "issues.json":
        assert "issues" not in page.ids


def test_a_damaged_score_file_is_a_notice_and_another_is_taken(tmp_path):
    experiment = images()
    write_scores(tmp_path, experiment, "ggn")
    (tmp_path / "scores/ekfac.safetensors").write_bytes(b"nonsense")
    put(tmp_path, "evaluate.json", evaluation())  # whose best method is the damaged one
    page = Page(build(tmp_path, experiment))
    assert "by ggn" in page.text and "scores/ekfac.safetensors is left out" in page.text


def test_what_belongs_to_another_experiment_is_left_out(tmp_path):
    experiment = images()
    everything(tmp_path, experiment)
    other = images(name="houses")
    page = Page(build(tmp_path, other))
    for name in ("evaluate.json", "issues.json"):
        assert f"{name} was written for the experiment 'pets', not for 'houses'" in page.text
    x, y = experiment.train.take(range(30))
    changed = uw.Experiment(experiment.model, experiment.task, (1 - x, y), experiment.query, name="pets")
    run = read_run(tmp_path, changed)
    assert run.scores is None and "of other training examples" in run.notices[0]
    smaller = uw.Experiment(experiment.model, experiment.task, (x[:9], y[:9]), experiment.query, name="pets")
    assert read_run(tmp_path, smaller).issues is None
    put(tmp_path, "issues.json", issues(30, settings={"train": "another fingerprint"}))
    assert "issues.json is about other training data" in " ".join(read_run(tmp_path, experiment).notices)


def test_a_verification_of_an_earlier_repair_is_left_out(tmp_path):
    """Repairing again without --verify leaves verify.json behind, which is about the repair before."""
    experiment = images()
    everything(tmp_path, experiment)

    def marked(after):
        return {"before": "a", "after": after, "train": experiment.train.fingerprint()}

    def written(content, after):
        return {**content, "evidence": {**content["evidence"], "fingerprints": marked(after)}}

    put(tmp_path, "repair/verify.json", {**verification(), "info": {"fingerprints": marked("b")}})
    put(tmp_path, "repair/repair.json", written(repair(), "b"))
    assert "Against real retraining" in Page(build(tmp_path, experiment)).text
    put(tmp_path, "repair/repair.json", written(repair(removed=[7]), "c"))
    page = Page(build(tmp_path, experiment))
    assert "Against real retraining" not in page.text and "keep 25%" not in page.text
    assert "repair/verify.json is about another repair" in page.text and "--verify" in page.text
    (tmp_path / "repair/repair.json").unlink()
    assert "Against real retraining" not in Page(build(tmp_path, experiment)).text


def test_a_repair_of_other_data_is_left_out_and_figures_of_other_weights_are_told(tmp_path):
    experiment = images()
    everything(tmp_path, experiment)
    evidence = repair()["evidence"]
    put(tmp_path, "repair/repair.json", repair(evidence={**evidence, "fingerprints": {"train": "other"}}))
    page = Page(build(tmp_path, experiment))
    assert "repair/repair.json is about other training data" in page.text and "repair" not in page.ids
    mine = {"train": experiment.train.fingerprint(), "before": model_fingerprint(experiment.model)}
    put(tmp_path, "repair/repair.json", repair(evidence={**evidence, "fingerprints": mine}))
    assert not [n for n in read_run(tmp_path, experiment).notices if "weights" in n]
    method = uw.GradDot(experiment.model, experiment.task, progress=False).fit(experiment.train)
    method.attribute(experiment.query).save(tmp_path / "scores" / "ekfac")
    experiment.model[1].bias.data += 1.0  # trained again since
    notices = read_run(tmp_path, experiment).notices
    for name in ("scores/ekfac.safetensors", "repair/repair.json"):
        assert any(n.startswith(f"{name} was made with other weights") for n in notices), name
