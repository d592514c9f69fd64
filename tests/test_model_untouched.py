"""Nothing on the model changes, ever: not after any call, not when something goes wrong in the middle of one."""

import oracles
import pytest
import torch
import torch.nn.functional as F
from cases import Case, Net, normal
from cases_all import EXACT, N, each
from cases_basic import mlp
from torch import nn

from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.blocks import Factored, Sparse


def everything(case: Case, model: nn.Module, batch) -> None:
    """All that a tracker can be asked for."""
    tracker = Tracker(model, case.task(), Examples(batch), case.parameters)
    generator = torch.Generator().manual_seed(0)
    tracker.train(batch, range(N))
    tracker.query(batch, range(N))
    kinds = ("empirical",) if case.kind == "functions" else ("exact", "sampled", "empirical")
    for kind in kinds:
        tracker.fisher(batch, range(N), kind, 2, generator)


@each(EXACT)
def test_every_call_leaves_the_model_and_the_random_states_as_they_were(case):
    model, batch = case.build(), case.batch(N)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    with oracles.untouched(model):
        everything(case, model, batch)


def test_a_model_in_train_mode_stays_in_train_mode():
    case = Case("train mode", mlp, normal(4))
    model = case.build().train()
    model[1].eval()
    with oracles.untouched(model):
        everything(case, model, case.batch(N))
    assert model.training and not model[1].training


def test_hooks_of_the_user_stay_and_are_called():
    case = Case("hooks", mlp, normal(4))
    model, calls = case.build(), []
    model[0].register_forward_hook(lambda *args: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *args: calls.append("before"))
    model[2].register_full_backward_hook(lambda *args: calls.append("backward"))
    model[0].weight.register_hook(lambda grad: calls.append("gradient"))
    with oracles.untouched(model):
        everything(case, model, case.batch(N))
    assert {"forward", "before", "backward"} <= set(calls)


def test_what_a_forward_pass_keeps_is_no_tensor_of_a_finished_vmap():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.Parameter(torch.eye(4)), nn.Linear(4, 3)

        def forward(self, x):
            self.features = torch.einsum("bi,ij->bj", x, self.mix)
            return self.head(self.features)

    case = Case("keeps", Keeps, normal(4))
    model = case.build()
    everything(case, model, case.batch(N))
    assert torch.isfinite(model.features.detach().sum())


def test_inputs_stay_as_they_were():
    case = Case("inputs", lambda: mlp(nn.ReLU, inplace=True), normal(4))
    model, batch = case.build(), case.batch(N)
    batch[0].requires_grad_(True)
    before, version = batch[0].detach().clone(), batch[0]._version
    everything(case, model, batch)
    assert torch.equal(batch[0], before) and batch[0]._version == version
    assert batch[0].grad is None and batch[0].requires_grad


def test_gradients_hold_no_graph():
    """What is kept of a batch is its factors: a graph behind them would keep every activation alive."""
    for case in EXACT[::7]:
        if case.warning:
            continue
        model, batch = case.build(), case.batch(N)
        gradients = Tracker(model, case.task(), Examples(batch), case.parameters).train(batch, range(N))
        for block in gradients.values():
            if isinstance(block, Factored):
                kept = [tensor for piece in block.pieces for tensor in (piece.rows, piece.cols)]
            else:
                kept = [block.rows if isinstance(block, Sparse) else block.dense()]
            assert not any(tensor.requires_grad for tensor in kept)


# Exceptions in the middle


class Interruption(BaseException):
    pass


class Failing:
    """A loss that works until a given call."""

    def __init__(self, last_good_call: int, error: BaseException) -> None:
        self.calls, self.last_good_call, self.error = 0, last_good_call, error

    def __call__(self, model, batch):
        self.calls += 1
        torch.rand(1)  # a loss may draw, as long as its value does not show it
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        if self.calls > self.last_good_call:
            raise self.error
        return losses


