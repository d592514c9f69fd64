"""A folder of gradients or scores that belongs to something else is refused, never read as if it were ours."""

import os

import pytest
import torch
from networks import digits, trained
from torch import Tensor, nn

import upweight as uw
from upweight.curvature.solvers import Arnoldi, Nystrom
from upweight.errors import CacheMismatchError


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Waiting for the disk is what takes time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def influence(**options) -> uw.Influence:
    return uw.Influence(trained("mlp"), uw.Classification(), progress=False, **options)


def halved(model: nn.Module, batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") / 2


def whole(model: nn.Module, batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def changed_weight(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        model[1].weight[0, 0] += 1e-3
    return model


def test_a_cache_of_something_else_is_refused(tmp_path):
    train, _ = digits()
    other = train[0].clone(), train[1].clone()
    other[0][3, 0, 0, 0] += 1e-3
    task = uw.Task.from_functions(whole)
    whole.__qualname__ = halved.__qualname__ = "loss"
    uw.Influence(trained("mlp"), task, progress=False).fit(train, cache=tmp_path)
    refused = {
        "model": (changed_weight(trained("mlp")), task, {}, train, tmp_path),
        "train": (trained("mlp"), task, {}, other, tmp_path),
        "training loss": (trained("mlp"), uw.Task.from_functions(halved), {}, train, tmp_path),
        "task": (trained("mlp"), uw.Classification(), {}, train, tmp_path),
        "precision": (trained("mlp"), task, {}, train, uw.Cache(tmp_path, "int8")),
        "layers": (trained("mlp"), task, {"parameters": "^1"}, train, tmp_path),
        "autocast": (trained("mlp"), task, {"autocast": torch.bfloat16}, train, tmp_path),
    }
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for what, (model, task, options, data, cache) in refused.items():
        with pytest.raises(CacheMismatchError) as caught:
            uw.Influence(model, task, progress=False, **options).fit(data, cache=cache)
        message = str(caught.value)
        assert what in message and str(tmp_path) in message and "->" in message and "\n" not in message, (
            message
        )
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    uw.Influence(trained("mlp"), uw.Task.from_functions(whole), progress=False).fit(train, cache=tmp_path)


def test_scores_of_something_else_are_refused(tmp_path):
    train, query = digits()
    method = influence().fit(train)
    method.attribute(query, out=tmp_path)
    x, y = query
    refused = {
        "queries": lambda: method.attribute((x + 1e-3, y), out=tmp_path),
        "damping": lambda: method.with_damping(0.1).attribute(query, out=tmp_path),
        "curvature": lambda: influence(curvature="kfac").fit(train).attribute(query, out=tmp_path),
        "per_layer": lambda: method.attribute(query, per_layer=True, out=tmp_path),
        "holds": lambda: influence().fit(train, cache=tmp_path),
    }
    for what, call in refused.items():
        with pytest.raises(CacheMismatchError, match=what) as caught:
            call()
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    def measured(scale: float) -> uw.Task:
        return uw.Classification(lambda model, batch: scale * whole(model, batch), unit="nats")

    def by(task: uw.Task) -> uw.Scores:
        method = uw.Influence(trained("mlp"), task, progress=False).fit(train)
        return method.attribute(query, out=tmp_path / "functions")

    by(measured(1.0))
    with pytest.raises(CacheMismatchError, match="measurement"):
        by(measured(2.0))


# What only its numbers tell apart ------------------------------------------------------------------------------------

torch.manual_seed(0)
X, Y = torch.randn(60, 5, 6, dtype=torch.float64), torch.arange(3).repeat_interleave(20)
TRAIN, QUERY = (X, Y), (X[::20] + 0.1, Y[::20])


class Averaging(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.first(x).tanh().mean(1))


MODEL = Averaging().double()


def weighted(*weights: float):
    """A loss with weights by class; the first third of the data is of the first one."""
    scale = torch.tensor(weights, dtype=torch.float64)

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") * scale[batch[1]]

    return uw.Task.from_functions(loss)


def masked(positions: int):
    task = uw.Classification()
    task.mask = lambda batch: (torch.arange(5) < positions).expand(len(batch[0]), 5)
    return task


def drawn(scale: float):
    def sampled(model, batch, generator):
        z = model(batch[0])
        labels = torch.multinomial(z.softmax(1), 1, generator=generator)[:, 0]
        return scale * nn.functional.cross_entropy(z, labels, reduction="none")

    return uw.Task.from_functions(whole, sampled_loss=sampled)


def fitted(task, **options):
    options = {"damping": 0.1, "batch_size": 60, "progress": False, **options}
    return uw.Influence(MODEL, task, **options)


CACHED = {
    "weights by class": (weighted(1, 2, 3), weighted(1, 5, 2), {"fisher": "empirical"}),
    "mask": (masked(5), masked(2), {"fisher": "empirical"}),
    "sampled loss": (drawn(1.0), drawn(2.0), {"fisher": "sampled"}),
}


@pytest.mark.parametrize("what", CACHED)
def test_a_cache_of_another_function_of_the_same_name_is_refused(what, tmp_path):
    one, other, options = CACHED[what]
    fitted(one, **options).fit(TRAIN, cache=tmp_path).attribute(QUERY)
    fitted(one, **options).fit(TRAIN, cache=tmp_path)
    with pytest.raises(CacheMismatchError):
        fitted(other, **options).fit(TRAIN, cache=tmp_path).attribute(QUERY)


def difference(model, power):
    with torch.no_grad():
        before = MODEL(X[:9])
    return ((model(X[:9]) - before) ** power).mean()


SCORED = {
    "rank of a Nyström approximation": [{"solver": Nystrom(rank=k)} for k in (20, 60)],
    "rank of an Arnoldi approximation": [{"solver": Arnoldi(rank=k)} for k in (20, 40)],
    "preconditioner": [{"solver": "cg", "preconditioner": p} for p in ("ekfac", None)],
}


@pytest.mark.parametrize("what", SCORED)
@pytest.mark.filterwarnings("ignore")  # that a rank does not suffice
def test_scores_of_another_solver_are_refused(what, tmp_path):
    one, other = (
        fitted(uw.Classification(), curvature="ggn", **options).fit(TRAIN) for options in SCORED[what]
    )
    one.attribute(QUERY, out=tmp_path)
    with pytest.raises(CacheMismatchError):
        other.attribute(QUERY, out=tmp_path)


def test_scores_from_rounded_gradients_are_not_taken_for_exact_ones(tmp_path):
    rounded = influence(fisher="empirical").fit(digits()[0], cache=uw.Cache(tmp_path / "int8", "int8"))
    rounded.attribute(digits()[1], out=tmp_path / "scores")
    with pytest.raises(CacheMismatchError, match="gradients"):
        influence(fisher="empirical").fit(digits()[0]).attribute(digits()[1], out=tmp_path / "scores")


def test_scores_of_another_functional_of_the_same_value_are_refused(tmp_path):
    """Both are zero: a model's distance from what it was, and its signed difference."""
    method = fitted(uw.Classification()).fit(TRAIN)

    def moved(model):
        return difference(model, 1)

    def same_name(model):
        return 2 * difference(model, 1)

    method.attribute(uw.Functional(moved, "moved"), out=tmp_path)
    with pytest.raises(CacheMismatchError):
        method.attribute(uw.Functional(same_name, "moved"), out=tmp_path)
