"""`lwsam-bench report`: what is on the page, and that it fits a desk and a phone."""

import html
import html.parser
import io
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lwsam_bench.paper import published
from lwsam_bench.paper.artefact import Artefact, NAMES, Table
from lwsam_bench.paper.report import absent, extras, page
from lwsam_bench.paper.report.grid import Group, lay_out
from lwsam_bench.support.errors import UserError


EVIL = "<script>alert('x')</script> & \"quotes\""
WIDE = ("method", *(f"column {i} of many" for i in range(12)), "published")
TABLE = Table(
    title=f"CIFAR-10 {EVIL}",
    header=WIDE,
    rows=(
        (EVIL, *["1.23 ± 0.4 %"] * 12, "91.96 ± 0.3 %"),
        ("SAM", *[""] * 13),
    ),
    notes=(f"A note {EVIL}",),
)
FULL = Artefact(
    name="table1",
    title=f"Table 1 {EVIL}",
    scale="smoke",
    command="lwsam-bench table1 --scale smoke --out " + "very-long-name/" * 20,
    tables=(TABLE,),
    plots=("table1-cifar10.png", "table1-lost.png"),
    notes=(f"Another {EVIL}", published.NOTES["table1"][0]),
    origins=({"device": EVIL, "platform": "gpu", "time": "2026-01-02T03:04:05"},),
)
VOID = {"img", "meta", "br", "hr", "link", "input"}


class Page(html.parser.HTMLParser):
    """The elements of a page as (tag, attributes, text inside), and their nesting."""

    def __init__(self, text):
        super().__init__()
        self.elements, self._open = [], []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        element = [tag, dict(attrs), ""]
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data):
        for element in self._open:
            element[2] += data

    def all(self, tag):
        return [(attributes, text) for t, attributes, text in self.elements if t == tag]

    def section(self, name):
        (text,) = [text for a, text in self.all("section") if a["id"] == name]
        return " ".join(text.split())


def render(folder):
    console = Console(file=io.StringIO(), width=30)
    path = page.render(folder, console)
    assert console.file.getvalue().endswith(f"are in {path}\n")
    return path.read_text(encoding="utf-8")


