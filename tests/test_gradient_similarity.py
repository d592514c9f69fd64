"""GradDot and GradCos against plain autograd, one example at a time."""

import pytest
import torch
import torch.nn.functional as F
from networks import digits, trained
from oracles import LOSS, flat, gradients, of_outputs
from refusals import refused
from small_problem import QUERY, TRAIN, small
from torch import Tensor, nn

import upweight as uw
from upweight.attributors.gradient_similarity import normalised
from upweight.data import Examples
from upweight.gradients import Tracker


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def oracle(model: nn.Module, batch) -> Tensor:
    return flat(gradients(of_outputs(LOSS["classification"]), model, batch, len(batch[1])))


def cosines(V: Tensor, G: Tensor) -> Tensor:
    return (V / V.norm(dim=1, keepdim=True)) @ (G / G.norm(dim=1, keepdim=True)).T


@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_scores_equal_the_dense_products(batch_size):
    model = small()
    V, G = oracle(model, QUERY), oracle(model, TRAIN)
    dot = uw.GradDot(model, uw.Classification(), batch_size=batch_size).fit(TRAIN)
    assert relative(dot.attribute(QUERY).values, V @ G.T) < 1e-12
    assert relative(dot.self_influence().values, G.square().sum(1)) < 1e-12
    cos = uw.GradCos(model, uw.Classification(), batch_size=batch_size).fit(TRAIN)
    assert relative(cos.attribute(QUERY).values, cosines(V, G)) < 1e-12


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_network_in_float32(name):
    model, (train, query) = trained(name), digits()
    train = tuple(t[:40] for t in train)
    exact = trained(name).double()
    G, V = oracle(exact, (train[0].double(), train[1])), oracle(exact, (query[0].double(), query[1]))
    assert relative(uw.GradDot(model, uw.Classification()).fit(train).attribute(query).values, V @ G.T) < 1e-4
    cos = uw.GradCos(model, uw.Classification()).fit(train).attribute(query).values
    # Where the model is sure, a float32 gradient (a probability minus 1) is rounding noise, and so is its direction.
    unsure = [F.cross_entropy(exact(x.double()), y, reduction="none") > 0.02 for x, y in (query, train)]
    assert min(int(u.sum()) for u in unsure) >= 3
    difference = (cos - cosines(V, G))[unsure[0]][:, unsure[1]]
    assert float(difference.abs().max()) < 1e-4


def test_embeddings_and_lone_parameters_are_normalised_too():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.table(x).mean(1)))

    model = Words().double().eval()
    train = torch.randint(0, 7, (9, 5)), torch.arange(9) % 3
    query = torch.randint(0, 7, (4, 5)), torch.arange(4) % 3
    expected = cosines(oracle(model, query), oracle(model, train))
    scores = uw.GradCos(model, uw.Classification()).fit(train).attribute(query, per_layer=True)
    assert relative(scores.values, expected) < 1e-12
    assert relative(sum(scores.layers.values()), expected) < 1e-12


def test_a_gradient_too_small_to_square_keeps_its_direction():
    """In float32 the squares of numbers below 1e-23 are zero."""
    model = nn.Linear(3, 2, bias=False)
    x = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]])
    loss = uw.Task.from_functions(lambda m, b: (m(b[0]) * torch.tensor([1.0, -1.0])).sum(1) * b[1])
    batch = (x, torch.tensor([1.0, 1e-25, 1.0]))
    tracker = Tracker(model, loss, Examples(batch))
    norms = normalised(tracker.train(batch, range(3))).dense().norm(dim=1)
    assert torch.allclose(norms, torch.tensor([1.0, 1.0, 0.0]), atol=1e-6)


def test_higher_is_better_is_oriented():
    model = small()
    loss = uw.GradDot(model, uw.Classification()).fit(TRAIN).attribute(QUERY)
    margin = uw.GradDot(model, uw.Classification("margin")).fit(TRAIN).attribute(QUERY)
    p = model(QUERY[0]).softmax(1).gather(1, QUERY[1][:, None]).detach()
    assert relative((1 - p) * margin.values, loss.values) < 1e-12


