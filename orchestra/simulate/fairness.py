"""Max-min shares of many hosts at once, and Jain's index."""

from __future__ import annotations

from .arrays import Floats, Ints, np

__all__ = ["fair_shares", "jain"]


def fair_shares(host: Ints, wants: Floats, weight: Floats, budget: Floats) -> Floats:
    """Weighted max-min of each host's budget among those on it; what `policy.maxmin.max_min` does for one.

    Parameters:
        host: of each guest, 0 to n - 1.
        wants, weight: of each guest.
        budget: of each of the n hosts.
    """
    if not len(host):
        return np.empty(0)
    order = np.lexsort((wants / weight, host))
    h, want, w = host[order], wants[order], weight[order]
    first = np.flatnonzero(np.r_[True, h[1:] != h[:-1]])
    sizes = np.diff(np.r_[first, len(h)])
    # Sums from each host's start, and what is left to its end. Host by host, so that no rounding crosses over.
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
