"""The simulator's arrays. The only module that imports numpy."""

from __future__ import annotations

from typing import TypeAlias

from ..model.errors import OrchestraError
from ..model.extras import install

try:
    import numpy as np
    from numpy.typing import NDArray
except ImportError as error:
    raise OrchestraError(f"the simulator needs numpy ({error}): {install('simulate')}") from None

__all__ = ["Bools", "Floats", "Generator", "Ints", "generator", "np", "totals"]

Floats: TypeAlias = NDArray[np.float64]
Ints: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]
Generator: TypeAlias = np.random.Generator


def generator(*key: int) -> Generator:
    """A generator of random numbers for a key. Each key has its own stream, so draws from one do not move another."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def totals(index: Ints, values: Floats, size: int) -> Floats:
    """The sum of the values of each index, 0 to size - 1."""
    return np.asarray(np.bincount(index, values, size), np.float64)
