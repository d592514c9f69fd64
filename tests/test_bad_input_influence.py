"""What `Influence` refuses, each in one line that names the cause and the way out."""

import errno
from collections.abc import Callable

import pytest
import torch
from networks import digits, trained

import upweight as uw
from upweight import store
from upweight.errors import UpweightError


def method(**options) -> uw.Influence:
    return uw.Influence(trained("mlp"), uw.Classification(), **{"progress": False, **options})


def small() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(t[:40] for t in digits()[0])


def changed() -> None:
    fitted = method(fisher="empirical").fit(small())
    with torch.no_grad():
        fitted.model[1].weight.mul_(2)
    fitted.attribute(small())


def changed_in_a_buffer():
    """One that no state dict holds."""
    model = trained("mlp")
    model.register_buffer("shift", torch.zeros(10), persistent=False)
    model.register_forward_hook(lambda module, args, outputs: outputs + module.shift)
    fitted = uw.Influence(model, uw.Classification(), progress=False).fit(small())
    model.shift[0] = 1
    return fitted.attribute(small())


def changed_by_data() -> None:
    fitted = method(fisher="empirical").fit(small())
    fitted.model[1].weight.data.mul_(2)  # not counted by torch
    fitted.attribute(small())


def frozen() -> None:
    fitted = method(fisher="empirical").fit(small())
    fitted.model[1].requires_grad_(False)
    fitted.attribute(small())


def replaced() -> None:
    fitted = method(fisher="empirical").fit(small())
    fitted.model.load_state_dict({k: v.clone() for k, v in fitted.model.state_dict().items()}, assign=True)
    fitted.attribute(small())


def nan_query() -> None:
    x, y = (t.clone() for t in small())
    x[3] = float("nan")
    method(fisher="empirical").fit(small()).attribute((x, y), ids=[f"q{i}" for i in range(40)])


def function_task() -> uw.Task:
    return uw.Task.from_functions(
        lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    )


CASES: dict[str, tuple[Callable[[], object], list[str]]] = {
    "not fitted": (lambda: method().attribute(small()), ["fit(train)"]),
    "negative damping": (lambda: method(damping=-1.0), ["damping=-1.0", ">= 0"]),
    "NaN damping": (lambda: method(damping=float("nan")), ["damping=nan"]),
    "damping of an unknown layer": (
        lambda: method(fisher="empirical", damping={"nowhere": 1.0}).fit(small()).attribute(small()),
        ["nowhere"],
    ),
    "singular curvature": (
        lambda: method(fisher="empirical", damping=0.0).fit(small()).attribute(small()),
        ["singular", "damping"],
    ),
    "singular curvature in an index": (
        lambda: method(fisher="empirical", damping=0.0).fit(small(), cache=uw.Cache("unused", "index")),
        ["singular", "damping"],
    ),
    "unknown curvature": (lambda: method(curvature="newton").fit(small()), ["newton", "ekfac"]),
    "unknown Fisher": (lambda: method(fisher="guessed").fit(small()), ["guessed", "empirical"]),
    "Fisher without a distribution": (
        lambda: uw.Influence(trained("mlp"), function_task(), fisher="exact", progress=False).fit(small()),
        ["exact", "empirical"],
    ),
    "unknown precision": (lambda: uw.Cache("somewhere", precision="int3"), ["int3", "int8"]),
    "nonsense memory": (lambda: method(memory="lots"), ["lots", "2GB"]),
    "memory with two points": (lambda: method(memory="1.2.3GB"), ["1.2.3GB", "2GB"]),
    "no memory": (lambda: method(memory=None), ["memory=None", "2GB"]),
    "a list of parameters": (
        lambda: method(parameters=["1.weight"]).fit(small()),
        ["list", "names.__contains__"],
    ),
    "a function for a model": (
        lambda: uw.Influence(trained("mlp").forward, uw.Classification()).fit(small()),
        ["torch.nn.Module"],
    ),
    "no task": (lambda: uw.Influence(trained("mlp"), torch.nn.CrossEntropyLoss()), ["Task"]),
    "model changed since fit": (changed, ["changed since fit"]),
    "model changed through .data since fit": (changed_by_data, ["changed since fit"]),
    "a buffer changed that no state dict holds": (changed_in_a_buffer, ["changed since fit"]),
    "a layer frozen since fit": (frozen, ["1.weight", "frozen since fit", "requires_grad"]),
    "parameters replaced since fit": (replaced, ["1.weight", "replaced since fit", "fit again"]),
    "empty queries": (
        lambda: (
            method(fisher="empirical")
            .fit(small())
            .attribute((torch.zeros(0, 1, 8, 8), torch.zeros(0).long()))
        ),
        ["empty"],
    ),
    "queries of another shape": (
        lambda: (
            method(fisher="empirical")
            .fit(small())
            .attribute((torch.zeros(2, 3, 9, 9), torch.zeros(2).long()))
        ),
        ["[3, 9, 9]", "[1, 8, 8]"],
    ),
    "NaN in a query": (nan_query, ["q3", "NaN"]),
    "an index without an eigenbasis": (
        lambda: method(curvature="identity").fit(small(), cache=uw.Cache("unused", "index")),
        ["index", "ekfac"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused_in_one_line(name: str, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    act, words = CASES[name]
    with pytest.raises(uw.UpweightError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_an_index_serves_its_damping_only(tmp_path):
    fitted = method(fisher="empirical", damping=1e-2).fit(small(), cache=uw.Cache(tmp_path, "index"))
    with pytest.raises(uw.UpweightError, match="another damping"):
        fitted.with_damping(1e-3).attribute(small())
    with pytest.raises(uw.UpweightError, match="no layers apart"):
        fitted.attribute(small(), per_layer=True)


def test_a_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(uw.StoreError, match="file"):
        method(fisher="empirical").fit(small(), cache=tmp_path / "file" / "cache")


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path, monkeypatch):
    real, calls = store.replace_file, 0

    def full(path, writes):
        nonlocal calls
        calls += path.suffix == ".safetensors"
        if calls == 1 and path.suffix == ".safetensors":
            raise uw.StoreError(
                f"{path} cannot be written: {errno.errorcode[errno.ENOSPC]} -> free some space"
            )
        return real(path, writes)

    monkeypatch.setattr(store, "replace_file", full)
    with pytest.raises(uw.StoreError, match="free some space"):
        method(fisher="empirical").fit(small(), cache=tmp_path)
    fitted = method(fisher="empirical").fit(small(), cache=tmp_path)
    expected = method(fisher="empirical").fit(small()).attribute(small())
    torch.testing.assert_close(fitted.attribute(small()).values, expected.values, rtol=1e-5, atol=1e-6)


def test_replacements_of_another_width_are_refused():
    fitted = method(damping=0.1).fit(small())
    x, y = small()
    with pytest.raises(UpweightError, match="refuses the replacements"):
        fitted.change([0], (x[:1].flatten(1)[:, :5], y[:1]), small())


def test_a_model_that_was_never_run_is_refused():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(10))
    with pytest.raises(UpweightError, match=r"1.weight has no shape yet"):
        uw.GradDot(model, uw.Classification()).fit(small())
