"""The pytest plugin, in test-suites of its own: each test here writes one and runs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

STRICT_INI = """
[pytest]
addopts = --strict-markers --strict-config
filterwarnings = error
"""
INI = STRICT_INI + "trio_mode = true\n"
IMPORTS = """
import pytest
import trio
import orchestra as orc
from orchestra import testing
"""


# An installation that lists the whole tree as the plugin's makes pytest want to rewrite what this process has imported.
QUIET = ("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning")


@pytest.fixture
def suite(pytester: pytest.Pytester):
    """Runs a test-suite of one module, in trio mode unless told otherwise."""

    def run(module: str, *arguments: str, ini: str = INI, conftest: str = "") -> pytest.RunResult:
        pytester.makeini(ini)
        pytester.makepyfile(IMPORTS + module)
        if conftest:
            pytester.makeconftest(conftest)
        return pytester.runpytest("-p", "no:cacheprovider", *QUIET, *arguments)

    return run


# ---- it costs nothing to those who don't use it


def test_loading_the_plugin_loads_nothing_else():
    code = "import sys, pytest; before = {*sys.modules}; import pytest_orchestra; print(*{*sys.modules} - before)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "pytest_orchestra" in loaded
    assert {name.partition(".")[0] for name in loaded} <= {"pytest_orchestra"} | sys.stdlib_module_names


def test_a_suite_that_does_not_use_it_does_not_load_orchestra(pytester):
    pytester.makepyfile("import sys\ndef test_it():\n    assert 'orchestra' not in sys.modules")
    pytester.runpytest_subprocess("-p", "no:trio").assert_outcomes(passed=1)


def test_what_it_has_is_shown(suite):
    suite("", "--markers").stdout.fnmatch_lines(["@pytest.mark.orchestra(*options of the fixture orchestra_fleet*"])
    suite("", "--help").stdout.fnmatch_lines(["*--orchestra-backend=NAME*"])
    fixtures = suite("", "--fixtures").stdout
    for name in ("options", "backend", "clock", "fleet"):
        fixtures.fnmatch_lines([f"orchestra_{name} -- *pytest_orchestra.py:*"])


# ---- the fleet


THE_FLEET = """
async def test_hours(orchestra_fleet):
    vm = await orchestra_fleet.launch(testing.split_locking(rate=1, limit=orc.Limit(rate=0.1, burst=2)))
    await trio.sleep(3 * 3600.0)
    assert vm.throttled
    assert vm.statistics().bus_locks == pytest.approx(1080, abs=2)

async def test_each_has_its_own(orchestra_fleet):
    assert dict(orchestra_fleet.vms) == {}
    assert trio.current_time() == 0
"""


def test_the_fleet_is_open_and_in_virtual_time(suite):
    suite(THE_FLEET).assert_outcomes(passed=2)


def test_the_fleet_is_there_in_strict_mode_for_marked_tests(suite):
    suite("pytestmark = pytest.mark.trio\n" + THE_FLEET, ini=STRICT_INI).assert_outcomes(passed=2)


def test_the_fleet_is_closed_after_the_test_even_if_that_fails(suite):
    result = suite(
        """
        fleets = []

        async def test_that_fails(orchestra_fleet):
            fleets.append(orchestra_fleet)
            await orchestra_fleet.launch(testing.spinning())
            assert 0 == 1

        async def test_that_looks():
            assert fleets[0].statistics().launched == 1
            with pytest.raises(orc.StateError, match="closing"):
                await fleets[0].launch(testing.spinning())
        """.replace("\n        ", "\n")
    )
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*assert 0 == 1"])


def test_fixtures_that_depend_on_the_fleet_are_in_virtual_time_too(suite):
    module = """
@pytest.fixture
async def vm(orchestra_fleet, nursery):
    nursery.start_soon(trio.sleep, 1e6)
    return await orchestra_fleet.launch(testing.halting(after=1000))

async def test_it(vm):
    assert await vm.wait() == orc.Halted()
    assert trio.current_time() == 1000
"""
    suite(module).assert_outcomes(passed=1)


def test_a_test_can_have_the_clock_or_one_of_pytest_trio(suite):
    module = """
async def test_ours(orchestra_fleet, orchestra_clock):
    assert trio.lowlevel.current_clock() is orchestra_clock
    orchestra_clock.jump(5)
    assert trio.current_time() == 5

async def test_by_hand(orchestra_fleet, mock_clock):
    vm = await orchestra_fleet.launch(testing.halting(after=10))
    assert trio.lowlevel.current_clock() is mock_clock
    await trio.testing.wait_all_tasks_blocked()
    mock_clock.jump(10)
    assert await vm.wait() == orc.Halted()
"""
    suite(module).assert_outcomes(passed=2)


def test_a_runner_of_the_tests_own_is_kept(suite):
    module = """
runs = []

def run(*args, **options):
    runs.append(options["clock"])
    return trio.run(*args, **options)

@pytest.mark.trio(run=run)
async def test_it(orchestra_fleet, request):
    assert trio.lowlevel.current_clock() in runs
    await trio.sleep(1e6)
