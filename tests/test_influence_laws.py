"""Laws that influence scores obey: sums, symmetries, and nothing from what has no gradient."""

import pytest
import torch
import torch.nn.functional as F
from curvature_oracles import relative
from small_problem import CURVATURES, QUERY, TRAIN, cross_entropy, influence, small
from torch import Tensor, nn

import upweight as uw

# Sums ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_layers_add_up(curvature):
    method = influence(small(), curvature=curvature).fit(TRAIN)
    scores = method.attribute(QUERY, per_layer=True)
    assert list(scores.layers) == ["0", "2"]
    assert relative(sum(scores.layers.values()), scores.values) < 1e-12
    assert method.attribute(QUERY).layers is None


def test_measurements_add_up():
    model = small()

    def measured(function) -> Tensor:
        return influence(model, uw.Classification(function)).fit(TRAIN).attribute(QUERY).values

    def one(m: nn.Module, b) -> Tensor:
        return cross_entropy(m, b)

    def other(m: nn.Module, b) -> Tensor:
        return m(b[0]).square().sum(1)

    assert (
        relative(measured(lambda m, b: 2 * one(m, b) - other(m, b)), 2 * measured(one) - measured(other))
        < 1e-12
    )


def test_groups_add_up():
    scores = influence(small()).fit(TRAIN).attribute(QUERY)
    by_class = scores.sum_by(TRAIN[1].tolist())
    for column, label in enumerate(by_class.train_ids):
        assert relative(by_class.values[:, column], scores.values[:, TRAIN[1] == label].sum(1)) < 1e-12


# Symmetries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_both_copies_of_a_duplicate_get_the_same_score(curvature):
    x, y = TRAIN
    train = torch.cat([x, x[3:4]]), torch.cat([y, y[3:4]])
    method = influence(small(), curvature=curvature, batch_size=4).fit(train)
    scores, own = method.attribute(QUERY).values, method.self_influence().values
    assert relative(scores[:, 15], scores[:, 3]) < 1e-12
    assert float(own[15]) == pytest.approx(float(own[3]), rel=1e-12)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_reordering_the_data_reorders_the_scores(curvature, fisher):
    model = small()
    truth = influence(model, curvature=curvature, fisher=fisher).fit(TRAIN).attribute(QUERY).values
    of_train, of_query = torch.randperm(15), torch.tensor([2, 0, 3, 1])
    shuffled = influence(model, curvature=curvature, fisher=fisher, batch_size=4)
    shuffled.fit(tuple(t[of_train] for t in TRAIN), ids=of_train.tolist())
    found = shuffled.attribute(tuple(t[of_query] for t in QUERY), ids=[f"q{i}" for i in of_query])
    assert relative(found.values, truth[of_query][:, of_train]) < 1e-10
    assert list(found.train_ids) == of_train.tolist() and found.query_ids == ["q2", "q0", "q3", "q1"]


def test_the_same_data_in_every_form():
    model, dataset = small(), torch.utils.data.TensorDataset(*TRAIN)
    truth = influence(model).fit(TRAIN).attribute(QUERY).values
    forms = {
        "arrays": (TRAIN[0].numpy(), TRAIN[1].numpy()),
        "dataset": dataset,
        "list of pairs": [(x, y) for x, y in zip(*TRAIN, strict=True)],
        "loader": torch.utils.data.DataLoader(dataset, batch_size=4),
        "shuffling loader": torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True),
    }
    for name, form in forms.items():
        scores = influence(model).fit(form).attribute(torch.utils.data.TensorDataset(*QUERY))
        assert relative(scores.values, truth) < 1e-10, name


