"""The report without a browser: it is made of whatever is there, and says what is missing."""

import shlex

import pytest
from refusals import refused
from report_pages import Page
from run_folders import evaluation, everything, images, issues, put, repair, write_scores

from upweight.report import build, summary
from upweight.report.run_files import read_run


def test_everything_is_there_with_the_right_numbers(tmp_path):
    experiment = images()
    page = Page(build(everything(tmp_path, experiment), experiment))
    assert {"queries", "scores", "trust", "issues", "repair", "made"} <= page.ids and "more" not in page.ids
    for words in (
        "30 training examples were scored for each of 6 queries by ekfac",
        "The best method is ekfac.",
        "of 30 training examples",
        "accuracy on the test data went from 90.0% to 95.0%",
        "predictions keep 25% of the distance",
        "noise ceiling of 0.800 (0.700 to 0.900)",
        "Slope 0.50, correlation 1.00, 21 pairs",
        "0.300 to 0.500",
        "0.400",
        "needs <classes>",
        "−1.5",
        "0.01 after; training itself had left 0.02",
        "membership inference AUROC",
    ):
        assert words in page.text, words
    assert len([1 for tag, _ in page.tags if tag == "article"]) == 6
    sources = [a["src"] for tag, a in page.tags if tag == "img"]
    assert len(sources) > 6 and all(one.startswith("data:image/png;base64,iVBOR") for one in sources)


PARTS = {
    "queries": lambda folder, experiment: write_scores(folder, experiment),
    "trust": lambda folder, experiment: put(folder, "evaluate.json", evaluation()),
    "issues": lambda folder, experiment: put(folder, "issues.json", issues(30)),
    "repair": lambda folder, experiment: put(folder, "repair/repair.json", repair()),
}


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone_is_a_report_that_says_what_is_missing(tmp_path, part):
    experiment = images()
    PARTS[part](tmp_path, experiment)
    page = Page(build(tmp_path, experiment))
    assert {part, "made", "more"} <= page.ids and not set(PARTS) - {part} & page.ids
    commands = {"queries": "attribute", "trust": "evaluate", "issues": "audit", "repair": "repair"}
    for other, verb in commands.items():
        command = (
            f"upweight {verb} pets.py:experiment --out {tmp_path}"
            if part in ("trust", "issues")
            else f"upweight {verb} "
        )
        assert (command in page.text) == (other != part or verb == "repair")  # repair asks to be verified
    assert ("--verify" in page.text) == (part == "repair")


def test_without_the_experiment_examples_are_ids(tmp_path):
    build(everything(tmp_path, images()))
    page = Page(tmp_path / "report.html")
    assert "known by their ids" in page.text and not [1 for tag, _ in page.tags if tag == "img"]
    assert "upweight report" in page.text and page.data["looks"] == {}


def test_a_folder_with_nothing_is_refused(tmp_path):
    with refused("holds nothing to report -> upweight attribute, evaluate"):
        build(tmp_path)
    with refused("the run folder .*nowhere does not exist -> upweight attribute"):
        build(tmp_path / "nowhere")
    with refused("is a file"):
        build(put(tmp_path, "file", "x"))
    put(tmp_path, "issues.json", "{")
    with refused("holds nothing to report .issues.json cannot be read"):
        build(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_repair_shows_what_was_changed(tmp_path):
    experiment = images()
    put(tmp_path, "repair/repair.json", repair(removed=[7, "gone"], reweighted=[[9, 0.5]]))
    page = Page(build(tmp_path, experiment))
    part = page.html[page.html.index('id="repair"') :]
    assert part.count('alt="changed training example') == 4  # of 3, 4, 7 and 9; "gone" is not in the data
    assert "dog → dog" in page.text and "cat → cat" in page.text  # labels are k % 2, and became 1 and 0
    assert "dog forgotten" in page.text and "dog weight 0.5" in page.text and "gone" in page.text
    many = [[k, 1 - k % 2] for k in range(30)]
    put(tmp_path, "repair/repair.json", repair(relabelled=many))
    page = Page(build(tmp_path, experiment))
    assert page.html.count('alt="changed training example') == 24
    assert "The first 24 of 30 changed examples" in page.text
    page = Page(build(tmp_path))  # without the experiment: ids and numbers
    assert "→ 1" in page.text and "<img" not in page.html


def test_commands_can_be_typed_as_they_are_shown(tmp_path):
    folder = tmp_path / "my run; rm"
    put(folder, "issues.json", issues(30, address="my code/pets.py:experiment"))
    commands = [command for _, command in summary.missing(read_run(folder))]
    assert commands and all(
        shlex.split(one)[2:5] == ["my code/pets.py:experiment", "--out", str(folder)] for one in commands
    )


def test_verifying_names_what_was_repaired(tmp_path):
    """Without the options of the repair, `repair --verify` would make another one, and verify that."""

    def command(**content):
        put(tmp_path, "repair/repair.json", repair(**content))
        (text,) = [one for what, one in summary.missing(read_run(tmp_path)) if "really retrained" in what]
        return shlex.split(text)[5:]

    ids = [3, 14, "a b;c"]
    assert command(removed=ids, source="--remove") == ["--remove", "3,14,a b;c", "--verify"]
    assert command(source="RUN/decisions.sqlite") == ["--verify"]
    both = command(removed=list(range(99)), source="--remove and --relabel", method="corrected")
    assert both == ["--remove", "FILE", "--relabel", "FILE", "--method", "corrected", "--verify"]
