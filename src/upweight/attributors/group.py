"""What a change of the training set is predicted to do: several estimates of one effect, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upweight.errors import UpweightError
from upweight.scores import Id

if TYPE_CHECKING:
    import pandas
    from rich.table import Table

ESTIMATES = ("first_order", "rescaled", "newton")
TABLE_ROWS = 20


@dataclass(frozen=True, eq=False)
class GroupEffect:
    """The predicted change of every query's measurement when training examples are removed, changed or reweighted.

    Positive: the measurement rises, in `unit` (a loss gets worse, a margin better), as in `Scores.removal_effect`.

    * ``first_order``: the sum of the examples' influences;
    * ``rescaled``: the sum of what each does alone, exactly as the others' curvature has it (RIF);
    * ``newton``: one Newton step on the changed objective, from the curvature without (or with) the whole group.

    Each is ``v_q . u`` for a step u of the parameters; ``second_order[...]`` adds how the measurement itself bends
    along it, ``(1/2) u^T M_q u``.

    Attributes:
        first_order: [query].
        rescaled: [query].
        newton: [query].
        second_order: {estimate: [query]}, what to add.
        steps: {estimate: {parameter name: predicted change of the parameter}}.
        query_ids: one a query.
        train_ids: the examples that were removed, changed or reweighted.
        what: what happened to them, in words.
        convention: ``"sum"``: the changed objective still divides its sum of losses by n; ``"mean"``: by the number of
            examples (the sum of weights) that are left.
        unit: the measurement's unit.
        info: evidence, JSON-able.
    """

    first_order: Tensor
    rescaled: Tensor
    newton: Tensor
    second_order: dict[str, Tensor]
    steps: dict[str, dict[str, Tensor]]
    query_ids: Sequence[Id]
    train_ids: Sequence[Id]
    what: str
    convention: str
    unit: str
    info: dict[str, Any] = field(default_factory=dict)

    def effect(self, estimate: str = "newton", *, second_order: bool = True) -> Tensor:
        """One estimate [query], with the measurement's own bend along the step unless told otherwise."""
        if estimate not in ESTIMATES:
            raise UpweightError(f"estimate={estimate!r} is unknown -> use one of {list(ESTIMATES)}")
        linear: Tensor = getattr(self, estimate)
        return linear + self.second_order[estimate] if second_order else linear

    def to_pandas(self) -> pandas.DataFrame:
        """One row a query: its id, the three estimates, each with its second-order term added, and the unit.

        Raises:
            ImportError: pandas is missing.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("this needs pandas -> pip install 'upweight[report]'") from error
        columns: dict[str, Any] = {"query_id": list(self.query_ids)}
        for name in ESTIMATES:
            columns[name] = self.effect(name, second_order=False).double().cpu().numpy()
        for name in ESTIMATES:
            columns[f"{name}_second_order"] = self.effect(name).double().cpu().numpy()
        return pd.DataFrame({**columns, "unit": self.unit})

    def table(self, rows: int = TABLE_ROWS) -> Table:
        """The same for a terminal, the largest effects first."""
        from rich.table import Table

        title = f"{self.what}: predicted change of the measurement ({self.unit}, fixed {self.convention})"
        table = Table(
            "query", *(name.replace("_", " ") for name in ESTIMATES), "newton, 2nd order", title=title
        )
        order = self.effect("newton").abs().argsort(descending=True, stable=True)[:rows].tolist()
        for q in order:
            values = [*(float(self.effect(name, second_order=False)[q]) for name in ESTIMATES)]
            table.add_row(str(self.query_ids[q]), *(f"{v:+.4g}" for v in [*values, float(self.effect()[q])]))
        if len(self.query_ids) > rows:
            table.caption = f"{rows} of {len(self.query_ids)} queries"
        return table

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        size = torch.stack([self.effect(name, second_order=False).abs().mean() for name in ESTIMATES])
        means = ", ".join(f"{name} {float(v):.4g}" for name, v in zip(ESTIMATES, size, strict=True))
        return (
            f"GroupEffect of {self.what} on {len(self.query_ids)} queries\n"
            "  sign: positive = the measurement rises\n"
            f"  unit: {self.unit}, fixed {self.convention}\n"
            f"  mean |effect|: {means}"
        )
