"""What repairs leave on disk, and what they refuse."""

import json

import torch
from refusals import refused
from repairs import QUIET, WithStatistics, network, problem
from torch import nn

import upweight as uw
from upweight.repair import log

# Files -----------------------------------------------------------------------------------------------------------


def test_a_repair_is_saved_loaded_and_logged(tmp_path):
    model = network()
    data = uw.Examples(problem(), [f"row {i}" for i in range(60)])
    y = problem()[1]
    repair = uw.amend(
        model, uw.Classification(), data, remove=["row 1"], labels={"row 4": int(1 - y[4])}, l2=0.01, **QUIET
    )
    file = repair.save(tmp_path / "repair", experiment="mine", source="by hand")
    assert file.name == "repair.json"
    loaded = uw.Repair.load(tmp_path / "repair", WithStatistics())
    assert all(
        torch.equal(a, b)
        for a, b in zip(loaded.model.state_dict().values(), repair.model.state_dict().values())
    )
    assert loaded.to_json()["removed"] == ["row 1"] and loaded.evidence == json.loads(
        json.dumps(repair.evidence)
    )
    assert dict(loaded.change.labels) == {4: int(1 - y[4])} and loaded.change.ids == repair.change.ids
    assert not loaded.model.training and loaded.model.tied.weight is loaded.model.again.weight
    repair.save(tmp_path / "repair")
    lines = log.read(tmp_path / "repair/log.jsonl")
    assert len(lines) == 2 and lines[0]["experiment"] == "mine" and lines[0]["removed"] == ["row 1"]
    assert lines[0]["groups"]["forgotten"].keys() == {"n", "predicted", "actual"}
    assert lines[0]["fingerprints"]["before"] != lines[0]["fingerprints"]["after"]
    with refused("another architecture"):
        uw.Repair.load(tmp_path / "repair", nn.Linear(4, 2))


def test_damaged_files_are_refused(tmp_path):
    repair = uw.unlearn(network(), uw.Classification(), problem(), [1], l2=0.01, **QUIET)
    repair.save(tmp_path)
    weights, about = tmp_path / "model.safetensors", tmp_path / "repair.json"
    whole, text = weights.read_bytes(), about.read_text()
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    weights.write_bytes(bytes(flipped))
    with refused("damaged"):
        uw.Repair.load(tmp_path, WithStatistics())
    weights.write_bytes(whole)
    for damaged in (text[:100], "[]", json.dumps({"method": "newton"})):
        about.write_text(damaged)
        with refused("damaged|holds no"):
            uw.Repair.load(tmp_path, WithStatistics())
    about.unlink()
    with refused("cannot be read"):
        uw.Repair.load(tmp_path, WithStatistics())
    other = uw.unlearn(network(), uw.Classification(), problem(), [2], l2=0.01, **QUIET)
    other.save(tmp_path / "other")
    weights.write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    about.write_text(text)
    with refused("two different repairs"):
        uw.Repair.load(tmp_path, WithStatistics())


def test_the_audit_log_notices_what_is_changed_or_taken_out(tmp_path):
    file = tmp_path / "log.jsonl"
    for number in range(4):
        log.append(file, {"action": "repair", "removed": [number]})
    assert [line["removed"] for line in log.read(file)] == [[0], [1], [2], [3]]
    lines = file.read_bytes().splitlines(keepends=True)
    for damaged, where in (
        ([lines[0], lines[2], lines[3]], "line 2"),
        ([lines[0], lines[1].replace(b"[1]", b"[7]"), *lines[2:]], "line 3"),
        (lines[1:], "line 1"),
        ([*lines[:3], lines[3][:20]], "line 4"),
    ):
        file.write_bytes(b"".join(damaged))
        with refused(where):
            log.read(file)
    # A crash in the middle of a line costs that line, not the next one.
    file.write_bytes(b"".join(lines)[:-5])
    log.append(file, {"action": "verify"})
    assert file.read_bytes().splitlines()[-1].endswith(b'"action": "verify"}')


# Refusals --------------------------------------------------------------------------------------------------------