"""
    suite(module, ini=STRICT_INI).assert_outcomes(passed=1)


# ---- options


def test_markers_set_options_and_the_nearest_counts(suite):
    module = """
pytestmark = pytest.mark.orchestra(limit=orc.Limit(rate=7), tenants={"acme": None})

@pytest.mark.orchestra(limit=orc.Limit(rate=8))
class TestIt:
    async def test_class(self, orchestra_fleet):
        assert orchestra_fleet.limit == orc.Limit(rate=8)
        assert "acme" in orchestra_fleet.tenants

    @pytest.mark.orchestra(limit=None, exit_limit=orc.Limit(rate=9))
    async def test_function(self, orchestra_fleet):
        assert orchestra_fleet.limit is None
        assert orchestra_fleet.exit_limit == orc.Limit(rate=9)
        assert "acme" in orchestra_fleet.tenants

@pytest.mark.parametrize("most", [pytest.param(8, marks=pytest.mark.orchestra(limit=orc.Limit(rate=8))), 7])
async def test_parameter(orchestra_fleet, most):
    assert orchestra_fleet.limit == orc.Limit(rate=most)
"""
    suite(module).assert_outcomes(passed=4)


def test_the_backend_has_its_options(suite):
    module = """
@pytest.mark.orchestra(detection=None, scripts={"own": [testing.bus_lock(), testing.triple_fault()]})
async def test_it(orchestra_fleet):
    vm = await orchestra_fleet.launch(orc.VmSpec(name="own", boot=orc.FlatImage(code=b"abc")))
    assert isinstance(await vm.wait(), orc.Shutdown)
    assert vm.statistics().bus_locks is None
"""
    suite(module).assert_outcomes(passed=1)


def test_fixtures_can_be_overridden(suite):
    conftest = """
import pytest
import orchestra as orc

@pytest.fixture
def orchestra_options(orchestra_options):
    return {"limit": orc.Limit(rate=5), **orchestra_options}

@pytest.fixture
def orchestra_backend():
    return orc.ScriptedBackend()
"""
    module = """
async def test_default(orchestra_fleet):
    assert orchestra_fleet.limit == orc.Limit(rate=5)
    vm = await orchestra_fleet.launch(testing.spinning())
    assert await vm.wait() == orc.Halted()  # as a plain ScriptedBackend has it
    await trio.sleep(1e6)

@pytest.mark.orchestra(limit=None)
async def test_marked(orchestra_fleet):
    assert orchestra_fleet.limit is None
"""
    suite(module, conftest=conftest).assert_outcomes(passed=2)


def test_a_policy_that_raises_fails_the_test_unless_told_otherwise(suite):
    module = """
class Broken:
    name, interval = "broken", 1.0
    def decide(self, facts):
        raise ZeroDivisionError("a bug in a policy")

@pytest.mark.orchestra(policies=[Broken()])
async def test_strict(orchestra_fleet):
    await orchestra_fleet.launch(testing.quiet())
    await trio.sleep(10)

@pytest.mark.orchestra(policies=[Broken()], strict=False)
async def test_as_in_production(orchestra_fleet):
    await orchestra_fleet.launch(testing.quiet())
    await trio.sleep(10)
    assert "ZeroDivisionError" in orchestra_fleet.actions()[-1].error
"""
    result = suite(module)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*a bug in a policy*"])
    result.stdout.no_fnmatch_line("*cancelled the test but didn't raise an error*")


@pytest.mark.kvm
def test_the_same_tests_run_on_real_guests(suite):
    module = """
async def test_it(orchestra_fleet, orchestra_clock):
    assert orchestra_fleet.backend.name == "kvm"
    assert orchestra_clock is None
    vm = await orchestra_fleet.launch(testing.halting(after=0.05))
    assert await vm.wait() == orc.Halted()
"""
    suite(module, "--orchestra-backend=kvm").assert_outcomes(passed=1)
    suite("pytestmark = pytest.mark.orchestra(backend='kvm')\n" + module).assert_outcomes(passed=1)


# ---- mistakes


def test_without_pytest_trio_the_remedy_is_named(suite):
    module = """
async def test_it(orchestra_fleet):
    pass

def test_of_another_kind():
    pass
"""
    result = suite(module, "-p", "no:trio", ini=STRICT_INI)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*need pytest-trio*pip install 'orchestra-kvm[[]testing]'*"])


@pytest.mark.parametrize("prefix", ["async ", ""])
def test_a_test_that_is_not_trios_is_told_how_to_be(suite, prefix):
    result = suite(prefix + "def test_it(orchestra_fleet):\n    pass\n", ini=STRICT_INI)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*mark it @pytest.mark.trio or set trio_mode = true*"])


def test_a_marker_without_names_is_refused(suite):
    result = suite("@pytest.mark.orchestra(3)\nasync def test_it(orchestra_fleet):\n    pass\n")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*@pytest.mark.orchestra takes options by name*"])


def test_an_option_that_no_fleet_has_is_named(suite):
    result = suite("@pytest.mark.orchestra(speed=3)\nasync def test_it(orchestra_fleet):\n    pass\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*open_fleet() takes no 'speed'*"])
