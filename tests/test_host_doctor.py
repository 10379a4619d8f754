"""The doctor: each finding on a host where it is well and on one where it is not, from made-up file trees."""

from __future__ import annotations

import errno
import json
import tempfile
import tomllib
from pathlib import Path

import attrs
import pytest
from hypothesis import given, settings, strategies as st

from orchestra.backend import choose
from orchestra.backend.detection import Asked, Pick
from orchestra.backend.emulated import library
from orchestra.backend.kvm.cpuid import Cpuid, CpuidEntry
from orchestra.backend.kvm.system import Kvm
from orchestra.host import doctor
from orchestra.host.doctor import Finding, Report, examine
from orchestra.model.errors import BackendUnavailable, ResourceLimit

CPUINFO = (
    "processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: Test CPU 9\nflags\t\t: fpu svm {flags}\n\n"
    "processor\t: 1\nflags\t\t: rubbish\n"
)
LIMITS = "Limit                     Soft Limit           Hard Limit           Units     \n"
MOUNTS = (
    "22 1 0:20 / /proc rw - proc proc rw\n"
    "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate{options}\n"
)

GOOD = {
    "proc/cpuinfo": CPUINFO.format(vendor="AuthenticAMD", flags="bus_lock_detect bus_lock_threshold"),
    "proc/sys/kernel/osrelease": "6.16.1-test\n",
    "usr/bin/qemu-storage-daemon": "a program",
    "proc/cmdline": "quiet split_lock_detect=off\n",
    "proc/sys/kernel/split_lock_mitigate": "0\n",
    "proc/self/limits": LIMITS
    + "Max processes             90000                90001                processes \n"
    + "Max open files            65536                524288               files     \n"
    + "Max nice priority         30                   30                             \n",
    "proc/self/status": "Name:\tpython\nCapEff:\t0000000000000000\n",
    "proc/sys/kernel/threads-max": "100000\n",
    "proc/self/cgroup": "0::/system.slice/fleet.service\n",
    "proc/self/mountinfo": MOUNTS.format(options=",favordynmods"),
    "sys/fs/cgroup/system.slice/fleet.service/pids.max": "max\n",
    "sys/fs/cgroup/system.slice/fleet.service/cgroup.controllers": "cpu memory pids\n",
    "sys/fs/cgroup/system.slice/fleet.service/cgroup.subtree_control": "cpu\n",
    "sys/fs/cgroup/system.slice/fleet.service/cgroup.threads": "",
    "sys/fs/cgroup/system.slice/fleet.service/memory.max": "max\n",
    "sys/module/kvm/parameters/nx_huge_pages": "never\n",
    "sys/module/kvm_amd/parameters/npt": "Y\n",
    "proc/meminfo": "MemTotal:       32000000 kB\nMemAvailable:   16777216 kB\n",
    "proc/sys/vm/overcommit_memory": "0\n",
    "proc/sys/vm/max_map_count": "262144\n",
    "usr/include/linux/kvm.h": "#define KVM_CAP_X86_BUS_LOCK_EXIT 193\n",
}


ALL_BITS = [CpuidEntry(function=leaf, ecx=0xFFFF_FFFF, edx=0xFFFF_FFFF) for leaf in (1, 0x8000_0001)]


class FakeKvm:
    def __init__(self, bits: int, cpuid: list[CpuidEntry] = ALL_BITS) -> None:
        self.bits = bits
        self.cpuid = Cpuid.from_entries(cpuid)
        self.closed = False

    def supported_cpuid(self):
        return self.cpuid

    def capabilities(self):
        return {"KVM_CAP_USER_MEMORY": 1, "KVM_CAP_X86_BUS_LOCK_EXIT": self.bits}

    def extension(self, number):
        assert number == 193
        return self.bits

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


def write(root, files):
    for path, text in files.items():
        if text is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(text)


@pytest.fixture
def look(tmp_path):
    """Examine a host like GOOD but for `files` (None: missing); `kvm` is what opening gives, or the error it raises,
    `unicorn` the error that loading it raises."""

    def look(files=None, *, kvm=None, unicorn=None, importable=lambda _: True) -> Report:
        def open_kvm(path):
            assert path == tmp_path / "dev/kvm"
            if isinstance(kvm, Exception):
                raise kvm
            return kvm or FakeKvm(3)

        def load_unicorn():
            if unicorn is not None:
                raise unicorn

        write(tmp_path, GOOD | (files or {}))
        return examine(tmp_path, open_kvm=open_kvm, importable=importable, load_unicorn=load_unicorn)

    return look


