"""A repair as the report shows it: what was done, its predicted and actual effects, and real retraining beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from upweight.report.issue_rows import label_text
from upweight.report.plain import figure, finite, known, listed, percent, plain, signed
from upweight.report.queries import looks, png_address

if TYPE_CHECKING:
    from upweight.experiment import Experiment

__all__ = ["repair", "verification"]

GROUPS = {
    "forgotten": "forgotten examples",
    "repaired": "relabelled examples",
    "reweighted": "reweighted examples",
    "retained": "retained examples",
    "validation": "validation data",
    "test": "test data",
}
"""What the groups of a repair's evidence are called."""

CHANGED = 24
"""Changed examples that are shown."""


def repair(content: dict[str, Any] | None, experiment: Experiment | None = None) -> dict[str, Any] | None:
    """What was done, and its predicted and actual effects."""
    if content is None or not isinstance(content.get("evidence"), dict):
        return None
    evidence = content["evidence"]
    groups = [
        _group(str(name), one)
        for name, one in dict(evidence.get("groups") or {}).items()
        if isinstance(one, dict)
    ]
    counts = {key: len(content.get(key) or []) for key in ("removed", "relabelled", "reweighted")}
    done = [f"{count:,} {key}" for key, count in counts.items() if count]
    seconds = known(evidence.get("seconds"))
    what = plain(evidence.get("what") or (listed(done) if done else "repaired"), 300)
    sentence = f"{what[:1].upper()}{what[1:]}, by {plain(content.get('method'), 60)}, without retraining"
    sentence += f", in {seconds:.1f} s" if seconds is not None else ""
    judged = next((group for key in ("test", "validation") for group in groups if group["key"] == key), None)
    if judged is not None and judged["accuracy_after"] is not None:
        before, after = percent(judged["accuracy_before"], 1), percent(judged["accuracy_after"], 1)
        sentence += f"; accuracy on the {judged['name']} went from {before} to {after}"
    elif judged is not None:
        sentence += f"; the loss on the {judged['name']} changed by {signed(judged['actual'])}"
    for group in groups:  # predicted and actual are compared within a group: losses of groups differ in size
        sizes = [abs(group[key]) for key in ("actual", "predicted") if group[key] is not None]
        largest = max(sizes, default=0.0) or 1.0
        for key in ("actual", "predicted"):
            value = group[key]
            group[f"{key}_bar"] = None if value is None else (value >= 0, f"{50 * abs(value) / largest:.2f}")
    residual = evidence.get("residual_gradient_norm")
    objective = evidence.get("objective")
    certificate = evidence.get("certificate")
    return {
        "what": what,
        "method": plain(content.get("method"), 60),
        "counts": done,
        "changed": _changed(content, experiment),
        "changes": sum(counts.values()),
        "groups": groups,
        "seconds": seconds,
        "residual": residual if isinstance(residual, dict) else None,
        "trust": known(objective.get("trust_ratio")) if isinstance(objective, dict) else None,
        "certificate": certificate if isinstance(certificate, dict) else None,
        "source": plain(content.get("source") or "", 200),
        "judged": judged,
        "sentence": sentence + ".",
    }


def _changed(content: dict[str, Any], experiment: Experiment | None) -> list[dict[str, Any]]:
    """The first examples that were relabelled, forgotten or reweighted: how they look, and what became of them."""
    classes = None if experiment is None else experiment.classes
    changes = [
        *((name, "now", label_text(label, classes)) for name, label in content.get("relabelled") or []),
        *((name, "forgotten", "") for name in content.get("removed") or []),
        *((name, "weight", f"{weight:.3g}") for name, weight in content.get("reweighted") or []),
    ][:CHANGED]
    place = {} if experiment is None else {name: p for p, name in enumerate(experiment.train.ids)}
    found = [place[name] for name, _, _ in changes if name in place]
    look = dict(zip(found, looks(experiment, "train", found)))
    shown = []
    for name, what, value in changes:
        one = look.get(place.get(name, -1))
        source = None if one is None else png_address(one.picture)
        shown.append({"id": name, "what": what, "value": value, "look": one, "source": source})
    return shown


def _group(key: str, one: dict[str, Any]) -> dict[str, Any]:
    predicted = known(one.get("predicted"))
    numbers = ("n", "of", "loss_before", "loss_after", "actual", "accuracy_before", "accuracy_after")
    return {
        "key": key,
        "name": GROUPS.get(key, plain(key, 60)),
        **{name: known(one.get(name)) for name in numbers},
        "predicted": known(one.get("first_order")) if predicted is None else predicted,
    }


def verification(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """The repaired model beside doing nothing and beside really retrained ones."""
    if content is None:
        return None
    rows = []
    for name, key in (
        ("distance of parameters", "parameter_distance"),
        ("distance of predictions", "prediction_distance"),
        ("distance to the mean prediction", "to_mean_prediction"),
    ):
        one = content.get(key)
        if isinstance(one, dict):
            rows.append((name, figure(one.get("before")), figure(one.get("after")), figure(one.get("seeds"))))
    for kind, write in (("accuracy", lambda v: percent(v, 1)), ("loss", figure)):
        for group, one in dict(content.get(kind) or {}).items():
            if isinstance(one, dict) and any(finite(one.get(k)) for k in ("before", "after")):
                name = f"{kind}, {GROUPS.get(str(group), str(group))}"
                rows.append((name, *(write(one.get(k)) for k in ("before", "after", "retrained"))))
    member = content.get("membership")
    if isinstance(member, dict):
        rows.append(
            (
                "membership inference AUROC (0.5: forgotten)",
                *(figure(member.get(k)) for k in ("before", "after", "retrained")),
            )
        )
    seconds = content.get("seconds")
    seconds = seconds if isinstance(seconds, dict) else {}
    distance = content.get("prediction_distance")
    relative = known(distance.get("relative")) if isinstance(distance, dict) else None
    ratio = known(seconds.get("ratio"))
    sentence = ""
    if relative is not None:
        sentence = (
            f"The repaired model's predictions keep {percent(relative)} of the distance to real retraining "
        )
        sentence += "that doing nothing leaves"
        sentence += f", in {percent(ratio, 1)} of the time." if ratio is not None else "."
    return {
        "rows": rows,
        "ratio": ratio,
        "relative": relative,
        "seconds": seconds,
        "seeds": len(content.get("seeds") or []),
        "sentence": sentence,
    }
