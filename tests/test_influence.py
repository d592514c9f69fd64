"""What scores mean and obey: brute force by autograd, sign, unit, sums, symmetries, limits, damping, passes."""

import copy
import json

import curvature_oracles as oracle
import pytest
import torch
import torch.nn.functional as F
from curvature_oracles import relative
from networks import Counting, digits, trained
from small_problem import CURVATURES, QUERY, TRAIN, cross_entropy, data, influence, small
from torch import Tensor, nn

import upweight as uw
from upweight.errors import UpweightError


def per_example(function, model: nn.Module, batch) -> Tensor:
    """Gradients [n, parameters] of ``function(model, batch of one)``, by autograd."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for i in range(len(batch[1])):
        value = function(model, tuple(t[i : i + 1] for t in batch)).sum()
        grads = torch.autograd.grad(value, parameters)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


# Brute force, where another engine is known to be wrong --------------------------------------------------------------


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Linear(64, 24), nn.Linear(24, 24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1)).tanh()
        return self.head(self.twice(self.twice(h).tanh()).tanh())


class TwoGroups(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3, groups=2)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.grouped(self.first(x).tanh()).tanh()
        return self.head(F.avg_pool2d(h, 2).flatten(1))


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", [CalledTwice, TwoGroups])
def test_a_layer_called_twice_and_a_grouped_convolution_equal_brute_force(network, curvature):
    """float32 scores against float64 autograd, one example at a time, with dense curvature matrices."""
    torch.manual_seed(0)
    model = network().eval()
    train, query = (tuple(t[:n] for t in part) for part, n in zip(digits(), (60, 10), strict=True))
    options = {"curvature": curvature, "damping": 1e-3, "fisher": "empirical"}
    method = influence(model, tolerance=0.0, **options).fit(train)
    scores = method.attribute(query, per_layer=True)
    routed = influence(model, **options).fit(train).attribute(query)

    reference = copy.deepcopy(model).double()
    train, query = ((x.double(), y) for x, y in (train, query))

    def loss(f: Tensor, y: Tensor) -> Tensor:
        return oracle.loss_of("classification", f, y)

    layers = oracle.record(reference, train, lambda f, y: [loss(f, y)])
    V = oracle.layer_gradients(loss, reference, query, layers)
    G = oracle.layer_gradients(loss, reference, train, layers)
    total = torch.zeros(10, 60, dtype=torch.float64)
    for name, layer in layers.items():
        if curvature == "identity":
            part = V[name] @ G[name].T / 60
        else:
            part = oracle.solve(oracle.DENSE[curvature](layer), 1e-3, V[name], G[name]) / 60
        assert relative(scores.layers[name], part) < 1e-5
        total += part
    assert relative(scores.values, total) < 1e-5
    assert relative(method.attribute(query).values, total) < 1e-5
    # By default a route may be approximate, up to the tolerance, and says by how much it is.
    error = float((routed.values - total).norm() / total.norm())
    assert error < 1e-3
    if routed.info["separable_error"]:
        assert error < 3 * routed.info["separable_error"]


# Sign and unit -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_query_that_is_a_training_example_is_its_own_proponent(curvature):
    method = influence(small(), curvature=curvature).fit(TRAIN)
    own = method.attribute(TRAIN).values.diagonal()
    assert (own > 0).all()
    assert relative(method.self_influence().values, own) < 1e-12


def test_removing_a_proponent_raises_the_loss():
    """Softmax regression, really trained to its minimum without each of 20 of 80 examples."""
    train = data(80, 3)
    model = nn.Linear(4, 3).double()
    everyone = torch.ones(80, dtype=torch.float64)
    train_to_minimum(model, train, everyone)
    before = cross_entropy(model, QUERY).detach()
    real = []
    for i in range(20):
        weights = everyone.clone()
        weights[i] = 0
        changed = copy.deepcopy(model)
        train_to_minimum(changed, train, weights)
        real.append(cross_entropy(changed, QUERY).detach() - before)
    real = torch.stack(real, 1)
    for curvature, least in {"ekfac": 0.97, "kfac": 0.97, "diagonal": 0.9, "identity": 0.8}.items():
        method = influence(model, curvature=curvature, damping=PENALTY, fisher="exact").fit(train)
        scores = method.attribute(QUERY).values[:, :20]
        correlation = torch.corrcoef(torch.stack([scores.reshape(-1), real.reshape(-1)]))[0, 1]
        assert correlation > least, curvature
        clear = scores.abs() > scores.abs().median()
        assert (scores[clear].sign() == real[clear].sign()).double().mean() > least - 0.05, curvature
        if curvature in ("ekfac", "kfac"):  # calibrated: right in size, too
            assert 0.8 < float((scores * real).sum() / (scores**2).sum()) < 1.3, curvature


PENALTY = 0.05


def train_to_minimum(model: nn.Module, batch, weights: Tensor) -> None:
    optimiser = torch.optim.LBFGS(
        model.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = (weights * cross_entropy(model, batch)).sum() / len(weights)
        value = value + PENALTY / 2 * sum(p.square().sum() for p in model.parameters())
        value.backward()
        return value

    optimiser.step(closure)
    optimiser.zero_grad()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_loss_and_margin_tell_the_same_story(curvature):
    """``d loss = -(1 - p) d margin``: the scores of a query differ by the factor 1 - p, and not in sign."""
    model = small()
    loss = influence(model, curvature=curvature).fit(TRAIN).attribute(QUERY)
    margin = influence(model, uw.Classification("margin"), curvature=curvature).fit(TRAIN).attribute(QUERY)
    p = model(QUERY[0]).softmax(1).gather(1, QUERY[1][:, None]).detach()
    assert relative((1 - p) * margin.values, loss.values) < 1e-12
    assert (loss.info["higher_is_better"], margin.info["higher_is_better"]) == (False, True)


def test_a_function_of_ones_own_is_oriented_by_its_word():
    model = small()

    def logit(model: nn.Module, batch) -> Tensor:
        return model(batch[0]).gather(1, batch[1][:, None])[:, 0]

    built_in = influence(model, uw.Classification("logit")).fit(TRAIN).attribute(QUERY)
    higher = (
        influence(model, uw.Classification(logit, higher_is_better=True, unit="logit"))
        .fit(TRAIN)
        .attribute(QUERY)
    )
    lower = (
        influence(model, uw.Classification(lambda m, b: -logit(m, b), unit="minus logit"))
        .fit(TRAIN)
        .attribute(QUERY)
    )
    assert relative(higher.values, built_in.values) < 1e-12
    assert relative(lower.values, built_in.values) < 1e-12
    assert (built_in.unit, higher.unit, lower.unit) == ("logit", "logit", "minus logit")


@pytest.mark.parametrize("curvature", CURVATURES)
def test_only_calibrated_curvatures_have_a_unit(curvature):
    method = influence(small(), curvature=curvature).fit(TRAIN)
    scores, own = method.attribute(QUERY), method.self_influence()
    if curvature in ("ekfac", "kfac"):
        assert scores.unit == "nats" and own.unit is not None
        effect = scores.removal_effect([3, 5])
        assert torch.allclose(effect, scores.values[:, [3, 5]].sum(1), rtol=1e-12, atol=0)
    else:
        assert scores.unit is None and own.unit is None
        with pytest.raises(UpweightError, match="only ranks") as caught:
            scores.removal_effect([3])
        assert "\n" not in str(caught.value)


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


# Damping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_large_damping_tends_to_plain_inner_products(curvature):
    model = small()
    V, G = per_example(cross_entropy, model, QUERY), per_example(cross_entropy, model, TRAIN)
    largest = max(
        float(c.eigenvalues.max())
        for c in influence(model, curvature=curvature).fit(TRAIN)._fitted.curvature.layers.values()
    )
    damping = 1e8 * largest
    scores = influence(model, curvature=curvature, damping=damping).fit(TRAIN).attribute(QUERY).values
    assert relative(15 * damping * scores, V @ G.T) < 1e-6
    identity = influence(model, curvature="identity").fit(TRAIN).attribute(QUERY).values
    assert relative(15 * identity, V @ G.T) < 1e-12


@pytest.mark.parametrize("curvature", ["ekfac", "kfac", "diagonal"])
def test_another_damping_is_another_fit_without_any_pass(curvature):
    model = Counting(small())
    method = influence(model, curvature=curvature, damping="auto").fit(TRAIN)
    before = method.attribute(QUERY).values
    for damping in (1e-3, {"model.0": 0.1, "*": 0.02}, uw.Damping(0.5, relative=True)):
        model.reset()
        changed = method.with_damping(damping)
        assert model.calls == 0
        found = changed.attribute(QUERY)
        assert model.examples <= 3 * len(QUERY[1])  # queries only; the training gradients are still there
        own = changed.self_influence()
        fresh = influence(model, curvature=curvature, damping=damping).fit(TRAIN)
        assert torch.equal(found.values, fresh.attribute(QUERY).values)
        assert torch.equal(own.values, fresh.self_influence().values)
        assert found.info["layer_damping"] == fresh.attribute(QUERY).info["layer_damping"]
    assert torch.equal(method.attribute(QUERY).values, before)  # the first one is still what it was


# Passes over the data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_the_model_sees_the_data_at_most_twice(curvature, fisher):
    """Once for the Fisher's columns and once for the gradients to be scored, however many columns, passes and queries.

    The empirical Fisher's column is the gradients to be scored. On top come probes: of the trace, and of at most 272
    examples for separable routes.
    """
    model = Counting(trained("mlp"))
    train, query = digits()
    probes, n = 272 + 60, len(train[1])
    method = influence(model, curvature=curvature, fisher=fisher, batch_size=100).fit(train)
    method.attribute(query), method.self_influence(), method.attribute(query), method.attribute(query)
    passes = 1 if fisher == "empirical" or curvature == "identity" else 2
    assert model.examples <= passes * n + probes + 3 * (len(query[1]) + 16)


# Evidence ------------------------------------------------------------------------------------------------------------


def test_evidence_is_complete_and_survives_a_file(tmp_path):
    method = influence(small(), damping="auto", fisher="sampled", draws=2, seed=7).fit(TRAIN)
    scores = method.attribute(QUERY)
    info = scores.info
    json.dumps(info)
    assert info["method"] == "influence" and info["curvature"] == "ekfac"
    assert (info["fisher"], info["fisher_columns"], info["seed"], info["n"]) == ("sampled", 2, 7, 15)
    assert info["represented"] == {"0": "ekfac", "2": "ekfac"} and set(info["layer_damping"]) == {"0", "2"}
    assert info["coverage"] == {"parameters": 1.0, "squared_gradient_norm": 1.0}
    assert set(info["fingerprints"]) == {"model", "train"} and info["versions"]["torch"] == torch.__version__
    assert set(info["routes"]) == {"0", "2"} and info["dtype"] == "float64"
    scores.save(tmp_path / "scores")
    again = uw.Scores.load(tmp_path / "scores")
    assert torch.equal(again.values, scores.values) and again.info == info and again.unit == "nats"


def test_the_same_seed_gives_the_same_numbers_and_the_global_state_stays():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def run(seed: int) -> Tensor:
        method = influence(model, fisher="sampled", draws=1, seed=seed).fit(TRAIN)
        own = method.self_influence().values
        return torch.cat([method.attribute(QUERY).values, own[None]])

    first = run(0)
    torch.rand(3)
    assert torch.equal(run(0), first) and not torch.equal(run(1), first)
    torch.set_rng_state(state)
    run(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_many_draws_tend_to_the_exact_fisher():
    """Errors shrink like one over the root of the number of draws: 100 have a tenth of one draw's."""
    exact = influence(small(), fisher="exact").fit(TRAIN).attribute(QUERY).values

    def error(draws: int, seeds: int) -> float:
        runs = [influence(small(), fisher="sampled", draws=draws, seed=s).fit(TRAIN) for s in range(seeds)]
        return sum(relative(run.attribute(QUERY).values, exact) for run in runs) / seeds

    assert error(100, 2) < 0.3 * error(1, 8)


def test_bfloat16_autocast_is_close():
    model, (train, query) = trained("mlp"), digits()
    truth = influence(model).fit(train).attribute(query)
    rough = influence(model, autocast=torch.bfloat16).fit(train).attribute(query)
    assert rough.info["autocast"] == "bfloat16" and rough.values.dtype == torch.float32
    correlation = torch.corrcoef(torch.stack([truth.values.reshape(-1), rough.values.reshape(-1)]))[0, 1]
    assert correlation > 0.99


def test_a_model_that_squeezes_its_output_may_meet_a_single_query():
    class Squeezed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze()

    def scores(kind: type[nn.Sequential]) -> Tensor:
        torch.manual_seed(0)
        model, x = kind(nn.Linear(3, 1)), torch.randn(9, 3)
        method = uw.Influence(
            model, uw.Regression(), batch_size=4, progress=False
        )  # a batch of one at the end
        return method.fit((x, x[:, 0])).attribute((x[:1], x[:1, 0])).values

    assert torch.equal(scores(Squeezed), scores(nn.Sequential))
