"""Files of methods never overwrite each other, whatever the methods are called."""

import pytest

import upweight as uw
from upweight._file_names import file_name, folder_name
from upweight.report.run_files import read_run

ALIKE = [
    "inf (1)",
    "inf [1]",
    "inf--1-",
    "Inf (1)",
    "inf",
    "Inf",
    "INF",
    "in/f",
    "in-f",
    "in:f",
    "in+f",
    "in~f",
    "nul",
]
ODD = [
    "",
    ".",
    "..",
    "...",
    " ",
    "-",
    "_",
    "/",
    "con",
    "CON.x",
    "con.x",
    "_con",
    "inf.safetensors",
    "x" * 300,
    "x" * 301,
]
SPELLINGS = [
    "\u00e9t\u00e9",
    "e\u0301te\u0301",
    "\u00c9t\u00e9",
    "\ud800",
    "\udfff",
    "ggn:damping=.1",
    "ggn:damping=.1.",
]

METHODS = """
import torch, upweight as uw
from run_folders import images

def experiment():
    made = images()
    methods = {name: uw.Random(made.model, made.task, seed=k) for k, name in enumerate(%r)}
    def train_fn(indices, seed):
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
        x, y = made.train.take(indices)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        return model
    return uw.Experiment(
        made.model, made.task, made.train, made.query, train_fn, methods=methods, name="pets", classes=made.classes
    )
"""


def test_no_two_methods_share_a_file_on_any_disk():
    names = [*ALIKE, *ODD, *SPELLINGS]
    files = [file_name(name) for name in names]
    assert len({file.casefold() for file in files}) == len(names)
    for file in [*files, *map(folder_name, names)]:
        assert file.strip(". ") == file and 0 < len(file.encode()) < 150
        assert file.split(".")[0].lower() not in ("con", "nul") and not set(file) & set('/\\\\<>:"|?*')


def test_plain_names_stay_as_they_are():
    for name in ("ekfac", "grad-dot", "my_own.v2", "\u00e9t\u00e9"):
        assert file_name(name) == folder_name(name) == name
    assert folder_name("CIFAR-10 (small)") == "CIFAR-10--small-"


def test_the_report_shows_the_scores_of_the_method_it_names(upweight, place):
    names = ["inf (1)", "inf [1]", "Inf", "inf"]
    (place / "named.py").write_text(METHODS % names)
    code, _, err = upweight("evaluate", "named.py:experiment", "--subsets", "4", "--seeds", "1")
    assert code == 0, err
    experiment = uw.Experiment.load("named.py:experiment")
    run = read_run(place / "runs/pets", experiment)
    assert set(names) <= set(run.methods) and len(
        {file.name.lower() for file in run.methods.values()}
    ) == len(run.methods)
    for name in names:
        own = experiment.methods[name].fit(experiment.train).attribute(experiment.query)
        assert uw.Scores.load(run.methods[name]).values.equal(own.values)
    assert run.method in names


@pytest.mark.parametrize(("name", "folder"), [("..", "_"), ("NUL", "_NUL"), ("a/../..", "a-..-")])
def test_a_run_stays_within_runs(upweight, place, name, folder):
    (place / "odd.py").write_text(
        f"from run_folders import images\ndef experiment():\n    return images(name={name!r})\n"
    )
    code, _, err = upweight("attribute", "odd.py:experiment", "--method", "grad-dot", "--json")
    assert code == 0, err
    assert [file.name for file in (place / "runs").iterdir()] == [folder]
    (place / "odd.py").write_text(
        "from run_folders import images\ndef experiment():\n    return images(name='')\n"
    )
    code, _, err = upweight("attribute", "odd.py:experiment")
    assert code == 2 and "the experiment's name is ''" in err.splitlines()[-1]
