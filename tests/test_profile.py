"""Profiles as data: instructions found by their bytes, symbols, samples and rows, folded stacks, the command."""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

import orchestra as orc
from conftest import blank, play
from orchestra.backend.scripted import bus_lock, failed_run
from orchestra.cli.app import main
from orchestra.cli.guilty import lines
from orchestra.journal import Journal
from orchestra.native.core import Sampled
from orchestra.profile import Samples, SymbolError, Symbols, disassembly, from_rows, make_profile, samples
from orchestra.profile.folded import folded

LOCK = bytes.fromhex("f0 83 05 00 00 00 00 01")  # lock add dword [rip], 1


def around(before: str, lock: bytes, after: str = "90" * 16) -> tuple[bytes, int]:
    """Code with a lock in it, for `disassembly.find`; and how much of it is before what follows the lock."""
    head = bytes.fromhex(before) + lock
    return head + bytes.fromhex(after), len(head)


# ---- which instruction


def test_on_the_instruction_it_is_the_one_there():
    found = disassembly.find(b"\x90" * 32 + LOCK + b"\x90" * 8, 32, 64, 0x1000, "on")
    assert found is not None
    assert (found.start, found.code, found.locks) == (0, LOCK, True)
    assert found.text == "lock add dword [rel 0x1008],1"


@pytest.mark.parametrize(
    ("name", "before", "lock", "mode"),
    [
        ("mov al, 0x2e: ends in a prefix (CS)", "5589e5b02e", "f0ff05a0000000", 32),
        ("mov eax, 0x40484c66: ends in four", "4889e5b8664c4840", "f0480fc106", 64),
        ("add esp, 0x64 (FS)", "31c083c464", "f00fb10d44332211", 32),
        ("xchg needs no prefix", "31db488d3d10000000", "871f", 64),
        ("bts in 16-bit code", "b80100bb3e20", "f0660fab07", 16),
        ("prefixes before the lock, which are its own", "90b801000000", "2666f0830701", 32),
        ("cmpxchg16b", "4c89ce", "f0480fc70e", 64),
        ("twelve bytes, with an address and a constant", "31c0ffc0", "f08184243e20000004030201", 64),
    ],
)
def test_behind_the_instruction_it_is_the_one_that_ends_there(name, before, lock, mode):
    lock_bytes = bytes.fromhex(lock)
    # What comes before is real code: the end of a function, and the begin of this one.
    prologue = "c9c3" + "90" * 20
    code, rip = around(prologue + before, lock_bytes)
    code, rip = code[rip - 32 if rip > 32 else 0 :], min(rip, 32)
    found = disassembly.find(code, rip, mode, 0x401000, "behind")
    assert found is not None, name
    assert found.locks
    assert found.code == lock_bytes
    assert found.start == -len(lock_bytes)


def test_of_two_locks_in_a_row_each_is_named_by_where_rip_is():
    one, two = bytes.fromhex("f0ff00"), bytes.fromhex("f0ff08")  # lock inc, lock dec
    code = b"\x90" * 29 + one + two + b"\x90" * 10
    assert disassembly.find(code, 32, 64, 0x1000, "behind").text == "lock inc dword [rax]"
    assert disassembly.find(code, 32, 64, 0x1000, "on").text == "lock dec dword [rax]"


def test_what_does_not_lock_is_taken_only_if_nothing_on_the_other_side_does():
    behind = b"\x90" * 24 + LOCK + b"\x90" * 16
    on = b"\x90" * 32 + LOCK + b"\x90" * 8
    neither = b"\x90" * 30 + bytes.fromhex("8ed8") + b"\x90" * 8  # mov ds, eax
    assert disassembly.find(on, 32, 64, 0x1000, "behind").start == 0
    assert disassembly.find(behind, 32, 64, 0x1000, "on").start == -8
    assert disassembly.find(behind, 32, 64, 0x1000, "either").start == -8
    assert disassembly.find(on, 32, 64, 0x1000, "either").start == 0
    found = disassembly.find(neither, 32, 32, 0x1000, "behind")
    assert (found.start, found.locks) == (-2, False)


