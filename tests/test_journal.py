"""The journal: everything is written and read back, nothing blocks, a kill loses a second at most, bounds hold."""

from __future__ import annotations

import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import attrs
import pytest

import orchestra as orc
from orchestra.journal import Journal, read_journal, schema, writer
from orchestra.journal.schema import VERSION, JournalError
from orchestra.journal.upgrade import upgrade
from orchestra.model.actions import Applied
from orchestra.policy import Facts, HostFacts, VmFacts

SECOND = 1_000_000_000


def facts(n: int, time: int, **vm: object) -> Facts:
    vms = {f"vm-{i}": VmFacts(f"vm-{i}", "acme", 1.0, 1, 10 + i, 20, 0.5, i, **vm) for i in range(n)}  # type: ignore[arg-type]
    return Facts(time, 0.1, orc.Limit(rate=100), None, {}, vms, HostFacts(cpus=2, cpu_pressure=0.25))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "fleet.db"


def written(path: Path, *, now: int = 5 * SECOND, **options: object) -> Journal:
    journal = Journal(path, **options)  # type: ignore[arg-type]
    journal.begin(now, "kvm", "fault-like")
    return journal


def test_an_action_comes_back_with_reason_evidence_and_outcome(path):
    journal = written(path)
    throttle = orc.Throttle(vm="a", limit=orc.Limit(rate=10), reason="too many", evidence={"rate": 900.5})
    journal.action(Applied(time=6 * SECOND, action=throttle, policy="share"))
    journal.action(Applied(time=7 * SECOND, action=orc.Pause(vm="b"), error="it has ended"))
    journal.action(Applied(time=8 * SECOND, action=None, policy="bad", error="ZeroDivisionError"))
    journal.end(9 * SECOND)
    with read_journal(path) as read:
        first, second, third = read.actions()
        assert (first.kind, first.vm, first.policy, first.outcome) == ("Throttle", "a", "share", "done")
        assert first.evidence == {"rate": 900.5}
        assert first.details["limit"]["rate"] == 10
        assert first.details["meter"] == "bus_locks"
        assert second.time - first.time == SECOND
        assert (second.outcome, second.error) == ("failed", "it has ended")
        assert (third.kind, third.vm, third.error) == ("PolicyError", None, "ZeroDivisionError")
        assert [row.vm for row in read.actions(vm="b")] == ["b"]
        assert list(read.actions(since=first.time, until=first.time)) == [first]
        assert read.vms() == ["a", "b"]
        assert read.span() == (first.time, third.time)


def test_times_are_of_the_wall_clock_whatever_the_fleets_clock_says(path):
    begun = time.time_ns()
    journal = written(path, now=123)
    journal.state(123, "a", 1, "acme", "running", "launched")
    journal.end(124)
    with read_journal(path) as read:
        (row,) = read.states()
    assert begun <= row.time <= time.time_ns()


def test_aggregates_keep_what_is_unknown_as_none(path):
    journal = written(path)
    journal.aggregate(facts(1, 6 * SECOND))
    journal.aggregate(facts(1, 7 * SECOND, cpu=0.5, work=3.0, answers=7, throttled_by={"vm.exits": 0.5}))
    journal.end(8 * SECOND)
    with read_journal(path) as read:
        unknown, known = read.aggregates(vm="vm-0")
        assert (unknown.cpu, unknown.run_delay, unknown.work) == (None, None, None)
        assert (known.cpu, known.work, known.bus_locks, known.exits) == (0.5, 3.0, 10, 20)
        assert (known.answers, known.throttled_by) == (7, {"vm.exits": 0.5})
        hosts = list(read.hosts())
        assert [(host.cpus, host.cpu_pressure, host.lock_ns, host.rate) for host in hosts] == [(2, 0.25, None, 100)] * 2


