"""Linux kernels as they are, booted to a shell on the serial console: three formats, one and four vCPUs."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import linux_kit
import orchestra as orc
from terminals import seat

pytestmark = [pytest.mark.kvm, pytest.mark.linux]

EXAMPLES = Path(__file__).parents[1] / "examples"
BOOTED = 150.0
"""Seconds. On an emulated host, with other things to do, a kernel takes 25 s; on a real one, less than one."""
PROMPT = "/ # "
ASKS_FOR_CURSOR = "\x1b[6n"
"""The shell asks its terminal where the cursor is, unless input waits. A serial port does not say."""


@pytest.fixture(scope="module")
def initrd(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "initrd"
    path.write_bytes(had(linux_kit.initrd))
    return path


def had(make, *args, **more):
    """What the kit makes. Where it can't be had, the test is skipped, with the reason."""
    try:
        return make(*args, **more)
    except linux_kit.NotHereError as error:
        pytest.skip(str(error))


def spec_of(kernel: Path, initrd: Path, vcpus: int = 1, cmdline: str = "quiet") -> orc.VmSpec:
    return orc.VmSpec(
        name="linux",
        boot=orc.LinuxBoot(kernel=kernel, initrd=initrd, cmdline=cmdline),
        memory=256 * orc.MiB,
        vcpus=vcpus,
        devices=(orc.Serial(),),
    )


def plain(output: bytes) -> str:
    return output.decode().replace(ASKS_FOR_CURSOR, "").replace("\r", "")


async def answer(vm: orc.Vm, line: str) -> str:
    """Type a line at the prompt, and return what the guest printed up to its next prompt."""
    await vm.console.write(f"{line}\n")
    await vm.console.wait_for("\n")  # its echo
    return plain(await vm.console.wait_for(PROMPT)).removesuffix(PROMPT)


async def booted(fleet: orc.Fleet, spec: orc.VmSpec) -> orc.Vm:
    vm = await fleet.launch(spec)
    await vm.console.wait_for(PROMPT, timeout=BOOTED)
    return vm


async def ended(vm: orc.Vm, how: str) -> orc.Outcome:
    await vm.console.write(f"{how}\n")
    with trio.move_on_after(60):
        return await vm.wait()
    raise AssertionError(f"{how} did nothing, but: {vm.console.text[-2000:]}")


async def test_bzimage_boots_to_a_shell_that_answers_and_powers_off(initrd):
    kernel = had(linux_kit.debian_kernel)
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_of(kernel, initrd))
        assert await answer(vm, "uname -r") == kernel.name.removeprefix("vmlinuz-") + "\n"
        assert await answer(vm, "cat /proc/cmdline") == "console=ttyS0 reboot=a quiet\n"
        assert await answer(vm, "cat /sys/devices/system/clocksource/*/current_clocksource") == "kvm-clock\n"
        found = await answer(vm, "dmesg | grep -E 'BIOS-e820|RSDP 0x|MTRR|TSC deadline'")
        assert "[mem 0x0000000000100000-0x000000000fffffff] usable" in found
        assert "[mem 0x00000000e0000000-0x00000000e00fffff] reserved" in found
        assert "RSDP 0x00000000000E0000" in found
        assert "TSC deadline timer available" in found
        assert await ended(vm, "poweroff -f") == orc.Shutdown(reason="ACPI power-off")


@pytest.mark.smp
async def test_newest_kernel_brings_up_four_vcpus_and_resets(initrd):
    kernel = had(linux_kit.host_kernel)
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_of(kernel, initrd, vcpus=4))
        assert await answer(vm, "nproc") == "4\n"
        apics = await answer(vm, "grep -E '^(apicid|core id|siblings)' /proc/cpuinfo")
        words = [line.split(":") for line in apics.splitlines()]
        assert [int(value) for name, value in words if name.startswith("apicid")] == [0, 1, 2, 3]
        assert {int(value) for name, value in words if name.startswith("siblings")} == {4}
        assert await ended(vm, "reboot -f") == orc.Shutdown(reason="ACPI reset")


@pytest.mark.parametrize(
    ("pvh", "end", "reason", "cmdline"),
    [
        (True, "poweroff -f", "ACPI power-off", "quiet reboot=a"),
        (False, "reboot -f", "triple fault", "quiet reboot=t"),
    ],
    ids=["pvh", "64-bit protocol, and a triple fault at the end"],
)
async def test_elf_kernel_boots_to_a_shell(initrd, tmp_path, pvh, end, reason, cmdline):
    (tmp_path / "vmlinux").write_bytes(had(linux_kit.vmlinux, had(linux_kit.debian_kernel), pvh=pvh))
    async with orc.open_fleet(backend="kvm", bus_locks="auto") as fleet:
        vm = await booted(fleet, spec_of(tmp_path / "vmlinux", initrd, cmdline=cmdline))
        assert await answer(vm, "cat /proc/cmdline") == f"console=ttyS0 {cmdline}\n"
        assert await ended(vm, end) == orc.Shutdown(reason=reason)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder in which the files of the guide were made, from packages that were fetched before."""
    folder = tmp_path_factory.mktemp("guide")
    shutil.copy(had(linux_kit.debian_kernel), folder / "vmlinuz")
    shutil.copy(had(linux_kit.busybox), folder / "busybox")
    subprocess.run(["sh", EXAMPLES / "linux_files.sh"], cwd=folder, check=True, capture_output=True)
    return folder


def test_example_of_the_guide_boots_what_the_guide_makes_and_powers_off(made):
    command = [sys.executable, EXAMPLES / "linux.py", "vmlinuz", "initrd.cpio"]
    done = subprocess.run(command, cwd=made, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[:2] == ["Linux x86_64", "Shutdown(reason='ACPI power-off', code=None)"]


def test_run_boots_a_kernel_at_a_terminal_to_a_shell(made):
    command = [sys.executable, "-m", "orchestra", "run", "--kernel", "vmlinuz", "--initrd", "initrd.cpio"]
    with seat([*command, "--cmdline", "quiet", "--memory", "256M"], cwd=made) as person:
        person.see(b"what you type goes to the guest", within=BOOTED)
        person.see(b"# ", within=BOOTED)
        person.type(b"echo $((6 * 7))\r")
        person.see(b"\n42\r", within=BOOTED)  # line feeds of the guest get another carriage return: output is processed
        person.type(b"poweroff -f\r")
        assert person.ended(within=BOOTED) == 0
