"""TracIn: the closed form in one dimension, sums over checkpoints, projections, checkpoints that do not fit."""

import copy

import pytest
import torch
from oracles import LOSS, flat, gradients, of_outputs, untouched
from refusals import refused
from safetensors.torch import save_file
from small_problem import QUERY, TRAIN, small
from torch import Tensor, nn

import upweight as uw
from upweight.attributors.projection import Projection

RATES = [0.1, 0.05, 0.02]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def states(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    start = small().state_dict()
    return [
        {k: v + 0.3 * t * torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in start.items()}
        for t in range(count)
    ]


def tracin(checkpoints, rates=RATES, model=None, **options) -> uw.TracIn:
    task = uw.Classification()
    return uw.TracIn(model or small(), task, checkpoints=checkpoints, learning_rates=rates, **options)


def holding(state) -> nn.Module:
    model = small()
    model.load_state_dict(state)
    return model


def grad_dot(state, **options) -> Tensor:
    return uw.GradDot(holding(state), uw.Classification(), **options).fit(TRAIN).attribute(QUERY).values


def test_one_dimension_in_closed_form():
    """y = wx with label x and squared error: the gradient is 2 (w - 1) x^2, so S[i, j] = 4 sum (w - 1)^2 i^2 j^2."""
    weights = [
        {"weight": torch.tensor([[w]], dtype=torch.float64)} for w in (0.4379, 0.1653, 0.5132, 0.3651, 0.9992)
    ]
    x = torch.arange(1.0, 8.0, dtype=torch.float64)[:, None]
    model = nn.Linear(1, 1, bias=False).double()
    method = uw.TracIn(model, uw.Regression(scale=1.0), checkpoints=weights, learning_rates=1.0).fit((x, x))
    scores = method.attribute((x[:4], x[:4]))
    expected = 6.61101356 * x[:4] ** 2 @ (x**2).T
    assert relative(scores.values, expected) < 1e-8
    assert relative(method.self_influence().values, 6.61101356 * x[:, 0] ** 4) < 1e-8


def test_scores_equal_plain_autograd():
    expected = torch.zeros(4, 15, dtype=torch.float64)
    for state, rate in zip(states(), RATES):
        loss, model = of_outputs(LOSS["classification"]), holding(state)
        V, G = (flat(gradients(loss, model, batch, len(batch[1]))) for batch in (QUERY, TRAIN))
        expected += rate * V @ G.T
    scores = tracin(states()).fit(TRAIN).attribute(QUERY)
    assert relative(scores.values, expected) < 1e-12
    assert scores.unit is None and [c["learning_rate"] for c in scores.info["checkpoints"]] == RATES


def test_one_checkpoint_is_grad_dot_and_checkpoints_add_up():
    alone = [tracin([state], [1.0]).fit(TRAIN).attribute(QUERY).values for state in states()]
    for state, values in zip(states(), alone):
        assert torch.equal(values, grad_dot(state))
    together = tracin(states()).fit(TRAIN).attribute(QUERY).values
    assert relative(together, sum(rate * values for rate, values in zip(RATES, alone))) < 1e-15
    part = tracin(states(), parameters="last_layer").fit(TRAIN).attribute(QUERY).values
    assert relative(part, sum(r * grad_dot(s, parameters=r"^2\.") for r, s in zip(RATES, states()))) < 1e-15


def test_layers_add_up_and_self_influence_is_the_diagonal():
    method = tracin(states()).fit(TRAIN)
    scores = method.attribute(QUERY, per_layer=True)
    assert list(scores.layers) == ["0", "2"]
    assert relative(sum(scores.layers.values()), scores.values) < 1e-12
    assert relative(method.self_influence().values, method.attribute(TRAIN).values.diagonal()) < 1e-12


def test_checkpoints_in_every_form(tmp_path):
    truth = tracin(states()).fit(TRAIN).attribute(QUERY).values
    first, second, third = states()
    save_file(first, tmp_path / "first.safetensors")
    torch.save({"state_dict": second, "step": 7}, tmp_path / "second.pt")
    mixed = [tmp_path / "first.safetensors", str(tmp_path / "second.pt"), lambda: third]
    assert torch.equal(tracin(mixed).fit(TRAIN).attribute(QUERY).values, truth)
    models = [holding(state) for state in states()]
    assert torch.equal(tracin(models).fit(TRAIN).attribute(QUERY).values, truth)


@pytest.mark.parametrize("options", [{}, {"projection": 8}, {"parameters": "last_layer"}])
def test_the_model_and_the_checkpoints_are_not_touched(options):
    model, given = small(), states()
    before = copy.deepcopy(given)
    with untouched(model):
        method = tracin(given, model=model, **options).fit(TRAIN)
        method.attribute(QUERY)
        method.self_influence()
    assert all(torch.equal(a[k], b[k]) for a, b in zip(given, before) for k in a)


def test_a_folder_of_tiles_resumes(tmp_path):
    method = tracin(states()).fit(TRAIN)
    values = method.attribute(QUERY, out=tmp_path).values
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"checkpoint-{t:04d}" for t in range(3)]
    assert torch.equal(method.attribute(QUERY, out=tmp_path).values, values)
    with pytest.raises(uw.CacheMismatchError):
        tracin(list(reversed(states()))).fit(TRAIN).attribute(QUERY, out=tmp_path)


# Projection ----------------------------------------------------------------------------------------------------------


def projected(dimension: int, seeds: int, seed: int = 0) -> Tensor:
    """Scores [seed, query, train] of independent projections."""
    runs = range(seed, seed + seeds)
    return torch.stack(
        [
            tracin(states(1), [1.0], projection=dimension, seed=s).fit(TRAIN).attribute(QUERY).values
            for s in runs
        ]
    )


