"""The pytest plugin of `orchestra.testing`: a fleet for each test, in virtual time. See docs/testing.md.

pytest loads this module in every run, whatever is tested. So it stands outside of the package and imports nothing of it
before a fixture is asked for: `import orchestra` takes its time, and lines that run before the measuring of coverage
begins do not count as covered.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from trio.testing import MockClock

    from orchestra import Fleet
    from orchestra.backend import Backend

MARKER = (
    "orchestra(**options): options of the fixture orchestra_fleet: those of orchestra.open_fleet, and scripts= and "
    "detection= of orchestra.testing.backend. Of several markers the one nearest to the test counts, for each option."
)
SCRIPTED = ("scripts", "detection")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("orchestra").addoption(
        "--orchestra-backend",
        metavar="NAME",
        default="scripted",
        help='where the fixture orchestra_fleet runs guests: "scripted" (default: in virtual time), "kvm", "emulated" '
        'or "auto"',
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)


@pytest.fixture
def orchestra_options(request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The options of the marker `orchestra`. Override it for defaults of your own, and for what each test needs new,
    such as policies."""
    options: dict[str, Any] = {}
    for marker in request.node.iter_markers("orchestra"):  # the nearest comes first
        if marker.args:
            raise pytest.UsageError(f"{request.node.nodeid}: @pytest.mark.orchestra takes options by name: limit=...")
        options = {**marker.kwargs, **options}
    return options


@pytest.fixture
def orchestra_backend(request: pytest.FixtureRequest, orchestra_options: Mapping[str, Any]) -> Backend | str:
    """Where `orchestra_fleet` runs guests: a scripted backend that knows the ready guests, unless the marker's
    ``backend=`` or the command line's ``--orchestra-backend`` names another."""
    backend: Backend | str = orchestra_options.get("backend", request.config.getoption("orchestra_backend"))
    if backend != "scripted":
        return backend
    from orchestra import testing

    return testing.backend(**{name: orchestra_options[name] for name in SCRIPTED if name in orchestra_options})


@pytest.fixture
def orchestra_clock(request: pytest.FixtureRequest, orchestra_backend: Backend | str) -> MockClock | None:
    """The clock of the test's trio run: it jumps over all waiting. None for real guests, which take real time.

    A test that asks for pytest-trio's ``mock_clock`` or ``autojump_clock`` has that one.
    """
    node, plugins = request.node, request.config.pluginmanager
    if not (plugins.hasplugin("trio") or plugins.hasplugin("pytest_trio.plugin")):
        from orchestra.model.extras import install

        pytest.fail(
            f"orchestra's fixtures need pytest-trio, which is not there: {install('testing')}. Without it, "
            "use orchestra.testing.run() and orchestra.open_fleet(backend=orchestra.testing.backend())",
            pytrace=False,
        )
    if node.get_closest_marker("trio") is None:
        pytest.fail(
            "orchestra's fixtures are for async tests of pytest-trio: make it `async def`, and mark it "
            "@pytest.mark.trio or set trio_mode = true",
            pytrace=False,
        )
    from pytest_trio.plugin import choose_run  # type: ignore[import-untyped]
    from trio.testing import MockClock

    from orchestra import ScriptedBackend

    if not isinstance(orchestra_backend, ScriptedBackend):
        return None
    clock = MockClock(autojump_threshold=0)
    # pytest-trio takes a clock from the test's own parameters only, not from what its fixtures depend on. But the
    # function that runs the test can be chosen, and that is given the clock.
    runs = (marker.kwargs.get("run") for marker in node.iter_markers("trio"))
    chosen: Callable[..., Any] = next(filter(None, runs), None) or choose_run(request.config)

    def run(*args: Any, **options: Any) -> Any:
        return chosen(*args, **{**options, "clock": options.get("clock") or clock})

    node.add_marker(pytest.mark.trio(run=run), append=False)
    return clock


@pytest.fixture
async def orchestra_fleet(
    orchestra_options: Mapping[str, Any], orchestra_backend: Backend | str, orchestra_clock: MockClock | None
) -> AsyncIterator[Fleet]:
    """An open fleet. It is ``strict`` unless told otherwise: a policy that raises fails the test."""
    from orchestra import open_fleet

    options = {name: value for name, value in orchestra_options.items() if name not in ("backend", *SCRIPTED)}
    async with open_fleet(backend=orchestra_backend, **{"strict": True, **options}) as fleet:
        yield fleet
