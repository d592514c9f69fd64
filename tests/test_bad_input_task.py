"""Targets and options that a task cannot have are refused with the way out."""

import pytest
import torch
from torch import Tensor, nn

import upweight as uw
from upweight.errors import UpweightError
from upweight.task import BinaryClassification, Classification, Regression


class Fixed(nn.Module):
    """A model whose outputs are its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("task", "batch", "message"),
    [
        (
            Classification(),
            (torch.zeros(2, 3), torch.zeros(2)),
            r"targets have dtype torch.float32.* -> targets.long",
        ),
        (
            Classification(),
            (torch.zeros(2, 3), torch.eye(2, 3)),
            r"logits have shape \(2, 3\) and targets \(2, 3\)",
        ),
        (
            Classification(),
            (torch.zeros(2, 3, 5), torch.zeros(2, 5).long()),
            r"logits have shape \(2, 3, 5\)",
        ),
        (
            BinaryClassification(),
            (torch.zeros(2, 2), torch.zeros(2)),
            "expected one logit and one target an example",
        ),
        (
            BinaryClassification(),
            (torch.zeros(2), torch.zeros(2, 3)),
            "expected one logit and one target an example",
        ),
        (
            Regression(),
            (torch.zeros(2, 1), torch.zeros(2, 3)),
            r"outputs have shape \(2, 1\) but targets \(2, 3\)",
        ),
        (Regression(), (torch.zeros(2, 6), torch.zeros(2, 2, 3)), r"\(2, 6\) but targets \(2, 2, 3\)"),
        (Regression(), (torch.zeros(2, 2, 3), torch.zeros(2, 3, 2)), r"\(2, 2, 3\) but targets \(2, 3, 2\)"),
        (Regression(), (torch.zeros(2, 2), torch.zeros(2)), r"\(2, 2\) but targets \(2,\)"),
    ],
)
def test_targets_that_do_not_fit_the_outputs_are_refused(task, batch, message):
    with pytest.raises(UpweightError, match=message) as caught:
        task.train_loss(Fixed(), batch)
    assert "\n" not in str(caught.value) and " -> " in str(caught.value)


@pytest.mark.parametrize(
    ("task", "targets", "message"),
    [
        (Classification(), [0, 2, 3], "example c has label 3, expected 0 to 2 .*the model has 3 outputs"),
        (Classification(), [0, -1, 3], "example b has label -1, expected 0 to 2"),
        (BinaryClassification(), [0, 1, 2], "example c has target 2, expected 0 or 1 -> recode"),
        (BinaryClassification(), [0.0, 0.5, 1.0], "example b has target 0.5, expected 0 or 1"),
    ],
)
def test_wrong_labels_are_refused_by_name(task, targets, message):
    with pytest.raises(UpweightError, match=message):
        task.check_targets((torch.zeros(3, 3), torch.tensor(targets)), ["a", "b", "c"], (3,))


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(), torch.full((3, 2), -100)),
        (Classification(), torch.zeros(3, dtype=torch.complex64)),
        (BinaryClassification(), torch.full((3, 2), 7.0)),
    ],
    ids=["padded tokens", "complex numbers", "several labels"],
)
def test_targets_of_another_form_are_left_to_the_check_of_the_outputs(task, targets):
    batch = (torch.zeros(3, 3 if isinstance(task, Classification) else 1), targets)
    task.check_targets(batch, ["a", "b", "c"], (3,))
    with pytest.raises(UpweightError, match=r"expected .* -> "):
        task.train_loss(Fixed(), batch)


def test_unknown_options_are_refused():
    with pytest.raises(
        UpweightError, match=r"measurement='accuracy' is unknown -> use one of \['logit', 'loss', 'margin'\]"
    ):
        Classification("accuracy")
    with pytest.raises(UpweightError, match=r"scale=0 must be positive"):
        Regression(scale=0)


def test_a_model_that_returns_no_tensor_is_refused():
    class Tuple(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(
        UpweightError, match=r"the model returned tuple, expected a tensor -> use Task.from_functions"
    ):
        Classification().train_loss(Tuple(), (torch.zeros(2, 3), torch.zeros(2).long()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8])
def test_labels_of_any_integer_type_are_read(dtype):
    model, x = torch.nn.Linear(2, 3), torch.randn(6, 2)
    labels = torch.arange(6) % 3
    scores = [
        uw.Influence(model, Classification(), damping=0.1, progress=False)
        .fit((x, y))
        .attribute((x, y))
        .values
        for y in (labels, labels.to(dtype))
    ]
    assert torch.equal(*scores)


def test_a_parameter_without_numbers_changes_nothing():
    model, x, y = torch.nn.Linear(2, 3), torch.randn(6, 2), torch.arange(6) % 3
    expected = (
        uw.Influence(model, Classification(), damping=0.1, progress=False).fit((x, y)).attribute((x, y))
    )
    model.register_parameter("nothing", torch.nn.Parameter(torch.zeros(0)))
    found = uw.Influence(model, Classification(), damping=0.1, progress=False).fit((x, y)).attribute((x, y))
    assert torch.equal(found.values, expected.values)
