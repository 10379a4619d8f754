"""What vCPUs ask and what devices have to be told: in turns, one of each tenant in a round of the loop.

vCPU: question → core → a turn → the task that claimed the address
doorbell, timer ───────→ a turn → the device
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeAlias

import trio

from ..native import lib
from ..native.core import FleetCore, Question, Settled, VcpuCore
from .devices.bus import Bus, Claim
from .devices.requests import Request, Requests

__all__ = ["Inbox", "Key"]

Key: TypeAlias = tuple[str, str]
"""Tenant and VM."""

Turn: TypeAlias = Callable[[], object]
"""What is done when it is a VM's turn."""


class Kicked(Protocol):
    """What an engine needs to hear beside the core, as `Engine.kick`."""

    def kick(self) -> None: ...


class Asker:
    """A vCPU that may ask."""

    __slots__ = ("_buses", "_core", "_engine", "_index", "whose")

    def __init__(self, core: VcpuCore, engine: Kicked, index: int, whose: Key, ports: Bus, mmio: Bus) -> None:
        self._core = core
        self._engine = engine
        self._index = index
        self._buses = {int(lib.ORC_IO): ports, int(lib.ORC_MMIO): mmio}
        self.whose = whose

    def ask(self, question: Question) -> None:
        """Hand a question to whoever has the claim now."""
        claim = self._buses[question.bus].claimed.get(question.claim)
        if claim is None or not isinstance(claim.handler, Requests):
            self._settle(question.number, Settled.AGAIN)
            return

        def settle(request: Request) -> None:
            self._settle(question.number, settled(request, claim), request.answer_bytes)

        request = Request(self._index, question.address, question.size, question.write, question.data, settle)
        claim.handler.deliver(request)

    def _settle(self, number: int, how: int, answer: bytes = b"") -> None:
        if self._core.settle(number, how, answer):
            self._engine.kick()


def settled(request: Request, claim: Claim) -> int:
    """What became of a question, for the core."""
    if request.answered:
        return Settled.ANSWERED
    # By one who keeps the claim and answers no more ones are read, or it would be asked for ever.
    return Settled.NOBODY if claim.live else Settled.AGAIN


class Inbox:
    """Hands what vCPUs ask to tasks, and calls what else is to be done for a VM (`put`), in a fair order. Fleet's
    thread, all of it.

    A vCPU puts its question into the core's list and waits there, without the interpreter; the core rings only if this
    task sleeps. A tenant's VMs take turns, and the tenants get one question each in a round of the event loop. So
    neither the number of a guest's vCPUs nor that of a tenant's guests decides how often another tenant's are served,
    and what is done in a round is bounded by the tenants that ask and not by what they ask for. The turns of one VM
    stay in order.
    """

    MOST: Final = 256
    """Questions that are taken at once from the core; what is left there comes in the next round."""

    def __init__(self, core: FleetCore) -> None:
        self._core = core
        self._askers: dict[int, Asker] = {}
        self._tenants: dict[str, dict[str, deque[Turn]]] = {}
        self._asleep = False

    def add(self, core: VcpuCore, engine: Kicked, index: int, whose: Key, buses: tuple[Bus, Bus]) -> None:
        """Serve this vCPU from now on."""
        self._askers[core.id] = Asker(core, engine, index, whose, *buses)

    def remove(self, id: int) -> None:
        """It asks no more."""
        self._askers.pop(id, None)

    def put(self, whose: Key, turn: Turn) -> None:
        """Have it called when it is that VM's turn."""
        self._append(whose, turn)
        if self._asleep:  # as a question would wake it; before it sleeps again it takes what was written
            self._asleep = False
            os.eventfd_write(self._core.asked_eventfd, 1)

    def _append(self, whose: Key, turn: Turn) -> None:
        tenant, vm = whose
        self._tenants.setdefault(tenant, {}).setdefault(vm, deque()).append(turn)

    async def run(self) -> None:
        """The task that serves."""
        core = self._core
        while True:
            self.serve()
            if not self._tenants and core.may_sleep_unasked():
                # At once, and not after some rounds in which a guest might ask again: that is quicker on idle CPUs. But
                # beside guests that spin, the kernel lets a thread that sleeps go first and one that spins wait.
                self._asleep = True
                await trio.lowlevel.wait_readable(core.asked_eventfd)
                self._asleep = False
            else:
                await trio.lowlevel.checkpoint()

    def serve(self) -> None:
        """One round."""
        arrived, tenants = self._core.asked(self.MOST), self._tenants
        if not tenants and len(arrived) == 1:  # nobody to take turns with, as is usual
            self._ask(arrived[0])
            return
        for question in arrived:
            asker = self._askers.get(question.vcpu)
            if asker is not None:
                self._append(asker.whose, partial(self._ask, question))
        for turn in [self._next(tenant) for tenant in list(tenants)]:
            turn()

    def _ask(self, question: Question) -> None:
        asker = self._askers.get(question.vcpu)
        if asker is not None:  # else it has ended meanwhile
            asker.ask(question)

    def _next(self, tenant: str) -> Turn:
        vms = self._tenants[tenant]
        vm = next(iter(vms))
        turns = vms.pop(vm)
        turn = turns.popleft()
        if turns:
            vms[vm] = turns  # at the end: the others' turn comes first
        elif not vms:
            del self._tenants[tenant]
        return turn
