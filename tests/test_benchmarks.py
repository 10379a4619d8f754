"""That the benchmarks run, and that what judges their figures judges right. Nothing depends on how fast they are."""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import attrs
import pytest

import benchmarks.__main__ as program
from benchmarks import linux, linux_boot, linux_disk, qemu
from benchmarks.__main__ import BENCHMARKS
from benchmarks.hostile import FLOODS, Taken, judge, percentile
from benchmarks.linux_many import Step, slope
from benchmarks.rate import excess, jain
from benchmarks.row import Options, Row, table

ROOT = Path(__file__).parent.parent


def test_jain_is_one_when_all_have_the_same_and_one_nth_when_one_has_all() -> None:
    assert jain([7, 7, 7, 7]) == 1.0
    assert jain([9, 0, 0]) == pytest.approx(1 / 3)


def test_excess_finds_the_worst_window_and_not_only_the_whole() -> None:
    kept = [0.0, 0.0, 1.0, 2.0, 3.0]  # burst 2, then one a second: exactly the law
    assert excess(kept, rate=1.0, burst=2.0) == pytest.approx(0.0)
    assert excess([*kept, 100.0, 100.0, 100.0, 100.0], rate=1.0, burst=2.0) == pytest.approx(2.0)


def test_percentile_is_a_value_that_so_many_do_not_exceed() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.0) == 1.0
    assert percentile([float(n) for n in range(1000)], 0.99) == 990.0
    assert percentile([7.0], 0.99) == 7.0


def test_a_flood_is_judged_by_the_loop_and_by_what_the_innocent_keeps() -> None:
    spun = Taken(rates=[100.0], late=[0.001], stops=[0.001])
    good = Taken(rates=[90.0], late=[0.005], stops=[0.5])
    bad = Taken(rates=[89.0], late=[0.0051], stops=[0.001])
    assert [row.ok for row in judge("good", spun, good, 0)] == [True, True, None]
    assert [row.ok for row in judge("bad", spun, bad, 0)] == [False, False, None]


def test_floods_name_guests_that_there_are() -> None:
    assert all((ROOT / "benchmarks" / "guests" / f"{flood.guest}.bin").exists() for flood in FLOODS.values())


def test_slope_is_what_each_vm_more_takes_and_not_the_first_one() -> None:
    steps = [Step(vms=n, seconds=1.0, each=[], mib=30 + 0.25 * n, guests=0.0) for n in (1, 2, 4, 8)]
    assert slope(steps) == pytest.approx(0.25)


def test_cpu_of_a_vmm_grows_as_it_works_and_counts_threads_that_have_ended() -> None:
    def work() -> None:
        while time.thread_time() < 0.1:
            pass

    before = qemu.Spent.by(os.getpid())
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    after = qemu.Spent.by(os.getpid())
    assert after.since(before) >= 0.08
    assert after.busy - before.busy >= 0.08


def test_cpu_of_a_vmm_is_without_the_guests_also_where_ticks_are_lost() -> None:
    before = qemu.Spent(total=1.0, guest=0.5, ticked=10.0, busy=10.0)
    assert qemu.Spent(total=4.0, guest=2.5, ticked=13.0, busy=13.0).since(before) == pytest.approx(1.0)
    assert qemu.Spent(total=4.0, guest=1.5, ticked=11.5, busy=13.0).since(before) == pytest.approx(1.0)


def test_free_memory_is_written_before_a_boot_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    def watched(*how: int, **more: int) -> mmap.mmap:
        mapped.append(true(*how, **more))
        taken.append(resident() - before)
        return mapped[-1]

    true, before = mmap.mmap, resident()
    mapped: list[mmap.mmap] = []
    taken: list[int] = []
    monkeypatch.setattr(linux_boot, "CLEARED", 64 << 20)
    monkeypatch.setattr(mmap, "mmap", watched)
    linux_boot.clear_memory(Options(quick=False, floor=Path(), build=Path()))
    assert [one.closed for one in mapped] == [True]
    assert taken[0] >= 60 << 20
    assert resident() - before < 30 << 20


def test_ours_finds_its_modules_compiled_wherever_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    command = [sys.executable, "-c", "import benchmarks.row"]
    subprocess.run(command, cwd=ROOT, env=linux_boot.installed(tmp_path), check=True)
    assert list(tmp_path.rglob("row.*.pyc"))


def test_reads_of_a_disk_are_judged_by_throughput_and_by_cpu_for_the_same_bytes() -> None:
    what = "random, 4 KiB, 1 deep"
    theirs = linux_disk.Taken(rate=[100.0, 200.0, 300.0], cpu=[1.0, 1.0, 1.0])
    for rate, used, ok in ((180.0, 1.2, True), (179.0, 1.21, False)):
        ours = linux_disk.Taken(rate=[rate], cpu=[used])
        rows = linux_disk.judge(
            "it", what, {("direct", what, "ours"): ours, ("direct", what, "theirs"): theirs}, "direct"
        )
        assert [row.ok for row in rows] == [ok, ok]


