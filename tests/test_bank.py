"""The bank trains every model once, keeps what is finished, and tells a train_fn that does not do its work."""

import os
import signal
import subprocess
import sys
import textwrap
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from banks import TASK, N, Trainer, bank, network, problem
from refusals import refused

import upweight as uw
from upweight.errors import CacheMismatchError
from upweight.evaluate import subsets


def by_hand(run):
    model = Trainer()(run.indices, run.seed)
    x, y = problem()[1]
    losses = torch.nn.functional.cross_entropy(model(x).detach().double(), y, reduction="none")
    return losses.float().double().numpy()  # computed from the outputs in float64, and rounded once


def test_outcomes_are_the_measurements_of_models_trained_by_hand(tmp_path):
    made = bank(tmp_path)
    report = made.run()
    assert (report.trained, report.finished, report.failed) == (8, 8, [])
    outcomes = made.outcomes("queries")
    assert outcomes.values.shape == (4, 2, 6) and not outcomes.higher_is_better
    for run in made._plan:
        np.testing.assert_array_equal(outcomes.values[run.subset, run.seed], by_hand(run))
    np.testing.assert_array_equal(outcomes.masks, made.subsets.masks)


def test_a_margin_is_kept_in_loss_orientation(tmp_path):
    task = uw.Classification(measurement="margin")
    made = uw.RetrainingBank(tmp_path, Trainer(), task, N, subsets=3, seeds=1, progress=False)
    x, y = problem()[1]
    made.measure((x, y), "queries")
    made.run()
    outcomes, run = made.outcomes("queries"), made._plan.run(1, 0)
    logits = Trainer()(run.indices, 0)(x).detach()
    margin = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    np.testing.assert_allclose(outcomes.values[1, 0], -margin, atol=1e-6)
    assert outcomes.higher_is_better


def test_a_finished_bank_trains_nothing_and_one_that_grows_only_what_is_new(tmp_path):
    log = tmp_path / "log"
    first = bank(tmp_path / "bank", Trainer(log))
    first.run()
    before = first.outcomes("queries").values
    again = bank(tmp_path / "bank", Trainer(log), count=5, seeds=3)
    with refused("7 models are still to be trained"):
        again.outcomes("queries")
    assert again.run().trained == 15 - 8
    assert max(Counter(log.read_text().split()).values()) == 1
    np.testing.assert_array_equal(again.outcomes("queries").values[:4, :2], before)


