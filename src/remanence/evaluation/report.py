"""The page of a run: one HTML file that needs nothing else, readable at a glance, in light and in dark."""

from __future__ import annotations

import html
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from remanence.errors import RemanenceError
from remanence.evaluation.metrics import xz_bits_per_byte

__all__ = ["write_report", "xz_bits_per_byte"]

HUES = 8
SHOWN = 8
# Matplotlib needs colours that it knows; these stand for the page's own, which follow the reader's light or dark.
INK, MUTED, GRID, PAPER, WARN = "#010101", "#020202", "#030303", "#040404", "#050505"
PAGE_COLOURS = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card", WARN: "--warn"} | {
    f"#0600{hue:02x}": f"--hue{hue}" for hue in range(HUES)
}
DRAWING: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "remanence",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
    "lines.solid_joinstyle": "round",
    "text.parse_math": False,
}


def write_report(run_dir: Path) -> Path:
    """Write `report.html` in `run_dir` from its `metrics.jsonl` and `summary.json`, and return its path.

    A run that was cut off has no summary yet: the page then shows what the metrics say. Parts without data say so.

    Raises: `RemanenceError` when there are no metrics, or a file is damaged; a torn last line, as a killed run leaves
        it, is passed over.
    """
    run_dir = Path(run_dir)
    metrics = _metrics(run_dir / "metrics.jsonl")
    summary = {**metrics[-1], **_summary(run_dir / "summary.json")}
    path = run_dir / "report.html"
    fresh = path.with_suffix(".html.tmp")
    fresh.write_text(_page(metrics, summary), encoding="utf-8")
    os.replace(fresh, path)
    return path


def _metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        raise RemanenceError(
            f"There is no {path.name} in {str(path.parent)!r}; give the directory that `remanence learn --out` wrote."
        ) from None
    entries = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry.get("bytes"), int):
                raise ValueError
            entries.append(entry)
        except (ValueError, AttributeError):
            if number < len(lines):
                raise RemanenceError(f"{path} is damaged: line {number} is not an entry of metrics.") from None
    if not entries:
        raise RemanenceError(f"{path} has no entry yet; a report needs a run that has learned for a moment.")
    return entries


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        summary = None
    if not isinstance(summary, dict):
        raise RemanenceError(f"{path} is damaged: it is not a JSON object; resume the run, which writes it anew.")
    return summary


