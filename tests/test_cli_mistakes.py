"""Every verb and every kind of mistake in one table: the same mistake has the same status and the same form of message.

Usage is 2. What is not found, malformed or not available is 1, and the message begins with the file, if there is one.
Success leaves nothing beside the files that were asked for, a reader that leaves is no mistake, and Ctrl-C is 130.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import orchestra as orc
from journals import Afternoon, vm
from orchestra.cli import app
from orchestra.journal.schema import APPLICATION, VERSION

pytest.importorskip("cattrs")
pytest.importorskip("numpy")
pytest.importorskip("matplotlib")

RULES = "[[policies]]\nkind = 'static-limits'\nvms = { '*' = 100 }\n"
SCENARIO = """
duration = 2
[[hosts]]
count = 1
[[vms]]
name = "a"
count = 2
behaviour = "quiet"
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one good file of each kind."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "guest.bin").write_bytes(b"\xf4")
    (folder / "rules.toml").write_text(RULES)
    (folder / "scenario.toml").write_text(SCENARIO)
    (folder / "System.map").write_text("0000000000001000 T start\n")
    afternoon = Afternoon(folder / "fleet.db")
    afternoon.state("a", "running")
    for _ in range(400):  # more than a pipe holds
        afternoon.applied(orc.Warn(vm="a", reason="x" * 200), "p")
        afternoon.second(vm("a", 5))
    afternoon.journal.profile(afternoon.now, "a", 1, [(0x1000, 16, 0, 0, 3, 300, b"")])
    afternoon.close()
    return folder


READERS = {
    "run": ["run", "FILE"],
    "guilty": ["guilty", "a", "--journal", "FILE"],
    "guilty-symbols": ["guilty", "a", "--journal", "fleet.db", "--symbols", "FILE"],
    "why": ["why", "a", "--journal", "FILE"],
    "journal": ["journal", "FILE"],
    "journal-upgrade": ["journal", "FILE", "--upgrade"],
    "policy": ["policy", "check", "FILE"],
    "replay": ["replay", "FILE", "--policy", "rules.toml"],
    "replay-policy": ["replay", "fleet.db", "--policy", "FILE"],
    "simulate": ["simulate", "FILE"],
}
"""Each verb that reads a file."""

GOOD = {
    "run": "guest.bin",
    "guilty-symbols": "System.map",
    "policy": "rules.toml",
    "replay-policy": "rules.toml",
    "simulate": "scenario.toml",
}
"""What it takes; else the journal."""

WRITERS = {
    "demo": ["demo", "--backend", "scripted", "--seconds", "0.1", "--plot", "FILE.svg"],
    "why": ["why", "a", "--journal", "fleet.db", "--plot", "FILE.svg"],
    "replay": ["replay", "fleet.db", "--policy", "rules.toml", "--plot", "FILE.svg"],
    "simulate": ["simulate", "scenario.toml", "--html", "FILE.html"],
    "journal-csv": ["journal", "fleet.db", "--csv", "FILE.csv"],
    "journal-parquet": ["journal", "fleet.db", "--parquet", "FILE.parquet"],
}
"""Each verb that writes one."""


def database(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()


BAD: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "in no folder": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(bytes(range(255, 0, -1)) * 9),
    "text": lambda path: path.write_text("[[[\nwhat = is this\n"),
    "another database": lambda path: database(path, "CREATE TABLE t (x)"),
    "newer": lambda path: database(
        path,
        "CREATE TABLE sessions (x)",
        f"PRAGMA application_id = {APPLICATION}",
        f"PRAGMA user_version = {VERSION + 1}",
    ),
    "wrong type": lambda path: path.write_text("policies = 'many'\nvms = 3\nhosts = 'x'\nduration = []\n"),
    "wrong key": lambda path: path.write_text("\nnonsense = 1\n"),
}