def test_a_profile_of_a_kernel_address_survives(path):
    journal = written(path)
    journal.profile(6 * SECOND, "a", 1, [(0xFFFF_FFFF_8100_0000, 64, 0, 0x1000, 3, 300, b"\xf0\x01")])
    journal.end(7 * SECOND)
    with read_journal(path) as read:
        (row,) = read.profiles(vm="a")
    assert (row.rip, row.weight, row.code) == (0xFFFF_FFFF_8100_0000, 300, b"\xf0\x01")


def test_an_orderly_end_loses_nothing(path):
    journal = written(path)
    for tick in range(50):
        journal.aggregate(facts(400, (6 + tick) * SECOND))
    journal.end(99 * SECOND)
    assert journal.statistics() == writer.JournalStatistics(50 * 401, 0, 0, None)
    with read_journal(path) as read:
        assert read.query("SELECT count(*) FROM aggregates")[0][0] == 20_000


def test_a_journal_is_continued_by_the_next_fleet(path):
    for _ in range(2):
        journal = written(path)
        journal.state(6 * SECOND, "a", 1, "acme", "running", "")
        journal.end(7 * SECOND)
    with read_journal(path) as read:
        assert [row.session for row in read.states()] == [1, 2]
        assert all(row[0] is not None for row in read.query("SELECT ended FROM sessions"))


@pytest.mark.parametrize("odd", [{"work": 1 << 70}, {"cpu": 1 << 70}])
def test_a_figure_beyond_64_bits_is_kept_as_nearly_as_can_be(path, odd):
    journal = written(path)
    journal.aggregate(facts(2, 6 * SECOND, **odd))
    journal.end(7 * SECOND)
    assert (journal.statistics().dropped, journal.statistics().written) == (0, 3)
    with read_journal(path) as read:
        assert [getattr(row, next(iter(odd))) for row in read.aggregates()] == [float(1 << 70)] * 2


def test_text_that_is_no_utf8_is_kept_with_escapes_and_everything_else_as_it_is(path):
    journal = written(path)
    journal.action(Applied(time=6 * SECOND, action=orc.Warn(vm="a", reason="bad \udc80 byte")))
    journal.state(7 * SECOND, "a", 1, "acme", "running", "fine")
    journal.end(8 * SECOND)
    with read_journal(path) as read:
        assert [row.reason for row in read.actions()] == ["bad \\udc80 byte"]
        assert [row.reason for row in read.states()] == ["fine"]


def test_a_row_that_cant_be_written_is_dropped_alone_and_told(path, caplog):
    journal = written(path)
    journal.state(6 * SECOND, "a", 1, "acme", "running", "before")
    journal.state(6 * SECOND, "a", 1, "acme", "running", {"not": "text"})  # type: ignore[arg-type]
    journal.state(6 * SECOND, "a", 1, "acme", "running", None)  # type: ignore[arg-type]
    journal.state(6 * SECOND, "a", 1, "acme", "running", "after")
    journal.end(7 * SECOND)
    assert journal.statistics() == writer.JournalStatistics(2, 0, 2, None)
    assert [record.message for record in caplog.records if "2 rows of the journal are lost" in record.message]
    with read_journal(path) as read:
        assert [row.reason for row in read.states()] == ["before", "after"]


def in_a_circle() -> dict[str, object]:
    evidence: dict[str, object] = {}
    evidence["again"] = evidence
    return evidence


def kept(path: Path, evidence: dict[str, object]) -> Mapping[str, object]:
    """Evidence as the journal has it."""
    journal = written(path)
    journal.action(Applied(time=6 * SECOND, action=orc.Warn(vm="a", reason="why", evidence=evidence)))
    journal.end(7 * SECOND)
    with read_journal(path) as read:
        (row,) = read.actions()
    assert row.reason == "why"
    return row.evidence


def test_evidence_that_json_cant_hold_costs_the_evidence_only(path):
    assert list(kept(path, in_a_circle())) == ["unreadable"]


def test_evidence_that_json_has_no_form_for_is_kept_as_text(path):
    evidence = {"deep": {("x", 1): math.inf}, "at": Path("/a"), "limit": orc.Limit(rate=5)}
    limit = {"rate": 5, "burst": None, "max_delay": 10.0}
    assert kept(path, evidence) == {"deep": {"('x', 1)": "inf"}, "at": "/a", "limit": limit}


