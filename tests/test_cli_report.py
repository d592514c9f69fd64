"""`upweight report` and `upweight init`, as typed; and what every verb has in common."""

import json
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from projects import MADE, reviews, table
from run_folders import everything, images

import upweight as uw
from upweight.cli.init import VERBS


def test_a_report_of_an_experiment(upweight, place):
    everything(place / "run", images())
    code, out, err = upweight("report", "pets.py:experiment", "--out", "run")
    assert (
        code == 0
        and "Open run/report.html" in out
        and "Experiment 'pets'" in err
        and "not there yet" not in out
    )
    assert '<img src="data:image/png' in (place / "run/report.html").read_text()
    code, out, _ = upweight("report", "--out", "run", "--json")
    found = json.loads(out)
    assert code == 0 and found["missing"] == [] and found["experiment"] == "pets" and found["address"] is None
    assert found["bytes"] == (place / "run/report.html").stat().st_size and found["warnings"] == []
    assert "<img" not in (place / "run/report.html").read_text()


def test_what_is_missing_is_said_with_its_command(upweight, place):
    code, out, _ = upweight("attribute", "pets.py:experiment", "--method", "grad-dot", "--json")
    assert code == 0
    code, out, _ = upweight("report", "pets.py:experiment")
    assert code == 0 and "Open runs/pets/report.html" in out
    for verb in ("evaluate", "audit", "repair"):
        assert f"-> upweight {verb} pets.py:experiment --out runs/pets" in out
    found = json.loads(upweight("report", "pets.py:experiment", "--json")[1])
    assert [one["command"].split()[1] for one in found["missing"]] == ["evaluate", "audit", "repair"]


def test_files_that_do_not_belong_are_warned_of(upweight, place):
    everything(place / "run", images())
    (place / "run/issues.json").write_text("{")
    code, out, err = upweight("report", "--out", "run", "--json")
    assert code == 0 and json.loads(out)["warnings"] == [
        "issues.json cannot be read (JSONDecodeError): it is left out. Write it again."
    ]
    assert "warning: issues.json cannot be read" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report",), "neither an experiment nor a folder is named"),
        (("report", "--out", "nowhere"), "the run folder nowhere does not exist -> upweight attribute"),
        (("report", "pets.py:experiment", "--out", "nowhere"), "there is no run folder nowhere"),
        (("report", "pets.py:experiment"), "runs/pets does not exist -> upweight attribute"),
        (("report", "--out", "."), "holds nothing to report"),
        (("report", "--out", "pets.py"), "the run folder pets.py is a file"),
    ],
)
def test_a_report_of_nothing_is_refused(upweight, place, arguments, said):
    code, out, err = upweight(*arguments)
    last = err.splitlines()[-1]
    assert code == 2 and out == "" and last.startswith("error: ") and said in last and " -> " in last
    assert not (place / "nowhere").exists() and not (place / "runs").exists()


# init ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MADE)
def test_a_template_runs_from_attribute_to_report(upweight, place, kind):
    data = () if MADE[kind] is None else ("--data", str(MADE[kind](place).relative_to(place)))
    code, out, _ = upweight("init", "mine", "--kind", kind, "--name", f"my_{kind}", *data)
    address = f"mine/my_{kind}.py:experiment"
    assert (
        code == 0
        and f"upweight attribute {address}" in out
        and not re.search("@[A-Z]+@", (place / address[:-11]).read_text())
    )
    method = ("--method", "exact") if kind == "sklearn" else ()
    code, out, err = upweight("attribute", address, *method, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["unit"] and len(found["queries"]) == (
        100 if kind == "sklearn" else 8 if kind != "images" else 4
    )
    assert upweight("report", address)[0] == 0
    page = (place / f"runs/my_{kind}/report.html").read_text()
    shown = {
        "images": 'alt="training example dark/',
        "csv": "<bdi>area</bdi>",
        "text": "&lt; b &gt; number",
        "sklearn": "<bdi>mean radius</bdi>",
    }
    assert shown[kind] in page
    experiment = uw.Experiment.load(address)
    half = range(0, experiment.train.n, 2)
    first, again, other = (experiment.train_fn(np.array(half), seed) for seed in (0, 0, 1))
    changed = experiment.train_fn(np.array(half), 0, labels={2: 0, 4: 0, 6: 0, 8: 0})
    states = [
        torch.cat([p.flatten() for p in model.parameters()]) for model in (first, again, other, changed)
    ]
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2]) and not torch.equal(states[0], states[3])


def test_a_table_of_numbers_becomes_a_regression(upweight, place):
    table(place, regression=True)
    upweight("init", "--kind", "csv", "--data", "houses.csv")
    experiment = uw.Experiment.load("experiment.py:experiment")
    assert type(experiment.task) is uw.Regression and experiment.features == ["area", "rooms"]
    assert upweight("attribute", "experiment.py:experiment")[0] == 0


