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

from ..model.cpu import is_template_file
from ..model.devices import DebugConsole, DeviceSpec, ExitPort, Serial
from ..model.errors import FileError, OrchestraError, SpecError
from ..model.extras import DISTRIBUTION
from ..model.linux import LinuxBoot
from ..model.spec import BootSpec, FlatImage, Limit, MiB, VmSpec
from ..model.virtio import Console, Rng
from ..output.keys import key_name, parse_key
from ..output.numbers import parse_rate, parse_seconds, parse_size
from ..output.times import parse_time

__all__ = ["main"]

T = TypeVar("T")
USAGE, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
FLAT_MEMORY, KERNEL_MEMORY = 16 * MiB, 512 * MiB


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
Backend = Annotated[
    Literal["auto", "kvm", "emulated", "scripted"],
    _option("what executes the guests; auto: the best one that can do what is asked for"),
]
Json = Annotated[bool, _flag("write one JSON document to standard output, and nothing else")]


def _version() -> str:
    try:
        return f"orchestra {version(DISTRIBUTION)}"
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
    vms: Annotated[int, _option("number of VMs, including the noisy ones")] = 6,
    noisy: Annotated[int, _option("number of noisy VMs among them")] = 2,
    limit: Annotated[
        Rate | None,
        _option(
            "events per second that a noisy VM may make under its limit (default: 5 % of what it made, 1000 at most)",
            parse_rate,
            "RATE",
        ),
    ] = None,
    seconds: Annotated[float, _option("duration of the three acts together", parse_seconds, "S")] = 12.0,
    backend: Backend = "auto",
    json: Json = False,
    plain: Annotated[bool, _flag("plain lines, also on a terminal")] = False,
    plot: Annotated[Path | None, _option("draw a picture of the run", metavar="FILE.svg")] = None,
) -> int:
    """Demonstrate limits on noisy neighbours: run quiet and noisy VMs, limit the noisy ones, and show what that does.

    The exit status is 0 if all acts were played, 1 if every VM ended before that, 130 after Ctrl-C.
    """
    from ..demo.story import Plan
    from .demo import demo

    plan = Plan(vms=vms, noisy=noisy, limit=limit, seconds=seconds, backend=backend)
    return demo(plan, as_json=json, plain=plain, plot=plot)


