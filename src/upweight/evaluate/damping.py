"""The damping that agrees best with models that were really retrained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from upweight.errors import UpweightError
from upweight.evaluate._tables import Axes, axes_or_new, frame
from upweight.evaluate.lds import lds
from upweight.evaluate.outcomes import Outcomes

if TYPE_CHECKING:
    import pandas

    from upweight.attributors.influence import Influence

__all__ = ["DAMPINGS", "DampingChoice", "choose_damping"]

DAMPINGS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclass(frozen=True, eq=False)
class DampingChoice:
    """The LDS at several dampings, and the method with the best of them.

    Attributes:
        value: the damping with the highest LDS, ``"auto"`` if that is the method's own.
        method: the fitted method with it.
        tried: {damping: LDS}, the method's own first.
    """

    value: float | str
    method: Influence
    tried: dict[float | str, float]

    def to_pandas(self) -> pandas.DataFrame:
        """A row for each damping."""
        return frame({"damping": list(self.tried), "lds": list(self.tried.values())})

    def plot(self, ax: Axes | None = None) -> Axes:
        """LDS over damping, on a logarithmic axis; the method's own as a line across."""
        axes = axes_or_new(ax)
        numbers = {d: v for d, v in self.tried.items() if not isinstance(d, str)}
        axes.plot(list(numbers), list(numbers.values()), marker="o")
        axes.axhline(self.tried["auto"], color="grey", linewidth=1, label="the method's own")
        axes.set(xscale="log", xlabel="damping", ylabel="LDS")
        axes.legend()
        return axes


def choose_damping(
    method: Influence, query: Any, outcomes: Outcomes, dampings: Sequence[float] = DAMPINGS
) -> DampingChoice:
    """The damping with the highest LDS on a bank's outcomes; a small bank will do.

    Args:
        method: a fitted `Influence`.
        query: the queries of the outcomes.
        outcomes: of a `RetrainingBank` of random subsets. Choose on other queries than those whose figures you report.
        dampings: positive numbers to try beside the method's own damping.

    Returns:
        `DampingChoice`; its `method` is ready to attribute. The method's own damping wins ties.

    Cost: one `attribute` for every damping; nothing is fitted or retrained.

    Raises:
        UpweightError: no damping is given, or one that is not positive; or the queries are not those of the outcomes.

    Example:
        >>> import numpy as np, torch, upweight as uw
        >>> from upweight.evaluate import Outcomes, choose_damping
        >>> _ = torch.manual_seed(0)
        >>> x, y = torch.randn(12, 3), torch.arange(12) % 2
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> method = uw.Influence(model, uw.Classification(), progress=False).fit((x, y))
        >>> query = (x[:4], y[:4])
        >>> masks = np.random.default_rng(0).random((20, 12)) < 0.5
        >>> truth = (~masks) @ method.with_damping(1e-2).attribute(query).values.double().numpy().T
        >>> choose_damping(method, query, Outcomes(masks, truth[:, None]), [1e-3, 1e-2]).value
        0.01
    """
    numbers = [float(d) for d in dampings]
    if not numbers or not all(np.isfinite(d) and d > 0 for d in numbers):
        raise UpweightError(f"dampings={list(dampings)}, expected positive numbers -> [1e-4, 1e-3, 1e-2]")
    candidates: dict[float | str, Influence] = {"auto": method}
    candidates |= {d: method.with_damping(d) for d in numbers}
    tried = {d: lds(m.attribute(query), outcomes, resamples=2).value for d, m in candidates.items()}
    best = max(tried, key=tried.__getitem__)  # the first of equals
    return DampingChoice(best, candidates[best], tried)