FULL = """
import logging, resource, signal, sys, time, orchestra as orc
from orchestra.journal import Journal
logging.basicConfig(level=logging.WARNING, format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def write(count):
    for n in range(count):
        journal.action(orc.Applied(time=time.time_ns(), action=orc.Warn(vm="v", reason="r" * 100)))
def until(done):
    while not done(journal.statistics()):
        time.sleep(0.01)
journal = Journal(sys.argv[1])
journal.begin(time.time_ns(), "kvm", None)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
write(5_000)
until(lambda told: told.error)
if sys.argv[2] == "again":
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    until(lambda told: not told.waiting)
journal.end(1)
print(journal.statistics())
"""


@pytest.mark.parametrize(
    ("room", "told", "said"),
    [
        ("none", "JournalStatistics(written=0, waiting=0, dropped=5000, error='", "5000 rows of the journal are lost"),
        ("again", "JournalStatistics(written=5000, waiting=0, dropped=0, error=None)", "the journal is written again"),
    ],
)
def test_a_full_disk_is_told_when_it_fills_and_what_it_cost(path, room, told, said):
    ran = subprocess.run(
        [sys.executable, "-c", FULL, str(path), room], capture_output=True, text=True, timeout=60, check=True
    )
    assert ran.stdout.startswith(told)
    assert ran.stderr.count("the journal can't be written (") == 1
    assert said in ran.stderr
    with read_journal(path) as read:
        assert len(list(read.actions())) == (5000 if room == "again" else 0)


def test_a_second_writer_is_refused_until_the_first_is_gone(path):
    first, second = written(path), Journal(path)
    with pytest.raises(JournalError, match="another fleet writes this journal"):
        second.begin(0, "kvm", None)
    first.end(0)
    second.begin(0, "kvm", None)
    second.end(0)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_two_fleets_cant_share_one_journal_object(path):
    journal = written(path)
    with pytest.raises(JournalError, match="in use"):
        journal.begin(0, "kvm", None)
    journal.end(0)


def test_what_the_disk_is_too_slow_for_is_dropped_and_counted_actions_last(path, monkeypatch):
    monkeypatch.setattr(writer, "QUEUE", 10)
    journal = Journal(path)  # nobody takes from its queue yet
    journal.aggregate(facts(20, SECOND))
    for _ in range(15):
        journal.action(Applied(time=SECOND, action=orc.Pause(vm="a")))
    # An interval is kept as a whole or not at all: half of it would say that the other VMs did nothing.
    assert journal.statistics() == writer.JournalStatistics(0, 15, 21, None)
    for _ in range(10):
        journal.action(Applied(time=SECOND, action=orc.Pause(vm="a")))
    assert journal.statistics() == writer.JournalStatistics(0, 20, 26, None)  # and of these twice as many at most


def test_rows_past_their_days_are_removed(path):
    journal = written(path, keep_days=1)
    journal.state(-2 * 86400 * SECOND, "old", 1, "acme", "running", "")
    journal.state(6 * SECOND, "new", 1, "acme", "running", "")
    journal.end(7 * SECOND)
    with read_journal(path) as read:
        assert read.vms() == ["new"]


def test_the_file_stays_within_its_bytes_and_the_newest_stay(path, monkeypatch):
    monkeypatch.setattr(writer, "PRUNED_ROWS", 2_000)
    journal = written(path, keep_bytes=2 * orc.MiB)
    for tick in range(60):
        journal.aggregate(facts(1_000, (6 + tick) * SECOND))
    journal.end(99 * SECOND)
    assert path.stat().st_size < 4 * orc.MiB
    with read_journal(path) as read:
        times = [row[0] for row in read.query("SELECT DISTINCT time FROM aggregates ORDER BY time")]
        assert 5 < len(times) < 60
        last = read.span()
        assert last is not None
        assert times[-1] == last[1]
        assert 0 < read.removed() <= times[0]  # what is told of a time before that would be of half the rows


