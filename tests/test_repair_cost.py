"""What a repair must not do: harm the model, or run it more often than it needs to."""

import time

import numpy as np
import pytest
import torch
from repairs import QUIET, network, problem
from torch import nn

import upweight as uw
from upweight.curvature import solved
from upweight.demo.experiment import demo_experiment
from upweight.demo.sources import open_images
from upweight.repair import account, amend, descent, work
from upweight.repair.change import read_change
from upweight.repair.options import read_options
from upweight.repair.vectors import combine, dot

# No harm ---------------------------------------------------------------------------------------------------------


def digits_with_flips(seed):
    """The demo's network on 1,438 digits, 100 of whose flipped labels are to be corrected; and 359 test images."""
    experiment = demo_experiment(seed=seed)
    given = experiment.train.take(range(experiment.train.n))[1]
    true = open_images(None, None, None, seed).train.labels
    wrong = torch.nonzero(true != given).flatten()[:100]
    labels = {experiment.train.ids[int(i)]: int(true[i]) for i in wrong}
    x, y = experiment.query.take(range(experiment.query.n))

    def accuracy(model):
        with torch.no_grad():
            return float((model(x).argmax(1) == y).double().mean())

    return experiment, labels, accuracy


@pytest.mark.parametrize("seed", [0, 1])
def test_the_default_does_not_make_a_network_worse(seed, monkeypatch):
    """Flipped digits: a step that goes beyond its quadratic model lowers the objective, and the accuracy too."""
    experiment, labels, accuracy = digits_with_flips(seed)
    given = (experiment.model, experiment.task, experiment.train, labels)
    before = accuracy(experiment.model)
    for l2 in (0.01, 0.0):  # with the weight decay of the training, and without having said it
        repair = uw.relabel(*given, l2=l2, **QUIET)
        groups = repair.evidence["groups"]
        assert accuracy(repair.model) >= before
        assert groups["retained"]["accuracy_after"] >= groups["retained"]["accuracy_before"]
        assert groups["repaired"]["actual"] < -0.1
        assert repair.evidence["objective"]["trust_ratio"] > 0.5
    if seed == 0:  # the situation is real: this is what any decrease of the objective is worth
        monkeypatch.setattr(descent, "TRUSTED", 1e-4)
        with pytest.warns(UserWarning, match="accuracy on the retained examples fell from 9.* -> "):
            eager = uw.relabel(*given, l2=0.0, **QUIET)
        assert eager.evidence["objective"]["actual"] < 0 and accuracy(eager.model) < before - 0.01


def test_where_no_step_helps_the_model_stays_and_it_is_said(monkeypatch):
    model = network()
    x, y = problem()
    labels = {i: int(1 - y[i]) for i in (3, 4)}
    given = (model, uw.Classification(), (x, y), labels)
    # Held out are the old labels of the same examples: every step towards the new ones is worse there.
    held = x[[3, 4]], y[[3, 4]]
    with pytest.warns(UserWarning, match="no step of method='newton' lowers the held-out loss.* -> "):
        repair = uw.relabel(*given, validation=held, l2=0.01, **QUIET)
    assert repair.evidence["parameters"]["moved"] == 0 and repair.evidence["steps"][0]["step_size"] == 0
    for a, b in zip(model.state_dict().values(), repair.model.state_dict().values()):
        assert torch.equal(a, b)
    monkeypatch.setattr(descent, "TRUSTED", 1e9)
    with pytest.warns(UserWarning, match="no step of method='newton' has half of its predicted effect"):
        repair = uw.relabel(*given, l2=0.01, **QUIET)
    assert repair.evidence["parameters"]["moved"] == 0


def test_an_objective_that_rises_is_said():
    """Fine-tuning takes its steps as they come."""
    model = network()
    options = {"method": "fine_tune", "curvature": "identity", "damping": 1.0, "l2": 0.01, **QUIET}
    with (
        pytest.warns(UserWarning, match="the changed training objective rose by .* -> a smaller rate="),
        pytest.warns(UserWarning, match="accuracy on the retained examples fell from 100.0% to"),
    ):
        repair = uw.unlearn(model, uw.Classification(), problem(), [3], rate=30.0, steps=0.5, **options)
    assert repair.evidence["steps"][0]["batches"] == 1  # half a pass over 59 in batches of 128: one at least


# Cost ------------------------------------------------------------------------------------------------------------


def rows_seen(model):
    """{"n": examples that went through copies of the model from now on}."""
    seen = {"n": 0}

    def count(_, args):
        seen["n"] += len(args[0])

    model.register_forward_pre_hook(count)
    return seen