SCRIPT = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from banks import Trainer, bank
    from upweight import store

    kill_at, moment, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    count = 0
    def die(*rest):
        import os
        os.kill(os.getpid(), 9)
    def fault(indices, seed, model):  # called when a model is trained, before it is measured
        global count
        count += 1
        if count == kill_at and moment == "trained":
            die()
    write = store.ShardStore.write
    def counted(self, *rest):
        if count == kill_at and moment == "writing":  # the file is begun, its ledger line is not there
            store.replace_file = lambda path, writes: (path.with_name("torn").touch(), die())
        if count == kill_at and moment == "ledger":
            self._append = die
        write(self, *rest)
        if count == kill_at and moment == "written":
            die()
        print(rest[0], flush=True)
    store.ShardStore.write = counted
    made = bank(folder, Trainer(folder.with_name("log"), fault), count=7, seeds=2)
    made.run()
    """
)


def run_script(kill_at, moment, folder):
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script, str(kill_at), moment, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
    return done.returncode


@pytest.mark.slow
def test_ten_kills_lose_no_finished_model_and_train_none_twice(tmp_path):
    """A model is finished once its ledger line is written: a kill loses at most the one at hand."""
    moments = [(1, "trained"), (1, "writing"), (2, "ledger"), (2, "written"), (1, "written")] * 2
    lost = 0
    for kill_at, moment in moments:
        assert run_script(kill_at, moment, tmp_path / "bank") == -signal.SIGKILL
        lost += moment != "written"
    assert run_script(0, "", tmp_path / "bank") == 0
    trained = Counter((tmp_path / "log").read_text().split())
    assert len(trained) == 14
    assert sum(trained.values()) == 14 + lost, "a model that was finished has been trained again"
    resumed, whole = bank(tmp_path / "bank", count=7), bank(tmp_path / "whole", count=7)
    whole.run()
    assert resumed.run().trained == 0
    np.testing.assert_array_equal(resumed.outcomes("queries").values, whole.outcomes("queries").values)


def raising(indices, seed, model):
    if seed == 1 and len(indices) == N // 2 and 0 in indices:
        raise RuntimeError("out of luck")


def making_nan(indices, seed, model):
    if seed == 1 and 0 in indices:
        model.bias.data.fill_(float("nan"))


@pytest.mark.parametrize(("fault", "said"), [(raising, "out of luck"), (making_nan, "NaN or infinite")])
def test_a_failed_run_is_tried_twice_reported_and_left_out(fault, said, tmp_path):
    log = tmp_path / "log"
    made = bank(tmp_path / "bank", Trainer(log, fault), count=6)
    with_zero = made.subsets.masks[:, 0]
    with pytest.warns(UserWarning, match=f"of 12 runs failed twice.*{said}"):
        report = made.run()
    assert {(subset, seed) for subset, seed, _ in report.failed} == {
        (s, 1) for s in np.flatnonzero(with_zero)
    }
    assert said in str(report)
    counts = Counter(log.read_text().split())
    assert sorted(counts.values()) == [1] * (12 - with_zero.sum()) + [2] * with_zero.sum()
    outcomes = made.outcomes("queries")
    assert np.isnan(outcomes.values[with_zero, 1]).all() and np.isfinite(outcomes.values[:, 0]).all()
    np.testing.assert_array_equal(outcomes.complete().masks, made.subsets.masks[~with_zero])
    with pytest.warns(UserWarning, match="failed twice"):  # a later call tries it once more
        assert made.run().trained == 0
    assert sorted(Counter(log.read_text().split()).values()) == [*sorted(counts.values())[:-2], 3, 3]


def test_a_run_that_fails_once_is_repaired(tmp_path):
    seen = []

    def once(indices, seed, model):
        seen.append(seed)
        if len(seen) == 5:
            raise RuntimeError("a full disk")

    report = bank(tmp_path, Trainer(fault=once)).run()
    assert report.failed == [] and report.finished == 8 and len(seen) == 9


def test_all_runs_failing_is_an_error(tmp_path):
    def always(indices, seed, model):
        raise RuntimeError("no data")

    with refused("all 8 runs failed.*no data"):
        bank(tmp_path, Trainer(fault=always)).run()


def test_a_train_fn_that_ignores_its_seed_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="ignores its seed: seeds 0 and 1 gave the same model"):
        bank(tmp_path, Trainer(fault="seed")).run()


def test_a_train_fn_that_heeds_both_is_not_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bank(tmp_path, Trainer()).run()


@pytest.mark.parametrize(
    "chosen",
    [subsets.half_subsets(N, 4), subsets.leave_one_out(N, range(6))],
    ids=["halves", "leave-one-out"],
)
def test_a_train_fn_that_ignores_its_indices_is_refused_at_once(chosen, tmp_path):
    log = tmp_path / "log"
    with refused("train_fn ignores its indices"):
        bank(tmp_path / "bank", Trainer(log, "indices"), subsets=chosen).run()
    assert len(log.read_text().split()) <= 4


def test_leaving_one_out_asks_two_halves_whether_indices_matter(tmp_path):
    made = bank(tmp_path, subsets=subsets.leave_one_out(N, [3, 4]))
    assert made.run().finished == 6
    assert made.outcomes("queries").values.shape == (3, 2, 6)


def test_changed_labels_reach_the_train_fn(tmp_path):
    y = problem()[0][1]
    flipped = {i: 1 - int(y[i]) for i in range(N)}
    chosen = subsets.full(N) + subsets.label_changes(N, [flipped])
    made = bank(tmp_path, subsets=chosen, seeds=1)
    made.run()
    plain, changed = made.outcomes("queries").means
    assert plain.mean() < 0.7 < changed.mean()
    with refused("train_fn takes no argument 'labels'"):
        uw.RetrainingBank(tmp_path / "b", lambda indices, seed: None, TASK, N, subsets=chosen)


def test_kept_models_measure_further_queries(tmp_path):
    options = {"keep_models": True, "model_fn": network}
    made = bank(tmp_path / "kept", **options)
    made.run()
    (x, y), _ = problem()
    made.measure((x[:5], y[:5]), "more", ids=list("abcde"))
    later = made.outcomes("more")
    assert later.query_ids == list("abcde")
    at_once = bank(tmp_path / "once")
    at_once.measure((x[:5], y[:5]), "more")
    at_once.run()
    np.testing.assert_array_equal(later.values, at_once.outcomes("more").values)
    resumed = bank(tmp_path / "kept", **options)
    np.testing.assert_array_equal(resumed.outcomes("more").values, later.values)
    model = resumed.model(2, 1)
    assert not model.training
    losses = TASK.measure(model, problem()[1]).detach()
    np.testing.assert_array_equal(losses, resumed.outcomes("queries").values[2, 1].astype(np.float32))


def test_queries_that_come_too_late_are_refused(tmp_path):
    made = bank(tmp_path / "a")
    made.run()
    (x, y), _ = problem()
    with refused("8 finished models did not measure 'more' -> use a new folder"):
        made.measure((x, y), "more")
    with refused("no queries are called 'more'"):
        made.outcomes("more")
    kept = bank(tmp_path / "b", keep_models=True)
    kept.run()
    with refused("pass model_fn="):
        kept.measure((x, y), "more")


def test_a_folder_of_another_bank_is_refused(tmp_path):
    bank(tmp_path).run()
    with refused("settings.rate"):
        bank(tmp_path, settings={"rate": 0.1})
    with refused("holds a model of another subset 0 than 'random 0'"):
        bank(tmp_path, subsets=subsets.half_subsets(N, 4, seed=1))
    part = bank(tmp_path, count=3, seeds=[1])
    assert part.run().trained == 0 and part.outcomes("queries").values.shape == (3, 1, 6)
    with refused("n"):
        uw.RetrainingBank(tmp_path, Trainer(), TASK, N + 1, subsets=3)
    with refused("measurement"):
        uw.RetrainingBank(tmp_path, Trainer(), uw.Classification(measurement="margin"), N, subsets=3)
    x, y = problem()[1]
    other = uw.RetrainingBank(
        tmp_path, Trainer(), TASK, N, subsets=subsets.half_subsets(N, 4, paired=False), seeds=2
    )
    with pytest.raises(CacheMismatchError, match="measured other queries under the name 'queries'"):
        other.measure((x + 1, y), "queries")


def test_bad_arguments_are_refused(tmp_path):
    with refused("nothing would be kept"):
        uw.RetrainingBank(tmp_path, Trainer(), TASK, N, subsets=3).run()
    with refused("no repeats"):
        uw.RetrainingBank(tmp_path, Trainer(), TASK, N, subsets=3, seeds=[1, 1])
    with refused("subsets are of 24 examples, but n=25"):
        uw.RetrainingBank(tmp_path, Trainer(), TASK, N + 1, subsets=subsets.full(N))
    with refused("expected a Task"):
        uw.RetrainingBank(tmp_path, Trainer(), "classification", N)
    with refused("position 24 is not among the 24"):
        subsets.removals(N, [[N]])
    with refused("is empty"):
        subsets.removals(3, [[0, 1, 2]])


def test_changed_code_is_warned_of(tmp_path):
    def train_fn(indices, seed):
        return Trainer()(indices, seed)

    bank(tmp_path, train_fn).run()

    def train_fn(indices, seed):
        return Trainer()(indices, seed + 1)

    with pytest.warns(UserWarning, match="the code of train_fn has changed"):
        bank(tmp_path, train_fn)


@pytest.mark.slow
def test_worker_processes_give_the_same_and_run_on_one_thread(tmp_path):
    alone, workers = bank(tmp_path / "alone"), bank(tmp_path / "workers", n_jobs=2)
    alone.run()
    workers.run()
    np.testing.assert_array_equal(workers.outcomes("queries").values, alone.outcomes("queries").values)


@pytest.mark.slow
def test_a_real_dask_cluster_gives_the_same(tmp_path):
    import distributed

    alone, cluster = bank(tmp_path / "alone"), bank(tmp_path / "dask", backend="dask")
    alone.run()
    with (
        warnings.catch_warnings(),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as scheduler,
        distributed.Client(scheduler),
    ):
        warnings.simplefilter("ignore")
        assert cluster.run().finished == 8
    np.testing.assert_array_equal(cluster.outcomes("queries").values, alone.outcomes("queries").values)


def test_training_leaves_the_global_random_state_and_the_threads_alone(tmp_path):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    bank(tmp_path).run()
    assert torch.equal(torch.get_rng_state(), before) and torch.get_num_threads() == threads
