"""Banzhaf influence: exact where retraining is, for every subset of a small data set; and its refusals."""

import itertools

import numpy as np
import pytest
import torch
from banzhafs import classified, fitted, network, ridge
from torch import nn

import upweight as uw
from upweight.attributors.pull import added, gradient
from upweight.task import OutputTask

N, L2 = 6, 0.3


def ridge_data(outputs=1):
    torch.manual_seed(3)
    x = torch.randn(N, 3, dtype=torch.float64)
    return x, torch.randn(N, outputs, dtype=torch.float64)


def linear(outputs=1):
    return nn.Linear(3, outputs, bias=False).double()


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_removals_and_additions_are_those_of_refitting(outputs, batch_size):
    """Linear model, squared error, a measurement linear in the outputs: nothing is approximated."""
    x, y = ridge_data(outputs)
    queries = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, outputs, dtype=torch.float64)
    subsets = [[0, 2, 3], [5, 1], list(range(N))]
    weights = [ridge(x, y, ids, len(ids) * L2) for ids in subsets]
    method = uw.BanzhafInfluence(
        linear(outputs),
        uw.Regression(measurement="prediction"),
        checkpoints=[{"weight": w} for w in weights],
        subsets=subsets,
        l2=L2,
        damping=0.0,
        batch_size=batch_size,
        progress=False,
    )
    found = method.fit((x, y)).attribute(queries).values
    expected = torch.zeros(4, N, dtype=torch.float64)
    for ids in subsets:
        for i in range(N):
            without, with_it = (
                ridge(x, y, kept, len(ids) * L2) for kept in (sorted({*ids} - {i}), sorted({*ids, i}))
            )
            # Higher is better: a proponent's removal lowers the prediction.
            expected[:, i] += (queries[0] @ (with_it - without).T).sum(1) / len(subsets)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_over_all_subsets_it_is_the_data_banzhaf_value():
    """The mean over all subsets of what an example adds, by enumeration, with a regulariser of one weight."""
    x, y = ridge_data()
    query = torch.randn(1, 3, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    every = [list(ids) for size in range(1, N + 1) for ids in itertools.combinations(range(N), size)]
    total = torch.zeros(N, dtype=torch.float64)
    for ids in every:
        method = uw.BanzhafInfluence(
            linear(),
            uw.Regression(measurement="prediction"),
            checkpoints=[{"weight": ridge(x, y, ids, 2.0)}],
            subsets=[ids],
            l2=2.0 / len(ids),
            damping=0.0,
            progress=False,
        )
        total += method.fit((x, y)).attribute(query).values[0]
    value = {(): 0.0}
    for ids in every:
        value[tuple(ids)] = float(query[0] @ ridge(x, y, ids, 2.0).T)
    banzhaf = [
        np.mean([value[tuple(sorted({*ids, i}))] - value[ids] for ids in value if i not in ids])
        for i in range(N)
    ]
    # The empty subset is no model: its additions are the part that is missing, counted once and not twice.
    missing = np.array([value[(i,)] for i in range(N)])
    assert np.allclose((total.numpy() + missing) / 2**N, banzhaf, rtol=1e-9, atol=1e-12)


def logistic(x, y, ids, shift, steps=60):
    """The minimum of sum over ids of the logistic loss + (shift/2)|w|^2, by Newton's method."""
    w = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(steps):
        p = (x[ids] @ w).sigmoid()
        slope = x[ids].T @ (p - y[ids]) + shift * w
        hessian = (x[ids].T * (p * (1 - p))) @ x[ids] + shift * torch.eye(len(w)).double()
        w = w - torch.linalg.solve(hessian, slope)
    return w


@pytest.mark.parametrize("l2", [0.003, 0.03])
def test_adding_a_surprising_example_needs_more_than_a_newton_step(l2):
    """More parameters than examples: the model fits the wrong label as soon as it sees it, and then pulls no more."""
    torch.manual_seed(0)
    x = torch.randn(60, 80, dtype=torch.float64)
    y = (x[:, 0] + 0.3 * torch.randn(60) > 0).double()
    y[59] = 1 - y[59]
    ids, shift = list(range(59)), 59 * l2
    w = logistic(x, y, ids, shift)
    real = x @ (w - logistic(x, y, [*ids, 59], shift))  # logits without minus with
    method = uw.BanzhafInfluence(
        nn.Linear(80, 1, bias=False).double(),
        uw.BinaryClassification(measurement="logit"),
        checkpoints=[{"weight": w[None]}],
        subsets=[ids],
        l2=l2,
        damping=0.0,
        progress=False,
    ).fit((x, y))
    found = -method.attribute((x, torch.ones(60).double())).values[:, 59]  # of a logit higher is better
    p = (x[ids] @ w).sigmoid()
    hessian = (x[ids].T * (p * (1 - p))) @ x[ids] + shift * torch.eye(80).double()
    step, q = x @ torch.linalg.solve(hessian, x[59]), (x[59] @ w).sigmoid()
    first_order = step * (q - y[59])
    newton = first_order / (1 + q * (1 - q) * step[59])

    def error(guess):
        return float((guess - real).norm() / real.norm())

    assert error(found) < 0.12 < 0.25 < error(newton) < 3 < error(first_order)


TASKS = [uw.Classification(), uw.Regression(), uw.BinaryClassification()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_pull_of_an_added_example_solves_its_equation(task):
    torch.manual_seed(1)
    width = 1 if isinstance(task, uw.BinaryClassification) else 3
    outputs = 8 * torch.randn(50, width, dtype=torch.float64)
    root = torch.randn(50, width, width, dtype=torch.float64)
    own = 30 * root @ root.mT
    if isinstance(task, uw.Classification):
        targets = torch.randint(3, (50,))
    elif width == 1:
        outputs, targets = outputs[:, 0], torch.randint(2, (50,)).double()
    else:
        targets = torch.randn(50, 3, dtype=torch.float64)
    z = added(task, outputs, targets, own, range(50))
    there = outputs.reshape(50, -1) - (own @ z[..., None])[..., 0]
    assert torch.allclose(gradient(task, there.view(outputs.shape), targets), z, atol=1e-7)


@pytest.mark.parametrize(
    ("task", "outputs", "target", "own"),
    [
        (uw.BinaryClassification(), [-50.0], 1.0, 200.0),
        (uw.Classification(), [50.0, 0.0, 0.0], 1, 200.0),
        (uw.Regression(), [1.0], 1e7, 0.1),
        (uw.Regression(), [0.0], 1e-11, 1.0),
    ],
    ids=["saturated, binary", "saturated", "far", "near"],
)
def test_the_pull_is_found_where_newton_alone_would_cycle_and_at_any_scale(task, outputs, target, own):
    outputs = torch.tensor(outputs if isinstance(task, uw.BinaryClassification) else [outputs]).double()
    targets = torch.tensor([target])
    targets = targets.double()[:, None] if isinstance(task, uw.Regression) else targets
    targets = targets.double() if isinstance(task, uw.BinaryClassification) else targets
    width = outputs.numel()
    z = added(task, outputs, targets, own * torch.eye(width).double()[None], [7])
    there = outputs.reshape(1, -1) - own * z
    assert torch.allclose(gradient(task, there.view(outputs.shape), targets), z, rtol=1e-5, atol=0)


@pytest.mark.parametrize("l2", [1e-3, 1e-5, 1e-7])
def test_removals_are_exact_where_an_example_alone_decides(l2):
    """More parameters than examples and hardly a regulariser: leverages of nearly 1."""
    torch.manual_seed(0)
    x, y = 3 * torch.randn(60, 300).double(), torch.randn(60, 1).double()
    ids, shift = list(range(40)), 40 * l2

    def weights(rows):
        a = x[rows]
        return (a.T @ torch.linalg.solve(a @ a.T + shift * torch.eye(len(rows)).double(), y[rows])).T

    whole = weights(ids)
    method = uw.BanzhafInfluence(
        nn.Linear(300, 1, bias=False).double(),
        uw.Regression(measurement="prediction"),
        checkpoints=[{"weight": whole}],
        subsets=[ids],
        l2=l2,
        damping=0.0,
        progress=False,
    ).fit((x, y))
    queries = torch.randn(5, 300).double()
    found = method.attribute((queries, torch.zeros(5, 1).double())).values
    for i in range(60):
        kept = sorted({*ids} - {i}) if i in ids else ids
        real = (queries @ (weights(sorted({*kept, i})) - weights(kept)).T)[:, 0]
        assert torch.allclose(found[:, i], real, rtol=1e-4, atol=1e-6 * float(real.abs().max()))


def test_too_little_regularisation_for_double_precision_is_refused():
    torch.manual_seed(0)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 1).double()
    x[:, 0] *= 1e6
    options = {
        "checkpoints": [nn.Linear(4, 1, bias=False).double()],
        "subsets": [range(20)],
        "l2": 1e-6,
        "damping": 0.0,
        "progress": False,
    }
    with pytest.raises(uw.UpweightError, match="too little for double precision"):
        uw.BanzhafInfluence(nn.Linear(4, 1, bias=False).double(), uw.Regression(), **options).fit((x, y))


def test_a_network_agrees_with_dense_linear_algebra_and_is_left_alone():
    data, model = classified(), network().double()
    data = data[0].double(), data[1]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    ids = list(range(0, 20, 2))
    method = uw.BanzhafInfluence(
        model, uw.Classification(), checkpoints=[model], subsets=[ids], l2=0.02, damping=0.03, progress=False
    ).fit(data)
    found = method.attribute(data).values
    parameters = dict(model.named_parameters())

    def outputs(p, x):
        return torch.func.functional_call(model, p, (x[None],))[0]

    jacobian = torch.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, data[0])
    rows = torch.cat([j.flatten(2) for j in jacobian.values()], 2).detach()
    p = model(data[0]).softmax(1).detach()
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    slope = p - nn.functional.one_hot(data[1], 3)
    fisher = sum(rows[i].T @ hessian[i] @ rows[i] for i in ids) / len(ids)
    inverse = torch.linalg.inv(fisher + 0.05 * torch.eye(len(fisher)).double())
    gradients = torch.einsum("icp,ic->ip", rows, slope)
    for i in ids[:3]:  # removed, the others' curvature alone
        without = torch.linalg.inv(
            fisher - rows[i].T @ hessian[i] @ rows[i] / len(ids) + 0.05 * torch.eye(len(fisher)).double()
        )
        assert torch.allclose(
            found[:, i], gradients @ without @ gradients[i] / len(ids), rtol=1e-8, atol=1e-10
        )
    own = rows[1] @ inverse @ rows[1].T / len(ids)
    z = added(uw.Classification(), model(data[0][1:2]).detach(), data[1][1:2], own[None], [1])[0]
    assert torch.allclose(found[:, 1], gradients @ inverse @ rows[1].T @ z / len(ids), rtol=1e-7, atol=1e-10)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_equal_models_have_no_unit_and_the_mean_of_their_scaled_scores():
    data, states = (
        classified(),
        [network().state_dict(), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))],
    )
    subsets = [range(10), range(5, 20)]

    def make(equal, which):
        chosen = {"checkpoints": [states[k] for k in which], "subsets": [subsets[k] for k in which]}
        return fitted(equal=equal, l2=0.01, damping=0.01, **chosen).attribute(data)

    alone = [make(False, [k]).values for k in (0, 1)]
    plain, equal = make(False, [0, 1]), make(True, [0, 1])
    assert plain.unit == "nats"
    assert equal.unit is None
    assert torch.allclose(plain.values, (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-7)
    scaled = [a / a.square().mean(1, keepdim=True).sqrt() for a in alone]
    assert torch.allclose(equal.values, (scaled[0] + scaled[1]) / 2, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subsets": [[0, 1], [2]]}, "1 checkpoints but 2 subsets"),
        ({"subsets": [[0, 99]]}, "subset 0: 99 not among"),
        ({"subsets": [[0, 0]]}, "subset 0: an id is given twice"),
        ({"subsets": [[]]}, "subset 0: no ids were given"),
        ({"l2": 0.0, "damping": 0.0}, "neither l2 nor damping"),
        ({"damping": -1.0}, "damping=-1.0"),
        ({"damping": "evidence"}, "damping='evidence'"),
        ({"damping": np.array([0.1, 0.2])}, "damping="),
        ({"subsets": 5}, "subsets is int"),
        ({"subsets": [range(20)]}, "20 of 20 inside"),
        ({"memory": "1k"}, "memory is"),
        (
            {"task": uw.Task.from_functions(lambda m, b: m(b[0]).sum(1), lambda m, b: m(b[0]).sum(1))},
            "expected Class",
        ),
        ({"checkpoints": [{"weight": torch.ones(1)}]}, "another architecture"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else None,
)
def test_what_cannot_be_is_refused(changes, message):
    options = {
        "task": uw.Classification(),
        "checkpoints": [network()],
        "subsets": [[0, 1, 2]],
        "l2": 0.1,
        **changes,
    }
    with pytest.raises(uw.UpweightError, match=message):
        uw.BanzhafInfluence(network(), options.pop("task"), progress=False, **options).fit(classified())


def test_a_fit_that_fails_leaves_the_last_one_as_it_was():
    data, method = classified(), fitted()
    before = method.attribute(data).values
    method.checkpoints = [{"weight": torch.ones(1)}]
    with pytest.raises(uw.UpweightError, match="another architecture"):
        method.fit((data[0][:15], data[1][:15]))
    assert torch.equal(method.attribute(data).values, before)


def test_results_say_which_models_and_subsets_they_are_of():
    def prints(**changes):
        return fitted(**changes).attribute(classified()).info["fingerprints"]

    other = {name: value + 1 for name, value in network().state_dict().items()}
    assert prints() == prints()
    assert prints(subsets=[range(5, 15)]) != prints()
    assert prints(checkpoints=[other]) != prints()


def test_it_works_in_inference_mode():
    plain = fitted().attribute(classified()).values
    with torch.inference_mode():
        again = fitted().attribute(classified()).values
    assert torch.allclose(plain, again)


def test_self_influence_is_refused_with_the_way_out():
    with pytest.raises(uw.UpweightError, match="no self-influence"):
        fitted().self_influence()


def test_a_task_without_the_curvature_of_its_loss_is_refused():
    class Own(OutputTask):
        pass

    own = Own("loss", {"loss": (lambda outputs, targets: outputs.sum(1), False, "")}, None, None)
    with pytest.raises(uw.UpweightError, match="has no hessian_root"):
        uw.BanzhafInfluence(network(), own, checkpoints=[network()], subsets=[range(10)], l2=0.1)


def test_many_models_share_the_memory():
    fitted(memory=4_000_000)
    with pytest.raises(uw.UpweightError, match="beside 1999 other models"):
        fitted(memory=4_000_000, checkpoints=[network()] * 2000, subsets=[range(10)] * 2000)
