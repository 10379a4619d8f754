"""Linux guests that do not boot, panic, reset and begin again."""

from __future__ import annotations

import attrs
import pytest

import linux_kit
import orchestra as orc
from test_linux import (
    BOOTED,
    PROMPT,
    answer,
    booted,
    ended,
    had,
    initrd as initrd,
    spec_of,
    with_modules as with_modules,
)

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

OFF = orc.Shutdown(reason="ACPI power-off")


async def test_kernel_that_hangs_at_boot_is_told_by_its_last_lines(initrd):
    """Without an initrd it waits for a disk that never comes."""
    spec = spec_of(had(linux_kit.debian_kernel), initrd, cmdline="root=/dev/none rootwait")
    spec = attrs.evolve(spec, boot=attrs.evolve(spec.boot, initrd=None))
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await fleet.launch(spec)
        await vm.console.wait_for("Waiting for root device", timeout=BOOTED)
        with pytest.raises(TimeoutError, match=r"vm 'linux': b'/ # ' did not come .*(?s:.*)Waiting for root device"):
            await vm.console.wait_for(PROMPT, timeout=1)
        assert vm.state is orc.State.RUNNING  # and what to do about it is the caller's
        stopped = await vm.shutdown(timeout=0.5)
        assert isinstance(stopped, orc.Stopped)
        assert "did not power off" in stopped.reason


async def test_linux_boots_again_after_a_panic_and_a_reset(with_modules):
    """As what its spec says after a failure, and by the reset button: with the same name, console and limits."""
    spec = spec_of(had(linux_kit.debian_kernel), with_modules)
    restart = orc.Restart("on-failure", backoff=0.01, most=1)
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, attrs.evolve(spec, restart=restart))
        await vm.console.write("echo c >/proc/sysrq-trigger\n")
        await vm.console.wait_for("Kernel panic - not syncing: sysrq triggered crash", timeout=60)
        await vm.console.wait_for(PROMPT, timeout=BOOTED)
        assert await answer(vm, "echo $((6 * 7))") == "42\n"
        await vm.reset()
        await vm.console.wait_for(PROMPT, timeout=BOOTED)
        assert float((await answer(vm, "cat /proc/uptime")).split()[0]) < BOOTED
        assert await ended(vm, "poweroff -f") == OFF
