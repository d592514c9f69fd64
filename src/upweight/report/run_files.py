"""What a run folder holds, for the report: a file that is missing or damaged is named, and stops nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight.errors import StoreError, UpweightError
from upweight.fingerprint import model_fingerprint
from upweight.scores import Scores

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["RunFiles", "read_run"]

LOG_SHOWN = 50
"""Lines of the audit log that are shown, the newest."""


@dataclass
class RunFiles:
    """What was found.

    Attributes:
        folder: Of the run.
        scores: One method's scores: the best that evaluation found, else a calibrated one, else any.
        method: Its name.
        methods: The files of all methods, by name.
        evaluation, issues, repair, verification: The JSON files, or None.
        log: The last lines of the audit log, the newest first.
        log_length: Lines of the whole log.
        notices: What could not be read, or does not belong together.
    """

    folder: Path
    scores: Scores | None = None
    method: str = ""
    methods: dict[str, Path] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None
    issues: dict[str, Any] | None = None
    repair: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    log_length: int = 0
    notices: list[str] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to report."""
        found = (self.scores, self.evaluation, self.issues, self.repair, self.verification)
        return all(one is None for one in found) and not self.log

    @property
    def address(self) -> str:
        """Where the experiment is, as the files have it; empty if none says so."""
        for content in (self.evaluation, self.issues, self.repair):
            if content and content.get("address"):
                return str(content["address"])
        return ""

    @property
    def name(self) -> str:
        """What the experiment is called."""
        for content in (self.evaluation, self.issues, self.repair):
            if content and content.get("experiment"):
                return str(content["experiment"])
        return self.folder.resolve().name


def read_run(folder: Path, experiment: Experiment | None = None) -> RunFiles:
    """Read a run folder.

    Args:
        folder: Of the run.
        experiment: If given, files of another experiment are left out, with a notice.

    Raises:
        StoreError: There is no such folder.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise StoreError(
            f"the run folder {folder} {what} -> upweight attribute EXPERIMENT --out {folder} makes it"
        )
    run = RunFiles(folder)
    run.evaluation = _json(run, "evaluate.json", {"experiment": str, "methods": list})
    run.issues = _issues(run)
    run.repair = _json(run, "repair/repair.json", {"method": str, "evidence": dict})
    run.verification = _json(run, "repair/verify.json", {"prediction_distance": dict})
    run.log, run.log_length = _log(run)
    ours = _Ours() if experiment is None else _fingerprints(run, experiment)
    if experiment is not None:
        _only_of(run, experiment, ours)
    _only_this_repairs(run)
    run.methods = {_method_name(run, file): file for file in sorted(folder.glob("scores/*.safetensors"))}
    _choose_scores(run, experiment, ours)
    return run


def _json(run: RunFiles, name: str, kinds: Mapping[str, type]) -> dict[str, Any] | None:
    path = run.folder / name
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.notices.append(f"{name} cannot be read ({type(error).__name__}): it is left out. Write it again.")
        return None
    if not isinstance(content, dict) or not all(isinstance(content.get(k), v) for k, v in kinds.items()):
        run.notices.append(f"{name} is not what its name says: it is left out. Write it again.")
        return None
    return content


def _issues(run: RunFiles) -> dict[str, Any] | None:
    content = _json(run, "issues.json", {"columns": dict})
    if content is None:
        return None
    columns = content["columns"]
    wanted = ("id", "position", "issue", "is_issue", "score")
    fits = isinstance(columns, dict) and all(isinstance(columns.get(name), list) for name in wanted)
    if fits:
        fits = len({len(values) for values in columns.values() if isinstance(values, list)}) == 1
    seal = content.get("sha256")
    if fits and seal is not None:
        fits = hashlib.sha256(json.dumps(columns).encode()).hexdigest() == seal
    if not fits:
        run.notices.append("issues.json is damaged: it is left out. Write it again with upweight audit.")
        return None
    return content


def _log(run: RunFiles) -> tuple[list[dict[str, Any]], int]:
    path = run.folder / "repair" / "log.jsonl"
    if not path.exists():
        return [], 0
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        run.notices.append(f"repair/log.jsonl cannot be read ({type(error).__name__}): it is left out.")
        return [], 0
    entries, bad = [], 0
    for line in lines[-LOG_SHOWN:]:
        try:
            entry = json.loads(line)
            entries.append(entry if isinstance(entry, dict) else {})
        except ValueError:
            bad += 1
    if bad:
        run.notices.append(f"{bad} lines of repair/log.jsonl are damaged and left out.")
    return entries[::-1], len(lines)


@dataclass(frozen=True)
class _Ours:
    """Fingerprints of what the experiment has now; None where that is not known."""

    train: str | None = None
    model: str | None = None


def _fingerprints(run: RunFiles, experiment: Experiment) -> _Ours:
    train = None
    try:
        train = experiment.train.fingerprint()
    except Exception as error:  # a picture that is gone, say; the page does without whatever cannot be read
        run.notices.append(
            f"the training data cannot be read whole ({type(error).__name__}: {str(error)[:200]}): whether the files "
            "of this run are about them was not checked."
        )
    return _Ours(train, model_fingerprint(experiment.model))


def _only_of(run: RunFiles, experiment: Experiment, ours: _Ours) -> None:
    """Leave out what another experiment wrote into this folder."""
    for kind, name in (
        ("evaluation", "evaluate.json"),
        ("issues", "issues.json"),
        ("repair", "repair/repair.json"),
    ):
        content = getattr(run, kind)
        theirs = (content or {}).get("experiment") or experiment.name
        if theirs != experiment.name:
            run.notices.append(
                f"{name} was written for the experiment {str(theirs)[:60]!r}, not for {experiment.name!r}: it is left "
                "out."
            )
            setattr(run, kind, None)
    for kind, name, made_with in (
        ("issues", "issues.json", _dict(run.issues, "settings")),
        ("repair", "repair/repair.json", _dict(_dict(run.repair, "evidence"), "fingerprints")),
    ):
        train = made_with.get("train")
        if None not in (train, ours.train) and train != ours.train:
            run.notices.append(
                f"{name} is about other training data than the experiment has: it is left out."
            )
            setattr(run, kind, None)
        else:
            _same_model(run, name, made_with.get("model", made_with.get("before")), ours)
    positions = run.issues["columns"]["position"] if run.issues else []
    if any(not isinstance(p, int) or not 0 <= p < experiment.train.n for p in positions):
        run.notices.append(
            "issues.json names training examples that the experiment does not have: it is left out."
        )
        run.issues = None


def _only_this_repairs(run: RunFiles) -> None:
    """Leave out the verification of an earlier repair: ``repair`` without ``--verify`` leaves the old file behind."""
    if run.verification is None:
        return
    verified = _dict(_dict(run.verification, "info"), "fingerprints")
    repaired = _dict(_dict(run.repair, "evidence"), "fingerprints")
    if run.repair is None or verified != repaired:
        run.notices.append(
            "repair/verify.json is about another repair than repair/repair.json: it is left out. "
            "Write it again with upweight repair --verify."
        )
        run.verification = None


def _same_model(run: RunFiles, name: str, theirs: object, ours: _Ours) -> None:
    """Say so if figures were made with other weights than the experiment's model has now; they may still be of use."""
    if None not in (theirs, ours.model) and theirs != ours.model:
        run.notices.append(
            f"{name} was made with other weights than the experiment's model has now: its figures are about that "
            "earlier model."
        )