def _page(metrics: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    retention = {name: scores for name, scores in (summary.get("retention") or {}).items() if scores}
    phases = summary.get("domains") or _phases(metrics)
    names = list(dict.fromkeys([phase["domain"] for phase in phases] + list(retention)))
    hues = {name: f"#0600{i % HUES:02x}" for i, name in enumerate(names)}
    end = max(int(summary["bytes"]), 1)
    title = f"Remanence · {summary.get('source', 'a run')}"
    said = [f"memory {summary['memory']}"] if summary.get("memory") else []
    said += [f"{summary['parameters']:,} parameters"] if summary.get("parameters") else []
    said += ["every byte predicted before it was learned, each read once"]
    sections = [
        _section(
            "Bits per byte along the stream",
            "Lower is better. The thick line is the mean so far, the thin one the bytes just read.",
            _drawn(lambda axes: _draw_bits(axes, metrics, summary, phases, hues, end), height=3.4),
        ),
        _section(
            "What is retained",
            "Bits per byte on held-back text of each domain during the whole run. A line is full from where its "
            "domain first ended (●); ▲ is the worst value since.",
            _retention_figure(summary, retention, phases, hues, end),
            _retention_table(retention, hues),
        ),
        _section(
            "Memory over time",
            "Process memory, and what the model carries along: its state and what it keeps of the past.",
            _memory_figures(metrics, end),
        ),
        _samples(summary.get("samples") or []),
    ]
    return TEMPLATE.format(
        title=html.escape(title),
        style=STYLE,
        heading=html.escape(str(summary.get("source", "a run"))),
        said=html.escape(" · ".join(said)),
        tiles="".join(_tiles(summary, retention, metrics)),
        sections="".join(sections),
    )


def _phases(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The phases as far as metrics tell: where the domain of the entries changes."""
    phases: list[dict[str, Any]] = []
    for entry in metrics:
        if "domain" not in entry:
            continue
        if not phases or phases[-1]["domain"] != entry["domain"]:
            phases.append({"domain": entry["domain"], "start": phases[-1]["end"] if phases else 0})
        phases[-1]["end"] = entry["bytes"]
    return phases


def _tiles(summary: Mapping[str, Any], retention: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    bits, xz = summary.get("bits_per_byte"), summary.get("xz_bits_per_byte")
    tiles = []
    if bits is not None:
        beside = f"xz -9e: {xz:.3f} ({100 * (bits / xz - 1):+.0f}%)" if xz else "the whole stream"
        tiles.append(_tile("bits per byte", f"{bits:.3f}", beside, good=bool(xz) and bits < xz))
    changes = {d: s["at_end"] - s["when_ended"] for d, s in retention.items() if _complete(s)}
    if changes:
        worst = max(changes, key=lambda domain: changes[domain])
        tiles.append(
            _tile("most forgotten", f"{changes[worst]:+.3f}", f"bits per byte, {worst}", good=changes[worst] <= 0.1)
        )
    seconds = summary.get("seconds")
    tiles.append(_tile("read", _size(summary["bytes"]), f"in {_duration(seconds)}" if seconds else "once"))
    speed = summary.get("bytes_per_second") or (summary["bytes"] / seconds if seconds else None)
    if speed:
        tiles.append(_tile("speed", f"{speed / 1000:.1f} kB/s", "learning included"))
    carried = [summary[key] for key in ("state_bytes", "kept_bytes") if summary.get(key) is not None]
    if carried:
        tiles.append(_tile("carried along", _size(sum(carried)), "state and kept bytes"))
    peak = summary.get("peak_rss_bytes") or max((m.get("rss_bytes") or 0 for m in metrics), default=0)
    if peak:
        tiles.append(_tile("process memory", _size(peak), "at most"))
    return tiles


def _tile(name: str, value: str, note: str, good: bool = False) -> str:
    mark = ' class="good"' if good else ""
    return f"<div><dt>{html.escape(name)}</dt><dd{mark}>{html.escape(value)}</dd><p>{html.escape(note)}</p></div>"


def _section(title: str, says: str, *parts: str) -> str:
    return f"<section><h2>{title}</h2><p class='says'>{says}</p>{''.join(parts)}</section>"


def _absent(what: str) -> str:
    return f"<p class='absent'>{what}</p>"


def _drawn(draw: Callable[[Axes], None], width: float = 10.4, height: float = 3.0) -> str:
    """The figure as inline SVG whose colours are the page's variables."""
    with rc_context(DRAWING):
        # fixed margins in inches, so that figures below each other share their horizontal axis
        figure = Figure(figsize=(width, height))
        figure.subplots_adjust(left=0.6 / width, right=1 - 1.45 / width, bottom=0.3 / height, top=1 - 0.06 / height)
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub("|".join(PAGE_COLOURS), lambda m: f"var({PAGE_COLOURS[m[0]]})", svg)


def _stream_axis(axes: Axes, end: int, phases: Sequence[Mapping[str, Any]], hues: Mapping[str, str]) -> None:
    axes.set_xlim(0, end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _size(x)))
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 2.5, 5, 10]))
    for phase in phases:
        start, stop = phase["start"], phase.get("end", end)
        axes.axvspan(start, stop, color=hues[phase["domain"]], alpha=0.11, linewidth=0)
        if stop - start > 0.012 * end * min(len(phase["domain"]) + 1, 8):
            where, label = ((start + stop) / 2, 1.0), _short(phase["domain"], int((stop - start) / end * 110))
            axes.annotate(
                label, where, (0, -5), xycoords=axes.get_xaxis_transform(), textcoords="offset points",
                ha="center", va="top", color=hues[phase["domain"]], fontweight="bold", fontsize=10,
            )  # fmt: skip


def _draw_bits(
    axes: Axes,
    metrics: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    phases: Sequence[Mapping[str, Any]],
    hues: Mapping[str, str],
    end: int,
) -> None:
    _stream_axis(axes, end, phases, hues)
    x, now = _series(metrics, "bits_per_byte_now")
    axes.plot(x, now, color=MUTED, linewidth=1.0, alpha=0.75, **_alone(x))
    x, so_far = _series(metrics, "bits_per_byte")
    axes.plot(x, so_far, color=INK, linewidth=2.4, **_alone(x))
    levels = [*np.quantile(now, [0.94])] if len(now) else []
    notes: list[tuple[float, str, str]] = []
    if len(so_far):
        levels += [so_far[-1] * 1.4, float(np.median(so_far)) * 1.2]
        notes.append((so_far[-1], f"mean so far {so_far[-1]:.3f}", INK))
    xz = summary.get("xz_bits_per_byte")
    if xz:
        axes.axhline(xz, color=WARN, linewidth=1.6, linestyle=(0, (5, 3)))
        levels.append(xz * 1.25)
        notes.append((xz, f"xz -9e {xz:.3f}", WARN))
    top = min(8.5, max(levels, default=8.0) * 1.18)
    axes.set_ylim(0, top)
    _notes(axes, notes)


