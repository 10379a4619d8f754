"""Max-min shares on many hosts at once, and Jain's index."""

from __future__ import annotations

from .arrays import Floats, Ints, np

__all__ = ["fair_shares", "jain"]


def fair_shares(host: Ints, wants: Floats, weight: Floats, budget: Floats) -> Floats:
    """Share each host's budget among its guests by weighted max-min, as `policy.maxmin.max_min` does for one host.

    Parameters:
        host: the host of each guest, 0 to n - 1.
        wants, weight: the demand and the weight of each guest.
        budget: the budget of each of the n hosts.

    Returns:
        The share of each guest.
    """
    if not len(host):
        return np.empty(0)
    order = np.lexsort((wants / weight, host))
    h, want, w = host[order], wants[order], weight[order]
    first = np.flatnonzero(np.r_[True, h[1:] != h[:-1]])
    sizes = np.diff(np.r_[first, len(h)])
    # Sums from each host's first guest on, and from each guest to its host's last. They are formed host by host, so
    # that the rounding errors of one host do not reach another.
    before = np.cumsum(want) - want
    before -= np.repeat(before[first], sizes)
    heavier = np.cumsum(w) - w
    heavier -= np.repeat(heavier[first], sizes)
    after = np.repeat(np.add.reduceat(w, first), sizes) - heavier
    level = (budget[h] - before) / np.maximum(after, 1e-300)
    unserved = np.flatnonzero(want > level * w)
    share = want.copy()
    if len(unserved):
        hosts, at = np.unique(h[unserved], return_index=True)
        water = np.full(len(budget), np.inf)
        water[hosts] = level[unserved[at]]
        share = np.minimum(want, np.maximum(water[h], 0.0) * w)
    result = np.empty(len(host))
    result[order] = share
    return result


def jain(values: Floats) -> float:
    """Jain's fairness index: 1 if all are equal, 1/n if one has it all. Source: Jain, Chiu, Hawe, DEC-TR-301 (1984)."""
    squares = float(np.sum(values**2))
    return float(np.sum(values)) ** 2 / (len(values) * squares) if squares else 1.0
