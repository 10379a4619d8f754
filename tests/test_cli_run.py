"""``orchestra run``: console, exit status, and each way to get it wrong."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import repeat

import pytest
import trio

import orchestra as orc
from conftest import bus_lock_problem
from orchestra import DebugConsole, ExitPort, Failed, FlatImage, Halted, ScriptedBackend, Shutdown, Stopped, VmSpec
from orchestra.backend import choose
from orchestra.backend.detection import Asked
from orchestra.backend.scripted import ScriptedExit, failed_run, hlt, io_write, triple_fault
from orchestra.cli import run as module
from orchestra.cli.app import main
from orchestra.cli.run import GuestRun, parse_disk, run, status
from orchestra.journal import read_journal
from orchestra.model.chipset import AcpiRegisters
from orchestra.model.errors import BackendUnavailable
from orchestra.testing import wait_until

HELLO = b"".join(b"\xb0%c\xe6\xe9" % byte for byte in b"hi\n") + b"\xf4"  # mov al, X; out 0xe9, al; hlt
EXIT_7 = b"\xb0\x07\xe6\xf4\xeb\xfe"  # mov al, 7; out 0xf4, al; jmp $
SPIN = b"\xeb\xfe"
UD2 = b"\x0f\x0b"
SERIAL = b"\xba\xf8\x03\xb0A\xee\xf4"  # mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt


@pytest.fixture
def guest(tmp_path):
    def write(code: bytes) -> str:
        path = tmp_path / "guest.bin"
        path.write_bytes(code)
        return str(path)

    return write


# ---- on real guests


@pytest.fixture(
    params=[pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)]
)
def on(request) -> list[str]:
    return ["--backend", request.param]


@pytest.mark.parametrize("mode", ["16", "32", "64"])
def test_the_console_is_standard_output_and_halting_is_0(mode, on, guest, capfd):
    assert main(["run", guest(HELLO), "--mode", mode, *on]) == 0
    assert capfd.readouterr() == ("hi\n", "")


def test_the_exit_ports_value_is_the_status(on, guest, capfd):
    assert main(["run", guest(EXIT_7), *on]) == 7


def test_a_guest_that_does_not_end_is_stopped_after_the_timeout(on, guest, capfd):
    assert main(["run", guest(SPIN), *on, "--timeout", "0.05"]) == 124
    assert "0.05 s" in capfd.readouterr().err


def test_a_triple_fault_is_1_and_says_where(on, guest, capfd):
    assert main(["run", guest(UD2), *on, "--mode", "32"]) == 1
    assert "triple fault at rip=0x1000" in capfd.readouterr().err


def test_the_serial_port_writes_to_standard_output_if_there_is_one(on, guest, capfd):
    assert main(["run", guest(SERIAL), *on]) == 0
    assert main(["run", guest(SERIAL), *on, "--serial"]) == 0
    assert capfd.readouterr().out == "A"


@pytest.mark.kvm
def test_with_an_irqchip_hlt_waits_for_an_interrupt(guest, capfd):
    command = ["run", guest(SERIAL), "--backend", "kvm", "--serial", "--irqchip", "--timeout", "0.2"]
    assert main(command) in (0, 124)
    assert capfd.readouterr().out == "A"


@pytest.mark.emulated
@pytest.mark.parametrize("options", [["--irqchip"], ["--vcpus", "2"]], ids=" ".join)
def test_what_the_emulator_can_not_do_is_one_line_that_names_who_can(options, guest, capfd):
    assert main(["run", guest(HELLO), "--backend", "emulated", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "backend='kvm' can" in err


def test_ports_load_address_and_entry_are_where_they_were_asked_for(on, guest, capfd):
    code = b"\xf4" + HELLO.replace(b"\xe6\xe9", b"\xe6\x42")
    options = ["--console-port", "0x42", "--load", "0x2000", "--entry", "0x2001", "--memory", "64K"]
    assert main(["run", guest(code), *on, *options]) == 0
    assert capfd.readouterr().out == "hi\n"


def test_json_is_one_document_and_the_console_goes_to_standard_error(on, guest, capfd):
    assert main(["run", guest(HELLO), *on, "--json"]) == 0
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert document["outcome"] == {"kind": "Halted"}
    assert document["console"] == err == "hi\n"
    assert document["statistics"]["exits"] == {"io": 3, "hlt": 1}


def test_an_exit_limit_is_kept(on, guest, capfd):
    assert main(["run", guest(b"\xe6\x80\xeb\xfc"), *on, "--exit-limit", "100", "--timeout", "0.1", "--json"]) == 124
    assert 1 <= json.loads(capfd.readouterr().out)["statistics"]["exits"]["io"] <= 5 + 100 * 0.5


@pytest.mark.kvm
@pytest.mark.skipif(bus_lock_problem() is None, reason="this host's KVM reports bus locks")
def test_a_bus_lock_limit_where_none_are_seen_is_one_line_that_names_who_sees_them(guest, capfd):
    assert main(["run", guest(HELLO), "--backend", "kvm", "--limit", "5"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("orchestra: ")
    assert "bus locks" in err
    assert "backend='emulated'" in err


@pytest.mark.emulated
def test_a_bus_lock_limit_is_kept_on_the_emulator_and_every_lock_is_counted(guest, capfd):
    lock = b"\xf0\x66\xff\x06\x3e\x80\xeb\xf8"  # again: lock inc dword [0x803e]; jmp again
    command = ["run", guest(lock), "--backend", "emulated", "--limit", "100", "--timeout", "0.1", "--json"]
    assert main(command) == 124
    locks = json.loads(capfd.readouterr().out)["statistics"]["bus_locks"]
    assert 1 <= locks <= 5 + 100 * 0.5


def test_ctrl_c_ends_the_guest_and_is_130(on, guest):
    code = b"\xb0\x0a\xe6\xe9\xeb\xfe"  # a line, so that we know that it runs; then jmp $
    command = [sys.executable, "-m", "orchestra", "run", guest(code), *on]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_a_reader_that_leaves_ends_it_quietly(on, guest):
    command = [sys.executable, "-m", "orchestra", "run", guest(b"\xe6\xe9\xeb\xfc"), *on]  # out 0xe9, al, for ever
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=30) == 141


# ---- on scripts


def spec() -> VmSpec:
    return VmSpec(name="guest", boot=FlatImage(code=b"\xf4"), devices=[DebugConsole(), ExitPort()])


def played(*script: ScriptedExit, **options) -> GuestRun:
    return GuestRun(spec=spec(), backend=ScriptedBackend({"guest": script}), **options)


def test_a_failed_guest_is_1_with_the_reason(capfd):
    assert run(played(failed_run(errno.EFAULT)), as_json=False) == 1
    err = capfd.readouterr().err
    assert err.startswith("orchestra: the guest failed: vCPU 0: KVM_RUN failed: EFAULT")


def test_a_failed_guests_registers_are_shown_four_in_a_row():
    seen = module._Seen(outcome=Failed("x", {f"r{i}": i for i in range(6)}, 1))
    lines = module._complaints(seen, played())
    assert lines == ["the guest failed: vCPU 1: x", "  r0=0x0 r1=0x1 r2=0x2 r3=0x3", "  r4=0x4 r5=0x5"]


def test_a_triple_fault_without_registers_is_still_told():
    assert run(played(triple_fault()), as_json=False) == 1


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (Halted(), 0),
        (Stopped(), 0),
        (Shutdown(code=0), 0),
        (Shutdown(code=3), 3),
        (Shutdown(code=0x1FF), 0xFF),
        (Shutdown(reason="system event: shutdown"), 0),
        (Shutdown(reason="triple fault"), 1),
        (Failed("x"), 1),
        (None, 1),
    ],
)
def test_the_outcome_decides_the_status(outcome, code):
    assert status(outcome) == code


async def test_a_guest_is_held_while_nobody_takes_its_output_and_nothing_is_lost(autojump_clock):
    block, blocks = bytes(range(256)) * 2, 400  # three times as much as is kept for a reader

    def script() -> Iterator[ScriptedExit]:
        for _ in range(blocks):
            yield ScriptedExit("io", 0.001, args=(0xE9, 1, len(block), 1), data=block)
        yield hlt()

    receive, send = os.pipe()
    fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 4096)
    plan = GuestRun(spec=spec(), backend=ScriptedBackend({"guest": script()}), output=send)
    seen, taken = module._Seen(), io.BytesIO()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(module._run, plan, seen)
            await trio.sleep(60)  # on the mocked clock: the script alone would take 0.4 s
            assert seen.outcome is None
            while len(taken.getvalue()) < len(block) * blocks:
                taken.write(await trio.to_thread.run_sync(os.read, receive, 65536))
    finally:
        os.close(send)
        os.close(receive)
    assert taken.getvalue() == block * blocks
    assert seen.outcome == Halted()


async def test_a_timeout_also_ends_a_guest_whose_output_nobody_takes(autojump_clock):
    receive, send = os.pipe()
    fcntl.fcntl(send, fcntl.F_SETPIPE_SZ, 4096)
    script = repeat(ScriptedExit("io", 0.001, args=(0xE9, 1, 512, 1), data=bytes(512)))
    seen = module._Seen()
    try:
        await module._run(
            GuestRun(spec=spec(), backend=ScriptedBackend({"guest": script}), output=send, timeout=5.0), seen
        )
    finally:
        os.close(receive)  # the abandoned write ends
        os.close(send)
    assert seen.timed_out
    assert seen.statistics is not None


def test_the_registers_of_what_ran_until_the_timeout_are_not_needed(capfd):
    assert run(played(io_write(0xE9, b"x"), hlt(after=60), timeout=0.01), as_json=True) == 124
    document = json.loads(capfd.readouterr().out.removeprefix("x"))
    assert document["timed_out"]
    assert document["console"] == "x"


# ---- mistakes


def test_the_scripted_backend_is_refused_as_it_runs_no_guest(guest, capfd):
    assert main(["run", guest(HELLO), "--backend", "scripted"]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "use auto, kvm or emulated" in err


def test_auto_takes_what_can_run_the_guest_and_says_in_one_line_which_and_why(guest, capfd):
    try:
        expected = choose("auto", Asked("limit"))
    except BackendUnavailable as error:
        pytest.skip(str(error))
    expected.close()
    assert main(["run", guest(HELLO), "--limit", "5"]) == 0
    assert capfd.readouterr() == ("hi\n", f"orchestra: backend {expected.why}\n")
    assert main(["run", guest(HELLO), "--limit", "5", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["backend"], document["why"]) == (expected.name, expected.why)


@pytest.mark.kvm
@pytest.mark.skipif(bus_lock_problem() is None, reason="this host's KVM reports bus locks")
def test_where_nothing_can_run_it_one_line_names_each_backend_and_its_reason(guest, capfd):
    assert main(["run", guest(HELLO), "--limit", "5", "--vcpus", "2"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        "orchestra: no backend here can run vm 'guest': kvm: this host's KVM reports no .*; emulated: .*\n", err
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--mode", "8"],
        ["--load", "zz"],
        ["--load", "16M"],
        ["--load", "0xffffffffffffffff"],
        ["--entry", "0x10000"],
        ["--entry", "-1"],
        ["--memory", "0"],
        ["--memory", "5000"],
        ["--memory", "1000000G"],
        ["--memory", "12Q"],
        ["--vcpus", "0"],
        ["--vcpus", "1000000000"],
        ["--limit", "0"],
        ["--exit-limit", "nan"],
        ["--timeout", "0"],
        ["--timeout", "-1"],
        ["--backend", "nonsense"],
    ],
    ids="=".join,
)
def test_a_bad_option_is_one_line_and_2(options, guest, capfd):
    assert main(["run", guest(HELLO), *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("orchestra: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("options", [["--console-port", "0x10000"], ["--console-port", "0xf4"]], ids="=".join)
def test_a_port_that_can_not_be_had_is_one_line_and_2(options, guest, capfd):
    assert main(["run", guest(HELLO), *options]) == 2
    assert capfd.readouterr().err.startswith("orchestra: port")


def test_a_missing_file_is_named(tmp_path, capfd):
    assert main(["run", str(tmp_path / "nowhere.bin")]) == 1
    assert "nowhere.bin: No such file" in capfd.readouterr().err


def test_an_empty_file_is_refused(guest, capfd):
    assert main(["run", guest(b"")]) == 1
    assert "is empty" in capfd.readouterr().err


def test_a_directory_is_refused(tmp_path, capfd):
    assert main(["run", str(tmp_path)]) == 1
    assert "directory" in capfd.readouterr().err


def test_an_image_larger_than_the_memory_is_refused(guest, capfd):
    assert main(["run", guest(bytes(70_000)), "--memory", "64K"]) == 1
    assert "more --memory" in capfd.readouterr().err


def test_a_file_without_an_end_is_not_read_for_ever(capfd):
    assert main(["run", "/dev/zero"]) == 1
    assert "larger" in capfd.readouterr().err


def test_no_image_may_be_larger_than_there_is_sense_in(monkeypatch, capfd):
    monkeypatch.setattr(module, "MOST_CODE", 1 << 20)
    assert main(["run", "/dev/zero", "--memory", "1G"]) == 1
    assert "larger than 1 MiB" in capfd.readouterr().err


def test_a_missing_kernel_is_named(tmp_path, capfd):
    assert main(["run", "--kernel", str(tmp_path / "vmlinuz"), "--backend", "kvm"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("orchestra: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "nothing to run: give a raw binary (GUEST.bin) or a Linux kernel (--kernel FILE)"),
        (["guest.bin", "--kernel", "k"], "GUEST.bin: is for a raw binary, and --kernel is given"),
        (["--kernel", "k", "--mode", "16"], "--mode: is for a raw binary"),
        (["--kernel", "k", "--exit-port", "1"], "--exit-port: is for a raw binary"),
        (["guest.bin", "--initrd", "i"], "--initrd: is for a Linux kernel: give --kernel as well"),
        (["guest.bin", "--cmdline", "quiet"], "--cmdline: is for a Linux kernel"),
        (["guest.bin", "--virtio-console"], "--virtio-console: is for a Linux kernel"),
        (["--kernel", "k", "--serial", "--virtio-console"], "--virtio-console: is instead of the serial port"),
        (["--kernel", "k", "--memory", "1M"], "memory"),
        (["--kernel", "k", "--escape", "Ctrl-A"], "no key such as ^]"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_one_line_and_2(options, words, capfd):
    assert main(["run", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_journal_of_the_run_is_written(on, guest, tmp_path, capfd):
    assert main(["run", guest(HELLO), *on, "--journal", str(tmp_path / "journal")]) == 0
    with read_journal(tmp_path / "journal") as reader:
        states = [row.state for row in reader.states(vm="guest")]
    assert (states[0], states[-1]) == ("created", "stopped")


def test_a_signal_before_there_is_a_vm_cancels():
    assert not module._End().ask()


def deaf() -> VmSpec:
    """A guest with a power button that does not care."""
    return VmSpec(name="guest", boot=FlatImage(code=SPIN), devices=[AcpiRegisters()], irqchip=True)


async def test_a_signal_after_the_vm_has_gone_cancels(autojump_clock):
    end = module._End()
    await module._run(played(hlt()), module._Seen(), end)
    assert not end.ask()


@pytest.mark.kvm
async def test_the_first_ask_waits_for_the_guest_and_the_second_is_by_force(capfd):
    end, seen = module._End(), module._Seen()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(module._run, GuestRun(spec=deaf(), backend="kvm"), seen, end)
        await wait_until(lambda: seen.backend and end._vm is not None)
        assert end.ask()
        assert "asked to power off; once more stops it at once" in capfd.readouterr().err
        assert end._vm.outcome is None
        end.pressed()
    assert seen.outcome == Stopped("the escape key, twice")


@pytest.mark.kvm
def test_a_guest_that_does_not_power_off_is_stopped_and_that_is_said(monkeypatch, capfd):
    monkeypatch.setattr(module, "GRACE", 0.05)
    end, seen = module._End(), module._Seen()

    async def run_and_ask() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(module._run, GuestRun(spec=deaf(), backend="kvm"), seen, end)
            await wait_until(lambda: end._vm is not None)
            assert end.ask()

    trio.run(run_and_ask)
    (line,) = module._complaints(seen, GuestRun(spec=deaf()))
    assert line == "the guest did not power off within 0.05 s: it was stopped by force"


# ---- disks


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("root.img", orc.Disk("root.img")),
        ("root.img,ro", orc.Disk("root.img", readonly=True)),
        ("own.img,base=root.img", orc.Disk("own.img", base="root.img")),
        ("/dev/sdb,direct", orc.Disk("/dev/sdb", direct=True)),
    ],
)
def test_a_disk_is_what_its_words_say(text, disk):
    assert parse_disk(text) == disk


@pytest.mark.parametrize("text", ["root.img,rw", "root.img,base=", "root.img,ro=1", ",ro", "root.img,,ro"])
def test_a_disk_with_other_words_is_refused(text):
    with pytest.raises(orc.SpecError):
        parse_disk(text)
