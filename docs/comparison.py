"""Makes docs/comparison.md, its figures and comparison.json from simulations of the ten scenarios.

python docs/comparison.py           simulate all (some minutes) and write
python docs/comparison.py --write   only write anew, from comparison.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from orchestra.output import colours
from orchestra.output.figures import Figure, inline_svg, rc_context
from orchestra.simulate import read_scenario, simulate
from orchestra.simulate.policies import PolicySpec
from orchestra.simulate.report import kind_of, percent, seconds, times

HERE: Final = Path(__file__).parent
SCENARIOS: Final = HERE.parent / "examples" / "scenarios"
NAMES: Final = (
    "one-splitter", "three-splitters", "bursts", "crowd", "escalating",
    "evader", "start-up", "daily-peak", "tenants", "mild-cpu",
)  # fmt: skip
FREE: Final = "nothing"
POLICIES: Final[Mapping[str, PolicySpec]] = {
    "QEMU's window": PolicySpec("qemu-window", {"rate": 2000}),
    "token bucket": PolicySpec("static-limits", {"vms": {"*": {"rate": 2000}}}),
    "max-min": PolicySpec("weighted-share", {"limit": {"bus_share": 0.05, "max_delay": 1.0}}),
    "adaptive": PolicySpec("adaptive", {}),
    "adaptive, absolute": PolicySpec("adaptive", {"signals": {"lock_ns": 15.0}, "clear": 0.83}),
    "ladder": PolicySpec("ladder", {"over": {"bus_share": 0.05}}),
}
"""By what tables call them. 2000 locks a second and VM, and 5 % of the bus: numbers that operators have to pick."""

SERIES: Final = ("slowdown_mean",)
DRAWN: Final = (colours.INK, colours.MUTED, colours.GRID, *colours.POLICIES.values())
LEAST: Final = 0.1
"""Per cent that victims are slower: less is not told from nothing."""
SPREAD: Final = 0.11
"""Between two policies in a row, of the rows' distance."""
MARKS: Final = ("o", "v", "^", "s", "X", "P", "D")


def run(names: Iterable[str] = NAMES, duration: float | None = None, say: Any = None) -> dict[str, Any]:
    """Simulate scenarios under each policy; figures and series by scenario and policy."""
    results: dict[str, Any] = {}
    for name in names:
        scenario = read_scenario(SCENARIOS / f"{name}.toml")
        if duration is not None:
            scenario = attrs.evolve(scenario, duration=duration)
        worlds: dict[str, Any] = {}
        for policy, spec in POLICIES.items():
            if say is not None:
                say(f"{name}: {policy}")
            done = simulate(attrs.evolve(scenario, policies=(spec,)))
            if FREE not in worlds:
                worlds[FREE] = _kept(done.without)
            worlds[policy] = _kept(done.with_policies)
        results[name] = {"about": scenario.about, "kind": kind_of(scenario), "worlds": worlds}
    return results


def _kept(world: Any) -> dict[str, Any]:
    series = {"time": world.series["time"], **{name: world.series[name] for name in SERIES}}
    kept: dict[str, Any] = json.loads(json.dumps({"figures": world.figures, "series": series}), parse_float=_short)
    return kept


def _short(text: str) -> float:
    return float(f"{float(text):.5g}")


# ---- the page


def _cells(figures: Mapping[str, Any]) -> list[str]:
    detect, recover, wrong = (figures[name] for name in ("time_to_detect", "time_to_recover", "false_positives"))
    guilty = figures["guilty"]
    missed = f" ({detect['missed']} of {guilty['episodes']} never)" if detect["missed"] else ""
    return [
        times(figures["slowdown"]["mean"]),
        times(figures["slowdown"]["p99.9"]),
        _two(guilty["locks_per_fair_lock"]),
        "-" if figures["jain"] is None else f"{figures['jain']:.2f}",
        ("-" if detect["mean"] is None else seconds(detect["mean"])) + missed,
        "-" if recover["mean"] is None else seconds(recover["mean"]),
        seconds(wrong["throttled_seconds"]),
        str(wrong["vms"]),
        f"{figures['actions']['total']:,}",
    ]


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


