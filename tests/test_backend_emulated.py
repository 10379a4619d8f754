"""What guests do on the emulated backend: every lock counted, code that changes, faults, ports, memory nobody backs."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestra import FlatImage, Halted, Limit, MemoryRegion, Shutdown, VmSpec, open_fleet
from orchestra.backend.emulated.machine import EmulatedBackend
from orchestra.backend.memory import GuestMemory
from orchestra.machine.boot import flat
from orchestra.model import exits
from orchestra.native import lib
from orchestra.native.core import Command, FleetCore, VcpuCore
from played import Access, Detection, Played, play
from x86 import Mode, load, lock_program

pytestmark = pytest.mark.emulated

GUESTS = Path(__file__).parent / "guests"
MODES: list[Mode] = [16, 32, 64]
BOTH: list[Detection] = ["fault-like", "trap-like"]
COUNT = 0x8000
HLT = b"\xf4"
DEBUG = int(lib.KVM_GUESTDBG_ENABLE)
STEP = DEBUG | int(lib.KVM_GUESTDBG_SINGLESTEP)


@pytest.fixture(scope="module")
def emulated() -> EmulatedBackend:
    return EmulatedBackend()


def code(text: str) -> bytes:
    """Hexadecimal bytes, an instruction on a line, with what it is behind a semicolon."""
    return bytes.fromhex(" ".join(line.partition(";")[0] for line in text.splitlines()))


def guest(name: str) -> bytes:
    return (GUESTS / f"{name}.bin").read_bytes()


def told(played: Played) -> list[tuple[Any, ...]]:
    """The exits, and what matters of each."""

    def one(exit: exits.Exit) -> tuple[Any, ...]:
        match exit:
            case exits.BusLock():
                return "lock", exit.rip
            case exits.Io():
                return "out" if exit.write else "in", exit.port, exit.size
            case exits.Mmio():
                return "write" if exit.write else "read", exit.address, exit.size
            case exits.Debug():
                return "debug", exit.pc
            case exits.ExceptionExit():
                return "exception", exit.exception, exit.address
        return (type(exit).__name__,)

    return [one(exit) for exit in played.exits]


# ---- locks


@pytest.mark.parametrize("detection", BOTH)
@pytest.mark.parametrize("mode", MODES)
def test_each_lockable_instruction_in_each_form_of_address_is_counted_once_if_split_and_never_if_not(
    emulated: EmulatedBackend, mode: Mode, detection: Detection
) -> None:
    program, table = lock_program(mode)
    played = play(emulated, program, mode, detection=detection)
    assert played.outcome == Halted()
    where = {lock.at if detection == "fault-like" else lock.behind: lock.what for lock in table}
    expected = [lock.at if detection == "fault-like" else lock.behind for lock in table if lock.split]
    assert not {where.get(rip or 0, rip) for rip in set(played.locks) ^ set(expected)}
    assert played.locks == expected
    assert played.counters.bus_locks == len(expected) > 300


@pytest.mark.parametrize("detection", BOTH)
@pytest.mark.parametrize(
    ("what", "told_apart"),
    [
        ("f0 81 05 ff 8f 00 00 01 00 00 00  ; lock add dword [0x8fff], 1: the last byte of a page", []),
        ("f0 81 05 ff ff 0f 00 01 00 00 00  ; lock add dword [0xfffff], 1: in two regions", []),
        (
            "f0 81 05 10 00 00 d0 01 00 00 00  ; lock add dword [0xd0000010], 1: nobody backs it",
            [("read", 0xD0000010, 4), ("write", 0xD0000010, 4)],
        ),
        (
            "f0 81 05 fe 0f 00 d0 01 00 00 00  ; lock add dword [0xd0000ffe], 1: on two such pages",
            [("read", 0xD0000FFE, 2), ("read", 0xD0001000, 2), ("write", 0xD0000FFE, 2), ("write", 0xD0001000, 2)],
        ),
        ("f0 81 05 3e 20 10 00 01 00 00 00  ; lock add dword [0x10203e], 1: read-only", [("write", 0x10203E, 4)]),
        ("f0 0f c7 0d 3c 80 00 00  ; lock cmpxchg8b [0x803c]", []),
        ("f0 0f c7 0d 08 00 00 d0  ; lock cmpxchg8b [0xd0000008]", [("read", 0xD0000008, 8), ("write", 0xD0000008, 8)]),
        ("f0 f7 1d 3e 80 00 00  ; lock neg dword [0x803e]", []),
        ("3e 66 f0 66 3e 3e 01 05 3f 80 00 00  ; lock add [0x803f], ax: in a string of prefixes", []),
        ("3e 3e 3e 3e f0 81 05 3e 80 00 00 78 56 34 12  ; lock add dword [0x803e], 0x12345678: 15 bytes", []),
    ],
)
def test_a_lock_in_an_odd_place_is_counted_once_and_done(
    emulated: EmulatedBackend, what: str, told_apart: list[Any], detection: Detection
) -> None:
    instruction = code(what)
    regions = [MemoryRegion(0x100000, 0x2000), MemoryRegion(0x102000, 0x1000, readonly=True)]
    played = play(emulated, instruction + HLT, regions=regions, detection=detection)
    assert played.outcome == Halted()
    assert [exit for exit in told(played) if exit[0] in ("read", "write")] == told_apart
    behind = 0x1000 + len(instruction)
    assert played.locks == [0x1000 if detection == "fault-like" else behind]
    assert played.registers.rip == behind + 1
    if played.counters.exits.get("x86_bus_lock") is None:  # it rode on the write
        assert played.exits[-2].bus_lock
        assert detection == "trap-like"


def test_the_effect_of_a_lock_across_two_regions_is_in_both(emulated: EmulatedBackend) -> None:
    played = play(
        emulated,
        code("f0 81 05 ff ff 0f 00 44 33 22 11 f4  ; lock add dword [0xfffff], 0x11223344"),
        regions=[MemoryRegion(0x100000, 0x1000)],
    )
    assert played.memory[0][-1:] + played.memory[1][:3] == bytes.fromhex("44332211")


@pytest.mark.parametrize(
    ("what", "mode"),
    [
        ("f0 01 c8  ; lock add eax, ecx", 32),
        ("f0 a3 00 30 00 00  ; lock mov [0x3000], eax", 32),
        ("f0 39 05 3e 80 00 00  ; lock cmp [0x803e], eax", 32),
        ("f0 0f a3 05 3e 80 00 00  ; lock bt [0x803e], eax", 32),
        ("f0 87 c3  ; lock xchg ebx, eax", 32),
        ("f0 0f c7 c8  ; lock cmpxchg8b eax", 32),
        ("f0 90  ; lock nop", 64),
        ("f0 f4  ; lock hlt", 64),
        ("f0 ec  ; lock in al, dx", 64),
        ("f0 eb 00  ; lock jmp", 64),
        ("f0 0f 0b  ; lock ud2", 64),
        ("f0 82 05 3e 80 00 00 01  ; lock add byte [0x803e], 1: this form of it is not in 64-bit code", 64),
        ("3e 3e 3e 3e 3e f0 81 05 3e 80 00 00 78 56 34 12  ; 16 bytes", 32),
        ("f0 48 0f c7 08  ; lock cmpxchg16b [rax], not aligned", 64),
    ],
)
def test_what_may_not_be_locked_is_a_fault_and_no_lock(emulated: EmulatedBackend, what: str, mode: Mode) -> None:
    played = play(emulated, load(mode, 0, 0x8038) + code(what) + HLT, mode)
    assert played.outcome == Shutdown(reason="triple fault")
    assert played.registers.rip == 0x1000 + len(load(mode, 0, 0))
    assert played.locks == []


def test_a_lock_that_faults_is_not_counted(emulated: EmulatedBackend) -> None:
    far = load(64, 3, 0x2345_6780_003E)
    for detection in BOTH:
        played = play(emulated, far + code("f0 ff 03  ; lock inc dword [rbx]"), 64, detection=detection)
        assert played.outcome == Shutdown(reason="triple fault")
        assert played.special.cr2 == 0x2345_6780_003E
        assert played.locks == []


@pytest.mark.parametrize("detection", BOTH)
@pytest.mark.parametrize(
    "what",
    [
        "66 f0 ff 06 3e 80  ; lock inc dword [0x803e]",
        "66 f0 f7 1e 3e 80  ; lock neg dword [0x803e]: unicorn executes it by itself",
        "f0 0f c7 0e 3e 80  ; lock cmpxchg8b [0x803e]: and this",
    ],
)
async def test_locks_that_wait_for_their_turn_are_counted_each(what: str, detection: Detection) -> None:
    loop = code(what) + code("49  ; dec cx")
    program = code("b9 28 00  ; mov cx, 40") + loop + bytes([0x75, 0x100 - len(loop) - 2]) + HLT
    async with open_fleet(backend=EmulatedBackend(detection=detection)) as fleet:
        spec = VmSpec(name="guest", boot=FlatImage(code=program, mode=16), limit=Limit(rate=20_000, burst=1))
        vm = await fleet.launch(spec)
        assert await vm.wait() == Halted()
        assert vm.statistics().bus_locks == 40


@pytest.mark.parametrize("what", ["f0 f6 1d", "f0 f7 1d", "66 f0 f7 1d"])
@pytest.mark.parametrize("value", [0, 1, 0x15, 0x80, 0xFF, 0x8000_0000, 0xFFFF_0000])
def test_the_flags_of_a_locked_neg_are_those_of_its_result(emulated: EmulatedBackend, what: str, value: int) -> None:
    size = 1 if "f6" in what else 2 if "66" in what else 4
    masked, sign = value & (1 << 8 * size) - 1, 1 << (8 * size - 1)
    result = -masked & (1 << 8 * size) - 1
    expected = 2 | (result != 0) | (result == 0) << 6 | bool(result & sign) << 7 | bool(result & 15) << 4
    expected |= (result == sign) << 11 | (bin(result & 0xFF).count("1") % 2 == 0) << 2
    for address in ("3e 80 00 00", "fe 7f 00 00"):
        neg = code(f"{what} {address} f4")
        played = play(
            emulated, neg, data=[(0x7FFE, value.to_bytes(4, "little")), (0x803E, value.to_bytes(4, "little"))]
        )
        assert played.registers.rflags == expected


# ---- code that changes


@pytest.mark.parametrize("detection", BOTH)
@pytest.mark.parametrize("mode", MODES)
def test_locks_in_code_that_changes_are_counted_as_often_as_they_are_done(
    emulated: EmulatedBackend, mode: Mode, detection: Detection
) -> None:
    played = play(emulated, guest(f"modify_{mode}"), mode, detection=detection)
    assert played.outcome == Halted()
    assert played.word(COUNT + 4, 1) == 0x10 + 25  # what was executed is what was written last
    assert played.counters.bus_locks == played.word(COUNT) == 25 * 10


class Loader:
    """At a port write it puts other code at 0x4000."""

    CODE = (
        code("f0 ff 05 3e 80 00 00 c3  ; lock inc dword [0x803e]; ret"),
        code("ff 05 3e 80 00 00 c3  ; inc dword [0x803e]; ret"),
        code("90 f0 ff 05 3d 80 00 00 c3  ; nop; lock inc dword [0x803d]; ret"),
    )

    def __init__(self) -> None:
        self.memory: GuestMemory
        self.written = 0

    def read(self, offset: int, size: int) -> int:
        raise AssertionError

    def write(self, offset: int, size: int, value: int) -> None:
        self.memory.write(0x4000, self.CODE[self.written % 3])
        self.written += 1


@pytest.mark.parametrize("detection", BOTH)
def test_code_that_a_device_writes_is_what_runs_next(emulated: EmulatedBackend, detection: Detection) -> None:
    loader = Loader()
    program = code("""
        b9 3c 00 00 00  ; mov ecx, 60
        e6 90           ; again: out 0x90, al
        e8 f4 2f 00 00  ; call 0x4000
        e8 ef 2f 00 00  ; call 0x4000
        e2 f2           ; loop again
        f4""")
    played = play(
        emulated,
        program,
        detection=detection,
        devices=[(range(0x90, 0x91), None, loader)],
        prepare=lambda memory, core: setattr(loader, "memory", memory),
    )
    assert played.outcome == Halted()
    assert played.counters.bus_locks == 2 * 40


def test_ins_into_code_is_what_runs_next(emulated: EmulatedBackend) -> None:
    class Code:
        left = bytes.fromhex("404040 909040") * 10  # inc eax, thrice; nop, nop, inc eax

        def read(self, offset: int, size: int) -> int:
            first, self.left = self.left[0], self.left[1:]
            return first

        def write(self, offset: int, size: int, value: int) -> None:
            raise AssertionError

    program = code("""
        66 ba 90 00     ; mov dx, 0x90
        bb 14 00 00 00  ; mov ebx, 20
        bf 1b 10 00 00  ; again: mov edi, 0x101b
        b9 03 00 00 00  ; mov ecx, 3
        fc f3 6c        ; cld; rep insb
        90 90 90        ; nop
        eb 00           ; jmp to the next
        90 90 90        ; 0x101b
        4b 75 e8 f4     ; dec ebx; jnz again; hlt""")
    played = play(emulated, program, devices=[(range(0x90, 0x91), None, Code())])
    assert played.outcome == Halted()
    assert played.registers.rax == 10 * (3 + 1)


def test_code_that_another_thread_writes_is_seen_by_a_guest_that_spins_on_it(emulated: EmulatedBackend) -> None:
    def later(memory: GuestMemory, core: VcpuCore) -> Callable[[], None]:
        thread = threading.Thread(target=memory.write, args=(0x1002, HLT))
        thread.start()
        return thread.join

    for _ in range(30):
        played = play(emulated, code("40 90 eb fe  ; inc eax; nop; jmp $"), prepare=later)
        assert played.outcome == Halted()


def test_memory_that_is_written_when_its_engine_is_closed_already_touches_nothing_of_that(
    emulated: EmulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        """The core, but nobody is told that memory was written."""

        def __getattr__(self, name: str) -> Any:
            assert name != "orc_emulator_written"
            return getattr(lib, name)

    spec = VmSpec(name="guest", boot=FlatImage(code=HLT))
    memory, fleet = GuestMemory(spec), FleetCore()
    core = VcpuCore(fleet, 1)
    machine = emulated.create(spec, [core], memory, flat.load(spec, memory), bus_locks=True)
    machine.engines[0].close()
    monkeypatch.setattr("orchestra.backend.emulated.machine.lib", Library())
    memory.write(0x1000, HLT)
    machine.close()
    core.close()
    fleet.close()
    memory.close()


@pytest.mark.parametrize("detection", BOTH)
def test_a_guest_with_more_locks_than_can_be_hooked_has_each_counted(
    emulated: EmulatedBackend, detection: Detection
) -> None:
    blocks, rounds = 2500, 2
    body = code("f0 ff 03 eb 00  ; lock inc dword [ebx]; jmp to the next") * blocks
    again = b"\x4d\x0f\x85" + (-len(body) - 7 & 0xFFFFFFFF).to_bytes(4, "little")  # dec ebp; jnz
    program = load(32, 3, 0x9003E) + load(32, 5, rounds) + body + again + HLT
    played = play(emulated, program, detection=detection, seconds=60)
    assert played.outcome == Halted()
    assert played.counters.bus_locks == rounds * blocks == played.word(0x9003E)


@pytest.mark.parametrize("detection", BOTH)
def test_a_guest_with_code_on_many_pages_has_each_lock_counted(emulated: EmulatedBackend, detection: Detection) -> None:
    pages = 150  # more than get their protection one by one

    def block(page: int) -> int:
        return 0x20000 + page * 0x1000 + page * 37 % 0xF00 if page < pages else 0x1500

    def jump(at: int, to: int) -> bytes:
        return b"\xe9" + (to - at - 5 & 0xFFFFFFFF).to_bytes(4, "little")

    lock = code("f0 ff 03  ; lock inc dword [ebx]")
    data = [(block(page), lock + jump(block(page) + 3, block(page + 1))) for page in range(pages)]
    data.append((0x1500, code("4d 74 05  ; dec ebp; jz over the jump") + jump(0x1503, block(0)) + HLT))
    start = load(32, 3, 0x1803E) + load(32, 5, 3)
    played = play(
        emulated, start + jump(0x1000 + len(start), block(0)), memory=0x100000, data=data, detection=detection
    )
    assert played.outcome == Halted()
    assert played.counters.bus_locks == 3 * pages


# ---- faults


@pytest.mark.parametrize(
    ("what", "mode", "rip", "cr2"),
    [
        ("90 0f 0b  ; nop; ud2", 32, 1, 0),
        ("90 31 c9 f7 f1  ; xor ecx, ecx; div ecx", 32, 3, 0),
        ("90 cd 80  ; int 0x80", 32, 1, 0),
        ("90 cc  ; int3", 64, 1, 0),
        ("90 0f 05  ; syscall, not enabled", 64, 1, 0),
        ("90 0f 34  ; sysenter, not set up", 64, 1, 0),
        ("48 b8 08 00 00 00 01 00 00 00 89 18  ; mov rax, 0x100000008; mov [rax], ebx", 64, 10, 0x1_0000_0008),
        ("9c 80 4c 24 01 01 9d 90 f4  ; pushf; or byte [esp + 1], 1; popf; nop: its own trap", 32, 8, 0),
    ],
)
def test_a_fault_that_nobody_handles_shuts_down_on_the_instruction(
    emulated: EmulatedBackend, what: str, mode: Mode, rip: int, cr2: int
) -> None:
    played = play(emulated, code(what), mode)
    assert played.outcome == Shutdown(reason="triple fault")
    assert played.registers.rip == 0x1000 + rip
    assert played.special.cr2 == cr2


@pytest.mark.parametrize(("what", "vector"), [("0f 0b", 6), ("31 c9 f7 f1", 0), ("cd 05", 5)])
def test_a_fault_with_a_handler_is_told_and_fails_clearly(emulated: EmulatedBackend, what: str, vector: int) -> None:
    table = code("00 40 08 00 00 8e 00 00") * 32  # 0x4000, present
    set_up = code("0f 01 1d 00 20 00 00  ; lidt [0x2000]")
    data = [(0x2000, code("ff 00 00 30 00 00")), (0x3000, table)]
    played = play(emulated, set_up + code(what), data=data)
    address = 0x1007 + (2 if vector == 0 else 0)
    assert told(played) == [("exception", vector, address)]
    assert "backend='kvm' can" in str(played.outcome)
    assert played.registers.rip == address


def test_real_mode_code_has_a_handler_for_everything(emulated: EmulatedBackend) -> None:
    played = play(emulated, code("0f 0b"), 16)
    assert told(played) == [("exception", 6, 0x1000)]


@pytest.mark.parametrize("detection", BOTH)
@pytest.mark.parametrize(
    ("end", "rip"),
    [
        ("90 90 90 90  e6 80 e4 80  f0 ff 03  ff c2 ff c2 90  ; it goes on where nothing is mapped", 0x31000),
        ("90 90 90 90  e6 80 e4 80  f0 ff 03  ff c2 ff c2 b8  ; it ends in the middle of an instruction", 0x30FFF),
    ],
)
def test_what_stands_before_an_unmapped_page_is_executed_before_the_fault(
    emulated: EmulatedBackend, end: str, rip: int, detection: Detection
) -> None:
    played = play(emulated, guest("paging_64"), 64, data=[(0x30FF0, code(end))], detection=detection)
    assert played.outcome == Shutdown(reason="triple fault")
    assert played.special.cr2 == 0x31000
    assert played.registers.rip == rip
    lock = 0x30FF8 if detection == "fault-like" else 0x30FFB
    assert told(played) == [("out", 0x80, 1), ("in", 0x80, 1), ("lock", lock), ("ShutdownExit",)]


@pytest.mark.parametrize("detection", BOTH)
def test_code_that_runs_out_of_memory_fails_behind_its_last_instruction(
    emulated: EmulatedBackend, detection: Detection
) -> None:
    end = code("40 40 f0 01 03  ; inc eax; inc eax; lock add [ebx], eax")
    start = load(32, 3, 0x803E) + b"\xe9" + (0xFFFFB - 0x100A).to_bytes(4, "little")
    played = play(emulated, start, data=[(0xFFFFB, end)], detection=detection)
    assert isinstance(played.exits[-1], exits.InternalError)
    assert played.registers.rip == 0x100000
    assert played.locks == [0xFFFFD if detection == "fault-like" else 0x100000]


def test_what_unicorn_takes_for_a_nop_fails_clearly(emulated: EmulatedBackend) -> None:
    enable = code("b9 80 00 00 c0 0f 32 83 c8 01 0f 30  ; EFER.SCE")
    played = play(emulated, enable + code("0f 05 f4  ; syscall"), 64)
    assert "SYSCALL" in str(played.outcome)
    assert "kvm" in str(played.outcome)
    assert played.registers.rip == 0x100C


# ---- ports


@pytest.mark.parametrize(
    ("what", "level", "permitted", "then"),
    [
        ("e4 80  ; in al, 0x80", 0, False, "fault"),
        ("e4 80", 0x3000, False, [("in", 0x80, 1)]),
        ("e4 80", 0, True, [("in", 0x80, 1)]),
        ("66 e7 80  ; out 0x80, ax", 0, True, [("out", 0x80, 2)]),
        ("66 ba ff 07 ed  ; mov dx, 0x7ff; in eax, dx: beyond the map", 0, True, "fault"),
        ("f4  ; hlt", 0x3000, True, "fault"),
        ("fa  ; cli", 0, True, "fault"),
    ],
)
def test_user_code_touches_the_ports_that_its_task_may(
    emulated: EmulatedBackend, what: str, level: int, permitted: bool, then: Any
) -> None:
    instruction = code(what)
    data = [(0x2000, level.to_bytes(4, "little")), (0x3000, bytes(256) if permitted else b"\xff" * 256)]
    played = play(emulated, guest("ring3_32"), data=[*data, (0x4000, instruction + b"\x0f\x0b")])
    assert played.outcome == Shutdown(reason="triple fault")
    assert told(played)[:-1] == ([] if then == "fault" else then)
    moved = 4 if instruction.startswith(b"\x66\xba") else 0
    assert played.registers.rip == 0x4000 + (moved if then == "fault" else len(instruction))
    assert played.special.cs.selector == 0x1B


# ---- memory nobody backs


def test_a_helper_of_unicorns_that_writes_there_fails_clearly_on_its_instruction(emulated: EmulatedBackend) -> None:
    save = code("0f ae 05 00 00 00 d0  ; fxsave [0xd0000000]")
    store = code("ff 05 00 90 00 00  ; inc dword [0x9000]")
    for program in (save + store + HLT, save + code("eb f7  ; jmp back to it")):
        played = play(emulated, program)
        assert "unbacked memory" in str(played.outcome)
        assert "kvm" in str(played.outcome)
        assert played.registers.rip == 0x1000


def test_a_write_from_memory_into_read_only_memory_fails_clearly(emulated: EmulatedBackend) -> None:
    regions = [MemoryRegion(0x100000, 0x1000, readonly=True)]
    played = play(emulated, code("a3 fe ff 0f 00  ; mov [0xffffe], eax"), regions=regions)
    assert "only be read" in str(played.outcome)


def test_pushes_and_pops_there_are_told_one_by_one(emulated: EmulatedBackend) -> None:
    program = load(32, 4, 0xD0000100) + code("60 61 f4  ; pusha; popa")
    played = play(emulated, program)
    assert played.outcome == Halted()
    writes = [access for access in played.accesses if access.write]
    reads = [access.offset for access in played.accesses if not access.write]
    assert writes == [Access("mmio", True, 0xE0 + 4 * i, 4, 0xD0000100 if i == 3 else 0) for i in range(8)]
    assert sorted(reads) == [0xE0 + 4 * i for i in range(8) if i != 3]


# ---- debug stops


def test_single_steps_stop_behind_each_instruction_also_those_that_exit(emulated: EmulatedBackend) -> None:
    program = code("""
        40              ; inc eax
        e4 80           ; in al, 0x80
        a1 00 00 00 d0  ; mov eax, [0xd0000000]
        f0 ff 05 3e 80 00 00  ; lock inc dword [0x803e]
        f4""")
    for detection, lock in ("fault-like", 0x1008), ("trap-like", 0x100F):
        played = steps(emulated, program, STEP, detection=detection)
        assert played == [
            ("debug", 0x1001),
            ("in", 0x80, 1),
            ("debug", 0x1003),
            ("read", 0xD0000000, 4),
            ("debug", 0x1008),
            ("lock", lock),
            ("debug", 0x100F),
            ("Hlt",),
        ]


def test_breakpoints_stop_before_what_else_stops_there(emulated: EmulatedBackend) -> None:
    program = code("40  f0 ff 05 3e 80 00 00  e4 80  f4")
    registers = (0x1000, 0x1001, 0x1008, 0x100A, 0, 0, 0, 0xFF)
    assert steps(emulated, program, DEBUG | int(lib.KVM_GUESTDBG_USE_HW_BP), registers) == [
        ("debug", 0x1000),
        ("debug", 0x1001),
        ("lock", 0x1001),
        ("debug", 0x1008),
        ("in", 0x80, 1),
        ("debug", 0x100A),
        ("Hlt",),
    ]


def test_breakpoints_are_linear_addresses(emulated: EmulatedBackend) -> None:
    program = code("ea 08 00 00 01 90 90 90  40  f4  ; jmp 0x100:8; inc ax; hlt")
    registers = (0x1008, 0x1009, 0, 0, 0, 0, 0, 0xF)
    assert steps(emulated, program, DEBUG | int(lib.KVM_GUESTDBG_USE_HW_BP), registers, mode=16) == [
        ("debug", 8),
        ("debug", 9),
        ("Hlt",),
    ]


def test_a_breakpoint_instruction_stops_on_it(emulated: EmulatedBackend) -> None:
    played = play(emulated, code("40 cc"), debug=(DEBUG | int(lib.KVM_GUESTDBG_USE_SW_BP), ()))
    assert told(played) == [("debug", 0x1001)]
    assert played.registers.rip == 0x1001


def steps(
    emulated: EmulatedBackend, program: bytes, control: int, registers: tuple[int, ...] = (), **more: Any
) -> list[tuple[Any, ...]]:
    """What is told of a guest that goes on after each debug stop."""
    return told(play(emulated, program, debug=(control, registers), goes_on=(exits.Debug,), **more))


# ---- hostile guests

ODD = "f0 0f cf 8ed8 0f22c0 0f30 e480 f36c f3aa 0fc7 ff ea dd 0fae ebfe 9c9d 0f01 c8 61"
"""Beginnings of instructions that need a VMM's attention."""


