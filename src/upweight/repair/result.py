"""A repaired model with its evidence."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from upweight._files import json_text, load_bundle, replace_file, save_bundle
from upweight.errors import CacheMismatchError, StoreError
from upweight.fingerprint import model_fingerprint
from upweight.repair.certificate import Certificate
from upweight.repair.change import Change
from upweight.repair.log import append, read_json

if TYPE_CHECKING:
    from rich.table import Table

FOLDER = "repair"
JSON, WEIGHTS, LOG = "repair.json", "model.safetensors", "log.jsonl"
KIND = "upweight repair"


@dataclass(frozen=True, eq=False)
class Repair:
    """A model after a change of its training set, and the evidence.

    Attributes:
        model: the new model, in eval mode; the one that was given is as it was.
        change: what was done to which examples.
        method: how.
        evidence: JSON-able:

            * ``groups``: for ``"forgotten"``, ``"repaired"``, ``"reweighted"``, ``"retained"`` and, if given,
              ``"validation"`` and ``"test"``: the mean training loss before and after, its ``actual`` change, the
              ``predicted`` one (from gradient and curvature of those losses before the repair) and ``first_order``;
              accuracy;
            * ``objective``: predicted and actual change of the changed training objective, and their ``trust_ratio``
              (actual over predicted: 1 where the quadratic model is right);
            * ``residual_gradient_norm`` of the changed objective ``before`` and ``after``, and what the training
              itself had left (``training_left``);
            * ``certificate``: for linear models, the bound on that residual (`upweight.repair.certificate`), or None;
            * ``seconds`` (and ``processor_seconds``, of all threads) that the new model took; ``evidence_seconds`` (and
              ``evidence_processor_seconds``) that measuring all of the above took afterwards;
            * ``search_examples``: on how many training examples the step size was chosen;
            * ``steps``, ``solver``, ``parameters``, ``buffers_kept``, ``fingerprints``, ``versions``.
    """

    model: nn.Module
    change: Change
    method: str
    evidence: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """How long the repair took, without the evidence."""
        return float(self.evidence["seconds"])

    @property
    def certificate(self) -> Certificate | None:
        """The bound on the changed objective's gradient, of a linear model; None for others."""
        found = self.evidence.get("certificate")
        if found is None:
            return None
        return Certificate(
            found["bound"], found["measured"], found["solved"], found["bent"], found["gamma"], found["N"]
        )

    # Files ---------------------------------------------------------------------------------------------------------

    def save(
        self, folder: str | os.PathLike[str], *, experiment: str = "", address: str = "", source: str = ""
    ) -> Path:
        """Write ``repair.json`` and ``model.safetensors``, and append a line to the audit log ``log.jsonl``.

        Args:
            folder: where; RUN/repair in a run folder.
            experiment: the experiment's name, if there is one.
            address: its address.
            source: where the decisions came from, in words.

        Returns:
            The JSON file.
        """
        place = Path(folder).expanduser()
        content = self.to_json() | {"experiment": experiment, "address": address, "source": source}
        save_bundle(
            place / WEIGHTS,
            KIND,
            {name: t.detach().cpu() for name, t in _state(self.model).items()},
            {"fingerprint": model_fingerprint(self.model)},
        )
        text = json_text(content, "evidence")
        replace_file(place / JSON, lambda file: file.write((text + "\n").encode()))
        append(place / LOG, {"action": "repair", **_logged(content)})
        return place / JSON

    def to_json(self) -> dict[str, Any]:
        """What was done and found, without the weights."""
        change, ids = self.change, self.change.ids
        return {
            "upweight": self.evidence["versions"]["upweight"],
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "method": self.method,
            "n": change.n,
            "removed": [ids[p] for p in change.removed],
            "relabelled": [[ids[p], label] for p, label in change.labels.items()],
            "reweighted": [[ids[p], w] for p, w in change.weights.items()],
            "positions": {
                "removed": [int(p) for p in change.removed],
                "relabelled": [int(p) for p in change.labels],
                "reweighted": [int(p) for p in change.weights],
            },
            "evidence": self.evidence,
        }

    @classmethod
    def load(cls, folder: str | os.PathLike[str], model: nn.Module) -> Repair:
        """Read what `save` wrote.

        Args:
            folder: where it was written.
            model: a model of the same architecture, which stays as it is: the weights go into a copy.

        Raises:
            UpweightError: files are missing or damaged, or belong to another architecture.
        """
        place = Path(folder).expanduser()
        content = read_json(place / JSON, ("method", "n", "removed", "relabelled", "positions", "evidence"))
        tensors, about = load_bundle(place / WEIGHTS, KIND)
        loaded = copy.deepcopy(model)
        try:
            loaded.load_state_dict(tensors)
        except RuntimeError as error:
            words = " ".join(str(error).split())[:200]
            raise CacheMismatchError(
                f"{place / WEIGHTS} holds the weights of another architecture ({words}) -> give the repaired model's"
            ) from error
        expected = content["evidence"]["fingerprints"]["after"]
        if not about["fingerprint"] == expected == model_fingerprint(loaded):
            raise CacheMismatchError(
                f"{place / WEIGHTS} and {JSON} are of two different repairs -> repair again"
            )
        return cls(loaded.eval(), _change(content, place / JSON), content["method"], content["evidence"])

    # Words ---------------------------------------------------------------------------------------------------------

    def sentence(self) -> str:
        """What was done and what it did, in words."""
        evidence = self.evidence
        parts = [f"{evidence['what']}, by {self.method} in {self.seconds:.1f} s"]
        for name, group in evidence["groups"].items():
            if name in ("forgotten", "repaired", "test"):
                change = f"{group['loss_before']:.4g} to {group['loss_after']:.4g}"
                if group["predicted"] is not None:
                    change += f" (predicted {group['loss_before'] + group['predicted']:.4g})"
                parts.append(f"loss of the {name} {change}")
        return "; ".join(parts) + "."

    def table(self) -> Table:
        """The evidence for a terminal."""
        from rich import box
        from rich.table import Table

        evidence = self.evidence
        residual, objective = evidence["residual_gradient_norm"], evidence["objective"]
        ratio = objective["trust_ratio"]
        proof = evidence["certificate"]
        table = Table(
            title=f"{evidence['what']}, by {self.method}",
            caption=f"Mean training losses. Gradient of the changed objective {residual['before']:.3g} -> "
            f"{residual['after']:.3g} (training had left {residual['training_left']:.3g}); actual over predicted "
            f"change of it {'-' if ratio is None else f'{ratio:.2f}'}; {self.seconds:.1f} s"
            + (f"; certified bound {proof['bound']:.3g}" if proof else "")
            + (f"; buffers kept: {len(evidence['buffers_kept'])}" if evidence["buffers_kept"] else ""),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        for heading in ("examples", "n", "loss", "change", "predicted", "accuracy"):
            # Folded where the terminal is narrow: a number that is cut is another number.
            table.add_column(heading, justify="left" if heading == "examples" else "right", overflow="fold")
        for name, group in evidence["groups"].items():
            predicted = group["predicted"] if group["predicted"] is not None else group["first_order"]
            accuracy = (
                f"{100 * group['accuracy_before']:.1f} -> {100 * group['accuracy_after']:.1f} %"
                if "accuracy_before" in group
                else ""
            )
            table.add_row(
                name,
                f"{group['n']:,}" if group["n"] == group["of"] else f"{group['n']:,} of {group['of']:,}",
                f"{group['loss_before']:.3g} -> {group['loss_after']:.3g}",
                f"{group['actual']:+.2g}",
                f"{predicted:+.2g}",
                accuracy,
            )
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return f"Repair: {self.sentence()}"


def _state(model: nn.Module) -> dict[str, Tensor]:
    state = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, t in state.items():
        if t.is_complex() or t.is_quantized or t.is_sparse:
            raise StoreError(
                f"{name} is {t.dtype} ({t.layout}), expected a dense real tensor -> save it yourself"
            )
    return state


def _logged(content: dict[str, Any]) -> dict[str, Any]:
    """The line of the audit log: everything about what was done, and the effect in short."""
    evidence = content["evidence"]
    keys = ("experiment", "address", "source", "method", "n", "removed", "relabelled", "reweighted")
    groups = {
        name: {key: group[key] for key in ("n", "predicted", "actual")}
        for name, group in evidence["groups"].items()
    }
    return {
        **{key: content[key] for key in keys},
        "groups": groups,
        "trust_ratio": evidence["objective"]["trust_ratio"],
        "residual_gradient_norm": evidence["residual_gradient_norm"]["after"],
        "seconds": evidence["seconds"],
        "fingerprints": evidence["fingerprints"],
    }


def _change(content: dict[str, Any], path: Path) -> Change:
    try:
        at = content["positions"]
        labels = [label for _, label in content["relabelled"]]
        weights = [w for _, w in content["reweighted"]]
        names = [
            *content["removed"],
            *(i for i, _ in content["relabelled"]),
            *(i for i, _ in content["reweighted"]),
        ]
        places = [*at["removed"], *at["relabelled"], *at["reweighted"]]
        return Change(
            int(content["n"]),
            [int(p) for p in at["removed"]],
            dict(zip(at["relabelled"], labels, strict=True)),
            dict(zip(at["reweighted"], weights, strict=True)),
            dict(zip(places, names, strict=True)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error!r}) -> repair again") from error
