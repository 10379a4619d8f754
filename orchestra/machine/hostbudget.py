"""A host's budget that several processes share: its buckets in shared memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import attrs

from ..model.errors import SpecError
from ..model.spec import Limit, Meter, as_meter, optional_limit
from ..native.shared import SharedBuckets

__all__ = ["HostBudget", "HostBudgetStatistics"]


@attrs.frozen
class HostBudgetStatistics:
    """What is in force for all processes that share the budget.

    Attributes:
        limit, exit_limit, answer_limit: the limits in force, on bus locks, exits and answers. None: no limit.
        wait: by meter, the seconds that the next charge would wait. All processes together have reserved that much
            ahead. A killed process leaves its reservations behind: at most one event of each of its vCPUs.
        changes: how often any process changed a limit; wraps at 2**32.
        fleets: the number of fleets of this process that use the budget.
    """

    limit: Limit | None
    exit_limit: Limit | None
    answer_limit: Limit | None
    wait: Mapping[Meter, float]
    changes: int
    fleets: int


class HostBudget:
    """One budget for all VMs of a host, in any number of processes. `create` makes a budget, `attach` joins one that
    another process made, and ``open_fleet(host_budget=...)`` charges it.

    The budget is a memfd, which vanishes with the last process that has it open. Every process that has the descriptor
    may change the limits. A process may die at any moment: the others keep the exact rate, and none of them waits for
    the dead process.
    """

    def __init__(self, buckets: SharedBuckets) -> None:
        self._buckets = buckets

    @classmethod
    def create(
        cls,
        limit: Limit | None = None,
        *,
        exit_limit: Limit | None = None,
        answer_limit: Limit | None = None,
    ) -> HostBudget:
        """Make a new budget.

        Parameters:
            limit: bus locks per second of all VMs of all processes together; None: no limit.
            exit_limit: the same for exits of any kind.
            answer_limit: the same for accesses that Python answers.

        Raises:
            SpecError: an argument is not a limit.
            ResourceLimit: the host has no descriptor or memory left.
        """
        limits = {Meter.BUS_LOCKS: limit, Meter.EXITS: exit_limit, Meter.ANSWERS: answer_limit}
        for meter, given in limits.items():
            optional_limit(meter.field, given)
        made = SharedBuckets.create()
        for meter, given in limits.items():
            if given is not None:
                made.set(meter, given)
        return cls(made)

    @classmethod
    def attach(cls, source: int | str | Path) -> HostBudget:
        """Join a budget that another process has made.

        Parameters:
            source: the budget's descriptor, inherited (``subprocess.Popen(pass_fds=[budget.fd])``) or received over a
                socket; the descriptor stays yours, and you may close it afterwards. Or a path to the budget, such as
                "/proc/<pid>/fd/<fd>".

        Raises:
            SpecError: the source is no budget, or a budget of another version of orchestra, or a file that its other
                owners may truncate. The message says which.
            ResourceLimit: the host has no descriptor or memory left.
        """
        if isinstance(source, int) and not isinstance(source, bool):
            return cls(SharedBuckets(source))
        if not isinstance(source, str | Path):
            raise SpecError(f"source={source!r}: must be a descriptor or a path")
        try:
            # The path comes from outside. Whatever it names, opening it must not block and must not give this process a
            # controlling terminal.
            fd = os.open(source, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except (OSError, ValueError) as error:
            raise SpecError(f"source={str(source)!r}: can't be opened for reading and writing: {error}") from None
        try:
            return cls(SharedBuckets(fd))
        # The mapping has a descriptor of its own.
        finally:
            os.close(fd)

    @property
    def buckets(self) -> SharedBuckets:
        """The shared buckets, for the fleets that use them."""
        return self._buckets

    @property
    def fd(self) -> int:
        """The descriptor to pass to other processes. `close` closes it.

        Raises:
            StateError: the budget is closed.
        """
        self._buckets.check_open()
        return self._buckets.fd

    @property
    def limit(self) -> Limit | None:
        """The limit on bus locks in force, whichever process set it."""
        return self._buckets.look(Meter.BUS_LOCKS)[0]

    @property
    def exit_limit(self) -> Limit | None:
        return self._buckets.look(Meter.EXITS)[0]

    @property
    def answer_limit(self) -> Limit | None:
        return self._buckets.look(Meter.ANSWERS)[0]

    def set_limit(self, limit: Limit | None, *, meter: Meter | str = Meter.BUS_LOCKS) -> None:
        """Change a limit for all processes: at once, also for waits in progress.

        Raises:
            SpecError: not a limit, or not a meter.
            StateError: the budget is closed.
        """
        self._buckets.set(as_meter(meter), optional_limit("limit", limit))

    def statistics(self) -> HostBudgetStatistics:
        """Raises:
        StateError: the budget is closed.
        """
        looked = {meter: self._buckets.look(meter) for meter in Meter}
        limits: dict[str, Any] = {meter.field: limit for meter, (limit, _) in looked.items()}
        wait = {meter: wait for meter, (_, wait) in looked.items()}
        return HostBudgetStatistics(**limits, wait=wait, changes=self._buckets.changes(), fleets=self._buckets.users)

    def close(self) -> None:
        """Leave the budget; the other processes keep it. A second call does nothing.

        Raises:
            StateError: a fleet of this process still uses the budget.
        """
        self._buckets.close()

    def __enter__(self) -> HostBudget:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HostBudget fd={self._buckets.fd}>"
