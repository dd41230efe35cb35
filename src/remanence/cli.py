"""The commands. Results go to standard output, progress and complaints to standard error."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from remanence.errors import RemanenceError, nearest

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Models with memory that keep learning: from a stream that never ends, in constant memory.",
)
progress_console = Console(stderr=True)
console = Console()

AsJson = Annotated[bool, typer.Option("--json", help="Machine-readable output: JSON, one object per line.")]


@app.command()
def learn(
    source: Annotated[str, typer.Argument(help="A file, a directory, a .gz, - for standard input, or builtin:NAME.")],
    out: Annotated[Path, typer.Option(help="Directory of the run.")],
    memory: Annotated[
        str, typer.Option(help="A memory's name, or a pattern like '3*gla, sliding-window'.")
    ] = "default",
    bytes: Annotated[int | None, typer.Option(min=1, help="Stop after so many bytes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights.")] = 0,
    strategy: Annotated[
        str, typer.Option(help="Against forgetting: replay, ewc, several by comma, or none.")
    ] = "replay",
    size: Annotated[str, typer.Option(help="default, or small: a tenth of the cost.")] = "default",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    as_json: AsJson = False,
) -> None:
    """Learn from SOURCE as it is read; each byte is predicted before it is learned.

    Example: remanence learn builtin:mixed --out runs/demo
    """
    from remanence import api

    def run(on_progress: Any) -> dict[str, Any]:
        return api.learn(
            source,
            out,
            memory=memory,
            bytes=bytes,
            seed=seed,
            strategy=strategy,
            size=size,
            resume=resume,
            on_progress=on_progress,
        )

    try:
        if as_json:
            summary = run(lambda entry: typer.echo(json.dumps(entry)))
            typer.echo(json.dumps(summary))
            return
        said = f"learning from [bold]{escape(source)}[/] into [bold]{escape(str(out))}[/]"
        progress_console.print(said, highlight=False, soft_wrap=True)
        with Live(_status({}), console=progress_console, refresh_per_second=4, transient=True) as live:
            summary = run(lambda entry: live.update(_status(entry)))
    except KeyboardInterrupt:
        if not (out / "run.json").exists():
            raise Interrupted("Stopped before anything was read.") from None
        options = {"memory": memory, "bytes": bytes, "seed": seed, "strategy": strategy, "size": size}
        usual = {"memory": "default", "bytes": None, "seed": 0, "strategy": "replay", "size": "default"}
        given = [word for name, value in options.items() if value != usual[name] for word in (f"--{name}", str(value))]
        again = shlex.join(["remanence", "learn", source, "--out", str(out), *given, "--resume"])
        raise Interrupted(f"Stopped and saved. To go on: {again}") from None
    _show_summary(summary, out)


@app.command()
def watch(
    source: Annotated[str, typer.Argument(help="A file of lines, or - for a pipe.")] = "-",
    top: Annotated[int | None, typer.Option(min=1, help="At the end, only the K most surprising lines.")] = None,
    state: Annotated[
        Path | None, typer.Option(help="Keep what was learned here: read if it is there, written at the end.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read lines, learn from them, and show the surprising ones.

    Example: journalctl -f | remanence watch -
    """
    from remanence import watching
    from remanence.stopping import stop_requests

    def lines() -> Iterator[bytes]:
        if source == "-":
            yield from watching.read_lines(sys.stdin.buffer)
            return
        path = Path(source)
        if not path.is_file():
            close = nearest(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else None
            raise RemanenceError(f"There is no file {source}" + (f"; did you mean {close!r}?" if close else "."))
        with open(path, "rb") as f:
            yield from watching.read_lines(f)

    watcher = watching.Watcher()
    if state is not None and state.exists():
        watcher.load(state)

    def read() -> Iterator[watching.Line]:
        for line in watcher.read(stop.while_waiting(lines())):
            yield line
            if stop.requested:
                raise KeyboardInterrupt

    with stop_requests() as stop:
        try:
            found = read()
            if top is not None:
                found = iter(watching.top_lines(found, top))
            elif not as_json:
                found = (line for line in found if line.score >= watching.SURPRISING)
            for line in found:
                if as_json:
                    fields = ("line", "bits", "bits_per_byte", "score", "text")
                    typer.echo(json.dumps({name: getattr(line, name) for name in fields}))
                else:
                    console.print(watching.render(line), soft_wrap=True)
        finally:
            if state is not None and watcher.seen:
                watcher.save(state)


@app.command()
def generate(
    directory: Annotated[Path, typer.Argument(help="Directory of a run.")],
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="Bytes to write.")] = 400,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest; 1 samples as learned.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
) -> None:
    """Continue from the state of the run in DIRECTORY; writes as it goes.

    Example: remanence generate runs/demo --prompt "The "
    """
    from remanence import api

    given = sys.stdin.buffer.read() if prompt == "-" else prompt.encode()
    output = sys.stdout.buffer
    output.write(given)
    for token in api.generate(directory, given, tokens, temperature=temperature, seed=seed):
        output.write(bytes_of(token))
        output.flush()
    output.write(b"\n")


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="Directory of a run.")]) -> None:
    """Write the page of a run again.

    Example: remanence report runs/demo
    """
    from remanence.evaluation.report import write_report

    typer.echo(write_report(directory))