@app.command
def run(
    guest: Annotated[
        Path | None, _option("a raw binary, such as `nasm -f bin` makes; or --kernel", metavar="GUEST.bin")
    ] = None,
    /,
    *,
    kernel: Annotated[
        Path | None, _option("a Linux kernel: a bzImage (vmlinuz) or an ELF file (vmlinux)", metavar="FILE")
    ] = None,
    initrd: Annotated[Path | None, _option("its initial RAM disk", metavar="FILE")] = None,
    cmdline: Annotated[
        str | None, _option("its command line; console=ttyS0 is added if it names no console", metavar="WORDS")
    ] = None,
    disk: Annotated[
        list[str] | None,
        _option("a disk of a kernel: /dev/vda, the next one /dev/vdb, ...", metavar="FILE[,ro][,direct][,base=FILE]"),
    ] = None,
    mode: Annotated[Literal[16, 32, 64] | None, _option("the CPU mode that it is entered in (default: 16)")] = None,
    load: Annotated[int | None, _option("address of its first byte (default: 0x1000)", parse_size, "ADDR")] = None,
    entry: Annotated[int | None, _option("where it starts (default: at its first byte)", parse_size, "ADDR")] = None,
    memory: Annotated[
        int | None,
        _option("bytes of memory: 65536, 0x10000, 64K, 16M, 1G (default: 16M, for a kernel 512M)", parse_size, "SIZE"),
    ] = None,
    vcpus: Annotated[int, _option("virtual CPUs, each with its number in (E/R)DI", parse_size, "N")] = 1,
    cpu: Annotated[
        str,
        _option("the CPU that it finds: host, x86-64-v2, x86-64-v3, x86-64-v4, cloud-v3, or a template's TOML file"),
    ] = "host",
    limit: Annotated[
        Rate | None,
        _option(
            "limit on its bus locks, per second", parse_rate, "RATE", name=("--limit", "--bus-lock-limit"), negative=()
        ),
    ] = None,
    exit_limit: Annotated[Rate | None, _option("limit on its exits, per second", parse_rate, "RATE")] = None,
    console_port: Annotated[
        int | None, _option("bytes written there go to standard output (default: 0xe9)", parse_size, "PORT")
    ] = None,
    exit_port: Annotated[
        int | None,
        _option("a write there ends the guest, with the value as the exit status (default: 0xf4)", parse_size, "PORT"),
    ] = None,
    serial: Annotated[
        bool, _flag("a 16550 serial port at 0x3f8, for output and input; a kernel has it, or a virtio console")
    ] = False,
    virtio_console: Annotated[
        bool, _flag("a kernel's console is hvc0 and not a serial port: faster, and as large as the terminal")
    ] = False,
    irqchip: Annotated[
        bool, _flag("interrupt controllers and a timer; HLT then waits for an interrupt; a kernel always has them")
    ] = False,
    escape: Annotated[
        bytes,
        _option("the key of a terminal that ends it: ^] is Ctrl-]; none", parse_key, "KEY", show_default=key_name),
    ] = b"\x1d",
    timeout: Annotated[float | None, _option("stop the guest after so many seconds", parse_seconds, "SECONDS")] = None,
    journal: Annotated[Path | None, _option("write a journal, for orchestra why and others", metavar="FILE")] = None,
    backend: Backend = "auto",
    json: Annotated[
        bool, _flag("write one JSON document to standard output; the guest's console goes to standard error")
    ] = False,
) -> int:
    """Run one guest: a raw binary, or a Linux kernel. Its console is your standard output; its end is the exit status.

    If the guest has a serial port, it gets what you type. A terminal becomes raw for that: Ctrl-C goes to the guest,
    and the escape key ends it. From a pipe its bytes are typed, and the guest goes on after their end. The escape key,
    SIGTERM and Ctrl-C outside of a terminal press the power button of a kernel that is running and wait 10 s for it to
    power off; the second time they stop it by force.

    The exit status is 0 when it halts, powers off or resets, what it wrote to the exit port when it did, 1 when it
    failed, panicked or ended by a triple fault, 124 after --timeout, 128 and the signal's number after a signal (130
    after Ctrl-C). Numbers may be written as 4096, 0x1000 or 4K. With --backend auto, standard error says which backend
    runs the guest, and why.
    """
    from ..machine.cpufile import load_cpu_template
    from .run import GuestRun, parse_disk, read_image, run

    flat = {"--mode": mode, "--load": load, "--entry": entry, "--console-port": console_port, "--exit-port": exit_port}
    boot: BootSpec
    if kernel is not None:
        for name, value in {"GUEST.bin": guest, **flat}.items():
            if value is not None:
                raise SpecError(f"{name}: is for a raw binary, and --kernel is given: leave one of them out")
        boot = LinuxBoot(kernel=kernel, initrd=initrd, cmdline=cmdline or "")
        if serial and virtio_console:
            raise SpecError("--virtio-console: is instead of the serial port, and --serial is given: leave one out")
        console = Console() if virtio_console else Serial()
        devices: list[DeviceSpec] = [console, *map(parse_disk, disk or ()), Rng()]
    else:
        if guest is None:
            raise SpecError("nothing to run: give a raw binary (GUEST.bin) or a Linux kernel (--kernel FILE)")
        for name, given in {
            "--initrd": initrd,
            "--cmdline": cmdline,
            "--disk": disk,
            "--virtio-console": virtio_console or None,
        }.items():
            if given is not None:
                raise SpecError(f"{name}: is for a Linux kernel: give --kernel as well")
        load = 0x1000 if load is None else load
        code = read_image(guest, FLAT_MEMORY if memory is None else memory, load)
        boot = FlatImage(code=code, load=load, entry=entry, mode=mode or 16)
        devices = [
            DebugConsole(0xE9 if console_port is None else console_port),
            ExitPort(0xF4 if exit_port is None else exit_port),
        ]
        if serial:
            devices.append(Serial())
    spec = VmSpec(
        name="guest",
        boot=boot,
        memory=(FLAT_MEMORY if kernel is None else KERNEL_MEMORY) if memory is None else memory,
        vcpus=vcpus,
        cpu=load_cpu_template(cpu) if is_template_file(cpu) else cpu,
        limit=None if limit is None else Limit(rate=limit),
        exit_limit=None if exit_limit is None else Limit(rate=exit_limit),
        devices=devices,
        irqchip=None if kernel is not None else irqchip,
    )
    plan = GuestRun(
        spec=spec,
        backend=backend,
        timeout=timeout,
        output=2 if json else 1,
        escape=escape,
        journal=None if journal is None else str(journal),
    )
    return run(plan, as_json=json)


