"""The checks of this project, each in an environment of its own: `nox -l` lists them, `nox -s NAME` runs one.

`./dev test`, `./dev lint` and `./dev types` run the three daily ones in a single environment, and faster.
"""

from __future__ import annotations

import os
import shlex
import subprocess

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


def _runs(interpreter: str) -> bool:
    """Whether it is there and runs: a version manager's shim is found on the path, and may still refuse."""
    try:
        subprocess.run([interpreter, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


PYTHONS = [version for version in ("3.11", "3.12", "3.13", "3.14") if _runs(f"python{version}")]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test-suite with coverage, on each Python found."""
    # Editable: the extension module uses the stable ABI, so the one built in the tree serves every session.
    session.install("-e", ".[test]")
    session.run("pytest", "--cov", "--cov-report=term-missing", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Rules and format, by ruff."""
    session.install("ruff>=0.9")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the library and the examples, by mypy --strict."""
    session.install("-e", ".[cli,simulate,testing,types]")
    session.run("mypy", "--strict", *(session.posargs or ("orchestra", "examples", "pytest_orchestra.py")))


@nox.session(venv_backend="none")
def native(session: nox.Session) -> None:
    """The C core's own tests under the address, undefined-behaviour and thread sanitizers."""
    session.run("make", "-C", "orchestra/native/tests", *(session.posargs or ("asan", "ubsan", "tsan")), external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, as one table of ratios. Wants a quiet machine."""
    session.install("-e", ".[cli,plot]")
    session.run("python", "-m", "benchmarks", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with every warning an error."""
    session.install("-e", ".[docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", "docs/_build/html", *session.posargs)


@nox.session
def kvmhost(session: nox.Session) -> None:
    """The tests that need a host which reports bus locks, through the launcher named by ORCHESTRA_KVMHOST.

    The launcher is a command that takes `-- COMMAND...` and runs it on such a host, seeing these same files.
    """
    launcher = os.environ.get("ORCHESTRA_KVMHOST")
    if not launcher:
        session.skip("ORCHESTRA_KVMHOST is not set; on a host that reports bus locks `pytest -m buslock` needs none")
    session.install("-e", ".[test]")
    python = f"{session.bin}/python"  # by its path: a launcher knows nothing of this environment's PATH
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider", "-m", "buslock", *(session.posargs or ("tests",)))
    session.run(*shlex.split(launcher), "--", *pytest, external=True)


@nox.session
def changelog(session: nox.Session) -> None:
    """How the changelog fragments will read; with a branch as argument, that the work since then has one."""
    session.install("towncrier>=24.8")
    session.run("towncrier", "build", "--draft", "--version", "next")
    if session.posargs:
        session.run("towncrier", "check", "--compare-with", *session.posargs)
