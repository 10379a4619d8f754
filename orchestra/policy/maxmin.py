"""Weighted max-min fairness: the arithmetic of sharing one budget.

Source: Bertsekas and Gallager, Data Networks (2nd ed.), section 6.5.2: raise everybody's level together, in proportion
to the weights; whoever has what it asked for stops there, the rest go on until the budget is used up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.errors import SpecError

__all__ = ["max_min"]


def max_min(budget: float, demands: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Share `budget` among demands. Nobody gets more than it asked for, and what one leaves goes to the others.

    Costs O(n log n), and O(n) if there is enough for all.

    Parameters:
        budget: what there is to share, 0 or more; ``inf`` gives everybody what it asks for.
        demands: what each asks for, 0 or more; ``inf`` for "as much as there is".
        weights: how much each counts, more than 0; as many as there are demands.

    Returns:
        The shares, in the order of `demands`. They add up to the budget or to the demands, whichever is less.

    Raises:
        SpecError: a number is out of its range, or there are not as many weights as demands.
    """
    if len(demands) != len(weights):
        raise SpecError(f"weights={list(weights)!r}: {len(demands)} demands need as many weights")
    if not budget >= 0:
        raise SpecError(f"budget={budget!r}: must be 0 or more")
    for demand in demands:
        if not demand >= 0:
            raise SpecError(f"demands: {demand!r} is among them; each must be 0 or more")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise SpecError(f"weights: {weight!r} is among them; each must be more than 0 and finite")
    if sum(demands) <= budget:
        return [float(demand) for demand in demands]

    shares = [0.0] * len(demands)
    order = sorted(range(len(demands)), key=lambda i: demands[i] / weights[i])
    # The weight of those not served yet. Summed up from the end, as subtracting served ones would leave rounding errors
    # as large as the small weights.
    pending = [0.0] * len(order)
    total = 0.0
    for at in range(len(order) - 1, -1, -1):
        total += weights[order[at]]
        pending[at] = total

    left = float(budget)
    for at, i in enumerate(order):
        level = left / pending[at]
        if demands[i] > level * weights[i]:  # and so do all after it
            for j in order[at:]:
                shares[j] = level * weights[j]
            break
        shares[i] = float(demands[i])
        left = max(0.0, left - shares[i])
    return shares