@app.command
def doctor(
    *,
    json: Json = False,
    capabilities: Annotated[bool, _flag("list all of KVM's capabilities, by the kernel's names")] = False,
) -> int:
    """Report what this host can do for orchestra, which backend runs guests and why, and how to mend the rest.

    The exit status is 1 if no guest can run here at all.
    """
    from .doctor import doctor

    return doctor(as_json=json, capabilities=capabilities)


@app.command
def simulate(
    scenario: Annotated[Path, _option("the scenario to simulate", metavar="SCENARIO.toml")],
    /,
    *,
    seed: Annotated[int | None, _option("replaces the scenario's seed; the same seed gives the same run")] = None,
    html: Annotated[Path | None, _option("write a report with plots to this file", metavar="FILE.html")] = None,
    json: Json = False,
) -> int:
    """Simulate a fleet of up to a million VMs, with and without policies, and compare the two.

    The policies are the objects that run live. The exit status is 1 if one of them raised.
    """
    from .simulate import simulate

    return simulate(scenario, seed=seed, html=html, as_json=json)


@app.command
def guilty(
    vm: Annotated[str, _option("its name", metavar="VM")],
    /,
    *,
    journal: Annotated[Path, _option("the journal of its fleet", metavar="FILE")],
    symbols: Annotated[
        list[Path] | None,
        _option(
            "the guest's ELF file or System.map, to name functions; several, one option each",
            metavar="FILE",
            negative=(),
        ),
    ] = None,
    slide: Annotated[
        int, _option("how much higher the guest has them than the file says", parse_size, "ADDR", show_default=hex)
    ] = 0,
    last: Annotated[float | None, _option("only the last S seconds of the journal", parse_seconds, "S")] = None,
    json: Json = False,
    folded: Annotated[bool, _flag("folded stacks, for flamegraph.pl, inferno or speedscope.app")] = False,
) -> int:
    """Name the instructions of a VM that lock the bus: address, disassembly, count and share.

    The exit status is 1 if the VM's bus locks were not seen.
    """
    from .guilty import guilty

    tables = symbols or []
    return guilty(vm, journal, symbols=tables, slide=slide, last=last, as_json=json, as_folded=folded)


@app.command
def why(
    vm: Annotated[str, _option("its name", metavar="VM")],
    /,
    *,
    journal: Annotated[Path, _option("the journal of its fleet", metavar="FILE")],
    at: Annotated[
        int | None,
        _option("when: 14:05, 'yesterday 14:05', 2h (ago), ... (default: the journal's end)", parse_time, "TIME"),
    ] = None,
    window: Annotated[float, _option("seconds to look back", parse_seconds, "S")] = 3600.0,
    json: Json = False,
    plot: Annotated[Path | None, _option("draw a picture of it", metavar="FILE.svg")] = None,
) -> int:
    """Say why a VM was slow: what held it, by which policy and why, how it fared, and what would end it."""
    from .why import why

    return why(vm, journal, at=at, window=window, as_json=json, plot=plot)


