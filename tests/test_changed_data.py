"""Training data that is written to after a fit: a question about it would mix what it was with what it is."""

import numpy as np
import pytest
import torch
from refusals import refused

import upweight as uw
from upweight.fingerprint import versions_of

METHODS = {
    "EK-FAC": lambda m, t: uw.Influence(m, t, progress=False),
    "conjugate gradients": lambda m, t: uw.Influence(
        m, t, curvature="ggn", solver="cg", damping=0.1, progress=False
    ),
    "dual": lambda m, t: uw.Influence(m, t, curvature="ggn", solver="dual", damping=0.1, progress=False),
    "DataInf": lambda m, t: uw.Influence(m, t, curvature="datainf", progress=False),
    "gradient dot": lambda m, t: uw.GradDot(m, t, progress=False),
    "TracIn": lambda m, t: uw.TracIn(
        m, t, checkpoints=[m.state_dict()], learning_rates=[0.1], progress=False
    ),
    "loss": lambda m, t: uw.Loss(m, t, progress=False),
    "embeddings": lambda m, t: uw.EmbeddingSimilarity(m, t, progress=False),
    "classes": lambda m, t: uw.SameClass(m, t, progress=False),
    "representer points": lambda m, t: uw.Representer(m, t, l2=0.1, progress=False),
}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)).eval()


def data(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 5, generator=generator), torch.arange(n) % 3


def write_inputs(x, y):
    x[3] += 1


def swap_labels(x, y):
    y[:2] = y[[1, 0]]


@pytest.mark.parametrize("change", [write_inputs, swap_labels])
@pytest.mark.parametrize("name", METHODS)
def test_is_noticed(name, change):
    train, query = data(40), data(4)
    method = METHODS[name](model(), uw.Classification()).fit(train)
    method.attribute(query)
    change(*train)
    with refused("training data changed since fit -> fit again"):
        method.attribute(query)
    method.fit(train).attribute(query)


def test_is_noticed_in_an_array():
    """Torch does not count what is written through numpy."""
    x, y = data(40)
    train = x.numpy(), y.numpy()
    method = METHODS["EK-FAC"](model(), uw.Classification()).fit(train)
    train[0][3] += 1
    with refused("training data changed since fit"):
        method.self_influence()


def test_what_is_written_back_is_no_change():
    x, y = data(40)
    method = METHODS["EK-FAC"](model(), uw.Classification()).fit((x, y))
    expected = method.self_influence().values
    x[3] += 1
    x.copy_(data(40)[0])
    assert torch.equal(method.self_influence().values, expected)


def test_a_fingerprint_follows_the_data():
    x = np.arange(12.0).reshape(4, 3)
    examples = uw.Examples(x)
    before = examples.fingerprint()
    assert examples.fingerprint() == before == uw.Examples(x.copy()).fingerprint()
    x[0, 0] = 7
    assert examples.fingerprint() == uw.Examples(x.copy()).fingerprint() != before


ODD = {
    "sparse": lambda: torch.zeros(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8),
    "meta": lambda: torch.zeros(3, device="meta"),
    "8 bits": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
    "unsigned": lambda: torch.zeros(3, dtype=torch.uint16),
    "yes or no": lambda: torch.zeros(3, dtype=torch.bool),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "nothing": lambda: torch.zeros(0),
}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_kind_have_a_version(kind):
    tensor = ODD[kind]()
    assert versions_of([tensor]) == versions_of([tensor])
    before = versions_of([tensor])
    tensor.copy_(ODD[kind]())
    assert versions_of([tensor]) != before