def _alone(x: Sized) -> dict[str, Any]:
    """A line of one point is seen only as a dot."""
    return {"marker": "o", "clip_on": False} if len(x) == 1 else {}


def _retention_figure(
    summary: Mapping[str, Any],
    retention: Mapping[str, Any],
    phases: Sequence[Mapping[str, Any]],
    hues: Mapping[str, str],
    end: int,
) -> str:
    curve = [(point["bytes"], point["scores"]) for point in summary.get("retention_curve") or []]
    lines = {d: [(x, s[d]) for x, s in curve if s.get(d) is not None and s[d] == s[d]] for d in hues}
    lines = {domain: points for domain, points in lines.items() if points}
    if not lines:
        return _absent("No text was held back in this run, so there is no retention to show.")
    ends: dict[str, int] = {}
    for phase in phases:
        ends.setdefault(phase["domain"], phase.get("end", end))
    losses = {d: (s["worst_since"] or 0) - (s["when_ended"] or 0) for d, s in retention.items() if _complete(s)}
    chosen = sorted(lines, key=lambda domain: -losses.get(domain, -np.inf))[:SHOWN]

    def draw(axes: Axes) -> None:
        _stream_axis(axes, end, phases, hues)
        levels: list[float] = []
        notes: list[tuple[float, str, str]] = []
        for domain in chosen:
            points, hue = lines[domain], hues[domain]
            over = [p for p in points if p[0] >= ends.get(domain, end)]
            before = [p for p in points if p[0] <= (over[0][0] if over else end)]
            axes.plot(
                *zip(*before, strict=True), color=hue, linewidth=1.2, alpha=0.6, linestyle=(0, (2, 2)), **_alone(before)
            )
            if over:
                axes.plot(*zip(*over, strict=True), color=hue, linewidth=2.4)
                axes.plot(*over[0], "o", color=hue, markersize=7, markeredgecolor=PAPER, clip_on=False)
                worst = max(over, key=lambda point: point[1])
                if len(over) > 1 and len(chosen) <= 4:
                    axes.plot(*worst, "^", color=hue, markersize=9, markeredgecolor=PAPER, clip_on=False)
                    axes.annotate(
                        f"{worst[1]:.2f}", worst, (0, 9), textcoords="offset points", ha="center",
                        color=hue, fontsize=9, fontweight="bold",
                    )  # fmt: skip
            levels += [score for _, score in over or points]
            notes.append((points[-1][1], f"{_short(domain, 12)} {points[-1][1]:.2f}", hue))
        axes.set_ylim(0, min(8.5, max(levels) * 1.45))
        _notes(axes, notes)

    more = len(lines) - len(chosen)
    note = _absent(f"Shown are the {SHOWN} domains that rose most; {more} more are in the table.") if more else ""
    return _drawn(draw, height=3.4) + note


def _notes(axes: Axes, notes: Sequence[tuple[float, str, str]]) -> None:
    """Labels at the right end of their lines, moved apart where lines end close together."""
    low, top = axes.get_ylim()
    gap, at = (top - low) * 0.075, -np.inf
    room = len(notes)
    for y, text, colour in sorted(notes):
        room -= 1
        at = max(min(y, top - gap * room), at + gap)
        axes.annotate(
            text, (1, at), (8, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points",
            va="center", color=colour, fontsize=10, annotation_clip=False,
        )  # fmt: skip


def _memory_figures(metrics: Sequence[Mapping[str, Any]], end: int) -> str:
    def panel(keys: Mapping[str, tuple[str, str]]) -> str:
        series = {key: _series(metrics, key) for key in keys}
        series = {key: pair for key, pair in series.items() if len(pair[0])}
        if not series:
            return _absent("Not recorded in this run.")

        def draw(axes: Axes) -> None:
            _stream_axis(axes, end, [], {})
            axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _size(y)))
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
            for key, (x, y) in series.items():
                axes.plot(x, y, color=keys[key][1], linewidth=2.2, **_alone(x))
            axes.set_ylim(0, max(max(y.max() for _, y in series.values()) * 1.25, 1))
            _notes(axes, [(y[-1], f"{keys[key][0]} {_size(y[-1])}", keys[key][1]) for key, (_, y) in series.items()])

        return _drawn(draw, width=5.6, height=2.5)

    process = panel({"rss_bytes": ("process", INK)})
    carried = panel({"state_bytes": ("state", "#060000"), "kept_bytes": ("kept", "#060001")})
    return f"<div class='pair'><div>{process}</div><div>{carried}</div></div>"