def test_bytes_that_are_no_code_or_none_or_of_no_known_mode_name_nothing():
    assert disassembly.find(b"", 0, 64, 0x1000, "on") is None
    assert disassembly.find(b"\x06" * 20, 10, 64, 0x1000, "on") is None  # invalid in 64-bit mode
    assert disassembly.find(LOCK, 0, 0, 0x1000, "on") is None


def test_real_code_read_backwards_is_found_at_every_place():
    """A stream of random instructions with locks in between: what ends at a lock's end is that lock."""
    fillers = [
        "90", "89d8", "4889e5", "488b4508", "83c001", "e800000000", "0f1f4000", "31c0", "7405", "488d0510000000",
        "b866f02e48", "f30f6f06", "c3", "5d", "41574156", "48b8f0830501f0830501", "66904c8b", "c70600f08305",
    ]  # fmt: skip
    locks = ["f0ff05a0000000", "f0480fc106", "871f", "f00fb10e", "66f0832a05", "f081042504030201f0870f00", "f00fba2e03"]
    dice = random.Random(4)
    right = 0
    for _ in range(400):
        head = bytes.fromhex("".join(dice.choice(fillers) for _ in range(12)))
        lock = bytes.fromhex(dice.choice(locks))
        found = disassembly.find((head + lock)[-32:], 32, 64, 0x401000, "behind")
        assert found is not None
        assert found.locks
        right += found.code == lock
    assert right >= 396  # a constant that reads as code all along can't be told from it


# ---- symbols


MAP = """\
0000000000000000 A fixed_percpu_data
ffffffff81000000 T _text
ffffffff81000040 t do_one_initcall
ffffffff81001000 W arch_cpu_idle
ffffffff82000000 D init_task
"""


def test_system_map_names_functions_and_leaves_data_out(tmp_path):
    path = tmp_path / "System.map"
    path.write_text(MAP)
    symbols = Symbols.load(path)
    assert len(symbols) == 3
    assert symbols.find(0xFFFFFFFF81000000) == ("_text", 0)
    assert symbols.find(0xFFFFFFFF81000FFF) == ("do_one_initcall", 0xFBF)
    assert symbols.find(0xFFFFFFFF81001010) == ("arch_cpu_idle", 0x10)
    assert symbols.find(0x1000) is None
    assert symbols.find(0xFFFFFFFF81001000 + (1 << 16)) is None  # beyond the last: who knows
    slid = Symbols.load(path, slide=0x1000000)
    assert slid.find(0xFFFFFFFF82001010) == ("arch_cpu_idle", 0x10)


def test_a_small_symbol_that_has_ended_leaves_what_is_around_it():
    symbols = Symbols([(0x1000, 0x100, "outer"), (0x1010, 0x10, "inner"), (0x1200, 0, "label")])
    assert symbols.find(0x101F) == ("inner", 0xF)
    assert symbols.find(0x1020) == ("outer", 0x20)
    assert symbols.find(0x1100) is None
    assert symbols.find(0x1204) == ("label", 4)


def test_elf_names_functions_by_their_sizes(tmp_path):
    nasm, ld = shutil.which("nasm"), shutil.which("ld")
    if nasm is None or ld is None:
        pytest.skip("needs nasm and ld")
    source = tmp_path / "guest.asm"
    source.write_text(
        "bits 64\nglobal first:function (first.end - first)\nglobal second:function\nsection .text\n"
        "first: lock inc dword [0x203e]\n.end: times 16 nop\nsecond: ret\n"
    )
    made, linked = tmp_path / "guest.o", tmp_path / "guest"
    subprocess.run([nasm, "-f", "elf64", "-o", made, source], check=True)
    subprocess.run([ld, "-Ttext=0x401000", "-e", "first", "-o", linked, made], check=True)
    symbols = Symbols.load(linked)
    assert symbols.find(0x401000) == ("first", 0)
    assert symbols.find(0x401007) == ("first", 7)
    assert symbols.find(0x401018) == ("second", 0)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x00\x01\x02", "neither an ELF file nor a System.map"),
        (b"", "names no function"),
        (b"\x7fELF" + b"\x00" * 20, "broken ELF file"),
        (b"ffffffff81000000 D data\n", "names no function"),
    ],
)
def test_a_file_without_symbols_is_refused_with_what_was_expected(tmp_path, data, says):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(SymbolError, match=says):
        Symbols.load(path)
    with pytest.raises(SymbolError, match="No such file"):
        Symbols.load(tmp_path / "none")