@pytest.mark.parametrize("seed", range(150))
def test_a_guest_of_random_bytes_ends_or_is_stopped(emulated: EmulatedBackend, seed: int) -> None:
    chance = random.Random(seed)
    mode, detection = chance.choice(MODES), chance.choice(BOTH)
    odd = [bytes.fromhex(text) for text in ODD.split()]
    program = b"".join(
        load(mode, number, chance.choice([0, 0x803E, 0xD0000FFE, 0xFFFFF, 0x1010, chance.getrandbits(64)]))
        for number in range(8)
        if number != 4
    )
    for _ in range(chance.choice([5, 20, 100])):
        program += chance.choice(odd) if chance.random() < 0.5 else chance.randbytes(chance.randint(1, 6))
    played = play(emulated, program, mode, detection=detection, seconds=0.01)
    assert played.outcome is not None


def test_a_stop_ends_a_guest_whatever_it_does(emulated: EmulatedBackend) -> None:
    spins = [
        code("eb fe  ; jmp $"),
        code("f3 90 eb fc  ; pause; jmp"),
        code("e4 80 eb fc  ; in al, 0x80; jmp"),
        code("a1 00 00 00 d0 eb f9  ; mov eax, [0xd0000000]; jmp"),
        code("a3 fe 0f 00 d0 eb f9  ; mov [0xd0000ffe], eax; jmp"),
        code("f0 ff 05 3e 80 00 00 eb f7  ; lock inc dword [0x803e]; jmp"),
        code("c6 05 08 10 00 00 40 90 90 eb f5  ; mov byte [0x1008], 0x40; nop; nop; jmp"),
        code("b9 ff ff ff ff bf 00 80 00 00 fd 66 a7 f3 ae eb ef  ; rep scasb"),
    ]
    for spin in spins:
        for delay in (0.0, 0.001, 0.005):
            played = play(emulated, spin, seconds=delay)
            assert "Stopped" in repr(played.outcome)


def test_many_stops_leave_nothing_out(emulated: EmulatedBackend) -> None:
    """Commands at any time, also amid accesses that are being answered: each access is seen once."""
    rounds = 300
    program = load(32, 1, rounds) + code("""
            f0 ff 05 10 00 00 d0  ; again: lock inc dword [0xd0000010]
            f0 ff 05 3e 80 00 00  ; lock inc dword [0x803e]
            e4 90                 ; in al, 0x90
            e2 ee                 ; loop again
            f4""")

    def prepare(memory: GuestMemory, core: VcpuCore) -> Callable[[], None]:
        stop = threading.Event()

        def kick() -> None:
            while not stop.is_set():
                core.command(set=Command.CALL)
                core.command(clear=Command.CALL)

        def finish() -> None:
            stop.set()
            thread.join()

        thread = threading.Thread(target=kick)
        thread.start()
        return finish

    for detection in BOTH:
        played = play(emulated, program, detection=detection, prepare=prepare, seconds=60)
        assert played.outcome == Halted()
        assert played.counters.bus_locks == 2 * rounds
        assert played.word(0x803E) == rounds
        assert sum(access.offset == 0x10 for access in played.accesses) == 2 * rounds
        assert played.counters.exits["io"] == rounds
