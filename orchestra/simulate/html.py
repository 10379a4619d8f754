"""A simulation's report as one HTML page that needs nothing else: no script, no font, no file beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

from ..output.colours import PAGE, css
from .drawings import drawings
from .report import ROWS, action_row, document, kind_of, percent, seconds, times
from .run import Result

__all__ = ["page"]

# What is no drawing's: the page's own.
LIGHT: Final = "--page: #f6f7f9; --card: #ffffff; --good: #12733f; --bad: #b3261e;"
DARK: Final = "--page: #14171a; --card: #1c2025; --good: #5fcf92; --bad: #ff8a80;"
STYLE: Final = (
    f"{css(PAGE, light=LIGHT, dark=DARK)}\n"
    + """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.05rem; margin: 0 0 4px; }
p { margin: 0 0 10px; } .muted { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin: 22px 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 10px; padding: 16px 18px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; font-weight: 650; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(500px, 100%), 1fr)); gap: 14px; }
.plots p { font-size: 0.87rem; min-height: 2.6em; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.wide { overflow-x: auto; margin: 14px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 10px; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, td.text, th.text { text-align: left; } td.text { white-space: normal; }
summary { cursor: pointer; font-weight: 650; } pre { overflow-x: auto; font-size: 0.83rem; }
.bad { color: var(--bad); }
"""
)

LISTED: Final = 100


def page(result: Result) -> str:
    """The whole page.

    Raises:
        OrchestraError: matplotlib is missing; the message says which command installs it.
    """
    scenario = result.scenario
    title = f"{scenario.name}: a simulation"
    about = f"<p>{escape(scenario.about)}</p>" if scenario.about else ""
    ruled = ", ".join(result.policies) or "no policy"
    plots = "".join(
        f'<section class="card"><h2>{escape(name)}</h2><p class="muted">{escape(text)}</p>{svg}</section>'
        for name, text, svg in drawings(result)
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>
<h1>{escape(title)}</h1>
<p class="muted">{escape(kind_of(scenario))} &middot; {escape(ruled)} &middot; seed {result.seed} &middot; budget
{percent(scenario.budget.bus_share)} of each host's bus</p>
{about}
<div class="tiles">{"".join(_tiles(result))}</div>
<div class="plots">{plots}</div>
<section class="card wide"><h2>Figures</h2>{_table(_figures(result))}</section>
<section class="card wide"><h2>Groups</h2>{_table(_groups(result))}</section>
{_actions(result)}
{_errors(result)}
<section class="card wide"><details><summary>The scenario, and how to read this</summary>
<p class="muted">A simulation shows how policies act on the guests that the scenario describes; it does not measure a
host. The slow-down of victims is worked out by a model whose sources and limits are in orchestra's documentation
(docs/simulate.md). <em>Guilty</em> is a VM that wants more than its weighted max-min share of the budget while its
host is asked for more than that. <em>Time to detect</em>: from then to the first time it is held or acted on.
<em>Time to recover</em>: how long a host stays over its budget. <em>Time to release</em>: from the end of guilt to the
end of the last hold.
<em>False positives</em>: VMs held that took no more than their share. The same seed gives the same figures.</p>
<pre>{escape(json.dumps(document(result)["scenario"], indent=1))}</pre></details></section>
</main></body></html>
"""


def _tiles(result: Result) -> Iterator[str]:
    def tile(value: str, text: str, before: str = "") -> str:
        was = f'<span class="muted">{escape(before)}</span>' if before else ""
        return f'<div class="card tile"><b>{escape(value)}</b>{escape(text)}<br>{was}</div>'

    now, free = result.worlds[0].figures, result.without.figures
    both = result.with_policies is not None

    def without(text: str) -> str:
        return f"without policies: {text}" if both else ""

    yield tile(times(now["slowdown"]["mean"]), "victims' slow-down", without(times(free["slowdown"]["mean"])))
    yield tile(times(now["slowdown"]["p99.9"]), "at p99.9", without(times(free["slowdown"]["p99.9"])))
    if now["jain"] is not None:
        yield tile(
            f"{now['jain']:.3f}", "Jain's index", without("-" if free["jain"] is None else f"{free['jain']:.3f}")
        )
    if both:
        detect, recover = now["time_to_detect"], now["time_to_recover"]
        missed = f"{detect['missed']:,} of {now['guilty']['episodes']:,} episodes not acted on"
        yield tile(seconds(detect["mean"]), "to detect, mean", missed)
        before = without(seconds(free["time_to_recover"]["mean"]))
        yield tile(seconds(recover["mean"]), "to recover, mean", before)
        wrong = now["false_positives"]
        yield tile(f"{wrong['vms']:,}", "false positives", f"innocent VMs waited {seconds(wrong['throttled_seconds'])}")


def _table(rows: Iterator[list[str]]) -> str:
    head, *body = rows
    made = ["<table><thead><tr>", *(f"<th>{escape(cell)}</th>" for cell in head), "</tr></thead><tbody>"]
    for row in body:
        made += ["<tr>", *(f"<td>{escape(cell)}</td>" for cell in row), "</tr>"]
    return "".join([*made, "</tbody></table>"])


def _figures(result: Result) -> Iterator[list[str]]:
    yield ["", *(world.label for world in result.worlds)]
    for name, show in ROWS:
        yield [name, *(show(world.figures) for world in result.worlds)]


def _groups(result: Result) -> Iterator[list[str]]:
    yield ["", "VMs", "behaviour", "locks wanted", "locks made", "of those wanted", "throttled, of its time"]
    for vms, row in zip(result.scenario.vms, result.worlds[0].figures["groups"], strict=True):
        got = percent(row["done"] / row["wanted"]) if row["wanted"] else "-"
        yield [
            row["name"],
            f"{row['vms']:,}",
            vms.behaviour.kind,
            f"{row['wanted']:,.0f}",
            f"{row['done']:,.0f}",
            got,
            percent(row["throttled_share"]),
        ]


def _actions(result: Result) -> str:
    world = result.worlds[0]
    if not world.deeds:
        return ""
    kinds: Mapping[str, Any] = world.figures["actions"]["kinds"]
    counts = ", ".join(f"{count:,} {name}" for name, count in kinds.items())
    rows = []
    for deed in world.deeds[:LISTED]:
        row = action_row(deed)
        target = row.get("vm") or (f"tenant {row['tenant']}" if row.get("tenant") else "the host")
        error = f' <span class="bad">{escape(deed.error)}</span>' if deed.error else ""
        rows.append(
            f"<tr><td>{deed.time:,.2f} s</td><td>{deed.host}</td><td class='text'>{escape(deed.policy)}</td>"
            f"<td class='text'>{row['action']}</td><td class='text'>{escape(target)}</td>"
            f"<td class='text'>{escape(row['reason'])}{error}</td></tr>"
        )
    return (
        f'<section class="card wide"><h2>Actions</h2><p class="muted">{escape(counts)}</p><details><summary>The first '
        f"{len(rows)}</summary><table><thead><tr><th>time</th><th>host</th><th class='text'>policy</th>"
        "<th class='text'>action</th><th class='text'>on</th><th class='text'>reason</th></tr></thead><tbody>"
        f"{''.join(rows)}</tbody></table></details></section>"
    )


def _errors(result: Result) -> str:
    said = [(error, hosts) for world in result.worlds for error, hosts in world.errors.items()]
    if not said:
        return ""
    items = "".join(f"<li>{escape(error)} (on {hosts:,} hosts)</li>" for error, hosts in said)
    heading = "Policies that raised and were switched off"
    return f'<section class="card wide"><h2 class="bad">{heading}</h2><ul>{items}</ul></section>'
