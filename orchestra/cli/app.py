"""The commands, their options and their help. The only module that imports cyclopts."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from cyclopts import App, CycloptsError, Parameter

from ..errors import OrchestraError, SpecError
from ..spec import DebugConsole, DeviceSpec, ExitPort, FlatImage, Limit, Serial, VmSpec
from .numbers import parse_rate, parse_seconds, parse_size

__all__ = ["main"]

T = TypeVar("T")
USAGE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141


def _typed(parse: Callable[[str], T]) -> Callable[[Any, Sequence[Any]], T]:
    def convert(_: Any, tokens: Sequence[Any]) -> T:
        return parse(tokens[0].value)

    return convert


def _option(help: str, parse: Callable[[str], Any] | None = None, metavar: str | None = None, **more: Any) -> Parameter:
    if parse is not None:
        more["converter"] = _typed(parse)
    return Parameter(help=help, metavar=metavar, **more)


def _flag(help: str) -> Parameter:
    return Parameter(help=help, negative=(), show_default=False)


Rate: TypeAlias = float
Backend = Annotated[Literal["auto", "kvm", "emulated", "scripted"], _option("what executes the guests")]
Json = Annotated[bool, _flag("write one JSON document to standard output, and nothing else")]


def _version() -> str:
    try:
        return f"orchestra {version('orchestra')}"
    except PackageNotFoundError:
        return "orchestra, from a source tree that is not installed"


app = App(
    name="orchestra",
    help="Run many KVM virtual machines and keep noisy neighbours quiet.",
    version=_version,
)


@app.command
def demo(
    *,
    vms: Annotated[int, _option("how many VMs, the noisy ones among them")] = 6,
    noisy: Annotated[int, _option("how many of them are noisy neighbours")] = 2,
    limit: Annotated[
        Rate | None,
        _option(
            "what a noisy VM may do a second once limits are on (default: 5 % of what it did, 1000 at most)",
            parse_rate,
            "RATE",
        ),
    ] = None,
    seconds: Annotated[float, _option("how long the three acts take together", parse_seconds, "S")] = 12.0,
    backend: Backend = "auto",
    json: Json = False,
    plain: Annotated[bool, _flag("plain lines, also on a terminal")] = False,
    plot: Annotated[Path | None, _option("draw the run", metavar="FILE.svg")] = None,
) -> int:
    """Show it: quiet tenants, noisy neighbours, limits, relief, and what was done and why."""
    from .demo import demo
    from .story import Plan

    plan = Plan(vms=vms, noisy=noisy, limit=limit, seconds=seconds, backend=backend)
    return demo(plan, as_json=json, plain=plain, plot=plot)


@app.command
def run(
    guest: Annotated[Path, _option("a raw binary, such as `nasm -f bin` makes", metavar="GUEST.bin")],
    /,
    *,
    mode: Annotated[Literal[16, 32, 64], _option("the CPU mode that it is entered in")] = 16,
    load: Annotated[int, _option("address of its first byte", parse_size, "ADDR", show_default=hex)] = 0x1000,
    entry: Annotated[int | None, _option("where it starts (default: at its first byte)", parse_size, "ADDR")] = None,
    memory: Annotated[
        int, _option("bytes of memory: 65536, 0x10000, 64K, 16M, 1G", parse_size, "SIZE", show_default=lambda _: "16M")
    ] = 16 << 20,
    vcpus: Annotated[int, _option("virtual CPUs, each with its number in (E/R)DI", parse_size, "N")] = 1,
    limit: Annotated[Rate | None, _option("bus locks a second that it may make", parse_rate, "RATE")] = None,
    exit_limit: Annotated[Rate | None, _option("exits a second that it may make", parse_rate, "RATE")] = None,
    console_port: Annotated[
        int, _option("bytes written there go to standard output", parse_size, "PORT", show_default=hex)
    ] = 0xE9,
    exit_port: Annotated[
        int, _option("a write there ends the guest with the value as its status", parse_size, "PORT", show_default=hex)
    ] = 0xF4,
    serial: Annotated[bool, _flag("a 16550 serial port at 0x3f8 that writes to standard output as well")] = False,
    irqchip: Annotated[bool, _flag("interrupt controllers and a timer; HLT then waits for an interrupt")] = False,
    timeout: Annotated[float | None, _option("stop it after so long", parse_seconds, "SECONDS")] = None,
    backend: Backend = "auto",
    json: Annotated[
        bool, _flag("write one JSON document to standard output; the guest's console goes to standard error")
    ] = False,
) -> int:
    """Run one guest. Its console is your standard output; its end is the exit status.

    The exit status is 0 when it halts, what it wrote to the exit port when it did, 1 when it failed, 124 after
    --timeout, 130 after Ctrl-C. Numbers may be written as 4096, 0x1000 or 4K.
    """
    from .run import GuestRun, read_image, run

    devices: list[DeviceSpec] = [DebugConsole(console_port), ExitPort(exit_port)]
    if serial:
        devices.append(Serial())
    spec = VmSpec(
        name="guest",
        boot=FlatImage(code=read_image(guest, memory, load), load=load, entry=entry, mode=mode),
        memory=memory,
        vcpus=vcpus,
        limit=None if limit is None else Limit(rate=limit),
        exit_limit=None if exit_limit is None else Limit(rate=exit_limit),
        devices=devices,
        irqchip=irqchip,
    )
    return run(GuestRun(spec=spec, backend=backend, timeout=timeout, output=2 if json else 1), as_json=json)


@app.command
def doctor(
    *,
    json: Json = False,
    capabilities: Annotated[bool, _flag("list all of KVM's capabilities, by the kernel's names")] = False,
) -> int:
    """Say what this host can do for orchestra, and what to do about the rest.

    The exit status is 1 if no guest can run here at all.
    """
    from .doctor import doctor

    return doctor(as_json=json, capabilities=capabilities)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this program's); the exit status. A user's mistake is one line on standard error."""
    _open_standard_streams()
    # What the library logs is said by the commands themselves, where it matters to them.
    logging.getLogger("orchestra").addHandler(_SILENT)
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
        result: object = command(*bound.args, **bound.kwargs)
        sys.stdout.flush()
    except CycloptsError as error:
        return _complain(" ".join(str(error).split()), USAGE)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as error:
        cause = _cause(error)
        match cause:
            case SpecError():
                return _complain(str(cause), USAGE)
            case OrchestraError():
                return _complain(str(cause), 1)
            case KeyboardInterrupt():
                return INTERRUPTED
            case BrokenPipeError():
                _give_up_output()
                return PIPE_CLOSED
            case OSError(strerror=str(text)):
                _give_up_output()
                return _complain(f"{cause.filename}: {text}" if cause.filename else text, 1)
        raise
    return result if isinstance(result, int) else 0


_SILENT = logging.NullHandler()


def _open_standard_streams() -> None:
    """If we were started with one closed, the next file opened would take its number, and guests would write to it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for the rest of the process


def _give_up_output() -> None:
    """Standard output can't be written: Python must not complain again when it flushes what is left at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # replaced by something without a descriptor
    finally:
        os.close(null)


def _cause(error: BaseException) -> BaseException:
    """What is in a group of one, as nurseries raise them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _complain(message: str, status: int) -> int:
    print(f"orchestra: {message}", file=sys.stderr)
    return status
