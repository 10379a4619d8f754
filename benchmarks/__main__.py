"""``python -m benchmarks [NAME ...] [--quick] [--json FILE] [--save]``"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import attrs
import trio

from . import (
    aio,
    answered,
    budget,
    dirty,
    emulated,
    engine,
    floor,
    hostile,
    idle,
    launch,
    linux_boot,
    linux_disk,
    linux_idle,
    linux_locks,
    linux_many,
    machine,
    pause,
    profile,
    rate,
    replay,
    simulate,
    tick,
    told,
)
from .row import Options, Row, table

BENCHMARKS: dict[str, Callable[[Options], Awaitable[list[Row]]]] = {
    "exit-in-c": answered.exit_in_c,
    "device": answered.device,
    "task": answered.task,
    "told": told.told,
    "rate": rate.rate,
    "budget": budget.budget,
    "pause": pause.pause,
    "launch": launch.launch,
    "idle-halted": idle.halted,
    "idle-paused": idle.paused,
    "aio": aio.aio,
    "tick": tick.tick,
    "journal": tick.journal,
    "cap": engine.cap,
    "react": engine.react,
    "emulated": emulated.emulated,
    "simulate": simulate.simulate,
    "replay": replay.replay,
    "profile": profile.profile,
    "dirty": dirty.dirty,
    "hostile": hostile.hostile,
    "linux-boot": linux_boot.linux_boot,
    "linux-idle": linux_idle.linux_idle,
    "linux-many": linux_many.linux_many,
    "linux-disk": linux_disk.linux_disk,
    "linux-locks": linux_locks.linux_locks,
}
RESULTS = Path(__file__).parent / "results"


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure orchestra, as one table.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="short runs: shows that it works, not how fast")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all figures there ('-': standard output)")
    parser.add_argument("--save", action="store_true", help=f"write Markdown and JSON to {RESULTS}")
    parser.add_argument("--floor", metavar="PATH", type=Path, help="floor.c compiled already (default: compile it)")
    parser.add_argument("--here", action="store_true", help="in this process (default: a fresh one for each)")
    options = parser.parse_args(arguments)
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"{name}: no such benchmark; there are: {', '.join(BENCHMARKS)}")
    return options


def _here(names: list[str], options: Options) -> list[Row]:
    async def run() -> list[Row]:
        return [row for name in names for row in await BENCHMARKS[name](options)]

    return trio.run(run)


def _apart(name: str, quick: bool, built: Path) -> list[Row] | None:
    """In a process of its own, so that none finds another's threads, heap and caches. None: it could not be run."""
    command = [sys.executable, "-m", "benchmarks", name, "--here", "--json", "-", "--floor", str(built)]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], stdout=subprocess.PIPE)
    if done.returncode not in (0, 1) or not done.stdout:  # its own message is on standard error
        print(f"benchmark {name} failed: exit status {done.returncode}", file=sys.stderr)
        return None
    return [Row(**row) for row in json.loads(done.stdout)["rows"]]


def main(arguments: list[str] | None = None) -> int:
    """Run what is asked for. 0: all within their bounds, 1: not all, 2: some could not be run.

    Short runs have nothing to say about bounds: with ``--quick`` none is judged.
    """
    asked = _parse(arguments)
    logging.basicConfig(level=logging.ERROR)
    names = asked.names or list(BENCHMARKS)
    description = machine.describe()
    rows: list[Row] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="orchestra-benchmarks-") as directory:
        build = Path(directory)
        built = asked.floor or floor.compile_c("floor.c", build / "floor")
        if asked.here:
            rows = _here(names, Options(asked.quick, built, build))
        else:
            for name in names:
                print(f"{name} ...", file=sys.stderr, flush=True)
                found = _apart(name, asked.quick, built)
                if found is None:
                    failed.append(name)
                else:
                    rows += found
    if asked.quick:
        rows = [attrs.evolve(row, ok=None) for row in rows]

    result = {"machine": description, "quick": asked.quick, "rows": [attrs.asdict(row) for row in rows]}
    text = json.dumps(result, indent=2) + "\n"
    about = "".join(f"- {key}: {value}\n" for key, value in description.items())
    report = f"{about}\n{table(rows)}\n"
    if asked.json == Path("-"):
        print(text, end="")
    else:
        print(report, end="")
        if asked.json is not None:
            asked.json.write_text(text)
    if failed:
        print(f"could not be run: {', '.join(failed)}", file=sys.stderr)
        return 2
    if asked.save:
        RESULTS.mkdir(exist_ok=True)
        stem = RESULTS / "-".join([str(datetime.date.today()), machine.host_kind(), *asked.names])
        stem.with_suffix(".json").write_text(text)
        stem.with_suffix(".md").write_text(f"# Benchmarks, {datetime.date.today()}\n\n{report}")
    return 0 if all(row.ok is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