@pytest.mark.parametrize("finish", [False, True])
def test_a_sample_of_the_objective_has_the_exact_slope(finish):
    """Only what lies beyond the linear term is estimated."""
    model = network(lambda: nn.Linear(4, 2), steps=20).double()
    x, y = problem()
    examples = uw.Examples((x.double(), y))
    values = {}
    for most in (20, 60):
        settings = read_options(
            {"l2": 0.01, "search_examples": most, "finish": finish, "step_size": 1e-9, **QUIET}
        )
        change = read_change(examples, labels={4: int(1 - y[4])})
        sought = work.Work(model, uw.Classification(), examples, change, settings, None).run().descent
        assert sought.search.examples.n == most
        u = {name: torch.arange(v.numel()).reshape(v.shape).double() for name, v in sought.start.items()}
        at = []
        for t in (0.0, 1e-6, -1e-6, 0.5):
            sought.place(combine(sought.start, u, t))
            at.append(sought.value())
        sought.place(sought.start)
        assert (at[1] - at[2]) / 2e-6 == pytest.approx(dot(sought.first, u), rel=1e-5)
        values[most] = at[3] - at[0]
        # What goes before the sample is the whole data's: the same gradient whatever is drawn.
        values["slope", most] = dot(sought.first, u)
    assert values["slope", 20] == pytest.approx(values["slope", 60], rel=1e-12)
    assert values[20] != values[60] and values[20] == pytest.approx(values[60], rel=0.5)


def test_no_pass_over_the_data_is_made_twice(monkeypatch):
    """Rows that go through the model while it is amended, counted by hand: removing 3 of 60, the sample of 40."""
    model, amended = network(), []
    seen = rows_seen(model)  # the hook goes along with the copy, and counts there

    class Counted(work.Work):
        def run(self):
            before = seen["n"]
            found = super().run()
            amended.append(seen["n"] - before)
            return found

    monkeypatch.setattr(amend, "Work", Counted)
    options = {"l2": 0.01, "search_examples": 40, "batch_size": 7, **QUIET}
    repair = uw.unlearn(model, uw.Classification(), problem(), [0, 7, 9], method="gradient", **options)
    assert repair.evidence["search_examples"] == {"n": 40, "of": 57}
    tried = 1 + round(-np.log2(repair.evidence["steps"][0]["step_size"]))
    # The change's gradient; the sample's gradient before, and along the step's direction; every step size tried.
    assert amended == [3 + 40 + 40 + 40 * tried]


@pytest.mark.parametrize("method", ["newton", "fine_tune", "corrected"])
def test_layers_that_stay_as_they_are_run_once(method, monkeypatch):
    """The same repair, with what goes into the later layers kept, and without."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)
    model = network(lambda: nn.Sequential(*layers)).double()
    x, y = problem()
    data, labels = (x.double(), y), {i: int(1 - y[i]) for i in (3, 40)}
    seen = rows_seen(model[0])
    options = {"method": method, "parameters": r"[24]\.", "l2": {r"\.weight": 0.01}, "damping": 0.1, **QUIET}
    rows = {}
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr(work, "find_tail", lambda *args: None)
        before = seen["n"]
        repair = uw.relabel(model, uw.Classification(), data, labels, test=data, **options)
        rows[kept] = seen["n"] - before, repair
    (few, a), (many, b) = rows[True], rows[False]
    for name, value in a.model.state_dict().items():
        assert float((value - b.model.state_dict()[name]).abs().max()) < 1e-12, name
        assert torch.equal(value, model.state_dict()[name]) == name.startswith("0.")
    assert a.evidence["objective"]["actual"] == pytest.approx(b.evidence["objective"]["actual"], rel=1e-9)
    for name, value in a.evidence["residual_gradient_norm"].items():
        assert value == pytest.approx(b.evidence["residual_gradient_norm"][name], rel=1e-9), name
    assert few < many - 60  # two passes less, at the least


def test_times_of_the_repair_and_of_its_evidence_are_two(monkeypatch):
    def slow(*args, real=account.account):
        until = time.process_time() + 0.3
        while time.process_time() < until:
            pass
        return real(*args)

    monkeypatch.setattr(amend, "account", slow)
    evidence = uw.unlearn(network(), uw.Classification(), problem(), [3], l2=0.01, **QUIET).evidence
    assert evidence["evidence_processor_seconds"] >= 0.3 and evidence["evidence_seconds"] >= 0.3
    assert evidence["processor_seconds"] < 5 and evidence["seconds"] > 0


def test_the_last_layer_is_at_its_minimum_after_one_choice_of_damping(monkeypatch):
    """Chosen anew for every step, the damping took most of the time and held every step back."""
    chosen = []
    found = solved.auto_damping
    monkeypatch.setattr(solved, "auto_damping", lambda *a: chosen.append(1) or found(*a))
    repair = uw.unlearn(network(), uw.Classification(), problem(), [1, 2], method="last_layer", **QUIET)
    steps = repair.evidence["steps"]
    assert steps[-1]["gradient_norm"] < 1e-6 * steps[0]["gradient_norm"]
    assert len(chosen) == 1 and len(steps) < 30


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "ekfac"},
        {"curvature": "kfac"},
        {"tolerance": 0.0},
        {"damping": 1e-3, "tolerance": 0.0},
    ],
)
def test_the_last_layer_comes_to_an_end_with_any_curvature(options):
    """A damping that is made smaller at every step must not end as none."""
    repair = uw.unlearn(
        network(), uw.Classification(), problem(), list(range(9)), method="last_layer", **options, **QUIET
    )
    steps = repair.evidence["steps"]
    assert steps[-1]["gradient_norm"] < 0.05 * steps[0]["gradient_norm"]
    if "damping" in options:  # what was asked for is what is used
        assert set(repair.evidence["solver"]["damping"].values()) == {1e-3}
