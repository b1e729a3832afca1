"""One HTML file about a run: what got better and by how much, the certificates, the curves, the times, the recipes.

The file needs nothing else: no script, no font, no picture from elsewhere. It reads on a phone and in dark mode.
"""

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from .charts import Bar, interval_chart, line_chart
from .metrics import Estimate, compare, mean_interval
from .tasks import Result

PACKAGES = ("shipyard-llm", "torch", "transformers", "peft", "bitsandbytes", "trl", "accelerate", "deepspeed", "gguf",
            "xllamacpp", "reasoning-gym")  # fmt: skip
CURVES = {
    "loss": ("loss", ""),
    "reward": ("reward", ""),
    "correct": ("exact answers among the samples", ""),
    "accuracy": ("pairs with a positive margin", ""),
    "margin": ("beta x margin over the reference", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_s": ("speed", " tokens/s"),
}
STYLE = """
:root{--page:#fcfcfb;--ink:#1c1c1a;--quiet:#6b6a65;--rule:#e3e2dd;--card:#fff;--accent:#2a6fdb;--before:#8d8c86;
--good:#12743c;--bad:#b3261e;--good-bg:#e5f4ea;--bad-bg:#fbe9e7;--flat-bg:#efeeea}
@media (prefers-color-scheme:dark){:root{--page:#161615;--ink:#ececea;--quiet:#a3a29c;--rule:#33322f;--card:#1e1e1c;
--accent:#6ea8ff;--before:#8f8e88;--good:#7bd69c;--bad:#ff9d94;--good-bg:#16301f;--bad-bg:#3a1b19;--flat-bg:#2a2a27}}
*{box-sizing:border-box}html{color-scheme:light dark}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.7rem;line-height:1.2;margin:.2em 0}h2{font-size:1.15rem;margin:2.2em 0 .6em}
h3{font-size:1rem;margin:1.6em 0 .4em}
.quiet,figcaption .quiet{color:var(--quiet);font-weight:400}p{margin:.4em 0}
ul{margin:.4em 0;padding-left:1.2em}li{margin:.35em 0}
.grid-of{display:grid;gap:12px;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr))}
figure,.card{margin:0;background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:12px}
figcaption{font-size:.85rem;font-weight:600;margin-bottom:6px}svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto;border:1px solid var(--rule);border-radius:10px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:8px 12px;text-align:left;border-bottom:1px solid var(--rule);vertical-align:top}
tr:last-child td{border-bottom:0}th{font-weight:600;color:var(--quiet);white-space:nowrap}
.r{text-align:right;white-space:nowrap}
.tag{display:inline-block;border-radius:99px;padding:1px 10px;font-size:.8rem;font-weight:600;white-space:nowrap;
background:var(--flat-bg)}.tag.good{color:var(--good);background:var(--good-bg)}.tag.bad{color:var(--bad);background:var(--bad-bg)}
.grid{stroke:var(--rule);stroke-width:1}.tick{font-size:10.5px;fill:var(--quiet)}.name{font-size:11.5px;fill:var(--ink)}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}.dot{fill:transparent}.dot:hover,.last{fill:var(--accent)}
.before line{stroke:var(--before);stroke-width:3;stroke-linecap:round}.before circle{fill:var(--before)}
.after line{stroke:var(--accent);stroke-width:3;stroke-linecap:round}.after circle{fill:var(--accent)}
pre{overflow-x:auto;font:.8rem/1.45 ui-monospace,monospace;margin:.6em 0 0}summary{cursor:pointer;font-weight:600}
details{margin:8px 0}
"""


def write_report(
    out: Path,
    title: str,
    curves: Mapping[str, Path],
    results: Sequence[Result],
    certificates: Sequence[Mapping[str, Any]] = (),
    timings: Mapping[str, float] | None = None,
    recipes: Mapping[str, str] | None = None,
) -> Path:
    """Write the report and return its path.

    `curves` maps a stage to its log.jsonl; `results` that share suite, metric and rows are read in order, as before and
    after; `timings` are seconds a stage; `recipes` map a stage to its YAML. Raises ValueError for a log that is damaged
    anywhere but in its last line.
    """
    groups = _groups(results)
    body = [
        f"<h1>{escape(title)}</h1><p class=quiet>{datetime.now(UTC):%d %B %Y, %H:%M} UTC</p>",
        _section("What changed", _verdicts(groups)),
        _section("Scores on held-out rows", _figures(groups) + _table(results)),
        _section("Certificates", _certificates(certificates)),
        _section("Training", "".join(_curves(stage, path) for stage, path in curves.items())),
        _section("Time", _timings(timings or {})),
        _section("Recipes", "".join(_folded(stage, text) for stage, text in (recipes or {}).items())),
        _section("Made with", _environment()),
    ]
    page = (
        '<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n"
    )
    draft = out.with_name(f".{out.name}.tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(out)
    return out


def verdict(before: Result, after: Result) -> str:
    """One plain sentence about two results on the same rows, improvement or not."""
    comparison = compare(before.scores, after.scores)
    change = comparison.difference
    numbers = (
        f"from {before.value:.1%} to {after.value:.1%} on {after.n} rows "
        f"(paired difference {_points(change.value)} points, 95 % {_points(change.low)} to {_points(change.high)}, "
        f"p = {_p(comparison.p_value)})"
    )
    if comparison.improved:
        apart = "; the two intervals do not overlap" if after.low > before.high else ""
        sentence = f"improved, {numbers}{apart}."
    elif comparison.worsened:
        sentence = f"got worse, {numbers}."
    else:
        sentence = f"did not improve beyond chance, {numbers}."
    if before.margins and after.margins:
        margin = _margin(before, after)
        share = sum(new > old for old, new in zip(before.margins, after.margins, strict=True)) / after.n
        sign = "above" if margin.low > 0 else "below" if margin.high < 0 else "not distinguishable from"
        sentence += (
            f" The margin over the model before is {margin.value:+.2f} nats a pair (95 % {margin.low:+.2f} to "
            f"{margin.high:+.2f}), {sign} zero, and positive for {share:.0%} of the pairs."
        )
    return sentence


def read_log(path: Path) -> list[dict[str, float]]:
    """Read a log.jsonl; a last line that a crash cut short is left out. Raises ValueError for any other bad line."""
    rows, lines = [], path.read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows.append({key: float(value) for key, value in row.items() if isinstance(value, int | float)})
        except (ValueError, AttributeError):
            if at < len(lines):
                raise ValueError(f"log: {path}:{at} is not a step; remove that line") from None
    return rows


def _groups(results: Sequence[Result]) -> list[list[Result]]:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.suite, result.metric, result.rows_hash), []).append(result)
    return list(groups.values())