def test_table_lines_up_and_numbers_each_note_once() -> None:
    rows = [
        Row(what="a", measured="1 us", floor="1 us", ratio=1.0, bound="2x", ok=True, note="same"),
        Row(what="much longer", measured="2", bound="1", ok=False, note="same"),
    ]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    assert "a [1]" in lines[2]
    assert lines[3].endswith("| NO  |")
    assert lines[4:] == ["", "1. same"]


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the floor needs a C compiler")
def test_a_quick_run_prints_its_rows_as_json() -> None:
    command = [sys.executable, "-m", "benchmarks", "exit-in-c", "pause", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0, "it could not run; whether it was fast enough is not a quick run's business"
    result = json.loads(done.stdout)
    assert {row["ok"] for row in result["rows"]} == {None}
    assert [row["bound"] for row in result["rows"]] == ["1.05x", "p99 5 ms"]
    assert result["machine"]["kvm"]
    assert result["rows"][0]["details"]["cpu_ns"] > 0


@pytest.mark.kvm
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the floor needs a C compiler")
def test_each_kind_of_flood_is_measured() -> None:
    command = [sys.executable, "-m", "benchmarks", "hostile", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode in (0, 1)
    rows = json.loads(done.stdout)["rows"]
    assert len(rows) == 3 * (len(FLOODS) + 1)
    assert all(row["ratio"] > 0 for row in rows if row["bound"] == "0.9x at least")


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="the floor needs a C compiler")
def test_the_emulated_backend_is_measured_against_bare_unicorn() -> None:
    command = [sys.executable, "-m", "benchmarks", "emulated", "--quick", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300)
    assert done.returncode == 0
    rows = json.loads(done.stdout)["rows"]
    assert [row["bound"] for row in rows if row["ratio"]] == ["1.5x", "", "1.3x"]
    assert all(row["details"]["cpu_ns"] and row["details"]["floor_cpu_ns"] for row in rows if row["ratio"])


@pytest.mark.parametrize(
    ("host", "path", "peer", "reason"),
    [
        ("no /dev/kvm", "/usr/bin", False, "no /dev/kvm"),
        (None, "", True, "qemu-system-x86_64 is not installed"),
        (None, "", False, "there is no apt here"),
    ],
)
def test_linux_is_not_measured_where_it_cant_be_and_one_line_says_why(
    host, path, peer, reason, monkeypatch, capsys, tmp_path
) -> None:
    monkeypatch.setattr(linux, "_host_problem", lambda: host)
    monkeypatch.setattr(linux.linux_kit, "CACHE", tmp_path)
    linux.linux_kit.debian_kernel.cache_clear()
    linux.linux_kit._newest.cache_clear()
    monkeypatch.setenv("PATH", path)
    assert linux.skipped("linux-boot", peer=peer)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("linux-boot: skipped: ")
    assert reason in line


def modules() -> set[str]:
    """The files that measure something: they make rows."""
    paths = (path for path in (ROOT / "benchmarks").glob("*.py") if path.stem not in ("row", "__main__"))
    return {path.stem for path in paths if re.search(r"\bRow\(", path.read_text())}


def test_every_module_that_measures_is_among_the_benchmarks_and_each_of_them_in_the_readme() -> None:
    assert modules() == {run.__module__.removeprefix("benchmarks.") for run in BENCHMARKS.values()}
    described = (ROOT / "benchmarks" / "README.md").read_text()
    assert [name for name in BENCHMARKS if f"`{name}`" not in described] == []


def fake(monkeypatch: pytest.MonkeyPatch, ends: dict[str, int]) -> None:
    """Benchmarks in whose place a process only ends, with a row over its bound; or says nothing, from status 2 on."""

    def run(command: list[str], **_: object) -> SimpleNamespace:
        name = command[3]
        rows = {"rows": [attrs.asdict(Row(what=name, measured="9", bound="1", ok=False))]}
        return SimpleNamespace(returncode=ends[name], stdout=json.dumps(rows).encode() if ends[name] != 2 else b"")

    monkeypatch.setattr(program, "BENCHMARKS", dict.fromkeys(ends))
    monkeypatch.setattr(program, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(program.machine, "describe", dict)
    monkeypatch.setattr(program.floor, "compile_c", lambda source, to: to)


@pytest.mark.parametrize(("options", "status"), [([], 1), (["--quick"], 0)])
def test_a_row_over_its_bound_fails_a_full_run_only(options, status, monkeypatch, capsys) -> None:
    fake(monkeypatch, {"slow": 1})
    assert program.main(options) == status
    assert ("NO" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("how", [2, -signal.SIGSEGV], ids=["a message", "after its rows"])
def test_one_that_crashes_fails_a_quick_run_and_the_others_still_run(how, monkeypatch, capsys) -> None:
    fake(monkeypatch, {"first": 0, "crashes": how, "last": 0})
    assert program.main(["--quick"]) == 2
    out, err = capsys.readouterr()
    assert all(f"| {name}" in out for name in ("first", "last"))
    assert "| crashes" not in out
    assert err.endswith("could not be run: crashes\n")


def test_an_unknown_name_is_refused_with_those_that_there_are() -> None:
    command = [sys.executable, "-m", "benchmarks", "speed"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert "speed: no such benchmark" in done.stderr
    assert "exit-in-c" in done.stderr


@pytest.mark.skipif(shutil.which("nasm") is None, reason="needs nasm")
@pytest.mark.parametrize("source", sorted((ROOT / "benchmarks" / "guests").glob("*.asm")), ids=lambda path: path.stem)
def test_guest_bytes_are_those_of_its_source(source: Path, tmp_path: Path) -> None:
    subprocess.run(["nasm", "-f", "bin", "-o", tmp_path / "guest", source], check=True)
    assert source.with_suffix(".bin").read_bytes() == (tmp_path / "guest").read_bytes()
