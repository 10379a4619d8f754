"""virtio devices on the PCI bus: what the core does not do of them (native/virtio.h has what it does).

    notify register → ioeventfd (Hooks.bells) → I/O thread → queue → vector's eventfd → irqfd (Hooks.msis)

No Python is on that way. Python binds and masks vectors, when a driver programs them, and has the state.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Generic, TypeVar

import attrs

from ...model.devices import DeviceSpec
from ...model.errors import SpecError
from ...model.virtio import Rng
from ...native import ffi, lib
from .bus import NativeDevice
from .io import IoThread
from .peripheral import Hooks, Peripheral

__all__ = ["QueueState", "RngDevice", "VectorState", "VirtioDevice", "VirtioFunction", "VirtioState"]

SpecT = TypeVar("SpecT", bound=DeviceSpec)


@attrs.frozen
class QueueState:
    """As the driver set it up, and where it is: ``struct orc_queue_state``."""

    descriptors: int = 0
    driver: int = 0
    device: int = 0
    size: int = 0
    vector: int = 0
    next: int = 0
    error: int = 0
    enabled: bool = False


@attrs.frozen
class VectorState:
    """An entry of the MSI-X table."""

    address: int = 0
    data: int = 0
    masked: bool = True


KIND: Final = 64
"""ORC_VIRTIO_KIND: bytes of state that only this kind of device knows."""


@attrs.frozen
class VirtioState:
    """``struct orc_virtio_state``, which says what each is. `pending`: a bit for each vector."""

    accepted: int = 0
    device_feature_select: int = 0
    driver_feature_select: int = 0
    status: int = 0
    isr: int = 0
    generation: int = 0
    config_changed: bool = False
    queue_select: int = 0
    config_vector: int = 0
    error: int = 0
    error_queue: int = 0
    pending: int = 0
    queue: tuple[QueueState, ...] = ()
    vector: tuple[VectorState, ...] = ()
    config: bytes = b""
    kind: bytes = bytes(KIND)


BYTES = ("config", "kind")
SIMPLE = tuple(field for field in attrs.fields_dict(VirtioState) if field not in ("queue", "vector", *BYTES))


class VirtioFunction(NativeDevice, Peripheral[SpecT, VirtioState], Generic[SpecT]):
    """One device, whoever serves its queues. A kind makes the core's part (`_make`)."""

    State: ClassVar[type[Any]] = VirtioState

    def __init__(self, spec: SpecT, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self.handle = self._make()
        if self.handle == ffi.NULL:
            raise MemoryError(f"{type(self).__name__}: no memory")
        # As at power-on: `interrupts_changed` comes with the first change.
        lib.orc_virtio_set_master(self.handle, False)
        self.native = ffi.gc(lib.orc_virtio_device(self.handle), lib.orc_device_free)
        for queue, bell in enumerate(hooks.bells):
            lib.orc_virtio_set_kick_fd(self.handle, queue, bell.fd)
        for number, msi in enumerate(hooks.msis):
            lib.orc_virtio_set_vector_fd(self.handle, number, msi.fd)

    def _make(self) -> Any:
        """The ``orc_virtio *``; NULL: there is no memory."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What it is called where it keeps a pause waiting."""
        return type(self.spec).__name__

    # ---- vectors

    def write(self, offset: int, size: int, value: int) -> None:
        """The core has stored a write that concerns where or whether a vector fires."""
        self.interrupts_changed()

    def interrupts_changed(self) -> None:
        """Let it be a bus master or not; bind each vector that may interrupt, and mask the others. What is so already
        costs nothing."""
        slot = self.hooks.slot
        on = slot is not None and slot.interrupts
        lib.orc_virtio_set_master(self.handle, slot is not None and slot.master)
        entry = ffi.new("struct orc_vector *")
        for number, msi in enumerate(self.hooks.msis):
            lib.orc_virtio_vector(self.handle, number, entry)
            if not on or entry.masked or not msi.route(entry.address, entry.data):
                msi.mask()

    # ---- power

    def reset(self) -> None:
        lib.orc_virtio_power_on(self.handle)
        for msi in self.hooks.msis:
            msi.unroute()

    def state(self) -> VirtioState:
        raw = ffi.new("struct orc_virtio_state *")
        lib.orc_virtio_save(self.handle, raw)
        return VirtioState(
            queue=tuple(_taken(QueueState, raw.queue[number]) for number in range(raw.queues)),
            vector=tuple(_taken(VectorState, raw.vector[number]) for number in range(raw.vectors)),
            config=bytes(ffi.buffer(raw.config)),
            kind=bytes(ffi.buffer(raw.kind)),
            **{name: getattr(raw, name) for name in SIMPLE},
        )

    def restore(self, state: VirtioState) -> None:
        raw = ffi.new("struct orc_virtio_state *")
        try:
            for name in SIMPLE:
                setattr(raw, name, getattr(state, name))
            raw.queues, raw.vectors = len(state.queue), len(state.vector)
            _give(QueueState, state.queue, raw.queue)
            _give(VectorState, state.vector, raw.vector)
            for name in BYTES:
                setattr(raw, name, _bytes(name, getattr(state, name), len(getattr(raw, name))))
        except (AttributeError, IndexError, OverflowError, TypeError) as error:
            raise SpecError(f"{type(self.spec).__name__}: a value of its state does not fit ({error})") from None
        if not lib.orc_virtio_load(self.handle, raw):
            raise SpecError(f"{type(self.spec).__name__}: no such device can be in that state")
        self.interrupts_changed()


def _bytes(name: str, value: object, size: int) -> tuple[int, ...]:
    if not isinstance(value, bytes) or len(value) != size:  # cffi takes fewer, and leaves the rest 0
        raise TypeError(f"{name} must be {size} bytes")
    return tuple(value)


def _give(kind: Any, every: tuple[Any, ...], raw: Any) -> None:
    for number, one in enumerate(every):
        for name in attrs.fields_dict(kind):
            setattr(raw[number], name, getattr(one, name))


def _taken(kind: Any, raw: Any) -> Any:
    return kind(**{name: getattr(raw, name) for name in attrs.fields_dict(kind)})


class VirtioDevice(VirtioFunction[SpecT]):
    """A device that the VM's I/O thread serves. `RngDevice` is the one to copy."""

    def __init__(self, spec: SpecT, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        self._io: IoThread | None = None

    def attach(self, io: IoThread) -> None:
        """Let the VM's I/O thread serve it, until the thread stops.

        Raises:
            ResourceLimit: the host has no more of what that takes.
        """
        io.attach(self.handle)
        self._io = io  # which so outlives the device

    def drained(self) -> None:
        """The I/O thread has ended: give back what may take long. Before `stop`. Any thread."""

    def stop(self) -> None:
        # Not left to the garbage collector: a VM that has ended holds nothing of the host.
        lib.orc_virtio_stop(self.handle)

    @property
    def outstanding(self) -> int | None:
        """How many of its requests are in flight. None: some may be, as it is being served just now."""
        found = int(lib.orc_virtio_outstanding(self.handle))
        return None if found < 0 else found


class RngDevice(VirtioDevice[Rng]):
    """native/virtio_rng.c."""

    def _make(self) -> Any:
        return lib.orc_virtio_rng_new(self.hooks.guest)