def test_no_mixture_of_rows_makes_the_file_larger_than_its_bytes(path, monkeypatch):
    monkeypatch.setattr(writer, "BATCH", 500)
    sizes = []
    give_back = Journal._shrink

    def look(journal: Journal, connection: sqlite3.Connection) -> None:
        give_back(journal, connection)
        sizes.append(sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*") if file.suffix != ".db-shm"))

    monkeypatch.setattr(Journal, "_shrink", look)
    journal = written(path, keep_bytes=orc.MiB)
    for tick in range(100):
        now = (6 + tick) * SECOND
        journal.aggregate(facts(40, now))
        for _ in range(40):
            journal.state(now, "vm-1", 1, "acme", "running", "x" * 50)
            journal.action(Applied(time=now, action=orc.Warn(vm="vm-1", reason="r" * 100, evidence={"a": "x" * 200})))
    journal.end(999 * SECOND)
    assert max(sizes) <= orc.MiB
    assert path.stat().st_size <= orc.MiB
    with read_journal(path) as read:
        last = read.span()
        assert last is not None
        for rows in (read.aggregates(), read.actions(), read.states()):  # of each the newest stay
            assert max(row.time for row in rows) == last[1]


def test_it_can_be_read_while_it_is_written(path):
    journal = written(path)
    with read_journal(path) as read:
        journal.state(6 * SECOND, "a", 1, "acme", "running", "")
        journal.end(7 * SECOND)
        assert read.vms() == ["a"]


def half(path: Path, of: float = 0.5) -> None:
    """A copy that was cut short."""
    whole = path.with_suffix(".whole")
    filled(whole)
    path.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * of)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such journal"),
        (lambda path: path.write_bytes(b""), "empty"),
        (lambda path: path.write_bytes(b"no database at all, " * 99), "no journal"),
        (lambda path: half(path), "can't be read .*malformed.*recover"),
        (lambda path: half(path, 0), "copied without its -wal"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_what_is_no_journal_is_refused_with_its_name(path, make, message):
    make(path)
    with pytest.raises(JournalError, match=message) as caught:
        read_journal(path)
    assert str(path) in str(caught.value)


def filled(path: Path) -> None:
    """A journal of some pages, with a row of each kind and more."""
    journal = written(path)
    for tick in range(100):
        now = (6 + tick) * SECOND
        journal.aggregate(facts(5, now, cpu=0.5))
        journal.state(now, "vm-1", 1, "acme", "running", "")
        journal.action(Applied(time=now, action=orc.Warn(vm="vm-1", evidence={"rate": 1})))
        journal.profile(now, "vm-1", 1, [(0x1000, 64, 0, 0, 3, 300, b"\xf0\x01")])
    journal.end(200 * SECOND)


def read_all(path: Path) -> None:
    with read_journal(path) as read:
        read.vms(), read.span(), read.intervals()
        for rows in (read.actions(), read.states(), read.aggregates(), read.hosts(), read.profiles()):
            for _ in rows:
                pass


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_file_is_read_as_far_as_it_goes_or_named(path, seed):
    filled(path)
    read_all(path)
    content, chance = bytearray(path.read_bytes()), random.Random(seed)
    for at in range(4096, len(content), 4096):
        for _ in range(20):
            content[at + chance.randrange(4096)] = chance.randrange(256)
    path.write_bytes(content)
    with pytest.raises(JournalError, match="can't be read") as caught:
        read_all(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("UPDATE actions SET evidence = '{'", "line 1"),
        ("UPDATE actions SET details = '[]'", "is no object"),
        ("UPDATE actions SET time = -1", "time="),
        ("UPDATE aggregates SET interval = 0", "interval=0.0"),
        ("UPDATE aggregates SET cpu = 'much'", "cpu='much'"),
        ("UPDATE states SET vm = x'00'", "vm=b'"),
        ("DROP TABLE hosts", "no such table"),
    ],
)
def test_a_value_that_cant_be_is_named(path, change, named):
    filled(path)
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()
    with pytest.raises(JournalError, match=f"can't be read .*{named}"):
        read_all(path)