@app.command
def journal(
    file: Annotated[Path, _option("the journal", metavar="FILE")],
    /,
    *,
    table: Annotated[
        Literal["actions", "states", "aggregates", "vcpus", "hosts", "profiles"], _option("which table of it")
    ] = "actions",
    vm: Annotated[str | None, _option("only rows of this VM", metavar="VM")] = None,
    tenant: Annotated[str | None, _option("only rows of this tenant", metavar="TENANT")] = None,
    policy: Annotated[str | None, _option("only actions that this policy asked for", metavar="POLICY")] = None,
    kind: Annotated[str | None, _option("only actions of this kind, such as throttle", metavar="KIND")] = None,
    outcome: Annotated[
        str | None, _option("only actions with this outcome: done, dry-run, refused or failed", metavar="OUTCOME")
    ] = None,
    since: Annotated[
        int | None, _option("from then on: 14:05, 'yesterday 14:05', 2h (ago), ...", parse_time, "TIME")
    ] = None,
    until: Annotated[int | None, _option("up to then", parse_time, "TIME")] = None,
    last: Annotated[int | None, _option("only the last N rows", metavar="N")] = None,
    json: Json = False,
    csv: Annotated[Path | None, _option("write the rows to this file, as CSV", metavar="FILE.csv")] = None,
    parquet: Annotated[Path | None, _option("write the rows to this file, as Parquet", metavar="FILE.parquet")] = None,
    upgrade: Annotated[bool, _flag("upgrade a journal that an older orchestra wrote")] = False,
) -> int:
    """Show a journal: actions with reason, evidence and outcome; states of VMs; figures of VMs and host."""
    from .journal import Wanted, journal

    wanted = Wanted(table, vm, tenant, policy, kind, outcome, since, until)
    return journal(file, wanted, last=last, as_json=json, csv=csv, parquet=parquet, upgrades=upgrade)


@app.command
def replay(
    file: Annotated[Path, _option("the journal", metavar="JOURNAL")],
    /,
    *,
    policy: Annotated[Path, _option("the rules to try", metavar="RULES.toml")],
    since: Annotated[
        int | None, _option("from then on: 14:05, 'tuesday 14:00', 2h (ago), ...", parse_time, "TIME")
    ] = None,
    until: Annotated[int | None, _option("up to then", parse_time, "TIME")] = None,
    json: Json = False,
    plot: Annotated[Path | None, _option("draw a picture of it", metavar="FILE.svg")] = None,
) -> int:
    """Replay a journal under other rules, and compare actions, waits and fairness with what really happened.

    The policies are the objects that run live. The exit status is 1 if one of them raised.
    """
    from .replay import replay

    return replay(file, policy, since=since, until=until, as_json=json, plot=plot)


policy = App(name="policy", help="Check files of policies (docs/rules.md).")
app.command(policy)


@policy.command
def check(
    file: Annotated[Path, _option("the rules", metavar="RULES.toml")],
    /,
    *,
    json: Json = False,
) -> int:
    """Check a file of policies, and report all mistakes at once, each with its line and key.

    The exit status is 1 if there are any.
    """
    from .policy import check

    return check(file, as_json=json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (default: this program's). Returns the exit status. A user's mistake is one line on stderr."""
    _open_standard_streams()
    # The commands print what matters of what the library logs, so the log itself stays silent.
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
            case FileError(file=file, lines=lines) if lines:
                print(*lines, sep="\n", file=sys.stderr)
                return _complain(f"{len(lines)} mistake{'s' * (len(lines) != 1)} in {file}", 1)
            case FileError():
                return _complain(str(cause), 1)
            case SpecError():
                return _complain(str(cause), USAGE)
            case OrchestraError():
                return _complain(str(cause), 1)
            case KeyboardInterrupt():
                return INTERRUPTED
            case SystemExit() if isinstance(cause.__context__, BrokenPipeError):  # how rich ends a program then
                _give_up_output()
                return PIPE_CLOSED
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
    """Open the standard descriptors that the caller closed: otherwise the next file to be opened would get such a
    number, and output would be written into that file."""
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
    """Point standard output at /dev/null: it can't be written, and Python would complain of that at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # the program replaced it by an object without a descriptor
    finally:
        os.close(null)


def _cause(error: BaseException) -> BaseException:
    """The single error within an exception group, as nurseries raise them."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _complain(message: str, status: int) -> int:
    print(f"orchestra: {message}", file=sys.stderr)
    return status