@app.command()
def systems(
    kind: Annotated[str | None, typer.Option(help="Only members of one kind: memory, strategy, ...")] = None,
    tree: Annotated[bool, typer.Option("--tree", help="The linear recurrences by descent, with their cost.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page: docs/catalogue.md is one.")] = False,
    as_json: AsJson = False,
) -> None:
    """The catalogue: what works, and what is still to come.

    Example: remanence systems --kind memory
    """
    from remanence import catalogue

    if tree:
        from remanence.evaluation.diagnostics import family_tree

        members = family_tree.walk(family_tree.family())
        for line in (json.dumps(asdict(m) | {"depth": d}) for d, m in members) if as_json else family_tree.tree():
            typer.echo(line)
        return
    cards, working = catalogue.cards(), catalogue.working()
    if kind is not None and kind not in (kinds := {c.kind for c in cards.values()}):
        raise RemanenceError(f"There is no kind {kind!r}; known: {', '.join(sorted(kinds))}.")
    shown = [c for c in cards.values() if kind in (None, c.kind)]
    if as_json:
        for system in catalogue.systems().values():
            entry = {"id": system.id, "title": system.title, "year": system.year, "family": system.family}
            typer.echo(json.dumps(entry | {"kind": system.kind, "works": system.id in working}))
        return
    if markdown:
        typer.echo(catalogue.page())
        return
    longest, wide = max(len(c.id) for c in shown), console.width >= 140
    for name in sorted({c.kind for c in shown}):
        out = Table(box=None, padding=(0, 2, 0, 0), title=name, title_justify="left", title_style="bold", expand=True)
        out.add_column("id", width=longest, style="cyan")
        out.add_column("what it is", ratio=3)
        if wide:
            out.add_column("published", ratio=2, style="dim")
        out.add_column("year")
        out.add_column("proof")
        for c in (c for c in shown if c.kind == name):
            paper = [c.system.title] if wide else []
            out.add_row(c.id, c.says, *paper, c.system.year, "yes" if c.system.id in working else "no")
        console.print(out)
        console.print()
    console.print(catalogue.tally())


