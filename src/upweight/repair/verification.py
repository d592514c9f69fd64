"""What the comparison of a repaired model with retrained ones found: figures, words, and their file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upweight._files import json_text, replace_file
from upweight.errors import StoreError
from upweight.repair.log import append, read_json
from upweight.repair.result import LOG

if TYPE_CHECKING:
    from rich.table import Table

JSON = "verify.json"


@dataclass(frozen=True)
class Verification:
    """How far a repaired model is from retraining, beside how far the unrepaired one is.

    Attributes:
        parameter_distance: ``|theta - theta_r|`` over the tracked parameters, a mean over the retrained models:
            {"before": doing nothing, "after": the repair, "seeds": between two retrained models, "relative": after /
            before}.
        prediction_distance: the same for predictions on the test data: the mean total variation distance of the
            predicted distributions (classification), else the mean absolute difference of outputs.
        to_mean_prediction: the same against the retrained models' mean prediction, in which seeds' noise cancels;
            None with one seed.
        accuracy: {"test" | "retained" | "forgotten" | "repaired": {"before", "after", "retrained"}}; of losses for
            tasks without classes.
        loss: the same for the mean training loss.
        membership: AUROC of the loss-threshold attack on the forgotten examples against the test data, {"before",
            "after", "retrained"}; None where nothing was forgotten.
        seconds: {"repair", "retraining" (one model), "ratio"}.
        seeds: of the retrained models.
        same_seed: the figures against the one retrained with the model's own seed, where that was told.
        info: what was compared.
    """

    parameter_distance: dict[str, float]
    prediction_distance: dict[str, float]
    to_mean_prediction: dict[str, float] | None
    accuracy: dict[str, dict[str, float]]
    loss: dict[str, dict[str, float]]
    membership: dict[str, float] | None
    seconds: dict[str, float]
    seeds: list[int]
    same_seed: dict[str, Any] | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dict(self.__dict__.items())

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``verify.json``, and append a line to the audit log ``log.jsonl``; returns the JSON file."""
        place = Path(folder).expanduser()
        content = {
            "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.to_json(),
        }
        text = json_text(content, "the verification")
        append(place / LOG, {"action": "verify", **_logged(content)})
        replace_file(place / JSON, lambda file: file.write((text + "\n").encode()))
        return place / JSON

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Verification:
        """Read what `save` wrote."""
        names = list(cls.__dataclass_fields__)
        path = Path(folder).expanduser() / JSON
        content = read_json(path, names)
        if not isinstance(content["parameter_distance"], dict):
            raise StoreError(f"{path} is damaged -> verify again")
        return cls(**{name: content[name] for name in names})

    def sentence(self) -> str:
        """The outcome in words."""
        ratio = self.prediction_distance["relative"]
        words = f"Predictions are at {ratio:.2f} of the distance to retraining that doing nothing leaves"
        if "seeds" in self.prediction_distance:
            words += f" (two retrained models are at {self.prediction_distance['seeds_relative']:.2f} of it)"
        parameters, share = self.parameter_distance["relative"], self.seconds["ratio"]
        return f"{words}, parameters at {parameters:.2f}, in {share:.1%} of the time."

    def table(self) -> Table:
        """The figures for a terminal."""
        from rich import box
        from rich.table import Table

        table = Table(
            title=f"Repaired against retrained ({len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''})",
            caption=self.sentence(),
            title_justify="left",
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("")
        for heading in ("doing nothing", "repaired", "retrained"):
            table.add_column(heading, justify="right", overflow="fold")
        for name, d in (
            ("parameters to retrained", self.parameter_distance),
            ("predictions to retrained", self.prediction_distance),
            ("predictions to their mean", self.to_mean_prediction or {}),
        ):
            if d:
                table.add_row(
                    name,
                    f"{d['before']:.4g}",
                    f"{d['after']:.4g}",
                    f"{d['seeds']:.4g}" if "seeds" in d else "",
                )
        for name, d in self.accuracy.items():
            table.add_row(f"accuracy, {name}", *(f"{d[key]:.2%}" for key in ("before", "after", "retrained")))
        for name, d in self.loss.items():
            table.add_row(f"loss, {name}", *(f"{d[key]:.4g}" for key in ("before", "after", "retrained")))
        if self.membership is not None:
            table.add_row(
                "membership AUROC",
                *(f"{self.membership[key]:.3f}" for key in ("before", "after", "retrained")),
            )
        table.add_row("seconds", "", f"{self.seconds['repair']:.2f}", f"{self.seconds['retraining']:.2f}")
        return table

    def __rich__(self) -> Table:
        return self.table()


def _logged(content: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("parameter_distance", "prediction_distance", "accuracy", "membership", "seconds", "seeds", "info")
    return {key: content[key] for key in keys}
