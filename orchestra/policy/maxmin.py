"""Weighted max-min fairness: the arithmetic of sharing one budget.

Source: Bertsekas and Gallager, Data Networks (2nd ed.), section 6.5.2: raise all shares together, in proportion to the
weights. A share that has reached its demand stops there. The other shares rise until the budget is used up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..model.errors import SpecError

__all__ = ["divide", "max_min"]


def max_min(budget: float, demands: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Share `budget` among demands. No share is more than its demand, and what one demand leaves goes to the others.

    Costs O(n log n), and O(n) if there is enough for all.

    Parameters:
        budget: what there is to share, 0 or more; ``inf`` meets all demands.
        demands: what each asks for, 0 or more; ``inf`` means "as much as there is". All in the unit of the budget.
        weights: how much each demand counts, more than 0; as many as there are demands.

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
    return [float(share) for share in divide(budget, demands, weights)]


def divide(budget: float, demands: Sequence[float], weights: Sequence[float]) -> list[float]:
    """`max_min` without the checks, for policies that divide numbers of their own in each tick."""
    if sum(demands) <= budget:
        return list(demands)
    shares = [0.0] * len(demands)
    # By demand per weight: in this order, the first demand that is too large means that all after it are too large.
    order = sorted(range(len(demands)), key=lambda i: demands[i] / weights[i])
    # The sum of the weights that are not served yet, from each place on. It is summed up from the end: if the served
    # weights were subtracted from the whole, rounding errors as large as the small weights would remain.
    pending = [0.0] * len(order)
    total = 0.0
    for at in range(len(order) - 1, -1, -1):
        total += weights[order[at]]
        pending[at] = total

    left = float(budget)
    for at, i in enumerate(order):
        level = left / pending[at]
        if demands[i] > level * weights[i]:  # and so are all demands after it
            for j in order[at:]:
                shares[j] = level * weights[j]
            break
        shares[i] = demands[i]
        left = max(0.0, left - shares[i])
    return shares