FINE = {
    ("run", "garbage"), ("run", "text"), ("run", "another database"), ("run", "newer"),
    ("run", "wrong type"), ("run", "wrong key"),
    ("policy", "empty"), ("replay-policy", "empty"),
}  # fmt: skip
"""Not mistakes: any bytes may be a guest's code, and rules may say nothing."""


def command(made: Path, arguments: list[str], path: Path) -> list[str]:
    """With the paths in it."""
    where = {"fleet.db", "rules.toml", "scenario.toml"}
    return [
        str(made / word) if word in where else word.replace("FILE", str(path)) if "FILE" in word else word
        for word in arguments
    ]


@pytest.mark.parametrize(
    ("verb", "kind"), [(verb, kind) for verb in READERS for kind in BAD if (verb, kind) not in FINE]
)
def test_a_file_that_can_not_be_read_is_1_and_the_message_begins_with_it(verb, kind, made, tmp_path, capsys):
    path = tmp_path / "nowhere" / "file" if kind == "in no folder" else tmp_path / "file"
    BAD[kind](path)
    before = sorted(tmp_path.rglob("*"))
    assert app.main(command(made, READERS[verb], path)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert str(path) in err
    *lines, last = err.splitlines()
    if lines:  # a mistake a line, as compilers write them
        assert all(line.startswith(f"{path}:") for line in lines)
        assert last == f"orchestra: {len(lines)} mistake{'s' * (len(lines) != 1)} in {path}"
    else:
        assert last.startswith(f"orchestra: {path}:")
    if kind == "directory":
        assert err == f"orchestra: {path}: {os.strerror(errno.EISDIR)}\n"
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["policy", "replay-policy", "simulate"])
def test_mistakes_in_a_file_have_line_and_key_and_are_the_same_from_every_verb(verb, made, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("\nnonsense = 1\n")
    assert app.main(command(made, READERS[verb], path)) == 1
    assert f"{path}:2: nonsense: no such key; there are: " in capsys.readouterr().err


def test_a_missing_key_is_named_once(made, tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text("duration = 3\n")
    assert app.main(["simulate", str(path)]) == 1
    assert f"{path}: hosts: is missing\n" in capsys.readouterr().err


# Root reads what it likes, unless that power is taken from it.
needs_setpriv = pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root, and no setpriv to be less"
)
AS_NOBODY = (
    ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-dac_override,-dac_read_search"]
    if os.geteuid() == 0
    else []
)


@needs_setpriv
@pytest.mark.parametrize("verb", READERS)
def test_what_may_not_be_read_is_1(verb, made, tmp_path):
    path = tmp_path / "file"
    path.write_bytes((made / GOOD.get(verb, "fleet.db")).read_bytes())
    path.chmod(0)
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "-m", "orchestra", *command(made, READERS[verb], path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"orchestra: {path}: ")
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("verb", WRITERS)
@pytest.mark.parametrize(("kind", "number"), [("in no folder", errno.ENOENT), ("directory", errno.EISDIR)])
def test_a_file_that_can_not_be_written_is_1_before_any_work(verb, kind, number, made, tmp_path, capsys):
    if verb == "journal-parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "nowhere" / "file" if kind == "in no folder" else tmp_path / "file"
    arguments = command(made, WRITERS[verb], path)
    named = next(word for word in arguments if word.startswith(str(path)))
    if kind == "directory":
        Path(named).mkdir()
    assert app.main(arguments) == 1
    assert capsys.readouterr() == ("", f"orchestra: {named}: {os.strerror(number)}\n")


@pytest.mark.parametrize("verb", ["demo", "why", "replay", "simulate"])
def test_a_drawing_with_another_ending_is_usage(verb, made, tmp_path, capsys):
    path = tmp_path / "file"
    arguments = [word.replace(".svg", ".png").replace(".html", ".png") for word in command(made, WRITERS[verb], path)]
    assert app.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "must end in " in err
    assert not list(tmp_path.iterdir())


VERBS = ["demo", "doctor", "guilty", "journal", "policy", "policy check", "replay", "run", "simulate", "why"]


def test_every_verb_there_is_is_in_this_table():
    names = {name for name in app.app if not name.startswith("-")}
    assert names == {verb.partition(" ")[0] for verb in VERBS}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "arguments", [["--nonsense"], ["a", "b", "c"], ["--json=perhaps"]], ids=["option", "positional", "value"]
)
def test_usage_is_one_line_and_2(verb, arguments, capsys):
    assert app.main([*verb.split(), *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("orchestra: ")


@pytest.mark.parametrize("verb", ["guilty", "why"])
def test_a_vm_that_the_journal_does_not_know_is_1_and_names_those_that_it_does(verb, made, capsys):
    assert app.main([verb, "nobody", "--journal", str(made / "fleet.db")]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("orchestra: vm='nobody': ")
    assert err.endswith("there are: a\n")


# ---- what a success leaves, readers that leave, and Ctrl-C


@pytest.mark.parametrize("verb", sorted(set(READERS) - {"run"}))
def test_reading_leaves_no_file_behind(verb, made, capsys):
    before = sorted(made.iterdir())
    assert app.main(command(made, READERS[verb], made / GOOD.get(verb, "fleet.db"))) == 0
    assert sorted(made.iterdir()) == before


def test_reading_changes_nothing_in_a_journal(made, capsys):
    path = made / "fleet.db"
    before = path.read_bytes()
    assert app.main(["journal", str(path)]) == 0
    assert app.main(["why", "a", "--journal", str(path)]) == 0
    assert path.read_bytes() == before


@needs_setpriv
def test_a_journal_that_may_not_be_written_is_read_without_a_file_beside_it(made, tmp_path):
    path = tmp_path / "fleet.db"
    path.write_bytes((made / "fleet.db").read_bytes())
    path.chmod(0o444)
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [*AS_NOBODY, sys.executable, "-m", "orchestra", "journal", str(path), "--last", "1"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(tmp_path.iterdir()) == [path]


TALKERS = {
    "help": ["--help"],
    "doctor": ["doctor"],
    "doctor-json": ["doctor", "--json"],
    "demo": ["demo", "--backend", "scripted", "--seconds", "0.3"],
    "guilty": ["guilty", "a", "--journal", "fleet.db"],
    "why": ["why", "a", "--journal", "fleet.db"],
    "journal": ["journal", "fleet.db"],
    "journal-json": ["journal", "fleet.db", "--table", "aggregates", "--json"],
    "policy": ["policy", "check", "rules.toml"],
    "replay": ["replay", "fleet.db", "--policy", "rules.toml"],
    "simulate": ["simulate", "scenario.toml"],
}


@pytest.mark.parametrize("verb", TALKERS)
def test_a_reader_that_leaves_is_quiet_and_leaves_no_file(verb, made):
    before = sorted(made.iterdir())
    receive, send = os.pipe()
    os.close(receive)  # nobody will read a word of it
    try:
        done = subprocess.run(
            [sys.executable, "-m", "orchestra", *command(made, TALKERS[verb], made)],
            stdout=send,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(send)
    assert done.returncode == 141
    assert [line for line in done.stderr.splitlines() if not line.endswith(" %")] == []  # of progress
    assert sorted(made.iterdir()) == before


def test_ctrl_c_in_a_command_that_reads_is_130_and_leaves_no_file(made, tmp_path):
    """It has written to a pipe that nobody empties, so that it is in the middle of its work for sure."""
    before = sorted(made.iterdir())
    words = [sys.executable, "-m", "orchestra", "journal", str(made / "fleet.db"), "--json"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
    assert sorted(made.iterdir()) == before


def test_ctrl_c_while_the_program_loads_is_130(tmp_path):
    (tmp_path / "cyclopts.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    words = [sys.executable, "-m", "orchestra", "doctor"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"")