def test_bad_changes_are_one_line_errors():
    model, task, data = network(), uw.Classification(), problem()
    y = data[1]
    for change, message in [
        ({"remove": []}, "no ids were given"),
        ({"remove": [60]}, "60 not among the 60 training ids"),
        ({"remove": ["a"]}, "'a' not among"),
        ({"remove": [1, 1]}, "given twice"),
        ({"remove": range(60)}, "all 60 training examples would go"),
        ({}, "nothing would change"),
        ({"labels": {3: int(y[3])}}, "nothing would change"),
        ({"weights": {3: 1.0}}, "nothing would change"),
        ({"labels": {3: 2}}, "example 3 has label 2, expected 0 to 1"),
        ({"labels": {3: -1}}, "example 3 has label -1"),
        ({"labels": {3: 0.5}}, "expected a class number"),
        ({"labels": {3: "cat"}}, "expected one finite number"),
        ({"labels": {3: float("nan")}}, "expected one finite number"),
        ({"weights": {3: -1}}, "the weight of example 3 is -1"),
        ({"weights": {3: float("inf")}}, "the weight of example 3 is inf"),
        ({"weights": {3: True}}, "the weight of example 3 is True"),
        ({"remove": [3], "labels": {3: int(1 - y[3])}}, "example 3 is to be removed and also to be changed"),
        ({"weights": {3: 0}, "labels": {3: int(1 - y[3])}}, "example 3 gets weight 0 and also a label"),
    ]:
        with refused(message):
            uw.amend(model, task, data, **change, **QUIET)


def test_bad_options_are_one_line_errors():
    model, task, data = network(), uw.Classification(), problem()
    for options, message in [
        ({"method": "magic"}, "method='magic' is unknown"),
        ({"curvature": "magic"}, "curvature='magic' is unknown"),
        ({"convention": "magic"}, "convention='magic' is unknown"),
        ({"step_size": 0}, "step_size=0"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 3, "method": "influence"}, "steps=3 with method='influence'"),
        ({"steps": 1.5}, "steps=1.5 with method='newton'"),
        ({"steps": 0, "method": "fine_tune"}, "expected a positive number of passes"),
        ({"search_examples": 0}, "search_examples=0"),
        ({"curvature_examples": 0}, "curvature_examples=0"),
        ({"rate": 0.0}, "rate=0"),
        ({"batch": 0}, "batch=0"),
        ({"tolerance": -1.0}, "tolerance=-1"),
        ({"damping": -1.0}, "damping=-1"),
        ({"dampin": 1.0}, "no option 'dampin' -> damping="),
        ({"l2": -1.0}, "l2=-1"),
        ({"method": "last_layer", "parameters": "head"}, "parameters= does not go with"),
        ({"solver": "magic"}, "magic"),
        ({"validation": torch.zeros(0, 4)}, "validation: the data is empty"),
    ]:
        with refused(message):
            uw.unlearn(model, task, data, [1], **{**QUIET, **options})
    with refused("the model is str"):
        uw.unlearn("model", task, data, [1])
    with refused("task is str"):
        uw.unlearn(model, "task", data, [1])
    with refused("BatchNorm is in train mode"):
        uw.unlearn(network().train(), task, data, [1], **QUIET)
    with refused("the last layer alone needs a task of outputs|no linear layer"):
        functions = uw.Task.from_functions(
            lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="none")
        )
        uw.unlearn(model, functions, data, [1], method="last_layer", **QUIET)


def test_a_model_that_cannot_be_copied_is_refused():
    class Uncopied(nn.Linear):
        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    with refused("the model cannot be copied"):
        uw.unlearn(Uncopied(4, 2), uw.Classification(), problem(), [1], **QUIET)


def test_targets_of_several_numbers_cannot_be_relabelled_but_removed():
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    data = (x, x[:, :2] * 2)
    model = nn.Linear(4, 2)
    with refused("expected one number an example to relabel"):
        uw.relabel(model, uw.Regression(), data, {3: 1.0}, **QUIET)
    assert uw.unlearn(model, uw.Regression(), data, [3], **QUIET).evidence["groups"]["forgotten"]["of"] == 1
