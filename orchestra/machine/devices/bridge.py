"""The PCI host bridge: configuration space, which native/pci.c answers, and its state."""

from __future__ import annotations

import attrs

from ...model.checks import whole
from ...model.chipset import PciHostBridge
from ...model.errors import SpecError
from .bus import NativeDevice
from .pci import PciHost
from .peripheral import Hooks, Peripheral

__all__ = ["ConfigPorts", "PciBridge", "PciState"]


@attrs.frozen
class PciState:
    """`selected`: CONFIG_ADDRESS. `spaces`: the configuration space of each function, the bridge's first."""

    selected: int = 0
    spaces: tuple[bytes, ...] = attrs.field(default=(), repr=lambda spaces: f"<{len(spaces)} of 4096 bytes>")

    def __attrs_post_init__(self) -> None:
        whole("selected", self.selected, 0, (1 << 32) - 1)
        if not isinstance(self.spaces, tuple) or not all(isinstance(space, bytes) for space in self.spaces):
            raise SpecError("spaces: must be bytes, in a tuple")


class ConfigPorts(NativeDevice):
    """The ports 0xcf8 to 0xcff."""

    def __init__(self, host: PciHost) -> None:
        self._host = host
        self.native = host.ports

    def write(self, offset: int, size: int, value: int) -> None:
        self._host.sync()


class PciBridge(NativeDevice, Peripheral[PciHostBridge, PciState]):
    """See `pci.PciHost`, which the assembly has made with all functions."""

    State = PciState

    def __init__(self, spec: PciHostBridge, hooks: Hooks) -> None:
        super().__init__(spec, hooks)
        assert hooks.bus is not None
        self._host = hooks.bus
        self.native = self._host.ecam

    def write(self, offset: int, size: int, value: int) -> None:
        """The core has stored a write that has an effect."""
        self._host.sync()

    def reset(self) -> None:
        self._host.reset()

    def state(self) -> PciState:
        return PciState(*self._host.save())

    def restore(self, state: PciState) -> None:
        self._host.load(state.selected, state.spaces)
