"""Training data that is written to after a fit: a question about it would mix what it was with what it is."""

import warnings

import numpy as np
import pytest
import torch
from refusals import refused

import upweight as uw
from upweight import fingerprint
from upweight.fingerprint import data_versions

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


def add_to_one(x, y):
    x[3, 2] += 0.1


def shuffle(x, y):
    np.random.default_rng(0).shuffle(y)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("change", [write_inputs, swap_labels, add_to_one, shuffle])
def test_is_noticed_in_an_array(change, dtype):
    """Torch does not count what is written through numpy."""
    x, y = data(40)
    train = x.numpy().astype(dtype), y.numpy()
    network = model().to(getattr(torch, dtype)) if dtype == "float16" else model()
    method = uw.Loss(network, uw.Classification(), progress=False).fit(train)
    method.self_influence()
    change(*train)
    with refused("training data changed since fit"):
        method.self_influence()


def test_is_noticed_in_a_large_array(monkeypatch):
    monkeypatch.setattr(fingerprint, "CHECKED_BYTES", 100)
    x = np.zeros((64, 32))
    examples = uw.Examples(x)
    before = examples.fingerprint()
    x += 1
    assert examples.fingerprint() != before


def test_an_audit_after_a_correction_fits_again():
    """Labels corrected in place are what an audit leads to, and the next one is given the same method."""
    x, y = data(60)
    method = METHODS["EK-FAC"](model(), uw.Classification())
    uw.audit(method.model, uw.Classification(), (x, y), influence=method, progress=False)
    y[:3] = (y[:3] + 1) % 3
    uw.audit(method.model, uw.Classification(), (x, y), influence=method, progress=False)
    fresh = METHODS["EK-FAC"](method.model, uw.Classification()).fit((x, y))
    assert torch.equal(method.self_influence().values, fresh.self_influence().values)


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
    "meta": lambda: torch.zeros(3, device="meta"),
    "8 bits": lambda: torch.zeros(3, dtype=torch.float8_e4m3fn),
    "unsigned": lambda: torch.zeros(3, dtype=torch.uint16),
    "yes or no": lambda: torch.zeros(3, dtype=torch.bool),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "nothing": lambda: torch.zeros(0),
    "a number": lambda: torch.tensor(1.0),
    "not a number": lambda: torch.tensor([float("nan")]),
}


@pytest.mark.parametrize("kind", ODD)
def test_tensors_of_any_kind_have_a_version(kind):
    tensor = ODD[kind]()
    before = data_versions([tensor])
    assert data_versions([tensor]) == before
    tensor.zero_()
    assert data_versions([tensor]) != before


def test_inference_mode_has_fingerprints_too():
    with torch.inference_mode():
        assert uw.Examples(data(6)).fingerprint() == uw.Examples(data(6)).fingerprint()


def test_a_model_with_quantised_buffers_is_fitted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scale = torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.qint8)
    quantised = model()
    quantised.register_buffer("scale", scale)
    method = uw.Loss(quantised, uw.Classification(), progress=False).fit(data(40))
    assert len(method.self_influence().values) == 40
