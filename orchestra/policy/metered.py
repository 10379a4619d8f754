"""What policies have in common: a meter, an interval and a name, the memory of each VM, and the test for pressing.

`credits` is the policy to copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import ClassVar, Final, Protocol, TypeVar

import attrs

from ..model.spec import Limit, Meter, as_meter
from .facts import VmFacts
from .validation import within

__all__ = ["WAITED", "Memory", "Metered", "longest_wait", "presses"]

WAITED: Final = 0.05
"""Part of a tick. A VM whose vCPUs together wait for longer presses against its limit, and wants more than it got. A VM
that waits for less would do at most 1 / (1 - WAITED) times what was seen, which the headroom of the sharing policies
covers. The C core's own delays, below a millisecond each, stay below this part."""


def presses(vm: VmFacts, interval: float) -> bool:
    """Whether a VM pressed against its limits in an interval of so many seconds: it wanted more than it got."""
    return vm.throttled > WAITED * interval


def longest_wait(limit: Limit, vcpus: int) -> float:
    """Seconds for which a VM may do nothing because each of its vCPUs waits for the limit's bucket.

    It is twice the wait for one token for each vCPU: a token may come late, and a tick may begin in the middle of a
    wait.
    """
    longest = 2 * vcpus / limit.rate
    return longest if limit.max_delay is None else min(longest, 2 * limit.max_delay)


class Remembered(Protocol):
    """What a policy remembers of one VM. `generation` tells the VM from an earlier one of the same name."""

    generation: int


S = TypeVar("S", bound=Remembered)


class Memory(dict[str, S]):
    """What a policy remembers of each VM, by the VM's name. A new VM of the same name starts with nothing."""

    def end(self, gone: Iterable[tuple[str, int]]) -> None:
        """Forget the VMs that have ended (`Facts.gone`)."""
        for name, generation in gone:
            one = self.get(name)
            if one is not None and one.generation == generation:
                del self[name]

    def of(self, vm: VmFacts) -> S | None:
        """The state of this generation of the VM. The state of an earlier generation is dropped."""
        one = self.get(vm.name)
        if one is not None and one.generation != vm.generation:
            del self[vm.name]
            return None
        return one


@attrs.define(eq=False, slots=False, kw_only=True)
class Metered:
    """A policy that counts one meter. A subclass names its kind, and the range of its interval in seconds.

    Attributes:
        name: the policy's name in the journal: the name that was given, or its kind and the meter.
        meter: the events that the policy counts.

    Raises:
        SpecError: the meter is not known, or the interval is out of its range.
    """

    KIND: ClassVar[str]
    INTERVALS: ClassVar[tuple[float, float]] = (1e-4, 3600.0)

    _meter: Meter | str = Meter.BUS_LOCKS
    _interval: float = 0.1
    _name: str | None = None

    def __attrs_post_init__(self) -> None:
        self.meter = as_meter(self._meter)
        self.name = self._name or (self.KIND if self.meter is Meter.BUS_LOCKS else f"{self.KIND}-{self.meter}")
        within("interval", self._interval, *self.INTERVALS, "seconds")
        self._count = attrgetter(self.meter.value)  # of `VmFacts`; None where the host does not tell

    @property
    def interval(self) -> float | None:
        """Seconds between two ticks."""
        return self._interval
