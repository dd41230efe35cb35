"""The page of a run: whole in itself, right in its figures, and calm about runs that are short, odd or damaged."""

import html.parser
import json
import xml.etree.ElementTree as ET

import pytest

from remanence.errors import RemanenceError
from remanence.evaluation.report import write_report

BASE = {"prose": 2.0, "source": 1.5, "logs": 1.0}


def write_run(directory, phases=(("prose", 6), ("source", 6), ("logs", 6), ("prose", 6)), **changes):
    """A synthetic run: each interval of 1,000 bytes costs what its domain costs, everything else rises by 0.2."""
    metrics, domains, curve, bits = [], [], [], 0.0
    for domain, intervals in phases:
        domains.append({"domain": domain, "start": 1000 * len(metrics), "end": 1000 * (len(metrics) + intervals)})
        for _ in range(intervals):
            bits += 1000 * BASE.get(domain, 3.0)
            at = 1000 * (len(metrics) + 1)
            metrics.append(
                {
                    "bytes": at,
                    "bits_per_byte": bits / at,
                    "bits_per_byte_now": BASE.get(domain, 3.0),
                    "domain": domain,
                    "seconds": at / 5000,
                    "rss_bytes": 400_000_000,
                    "state_bytes": 1_000_000,
                    "kept_bytes": min(at, 4000),
                }
            )
            curve.append({"bytes": at, "scores": {d: BASE.get(d, 3.0) + 0.2 * (d != domain) for d, _ in phases}})
    summary = {
        **metrics[-1],
        "source": "builtin:mixed",
        "memory": "gated-delta",
        "parameters": 1_234_567,
        "bytes_per_second": 5000,
        "peak_rss_bytes": 431_000_000,
        "xz_bits_per_byte": 1.75,
        "domains": domains,
        "retention_curve": curve,
        "retention": {
            d: {"when_ended": BASE.get(d, 3.0), "at_end": s, "worst_since": BASE.get(d, 3.0) + 0.2}
            for d, s in curve[-1]["scores"].items()
        },
        "samples": [{"prompt": "if a <", "text": " b & </pre><script>alert(1)</script>"}],
        **changes,
    }
    directory.mkdir(exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metrics))
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


class Page(html.parser.HTMLParser):
    """The tags and their attributes, the text, and whether every element that opens also closes."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.words, self.loads = [], [], [], []
        self.raw = path.read_text(encoding="utf-8")
        self.feed(self.raw)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        named = dict(attributes)
        loads = [named[name] for name in ("src", "href", "xlink:href", "data") if name in named]
        self.loads += [address for address in loads if not address.startswith("#")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop() if tag not in ("meta", "br") else None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_page_has_the_figures_and_needs_nothing_else(tmp_path):
    path = write_report(write_run(tmp_path / "run"))
    assert path == tmp_path / "run" / "report.html"
    page = Page(path)
    assert page.loads == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "@import" not in page.raw
    assert page.tags.count("svg") == 4
    for words in (
        "builtin:mixed",
        "gated-delta",
        "1.625",
        "xz -9e: 1.750 (-7%)",
        "1,234,567",
        "5.0 kB/s",
        "24 kB",
        "431 MB",
    ):
        assert words in page.text
    assert "most forgotten +0.200" in page.text
    assert "logs 1.000 1.200 1.200 +0.200" in page.text
    assert "prose 2.000 2.200 2.000 +0.000" in page.text


def test_every_drawing_is_sound_and_takes_the_page_s_colours(tmp_path):
    raw = write_report(write_run(tmp_path / "run")).read_text()
    drawings = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in raw.split("<svg")[1:]]
    for drawing in drawings:
        ET.fromstring(drawing)
        assert "var(--" in drawing
        assert "#0" not in drawing.replace('"#', "").replace("(#", "")
    text = " ".join(ET.fromstring(drawings[0]).itertext())
    for label in ("prose", "source", "logs", "xz -9e 1.750", "mean so far 1.625"):
        assert label in text
    assert "2.20" in " ".join(ET.fromstring(drawings[1]).itertext())


def test_what_others_wrote_is_escaped(tmp_path):
    odd = "<img src=x>$a_$ & 'b'"
    path = write_report(write_run(tmp_path / "run", phases=((odd, 4), ("b", 4)), source="<script>"))
    page = Page(path)
    assert not {"script", "img"} & set(page.tags)
    assert odd in page.text
    assert "if a < b & </pre><script>alert(1)</script>" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {"xz_bits_per_byte": None},
        {"retention": {}, "retention_curve": []},
        {"retention": {"prose": {"when_ended": None, "at_end": 2.0, "worst_since": None}}},
        {"samples": []},
        {"domains": []},
        {"seconds": 0, "bytes_per_second": None, "peak_rss_bytes": None},
    ],
)
@pytest.mark.parametrize("phases", [(("prose", 1),), (("prose", 5), ("source", 5))])
def test_missing_parts_leave_a_page(tmp_path, phases, changes):
    page = Page(write_report(write_run(tmp_path / "run", phases=phases, **changes)))
    assert "bits per byte" in page.text
    assert ("No text was held back" in page.text) == (changes.get("retention") == {})


def test_many_domains_stay_readable(tmp_path):
    page = Page(write_report(write_run(tmp_path / "run", phases=[(f"file {i}", 2) for i in range(30)])))
    assert "22 more are in the table" in page.text
    assert page.tags.count("tr") == 31


def test_a_run_cut_off_has_its_page_too(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "summary.json").unlink()
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-20])
    page = Page(write_report(run))
    assert "23 kB" in page.text
    assert page.tags.count("svg") == 3


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_run(tmp_path / "run")
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "report.html", "summary.json"]


def damage(run, name, data):
    (run / name).write_bytes(data) if data is not None else (run / name).unlink()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("metrics.jsonl", None, r"There is no metrics\.jsonl in .*remanence learn --out"),
        ("metrics.jsonl", b"", "has no entry yet"),
        ("metrics.jsonl", b'{"bytes": 1}\n{"byt\n{"bytes": 3}\n', "damaged: line 2 is not an entry"),
        ("metrics.jsonl", b"[1]\n", "damaged: line 1 is not an entry"),
        ("metrics.jsonl", b'\xff\xfe\n{"bytes": 3}\n', "damaged: line 1 is not an entry"),
        ("summary.json", b'{"bytes"', r"summary\.json is damaged"),
        ("summary.json", b"[]", r"summary\.json is damaged"),
    ],
)
def test_damaged_files_are_named_in_one_sentence(tmp_path, name, data, says):
    run = write_run(tmp_path / "run")
    damage(run, name, data)
    with pytest.raises(RemanenceError, match=says) as error:
        write_report(run)
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()