def _verdicts(groups: Sequence[Sequence[Result]]) -> str:
    items = []
    for before, after in (pair for group in groups for pair in pairwise(group)):
        tag = _verdict_tag(before, after)
        what = f"<b>{escape(after.suite)}</b>, {escape(after.metric)}"
        who = f"<i>{escape(after.stage)}</i> against <i>{escape(before.stage)}</i>"
        items.append(f"<li>{tag} {what}: {who} {escape(verdict(before, after))}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def _verdict_tag(before: Result, after: Result) -> str:
    comparison = compare(before.scores, after.scores)
    if comparison.worsened:
        return "<span class='tag bad'>▼ worse</span>"
    if comparison.improved:
        return "<span class='tag good'>▲ better</span>"
    if before.margins and after.margins and _margin(before, after).low > 0:
        return "<span class='tag good'>▲ margin only</span>"
    return "<span class=tag>no change shown</span>"


def _margin(before: Result, after: Result) -> Estimate:
    """How much more the model after prefers the chosen replies than the model before, in nats a pair."""
    return mean_interval([new - old for old, new in zip(before.margins, after.margins, strict=True)])


def _figures(groups: Sequence[Sequence[Result]]) -> str:
    figures = []
    for group in groups:
        bars = [Bar(one.stage or one.suite, one.value, one.low, one.high, at > 0) for at, one in enumerate(group)]
        figures.append(interval_chart(f"{group[0].suite}: {group[0].metric}", bars))
    return f"<div class=grid-of>{''.join(figures)}</div><h3>The numbers</h3>" if figures else ""


def _table(results: Sequence[Result]) -> str:
    rows = [
        f"<tr><td>{escape(one.suite)}<br><span class=quiet>{escape(one.metric)}</span></td><td>{escape(one.stage)}</td>"
        f"<td class=r>{one.value:.1%}</td><td class=r>{one.low:.1%} – {one.high:.1%}</td><td class=r>{one.n}</td>"
        f"<td class=r>{_seconds(one.seconds)}</td><td class=quiet>{escape(one.note)}</td></tr>"
        for one in results
    ]
    head = "<th>task</th><th>model</th><th class=r>score</th><th class=r>95 % interval</th><th class=r>rows</th>"
    return _tabled(f"{head}<th class=r>time</th><th>note</th>", rows)


def _certificates(certificates: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for one in certificates:
        tag = "<span class='tag good'>✓ passed</span>" if one.get("passed") else "<span class='tag bad'>✗ failed</span>"
        remarks = "; ".join(map(str, [*one.get("failures", ()), *one.get("limits", ())]))
        rows.append(
            f"<tr><td>{tag}</td><td>{escape(str(one.get('subject', '')))}<br>"
            f"<span class=quiet>against {escape(str(one.get('reference', '')))}</span></td>"
            f"<td class=r>{_figure(one.get('mean_kl'))}</td><td class=r>{_figure(one.get('budget'))}</td>"
            f"<td class=r>{_figure(one.get('max_abs_logprob_difference'))}</td>"
            f"<td class=r>{_share(one.get('top1_agreement'))}</td>"
            f"<td class=r>{one.get('positions', '')}</td><td class=quiet>{escape(remarks)}</td></tr>"
        )
    head = "<th></th><th>what</th><th class=r>mean KL</th><th class=r>budget</th><th class=r>worst log-prob</th>"
    return _tabled(f"{head}<th class=r>same top token</th><th class=r>positions</th><th>remarks</th>", rows)


def _curves(stage: str, path: Path) -> str:
    rows = read_log(path) if path.is_file() else []
    figures = [
        line_chart(name, [(row["step"], row[key]) for row in rows if key in row], unit)
        for key, (name, unit) in CURVES.items()
        if any(key in row for row in rows)
    ]
    inside = f"<div class=grid-of>{''.join(figures)}</div>" if figures else "<p class=quiet>no steps logged</p>"
    return f"<h3>{escape(stage)}</h3>{inside}"


def _timings(timings: Mapping[str, float]) -> str:
    total = sum(timings.values())
    rows = [f"<tr><td>{escape(name)}</td><td class=r>{_seconds(value)}</td></tr>" for name, value in timings.items()]
    if rows:
        rows.append(f"<tr><td><b>together</b></td><td class=r><b>{_seconds(total)}</b></td></tr>")
    return _tabled("<th>stage</th><th class=r>time</th>", rows)


def _folded(stage: str, text: str) -> str:
    return f"<details class=card><summary>{escape(stage)}</summary><pre>{escape(text)}</pre></details>"


def _environment() -> str:
    facts = [("Python", platform.python_version()), ("system", platform.platform()), ("processor", _processor())]
    facts.append(("cores", str(os.cpu_count())))
    for package in PACKAGES:
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return _tabled("", [f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _section(title: str, inside: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{inside}</section>" if inside else ""


def _tabled(head: str, rows: Sequence[str]) -> str:
    if not rows:
        return ""
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f"<div class=scroll><table>{top}<tbody>{''.join(rows)}</tbody></table></div>"


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f}"


def _p(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else f"{value:.0e}"


def _figure(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, int | float) else ""


def _share(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else ""


def _seconds(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return (
        f"{value:.1f} s"
        if value < 10
        else f"{value:.0f} s"
        if value < 100
        else f"{int(value) // 60} min {int(value) % 60:02d} s"
    )