# ---- samples, rows, profile


def sampled(rip: int, weight: int = 10, **more: object) -> Sampled:
    fields: dict[str, object] = {
        "mode": 64, "cpl": 0, "space": 0x1000, "rode": False, "nested": False, "samples": 1, "weight": weight,
        "error": 0, "before": 8, "code": b"\x90" * 8 + LOCK,
    }  # fmt: skip
    return Sampled(rip=rip, **(fields | more))  # type: ignore[arg-type]


def test_rows_are_what_is_new_and_make_the_same_profile():
    kept, rows = Samples(), []
    kept.add([sampled(0x5000), sampled(0x6000, space=0x2000, cpl=3)], 0, "fault-like")
    rows += kept.rows()
    assert kept.rows() == []
    kept.add([sampled(0x5000, weight=5)], 3, "fault-like")
    rows += kept.rows()
    assert len(rows) == 3
    live = make_profile("vm", kept.places, unplaced=kept.unplaced)
    assert make_profile("vm", from_rows(rows)).instructions == live.instructions
    assert [(i.address, i.weight, i.samples) for i in live.instructions] == [(0x5000, 15, 2), (0x6000, 10, 1)]
    assert [i.share for i in live.instructions] == [0.6, 0.4]
    assert live.by_space() == {0x1000: 15, 0x2000: 10}
    assert live.unplaced == 3


def test_locks_of_a_nested_guest_are_a_place_of_their_own_without_a_symbol():
    kept = Samples()
    kept.add([sampled(0x5000), sampled(0x5000, weight=30, nested=True)], 0, "fault-like")
    profile = make_profile("vm", from_rows(kept.rows()), symbols=[Symbols([(0x5000, 16, "outer")])])
    assert [(i.nested, i.weight, i.symbol) for i in profile.instructions] == [(True, 30, None), (False, 10, "outer")]
    assert "nested guest's kernel" in "\n".join(lines(profile))
    assert [line.split(";")[1] for line in folded(profile)] == ["nested guest, space 0x1000", "space 0x1000"]


def test_rows_of_a_blob_that_nobody_wrote_lose_the_code_and_nothing_else():
    places = from_rows([(0x5000, 64, 0, 0, 1, 10, b""), (0x5000, 64, 0, 0, 1, 10, b"\x00\x09\x90")])
    (instruction,) = make_profile("vm", places).instructions
    assert (instruction.weight, instruction.text, instruction.exact) == (20, None, False)


def test_one_instruction_that_was_reported_on_it_and_behind_it_is_one():
    code = b"\x90" * 8 + LOCK + b"\x90" * 8
    kept = Samples()
    kept.add(
        [sampled(0x5008, before=16, code=code, weight=90), sampled(0x5000, before=8, code=code, weight=1)],
        0,
        "trap-like",  # a page that was met first: an Intel host reports with RIP on the instruction
    )
    (instruction,) = make_profile("vm", kept.places).instructions
    assert (instruction.address, instruction.weight, instruction.exact) == (0x5000, 91, True)