ARCHIVED = """
import os, sys
import urllib.parse  # pathlib does that late, when it may lie where only root looks
from orchestra.journal import read_journal
from orchestra.journal.schema import JournalError
if not os.getuid():  # to root every folder can be written
    os.setgid(65534), os.setuid(65534)
try:
    with read_journal(sys.argv[1]) as read:
        print(len(list(read.actions())))
except JournalError as error:
    print(error)
"""


@pytest.mark.parametrize(("orderly", "said"), [(True, "100\n"), (False, "copy both files to one that can")])
def test_a_journal_in_a_folder_that_cant_be_written_can_be_read(orderly, said):
    with tempfile.TemporaryDirectory() as folder:  # that anybody may look into: pytest's are the user's own
        path = Path(folder) / "fleet.db"
        filled(path)
        if not orderly:
            path.with_name("fleet.db-wal").write_bytes(b"what a fleet left that was killed")
        for file in path.parent.iterdir():
            file.chmod(0o444)
        path.parent.chmod(0o555)
        ran = subprocess.run(
            [sys.executable, "-c", ARCHIVED, str(path)], capture_output=True, text=True, timeout=60, check=True
        )
        path.parent.chmod(0o755)
    assert said in ran.stdout


def test_a_database_of_somebody_else_is_left_alone(path):
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE theirs (x)")
    other.close()
    with pytest.raises(JournalError, match="no journal of orchestra's"):
        Journal(path).begin(0, "kvm", None)
    with sqlite3.connect(path) as other:
        assert other.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]
    other.close()


def test_a_journal_of_a_newer_version_is_refused(path):
    written(path).end(0)
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    connection.close()
    for use in (lambda: read_journal(path), lambda: Journal(path).begin(0, "kvm", None)):
        with pytest.raises(JournalError, match="newer orchestra"):
            use()


def test_a_journal_that_a_fleet_writes_is_not_upgraded_under_it(path, monkeypatch):
    writer = written(path)
    steps = (*schema._MIGRATIONS, lambda connection: connection.execute("ALTER TABLE states ADD COLUMN more TEXT"))
    with monkeypatch.context() as newer:
        newer.setattr(schema, "_MIGRATIONS", steps)
        newer.setattr(schema, "VERSION", VERSION + 1)
        with pytest.raises(JournalError, match="another fleet writes this journal; close that fleet first"):
            upgrade(path)
        with sqlite3.connect(path) as connection:
            assert connection.execute("PRAGMA user_version").fetchone() == (VERSION,)
        connection.close()
        writer.end(0)
        assert upgrade(path) == (VERSION, VERSION + 1)
        assert upgrade(path) == (VERSION + 1, VERSION + 1)


def test_an_older_version_is_brought_up_to_date_in_one_transaction(path, monkeypatch):
    written(path).end(0)
    steps = (*schema._MIGRATIONS, lambda connection: connection.execute("ALTER TABLE states ADD COLUMN more TEXT"))
    monkeypatch.setattr(schema, "_MIGRATIONS", steps)
    monkeypatch.setattr(schema, "VERSION", VERSION + 1)
    with pytest.raises(JournalError, match="--upgrade"):
        read_journal(path)
    Journal(path).begin(0, "kvm", None)
    with read_journal(path) as read:
        assert "more" in [row[1] for row in read.query("PRAGMA table_info(states)")]


def test_a_migration_that_fails_changes_nothing(path, monkeypatch):
    written(path).end(0)

    def fail(connection: sqlite3.Connection) -> None:
        connection.execute("DROP TABLE states")
        raise sqlite3.OperationalError("disk full")

    monkeypatch.setattr(schema, "_MIGRATIONS", (*schema._MIGRATIONS, fail))
    monkeypatch.setattr(schema, "VERSION", VERSION + 1)
    with pytest.raises(JournalError, match="disk full"):
        Journal(path).begin(0, "kvm", None)
    monkeypatch.undo()
    with read_journal(path) as read:
        assert list(read.states()) == []


