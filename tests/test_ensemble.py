"""The mean over checkpoints: by hand, from files, with evidence, and what is refused."""

import numpy as np
import pytest
import torch
from networks import nearby
from safetensors.torch import save_file
from torch import nn

import upweight as uw

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 2


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def single(model: nn.Module) -> uw.Influence:
    return uw.Influence(model, uw.Classification(), damping=1e-2, progress=False).fit((X, Y))


def test_its_members_share_the_memory_budget():
    """All stay fitted at once: together they may keep what one alone may."""

    def made(model: nn.Module, task: uw.Task) -> uw.Influence:
        return uw.Influence(model, task, memory="90MB", progress=False)

    checkpoints = [network(seed) for seed in (1, 2, 3)]
    method = uw.Ensemble(network(), uw.Classification(), checkpoints=checkpoints, method=made).fit((X, Y))
    assert [member.memory for member in method.members] == [30 << 20] * 3


def test_it_is_the_mean_of_its_members(tmp_path):
    """Of models and of files alike; the model that it is made with is not touched."""
    models = [network(seed) for seed in (1, 2, 3)]
    query = (X[:4], Y[:4])
    alone = [single(model).attribute(query, per_layer=True) for model in models]
    expected = torch.stack([s.values for s in alone]).mean(0)
    files = [tmp_path / f"{number}.safetensors" for number in range(3)]
    for model, file in zip(models, files, strict=True):
        save_file(model.state_dict(), file)
    base = network()
    before = {k: v.clone() for k, v in base.state_dict().items()}
    for checkpoints in (models, files):
        method = uw.Ensemble(base, uw.Classification(), checkpoints=checkpoints, method="ekfac:damping=0.01")
        scores = method.fit((X, Y)).attribute(query, per_layer=True, ids=list("abcd"))
        assert torch.allclose(scores.values, expected, rtol=1e-12, atol=0)
        assert scores.unit == alone[0].unit and scores.query_ids == list("abcd")
        assert torch.allclose(sum(scores.layers.values()), scores.values, rtol=1e-10, atol=1e-15)
        own = torch.stack([single(model).self_influence().values for model in models]).mean(0)
        assert torch.allclose(method.self_influence().values, own, rtol=1e-12, atol=0)
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    assert scores.info["ensemble"] == 3
    assert len({member["fingerprints"]["model"] for member in scores.info["members"]}) == 3


def test_equal_members_count_alike():
    """A member whose scores are a thousand times larger has no more weight; there is no unit left."""
    models, query = [network(seed) for seed in (1, 2)], (X[:4], Y[:4])
    plain = {"checkpoints": models, "method": "ekfac:damping=0.01", "equal": True}
    method = uw.Ensemble(network(), uw.Classification(), **plain).fit((X, Y))
    scores = method.attribute(query, per_layer=True)
    alone = [single(model).attribute(query).values.numpy() for model in models]
    expected = sum(a / np.sqrt((a**2).mean(1, keepdims=True)) for a in alone) / 2
    assert np.allclose(scores.values.numpy(), expected, rtol=1e-12)
    assert scores.unit is None and scores.info["equal"]
    assert torch.allclose(sum(scores.layers.values()), scores.values, rtol=1e-10, atol=1e-12)
    with pytest.raises(uw.UpweightError, match="only ranks"):
        scores.removal_effect([0])
    with pytest.raises(uw.UpweightError, match="equal=False"):
        method.self_influence()


def test_tiles_on_disk(tmp_path):
    method = uw.Ensemble(network(), uw.Classification(), checkpoints=nearby(network())).fit((X, Y))
    kept = method.attribute((X, Y), out=tmp_path).values
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-0000", "checkpoint-0001"}
    assert torch.equal(kept, method.attribute((X, Y)).values)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"checkpoints": []}, "empty"),
        ({"checkpoints": network().state_dict()}, "put it into a list"),
        ({"checkpoints": [network()], "method": "nothing"}, "nothing"),
        ({"checkpoints": [network()], "method": 3}, "expected a name or a function"),
        ({"checkpoints": [network(), nn.Linear(2, 2)]}, "checkpoint 1 is of another architecture"),
        ({"checkpoints": [{k: v * float("nan") for k, v in network().state_dict().items()}]}, "checkpoint 0 holds NaN"),
    ],
)  # fmt: skip
def test_refused_in_one_line(options, said):
    with pytest.raises(uw.UpweightError, match=said) as error:
        uw.Ensemble(network(), uw.Classification(), **options).fit((X, Y))
    assert "\n" not in str(error.value)
    with pytest.raises(uw.UpweightError, match="not fitted"):
        uw.Ensemble(network(), uw.Classification(), checkpoints=[network()]).attribute((X, Y))
