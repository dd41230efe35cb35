"""The main job: `learn` from a stream, and what can be asked of a run afterwards."""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from remanence import __version__, continual
from remanence.catalogue import cards
from remanence.errors import CheckpointError, RemanenceError, StreamError, unknown
from remanence.evaluation.metrics import Retention, xz_bits_per_byte
from remanence.learning import Learner, checkpoint
from remanence.models.counting import CountingModel, compile_apart
from remanence.models.language import LanguageModel, parse_pattern
from remanence.optim.schedules import EndlessSchedule
from remanence.stopping import stop_requests
from remanence.streams import Source, open_source

CHECKPOINT = "checkpoint.safetensors"
SIZES: Mapping[str, Mapping[str, Any]] = {
    "default": {"dim": 128, "counts": "default", "segment": 64},
    "small": {"dim": 32, "counts": "small", "segment": 256},
}
DEFAULT_PATTERN = "griffin"
PROBE_BYTES, PROBE_DOMAINS = 4096, 12  # how much held-back text the retention curve reads


@dataclass(frozen=True)
class Settings:
    """What decides the course of a run; a run resumes only under the settings that it began with."""

    source: str
    memory: str = "default"
    bytes: int | None = None
    seed: int = 0
    strategy: str = "replay"
    size: str = "default"

    def check(self) -> None:
        """Raise, in one sentence, on a setting that names nothing or lies out of range."""
        if self.size not in SIZES:
            raise unknown("size", self.size, SIZES)
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"bytes must be at least 1, got {self.bytes}.")
        for name in parse_pattern(self.pattern):
            if name not in cards("memory"):
                raise unknown("memory", name, [*cards("memory"), "default"])
        for name in self.strategies:
            if name not in cards("strategy"):
                raise unknown("strategy", name, [*cards("strategy"), "none"])

    @property
    def pattern(self) -> str:
        """The stack that `memory` stands for: a name alone is one layer of it."""
        return DEFAULT_PATTERN if self.memory == "default" else self.memory

    @property
    def strategies(self) -> list[str]:
        """The names in `strategy`, in order; none for `"none"`."""
        return [] if self.strategy == "none" else [s.strip() for s in self.strategy.split(",")]

    def learner(self) -> Learner:
        """A new learner, the same one for the same settings."""
        size = SIZES[self.size]
        torch.manual_seed(self.seed)
        model = LanguageModel(self.pattern, dim=size["dim"], ngrams=())
        return Learner(
            model,
            strategies=[continual.make(name) for name in self.strategies],
            counts=CountingModel(size=size["counts"], seed=self.seed),
            schedule=EndlessSchedule(),
        )


@dataclass
class Progress:
    """Where a run stands: everything beside the learner that a checkpoint must hold."""

    position: int = 0
    bits: float = 0.0
    seconds: float = 0.0
    peak_rss: int = 0
    domains: list[dict[str, Any]] = field(default_factory=list)
    retention: dict[str, Any] = field(default_factory=dict)
    recent_bits: float = 0.0
    recent_bytes: int = 0
    lines: int = 0
    finished: bool = False


