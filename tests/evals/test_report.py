"""The report says what happened, also when nothing did, and needs nothing but itself."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from shipyard.evals.charts import HEIGHT, WIDTH, interval_chart, line_chart, nice_ticks
from shipyard.evals.metrics import wilson
from shipyard.evals.report import read_log, verdict, write_report
from shipyard.evals.tasks import Result

VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that tags nest, and collects the text and the tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def result(stage: str, right: int, n: int = 100, suite: str = "reviews", margins: tuple[float, ...] = ()) -> Result:
    share = wilson(right, n)
    scores = (1.0,) * right + (0.0,) * (n - right)
    return Result(stage, suite, "accuracy", share.value, share.low, share.high, n, scores, 3.0, "rows", margins)


def test_report_holds_everything_and_nothing_from_elsewhere(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": n, "loss": 2 / n, "tokens_per_s": 200}) + "\n" for n in range(1, 9)))
    certificates = [
        {
            "subject": "model-f16.gguf",
            "reference": "model",
            "mean_kl": 3e-6,
            "budget": 1e-4,
            "positions": 812,
            "passed": True,
        },
        {
            "subject": "model-q8_0.gguf",
            "reference": "f16",
            "mean_kl": 0.5,
            "passed": False,
            "failures": ["KL <too> big"],
        },
    ]
    path = write_report(
        tmp_path / "report.html", "A <run>", {"SFT": log, "DPO": tmp_path / "missing.jsonl"},
        [
            result("before", 50), result("after", 80), result("only", 5, suite="alone"),
            result("sft", 50, suite="pairs", margins=(0.0, 1.0) * 50),
            result("dpo", 51, suite="pairs", margins=(2.0, 2.0) * 50),
        ],
        certificates, {"SFT": 75.0, "export": 50.0}, {"SFT": "method: sft\n"},
    )  # fmt: skip
    text = path.read_text()
    page = Page(text)
    for words in ("A <run>", "improved, from 50.0% to 80.0%", "KL <too> big", "✓ passed", "✗ failed", "2 min 05 s",
                  "method: sft", "no steps logged", "torch", "▲ margin only", "loss 2 → 0.25"):  # fmt: skip
        assert words in page.words, words
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe"}
    assert not [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href")]
    assert "url(" not in text
    assert "prefers-color-scheme:dark" in text
    assert ("meta", {"name": "viewport", "content": "width=device-width"}) in page.tags


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (80, "improved, from 50.0% to 80.0% on 100 rows (paired difference +30.0 points"),
        (51, "did not improve beyond chance, from 50.0% to 51.0%"),
        (50, "did not improve beyond chance"),
        (20, "got worse, from 50.0% to 20.0%"),
    ],
)
def test_verdict_is_honest(right: int, says: str):
    sentence = verdict(result("before", 50), result("after", right))
    assert says in sentence
    assert ("do not overlap" in sentence) == (right == 80)


def test_verdict_on_margins():
    before, after = result("a", 50, 100, margins=(1.0,) * 100), result("b", 50, 100, margins=(1.5, 2.5) * 50)
    assert "is +1.00 nats a pair (95 % +0.90 to +1.10), above zero, and positive for 100% of the pairs" in verdict(
        before, after
    )


def test_log_cut_short_by_a_crash(tmp_path: Path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0, "note": "x"}\n{"step": 2, "lo')
    assert read_log(log) == [{"step": 1.0, "loss": 2.0}]
    log.write_text('{"step": 1, "loss"\n{"step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match=r"log.jsonl:1 is not a step"):
        read_log(log)


@pytest.mark.parametrize(
    "points", [[], [(1, 5.0)], [(1, 0.0), (2, 0.0)], [(1, float("nan")), (2, 3.0)], [(1, -1e-9), (2, 1e9)]]
)
def test_charts_draw_odd_data(points: list[tuple[float, float]]):
    """A dot inside the frame for every number that is one, and words where there is none."""
    drawn = line_chart("title & more", points)
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    dots = [(float(x), float(y)) for x, y in re.findall(r"class=dot cx=(\S+) cy=(\S+) ", drawn)]
    assert len(dots) == len(finite)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in dots)
    assert ("no values logged" in drawn) == (not finite)
    assert "title &amp; more" in drawn
    assert "nan" not in drawn
    Page(drawn)


def test_intervals_of_nothing_are_an_empty_frame():
    drawn = interval_chart("t", [])
    assert "<circle" not in drawn
    assert drawn.count("class=grid") == 5
    Page(drawn)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0012, 0.0013), (-3, 250), (7, 7), (0, 0), (-2e-9, 5e-9)])
def test_ticks_cover_the_data(low: float, high: float):
    ticks = nice_ticks(low, high)
    slack = 1e-9 * max(abs(low), abs(high))
    assert ticks[0] <= low + slack
    assert ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7