def _dict(content: Mapping[str, Any] | None, key: str) -> Mapping[str, Any]:
    """What stands under a key if it is a dict, else an empty one."""
    found = (content or {}).get(key)
    return found if isinstance(found, dict) else {}


def _method_name(run: RunFiles, file: Path) -> str:
    from upweight._file_names import file_name

    for row in (run.evaluation or {}).get("methods", []):
        if isinstance(row, dict) and file_name(str(row.get("name"))) == file.stem:
            return str(row["name"])
    return file.stem


def _choose_scores(run: RunFiles, experiment: Experiment | None, ours: _Ours) -> None:
    """The scores to show: methods before baselines, in the order evaluation put them, newest first where it did not."""
    from upweight.attributors.by_name import BASELINES, METHODS, key_of

    rows = [row for row in (run.evaluation or {}).get("methods", []) if isinstance(row, dict)]
    order = {str(row.get("name")): (bool(row.get("baseline")), number) for number, row in enumerate(rows)}

    def place(item: tuple[str, Path]) -> tuple:
        name, file = item
        key = key_of(name.split(":")[0])
        baseline, number = order.get(name, (key in BASELINES and key not in METHODS, len(rows)))
        return baseline, number, -file.stat().st_mtime

    for name, file in sorted(run.methods.items(), key=place):
        try:
            scores = Scores.load(file)
        except UpweightError as error:
            run.notices.append(f"scores/{file.name} is left out: {' '.join(str(error).split())}")
            continue
        if experiment is not None and not _belong(scores, experiment, ours):
            run.notices.append(
                f"scores/{file.name} is of other training examples or queries than the experiment has: it is left out."
            )
            continue
        _same_model(run, f"scores/{file.name}", _dict(scores.info, "fingerprints").get("model"), ours)
        run.scores, run.method = scores, name
        return


def _belong(scores: Scores, experiment: Experiment, ours: _Ours) -> bool:
    """Whether scores are of this experiment's data: the same ids in the same order, and the same content if known."""
    for ids, examples in ((scores.train_ids, experiment.train), (scores.query_ids, experiment.query)):
        if len(ids) != examples.n or any(a != b for a, b in zip(ids, examples.ids)):
            return False
    train = _dict(scores.info, "fingerprints").get("train")
    return None in (train, ours.train) or train == ours.train