MODELS = {
    "mlp": mlp,
    "fallback": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Linear(6, 3)
    ),
    "recurrent": lambda: Net(
        lambda m, x: m.b(m.a(x[:, None])[0][:, 0]), a=nn.LSTM(4, 5, batch_first=True), b=nn.Linear(5, 3)
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("boom"), Interruption("boom")], ids=str)
def test_an_exception_in_the_loss_passes_and_leaves_the_model_alone(name, error):
    case = Case(name, MODELS[name], normal(4), "functions", lambda model, batch: torch.zeros(len(batch[1])))
    model, batch = case.build(), case.batch(N)
    counting = Failing(10**6, error)
    tracker = Tracker(model, case.task().from_functions(counting), Examples(batch))
    tracker.train(batch, range(N))
    tracker.query(batch, range(N))
    for last_good_call in range(counting.calls):
        failing = Failing(last_good_call, error)
        with oracles.untouched(model):
            try:
                tracker = Tracker(model, case.task().from_functions(failing), Examples(batch))
                tracker.train(batch, range(N))
                tracker.query(batch, range(N))
            except type(error) as caught:
                assert caught is error
        assert failing.calls > last_good_call


def test_an_exception_in_a_layer_leaves_the_model_alone():
    def forward(m, x):
        if len(x) == 11:  # not in the probe
            raise ZeroDivisionError
        return m.a(x)

    case = Case("layer", lambda: Net(forward, a=nn.Linear(4, 3)), normal(4))
    model, batch = case.build(), case.batch(11)
    tracker = Tracker(model, case.task(), Examples(batch))
    with oracles.untouched(model), pytest.raises(ZeroDivisionError):
        tracker.train(batch, range(11))


def test_an_exception_in_the_backward_pass_leaves_the_model_alone():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise ZeroDivisionError

    case = Case("backward", lambda: Net(lambda m, x: Breaks.apply(m.a(x)), a=nn.Linear(4, 3)), normal(4))
    model, batch = case.build(), case.batch(N)
    with oracles.untouched(model), pytest.raises(ZeroDivisionError):
        Tracker(model, case.task(), Examples(batch))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_leaves_the_model_alone(value):
    case = Case("not finite", mlp, normal(4))
    model, (x, y) = case.build(), case.batch(N)
    tracker = Tracker(model, case.task(), Examples((x, y)))
    broken = x.clone()
    broken[3, 1] = value
    for call in (tracker.train, tracker.query):
        with oracles.untouched(model), pytest.raises(UpweightError, match="example 3"):
            call((broken, y), range(N))


# Forward passes that would change the model


def with_buffers(model: nn.Module, **buffers: torch.Tensor) -> nn.Module:
    for name, buffer in buffers.items():
        model.register_buffer(name, buffer)
    return model


def counting(m, x):
    m.calls += 1
    return m.a(x)


CHANGING = {
    "counter": (
        lambda: with_buffers(Net(counting, a=nn.Conv1d(4, 3, 1)), calls=torch.tensor(0)),
        "the forward pass changes calls",
    ),
    "running statistics of an instance norm": (
        lambda: nn.Sequential(
            nn.Conv1d(4, 3, 1), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        ),
        r"the forward pass changes 1.running_mean, 1.running_var.*-> call model.eval",
    ),
    "power iteration of spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv1d(4, 3, 1))),
        r"the forward pass changes 0.parametrizations.weight.0._u",
    ),
    "running statistics of functional batch norm": (
        lambda: with_buffers(
            Net(lambda m, x: F.batch_norm(m.a(x), m.mean, m.variance, training=True), a=nn.Conv1d(4, 3, 1)),
            mean=torch.zeros(3),
            variance=torch.ones(3),
        ),
        "normalises by the statistics of the batch",
    ),
    "table with a largest norm": (
        lambda: Net(lambda m, x: m.table(x[..., 0].abs().long()).mT, table=nn.Embedding(9, 3, max_norm=0.1)),
        r"table.weight has max_norm, which rewrites the table.*-> set max_norm = None",
    ),
    "bag with a largest norm": (
        lambda: Net(
            lambda m, x: m.bag(x[..., 0].abs().long())[:, :, None], bag=nn.EmbeddingBag(9, 3, max_norm=0.1)
        ),
        r"bag.weight has max_norm",
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_forward_pass_that_would_change_the_model_is_refused_and_undone(name):
    build, message = CHANGING[name]
    model = build().train()
    values = {key: value.clone() for key, value in model.state_dict().items()}
    x, y = torch.randn(N, 4, 5), torch.randint(0, 3, (N,))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).mean(2), batch[1], reduction="none")

    with pytest.raises(UpweightError, match=message):
        Tracker(model, Case("", mlp, normal(4)).task().from_functions(loss), Examples((x, y)))
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