@app.command()
def prove(
    ids: Annotated[list[str] | None, typer.Argument(help="Systems to prove; all by default.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run the proofs: each system's claim, and the control that must fail it.

    Example: remanence prove titans retnet
    """
    from remanence.evaluation.proving import prove as run

    failed = 0
    for result in run(ids or None):
        failed += not result["passed"]
        if as_json:
            typer.echo(json.dumps(result))
            continue
        mark = Text("proved " if result["passed"] else "FAILED ", style="green" if result["passed"] else "red")
        console.print(mark + Text(f"{result['id']}  ({result['seconds']:.1f} s)", style="bold"))
        for name in ("claim", "evidence", "control"):
            console.print(Text(f"  {name:<9}{result[name]}"))
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="Which benchmark; none lists them.")] = None,
    memory: Annotated[
        list[str] | None, typer.Option(help="A memory or pattern to compare ('3*gla, softmax'); may be given again.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 0,
    seeds: Annotated[
        int, typer.Option(help="How many seeds, from that one on: means, and how far single ones lie.")
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training.")] = False,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE: pairs=16, steps=800, dim=32; may be given again.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Also draw the score against the state's bytes: a PNG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare memories on one benchmark: the same data for each, from one seed, the state's bytes beside the score.

    Example: remanence bench mqar --memory gated-deltanet --memory sliding-window --picture recall.png
    """
    from remanence import catalogue
    from remanence.evaluation import benchmarks
    from remanence.evaluation.benchmarks.picture import draw, show

    if name is None:
        for id, member in catalogue.cards("benchmark").items():
            typer.echo(json.dumps({"benchmark": id, "says": member.says}) if as_json else f"{id:24} {member.says}")
        return
    settings = benchmarks.parse_settings(setting or [])
    with progress_console.status(name) as status:

        def told(what: str, which: int, of: int) -> None:
            status.update(f"{which} of {of}: {escape(what)}")

        how: dict[str, Any] = {"seed": seed, "seeds": seeds, "quick": quick, "on_progress": told}
        rows = benchmarks.run(name, memories=memory or None, **how, **settings)
    if picture is not None:
        draw(rows, picture, name)
    if as_json:
        for row in rows:
            typer.echo(json.dumps(row))
        return
    for out in show(rows):
        console.print(out)


class Interrupted(RemanenceError):
    """Ctrl-C: what was learned is saved."""


def main() -> None:
    """The program: one sentence and exit status 2 for wrong usage, 1 for a fault, 130 when interrupted."""
    try:
        status = app(standalone_mode=False)
    except typer.TyperException as error:
        if message := error.format_message():
            _complain(f"{message.rstrip('.?')}{_did_you_mean(message)}. See `remanence --help`.")
        sys.exit(error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except Interrupted as stopped:
        _complain(str(stopped))
        sys.exit(130)
    except (RemanenceError, ValueError) as error:
        _complain(str(error))
        sys.exit(2 if isinstance(error, LookupError | ValueError) else 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    sys.exit(status or 0)


def bytes_of(token: int) -> bytes:
    """One byte as the stream has it."""
    return bytes([token])


def _did_you_mean(message: str) -> str:
    """The nearest command, where the parser offers none."""
    if "No such command" not in message or "ean" in message:
        return ""
    close = nearest(message.split("'")[1], [c.callback.__name__ for c in app.registered_commands if c.callback])
    return f"; did you mean {close!r}?" if close else ""


def _complain(sentence: str) -> None:
    progress_console.print(Text(f"remanence: {sentence}"), style="red", soft_wrap=True)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return ""


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _status(entry: dict[str, Any]) -> Table:
    out = Table.grid(padding=(0, 2))
    if not entry:
        out.add_row("warming up (the first run compiles for some seconds) …")
        return out
    total = f" of {_size(entry['total'])} ({entry['bytes'] / entry['total']:.0%})" if entry["total"] else ""
    out.add_row("position", f"{_size(entry['bytes'])}{total}", "domain", escape(entry["domain"]))
    out.add_row(
        "bits per byte",
        f"[bold]{entry['bits_per_byte_now']:.3f}[/] now, {entry['bits_per_byte']:.3f} so far",
        "speed",
        f"{entry['bytes_per_second'] / 1000:.1f} kB/s",
    )
    out.add_row(
        "state",
        f"{_size(entry['state_bytes'])}, kept {_size(entry['kept_bytes'])}",
        "process",
        _size(entry["rss_bytes"]),
    )
    return out


def _show_summary(summary: dict[str, Any], out: Path) -> None:
    table = Table(show_header=False, title=f"{escape(summary['source'])}, read once")
    table.add_row("read", f"{summary['bytes']:,} bytes in {summary['seconds']:.0f} s")
    table.add_row("speed", f"{summary['bytes_per_second'] / 1000:.1f} kB/s")
    beside = f"   (xz -9e: {summary['xz_bits_per_byte']:.3f})" if summary["xz_bits_per_byte"] else ""
    table.add_row("bits per byte", f"[bold]{summary['bits_per_byte']:.3f}[/]{beside}")
    table.add_row("state", _size(summary["state_bytes"]))
    table.add_row("kept of the past", _size(summary["kept_bytes"]))
    table.add_row("weights", f"{summary['parameters']:,}")
    table.add_row("process, at most", _size(summary["peak_rss_bytes"]))
    console.print(table)
    if summary["retention"]:
        kept = Table("domain", "when it ended", "at the end", "worst since", title="held-back text, bits per byte")
        for domain, r in summary["retention"].items():
            kept.add_row(escape(domain), *(_bits(r[n]) for n in ("when_ended", "at_end", "worst_since")))
        console.print(kept)
    for sample in summary["samples"]:
        console.print(Text(f"\n… continuing {sample['domain']}", style="bold"))
        console.print(Text(sample["prompt"], style="dim") + Text(_visible(sample["text"])), soft_wrap=True)
    console.print(Text(f"\nreport: {out / 'report.html'}"), soft_wrap=True)


def _visible(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
