"""Which tensor of a batch a new label goes to, what a new label or weight may be, and what is no change."""

from collections import namedtuple
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from refusals import refused
from torch import nn

import upweight as uw
from upweight.data import Examples
from upweight.repair.change import read_change

OPTIONS = {"curvature": "hessian", "damping": 0.1, "step_size": 1.0, "progress": False}


def problem():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (30,), generator=generator)
    w = torch.rand(30, generator=generator, dtype=torch.float64) + 0.5
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), x, y, w


def weighted(model, batch):
    x, y, w = batch
    return F.cross_entropy(model(x), y, reduction="none") * w


def named(model, batch):
    return weighted(model, (batch["x"], batch["labels"], batch["weight"]))


def test_the_weights_of_a_batch_are_not_taken_for_its_targets():
    model, x, y, w = problem()
    task, new = uw.Task.from_functions(weighted), {2: int((y[2] + 1) % 3)}
    for data in ((x, y, w), list(zip(x, y, w))):
        with refused('which is the target.* -> give the data as a dict with the targets as "labels"'):
            uw.relabel(model, task, data, new, **OPTIONS)
    with refused("which is the target"):
        uw.amend(model, task, (x, y, w), remove=[5], labels=new, **OPTIONS)
    # ... and what needs no target goes on: removals, and weights beside the batch's own.
    assert uw.amend(model, task, (x, y, w), remove=[5], weights={2: 0.5}, **OPTIONS).change.weights == {
        2: 0.5
    }


def test_the_way_out_relabels():
    model, x, y, w = problem()
    new = int((y[2] + 1) % 3)
    data = {"x": x, "labels": y, "weight": w}
    repair = uw.relabel(model, uw.Task.from_functions(named), data, {2: new}, **OPTIONS)
    # A Newton step by the whole Hessian: the changed gradient at the trained weights says where it goes.
    other = y.clone()
    other[2] = new
    change = weighted(model, (x, other, w)).sum() - weighted(model, (x, y, w)).sum()
    gradient = torch.autograd.grad(change / 30, model.weight)[0]
    step = (repair.model.weight - model.weight).detach()
    assert float(F.cosine_similarity(-gradient.flatten(), step.flatten(), dim=0)) > 0.9
    with torch.no_grad():
        before, after = (named(m, {**data, "labels": other})[2] for m in (model, repair.model))
    assert after < before


def test_a_task_of_ones_own_class_says_no_more():
    class Mine(uw.Task):
        def train_loss(self, model, batch):
            return weighted(model, batch)

    model, x, y, w = problem()
    with refused("which is the target"):
        uw.relabel(model, Mine(), (x, y, w), {2: int((y[2] + 1) % 3)}, **OPTIONS)


def test_pairs_and_tasks_of_outputs_take_the_last_tensor():
    model, x, y, _ = problem()
    new = {2: int((y[2] + 1) % 3)}
    plain = uw.Task.from_functions(lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none"))
    by_functions = uw.relabel(model, plain, (x, y), new, **OPTIONS)
    by_outputs = uw.relabel(model, uw.Classification(), (x, y), new, **OPTIONS)
    torch.testing.assert_close(by_functions.model.weight, by_outputs.model.weight)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = model

        def forward(self, inputs, scale):
            return self.layer(inputs * scale)

    many = uw.relabel(Scaled(), uw.Classification(), (x, torch.ones(30, 1).double(), y), new, **OPTIONS)
    torch.testing.assert_close(many.model.layer.weight, by_outputs.model.weight)


Pair = namedtuple("Pair", ["inputs", "answer"])


def test_a_relabelled_batch_keeps_its_names():
    model, x, y, _ = problem()
    task = uw.Task.from_functions(lambda m, b: F.cross_entropy(m(b.inputs), b.answer, reduction="none"))
    repair = uw.relabel(model, task, Pair(x, y), {2: int((y[2] + 1) % 3)}, **OPTIONS)
    assert repair.evidence["groups"]["repaired"]["actual"] < 0


@pytest.mark.parametrize(
    "weight",
    [
        np.float32(0.5),
        np.float64(0.5),
        np.array(0.5),
        torch.tensor(0.5),
        torch.tensor([0.5]).bfloat16(),
        Fraction(1, 2),
    ],
)
def test_a_weight_is_any_real_number(weight):
    model, x, y, _ = problem()
    assert uw.reweight(model, uw.Classification(), (x, y), {3: weight}, **OPTIONS).change.weights == {3: 0.5}


def test_whole_weights_are_those_of_any_type():
    examples = Examples(problem()[1:3])
    for two, nought, one in ((np.int64(2), np.uint8(0), np.int32(1)), map(torch.tensor, (2, 0, 1))):
        change = read_change(examples, weights={3: two, 4: nought, 5: one})
        assert change.weights == {3: 2.0} and change.removed == [4] and list(change.ids) == [3, 4]


@pytest.mark.parametrize(
    "weight",
    [
        True,
        np.True_,
        torch.tensor(True),
        np.float32("nan"),
        torch.tensor(-1),
        np.inf,
        "1",
        None,
        1j,
        [0.5, 1],
    ],
)
def test_what_is_no_weight_is_refused(weight):
    with refused("expected a finite number >= 0"):
        read_change(Examples(problem()[1:3]), weights={3: weight})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_label_is_the_given_one_in_the_targets_precision(dtype):
    targets = torch.linspace(0, 1, 30).to(dtype)
    targets[3] = 0.1
    examples = Examples((torch.ones(30, 2), targets))
    for same in (0.1, torch.tensor(0.1, dtype=dtype), targets[3]):
        with refused("nothing would change"):
            read_change(examples, labels={3: same})
    change = read_change(examples, labels={3: 0.1, 4: np.float32(0.75), 5: torch.tensor([0.5]).bfloat16()})
    assert change.labels == {4: 0.75, 5: 0.5}


def test_a_label_that_the_targets_cannot_hold_is_refused():
    for dtype, label in ((torch.uint8, 300), (torch.int8, -129), (torch.float16, 1e6), (torch.bool, 2)):
        with refused("can hold, as the targets are"):
            read_change(Examples((torch.ones(8, 2), torch.zeros(8).to(dtype))), labels={3: label})
    for label in ("cat", True, [1, 2], float("nan"), 1j):
        with refused("expected one finite number"):
            read_change(Examples((torch.ones(8, 2), torch.zeros(8))), labels={3: label})
    # A flag for a class, as it is.
    flags = Examples((torch.ones(8, 2), torch.zeros(8, dtype=torch.bool)))
    assert read_change(flags, labels={3: 1, 4: 0}).labels == {3: 1}