def draw(path, size=(1300, 520)):
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), np.uint8)
    Image.fromarray(noise).resize(size).save(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one artefact and what other commands leave."""
    folder = tmp_path_factory.mktemp("results")
    FULL.save(folder)
    draw(folder / "table1-cifar10.png")
    rows = "| method | ρ |\n| --- | ---: |\n| a\\|b | 1 |\n"
    (folder / "demo-table.md").write_text(f"{rows}\nNotes <b>x</b>.\n")
    draw(folder / "tuning-demo.png", (30, 20))
    below = folder / "tune"
    below.mkdir()
    (below / "tuning.md").write_text(
        f"## Digits\n\n![A plot](tuning-digits.png)\n\n{rows}\n"
        "What a price buys:\n\n- Up to 1.1: **all** of [it](http://example.org).\n"
    )
    draw(below / "tuning-digits.png", (30, 20))
    return folder


@pytest.fixture(scope="module")
def text(folder):
    return render(folder)


def test_every_table_and_figure_has_its_section(text):
    parsed = Page(text)
    assert [a["id"] for a, _ in parsed.all("section")] == [*NAMES, "beyond"]
    links = [a["href"].removeprefix("#") for a, _ in parsed.all("a")]
    assert links == ["main", *NAMES, "beyond"]
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    for name in NAMES:
        assert html.escape(published.CLAIMS[name], quote=False) in html.escape(
            parsed.section(name), quote=False
        )


def test_what_has_run(text):
    section = Page(text).section("table1")
    for part in (
        FULL.title,
        "scale: smoke",
        TABLE.title,
        "1.23 ± 0.4 %",
        *FULL.notes,
        *TABLE.notes,
        *published.NOTES["table1"],
        FULL.command,
        EVIL + ", 2026-01-02",
        "The plot table1-lost.png is not in the folder",
    ):
        assert part in section, part
    assert section.count(published.NOTES["table1"][0]) == 1
    assert "not run here" not in section


def test_what_has_not_run_keeps_its_place(text, folder):
    parsed = Page(text)
    for name in NAMES[1:]:
        section = parsed.section(name)
        assert "not run here" in section
        assert f"lwsam-bench {name} --scale smoke --out {folder}" in section
    assert "layer-wise SAM (4)" not in parsed.section("table1")
    for number in ("604.2", "459.5", "53.97"):
        assert number in parsed.section("table2")
    assert "75.36 ± 0.6 %" in parsed.section("table3")
    assert "81.93 ± 0.5 %" in parsed.section("table4")


def test_the_page_is_self_contained_and_escaped(text):
    parsed = Page(text)
    tags = {tag for tag, _, _ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "b"}
    images = [a for a, _ in parsed.all("img")]
    assert len(images) == 3
    for image in images:
        assert image["src"].startswith("data:image/png;base64,")
        assert image["alt"]
    assert (images[0]["width"], images[0]["height"]) == ("1300", "520")
    assert images[0]["alt"] == f"{FULL.title}, CIFAR-10"
    assert all(a["href"].startswith("#") for a, _ in parsed.all("a"))
    (style,) = parsed.all("style")
    assert not re.search(r"url\(|@import", style[1])
    assert not any(
        name.startswith("on") for _, a, _ in parsed.elements for name in a
    ), "a script in an attribute"


def test_tables_are_made_for_screen_readers(text):
    parsed = Page(text)
    assert parsed.all("html")[0][0] == {"lang": "en"}
    tables, captions = parsed.all("table"), parsed.all("caption")
    assert len(tables) == len(captions) > 10
    assert all(caption.strip() for _, caption in captions)
    assert all(a["scope"] in ("col", "row", "rowgroup") for a, _ in parsed.all("th"))
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.match(r"h\d$", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1, "a level of headings is left out"


def test_beyond_the_paper(text):
    section = Page(text).section("beyond")
    for part in ("The demo", "a|b", "Notes <b>x</b>.", "Digits", "Up to 1.1: all of"):
        assert part in section, part
    assert "A plot" not in section


def test_markdown(text, folder):
    del text  # rendered
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("## ") for line in lines) == len(NAMES) + 1
    assert lines[4].startswith("- Table 1 \\<script>")
    assert "- Table 3: which layers are perturbed: not run here" in lines
    assert "| None (SGD) |  | 91.63 ± 0.3 % |" in lines
    assert "Scale: not run here." in lines
    assert f"lwsam-bench lm --scale smoke --out {folder}" in lines
    assert "- [Methods that are tuned alike](tune/tuning.md)" in lines
    alone = [line for line in lines if "<script>" in line.replace("\\<", "")]
    assert not alone, "not escaped"


def test_an_empty_folder_has_a_page_too(tmp_path):
    text = render(tmp_path)
    assert len(Page(text).all("section")) == len(NAMES)
    assert "lwsam-bench table1 --scale small --out" in text
    again = render(tmp_path)
    assert again == text


def test_errors(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        page.render(tmp_path / "missing", Console())
    FULL.save(tmp_path)
    plot = tmp_path / "table1-cifar10.png"
    plot.write_text("not a picture")
    with pytest.raises(UserError, match="is no PNG file"):
        page.render(tmp_path, Console())
    plot.unlink()
    (tmp_path / "demo-table.md").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"cannot read .*demo-table"):
        page.render(tmp_path, Console())


def test_a_column_that_repeats_becomes_headings():
    rows = (("C10", "SGD", "1.0"), ("", "SAM", ""), ("C100", "SGD", "–"))
    grid = lay_out(Table("t", ("benchmark", "method", "published"), rows))
    assert grid.header == ("method", "published")
    assert grid.classes == ("", "number published")
    assert grid.groups == (
        Group("C10", (("SGD", "1.0"), ("SAM", ""))),
        Group("C100", (("SGD", "–"),)),
    )
    plain = lay_out(Table("t", ("method", "result"), (("a", "failed"), ("b", "lost"))))
    assert plain.groups == (Group(None, (("a", "failed"), ("b", "lost"))),)
    assert plain.classes == ("", "")
    assert lay_out(Table("t", (), ())).header == ()


def test_markdown_between_tables():
    text = "# One\n\n| a |\n| - |\n| *x* `y` |\n\n## Two\n\ntext\n\n| b |\n| - |\n"
    assert list(extras.blocks(text)) == [
        Table("One", ("a",), (("x y",),)),
        "<h4>Two</h4>\n<p>text</p>\n",
        Table("Two", ("b",), ()),
    ]


def test_what_is_absent_has_all_that_is_published():
    counts = {name: sum(len(t.rows) for t in absent.tables(name)) for name in NAMES}
    assert {name: count for name, count in counts.items() if count} == {
        "table1": len(published.ACCURACY),
        "table2": len(published.THROUGHPUT),
        "table3": len(published.CRITERION),
        "table4": len(published.BY_K),
    }


@pytest.fixture(scope="module")
def browser():
    """A function that runs headless Chromium on a file and returns its output."""
    names = (
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
        "chrome-headless-shell",
        "chromium-headless-shell",
    )
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(names)} on the PATH")

    def run(path, *arguments):
        done = subprocess.run(
            [
                program,
                "--headless",
                "--no-sandbox",  # it would not start in a container; the page is ours
                "--disable-gpu",
                "--hide-scrollbars",
                f"--user-data-dir={path.parent / 'profile'}",
                *arguments,
                path.as_uri(),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        return done.stdout

    return run


def test_the_page_fits_a_desk_and_a_phone(browser, text, tmp_path):
    """Nothing but what is inside the boxes of tables is wider than the window."""
    widths = (1280, 390, 360)
    frames = "".join(
        f'<iframe width="{w}" height="800" style="border:0" srcdoc="{html.escape(text)}">'
        "</iframe>"
        for w in widths
    )
    # The page forbids scripts, so it is measured from outside.
    measure = """
      onload = () => {
        document.body.textContent = [...document.querySelectorAll("iframe")].map(f => {
          const page = f.contentDocument.documentElement;
          const box = page.querySelector(".scroll");
          const images = [...page.querySelectorAll("img")].map(i => i.naturalWidth);
          return [f.width, page.clientWidth, page.scrollWidth,
            box.scrollWidth > box.clientWidth, Math.min(...images) > 0].join(" ");
        }).join(";");
      }"""
    path = tmp_path / "measure.html"
    path.write_text(
        f"<!DOCTYPE html><meta charset=utf-8><script>{measure}</script>"
        f"<body>{frames}</body>"
    )
    found = re.search(r"<body>(.*)</body>", browser(path, "--dump-dom"), re.DOTALL)
    assert found
    expected = [f"{w} {w} {w} true true" for w in widths]
    assert found[1].strip().split(";") == expected


@pytest.mark.parametrize("width", [1280, 390])
def test_a_screenshot_shows_something(browser, text, tmp_path, width):
    copy = tmp_path / "report.html"
    copy.write_text(text, encoding="utf-8")
    shot = tmp_path / "shot.png"
    browser(copy, f"--screenshot={shot}", f"--window-size={width},2400")
    with Image.open(shot) as image:
        assert image.width == width
        colours = image.convert("RGB").getcolors(maxcolors=1 << 24)
    most = max(count for count, _ in colours) / (width * 2400)
    assert 0.3 < most < 0.95, "empty, or no background to be seen"
    assert len(colours) > 100
