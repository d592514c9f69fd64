"""`check_attributor` names what is broken in attributors that are broken on purpose, and reports on every check."""

import copy
import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import upweight as uw
from upweight.testing import Check, ConformanceError, ConformanceReport, check_attributor


class Base(uw.Influence):
    def __init__(self, model: nn.Module, task: uw.Task) -> None:
        super().__init__(model, task, curvature="kfac", damping=1e-2)

    def changed(self, values: Tensor, query, scores: uw.Scores) -> Tensor:
        return values

    def attribute(self, query, **options) -> uw.Scores:
        scores = super().attribute(query, **options)
        return replace(scores, values=self.changed(scores.values, query, scores), layers=None)


class Negated(Base):
    def changed(self, values, query, scores):
        return -values


class Transposed(Base):
    def attribute(self, query, **options):
        scores = uw.Influence.attribute(self, query, **options)
        return uw.Scores(scores.values.T, scores.train_ids, scores.query_ids, scores.unit, scores.info)


class TimesN(Base):
    def changed(self, values, query, scores):
        return values * values.shape[1]


class DependsOnBatchSize(Base):
    def changed(self, values, query, scores):
        return values * (1 + 1e-3 / (self.batch_size or 7))


class DependsOnPosition(Base):
    def changed(self, values, query, scores):
        return values * torch.linspace(1, 1.001, values.shape[1])


class DependsOnTheOtherQueries(Base):
    def changed(self, values, query, scores):
        return values + 1e-3 * values.abs().mean()


class WrongIds(Base):
    def attribute(self, query, **options):
        scores = super().attribute(query, **options)
        return replace(scores, train_ids=list(range(len(scores.train_ids))))


class ReversedIds(Base):
    def attribute(self, query, **options):
        scores = super().attribute(query, **options)
        return replace(scores, query_ids=list(reversed(scores.query_ids)))


class NoOrientation(Base):
    def changed(self, values, query, scores):
        return -values if self.task.higher_is_better else values


class WritesToTheModel(Base):
    def changed(self, values, query, scores):
        with torch.no_grad():
            next(self.model.parameters()).add_(0)
        return values


class LeavesGradients(Base):
    def changed(self, values, query, scores):
        self.model(
            query[0] if isinstance(query, tuple) else torch.zeros(1, 4, dtype=torch.float64)
        ).sum().backward()
        return values


class Seeds(Base):
    def changed(self, values, query, scores):
        torch.manual_seed(0)
        return values


class Random(Base):
    def changed(self, values, query, scores):
        return values * (1 + 1e-6 * torch.rand(()))


class Unfreezes(Base):
    def fit(self, train, **options):
        self.model = copy.deepcopy(self.model).requires_grad_(True)
        return super().fit(train, **options)


class NotANumber(Base):
    """0/0 where there is no gradient, mended to a small number."""

    def changed(self, values, query, scores):
        return torch.where(values == 0, 1e-12, values)


class NoLimit(Base):
    def with_damping(self, damping):
        return super().with_damping(float(damping) / 2)


class OtherSelfInfluence(Base):
    def self_influence(self):
        own = super().self_influence()
        return replace(own, values=own.values * 2)


class LayersDoNotAddUp(Base):
    def attribute(self, query, *, per_layer=False):
        scores = uw.Influence.attribute(self, query, per_layer=per_layer)
        if scores.layers is None:
            return scores
        return replace(scores, layers={name: 1.01 * part for name, part in scores.layers.items()})


class EvidenceThatIsNoText(Base):
    def attribute(self, query, **options):
        scores = super().attribute(query, **options)
        return replace(scores, info={**scores.info, "model": self.model})


class AnswersUnfitted(Base):
    def attribute(self, query, **options):
        if self._fitted is None:
            return uw.Scores(torch.ones(5, 12), range(5), range(12))
        return super().attribute(query, **options)


class AcceptsNaN(uw.GradDot):
    def fit(self, train, **options):
        if isinstance(train, tuple):
            train = tuple(t.nan_to_num() if t.is_floating_point() else t for t in train)
        return super().fit(train, **options)


class RaisesOtherErrors(Base):
    def attribute(self, query, **options):
        if isinstance(query, tuple) and query[0].shape[1] != 4:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
        return super().attribute(query, **options)


class AcceptsNothing(Base):
    def attribute(self, query, **options):
        if isinstance(query, tuple) and len(query[0]) == 0:
            return uw.Scores(torch.ones(0, 12), [], range(12))
        return super().attribute(query, **options)