class Run:
    """A directory with a learner in it: opened new, or resumed from its checkpoint."""

    def __init__(self, directory: Path, settings: Settings, learner: Learner):
        self.directory, self.settings, self.learner = directory, settings, learner
        self.progress = Progress()
        self.retention = Retention()
        self.made: list[Path] = []

    @classmethod
    def create(cls, directory: Path, settings: Settings, fingerprint: str) -> Run:
        """Begin a run in an empty or new directory."""
        settings.check()
        if (directory / "run.json").exists():
            raise RemanenceError(f"{directory} holds a run already: pass --resume to continue it, or another --out.")
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise RemanenceError(f"{directory} is not empty and holds no run; choose another --out.")
        made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        about = {"settings": asdict(settings), "fingerprint": fingerprint, "version": __version__}
        _write_json(directory / "run.json", about | {"threads": torch.get_num_threads()})
        run = cls(directory, settings, settings.learner())
        run.made = made
        return run

    @classmethod
    def open(cls, directory: Path) -> Run:
        """The run in a directory, as its last checkpoint left it."""
        settings = Settings(**_run_json(directory)["settings"])
        run = cls(directory, settings, settings.learner())
        if (directory / CHECKPOINT).exists():
            tree = checkpoint.read(directory / CHECKPOINT)
            if "learner" not in tree or "progress" not in tree:
                raise CheckpointError(f"{directory / CHECKPOINT} is a checkpoint, but not one of a run.")
            run.learner.load_state_dict(tree["learner"])
            run.progress = Progress(**tree["progress"])
            run.retention.load_state_dict(run.progress.retention)
        return run

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        self.progress.retention = self.retention.state_dict()
        tree = {"learner": self.learner.state_dict(), "progress": asdict(self.progress)}
        checkpoint.write(self.directory / CHECKPOINT, tree)

    def discard(self) -> None:
        """Leave no trace of a run that read nothing: its files, and the directories that it made."""
        for name in ("metrics.jsonl", "run.json"):
            (self.directory / name).unlink(missing_ok=True)
        for folder in self.made:
            folder.rmdir()


