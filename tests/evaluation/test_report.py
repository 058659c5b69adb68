"""A report is one file that says everything that was measured and needs nothing from elsewhere."""

import io
from base64 import b64decode
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image
from rich.console import Console

from bridges.evaluation.report import Shown, plot_history, write_report
from bridges.evaluation.table import table_text

NASTY = '<script>alert("1")</script> & co'
HISTORY = [
    {"step": 10, "loss": 4.2, "lr": 1e-3, "samples_per_second": 31.0},
    {"step": 20, "loss": 2.1, "lr": 1e-3, "samples_per_second": 30.0},
    {"step": 20, "validation": {"caption_nll": {"image": 2.0, "shuffled": 3.0, "blank": 2.5}}},
    {"step": 30, "validation": {"caption_nll": {"image": 1.0, "shuffled": 3.1, "blank": None}}},
    {"step": 30, "validation": {"retrieval": {"image": 0.4}}},
]
TABLE = {
    "held-out [scenes]": {
        "caption_nll": {
            "image": 0.6121,
            "shuffled": 1.934,
            "blank": 1.71,
            "majority": None,
            "low": 0.59,
            "high": 0.63,
            "n": 1500,
        },
        "answer_accuracy/count": {
            "image": 0.5,
            "shuffled": 0.25,
            "blank": 0.24,
            "majority": 0.26,
            "low": None,
            "high": None,
            "n": 12,
        },
    },
    "held-out objects": {
        "cider": {"image": 3.25, "shuffled": 0.411, "blank": 0.222, "majority": 0.183, "low": 3.1, "high": 3.4, "n": 7}
    },
}
FIGURES = {
    "0.612",
    "1.934",
    "1.710",
    "1,500",
    "0.500",
    "0.250",
    "0.240",
    "0.260",
    "12",
    "3.250",
    "0.411",
    "0.222",
    "0.183",
    "7",
}
INTERVALS = {"0.590 – 0.630", "3.100 – 3.400"}


class Page(HTMLParser):
    """Every tag with its attributes, all text outside of style, and the tags that are open."""

    VOID = ("meta", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def pictures():
    transparent = Image.new("RGBA", (9, 31), (200, 0, 0, 90))
    return [
        Shown(Image.new("RGB", (40, 24), "orange"), NASTY, "an orange", "a lemon", NASTY),
        Shown(transparent, "What is it?", 'a "veil"', "", "a wall"),
    ]


@pytest.fixture(scope="module")
def html(tmp_path_factory, pictures):
    path = tmp_path_factory.mktemp("run") / "new" / "report.html"
    details = {"Bridge": "projector", "Steps & time": "<3 s"}
    write_report(
        path, title=NASTY, history=HISTORY, table=TABLE, pictures=pictures, details=details, attribution="OpenMoji <3"
    )
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_needs_nothing_from_elsewhere(html):
    page = Page(html)
    assert page.open == []
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in html
    assert "url(http" not in html


def test_the_text_of_people_and_models_stays_text(html):
    texts = Page(html).texts
    assert texts.count(NASTY) == 4  # title, headline, prompt, answer to another picture
    assert {"an orange", "a lemon", 'a "veil"', "a wall", "projector", "Steps & time", "<3 s", "OpenMoji <3"} <= set(
        texts
    )


def test_pictures_are_inside_whole_and_in_order(html, pictures):
    sources = [attributes["src"] for tag, attributes in Page(html).tags if tag == "img"]
    decoded = [Image.open(io.BytesIO(b64decode(source.partition("base64,")[2]))) for source in sources]
    assert [attributes["alt"] for tag, attributes in Page(html).tags if tag == "img"] == [s.reference for s in pictures]
    assert [picture.size for picture in decoded] == [shown.picture.size for shown in pictures]
    assert decoded[1].convert("RGBA").getpixel((3, 3)) == (200, 0, 0, 90)


def test_every_figure_of_the_table_is_on_the_page(html):
    texts = Page(html).texts
    assert set(texts) >= FIGURES | INTERVALS
    assert {"held-out [scenes]", "held-out objects", "Caption NLL ↓", "count", "CIDEr-D ↑", "majority"} <= set(texts)
    assert texts.count("–") == 2  # a missing baseline and an empty answer


def test_every_figure_of_the_table_is_in_the_terminal():
    console = Console(file=io.StringIO(), width=120)
    console.print(table_text(TABLE))
    text = console.file.getvalue()
    lines = [line.split() for line in text.splitlines()]
    assert {word for line in lines for word in line} >= FIGURES
    assert all(f"[{interval}]" in text for interval in INTERVALS)
    assert "held-out [scenes]" in text
    assert ["count", "0.500", "0.250", "0.240", "0.260", "12"] in lines


def test_the_curve_draws_loss_and_baselines_and_leaves_no_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    svg = plot_history(HISTORY)
    assert dict(matplotlib.rcParams) == before
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert {"training loss", "validation, image", "validation, shuffled", "validation, blank", "nats per token"} <= set(
        texts
    )
    assert "currentColor" in svg
    assert svg == plot_history(HISTORY)
    assert "validation" not in plot_history(HISTORY[:2])
    assert "training loss" not in plot_history(HISTORY[2:])


def test_a_run_without_history_pictures_and_attribution_has_none_of_their_sections(tmp_path):
    path = tmp_path / "report.html"
    write_report(path, title="bare", history=[], table=TABLE, pictures=[], details={})
    tags = {tag for tag, _ in Page(path.read_text(encoding="utf-8")).tags}
    assert not tags & {"svg", "img", "footer"}
    assert "table" in tags


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, pictures):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_report(path, title="\ud800", history=[], table=TABLE, pictures=pictures, details={})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