@pytest.fixture
def find(look):
    def find(check, files=None, **options) -> Finding:
        [finding] = [finding for finding in look(files, **options).findings if finding.check == check]
        return finding

    return find


def amd(flags=""):
    return {"proc/cpuinfo": CPUINFO.format(vendor="AuthenticAMD", flags=flags)}


def intel(flags=""):
    return {"proc/cpuinfo": CPUINFO.format(vendor="GenuineIntel", flags=flags)}


def split_lock(setting, mitigate="1"):
    return {
        **intel("split_lock_detect bus_lock_detect"),
        "proc/cmdline": setting,
        "proc/sys/kernel/split_lock_mitigate": mitigate,
    }


# ---- the whole report


def test_a_good_host_has_nothing_but_good_findings(look):
    report = look()
    assert [finding for finding in report.findings if finding.status != "ok"] == []
    assert report.problems == ()
    assert not any(finding.remedy for finding in report.findings)


def test_capabilities_are_in_the_report_by_the_kernels_names(look):
    kvm = FakeKvm(3)
    assert look(kvm=kvm).capabilities == {"KVM_CAP_USER_MEMORY": 1, "KVM_CAP_X86_BUS_LOCK_EXIT": 3}
    assert kvm.closed


def test_the_report_can_be_written_as_json(look):
    report = look({"proc/self/limits": None})
    again = json.loads(json.dumps(report.as_dict()))
    assert again["capabilities"]["KVM_CAP_USER_MEMORY"] == 1
    assert [Finding(**finding) for finding in again["findings"]] == list(report.findings)


def test_every_problem_has_a_remedy_and_every_check_a_name_of_its_own(look):
    report = look({**dict.fromkeys(GOOD), **split_lock("split_lock_detect=fatal")}, kvm=NO_KVM, unicorn=NO_UNICORN)
    assert all(finding.remedy for finding in report.problems)
    assert len({finding.check for finding in report.findings}) == len(report.findings)


def test_an_empty_host_raises_nothing(tmp_path):
    report = examine(tmp_path)
    assert "/dev/kvm" in {finding.check for finding in report.problems}
    assert report.capabilities == {}