def learn(
    source: str | Source,
    out: str | Path,
    *,
    memory: str = "default",
    bytes: int | None = None,
    seed: int = 0,
    strategy: str = "replay",
    size: str = "default",
    resume: bool = False,
    checkpoint_seconds: float = 20.0,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Learn from a stream of bytes as it is read, each byte predicted before it is learned.

    Args:
        source: a file, a directory, a `.gz`, `-` for standard input, or `builtin:NAME`.
        out: the run's directory; it gets `metrics.jsonl`, `summary.json`, `report.html` and the checkpoint.
        memory: a name from `remanence systems`, or a pattern such as `"3*gla, sliding-window"`.
        bytes: stop after so many.
        strategy: what guards against forgetting: `replay`, `ewc`, several with commas, or `none`.
        size: `default`, or `small` for a model of about a tenth of the cost.
        resume: continue the run in `out`.
        checkpoint_seconds: the least time between two checkpoints.
        on_progress: called with each line of the metrics.

    Returns: the contents of `summary.json`.
    Raises: `RemanenceError` in one sentence, after saving what was learned; `KeyboardInterrupt` likewise.
    """
    directory = Path(out)
    opened = open_source(source) if isinstance(source, str) else source
    settings = Settings(opened.name, memory, bytes, seed, strategy, size)
    settings.check()
    if resume:
        _check_same(directory, settings, opened.fingerprint())
    try:
        compile_apart()
        with _threads(1):
            run = Run.open(directory) if resume else Run.create(directory, settings, opened.fingerprint())
            if not run.progress.finished:
                try:
                    _follow(run, opened, checkpoint_seconds, on_progress)
                except BaseException:
                    if not resume and not run.progress.position:
                        run.discard()
                    raise
            summary = _finish(run, opened)
        del run  # its memory goes back before the plots take theirs
        from remanence.evaluation.report import write_report  # plotting takes memory that learning need not pay for

        write_report(directory)
    except BrokenPipeError:
        raise  # whoever reads the progress went away: no fault of the directory's
    except OSError as error:
        raise RemanenceError(
            f"{directory} cannot be written to ({error.strerror or error}); a checkpoint that was there is intact."
        ) from None
    return summary


def generate(
    directory: str | Path, prompt: bytes = b"", tokens: int = 400, *, temperature: float = 0.8, seed: int = 0
) -> Iterator[int]:
    """Continue from a run's state, after `prompt`: yields bytes. The run is left as it is."""
    with _threads(1):
        run = Run.open(Path(directory))
        if run.progress.position == 0:
            raise CheckpointError(f"The run in {directory} has no checkpoint yet.")
        yield from run.learner.generate(prompt, tokens, temperature=temperature, seed=seed)


def _follow(
    run: Run, source: Source, checkpoint_seconds: float, on_progress: Callable[[dict[str, Any]], None] | None
) -> None:
    progress, learner = run.progress, run.learner
    held = {name: text[:PROBE_BYTES] for name, text in list(source.held_back().items())[:PROBE_DOMAINS]}
    segment = SIZES[run.settings.size]["segment"]
    limit = run.settings.bytes or (1 << 62)
    total = min(source.total, limit) if source.total else None
    interval = 8192
    probe_every = max(4, min(total or 1 << 20, 1 << 24) // 16 // interval) * interval
    process = psutil.Process()
    began = time.monotonic() - progress.seconds
    saved = time.monotonic()
    since = time.monotonic()
    metrics_path = run.directory / "metrics.jsonl"
    _truncate_metrics(metrics_path, progress.lines)

    def line(domain: str) -> dict[str, Any]:
        rss = process.memory_info().rss
        progress.peak_rss = max(progress.peak_rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return {
            "bytes": progress.position,
            "bits_per_byte": progress.bits / progress.position,
            "bits_per_byte_now": progress.recent_bits / progress.recent_bytes,
            "domain": domain,
            "seconds": progress.seconds,
            "bytes_per_second": progress.recent_bytes / max(time.monotonic() - since, 1e-9),
            "rss_bytes": rss,
            "state_bytes": learner.state_bytes,
            "kept_bytes": learner.kept_bytes,
            "total": total,
        }

    def probe() -> dict[str, float]:
        scores = {
            name: learner.evaluate(torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None])
            for name, text in held.items()
        }
        run.retention.record(progress.position, scores)
        return scores

    with open(metrics_path, "a", encoding="utf-8") as metrics, stop_requests() as stop:

        def emit(domain: str, probed: bool) -> None:
            nonlocal since
            entry = line(domain)
            if probed and held:
                entry["retention"] = probe()
            metrics.write(json.dumps(entry) + "\n")
            metrics.flush()
            progress.lines += 1
            progress.recent_bits, progress.recent_bytes, since = 0.0, 0, time.monotonic()
            if on_progress:
                on_progress(entry)

        try:
            for piece, domain in stop.while_waiting(_segments(source, progress.position, segment)):
                if progress.position >= limit:
                    break
                piece = piece[: limit - progress.position]
                if not progress.domains or progress.domains[-1]["domain"] != domain:
                    if progress.domains:
                        _end_domain(run, emit)
                    progress.domains.append({"domain": domain, "start": progress.position, "end": progress.position})
                tokens = torch.from_numpy(np.frombuffer(piece, dtype=np.uint8).astype(np.int64))[None]
                bits = float(learner.observe(tokens, domain).bits.sum())
                progress.position += len(piece)
                progress.bits += bits
                progress.seconds = time.monotonic() - began
                progress.domains[-1]["end"] = progress.position
                progress.recent_bits += bits
                progress.recent_bytes += len(piece)
                crossed = progress.position // interval != (progress.position - len(piece)) // interval
                if crossed:
                    probed = progress.position // probe_every != (progress.position - len(piece)) // probe_every
                    emit(domain, probed)
                if crossed and time.monotonic() - saved >= checkpoint_seconds:
                    run.save()
                    saved = time.monotonic()
                if stop.requested:
                    raise KeyboardInterrupt
            if progress.position == 0:
                raise RemanenceError(f"{source.name} is empty: there is nothing to learn from.")
            _end_domain(run, emit)
        except (KeyboardInterrupt, StreamError):
            # both come between two segments; after any other fault the learner may be inside one, and is not saved
            if progress.position:
                run.save()
            raise
        progress.finished = True
        run.save()


def _end_domain(run: Run, emit: Callable[[str, bool], None]) -> None:
    domain = run.progress.domains[-1]["domain"]
    run.learner.boundary(domain)
    if run.progress.recent_bytes:
        emit(domain, True)
    run.retention.ended(domain, run.progress.position)


def _segments(source: Source, start: int, size: int) -> Iterator[tuple[bytes, str]]:
    """Pieces of exactly `size` bytes, but for the last one of a domain, however the source delivers them."""
    rest, domain = b"", ""
    for segment in source.read(start):
        if segment.domain != domain:
            if rest:
                yield rest, domain
            rest, domain = b"", segment.domain
        data = rest + segment.data
        whole = len(data) // size * size
        for at in range(0, whole, size):
            yield data[at : at + size], domain
        rest = data[whole:]
    if rest:
        yield rest, domain


def _finish(run: Run, source: Source) -> dict[str, Any]:
    progress, learner = run.progress, run.learner
    summary: dict[str, Any] = {
        "source": run.settings.source,
        "memory": run.settings.pattern,
        "strategy": run.settings.strategy,
        "bytes": progress.position,
        "bits_per_byte": progress.bits / progress.position,
        "seconds": progress.seconds,
        "bytes_per_second": progress.position / progress.seconds,
        "peak_rss_bytes": progress.peak_rss,
        "state_bytes": learner.state_bytes,
        "kept_bytes": learner.kept_bytes,
        "parameters": learner.parameters,
        "retention": {d: r for d, r in run.retention.summary().items() if r["at_end"] is not None},
        "domains": progress.domains,
        "retention_curve": [
            {"bytes": entry["bytes"], "scores": entry["retention"]}
            for entry in _metrics(run.directory / "metrics.jsonl")
            if "retention" in entry
        ],
        "xz_bits_per_byte": _xz(source, progress.position),
        "samples": [_sample(learner, source, domain) for domain in dict.fromkeys(d["domain"] for d in progress.domains)]
        if len(progress.domains) <= 8
        else [],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "version": __version__,
    }
    _write_json(run.directory / "summary.json", summary)
    return summary


def _sample(learner: Learner, source: Source, domain: str) -> dict[str, str]:
    prompt = source.held_back().get(domain, b"")[:96]
    text = bytes(learner.generate(prompt, 240, temperature=0.6))
    return {
        "domain": domain,
        "prompt": prompt.decode("utf-8", "replace"),
        "text": text.decode("utf-8", "replace"),
    }


def _xz(source: Source, position: int, most: int = 1 << 24) -> float | None:
    """The line to beat, on the same bytes; None where they can't be read again or are too many."""
    if source.total is None or position > most:
        return None
    data = bytearray()
    try:
        for segment in source.read(0):
            data += segment.data
            if len(data) >= position:
                break
    except StreamError:
        return None
    return xz_bits_per_byte(bytes(data[:position]))


def _check_same(directory: Path, settings: Settings, fingerprint: str) -> None:
    about = _run_json(directory)
    for name, now in asdict(settings).items():
        if (before := about["settings"].get(name)) != now:
            raise RemanenceError(
                f"The run in {directory} began with {name}={before!r}, not {now!r}; "
                "resume it with its own settings, or begin another with a new --out."
            )
    if about["fingerprint"] != fingerprint:
        raise RemanenceError(
            f"{settings.source} is not what the run in {directory} began to read: its contents changed."
        )


def _run_json(directory: Path) -> dict[str, Any]:
    path = directory / "run.json"
    if not path.is_file():
        raise RemanenceError(f"There is no run in {directory}: it has no run.json.")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        Settings(**about["settings"])
        return about
    except (ValueError, KeyError, TypeError):
        raise RemanenceError(f"{path} is damaged: it is not what `remanence learn` writes.") from None


def _metrics(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as f:
        for text in f:
            yield json.loads(text)


def _truncate_metrics(path: Path, lines: int) -> None:
    """Drop the lines written after the checkpoint that the run resumes from, a torn last one included."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as f:
        kept = list(itertools.islice(f, lines))
    temporary = path.with_suffix(".part")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f"{path.name}.part")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The counts have a core of their own; small matrix products are quickest on one, and repeat exactly."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