@pytest.mark.parametrize("bad", [{"keep_days": 0}, {"keep_days": float("nan")}, {"keep_bytes": 5}])
def test_bounds_that_cant_be_are_refused(path, bad):
    with pytest.raises(orc.SpecError, match=next(iter(bad))):
        Journal(path, **bad)


KILLED = """
import sys, time, orchestra as orc
from orchestra.journal import Journal
journal = Journal(sys.argv[1])
journal.begin(time.monotonic_ns(), "kvm", None)
n, told = 0, False
while True:
    n += 1
    journal.state(time.monotonic_ns(), str(n), n, "acme", "running", str(time.time_ns()))
    if n % 100 == 0:
        time.sleep(0.001)
    if n % 100 == 0 and not told and journal.statistics().written:
        told = print("writing", flush=True) is None
"""


@pytest.mark.parametrize("seed", range(int(os.environ.get("ORCHESTRA_KILLS", "3"))))
def test_kill_9_loses_at_most_the_last_second_and_the_file_opens(path, seed):
    with subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(random.Random(seed).uniform(0, 0.5))  # any moment: it writes all the time
        killed = time.time_ns()
        process.send_signal(signal.SIGKILL)
    with read_journal(path) as read:
        assert read.query("PRAGMA integrity_check")[0][0] == "ok"
        rows = list(read.states())
    assert [row.generation for row in rows] == list(range(1, len(rows) + 1))
    assert rows, "what had been committed is gone"
    assert killed - int(rows[-1].reason) < SECOND
    Journal(path).begin(0, "kvm", None)  # and it is continued


# ---- what is kept of an interval


def test_an_interval_has_exits_by_reason_the_vcpus_of_those_with_several_and_what_is_absent_once(path):
    parts = (orc.VcpuFacts(0, 2, 5, 0.25, cpu=0.5), orc.VcpuFacts(1, 1, 1, 0.0))
    several = orc.VmFacts("smp", "acme", 1.0, 2, 3, 6, 0.25, 1, by_reason={"io": 3, "x86_bus_lock": 3}, by_vcpu=parts)
    one = orc.VmFacts("up", "acme", 1.0, 1, 1, 1, 0.0, 2, by_reason={"x86_bus_lock": 1}, by_vcpu=parts[1:])
    host = orc.HostFacts(cpus=4, llc_bytes=1e6, memory_bandwidth=2e9, absent={"lock_ns": "off"})
    with Journal(path) as journal:
        journal.begin(0, "kvm", "fault-like")
        for second, absent in enumerate([{"lock_ns": "off"}, {"lock_ns": "off"}, {}], 1):
            facts = orc.Facts(
                second * SECOND,
                1.0,
                orc.Limit(rate=7),
                orc.Limit(rate=9),
                {},
                {"smp": several, "up": one},
                attrs.evolve(host, absent=absent),
            )
            journal.aggregate(facts)
    with read_journal(path) as reader:
        rows = {row.vm: row for row in reader.aggregates()}
        assert rows["smp"].by_reason == {"io": 3, "x86_bus_lock": 3}
        assert rows["up"].by_reason == {"x86_bus_lock": 1}
        vcpus = list(reader.vcpus())
        assert [(row.vm, row.vcpu, row.bus_locks, row.exits, row.cpu) for row in vcpus[:2]] == [
            ("smp", 0, 2, 5, 0.5),
            ("smp", 1, 1, 1, None),
        ]
        assert len(vcpus) == 6
        hosts = list(reader.hosts())
        assert {(row.rate, row.exit_rate, row.llc_bytes, row.memory_bandwidth) for row in hosts} == {(7, 9, 1e6, 2e9)}
        assert [row.absent for row in hosts] == [{"lock_ns": "off"}, None, {}]