COLUMNS: Final = (
    "slow-down of innocents, mean", "p99.9", "the guilty get (1: their fair share)", "Jain's index", "detected after",
    "over budget for", "the innocent waited", "innocent VMs held", "actions",
)  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def page(results: Mapping[str, Any]) -> str:
    """comparison.md."""
    policies = [FREE, *POLICIES]

    def matrix(show: Any) -> str:
        rows = [
            [f"[{name}](#{name})", *(show(one["worlds"][p]["figures"]) for p in policies)]
            for name, one in results.items()
        ]
        return _table(["", *policies], rows)

    parts = [
        HEAD,
        "## Slow-down of the innocent, mean\n",
        matrix(lambda f: times(f["slowdown"]["mean"])),
        "\n![Slow-down by scenario and policy](comparison-slowdown.svg)\n",
        GUILTY,
        matrix(lambda f: _two(f["guilty"]["locks_per_fair_lock"])),
        INNOCENT,
        matrix(lambda f: seconds(f["false_positives"]["throttled_seconds"])),
        "\n## Over time\n\n![Slow-down over time in three of the scenarios](comparison-time.svg)\n",
        READ,
    ]
    for name, one in results.items():
        rows = [[policy, *_cells(one["worlds"][policy]["figures"])] for policy in policies]
        free = one["worlds"][FREE]["figures"]
        parts += [
            f"\n## {name}\n\n{one['about']}\n\n{one['kind']}; without any policy, locks take "
            f"{percent(free['bus_share']['mean'])} of the bus' time, {percent(free['bus_share']['worst'])} at worst.\n",
            _table(["", *COLUMNS], rows),
        ]
    return "\n".join(parts) + "\n"


HEAD: Final = """<!-- Made by docs/comparison.py from simulations; change that and not this. -->
# Policies compared

Ten scenarios (`examples/scenarios/`), each simulated under nothing at all, under what QEMU has, under a plain token
bucket, and under orchestra's policies: what does each cost the guilty and the innocent?
[How the simulator works](simulate.md) says what can be concluded from it and what can't. The budget is 5 % of each
host's bus (14,286 locks a second at 2 GHz and 7000 cycles), ticks are 0.1 s, and the CPU is a Zen 2, on which locks
hurt others most, where nothing else is said.

| name | what |
|---|---|
| nothing | no limit, no policy |
| QEMU's window | `bus-lock-ratelimit=2000` on each VM: 2000 locks in a second, then asleep until it is over |
| token bucket | `StaticLimits`, 2000 locks/s on each VM: the same rate, without the window |
| max-min | `WeightedShare` of 5 % of the bus |
| adaptive | `Adaptive` as it is: no budget, it acts when the host's probe is 1.5 times slower than usual |
| adaptive, absolute | `Adaptive`, when the probe's locked operation takes 15 ns, 1.5 times the calm (clear: 12.5 ns) |
| ladder | `Ladder` with the default steps at 5 % of the bus for one VM |

`python docs/comparison.py` runs it all again.
"""

GUILTY: Final = """## What the guilty get

Locks made, relative to their weighted max-min share of the budget. Less than 1: more was taken from them than the
others needed. More: they got what was the others' due.
"""

INNOCENT: Final = """
## What the innocent pay

Seconds for which VMs were throttled although they had wanted no more than their share for a minute.
"""

READ: Final = """
## What to read in it

- A limit for each VM needs the right number, and there is none: 2000/s is a seventh of what one guest alone may take
  without harm, and the crowd, of whom most keep to it, takes more than twice the host's budget all the same.
- QEMU's window gives the same mean as a bucket of the same rate. What it costs is in the tail (p99.9 below): who has
  2000 locks in a second to spend spends them at once, and meanwhile the others wait as if there were no limit.
- A share of the host's budget takes from the greedy what is over, whoever and how many they are, and hardly anything
  from the others.
- The adaptive policy takes nothing where nobody suffers (mild-cpu, daily-peak). Where somebody does, the innocent fare
  about as under max-min, which has to be told a budget (one-splitter, three-splitters, bursts, crowd, escalating). That
  the guilty get about their share of it as well is due to the CPU: on a Zen 2, 1.5 times slower is 5.6 % of the bus. It
  takes from all who are above its floor, so others pay more than under max-min (crowd, three-splitters); and as it lets
  go within seconds, who comes back is found anew each time (evader).
- A threshold relative to what is usual does as well as an absolute one if the policy saw the host without harm first:
  it is the same to the last digit in one-splitter and escalating. What is there from the start is usual. A storm that
  was there first is found when it comes back after a pause (bursts and evader: compare the times of detection). In
  tenants databases lock all the time; 1.5 times slower than with them is more than 1.5 times slower than without, so
  the guilty get more, and the databases are left alone.
- The ladder leaves alone what is over before its first step (start-up), holds those who come back for longer and longer
  (evader), and looks at each VM for itself: of a crowd in which nobody is over the threshold, nobody is to blame.
"""