def test_projected_products_are_right_on_average_and_vary_as_one_over_the_dimension():
    """60 pairs within 3 standard errors: all but one or so of them, where 0.27 % would lie outside by chance."""
    truth = grad_dot(states(1)[0])
    few, many = projected(4, 80), projected(16, 80)
    for found in (few, many):
        deviation = (found.mean(0) - truth).abs() / (found.std(0) / 80**0.5)
        assert int((deviation > 3).sum()) <= 2 and float(deviation.max()) < 5
    ratio = float(few.var(0).mean() / many.var(0).mean())
    # A variance of 80 draws has a relative standard error of sqrt(2/79) = .16, a ratio of two such has .22.
    assert 4 * (1 - 3 * 0.22) < ratio < 4 * (1 + 3 * 0.22)
    V2G2 = grad_squares()
    assert bool((few.var(0) < 2 * (V2G2 + truth**2) / 4).all())


def grad_squares() -> Tensor:
    loss, model = of_outputs(LOSS["classification"]), holding(states(1)[0])
    v, g = (flat(gradients(loss, model, b, len(b[1]))).square().sum(1) for b in (QUERY, TRAIN))
    return torch.outer(v, g)


def test_the_identity_in_place_of_a_projection_changes_nothing(monkeypatch):
    rows = {0: (0, 30), 1: (30, 51)}  # two layers of 30 and 21 parameters, side by side
    eye = torch.eye(51, dtype=torch.float64)
    monkeypatch.setattr(
        Projection, "signs", lambda self, layer, a, b: 51**0.5 * eye[rows[layer][0] + a : rows[layer][0] + b]
    )
    scores = tracin(states(), projection=51).fit(TRAIN).attribute(QUERY)
    assert relative(scores.values, tracin(states()).fit(TRAIN).attribute(QUERY).values) < 1e-10


def test_a_projection_depends_on_its_seed_alone(monkeypatch):
    one = tracin(states(), projection=8, seed=1).fit(TRAIN).attribute(QUERY).values
    assert not torch.allclose(one, tracin(states(), projection=8, seed=2).fit(TRAIN).attribute(QUERY).values)
    little = (
        tracin(states(), projection=8, seed=1, batch_size=2, memory=20_000).fit(TRAIN).attribute(QUERY).values
    )
    assert relative(little, one) < 1e-12
    whole = Projection(4, 3, 1e9).signs(0, 0, 40)
    assert torch.equal(Projection(4, 3, 0).signs(0, 0, 40), whole)
    assert set(whole.unique().tolist()) == {-1, 1}
    assert not torch.equal(Projection(4, 3, 0).signs(1, 0, 40), whole)


def test_projected_gradients_are_kept_for_the_next_query():
    from networks import Counting

    model = Counting(small())
    given = [{f"model.{k}": v for k, v in state.items()} for state in states()]
    method = tracin(given, model=model, projection=8).fit(TRAIN)
    work = method._copy
    method.attribute(QUERY)
    work.reset()
    method.attribute(QUERY)
    assert work.examples == 3 * 4  # the queries at every checkpoint, and no training example


# Refusals ------------------------------------------------------------------------------------------------------------


def other(**shapes: Tensor) -> dict[str, Tensor]:
    return {**small().state_dict(), **shapes}


def test_checkpoints_of_another_architecture_are_refused_by_name():
    lacking = {k: v for k, v in small().state_dict().items() if k != "2.bias"}
    with refused(r"checkpoint 1 is of another architecture.*lacks 2\.bias"):
        tracin([small().state_dict(), lacking], 0.1).fit(TRAIN)
    with refused(r"has besides 4\.weight"):
        tracin([other(**{"4.weight": torch.ones(2)})], 0.1).fit(TRAIN)
    with refused(r"has shape 0\.weight \[6, 5\] for \[6, 4\]"):
        tracin([other(**{"0.weight": torch.ones(6, 5)})], 0.1).fit(TRAIN)


def test_other_refusals(tmp_path):
    state = small().state_dict()
    with refused("NaN or infinity in 0.bias"):
        tracin([other(**{"0.bias": torch.full((6,), float("nan"))})], 0.1).fit(TRAIN)
    with refused("empty"):
        tracin([], 0.1)
    with refused("put it into a list"):
        tracin(state, 0.1)
    with refused("2 learning rates for 1 checkpoints"):
        tracin([state], [0.1, 0.1])
    with refused("learning rate -0.1"):
        tracin([state], -0.1)
    with refused("projection=0"):
        tracin([state], 0.1, projection=0)
    with refused("there is no file"):
        tracin([tmp_path / "none.pt"], 0.1).fit(TRAIN)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with refused("cannot be read as tensors"):
        tracin([tmp_path / "junk.safetensors"], 0.1).fit(TRAIN)
    torch.save(small(), tmp_path / "model.pt")
    with refused("cannot be read as tensors"):
        tracin([tmp_path / "model.pt"], 0.1).fit(TRAIN)
    with refused("expected a state dict"):
        tracin([lambda: 3], 0.1).fit(TRAIN)
    with refused("projection= mixes"):
        tracin([state], 0.1, projection=4).fit(TRAIN).attribute(QUERY, per_layer=True)
    changing = small().state_dict()
    method = tracin([changing], 0.1).fit(TRAIN)
    changing["0.weight"].mul_(2)
    with refused("checkpoint 0 changed since fit"):
        method.attribute(QUERY)