def test_the_identity_curvature_is_the_same_up_to_n():
    scores = uw.GradDot(small(), uw.Classification()).fit(TRAIN).attribute(QUERY)
    influence = uw.Influence(small(), uw.Classification(), curvature="identity").fit(TRAIN).attribute(QUERY)
    assert relative(influence.values * 15, scores.values) < 1e-12
    shared = (
        "convention",
        "coverage",
        "fingerprints",
        "higher_is_better",
        "layers",
        "method",
        "n",
        "versions",
    )
    assert set(shared) <= set(scores.info) and set(shared) <= set(influence.info)
    assert scores.info["fingerprints"] == influence.info["fingerprints"]


def test_part_of_the_parameters():
    model = small()
    whole = uw.GradDot(model, uw.Classification()).fit(TRAIN).attribute(QUERY, per_layer=True)
    for parameters in ("last_layer", r"^2\."):
        part = uw.GradDot(model, uw.Classification(), parameters=parameters).fit(TRAIN).attribute(QUERY)
        assert relative(part.values, whole.layers["2"]) < 1e-12
        assert part.info["coverage"]["parameters"] == pytest.approx(21 / 51)


def test_the_last_layer_is_the_one_that_is_used_last():
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.body = nn.Linear(6, 3), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).tanh())

    method = uw.GradDot(Turned().double(), uw.Classification(), parameters="last_layer").fit(TRAIN)
    assert list(method.attribute(QUERY).info["layers"]) == ["head"]


def test_little_memory_gives_the_same_scores():
    truth = uw.GradDot(small(), uw.Classification()).fit(TRAIN).attribute(QUERY).values
    tight = uw.GradDot(small(), uw.Classification(), memory=3000).fit(TRAIN)
    assert tight._source.panel_size(4) < 4 and tight._source.batch_size < 15
    assert relative(tight.attribute(QUERY).values, truth) < 1e-12


def test_a_folder_of_tiles_resumes(tmp_path):
    method = uw.GradDot(small(), uw.Classification(), batch_size=4).fit(TRAIN)
    first = method.attribute(QUERY, out=tmp_path)
    assert len(list((tmp_path / "parts").iterdir())) == 4
    assert torch.equal(method.attribute(QUERY, out=tmp_path).values, first.values)
    cos = uw.GradCos(small(), uw.Classification(), batch_size=4).fit(TRAIN)
    with pytest.raises(uw.CacheMismatchError):
        cos.attribute(QUERY, out=tmp_path)


def test_refusals():
    model, task = small(), uw.Classification()
    with refused("not fitted"):
        uw.GradDot(model, task).attribute(QUERY)
    with refused("cosine of a gradient with itself is 1"):
        uw.GradCos(model, task).fit(TRAIN).self_influence()
    with refused("expected a Task"):
        uw.GradDot(model, nn.CrossEntropyLoss())
    with refused("batch_size=0"):
        uw.GradCos(model, task, batch_size=0)
    with refused("only ranks"):
        uw.GradDot(model, task).fit(TRAIN).attribute(QUERY).removal_effect([1])
    with refused(r"float64\[5\].*float64\[4\]"):
        uw.GradDot(model, task).fit(TRAIN).attribute((torch.zeros(2, 5, dtype=torch.float64), QUERY[1][:2]))
    fitted = uw.GradDot(model, task).fit(TRAIN)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with refused("changed since fit"):
        fitted.attribute(QUERY)
    bare = uw.Task.from_functions(lambda m, b: m.weight.square() * b[0])
    lone = nn.Module()
    lone.weight = nn.Parameter(torch.ones(()))
    with refused("no linear layer"):
        uw.GradDot(lone, bare, parameters="last_layer").fit((torch.ones(3), torch.ones(3)))