@settings(max_examples=60)
@given(files=st.fixed_dictionaries({}, optional={path: st.binary(max_size=80) for path in GOOD}))
def test_files_full_of_anything_raise_nothing(files):
    with tempfile.TemporaryDirectory() as directory:
        for path, data in files.items():
            target = Path(directory, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        report = examine(Path(directory), open_kvm=lambda _: FakeKvm(0), importable=lambda _: False)
    assert len(report.findings) >= 16


def test_a_check_that_breaks_is_a_finding_and_hides_no_other(look, monkeypatch):
    def broken_check(_host):
        raise ZeroDivisionError

    before = len(look().findings)
    monkeypatch.setattr(doctor, "CHECKS", (broken_check, *doctor.CHECKS))
    report = look()
    assert report.findings[0].check == "broken check"
    assert report.findings[0].status == "note"
    assert "ZeroDivisionError" in report.findings[0].meaning
    assert len(report.findings) == before + 1


@pytest.mark.kvm
def test_this_host_is_examined_as_it_is():
    try:
        Kvm.open().close()
    except BackendUnavailable as error:
        pytest.skip(str(error))
    report = examine()
    assert report.capabilities["KVM_CAP_USER_MEMORY"] == 1
    assert "/dev/kvm" not in {finding.check for finding in report.problems}


# ---- KVM and the CPU


def test_kvm_is_reported_with_its_version_and_module(find):
    finding = find("/dev/kvm")
    assert (finding.status, finding.value) == ("ok", "KVM API 12, kvm_amd")


@pytest.mark.parametrize(
    ("error", "value", "remedy"),
    [
        (BackendUnavailable("/dev/kvm does not exist: load the module"), "/dev/kvm does not exist", "load the module"),
        (BackendUnavailable("no permission: join the group: kvm"), "no permission", "join the group: kvm"),
        (ResourceLimit(errno.EMFILE, "open: no more: ulimit"), "[Errno 24] open", "no more: ulimit"),
    ],
)
def test_kvm_that_does_not_open_is_a_problem_with_its_remedy(find, error, value, remedy):
    finding = find("/dev/kvm", kvm=error)
    assert (finding.status, finding.value, finding.remedy) == ("problem", value, remedy)


def test_a_missing_device_is_told_apart_by_the_real_way_to_open_it(tmp_path):
    write(tmp_path, GOOD)
    [finding] = [finding for finding in examine(tmp_path).findings if finding.check == "/dev/kvm"]
    assert "does not exist" in finding.value
    assert "modprobe" in finding.remedy
    write(tmp_path, {"dev/kvm": ""})
    [finding] = [finding for finding in examine(tmp_path).findings if finding.check == "/dev/kvm"]
    assert "not a KVM device" in finding.value


NO_KVM = BackendUnavailable("/dev/kvm does not exist: load the module")
NO_UNICORN = BackendUnavailable("backend='emulated': unicorn 1.0 at /a: is too old: `pip install it`")


def test_unicorn_that_loads_is_reported_with_its_version(find):
    finding = find("unicorn")
    assert (finding.status, finding.value) == ("ok", f"{library.version() or 'unknown version'}, loads")
    assert "whatever the host" in finding.meaning


def test_unicorn_that_does_not_load_is_noted_with_its_remedy(find):
    finding = find("unicorn", unicorn=NO_UNICORN)
    assert (finding.status, finding.value) == ("note", "unicorn 1.0 at /a: is too old")
    assert finding.remedy == "`pip install it`"


@pytest.mark.parametrize(
    ("kvm", "unicorn", "auto", "locks"),
    [
        (FakeKvm(3), None, ("ok", "kvm"), ("ok", "kvm", "/dev/kvm opens, and this host's KVM reports bus locks")),
        (FakeKvm(3), NO_UNICORN, ("ok", "kvm"), ("ok", "kvm", "reports bus locks")),
        (FakeKvm(0), None, ("ok", "kvm"), ("ok", "emulated", "but this host's KVM reports no bus locks")),
        (FakeKvm(0), NO_UNICORN, ("ok", "kvm"), ("note", "none", "reports no bus locks (use an Intel CPU")),
        (NO_KVM, None, ("ok", "emulated"), ("ok", "emulated", "/dev/kvm does not exist")),
    ],
)
def test_what_runs_if_nobody_chooses_is_told_with_the_reason(find, kvm, unicorn, auto, locks):
    finding = find('backend="auto"', kvm=kvm, unicorn=unicorn)
    assert (finding.status, finding.value) == auto
    finding = find('backend="auto", bus locks', kvm=kvm, unicorn=unicorn)
    assert (finding.status, finding.value) == locks[:2]
    assert locks[2] in finding.meaning
    assert finding.remedy == ("`pip install it`" if finding.status == "note" else "")


def test_where_no_guest_can_run_that_is_the_problem(find):
    finding = find('backend="auto"', kvm=NO_KVM, unicorn=NO_UNICORN)
    assert (finding.status, finding.value, finding.remedy) == ("problem", "none", "`pip install it`")


@pytest.mark.parametrize(
    ("kvm", "unicorn", "can", "auto", "todo"),
    [
        (
            FakeKvm(3),
            None,
            "KVM and on the emulated backend; bus locks are seen on both.",
            "takes kvm: ",
            "Nothing has",
        ),
        (FakeKvm(3), NO_UNICORN, "guests on KVM; bus locks are seen there.", "takes kvm: ", "Nothing has to be done."),
        (
            FakeKvm(0),
            None,
            "bus locks are seen only on the emulated backend.",
            "takes kvm, and where bus locks are needed emulated: /dev/kvm opens, but",
            "To see bus locks on KVM, use an Intel CPU",
        ),
        (
            FakeKvm(0),
            NO_UNICORN,
            "guests on KVM; bus locks can't be seen, exits can be limited.",
            "where bus locks are needed, it takes none.",
            "To see bus locks on KVM, use an Intel CPU",
        ),
        (
            NO_KVM,
            None,
            "guests on the emulated backend; bus locks are seen there.",
            "takes emulated: /dev/kvm does not exist.",
            "First of all, /dev/kvm: load the module.",
        ),
        (
            NO_KVM,
            NO_UNICORN,
            "This host can run no guest",
            "takes none: no backend here can run guests: kvm: /dev/kvm does not exist (load the module); emulated: ",
            'First of all, backend="auto": `pip install it`.',
        ),
    ],
)
def test_the_verdict_is_three_lines_what_it_can_what_auto_takes_and_what_to_do(look, kvm, unicorn, can, auto, todo):
    verdict = look(kvm=kvm, unicorn=unicorn).verdict
    first, second, third = verdict.lines
    assert can in first
    assert auto in second
    assert todo in third
    assert all("\n" not in line and line.endswith(".") and not line.endswith("..") for line in verdict.lines)


def test_what_the_doctor_says_is_what_is_picked_here(find):
    found = {finding.check: finding.value for finding in examine().findings}
    verdict = examine().verdict
    for check, asked, told in (
        ('backend="auto"', Asked(), verdict.auto),
        ('backend="auto", bus locks', Asked("bus_locks='require'"), verdict.auto_bus_locks),
    ):
        try:
            backend = choose("auto", asked)
            backend.close()
            picked = Pick(backend.name, backend.why)
        except BackendUnavailable as error:
            picked = Pick(None, str(error))
        assert told == picked
        assert found.get(check, "none") == (picked.name or "none")


@pytest.mark.parametrize(
    ("release", "cpu", "status"),
    [
        ("6.16.0", amd(), "ok"),
        ("6.15.9-1-amd64", amd(), "note"),
        ("7.0", amd(), "ok"),
        ("5.12.0", intel(), "ok"),
        ("5.11.22", intel(), "note"),
        ("strange", intel(), "note"),
    ],
)
def test_a_kernel_is_as_new_as_the_vendors_bus_lock_exits_need(find, release, cpu, status):
    finding = find("kernel", {**cpu, "proc/sys/kernel/osrelease": release})
    assert (finding.status, finding.value) == (status, release)


def test_the_cpu_is_named_and_must_be_one_of_the_two_vendors(find):
    assert find("CPU").value == "AMD, Test CPU 9"
    assert find("CPU", intel()).value == "Intel, Test CPU 9"
    assert find("CPU", {"proc/cpuinfo": "processor: 0\nBogoMIPS: 50\n"}).status == "problem"


def test_a_host_that_is_a_guest_itself_is_noted(find):
    assert find("virtualised").value == "no"
    finding = find("virtualised", amd("hypervisor"))
    assert (finding.status, finding.value) == ("note", "yes")


# ---- bus locks


@pytest.mark.parametrize(("cpu", "meaning"), [(amd(), "fault-like"), (intel(), "trap-like")])
def test_bus_lock_exits_mean_what_the_vendor_makes_of_them(find, cpu, meaning):
    finding = find("KVM_CAP_X86_BUS_LOCK_EXIT", cpu)
    assert (finding.status, finding.value) == ("ok", "3")
    assert meaning in finding.meaning


@pytest.mark.parametrize("bits", [0, 1])
def test_a_host_without_bus_lock_exits_is_told_what_still_works(find, bits):
    finding = find("KVM_CAP_X86_BUS_LOCK_EXIT", kvm=FakeKvm(bits))
    assert (finding.status, finding.value) == ("note", str(bits))
    assert '"require" refuses' in finding.meaning
    assert "its host must pass the feature on" in finding.remedy


def test_bus_lock_exits_without_kvm_are_unknown(find):
    assert find("KVM_CAP_X86_BUS_LOCK_EXIT", kvm=BackendUnavailable("no")).value == "unknown"


def test_the_cpus_own_flags_are_listed(find):
    assert find("CPU flags").value == "bus_lock_detect bus_lock_threshold"
    assert find("CPU flags", intel("split_lock_detect")).value == "split_lock_detect"
    finding = find("CPU flags", amd())
    assert (finding.status, finding.value) == ("note", "none")


def test_split_locks_that_put_vcpus_to_sleep_are_a_problem(find):
    for cmdline in ("quiet", "split_lock_detect=warn", "split_lock_detect=off split_lock_detect=warn"):
        finding = find("split_lock_detect", split_lock(cmdline))
        assert finding.status == "problem"
        assert "10 ms" in finding.meaning
        assert "never gets past the instruction" in finding.meaning
        assert "split_lock_mitigate=0" in finding.remedy
        assert find("kernel.split_lock_mitigate", split_lock(cmdline)).status == "problem"


def test_split_locks_that_are_only_logged_are_well(find):
    for check in ("split_lock_detect", "kernel.split_lock_mitigate"):
        assert find(check, split_lock("split_lock_detect=warn", "0")).status == "ok"


def test_split_locks_that_kill_the_process_are_a_problem(find):
    finding = find("split_lock_detect", split_lock("ro split_lock_detect=fatal", "0"))
    assert (finding.status, finding.value) == ("problem", "fatal")
    assert "SIGBUS" in finding.meaning
    assert "split_lock_detect=off" in finding.remedy


def test_rate_limited_split_locks_are_noted_with_what_a_noticed_one_does(find):
    finding = find("split_lock_detect", split_lock("split_lock_detect=ratelimit:100"))
    assert (finding.status, finding.value) == ("note", "ratelimit:100")
    assert "SIGBUS" in finding.meaning


def test_split_lock_detection_that_is_off_is_well_and_its_mitigation_idle(find):
    for check in ("split_lock_detect", "kernel.split_lock_mitigate"):
        assert find(check, split_lock("split_lock_detect=off")).status == "ok"


def test_an_unknown_setting_is_the_default_as_in_the_kernel(find):
    finding = find("split_lock_detect", split_lock("split_lock_detect=maybe"))
    assert (finding.status, finding.value) == ("problem", "warn (default; 'maybe' is no setting)")


def test_detection_that_can_act_on_host_programs_only_is_well(find):
    for cpu in (amd("bus_lock_detect"), intel("bus_lock_detect")):
        finding = find("split_lock_detect", {**cpu, "proc/cmdline": "split_lock_detect=fatal"})
        assert (finding.status, finding.value) == ("ok", "fatal")
        assert "host programs at most" in finding.meaning
    assert find("split_lock_detect", amd()).value.startswith("off")


def test_a_kernel_without_the_mitigation_switch_is_well(find):
    assert find("kernel.split_lock_mitigate", {"proc/sys/kernel/split_lock_mitigate": "rubbish"}).value == "absent"


# ---- what launching costs


def test_slow_starts_in_a_cgroup_are_noted_with_both_ways_out(find):
    slow = {
        "sys/module/kvm/parameters/nx_huge_pages": "Y",
        "proc/self/mountinfo": MOUNTS.format(options=""),
    }
    finding = find("kvm.nx_huge_pages", slow)
    assert (finding.status, finding.value) == ("note", "Y")
    assert "27 ms" in finding.meaning
    assert "favordynmods /sys/fs/cgroup" in finding.remedy
    assert "nx_huge_pages=never" in finding.remedy
    finding = find("cgroup favordynmods", slow)
    assert (finding.status, finding.value) == ("note", "off")


@pytest.mark.parametrize(
    ("nx", "mounts", "favordynmods"),
    [
        ("never", MOUNTS.format(options=""), "off"),
        ("Y", MOUNTS.format(options=",favordynmods"), "on"),
        ("Y", "22 1 0:20 / /proc rw - proc proc rw\nshort line\n", "no cgroups"),
    ],
)
def test_each_way_out_of_slow_starts_is_recognised(find, nx, mounts, favordynmods):
    files = {"sys/module/kvm/parameters/nx_huge_pages": nx, "proc/self/mountinfo": mounts}
    assert find("kvm.nx_huge_pages", files).status == "ok"
    finding = find("cgroup favordynmods", files)
    assert (finding.status, finding.value) == ("ok", favordynmods)


def test_a_cgroup_that_can_cap_is_named(find):
    assert find("CPU caps by cgroup").value.endswith("/sys/fs/cgroup/system.slice/fleet.service")


@pytest.mark.parametrize(
    ("files", "value", "remedy"),
    [
        ({"sys/fs/cgroup/system.slice/fleet.service/cgroup.subtree_control": ""}, "hand on the cpu", "echo +cpu"),
        ({"proc/self/cgroup": "0::/gone\n"}, "no cgroup of version 2", "name the version-2 cgroup"),
        ({"proc/self/cgroup": "4:cpu:/\n"}, "no cgroup of version 2", "unified_cgroup_hierarchy"),
    ],
)
def test_what_keeps_the_kernel_from_capping_is_a_note_with_a_remedy(find, files, value, remedy):
    finding = find("CPU caps by cgroup", files)
    assert finding.status == "note"
    assert value in finding.value
    assert remedy in finding.remedy


@pytest.mark.parametrize(
    ("allowed", "capabilities", "status", "value"),
    [
        ("23", "0000000000000000", "ok", "nice -3 (RLIMIT_NICE 23)"),
        ("0", "0000000000800000", "ok", "nice -3 (CAP_SYS_NICE)"),
        ("22", "ffffffffff7fffff", "note", "nice 0 (no CAP_SYS_NICE; RLIMIT_NICE 22, hard limit 22)"),
        ("rubbish", "rubbish", "note", "nice 0 (no CAP_SYS_NICE; RLIMIT_NICE 0, hard limit rubbish)"),
    ],
)
def test_whether_the_event_loop_may_run_before_guests(find, allowed, capabilities, status, value):
    files = limits("Max nice priority", allowed) | {"proc/self/status": f"CapEff:\t{capabilities}\n"}
    finding = find("event loop's priority", files)
    assert (finding.status, finding.value) == (status, value)
    assert ("ulimit -e 23" in finding.remedy and "LimitNICE=-3" in finding.remedy) == (status != "ok")


# ---- limits


def limits(name, soft):
    return {"proc/self/limits": f"{LIMITS}{name:<25} {soft:<20} {soft:<20} units\n"}


@pytest.mark.parametrize(
    ("soft", "status", "room"),
    [
        ("64", "problem", "about 8 "),
        ("8", "problem", "about 0 "),
        ("1024", "note", "about 248 "),
        ("4032", "ok", "about 1000 "),
    ],
)
def test_open_files_are_counted_in_vms(find, soft, status, room):
    finding = find("RLIMIT_NOFILE", limits("Max open files", soft))
    assert finding.status == status
    assert room in finding.meaning
    assert ("ulimit -n" in finding.remedy) == (status != "ok")


@pytest.mark.parametrize(("soft", "status"), [("5", "problem"), ("500", "note"), ("4000", "ok"), ("unlimited", "ok")])
def test_the_process_limit_bounds_vcpu_threads(find, soft, status):
    assert find("RLIMIT_NPROC", limits("Max processes", soft)).status == status


def test_limits_that_cannot_be_read_are_no_problem(find):
    (nofile, nproc) = (find(name, {"proc/self/limits": "rubbish"}) for name in ("RLIMIT_NOFILE", "RLIMIT_NPROC"))
    assert nofile.status == nproc.status == "ok"
    assert "unknown" in nofile.value


@pytest.mark.parametrize(("most", "status"), [("9", "problem"), ("800", "note"), ("30000", "ok"), ("rubbish", "note")])
def test_the_hosts_thread_limit_bounds_vcpus(find, most, status):
    assert find("kernel.threads-max", {"proc/sys/kernel/threads-max": most}).status == status


@pytest.mark.parametrize(
    ("leaf", "above", "status", "value"), [("max", "50", "note", "50"), ("7", "5000", "problem", "7")]
)
def test_the_tightest_pids_limit_of_the_cgroups_counts(find, leaf, above, status, value):
    files = {
        "sys/fs/cgroup/system.slice/fleet.service/pids.max": leaf,
        "sys/fs/cgroup/system.slice/pids.max": above,
    }
    finding = find("cgroup pids.max", files)
    assert (finding.status, finding.value) == (status, value)
    assert "TasksMax" in finding.remedy


def test_cgroups_of_version_1_are_understood(find):
    files = {
        "proc/self/cgroup": "9:pids:/box\n4:memory:/box\nrubbish\n",
        "proc/self/mountinfo": (
            "39 31 0:36 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n"
            "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        ),
        "sys/fs/cgroup/pids/box/pids.max": "400",
        "sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(512 << 20),
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    assert find("cgroup pids.max", files).value == "400"
    assert find("cgroup memory.max", files).value == "0.5 GiB"


@pytest.mark.parametrize(("kib", "status"), [("100000", "problem"), ("8000000", "ok")])
def test_memory_that_is_available_is_reported(find, kib, status):
    assert find("memory available", {"proc/meminfo": f"MemAvailable:   {kib} kB\n"}).status == status


def test_memory_that_cannot_be_read_is_noted(find):
    assert find("memory available", {"proc/meminfo": "rubbish"}).value == "unknown"


@pytest.mark.parametrize(("limit", "status"), [(1 << 20, "problem"), (1 << 33, "note")])
def test_a_cgroups_memory_limit_is_what_the_guests_must_fit_in(find, limit, status):
    finding = find("cgroup memory.max", {"sys/fs/cgroup/system.slice/fleet.service/memory.max": str(limit)})
    assert finding.status == status
    assert "killed" in finding.meaning


@pytest.mark.parametrize(("mode", "status"), [("0", "ok"), ("1", "ok"), ("2", "note"), ("rubbish", "ok")])
def test_strict_overcommit_is_noted(find, mode, status):
    assert find("vm.overcommit_memory", {"proc/sys/vm/overcommit_memory": mode}).status == status


@pytest.mark.parametrize(("most", "status"), [("30", "problem"), ("3000", "note"), ("65530", "ok"), ("x", "note")])
def test_mappings_are_counted_in_vms(find, most, status):
    assert find("vm.max_map_count", {"proc/sys/vm/max_map_count": most}).status == status


# ---- software


@pytest.mark.parametrize(("text", "value"), [("", "missing"), ("#define KVM_CAP_IRQCHIP 0", "too old")])
def test_headers_that_cannot_build_orchestra_are_noted(find, text, value):
    finding = find("kernel headers", {"usr/include/linux/kvm.h": text})
    assert (finding.status, finding.value) == ("note", value)
    assert finding.remedy


def test_extras_that_are_not_installed_are_noted_with_the_command(find):
    finding = find("extra cli", importable=lambda name: name != "rich")
    assert (finding.status, finding.value, finding.remedy) == (
        "note",
        "rich missing",
        "`pip install 'orchestra-kvm[cli]'`",
    )


def test_extras_that_are_installed_are_looked_up_where_python_looks(tmp_path):
    found = {finding.check: finding.status for finding in examine(tmp_path).findings}
    assert {f"extra {extra}" for extra in doctor.software.EXTRAS} <= set(found)


def test_storage_daemon_is_found_or_named_with_its_package(tmp_path):
    def found() -> doctor.Finding:
        return next(finding for finding in examine(tmp_path).findings if finding.check == "qcow2 disks")

    assert (found().status, found().value) == ("note", "qemu-storage-daemon missing")
    assert "qemu-system-common" in (found().remedy or "")
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/qemu-storage-daemon").touch()
    assert (found().status, found().value) == ("ok", "/usr/bin/qemu-storage-daemon")


def test_the_doctor_knows_every_extra_that_a_user_can_install():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    for_developers = {"test", "lint", "types", "docs", "dev"}
    assert set(project["optional-dependencies"]) - for_developers == set(doctor.software.EXTRAS), (
        "add it to EXTRAS in doctor/software.py"
    )


# ---- Linux guests


def test_host_whose_kvm_gives_the_features_can_run_linux(find):
    finding = find("Linux guests")
    assert (finding.status, finding.value) == ("ok", "yes")


def test_kvm_that_lacks_features_that_linux_needs_is_named_with_them(find):
    without = [attrs.evolve(ALL_BITS[0], edx=0xFFFF_FFFF & ~(1 << 25 | 1 << 26)), ALL_BITS[1]]
    finding = find("Linux guests", kvm=FakeKvm(3, without))
    assert (finding.status, finding.value) == ("note", "no")
    assert finding.meaning.endswith(": sse, sse2")
    assert "VT-x or AMD-V" in finding.remedy


def test_without_kvm_no_linux_can_run(find):
    finding = find("Linux guests", kvm=NO_KVM)
    assert (finding.status, finding.value) == ("note", "no")


def test_kvm_that_interprets_guests_is_too_slow_for_linux(find):
    finding = find("Linux guests", {"proc/cpuinfo": CPUINFO.format(vendor="AuthenticAMD", flags="").replace("svm", "")})
    assert (finding.status, finding.value) == ("note", "hardly")
    assert "interprets" in finding.meaning


# ---- CPU templates


def test_cpu_templates_that_vms_can_have_are_named_with_what_the_next_one_lacks(find):
    finding = find("CPU templates")
    assert (finding.status, finding.value) == ("ok", "host, x86-64-v2")
    assert finding.meaning.endswith("for x86-64-v3 this host's KVM lacks avx2, bmi1, bmi2")
    every = [CpuidEntry(function=7, flags=1, ebx=0xFFFF_FFFF, ecx=0xFFFF_FFFF, edx=0xFFFF_FFFF)]
    extended = CpuidEntry(function=0xD, index=1, eax=0xF)
    finding = find("CPU templates", kvm=FakeKvm(3, [*ALL_BITS, *every, extended]))
    assert (finding.status, finding.value) == ("ok", "host, x86-64-v2, x86-64-v3, x86-64-v4, cloud-v3")


def test_cpu_templates_are_not_told_where_there_is_no_kvm(look):
    assert not [finding for finding in look(kvm=NO_KVM).findings if finding.check == "CPU templates"]
