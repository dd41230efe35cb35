"""The results of a benchmark as a table and as a picture: what was recalled, against the bytes of state it took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import JustifyMethod
from rich.table import Table

LAST = ("loss", "chance", "state_bytes", "parameters", "seconds", "spread")
"""What stands after the scores in every row."""


def scores(row: dict[str, Any]) -> list[str]:
    """The columns of a row that hold shares of right answers."""
    return [name for name in row if name not in ("task", "memory", *LAST)]


def show(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """A table for each set of columns: tasks that are examined alike stand together."""
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(name for name in row if name != "spread"), []).append(row)
    return [_table(columns, own) for columns, own in alike.items()]


def _table(columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    cells = [[_cell(name, row[name], row.get("spread", {}).get(name)) for name in columns] for row in rows]
    for name, column in zip(columns, zip(*cells, strict=True), strict=True):
        heading = name.replace("_", " ").split()
        longest = max(len(word) for cell in (*heading, *column) for word in cell.split())
        justify: JustifyMethod = "left" if isinstance(rows[0][name], str) else "right"
        table.add_column("\n".join(heading), justify=justify, overflow="fold", min_width=min(32, longest))
    for row in cells:
        table.add_row(*row)
    return table


def _cell(name: str, value: Any, spread: float | None) -> str:
    if value is None:
        return "–"
    if name == "seconds":
        return f"{value:.1f}"
    told = f"{value:.3f}" if isinstance(value, float) else str(value)
    return f"{told} ±{spread:.3f}" if spread else told


def draw(rows: Sequence[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Write a picture of the first score of each row against its state's bytes, a panel per task.

    Points of one memory at several sizes are joined. Rows are as `run` gives them; the memory's name is the first word
    of `memory`; rows without a task or a chance go without. The file's ending picks the format (PNG, SVG, PDF).

    Raises: `ValueError` for an ending that is none of these, or when there are no rows.
    """
    path = Path(path)
    rows = [row for row in rows if "state_bytes" in row]  # what could not be measured has none
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"A picture is a .png, .svg or .pdf file, got {str(path)!r}.")
    if not rows:
        raise ValueError("There is nothing to draw: no rows were given.")
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(row.get("task", "") for row in rows))
    figure = Figure(figsize=(5.5 * len(tasks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    names = list(dict.fromkeys(row["memory"].split()[0] for row in rows))
    for panel, task in zip(panels, tasks, strict=True):
        own = [row for row in rows if row.get("task", "") == task]
        score = scores(own[0])[0]
        own = [row for row in own if row[score] is not None]
        for i, name in enumerate(names):
            points = sorted((row["state_bytes"], row[score]) for row in own if row["memory"].split()[0] == name)
            if points:
                panel.plot(*zip(*points, strict=True), "os^Dv*Ph"[i // 10 % 8] + "-", color=f"C{i % 10}", label=name)
        if own and "chance" in own[0]:
            panel.axhline(own[0]["chance"], color="grey", linestyle=":", label="chance")
        panel.set(title=task, xlabel="bytes of state", ylabel=score, ylim=(-0.03, 1.03))
        if all(row["state_bytes"] > 0 for row in own):
            panel.set_xscale("log")
    panels[-1].legend(fontsize="small")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