def _retention_table(retention: Mapping[str, Any], hues: Mapping[str, str]) -> str:
    if not retention:
        return ""
    rows = []
    for domain, scores in retention.items():
        change = scores["at_end"] - scores["when_ended"] if _complete(scores) else None
        mood = "" if change is None else " class='good'" if change <= 0 else " class='bad'" if change > 0.1 else ""
        dot = f"<i style='background:var({PAGE_COLOURS[hues[domain]]})'></i>"
        figures = "".join(f"<td>{_bits(scores.get(key))}</td>" for key in ("when_ended", "worst_since", "at_end"))
        signed = "–" if change is None else f"{change:+.3f}".replace("-", "−")
        rows.append(f"<tr><th>{dot}{html.escape(domain)}</th>{figures}<td{mood}>{signed}</td></tr>")
    head = "<th>domain</th><th>when it ended</th><th>worst since</th><th>at the end</th><th>change</th>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    shown = [
        f"<pre><b>{html.escape(str(sample.get('prompt', '')))}</b>{html.escape(str(sample.get('text', '')))}</pre>"
        for sample in samples
    ]
    return _section("What the model writes", "The start was given (bold); the model, as it is now, went on.", *shown)


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values of the entries that have a number under `key`."""
    points = [(m["bytes"], m[key]) for m in metrics if isinstance(m.get(key), int | float) and m[key] == m[key]]
    values = np.array(points, float).reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _complete(scores: Mapping[str, Any]) -> bool:
    return scores.get("when_ended") is not None and scores.get("at_end") is not None


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: max(length - 1, 1)] + "…"


def _size(n: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:.0f} B" if n else "0"


def _duration(seconds: float) -> str:
    minutes = int(seconds // 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.1f} s"


STYLE = """
:root { color-scheme: light dark; --paper:#f6f5f2; --card:#fffefb; --ink:#1d1f23; --muted:#6d7076; --grid:#e4e2dc;
  --warn:#b3541e; --good:#22754a; --bad:#b3261e;
  --hue0:#2f6db5; --hue1:#a8548f; --hue2:#2e8b6f; --hue3:#b8791b; --hue4:#6a5acd; --hue5:#c2504a; --hue6:#3d8fa6;
  --hue7:#7d8a2e; }
@media (prefers-color-scheme: dark) { :root { --paper:#131518; --card:#1b1e22; --ink:#e9e7e2; --muted:#9a9da3;
  --grid:#2e3237; --warn:#eb9a5f; --good:#6cc493; --bad:#f0857c;
  --hue0:#7fb2ee; --hue1:#dd93c8; --hue2:#6fcbae; --hue3:#e3b15f; --hue4:#a99cf5; --hue5:#ee8f88; --hue6:#7cc6da;
  --hue7:#bccb67; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 Inter, system-ui, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
header p:first-child { margin: 0; color: var(--muted); font-size: 13px; letter-spacing: .14em;
  text-transform: uppercase; }
h1 { margin: 2px 0 4px; font-size: 34px; line-height: 1.15; letter-spacing: -.02em; overflow-wrap: anywhere; }
header p:last-child, .says { margin: 0; color: var(--muted); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(158px, 1fr)); gap: 12px; margin: 24px 0 12px; }
dl div, section { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; }
dl div { padding: 14px 16px 12px; }
dt { font-size: 13px; color: var(--muted); }
dd { margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -.02em; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
dl p { margin: 0; font-size: 12.5px; color: var(--muted); overflow-wrap: anywhere; }
section { padding: 20px 24px; margin-top: 12px; }
h2 { margin: 0; font-size: 19px; letter-spacing: -.01em; }
.says { font-size: 14px; margin-bottom: 10px; max-width: 90ch; }
.absent { color: var(--muted); font-size: 14px; font-style: italic; margin: 8px 0; }
svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 20px; }
table { border-collapse: collapse; width: 100%; margin-top: 14px; font-variant-numeric: tabular-nums; font-size: 15px; }
th, td { padding: 7px 10px; text-align: right; border-bottom: 1px solid var(--grid); font-weight: 400; }
th:first-child { text-align: left; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-size: 13px; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
th i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 9px; }
.good { color: var(--good); } .bad { color: var(--bad); }
pre { margin: 10px 0 0; padding: 14px 16px; background: var(--paper); border-radius: 8px; font-size: 13px;
  line-height: 1.5;
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; }
footer { margin-top: 20px; color: var(--muted); font-size: 13px; }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body><main>
<header><p>Remanence</p><h1>{heading}</h1><p>{said}</p></header>
<dl>{tiles}</dl>
{sections}
<footer>Drawn from metrics.jsonl and summary.json beside this page by <code>remanence report</code>.</footer>
</main></body>
</html>
"""
