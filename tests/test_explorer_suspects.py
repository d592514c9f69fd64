"""What comes next in the explorer: suspects by severity, those still to decide, and how far one is."""

import time

import explorers
import torch
from explorers import LABELS, SUSPECTS, N, experiment, issues

from upweight.explorer import suspects
from upweight.explorer.suspects import Selection

bundle = explorers.bundle  # the fixture


def walk(table, wanted, decided, row=None, by=1):
    seen = []
    while (row := suspects.step(table, wanted, decided, row, by)) is not None:
        seen.append(int(table.columns["position"][row]))
    return seen


def test_suspects_come_in_the_order_of_severity(bundle):
    table = issues(bundle)
    assert walk(table, LABELS, {}) == SUSPECTS
    assert walk(table, LABELS, {9: "any"}) == [4, 14, 19]
    assert walk(table, Selection("label", show="decided"), {9: "any"}) == [9]
    assert walk(table, Selection("label", show="all"), {9: "any"}) == SUSPECTS
    assert walk(table, Selection("label", label=1), {}) == [4, 19]
    assert len(walk(table, Selection("label", show="every"), {})) == N
    assert walk(table, Selection("outlier"), {}) == []


def test_back_leads_to_what_was_just_decided(bundle):
    table = issues(bundle)
    row = suspects.step(table, LABELS, {}, None)
    after = suspects.step(table, LABELS, {4: "any"}, row)
    assert table.columns["id"][after] == 9
    assert suspects.step(table, LABELS, {4: "any"}, after, -1) == row
    assert suspects.step(table, LABELS, {4: "any"}, row, -1) is None


def test_a_row_outside_of_the_selection_has_neighbours_by_rank(bundle):
    table = issues(bundle)
    only = Selection("label", label=2)  # example 14 alone, the third
    assert suspects.step(table, only, {}, 0, 1) == 2
    assert suspects.step(table, only, {}, 3, 1) is None
    assert suspects.step(table, only, {}, 3, -1) == 2


def test_progress_counts_suspects_of_the_selection(bundle):
    assert suspects.progress(issues(bundle), LABELS, {4: "any", 0: "any"}) == (1, 4)


def test_a_hundred_thousand_rows_are_stepped_through_at_once():
    n = 100_000
    bundle = experiment(train=(torch.zeros(n, 64), torch.arange(n) % 3))
    table = issues(bundle, range(0, n, 2))
    decided = dict.fromkeys(range(0, n, 4))
    started = time.process_time()
    row = suspects.step(table, LABELS, decided, n // 4)
    suspects.upcoming(table, LABELS, decided, row)
    suspects.progress(table, LABELS, decided)
    assert time.process_time() - started < 1.0