def test_a_journal_of_the_first_version_is_read_once_it_is_upgraded(path):
    with sqlite3.connect(path) as connection:
        for statement in schema._FIRST.split(";"):
            connection.execute(statement)
        connection.execute(
            "INSERT INTO aggregates VALUES (1, 5, 1.0, 'a', 1, 't', 1.0, 1, 7, 9, 0, NULL, NULL, NULL, 2)"
        )
        connection.execute("INSERT INTO hosts VALUES (1, 5, 1.0, 4, NULL, NULL, NULL, 20.0, NULL, 100)")
        connection.execute(f"PRAGMA application_id = {schema.APPLICATION}")
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    assert upgrade(path) == (1, VERSION)
    with read_journal(path) as reader:
        (row,), (host,) = reader.aggregates(), reader.hosts()
    assert (row.bus_locks, row.work, row.dirty_pages, row.by_reason, row.answers) == (7, 2, None, None, None)
    assert (host.lock_ns, host.exit_rate, host.absent) == (20, None, None)


def test_what_an_older_journal_calls_launch_is_the_generation_once_it_is_upgraded(path):
    """The column of four tables, and the key of an action and of its evidence; a policy's parameter stays."""
    reload = '{"policies":[{"name":"burst-credits","launch":20}]}'
    rows = [("Pause", '{"noise":3,"launch":2,"calm":1}', '{"launch":2}'), ("Reload", "{}", reload)]
    connection = schema.connect(path, readonly=False)
    for migrate in schema._MIGRATIONS[:3]:
        migrate(connection)
    connection.execute("INSERT INTO states VALUES (1, 5, 'a', 2, 't', 'running', '')")
    connection.execute("INSERT INTO profiles VALUES (1, 5, 'a', 2, 16, 16, 0, 0, 1, 1, x'f4')")
    connection.execute("INSERT INTO vcpus VALUES (1, 5, 1.0, 'a', 2, 0, 7, 9, 0, NULL, NULL, NULL)")
    for kind, evidence, details in rows:
        connection.execute(
            "INSERT INTO actions VALUES (NULL, 1, 5, ?, 'a', NULL, 'p', 'done', NULL, '', ?, ?)",
            (kind, evidence, details),
        )
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION}")
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    assert upgrade(path) == (3, VERSION)
    with closing(sqlite3.connect(path)) as upgraded:
        numbers = [
            upgraded.execute(f"SELECT generation FROM {one}").fetchall() for one in ("states", "profiles", "vcpus")
        ]
        assert numbers == [[(2,)]] * 3
        texts = upgraded.execute("SELECT evidence, details FROM actions ORDER BY id").fetchall()
    assert texts == [('{"noise":3,"generation":2,"calm":1}', '{"generation":2}'), ("{}", reload)]
    with read_journal(path) as reader:
        pause, _ = reader.actions()
        assert pause.action == orc.Pause(vm="a", generation=2, evidence={"noise": 3, "generation": 2, "calm": 1})


def test_a_damaged_row_does_not_keep_a_journal_from_being_upgraded(path):
    connection = schema.connect(path, readonly=False)
    for migrate in schema._MIGRATIONS[:3]:
        migrate(connection)
    connection.execute(
        "INSERT INTO actions VALUES (NULL, 1, 5, 'Pause', 'a', NULL, 'p', 'done', NULL, '', ?, '{}')", ('{"launch":2',)
    )
    connection.execute("INSERT INTO states VALUES (1, 5, 'a', 2, 't', 'running', '')")
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION}")
    connection.execute("PRAGMA user_version = 3")
    connection.close()
    assert upgrade(path) == (3, VERSION)
    with read_journal(path) as reader:
        assert [row.generation for row in reader.states()] == [2]
        with pytest.raises(JournalError, match="can't be read"):
            list(reader.actions())


def test_one_that_is_used_again_waits_between_its_commits(path):
    journal = Journal(path)
    for _ in range(2):
        journal.begin(0, "kvm", None)
        used = time.process_time()
        time.sleep(0.3)  # this is what it is about: what it does while nothing comes
        assert time.process_time() - used < 0.1
        journal.end(1)
