"""What is typed for a guest of ``orchestra run``: on a real terminal, from a pipe, from a file."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios

import pytest
import trio

from orchestra.cli.terminal import Terminal
from orchestra.output.keys import key_name, parse_key
from orchestra.testing import wait_until
from terminals import DEADLINE, seat

ECHO = bytes.fromhex(
    "bafd03"  # again: mov dx, 0x3fd: the line status
    "ec"  # in al, dx
    "a801"  # test al, 1: a byte was received
    "74f8"  # jz again
    "baf803"  # mov dx, 0x3f8
    "ec"  # in al, dx
    "ee"  # out dx, al
    "3c71"  # cmp al, 'q'
    "75ef"  # jne again
    "f4"
)
SPEAKS = b"\xba\xf8\x03\xb0A\xee\xf4"  # mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(
    params=[pytest.param("kvm", marks=pytest.mark.kvm), pytest.param("emulated", marks=pytest.mark.emulated)]
)
def command(request, tmp_path) -> list[str]:
    """A guest that echoes what is typed, until a q."""
    guest = tmp_path / "echo.bin"
    guest.write_bytes(ECHO)
    return [sys.executable, "-m", "orchestra", "run", str(guest), "--serial", "--backend", request.param]


READY = b"orchestra: what you type goes to the guest; Ctrl-] ends it, pressed twice at once\r\n"


def test_what_is_typed_goes_to_the_guest_as_it_is_and_nothing_else_echoes(command):
    with seat(command) as person:
        person.see(READY)
        assert person.is_raw
        person.type(b"ab\r\x03\x1a\x11c")
        assert person.see(b"c") == b"ab\r\x03\x1a\x11"
        person.type(b"q")
        person.see(b"q")
        assert person.ended() == 0


def test_escape_key_ends_the_guest_after_what_was_typed_before(command):
    with seat(command) as person:
        person.see(READY)
        person.type(b"ab\x1d")
        assert person.ended() == 0


@pytest.mark.parametrize(("option", "key"), [("^A", b"\x01"), ("~", b"~")])
def test_escape_key_may_be_another(command, option, key):
    with seat([*command, "--escape", option]) as person:
        person.see(f"; {key_name(key)} ends it".encode())
        person.see(b"\r\n")
        person.type(b"\x1dx")
        assert person.see(b"x") == b"\x1d"
        person.type(key)
        assert person.ended() == 0


def test_without_an_escape_key_each_byte_goes_to_the_guest(command):
    with seat([*command, "--escape", "none"]) as person:
        person.see(b"goes to the guest\r\n")
        person.type(b"\x1dx")
        assert person.see(b"x") == b"\x1d"
        person.type(b"q")
        assert person.ended() == 0


def test_escape_key_is_read_also_if_the_guest_reads_nothing(command, tmp_path):
    (tmp_path / "echo.bin").write_bytes(b"\xeb\xfe")
    with seat(command) as person:
        person.see(READY)
        for _ in range(20):
            person.type(bytes(1000))
        person.type(b"\x1d")
        assert person.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT])
def test_signal_ends_the_guest_and_restores_the_terminal(command, number):
    with seat(command) as person:
        person.see(READY)
        person.process.send_signal(number)
        assert person.ended() == 128 + number


def test_timeout_restores_the_terminal(command):
    with seat([*command, "--timeout", "0.1"]) as person:
        assert person.ended() == 124


def test_output_that_nobody_can_take_any_more_restores_the_terminal(command):
    receive, send = os.pipe()
    with seat(command, stdout=send) as person:
        os.close(send)
        person.see(READY)
        os.close(receive)
        person.type(b"x")
        assert person.ended() == 141


def test_suspended_program_has_given_the_terminal_back_and_takes_it_again(command):
    with seat(command) as person:
        person.see(READY)
        person.process.send_signal(signal.SIGTSTP)
        _, status = os.waitpid(person.process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        assert termios.tcgetattr(person.slave) == person.before
        person.process.send_signal(signal.SIGCONT)
        person.becomes_raw()
        person.type(b"x")
        person.see(b"x")
        person.type(b"q")
        assert person.ended() == 0


def test_after_a_stop_that_nobody_sees_the_terminal_is_raw_again_and_restored_at_the_end(command):
    with seat(command) as person:
        person.see(READY)
        person.process.send_signal(signal.SIGSTOP)
        os.waitpid(person.process.pid, os.WUNTRACED)
        termios.tcsetattr(person.slave, termios.TCSANOW, person.before)  # as a shell does
        person.process.send_signal(signal.SIGCONT)
        person.becomes_raw()
        person.type(b"q")
        assert person.ended() == 0


def test_in_the_background_the_terminal_is_left_alone(command, tmp_path):
    (tmp_path / "echo.bin").write_bytes(SPEAKS)
    with seat(["bash", "-m", "-c", '"$@" & wait $!; echo status $?', "bash", *command]) as person:
        seen = person.see(b"status ")
        assert b"A" in seen
        assert not person.is_raw
        person.see(b"0\r\n")
        assert person.ended() == 0


def test_guest_without_an_input_leaves_the_terminal_as_it_is(command, tmp_path):
    (tmp_path / "echo.bin").write_bytes(b"\xb0\x0a\xe6\xe9\xeb\xfe")  # a line to the debug port; jmp $
    with seat([word for word in command if word != "--serial"]) as person:
        person.see(b"\n")
        assert not person.is_raw
        person.type(b"\x03")
        assert person.ended() == 130


async def test_size_is_said_at_first_and_when_it_changes():
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (25, 80))
        said: list[tuple[int, int]] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Terminal(slave).follow, lambda columns, rows: said.append((columns, rows)))
            await wait_until(lambda: said == [(80, 25)])
            for size, number in (((50, 132), signal.SIGWINCH), ((40, 100), signal.SIGCONT)):
                termios.tcsetwinsize(slave, size)
                os.kill(os.getpid(), number)
                await wait_until(lambda size=size: said[-1] == (size[1], size[0]))  # type: ignore[misc]
            termios.tcsetwinsize(slave, (0, 0))  # a terminal that does not know
            os.kill(os.getpid(), signal.SIGWINCH)
            termios.tcsetwinsize(slave, (30, 90))
            os.kill(os.getpid(), signal.SIGWINCH)
            await wait_until(lambda: said[-1] == (90, 30))
            assert (0, 0) not in said
            nursery.cancel_scope.cancel()
    finally:
        os.close(master)
        os.close(slave)


# ---- pipes and files


def test_bytes_of_a_pipe_are_typed(command):
    done = subprocess.run(command, input=b"hello\n\x1d\x03q", capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello\n\x1d\x03q", b"")


def test_more_than_a_guest_takes_at_once_waits_for_the_guest(command):
    text = bytes(range(ord("0"), ord("Z"))) * 400
    done = subprocess.run(command, input=text + b"q", capture_output=True, timeout=DEADLINE, check=False)
    assert done.stdout == text + b"q"


def test_end_of_a_pipe_leaves_the_guest_running(command):
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"x")
        process.stdin.close()
        assert process.stdout.read(1) == b"x"
        process.send_signal(signal.SIGTERM)  # it runs
        assert process.wait(DEADLINE) == 143
        assert process.stderr.read() == b""


def test_bytes_of_a_file_are_typed(command, tmp_path):
    (tmp_path / "typed").write_bytes(b"abq")
    with (tmp_path / "typed").open("rb") as typed:
        done = subprocess.run(command, stdin=typed, capture_output=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stdout) == (0, b"abq")


# ---- keys


@pytest.mark.parametrize(
    ("text", "key", "name"),
    [("^]", b"\x1d", "Ctrl-]"), ("^a", b"\x01", "Ctrl-A"), ("^@", b"\0", "Ctrl-@"), ("~", b"~", "~"), ("^", b"^", "^")],
)
def test_keys_are_read_as_people_write_them_and_named(text, key, name):
    assert parse_key(text) == key
    assert key_name(key) == name


@pytest.mark.parametrize("text", ["", "ab", "^1", "^]]", "é", "Ctrl-A"])
def test_what_is_no_key_is_refused_with_what_one_is(text):
    with pytest.raises(ValueError, match=r"no key such as \^\]"):
        parse_key(text)
