"""Experiments are found by their address, and whatever is wrong with one is said in one line."""

import sys
import textwrap

import pytest
import torch
from refusals import refused

import upweight as uw
from upweight.attributors.by_name import BASELINES, METHODS, build, known
from upweight.evaluate.comparison import is_baseline

SMALL = """
import torch, upweight as uw
x, y = torch.arange(6.0)[:, None], torch.tensor([0, 0, 0, 1, 1, 1])
experiment = uw.Experiment(torch.nn.Linear(1, 2), uw.Classification(), (x, y), (x[:2], y[:2]), name="small")
def made():
    return experiment
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file; gives its path. What loading it does to the interpreter is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(text=SMALL, name="mine.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
        return file

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("name", ["experiment", "made"])
def test_an_experiment_is_found_in_a_file(write, name):
    loaded = uw.Experiment.load(f"{write()}:{name}")
    assert (loaded.name, loaded.train.n, loaded.query.n) == ("small", 6, 2)
    assert "cannot be retrained" in repr(loaded)


def test_an_experiment_is_found_in_a_module_of_the_working_folder(write, tmp_path, monkeypatch):
    write("", "our_package/__init__.py")
    write(name="our_package/runs.py")
    monkeypatch.chdir(tmp_path)
    assert uw.Experiment.load("our_package.runs:made").name == "small"


def test_a_decorated_function_is_called(write):
    file = write(SMALL + "from functools import lru_cache\ncached = lru_cache(made)")
    assert uw.Experiment.load(f"{file}:cached").name == "small"


def test_a_file_may_import_its_neighbours_and_be_imported_by_workers(write):
    write("size = 3", "neighbour_of_mine.py")
    file = write(SMALL + "import neighbour_of_mine\ndef train_fn(indices, seed): pass")
    uw.Experiment.load(f"{file}:experiment")
    assert sys.modules["mine"].train_fn.__module__ == "mine" and sys.path[0] == str(file.parent)


def test_files_of_one_name_in_two_folders_do_not_mix(write):
    first, second = write(name="a/mine.py"), write(SMALL.replace('"small"', '"other"'), "b/mine.py")
    assert [uw.Experiment.load(f"{file}:made").name for file in (first, second, first)] == [
        "small",
        "other",
        "small",
    ]


def test_a_file_that_changed_is_read_again(write):
    uw.Experiment.load(f"{write()}:experiment")
    file = write(SMALL.replace('"small"', '"changed"'))
    assert uw.Experiment.load(f"{file}:experiment").name == "changed"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("mine.py", r"expected path/to/file.py:name .* -> mine.py:experiment"),
        ("mine.py:", "expected path/to/file.py:name"),
        (":experiment", "expected path/to/file.py:name"),
        ("mine.py:a b", "expected path/to/file.py:name"),
        ("min.py:experiment", r"min.py does not exist \(looked from .*did you mean mine.py\?"),
        ("no/where.py:experiment", "there is no folder no"),
        ("folder.py:experiment", "folder.py is a folder"),
        ("./data.csv:experiment", "is no Python file"),
        ("mine.py:experimnt", "mine.py has no 'experimnt' -> mine.py:experiment"),
        ("nothing.py:x", "nothing.py has no 'x' -> define x there"),
        ("mine.py:y", "is of type Tensor, expected an upweight.Experiment or a function"),
        ("mine.py:uw", "is of type module, expected"),
        ("model.py:model", "is of type Linear, expected"),
        ("model.py:Net", "is the class Net, expected"),
        ("model.py:train", "is of type function, expected"),
        ("no_such_package.runs:experiment", "there is no module 'no_such_package'"),
        ("json.py:experiment", "'json' is that of a module .* -> rename the file"),
    ],
)
def test_a_bad_address_is_refused(write, tmp_path, monkeypatch, address, said):
    write()
    write("", "nothing.py")
    write("", "json.py")
    write("a,b", "data.csv")
    write("import torch\nclass Net: pass\nmodel = torch.nn.Linear(1, 1)\ndef train(x): pass", "model.py")
    (tmp_path / "folder.py").mkdir()
    monkeypatch.chdir(tmp_path)
    with refused(said):
        uw.Experiment.load(address)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = 1\nb = a / 0", r"raised ZeroDivisionError: division by zero \(line 2: b = a / 0\)"),
        ("import math\ndef f():\n  return math.sqrt(-1)\nx = f()", r"raised ValueError.*line 3: return math"),
        ("import torch\ntorch.zeros(2) @ torch.zeros(3)", r"raised RuntimeError.*\(line 2: torch.zeros"),
        ("def broken(:\n  pass", r"raised SyntaxError: .* \(line 1: def broken\(:\)"),
        ("import no_such_library", r"raised ModuleNotFoundError: No module.*line 1: import no_such_library"),
        ("import sys\nsys.exit(3)", r"raised SystemExit: 3 \(line 2: sys.exit\(3\)\)"),
        ("raise RuntimeError('two\\nlines')", "raised RuntimeError: two lines"),
        ("import upweight as uw\nuw.Experiment(1, 2, 3, 4)", r"\(line 2.*\): the experiment's model is int"),
        ("def experiment():\n    return {}['key']", r"experiment\(\) in .*raised KeyError: 'key' \(line 2: "),
    ],
)
def test_a_file_that_raises_is_named_with_its_own_last_line(write, text, said):
    with refused(said):
        uw.Experiment.load(f"{write(text)}:experiment")


def test_what_an_experiment_is_made_of_is_checked():
    x, y = torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)
    good = {"model": torch.nn.Linear(1, 2), "task": uw.Classification(), "train": (x, y), "query": (x, y)}
    for changed, said in [
        ({"model": "resnet"}, "model is str"),
        ({"task": "classification"}, "task is str"),
        ({"train": "train.csv"}, "the experiment's train: the data is str"),
        ({"query": (x, y[:2])}, "the experiment's query: tensors have first axes"),
        ({"train_fn": 3}, "train_fn is int"),
        ({"show": "text"}, "show is str"),
        ({"classes": "cat"}, "classes='cat' is one text"),
        ({"methods": [uw.GradDot]}, "methods is no mapping"),
        ({"methods": {}}, "methods is no mapping"),
        ({"name": ""}, "the experiment's name is ''"),
        ({"name": " "}, "the experiment's name is ' '"),
        ({"l2": -1.0}, "the experiment's l2=-1.0, expected finite numbers >= 0"),
        ({"l2": {"weight$": float("nan")}}, "the experiment's l2=nan"),
        ({"l2": {"wieght$": 0.1}}, "names 'wieght\\$', which finds none of ..weight., .bias.."),
        ({"l2": {"weight(": 0.1}}, "names 'weight\\(', expected a regular expression"),
        ({"l2": "1e-3"}, "the experiment's l2='1e-3'"),
    ]:
        with refused(said):
            uw.Experiment(**{**good, **changed})
    assert uw.Experiment(**good).l2 == 0 and uw.Experiment(**good, l2=1e-3).l2 == 1e-3
    assert uw.Experiment(**good, l2={"weight$": 1e-3}).l2 == {"weight$": 1e-3}


def test_examples_are_described_by_show_or_by_their_class():
    x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 1, 5])
    data = uw.Examples((x, y), ["a", "b", "c"])
    plain = {"model": torch.nn.Linear(1, 2), "task": uw.Classification(), "train": data, "query": data}
    assert uw.Experiment(**plain).describe(data, [2, 0]) == ["5", "0"]
    assert uw.Experiment(**plain, classes=["cat", "dog"]).describe(data, [0, 1, 2]) == ["cat", "dog", "5"]
    words = uw.Experiment(**plain, show=lambda example: f"{example[0].item():g} is {int(example[1])}")
    assert words.describe(data, [1]) == ["2 is 1"] and words.describe(data, []) == []
    with refused("show.example. raised ZeroDivisionError on example 'b'"):
        uw.Experiment(**plain, show=lambda example: 1 / 0).describe(data, [1])


def test_methods_are_built_by_name():
    model, task = torch.nn.Linear(2, 2), uw.Classification()
    for name in known():
        if name not in ("bm25",):
            assert hasattr(build(name, model, task), "attribute")
    made = build("Influence_of_mine", model, task, {"influence-of-mine": lambda m, t: uw.GradCos(m, t)})
    assert type(made) is uw.GradCos
    ready = uw.GradDot(model, task)
    assert build("mine", model, task, {"mine": ready}) is ready
    made = build("ggn:damping=0.5:solver=cg:l2=1e-3", model, task)
    assert (made.curvature, made.solver, made.l2) == ("ggn", "cg", 1e-3)
    assert not set(METHODS) & set(BASELINES)
    for spec, said in [
        ("magic", "there is no method 'magic' -> one of ekfac"),
        ("ekfac:dampin=1", "has no option 'dampin' -> one of curvature, damping"),
        ("ekfac:damping", "'damping' is no option"),
        ("ekfac:damping=-1", "-1"),
    ]:
        with refused(said):
            build(spec, model, task)
    with refused("set its options there"):
        build("mine:l2=1", model, task, {"mine": ready})
    with refused("set its options there"):
        build("mine:oops", model, task, {"mine": ready})
    with refused("'mine' is int, expected an attributor"):
        build("mine", model, task, {"mine": lambda model, task: 3})


def test_methods_of_ones_own_are_told_apart_by_their_exact_names():
    model, task = torch.nn.Linear(2, 2), uw.Classification()
    own = {
        name: uw.GradDot(model, task) for name in ("inf", "Inf", "in_f", "ggn:damping=1", "a:b:c", "loss:b")
    }
    for name, method in own.items():
        assert build(name, model, task, own) is method
    assert build("A:B:C", model, task, own) is own["a:b:c"]
    assert build("ggn:damping=2", model, task, own).damping.value == 2  # the library's
    with refused("'INF' may be 'inf' or 'Inf' -> spell it as the experiment does"):
        build("INF", model, task, own)
    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    experiment = uw.Experiment(model, task, (x, y), (x, y), methods=own)
    assert [is_baseline(name, experiment) for name in ("loss:b", "loss", "inf")] == [False, True, False]