def test_a_guest_of_ever_new_places_keeps_the_heavy_ones_and_no_more(monkeypatch):
    monkeypatch.setattr(samples, "MOST", 10)
    kept = Samples()
    for number in range(1000):
        kept.add([sampled(0x5000, weight=100), sampled(0x100000 + number, weight=1)], 0, "fault-like")
    assert len(kept.places) <= 20
    assert kept.places[next(p for p in kept.places if p.rip == 0x5000)].weight == 100_000
    assert sum(s.weight for s in kept.places.values()) + kept.unplaced == 101_000
    assert len(kept.rows()) <= 20


def test_without_a_disassembler_places_are_named_as_they_were_reported(monkeypatch):
    monkeypatch.setattr(disassembly, "available", lambda: False)
    kept = Samples()
    kept.add([sampled(0x5000)], 0, "fault-like")
    kept.add([sampled(0x6000)], 0, "trap-like")
    on, behind = make_profile("vm", kept.places).instructions
    assert (on.address, on.exact, on.text) == (0x5000, True, None)
    assert (behind.address, behind.exact, behind.text) == (0x6000, False, None)
    assert "RIP as it was reported" in "\n".join(lines(make_profile("vm", kept.places)))
    assert "pip install 'orchestra-kvm[profile]'" in "\n".join(lines(make_profile("vm", kept.places)))


def test_json_has_all_of_it():
    kept = Samples()
    kept.add([sampled(0x5000)], 0, "fault-like")
    document = json.loads(json.dumps(make_profile("vm", kept.places, bus_locks=12, every=10).as_dict()))
    assert document["vm"] == "vm"
    assert document["bus_locks"] == 12
    assert document["instructions"][0]["code"] == LOCK.hex()
    assert document["instructions"][0]["place"] == "0x5000"


def test_folded_stacks_are_vm_space_symbol_instruction_and_weight():
    kept = Samples()
    kept.add([sampled(0x5002), sampled(0x6000, space=0, cpl=3, code=b"", weight=4)], 0, "fault-like")
    symbols = [Symbols([(0x5000, 16, "a;b c")])]
    assert list(folded(make_profile("vm", kept.places, symbols=symbols))) == [
        "vm;space 0x1000;a,b c_[k];a,b c+0x2: lock add dword [rel 0x500A],1 10",
        "vm;no paging;0x6000..;0x6000 4",
    ]


# ---- over the scripted backend: what is known is RIP


async def test_a_scripted_lock_is_named_by_its_rip(autojump_clock):
    script = [bus_lock(rip=0x1000) for _ in range(30)] + [bus_lock(rip=0x2000) for _ in range(10)]
    async with play(script) as fleet:
        vm = await fleet.launch(blank(sample_every=1))
        await vm.wait()
        profile = vm.profile()
        assert [(i.address, i.mode, i.weight) for i in profile.instructions] == [(0x1000, 0, 30), (0x2000, 0, 10)]
        assert profile.bus_locks == profile.weight == 40
        await vm.stop()
        assert vm.profile() == profile  # stays readable


async def test_a_profile_goes_on_over_restarts(autojump_clock):
    async with play([bus_lock(rip=0x1000), bus_lock(rip=0x1000), failed_run(14)]) as fleet:
        vm = await fleet.launch(blank(sample_every=1, restart=orc.Restart("on-failure", most=2)))
        await vm.wait()
        assert vm.restarts == 2
        profile = vm.profile()
        assert (profile.weight, profile.bus_locks) == (6, 6)
        vm.set_sampling(0)


async def test_sampling_is_refused_where_no_locks_are_seen_and_checked_everywhere(autojump_clock):
    async with play([], bus_locks="off") as fleet:
        vm = await fleet.launch(blank())
        with pytest.raises(orc.BusLockUnsupported):
            vm.set_sampling(100)
        vm.set_sampling(0)
        with pytest.raises(orc.SpecError, match="every=-1"):
            vm.set_sampling(-1)
        assert vm.profile().bus_locks is None
        assert vm.profile().instructions == ()
    with pytest.raises(orc.SpecError, match="sample_every"):
        blank(sample_every=True)


