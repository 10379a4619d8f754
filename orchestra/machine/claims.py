"""The addresses of a VM that its user's devices and tasks have claimed. The claims hold for all runs of the VM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ..model.errors import SpecError
from .contain import in_device
from .devices.bus import Device, Handler
from .devices.requests import Requests

__all__ = ["Claims", "check_device", "check_ranges"]

Claim = tuple[range | None, range | None, Handler]
"""Ports, MMIO addresses, and the handler that answers there."""


def check_ranges(ports: range | None, mmio: range | None) -> None:
    if ports is None and mmio is None:
        raise SpecError("ports=None, mmio=None: name the ports or the MMIO addresses to claim, as ranges")


def check_device(device: object, ports: range | None, mmio: range | None) -> None:
    """Check a device of the user's own, before addresses are claimed for it.

    Raises:
        SpecError: not a device, or no addresses are named.
    """
    if not isinstance(device, Device):
        raise SpecError(f"device={device!r}: must have read(offset, size) and write(offset, size, value)")
    check_ranges(ports, mmio)


class Claims:
    """The claims of one VM. Fleet's thread."""

    def __init__(self, devices: Iterable[tuple[range | None, range | None, Device]] = ()) -> None:
        self._devices = list(devices)
        self._requests: dict[Requests, tuple[range | None, range | None]] = {}

    def __iter__(self) -> Iterator[Claim]:
        yield from self._devices
        for requests, (ports, mmio) in self._requests.items():
            yield ports, mmio, requests

    def add_device(self, ports: range | None, mmio: range | None, device: Device) -> None:
        self._devices.append((ports, mmio, device))

    def add_requests(self, ports: range | None, mmio: range | None, requests: Requests) -> None:
        self._requests[requests] = ports, mmio

    def remove_requests(self, requests: Requests) -> None:
        del self._requests[requests]

    def requests(self) -> tuple[Requests, ...]:
        return tuple(self._requests)

    def reset_devices(self) -> None:
        """Call `reset` of each device that has it, once a device. Before each run but the first.

        Raises:
            Exception: what a device raised.
        """
        for device in {id(device): device for _, _, device in self._devices}.values():
            if callable(reset := getattr(device, "reset", None)):
                with in_device():
                    reset()
