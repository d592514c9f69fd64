"""The exact Gauss-Newton matrix and Hessian against autograd's dense ones, in float64, over the registry of models."""

import curvlinops
import oracles
import pytest
import torch
from cases_all import EXACT, WITH_OUTPUTS, N, each, track
from curvature_oracles import relative
from gauss_newton import flat_order, in_flat_order, undone
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import upweight as uw
from upweight.curvature.exact import ExactCurvature
from upweight.curvature.root import joined
from upweight.data import Examples
from upweight.errors import UpweightError
from upweight.gradients import Tracker
from upweight.gradients.layers import from_parameters

REFUSED = {
    "sparse embedding": "sparse, which has no second derivative",
    "embedding bag": "no second derivative",
    "weight norm": "not symmetric",  # torch's double backward of it is wrong
}
"""Cases whose Hessian torch itself cannot compute, and what is said of them."""
IN_ITS_LOSS = "weight decay inside the loss"  # looks its parameter up by name, which functional_call hides
WHOLE_UP_TO = 250
"""Parameters up to which the whole dense Hessian is compared; products with a few vectors beyond."""


def cross_entropy(model: nn.Module, batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def vectors(p: int, k: int) -> Tensor:
    return torch.randn(p, k, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mean_loss(tracker: Tracker, case, batch):
    """``flat parameters -> mean loss``, one example at a time, and the parameters as they are."""
    parameters = tracker.parameters
    wrapped = _Loss(tracker.model, case.oracle_loss())

    def mean(flat: Tensor) -> Tensor:
        parts = flat.split([p.numel() for p in parameters.values()])
        moved = {
            f"model.{n}": part.reshape(p.shape)
            for (n, p), part in zip(parameters.items(), parts, strict=True)
        }
        return sum(torch.func.functional_call(wrapped, moved, (oracles.one(batch, i),)) for i in range(N)) / N

    return mean, torch.cat([p.detach().flatten() for p in parameters.values()])


class _Loss(nn.Module):
    def __init__(self, model: nn.Module, loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch) -> Tensor:
        return self.loss(self.model, batch).sum()


def dense_ggn(tracker: Tracker, case, batch) -> Tensor:
    return sum(oracles.fisher(case.kind, tracker.model, batch, i, case.parameters) for i in range(N)) / N


def close(found: Tensor, truth: Tensor, tolerance: float = 1e-10) -> None:
    assert float((found - truth).abs().max()) <= tolerance * float(truth.abs().max()) + 1e-14


@each([case for case in EXACT if case.name not in (*REFUSED, IN_ITS_LOSS)])
def test_hessian_equals_autograds(case):
    model, batch, tracker = track(case)
    mean, at = mean_loss(tracker, case, batch)
    H = ExactCurvature(tracker, Examples(batch), "hessian", batch_size=3)
    x = vectors(H.size, 3)
    with oracles.untouched(model):
        found = H.dense() if H.size <= WHOLE_UP_TO else H.product(x)
        sampled = H.sampled_product(x, [4, 1])
    with sdpa_kernel(SDPBackend.MATH):
        if H.size <= WHOLE_UP_TO:
            close(found, in_flat_order(tracker, torch.autograd.functional.hessian(mean, at)))
        else:
            rows = flat_order(tracker)
            for j in range(3):
                v = torch.zeros(H.size, dtype=torch.float64)
                v[rows] = x[:, j]
                close(found[:, j], torch.autograd.functional.hvp(mean, at, v)[1][rows])
    alone = [H.sampled_product(x, [i]) for i in (4, 1)]
    close(sampled, (alone[0] + alone[1]) / 2)


@each([case for case in EXACT if case.name in REFUSED])
def test_a_hessian_that_torch_cannot_compute_is_refused(case):
    model, batch, tracker = track(case)
    with oracles.untouched(model), pytest.raises(UpweightError, match=REFUSED[case.name]):
        ExactCurvature(tracker, Examples(batch), "hessian")


def test_a_penalty_inside_the_loss_is_part_of_the_hessian():
    """What the parameters' penalty adds, to the diagonal of its weight only."""
    case = next(case for case in EXACT if case.name == IN_ITS_LOSS)
    model, batch, tracker = track(case)
    plain = uw.Task.from_functions(cross_entropy)
    H = ExactCurvature(tracker, Examples(batch), "hessian").dense()
    without = ExactCurvature(Tracker(model, plain, Examples(batch)), Examples(batch), "hessian")
    named = {
        name: torch.full((1, *p.shape), 0.2 * (name == "0.weight")) for name, p in tracker.parameters.items()
    }
    added = from_parameters(tracker.layers, named)[0].double()
    order = in_flat_order(tracker, undone(without.tracker, without.dense()))
    close(H, order + torch.diag(added), 1e-7)


@each(WITH_OUTPUTS)
def test_ggn_equals_the_outputs_jacobians(case):
    model, batch, tracker = track(case)
    truth = in_flat_order(tracker, dense_ggn(tracker, case, batch))
    H = ExactCurvature(tracker, Examples(batch), "ggn", batch_size=3)
    x = vectors(H.size, 4)
    with oracles.untouched(model):
        product, dense = H.product(x), H.dense()
        columns, gram = H._by_columns(), H._gram()
        sampled = H.sampled_product(x, range(N))
    for found in (dense, columns, gram):
        close(found, truth)
    close(product, truth @ x)
    close(sampled, truth @ x)
    blocks = ExactCurvature(tracker, Examples(batch), "ggn", blocks=True)
    cut = torch.block_diag(*(truth[a:b, a:b] for a, b in blocks.spans()))
    close(blocks.dense(), cut)
    close(blocks.product(x), cut @ x)


# Beyond the registry --------------------------------------------------------------------------------------------------


def mlp(outputs: int = 3) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double().eval()


def data(n: int = 7, outputs: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, outputs, (n,), generator=generator)


def exact(kind: str = "ggn", task: uw.Task | None = None, outputs: int = 3, **options) -> ExactCurvature:
    examples = Examples(data(outputs=outputs))
    return ExactCurvature(
        Tracker(mlp(outputs), task or uw.Classification(), examples), examples, kind, **options
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("ggn", curvlinops.GGNLinearOperator), ("hessian", curvlinops.HessianLinearOperator)],
)
def test_the_same_as_another_librarys(kind, theirs):
    H = exact(kind)
    model = H.tracker.model
    reference = theirs(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [data()], check_deterministic=False
    )
    truth = reference @ torch.eye(H.size, dtype=torch.float64)
    close(undone(H.tracker, H.dense()), truth)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_l2_is_part_of_the_matrix_and_of_every_product(kind):
    plain, penalised = exact(kind), exact(kind, l2=0.3)
    eye, x = torch.eye(plain.size, dtype=torch.float64), vectors(plain.size, 2)
    close(penalised.dense(), plain.dense() + 0.3 * eye)
    close(penalised.product(x), plain.product(x) + 0.3 * x)
    close(penalised.sampled_product(x, [2, 5]), plain.sampled_product(x, [2, 5]) + 0.3 * x)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_blocks_leave_out_what_couples_layers(kind):
    whole, blocks = exact(kind), exact(kind, blocks=True)
    truth = torch.block_diag(*(whole.dense()[a:b, a:b] for a, b in whole.spans()))
    assert float((truth - whole.dense()).abs().max()) > 1e-3
    close(blocks.dense(), truth)
    close(blocks.product(vectors(whole.size, 2)), truth @ vectors(whole.size, 2))


class Pooled(nn.Module):
    """A sum over a text's positions, without its padding: token 0."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(11, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return (self.head(self.mix(self.table(tokens)).tanh()) * (tokens != 0)[..., None]).sum(1)


def test_mini_batches_of_texts_of_several_lengths():
    """Examples drawn from several batches are multiplied together, those of one length at a time."""
    torch.manual_seed(0)
    lengths, labels = (3, 3, 5, 5, 3, 3, 5, 5), torch.randint(0, 3, (8,))
    texts = [(torch.randint(1, 11, (length,)), label) for length, label in zip(lengths, labels, strict=True)]

    def padded(items):
        return nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True), torch.stack(
            [y for _, y in items]
        )

    task = uw.Classification()
    task.mask = lambda batch: batch[0] != 0
    model, examples = Pooled().double(), Examples(DataLoader(texts, 2, collate_fn=padded))
    H = ExactCurvature(Tracker(model, task, examples), examples)
    x, asked = vectors(H.size, 3), [0, 2, 3, 5, 7]
    alone = [H.sampled_product(x, [i]) for i in asked]
    close(H.sampled_product(x, asked), sum(alone) / 5)
    close(H.product(x), sum(H.sampled_product(x, [i]) for i in range(8)) / 8)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_batches_do_not_matter_and_products_are_counted(kind):
    x = vectors(43, 5)
    whole = exact(kind)
    truth = whole.product(x)
    for size in (1, 2, 7):
        close(exact(kind, batch_size=size).product(x), truth, 1e-13)
    assert torch.equal(whole.product(x), truth)
    assert whole.products == 10
    whole.sampled_product(x, [0, 1])
    assert whole.products == pytest.approx(10 + 5 * 2 / 7)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_memory_decides_what_is_kept_not_what_comes_out(kind):
    x = vectors(43, 3)
    tight = exact(kind, memory=4096, batch_size=2)
    close(tight.product(x), exact(kind).product(x), 1e-13)
    close(tight.sampled_product(x, [1, 4]), exact(kind).sampled_product(x, [1, 4]), 1e-13)
    with pytest.raises(UpweightError, match=r"dense \w+ of 43 parameters takes .* KiB .* solver='cg'"):
        tight.dense()


def test_many_outputs_go_by_differentiating_twice():
    H = exact(outputs=40)
    assert H.columns == 0
    truth = dense_ggn_of(H)
    close(H.dense(), truth)


class OnlyItsLoss(uw.Classification):
    def hessian_root(self, outputs: Tensor) -> Tensor:
        raise NotImplementedError


def test_a_task_that_only_says_its_loss():
    H = exact(task=OnlyItsLoss())
    assert H.columns == 0
    close(H.dense(), exact().dense())


def dense_ggn_of(H: ExactCurvature) -> Tensor:
    batch = H.data.take(range(H.data.n))
    model = H.tracker.model
    total = sum(oracles.fisher("classification", model, batch, i) for i in range(H.data.n))
    return in_flat_order(H.tracker, total / H.data.n)


def test_ggn_of_functions_is_refused_with_a_way_out():
    task = uw.Task.from_functions(cross_entropy)
    with pytest.raises(UpweightError, match="curvature='hessian'"):
        exact(task=task)
    close(exact("hessian", task).dense(), exact("hessian").dense())
    empirical = exact(task=task, fisher="empirical")
    G = empirical.tracker.train(data(), range(7)).dense()
    close(empirical.dense(), G.T @ G / 7)


def test_sampled_fisher_tends_to_the_gauss_newton_matrix():
    """Frobenius error over 420 draws: about 1 / sqrt(420) = 0.05 of the trace; four times that at most."""
    sampled = exact(fisher="sampled", draws=60)
    truth = exact().dense()
    assert float((sampled.dense() - truth).norm() / truth.norm()) < 0.2
    assert relative(sampled.dense(), exact(fisher="sampled", draws=60).dense()) == 0


def test_a_model_whose_output_is_linear_in_its_parameters_has_one_curvature():
    """There the Hessian is the Gauss-Newton matrix."""
    model, examples = nn.Linear(4, 3).double(), Examples(data())
    tracker = Tracker(model, uw.Classification(), examples)
    close(
        ExactCurvature(tracker, examples, "hessian").dense(), ExactCurvature(tracker, examples, "ggn").dense()
    )


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_float32_is_right_to_its_rounding(kind):
    model, examples = mlp().float(), Examples(data())
    x = vectors(43, 4)
    H = ExactCurvature(Tracker(model, uw.Classification(), examples), examples, kind)
    truth = exact(kind).product(x)
    found = H.product(x.float())
    assert found.dtype == torch.float32
    assert relative(found, truth) < 1e-5
    assert H.dense().dtype == torch.float64


def test_wrong_vectors_are_refused():
    with pytest.raises(UpweightError, match=r"shape \(5, 43\), expected \[43, k\]"):
        exact().product(vectors(5, 43))
    with pytest.raises(UpweightError, match="l2=-1"):
        exact(l2=-1)
    with pytest.raises(UpweightError, match="kind='fisher'"):
        exact("fisher")


def test_joined_roots_are_few_and_no_larger_than_was_said():
    """Parts of the same lengths are multiplied together; no more of them are held than asked for."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    batch = torch.randn(40, 6, dtype=torch.float64), torch.arange(40) % 3
    examples = Examples(batch)
    H = ExactCurvature(Tracker(model, uw.Classification(), examples), examples, batch_size=4)
    roots = [step.load() for step in H._roots]
    size = roots[0].nbytes
    x = torch.randn(H.size, 7, dtype=torch.float64)
    named = dict(zip(H.tracker.layers, x.split(H._widths), strict=True))
    expected = [root.product(named, False) for root in roots]
    for most, count in [(0, 10), (3 * size, 4), (100 * size, 1)]:
        found = list(joined(iter(roots), most))
        assert len(found) == count and sum(root.batch for root in found) == 40
        assert all(root.nbytes <= max(most, size) for root in found)
        products = [root.product(named, False) for root in found]
        for name in named:
            torch.testing.assert_close(
                sum(p[name] for p in products), sum(p[name] for p in expected), rtol=1e-12, atol=1e-12
            )