def test_the_hugging_face_template_runs(upweight, place, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = reviews(place, labels=("0", "1"))
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "a",
        "dull",
        "slow",
        "poor",
        "bright",
        "quick",
        "fine",
        "film",
    ]
    (place / "model").mkdir()
    (place / "model/vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(place / "model/vocab.txt")).save_pretrained(place / "model")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=len(words), num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(place / "model")
    upweight("init", "--kind", "huggingface", "--data", str(data))
    file = place / "experiment.py"
    file.write_text(file.read_text().replace("'distilbert-base-uncased'", repr(str(place / "model"))))
    code, out, err = upweight("attribute", "experiment.py:experiment", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["info"]["coverage"]["parameters"] == 1 and "film" in found["queries"][0]["shown"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("init", "--name", "my-file"), "the name 'my-file' cannot be imported"),
        (("init", "--name", "class"), "the name 'class' cannot be imported"),
        (("init", "--name", "../up"), "cannot be imported"),
        (("init", "--kind", "sklearn", "--data", "x"), "--data is not used by the sklearn template"),
        (("init", "pets.py"), "pets.py cannot be written"),
        (("init", "--name", "pets"), "pets.py is there already -> --force replaces it"),
    ],
)
def test_init_refuses_in_one_line(upweight, place, arguments, said):
    before = {file: file.read_bytes() for file in place.iterdir()}
    code, out, err = upweight(*arguments)
    assert code == 2 and out == "" and said in err and " -> " in err and err.count("\n") == 1
    assert {file: file.read_bytes() for file in place.iterdir()} == before


def test_init_prints_commands_that_can_be_typed_and_keeps_projects_apart(upweight, place):
    """A path with a space is quoted; and two projects do not share the folder runs/experiment."""
    for folder in ("my photos", "others"):
        code, out, _ = upweight("init", folder, "--kind", "sklearn", "--json")
        found = json.loads(out)
        assert code == 0 and [shlex.split(one)[1] for one in found["commands"]] == list(VERBS)
        assert {shlex.split(one)[2] for one in found["commands"]} == {f"{folder}/experiment.py:experiment"}
    code, out, err = upweight(
        "attribute", "my photos/experiment.py:experiment", "--method", "exact", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["experiment"] == "my photos" and [p.name for p in (place / "runs").iterdir()] == [
        "my-photos"
    ]
    assert uw.Experiment.load("others/experiment.py:experiment").name == "others"


def test_init_tells_programs_and_replaces_only_when_told(upweight, place):
    code, out, _ = upweight("init", "--kind", "csv", "--json")
    found = json.loads(out)
    assert code == 0 and found["file"] == "experiment.py" and found["kind"] == "csv"
    assert found["commands"][0] == "upweight attribute experiment.py:experiment"
    assert upweight("init", "--kind", "text")[0] == 2
    assert upweight("init", "--kind", "text", "--force")[0] == 0
    assert "texts.csv" in (place / "experiment.py").read_text()
    code, _, err = upweight("init", "--kind", "video")
    assert code == 2 and "video" in err and "Traceback" not in err


def test_data_that_is_not_there_is_named(upweight, place):
    for kind, said in (("images", "no images in"), ("csv", "data.csv"), ("text", "texts.csv")):
        upweight("init", "--kind", kind, "--name", f"no_{kind}")
        code, _, err = upweight("attribute", f"no_{kind}.py:experiment")
        assert code == 2 and said in err.splitlines()[-1] and "Traceback" not in err


# Every verb ----------------------------------------------------------------------------------------------------------


def verbs():
    from typer.main import get_command

    from upweight.cli import app

    return sorted(get_command(app).commands)


def test_every_verb_has_help_with_examples_and_a_debug_option(upweight):
    assert {"attribute", "demo", "evaluate", "init", "report"} <= set(verbs())
    for verb in verbs():
        code, out, _ = upweight(verb, "--help")
        assert code == 0 and f"upweight {verb}" in out and "Examples" in out and "--debug" in out, verb


ON_EXPERIMENTS = [
    verb for verb in ("attribute", "audit", "evaluate", "explore", "repair", "report") if verb in verbs()
]


@pytest.mark.parametrize("verb", ON_EXPERIMENTS)
@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("nowhere.py:experiment", "does not exist"),
        ("pets.py:experimant", "has no 'experimant'"),
        ("pets.py", "expected path/to/file.py:name"),
        ("raises.py:experiment", "raised ZeroDivisionError: division by zero (line 1: 1 / 0)"),
        ("raises.py:[bold]", "is no experiment"),
    ],
)
def test_every_verb_names_a_bad_experiment_in_one_line(upweight, place, verb, address, said):
    (place / "raises.py").write_text("1 / 0")
    code, out, err = upweight(verb, address, "--json")
    assert code == 2 and out == "" and said in err.splitlines()[-1] and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: ") and not (place / "runs").exists()
    with pytest.raises(uw.UpweightError):
        upweight(verb, address, "--json", "--debug")


@pytest.mark.parametrize("verb", [verb for verb in ON_EXPERIMENTS if verb != "explore"])
def test_every_verb_ends_on_ctrl_c_with_130(upweight, place, verb):
    (place / "stops.py").write_text("def experiment():\n    raise KeyboardInterrupt")
    code, out, err = upweight(verb, "stops.py:experiment", "--json")
    assert code == 130 and out == "" and "stopped" in err and "Traceback" not in err


def test_the_first_page_of_help_teaches_by_an_example(upweight):
    code, out, _ = upweight("--help")
    assert code == 0 and "upweight init --kind sklearn" in out and "upweight audit experiment.py" in out


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("upweight au", {"audit"}),
        ("upweight audit --prec", {"--precision"}),
        ("upweight re", {"repair", "report"}),
    ],
)
def test_a_shell_completes_verbs_and_options(words, completed):
    """As bash asks: the words so far in the environment, and the candidates on standard output, one a line."""
    asks = {"_UPWEIGHT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    call = "from upweight.cli import app; app(prog_name='upweight')"
    found = subprocess.run(
        [sys.executable, "-c", call], env={**os.environ, **asks}, capture_output=True, text=True, timeout=120
    )
    assert set(found.stdout.split()) == completed, found.stderr
