"""Unicorn missing, old, broken, or lacking something: each in a Python of its own that finds it so, for real."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from isolation import other_python, run, site_packages
from orchestra.backend.emulated import library

INSTALL = "`pip install 'orchestra-kvm[emulated]'`"
UPGRADE = "`pip install --upgrade unicorn`"
REINSTALL = "`pip install --force-reinstall unicorn==2.1.4`"
LOAD = """
from orchestra.backend import choose
from orchestra.model.errors import BackendUnavailable
try:
    choose("emulated").close()
except BackendUnavailable as error:
    print(error)
else:
    print("it loads")
"""


class Installation:
    """A Python with all of this one's packages but unicorn; `said` is what it says when the backend is chosen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python, self.environment = other_python(folder, without=["unicorn"])

    def claim(self, version: str) -> None:
        """What pip leaves to say that it is installed."""
        info = self.folder / f"unicorn-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: unicorn\nVersion: {version}\n")

    def copy(self) -> Path:
        """The real thing, with a library that may be written to; returns its path."""
        self.claim(library.version() or "")
        package = self.folder / "unicorn"
        shutil.copytree(site_packages() / "unicorn", package, ignore=shutil.ignore_patterns("*.a", "include"))
        return package / "lib" / "libunicorn.so.2"

    def said(self) -> str:
        done = run([*self.python, "-c", LOAD], self.environment)
        assert (done.returncode, done.stderr) == (0, "")
        (line,) = done.stdout.splitlines()
        return line


@pytest.fixture
def installation(tmp_path):
    yield Installation(tmp_path)
    shutil.rmtree(tmp_path)  # pytest keeps what is left, and the library is large


def test_missing(installation):
    assert installation.said() == f"backend='emulated': unicorn is not installed: {INSTALL}"


@pytest.mark.parametrize("version", ["1.0.3", "2.0.1.post1", "2.1.1"])
def test_too_old(version, installation):
    installation.claim(version)
    problem = f"unicorn {version} is too old, it must be 2.1.2 at least"
    assert installation.said() == f"backend='emulated': {problem}: {INSTALL}"


@pytest.mark.parametrize("version", ["2.1.2", "2.2.0rc1", "3.0"])
def test_installed_by_its_metadata_alone(version, installation):
    installation.claim(version)
    said = installation.said()
    assert said.startswith(f"backend='emulated': unicorn {version} can't be imported (No module named 'unicorn'")
    assert said.endswith(f": {REINSTALL}")


def test_bindings_that_raise_something_at_import(installation):
    installation.copy()
    (installation.folder / "unicorn" / "__init__.py").write_text("raise AttributeError('several\\nlines')\n")
    assert f"can't be imported (several lines): {REINSTALL}" in installation.said()


@pytest.mark.emulated
def test_the_copy_that_the_others_break_loads(installation):
    installation.copy()
    assert installation.said() == "it loads"


@pytest.mark.emulated
@pytest.mark.parametrize("content", [b"", b"not a library", None], ids=["empty", "text", "cut short"])
def test_a_library_that_is_broken(content, installation):
    path = installation.copy()
    path.write_bytes(path.read_bytes()[: 1 << 20] if content is None else content)
    said = installation.said()
    assert re.match(r"backend='emulated': unicorn \S+ (can't be imported \(|at )", said)
    assert said.endswith(f": {REINSTALL}")


@pytest.mark.emulated
def test_a_library_that_the_bindings_load_and_the_core_can_not(installation):
    path = installation.copy()
    bindings = installation.folder / "unicorn" / "unicorn_py3" / "unicorn.py"
    broken = path.with_name("broken.so")
    broken.touch()
    with bindings.open("a") as file:
        file.write(f"\nuclib._name = {str(broken)!r}\n")
    said = installation.said()
    assert f"at {broken}: " in said
    assert "file too short" in said
    assert said.endswith(f": {REINSTALL}")


@pytest.mark.emulated
def test_a_library_without_a_function(installation):
    path = installation.copy()
    # Renamed among its symbols, to what has the same hash (33 * "t" + "e" = 33 * "u" + "D"), so that it is still whole.
    old, new = "uc_vmem_translate", "uc_vmem_translauD"
    whole = path.read_bytes()
    assert b"\0%s\0" % old.encode() in whole
    path.write_bytes(whole.replace(b"\0%s\0" % old.encode(), b"\0%s\0" % new.encode()))
    bindings = installation.folder / "unicorn" / "unicorn_py3" / "unicorn.py"
    bindings.write_text(bindings.read_text().replace(f"'{old}'", f"'{new}'"))  # else they would tell first
    said = installation.said()
    assert said == f"backend='emulated': unicorn {library.version()} at {path}: it has no {old}: {REINSTALL}"


@pytest.mark.emulated
def test_bindings_without_a_constant(installation):
    installation.copy()
    constants = installation.folder / "unicorn" / "unicorn_const.py"
    constants.write_text(constants.read_text().replace("UC_CTL_TCG_BUFFER_SIZE", "UC_CTL_SOMETHING_ELSE"))
    said = installation.said()
    assert said == f"backend='emulated': unicorn {library.version()} has no UC_CTL_TCG_BUFFER_SIZE: {UPGRADE}"


@pytest.mark.emulated
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_a_library_that_keeps_the_cpu_state_otherwise(installation):
    """In front of the real one, a library that saves contexts with all bits turned over."""
    path = installation.copy()
    real = path.with_name("libunicorn.so.9")  # its own name, else the other one would be found by it
    real.write_bytes(path.read_bytes().replace(b"\0libunicorn.so.2\0", b"\0libunicorn.so.9\0"))
    path.unlink()
    source = installation.folder / "other.c"
    source.write_text(
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        #include <stddef.h>
        int uc_context_save(void *uc, void *context)
        {
            int (*save)(void *, void *) = dlsym(RTLD_NEXT, "uc_context_save");
            size_t (*size)(void *) = dlsym(RTLD_NEXT, "uc_context_size");
            int result = save(uc, context);
            for (size_t i = 64; i < size(uc); i++)
                ((unsigned char *)context)[i] ^= 0xff;
            return result;
        }
        """
    )
    linked = [str(source), "-Wl,--no-as-needed", str(real), f"-Wl,-rpath,{path.parent}"]
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), *linked], check=True)
    said = installation.said()
    assert "its CPU state" in said
    assert said.endswith(f": {REINSTALL}")


@pytest.mark.emulated
def test_the_command_line_says_the_same_in_one_line(installation):
    installation.claim("2.0.0")
    done = run([*installation.python, "-m", "orchestra", "demo", "--backend", "emulated"], installation.environment)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"orchestra: backend='emulated': unicorn 2.0.0 is too old, it must be 2.1.2 at least: {INSTALL}\n"
    )
