"""What an attributor leaves behind: the model and the random states as they were, results that survive a file."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from upweight._conformance.problem import Measured, Problem, Violated, close
from upweight._random import preserved, reseed
from upweight.errors import UpweightError
from upweight.scores import Scores


def file(problem: Problem) -> Measured:
    """Scores that were saved and loaded are the same, evidence included."""
    scores = problem.scores()
    if not isinstance(scores.info.get("method"), str):
        raise Violated("info['method'] is missing, expected the method's name")
    with tempfile.TemporaryDirectory() as folder:
        loaded = Scores.load(scores.save(Path(folder) / "scores"))
    same = (
        list(loaded.query_ids) == list(scores.query_ids)
        and list(loaded.train_ids) == list(scores.train_ids)
        and loaded.unit == scores.unit
        and loaded.info == json.loads(json.dumps(scores.info))
    )
    if not same:
        raise Violated("ids, unit or info changed on the way through a file")
    return close(loaded.values, scores.values, "loaded scores", 1e-15)


def model_untouched(problem: Problem) -> None:
    """The model is bit for bit as it was: values, versions, flags, gradients, hooks, modes."""
    before = _snapshot(problem.model)
    _everything(problem)
    after = _snapshot(problem.model)
    changed = [what for what in {**before, **after} if before.get(what) != after.get(what)]
    if changed:
        raise Violated(f"changed: {', '.join(changed[:3])}" + ("" if len(changed) < 4 else ", ..."))


def random_states(problem: Problem) -> None:
    """The global random states of torch, numpy and Python are as they were."""
    with preserved():
        reseed(987_654_321)  # a state that nobody would happen to set
        before = _random_states()
        _everything(problem)
        after = _random_states()
    if changed := [what for what in before if before[what] != after[what]]:
        raise Violated(f"changed: the random state of {', '.join(changed)}")


def _everything(problem: Problem) -> None:
    method = problem.fitted()
    method.attribute(problem.query)
    with suppress(UpweightError):  # a method may have none
        method.self_influence()


def _snapshot(model: nn.Module) -> dict[str, object]:
    seen: dict[str, object] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen[f"the values of {name}"] = (
            tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
        seen[f"the version of {name}"] = (id(tensor), tensor.data_ptr(), tensor._version)
        seen[f"requires_grad of {name}"] = tensor.requires_grad
        seen[f"the gradient of {name}"] = None if tensor.grad is None else tensor.grad.tolist()
        seen[f"hooks on {name}"] = len(tensor._backward_hooks or ())
    for name, module in model.named_modules():
        name = name or "the model"
        seen[f"the module {name}"] = (id(module), type(module))
        seen[f"the mode of {name}"] = module.training
        hooks = {k: len(v) for k, v in vars(module).items() if "hooks" in k and isinstance(v, dict)}
        seen[f"hooks on {name}"] = hooks
        seen[f"the attributes of {name}"] = sorted(vars(module))
    return seen


def _random_states() -> dict[str, object]:
    numpys = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one is what must not change
    torchs: Tensor = torch.get_rng_state()
    return {"torch": torchs.numpy().tobytes(), "numpy": str(numpys), "Python": random.getstate()}


SURROUNDING_LAWS: dict[str, Callable[[Problem], Measured | None]] = {
    "save and load": file,
    "model untouched": model_untouched,
    "random states": random_states,
}