class Copies(Base):
    """Gives the last training example's score a little more."""

    def changed(self, values, query, scores):
        return torch.cat([values[:, :-1], values[:, -1:] * 1.001], 1)


class UnitWithoutASum(Base):
    def attribute(self, query, **options):
        scores = super().attribute(query, **options)
        return replace(scores, info={**scores.info, "higher_is_better": True})


BROKEN: list[tuple[type, str]] = [
    (Negated, "sign"),
    (Transposed, "shape"),
    (TimesN, "weight"),
    (TimesN, "damping limit"),
    (DependsOnBatchSize, "batch size"),
    (DependsOnPosition, "train order"),
    (DependsOnTheOtherQueries, "query order"),
    (WrongIds, "ids"),
    (ReversedIds, "ids"),
    (NoOrientation, "orientation"),
    (WritesToTheModel, "model untouched"),
    (LeavesGradients, "model untouched"),
    (Seeds, "random states"),
    (Random, "determinism"),
    (Unfreezes, "frozen parameters"),
    (NotANumber, "zero gradient"),
    (NoLimit, "damping limit"),
    (OtherSelfInfluence, "self-influence"),
    (LayersDoNotAddUp, "layers"),
    (EvidenceThatIsNoText, "save and load"),
    (AnswersUnfitted, "not fitted"),
    (AcceptsNaN, "NaN input"),
    (RaisesOtherErrors, "shape mismatch"),
    (AcceptsNothing, "empty data"),
    (Copies, "duplicates"),
    (UnitWithoutASum, "unit"),
]


def only(name: str) -> set[str]:
    """Every check but this one, to be left out."""
    from upweight._conformance import LAWS

    return set(LAWS) - {name}


@pytest.mark.parametrize(("broken", "check"), BROKEN, ids=[f"{b.__name__}: {c}" for b, c in BROKEN])
def test_a_broken_attributor_is_caught_by_the_named_check(broken, check):
    sound = uw.GradDot if issubclass(broken, uw.GradDot) else Base
    assert check_attributor(sound, skip=only(check)).passed
    with pytest.raises(ConformanceError, match=rf"\[{check}\]") as caught:
        check_attributor(broken, skip=only(check))
    assert isinstance(caught.value, uw.UpweightError) and isinstance(caught.value, AssertionError)
    assert "\n" not in str(caught.value) and " -> " in str(caught.value)


def test_every_check_is_seen_to_fail():
    from upweight._conformance import LAWS

    assert {check for _, check in BROKEN} == set(LAWS)


# The report ----------------------------------------------------------------------------------------------------------


def test_the_report_lists_every_check_and_prints():
    report = check_attributor(Negated, raise_on_failure=False)
    assert isinstance(report, ConformanceReport) and not report.passed
    assert "sign" in [check.name for check in report.failures]
    assert report["sign"].status == "failed" and "expected > 0" in report["sign"].detail
    assert report["damping limit"].error > 1 and report["damping limit"].tolerance == 1e-6
    assert report["shape"] == Check("shape", report["shape"].law, "passed")
    assert all(check.law for check in report.checks)
    with pytest.raises(KeyError, match="no check 'nonsense'"):
        report["nonsense"]
    assert "failed          sign: training example" in str(report)
    console = Console(record=True, width=140, file=io.StringIO())
    console.print(report)
    text = console.export_text()
    assert "Negated" in text and "proponent" in text


def test_what_cannot_be_made_fails_every_check():
    class Needy:
        def __init__(self, model, task) -> None:
            pass

    report = check_attributor(Needy, raise_on_failure=False)
    assert report["shape"].status == "failed" and "AttributeError" in report["shape"].detail


def test_a_problem_of_ones_own():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 2)).eval()
    train, query = ({"input": torch.randn(n, 1, 8), "labels": torch.randn(n, 2)} for n in (9, 4))
    options = {
        "model": model,
        "task": uw.Regression(measurement="prediction"),
        "train": train,
        "query": query,
    }
    report = check_attributor(uw.GradDot, **options, skip=("sign",))
    assert report["self-influence"].detail == "the measurement is not the training loss"
    assert (
        report["zero gradient"].status == "not applicable"
        and report["sign"].detail == "left out by the caller"
    )
    with pytest.raises(uw.UpweightError, match="without query, model, task"):
        check_attributor(uw.GradDot, train)
    with pytest.raises(uw.UpweightError, match="another number of queries"):
        check_attributor(uw.GradDot, **{**options, "query": train})
    with pytest.raises(uw.UpweightError, match="skip names"):
        check_attributor(uw.GradDot, skip=("signs",))
