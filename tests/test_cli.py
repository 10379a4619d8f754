"""The program as a whole: its ways in, and what it says to those who get it wrong."""

from __future__ import annotations

import ast
import inspect
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import orchestra
from orchestra import __main__ as program
from orchestra.cli import app
from orchestra.demo import guests
from orchestra.model.errors import KvmError, SpecError
from orchestra.output.numbers import parse_rate, parse_seconds, parse_size, shown, tidy

CLI = Path(app.__file__).parent


# ---- ways in


def test_version_names_the_program_and_exits_with_0(capsys):
    assert app.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("orchestra")


def test_nothing_at_all_shows_the_commands(capsys):
    assert app.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "run", "doctor"))


@pytest.mark.parametrize("command", ["demo", "run", "doctor"])
def test_each_command_has_help_that_names_its_options(command, capsys):
    assert app.main([command, "--help"]) == 0
    assert "--json" in capsys.readouterr().out


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "orchestra", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("orchestra")
    assert done.stderr == ""


@pytest.mark.parametrize("library", ["cyclopts", "rich"])
def test_without_the_extra_one_line_says_which_command_installs_it(library, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("app", "render"):
        monkeypatch.delitem(sys.modules, f"orchestra.cli.{name}", raising=False)
        monkeypatch.delattr(orchestra.cli, name, raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    assert program.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"orchestra: the command line needs {library}: pip install 'orchestra-kvm[cli]'\n"


@pytest.mark.parametrize(("library", "module"), [("cyclopts", "app"), ("rich", "render")])
def test_each_library_has_one_module_that_imports_it(library, module):
    importers = set()
    for path in CLI.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            if any(name.partition(".")[0] == library for name in names):
                importers.add(path.relative_to(CLI.parent).as_posix())
    assert importers == {f"cli/{module}.py"}


# ---- mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["demo", "--nonsense"],
        ["demo", "--vms", "many"],
        ["demo", "--vms", "0"],
        ["demo", "--vms", "1001"],
        ["demo", "--noisy", "0"],
        ["demo", "--vms", "2", "--noisy", "3"],
        ["demo", "--limit", "-1"],
        ["demo", "--limit", "0"],
        ["demo", "--limit", "nan"],
        ["demo", "--limit", "9999999999"],
        ["demo", "--seconds", "0"],
        ["demo", "--seconds", "0.01"],
        ["demo", "--seconds", "inf"],
        ["demo", "--backend", "nonsense"],
        ["run"],
        ["run", "a", "b"],
        ["doctor", "--json=nonsense"],
    ],
)
def test_a_mistake_is_one_line_and_exits_with_2(arguments, capsys):
    assert app.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("orchestra: ")
    assert err.count("\n") == 1


class FailingApp:
    """In the place of cyclopts': any command line fails in that way."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def parse_args(self, *_, **__):
        return self.fail, inspect.signature(lambda: None).bind(), {}

    def fail(self):
        raise self.error


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (SpecError("vcpus=0"), 2, "orchestra: vcpus=0\n"),
        (KvmError("no room"), 1, "orchestra: no room\n"),
        (ExceptionGroup("", [ExceptionGroup("", [SpecError("deep")])]), 2, "orchestra: deep\n"),
        (OSError(28, "No space left on device"), 1, "orchestra: No space left on device\n"),
        (OSError(28, "No space", "f"), 1, "orchestra: f: No space\n"),
        (KeyboardInterrupt(), 130, ""),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), 130, ""),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_what_goes_wrong_below_becomes_a_line_and_a_status(error, status, said, monkeypatch, capsys):
    monkeypatch.setattr(app, "app", FailingApp(error))
    assert app.main([]) == status
    assert capsys.readouterr().err == said


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(app, "app", FailingApp(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        app.main([])


def test_running_it_twice_leaves_one_log_handler(capsys):
    app.main(["--version"])
    before = list(logging.getLogger("orchestra").handlers)
    app.main(["--version"])
    assert logging.getLogger("orchestra").handlers == before


def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "orchestra", "doctor", "--json"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr == "orchestra: No space left on device\n"


def test_a_closed_standard_output_is_not_written_to_by_its_number():
    code = "import os; os.close(1); from orchestra.cli.app import main; main(['--version']); os.fstat(1); os.fstat(2)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- numbers


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("4096", 4096), ("0x1000", 4096), ("0XfF", 255), ("16M", 16 << 20), ("0x10k", 16384)]
)
def test_sizes_are_read(text, number):
    assert parse_size(text) == number


@pytest.mark.parametrize(("text", "rate"), [("500", 500), ("0.5", 0.5), ("20K", 20_000), ("1.5m", 1.5e6), ("0x10", 16)])
def test_rates_are_read_with_powers_of_1000(text, rate):
    assert parse_rate(text) == pytest.approx(rate)


@pytest.mark.parametrize("text", ["", " ", "-1", "+1", "1.5", "0x", "16Q", "1e3", "\uff11", "1_000", "9" * 21, "M"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="whole number"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "0", "0.0", "0K", "-1", "nan", "inf", "1e9", "1,000"])
def test_what_is_no_rate_is_refused(text):
    with pytest.raises(ValueError, match=r"rate|more than 0"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "0", "0.0", "-1", "nan", "inf", "1e3", "."])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="time"):
        parse_seconds(text)


@given(st.text(max_size=12))
def test_no_text_breaks_the_parsers(text):
    for parse in (parse_size, parse_rate, parse_seconds):
        try:
            assert parse(text) >= 0
        except ValueError:
            pass


@given(st.integers(0, 2**64 - 1))
def test_sizes_survive_being_written_down(number):
    assert parse_size(str(number)) == parse_size(hex(number)) == number


@given(st.floats(0, 1e15))
def test_shown_numbers_are_short_and_close(number):
    text = shown(number)
    assert len(text) <= 7
    assert len(text) <= 6 or number >= 1e12


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (0.44, "0.4"), (9.97, "10"), (12.4, "12"), (51234, "51,234"), (99_999.9, "100K"), (2.13e6, "2.13M")],
)
def test_numbers_are_shown_as_people_write_them(number, text):
    assert shown(number) == text


@given(st.floats(1, 1e12))
def test_a_tidy_number_is_below_and_not_by_more_than_half(number):
    assert number / 2 < tidy(number) * (1 + 1e-9)
    assert tidy(number) <= number * (1 + 1e-9)


def test_a_tidy_number_is_at_least_1():
    assert tidy(0.0) == tidy(0.3) == 1


# ---- guests


@pytest.mark.skipif(shutil.which("nasm") is None, reason="needs nasm")
@pytest.mark.parametrize("name", ["quiet_exits", "quiet_locks", "noisy_exits", "noisy_locks"])
def test_a_guests_bytes_are_those_of_its_source(name, tmp_path):
    folder = Path(guests.__file__).parent
    command = ["nasm", "-f", "bin", "-i", f"{folder}{os.sep}", "-o", tmp_path / "out", folder / f"{name}.asm"]
    subprocess.run(command, check=True)
    assert (tmp_path / "out").read_bytes() == guests.image(name).code


@given(st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_a_guests_count_goes_on_when_its_word_wraps(before, more):
    assert guests.work_done(before, ((before + more) % 2**32).to_bytes(4, "little")) == before + more