# ---- the figures


def figures(results: Mapping[str, Any]) -> dict[str, str]:
    """SVG files by name."""
    policies = [FREE, *POLICIES]
    stand_in = [colours.POLICIES[policy].stand_in for policy in policies]
    ink, muted, grid = (colour.stand_in for colour in (colours.INK, colours.MUTED, colours.GRID))
    shown = [name for name in ("one-splitter", "evader", "crowd") if name in results] or list(results)[:1]
    style: Any = {
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.edgecolor": grid,
        "axes.labelcolor": muted,
        "text.color": ink,
        "xtick.color": muted,
        "ytick.color": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "ytick.left": False,
        "legend.frameon": False,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
    }
    with rc_context(style):
        dots = Figure(figsize=(8.4, 0.55 * len(results) + 1.2), layout="constrained")
        axes = dots.subplots()
        rows = list(reversed(list(results)))
        for i, policy in enumerate(policies):
            means = [results[name]["worlds"][policy]["figures"]["slowdown"]["mean"] for name in rows]
            slower = [max(100 * (mean - 1), LEAST) for mean in means]
            # One below the other in its row: they are close together.
            places = [row + SPREAD * ((len(policies) - 1) / 2 - i) for row in range(len(rows))]
            axes.plot(slower, places, MARKS[i], color=stand_in[i], label=policy, markersize=4.5)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylim(-0.5, len(rows) - 0.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} %" if value > LEAST else f"{value:g} % or less")
        axes.set_xlabel("how much slower the innocent are, mean")
        dots.legend(loc="outside upper left", ncols=4, handletextpad=0.2, columnspacing=1.2)

        lines = Figure(figsize=(8.4, 1.9 * len(shown) + 0.5), layout="constrained")
        panels = lines.subplots(len(shown), 1, squeeze=False)[:, 0]
        for axes, name in zip(panels, shown, strict=True):
            for i, policy in enumerate(policies):
                series = results[name]["worlds"][policy]["series"]
                label = policy if axes is panels[0] else None
                slower = [100 * (mean - 1) for mean in series["slowdown_mean"]]
                axes.plot(series["time"], slower, color=stand_in[i], linewidth=1.3, label=label)
            axes.set_title(name)
            axes.set_yscale("symlog", linthresh=1)
            axes.set_ylim(0, 150)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
            axes.set_xlim(0, None)
        panels[-1].set_xlabel("seconds")
        lines.supylabel("how much slower the innocent are, mean", fontsize=9, color=muted)
        lines.legend(loc="outside upper left", ncols=4, handlelength=1.4, columnspacing=1.2)
    variables = colours.variables(DRAWN)
    return {
        "comparison-slowdown.svg": _styled(inline_svg(dots, "dots", variables)),
        "comparison-time.svg": _styled(inline_svg(lines, "lines", variables)),
    }


def _styled(svg: str) -> str:
    """With colours for light and dark pages of its own: it stands in a file."""

    style = f"<style>{colours.css(DRAWN)}</style>"
    head, close, rest = svg.partition(">")
    return f"{head}{close}\n{style}{rest}\n"


def write(results: Mapping[str, Any], directory: Path) -> None:
    """All files."""
    (directory / "comparison.json").write_text(json.dumps(results, indent=None, separators=(",", ":")) + "\n")
    (directory / "comparison.md").write_text(page(results))
    for name, svg in figures(results).items():
        (directory / name).write_text(svg)


def main(arguments: Sequence[str]) -> None:
    if list(arguments) == ["--write"]:
        results = json.loads((HERE / "comparison.json").read_text())
    else:
        results = run(say=lambda text: print(text, file=sys.stderr, flush=True))
    write(results, HERE)


if __name__ == "__main__":
    main(sys.argv[1:])