# ---- the command


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    path = tmp_path / "fleet.db"
    with Journal(path) as writer:
        writer.begin(0, "scripted", "fault-like")
        kept = Samples()
        kept.add([sampled(0xFFFFFFFF81000042, weight=30), sampled(0x401000, cpl=3, weight=10)], 0, "fault-like")
        writer.profile(1, "web-1", 1, kept.rows())
        writer.state(1, "quiet", 2, "default", "running", "")
    return path


def test_guilty_shows_instructions_with_symbols(journal, tmp_path, capsys):
    path = tmp_path / "System.map"
    path.write_text(MAP)
    assert main(["guilty", "web-1", "--journal", str(journal), "--symbols", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "web-1: 2 sampled, which stand for 40"
    assert out[3].split()[:4] == ["75.0%", "30", "kernel", "64"]
    assert "do_one_initcall+0x2 (0xffffffff81000042)" in out[3]
    assert "lock add dword" in out[3]
    assert out[4].split()[2] == "user"


def test_guilty_writes_json_and_folded_stacks(journal, capsys):
    assert main(["guilty", "web-1", "--journal", str(journal), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["instructions"][0]["address"] == 0xFFFFFFFF81000042
    assert main(["guilty", "web-1", "--journal", str(journal), "--folded"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("web-1;space 0x1000;0x401000..;0x401000: lock add")


def test_guilty_of_one_that_is_not_known_or_has_not_lived_names_those_that_are(journal, capsys):
    assert main(["guilty", "quiet", "--journal", str(journal)]) == 1
    assert capsys.readouterr() == ("", "orchestra: vm='quiet': the journal has no interval of it\n")
    assert main(["guilty", "nobody", "--journal", str(journal)]) == 1
    assert "quiet" in capsys.readouterr().err
    assert main(["guilty", "web-1", "--journal", str(journal), "--json", "--folded"]) == 2


async def lived(path: Path, detections: list[str | None], sample_every: int = 1) -> None:
    """A journal of fleets one after another, in each of which "a" makes three locks."""
    for detection in detections:
        backend = orc.ScriptedBackend({"a": [bus_lock(0.3, rip=0x1000)] * 3}, detection=detection)
        with Journal(path) as journal:
            async with orc.open_fleet(backend=backend, journal=journal, journal_interval=0.5) as fleet:
                await fleet.launch(blank("a", sample_every=sample_every))
                await trio.sleep(2)


@pytest.mark.parametrize("options", [[], ["--json"], ["--folded"]], ids=str)
async def test_guilty_says_that_bus_locks_were_not_seen_and_not_that_there_were_none(
    options, tmp_path, autojump_clock, capsys
):
    await lived(tmp_path / "fleet.db", [None])
    assert main(["guilty", "a", "--journal", str(tmp_path / "fleet.db"), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("orchestra: vm='a': its bus locks were not seen: ")


async def test_guilty_says_for_how_long_they_were_not_seen(tmp_path, autojump_clock, capsys):
    await lived(tmp_path / "fleet.db", ["fault-like", None])
    assert main(["guilty", "a", "--journal", str(tmp_path / "fleet.db")]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("a: 3 bus locks, 3 sampled")
    assert re.fullmatch(r"orchestra: for .* s of that time the bus locks of a were not seen\n", err)
    assert main(["guilty", "a", "--journal", str(tmp_path / "fleet.db"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["unseen_seconds"] > 0


async def test_guilty_of_locks_that_were_seen_and_not_sampled_says_how_many(tmp_path, autojump_clock, capsys):
    await lived(tmp_path / "fleet.db", ["fault-like"], sample_every=0)
    assert main(["guilty", "a", "--journal", str(tmp_path / "fleet.db")]) == 0
    assert capsys.readouterr().out == "a: 3 bus locks, none of them sampled\n"


def test_the_disassembler_is_loaded_only_when_it_is_needed():
    code = "import sys, orchestra, orchestra.profile; sys.exit('iced_x86' in sys.modules or 'elftools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
