"""A report in print, as JSON and as a page that needs nothing beside itself."""

import base64
import json
import math
import re
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import torch

import sdekit
from sdekit.evaluation.page import draw, page
from sdekit.evaluation.parts import Figure, Line, Section
from sdekit.evaluation.report import Report, save

FIGURES = (
    Figure("Error", "steps", "error", {"a": ([1, 10, 100], [1.0, 0.1, 0.01]), "b": ([1, 10], [0.0, math.nan])}, "xy"),
    Figure("Signal", "t", "alpha", {"alpha": ([0.0, 1.0], [1.0, 0.0])}),
)
REPORT = Report(
    "A check",
    (
        Line("first", "pass", 0.5, "half of it\n t  x\n 1  2"),
        Line("<script>alert(1)</script>", "fail", math.nan, 'a & b <i>c</i> "d"', "use <b>less</b>"),
        Line("third", "warn", math.inf, "endless", "stop"),
    ),
    {"seed": 3, "steps": [1, 2], "dtype": torch.float32, "none": None, "limit": math.inf},
    FIGURES,
    found="this network predicts v",
)


class Page(HTMLParser):
    """Tags in order, their attributes, and that each is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.sources, self.text = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_in_print():
    said = str(REPORT)
    assert said.startswith("A check\nNOT ok: 1 pass, 1 warn, 1 fail; this network predicts v\n")
    assert "  pass  first: half of it\n   t  x\n" in said
    assert "-> use <b>less</b>" in said
    assert not REPORT.ok
    assert REPORT["third"].remedy == "stop"
    with pytest.raises(ValueError, match="unknown line 'thrid': did you mean 'third'"):
        REPORT["thrid"]
    with pytest.raises(ValueError, match="unknown verdict 'fial': did you mean 'fail'"):
        Line("a", "fial", 0.0, "")


def test_json_is_json(tmp_path):
    """No NaN and no torch in it, whatever the report holds; one report by itself, several as a list."""
    REPORT.save(tmp_path / "one.json")
    text = (tmp_path / "one.json").read_text()
    one = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert one == REPORT.json()
    assert (one["ok"], one["found"], one["title"]) == (False, "this network predicts v", "A check")
    assert [line["verdict"] for line in one["lines"]] == ["pass", "fail", "warn"]
    assert [line["number"] for line in one["lines"]] == [0.5, None, None]
    assert one["figures"][0]["curves"] == {"a": [[1, 10, 100], [1.0, 0.1, 0.01]], "b": [[1, 10], [0.0, None]]}
    settings = one["settings"]
    assert (settings["seed"], settings["dtype"], settings["limit"]) == (3, "torch.float32", None)
    assert (settings["sdekit"], settings["torch"]) == (sdekit.__version__, torch.__version__)
    save([REPORT, REPORT], tmp_path / "two.json")
    assert json.loads((tmp_path / "two.json").read_text()) == [one, one]


def test_the_page_needs_nothing_beside_itself_and_runs_nothing(tmp_path):
    """Every source is in it; what a user or a network is called is text."""
    save([REPORT, REPORT], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    seen = Page(text)
    assert len(seen.sources) == 4
    assert all(source.startswith("data:image/svg+xml;base64,") for source in seen.sources)
    assert not {"script", "link", "iframe", "b", "i"} & set(seen.tags)
    assert not re.search(r"https?:|@import|url\(", text)
    for words in (
        "<script>alert(1)</script>",
        'a & b <i>c</i> "d"',
        "use <b>less</b>",
        "this network predicts v",
        " t  x",
    ):
        assert words in seen.text
    assert text.count('class="badge fail">fail<') == text.count('class="badge warn">warn<') == 2
    for words in (sdekit.__version__, torch.__version__, "torch.float32", "1, 2"):
        assert words in seen.text
    for source in seen.sources:
        svg = base64.b64decode(source.split(",")[1]).decode()
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert not re.search(r'(href|src)="(?!#)', svg)


def test_a_page_of_any_section():
    """A table with no lines, as a comparison has it; numbers to four digits, and the same page each time."""
    section = Section(
        "Rows", "what is best", header=("row", "5", "10"), rows=[("ddim & co", 0.123456, 3), ("heun", math.nan, 4)]
    )
    text = page([section])
    seen = Page(text)
    assert seen.tags.count("tr") == 3 + text.split("Made with")[1].count("<tr>")
    for words in ("ddim & co", "0.1235", "\N{EM DASH}", "what is best"):
        assert words in seen.text
    assert '<td class="number">3</td>' in text
    assert "badge" not in text.split("</style>")[1]
    assert page([section], title="a <title>") == page([section], title="a <title>")
    assert "<title>a &lt;title&gt;</title>" in page([section], title="a <title>")
    Page(page([]))


def test_figures_are_the_same_each_time_and_leave_matplotlib_alone():
    import matplotlib

    before = dict(matplotlib.rcParams)
    assert draw(FIGURES[0]) == draw(FIGURES[0])
    assert draw(FIGURES[1], "png").startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    svg = draw(FIGURES[0]).decode()
    assert all(f"<!-- {x} -->" in svg for x in (1, 10, 100))  # a few numbers of steps are named
    assert svg.count("<!-- error -->") == svg.count("<!-- steps -->") == 1  # the axes' names


def test_without_matplotlib_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"need matplotlib: pip install 'sdekit\[benchmarks\]'"):
        REPORT.save(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    REPORT.save(tmp_path / "page.json")
    with pytest.raises(ValueError, match=r"path must end in .html or .json, got 'page.pdf'"):
        REPORT.save(tmp_path / "page.pdf")
