"""What vCPU threads ask of the fleet's thread, in turns: one request of each tenant in a round of the event loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Inbox"]

Call: TypeAlias = Callable[[], object]
Key: TypeAlias = tuple[str, str]
"""Tenant and VM."""


class Inbox:
    """Runs functions on the fleet's thread in a fair order.

    A tenant's VMs take turns, and the tenants get one call each in a round of the event loop. So neither the number of
    a guest's vCPUs nor that of a tenant's guests decides how often another tenant's are served, and what is done in a
    round is bounded by the tenants that ask and not by what they ask for. The calls of one VM stay in order.

    There is no lock, as a thread that held one could be kept from the interpreter while the event loop waits for it:
    a deque takes and gives in one step, and everything else is the fleet's thread's.
    """

    def __init__(self, post: Callable[..., None]) -> None:
        """`post` has a function run in the next round of the event loop. Any thread."""
        self._post = post
        self._arrived: deque[tuple[Key, Call]] = deque()
        self._called = False
        self._tenants: dict[str, dict[str, deque[Call]]] = {}

    def put(self, whose: Key, call: Call) -> None:
        """Have it called, in turn. Any thread."""
        self._arrived.append((whose, call))
        # Looked at after it was put there: `serve` clears it before it looks there. (Twice called is no harm.)
        if not self._called:
            self._called = True
            self._post(self.serve)

    def serve(self) -> None:
        """One round. Fleet's thread."""
        self._called = False
        arrived, tenants = self._arrived, self._tenants
        if not tenants and len(arrived) == 1:  # nobody to take turns with, as is usual
            arrived.popleft()[1]()
            return
        for _ in range(len(arrived)):  # at most one for each vCPU
            (tenant, vm), call = arrived.popleft()
            tenants.setdefault(tenant, {}).setdefault(vm, deque()).append(call)
        calls = [self._next(tenant) for tenant in list(tenants)]
        if tenants and not self._called:
            self._called = True
            self._post(self.serve)
        for call in calls:
            call()

    def _next(self, tenant: str) -> Call:
        vms = self._tenants[tenant]
        vm = next(iter(vms))
        calls = vms.pop(vm)
        call = calls.popleft()
        if calls:
            vms[vm] = calls  # at the end: the others' turn comes first
        elif not vms:
            del self._tenants[tenant]
        return call