# Nothing there -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_an_example_without_gradient_scores_zero(curvature):
    def weighted(model: nn.Module, batch) -> Tensor:
        return batch[2] * cross_entropy(model, batch)

    weights, query_weights = torch.ones(15, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    weights[6] = query_weights[0] = 0
    method = influence(small(), uw.Task.from_functions(weighted), curvature=curvature, damping="auto")
    method.fit((*TRAIN, weights))
    scores, own = method.attribute((*QUERY, query_weights)).values, method.self_influence().values
    assert (scores[:, 6] == 0).all() and (scores[0] == 0).all() and own[6] == 0
    assert torch.isfinite(scores).all() and scores[1:, :6].abs().min() > 0


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_dead_layer_scores_zero(curvature):
    """No training example moves its weights: its curvature is zero, and so are its scores, not NaN."""
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    method = influence(model, curvature=curvature, damping="auto").fit(TRAIN)
    scores = method.attribute(QUERY, per_layer=True)
    assert (scores.layers["0"] == 0).all() and scores.values.abs().max() > 0
    assert torch.isfinite(method.self_influence().values).all()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_frozen_parameters_contribute_nothing(curvature):
    model = small()
    whole = influence(model, curvature=curvature).fit(TRAIN).attribute(QUERY, per_layer=True)
    filtered = (
        influence(model, curvature=curvature, parameters=r"^2\.").fit(TRAIN).attribute(QUERY, per_layer=True)
    )
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    frozen = influence(model, curvature=curvature).fit(TRAIN).attribute(QUERY, per_layer=True)
    assert list(frozen.layers) == ["2"]
    assert relative(frozen.values, whole.layers["2"]) < 1e-12
    assert relative(frozen.values, filtered.values) < 1e-12
    assert filtered.info["coverage"]["parameters"] == pytest.approx(21 / 51)
    assert frozen.info["coverage"]["parameters"] == 1.0


class KeyBias(nn.Module):
    """Attention whose keys have a bias of their own: the softmax does not see it."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 6), nn.Linear(4, 6, bias=False), nn.Linear(4, 6)
        self.silent, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(self.query(x), self.key(x) + self.silent, self.value(x))
        return self.out(attended.mean(1))


def shifted() -> nn.Module:
    """A transposed convolution whose bias every map's own mean takes away."""
    norm = nn.InstanceNorm2d(2, affine=True)
    return nn.Sequential(nn.ConvTranspose2d(1, 2, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(98, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "datainf"])
@pytest.mark.parametrize(
    ("build", "shape", "silent"), [(KeyBias, (5, 4), "silent"), (shifted, (1, 5, 5), "0.bias")]
)
def test_a_gradient_that_is_only_rounding_scores_next_to_nothing(build, shape, silent, curvature, dtype):
    """Damped by a tenth of its own eigenvalues it would be as large as any other layer's, and different each time."""
    torch.manual_seed(0)
    model = build().to(dtype).eval()
    batch = torch.randn(30, *shape, dtype=dtype), torch.randint(0, 3, (30,))
    method = uw.Influence(model, uw.Classification(), curvature=curvature, progress=False).fit(batch)
    scores = method.attribute(tuple(part[:5] for part in batch), per_layer=True)
    assert scores.info["without_effect"] == [silent]
    assert float(scores.layers[silent].abs().max()) < 1e-6 * float(scores.values.abs().max())


@pytest.mark.parametrize("options", [{"autocast": torch.bfloat16}, {}], ids=["autocast", "bfloat16"])
def test_rounding_is_told_from_gradients_in_few_digits(options):
    """Bfloat16's rounding is a hundredth of a gradient: no size tells which one has no effect."""
    torch.manual_seed(0)
    dtype = torch.float32 if options else torch.bfloat16
    model = KeyBias().to(dtype).eval()
    batch = torch.randn(30, 5, 4, dtype=dtype), torch.randint(0, 3, (30,))
    method = uw.Influence(model, uw.Classification(), progress=False, **options).fit(batch)
    scores = method.attribute(tuple(part[:5] for part in batch), per_layer=True)
    assert scores.info["without_effect"] == ["silent"]
    assert float(scores.layers["silent"].abs().max()) < 0.01 * float(scores.values.abs().max())


@pytest.mark.parametrize("scale", [1e-3, 1e6, 1e8])
@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal", "datainf"])
def test_small_gradients_are_not_rounding(curvature, scale):
    """Larger inputs and smaller weights are the same function: what a layer adds stays, however small its gradients."""
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3)).eval()
    found = []
    for factor in (1.0, scale):
        with torch.no_grad():
            model[0].weight.div_(factor)
        method = uw.Influence(model, uw.Classification(), curvature=curvature, progress=False)
        scores = method.fit((x * factor, y)).attribute((x[:5] * factor, y[:5]), per_layer=True)
        assert "without_effect" not in scores.info
        found.append(scores.layers)
    for name, part in found[0].items():
        assert relative(found[1][name], part) < 1e-4


def test_a_model_that_cannot_be_run_with_other_weights_is_said_so(monkeypatch):
    def refuse(*_):
        raise RuntimeError("no functional call")

    monkeypatch.setattr("upweight.gradients.rounding.with_parameters", refuse)
    torch.manual_seed(0)
    batch = torch.randn(30, 5, 4), torch.randint(0, 3, (30,))
    with pytest.warns(UserWarning, match="gradients of silent are so small.*no functional call"):
        uw.Influence(KeyBias().eval(), uw.Classification(), progress=False).fit(batch)
