"""The page: every text escaped, nothing loaded or run, and it looks right in a real browser."""

from __future__ import annotations

import html as escaping
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from dptrain.explain import draw_report
from dptrain.explain.figures.figure import RunFigure
from dptrain.explain.text.page import Answer, Figures, Table, html
from tests.explain.made_runs import write_run

PLANTED = '<script>document.title = "planted"</script><img src="x" onerror="planted()">&amp;"'

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
MEASURE = """
<body style="margin:0"><script>
const page = PAGE;
async function measure(width) {
  const frame = document.createElement("iframe");
  frame.style = `border: 0; width: ${width}px; height: 4000px`;
  frame.srcdoc = page;
  await new Promise(done => { frame.onload = done; document.body.append(frame); });
  const root = frame.contentDocument.documentElement;
  const boxes = [...root.querySelectorAll("svg, h1, h3, figcaption p, .answer p")].map(e => e.getBoundingClientRect());
  const texts = [...root.querySelectorAll("svg text")].map(e => e.getBoundingClientRect().height);
  return {
    width,
    scrolled: root.scrollWidth - root.clientWidth,
    right: Math.max(...boxes.map(box => box.right)),
    figures: root.querySelectorAll("figure svg").length,
    smallest_text: Math.min(...texts),
    requests: frame.contentWindow.performance.getEntriesByType("resource").length,
    title: frame.contentDocument.title,
    scripts: root.querySelectorAll("script, img, link, iframe, object, embed").length,
  };
}
window.onload = async () => {
  const found = [await measure(1280), await measure(390)];
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
</script>
"""


class Elements(HTMLParser):
    """Every element of a page with its attributes, as a browser would see them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.texts = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def page(**parts):
    figure = RunFigure(
        name="curve", shows="A over b", title="It fell", reading="Down is less.", draw=lambda axes: axes.plot([1, 2])
    )
    usual = {"title": "run", "facts": "facts", "blocks": [Figures(figures=[figure])], "foot": "the end"}
    return html(**{**usual, **parts})


def test_every_text_is_escaped_wherever_it_stands():
    """Title, facts, answers, captions, alternative texts, cells and the last line come back as the text they were."""
    figure = RunFigure(
        name="p", shows=PLANTED, title=PLANTED, reading=PLANTED, draw=lambda axes: axes.plot([1], label=PLANTED)
    )
    nothing = RunFigure(name="q", shows=PLANTED, title=PLANTED, reading=PLANTED, draw=None)
    table = Table(title=PLANTED, head=[PLANTED], rows=[[PLANTED]], about=PLANTED)
    blocks = [Answer(title=PLANTED, sentences=[PLANTED, PLANTED]), Figures(figures=[figure, nothing]), table]
    elements = Elements(page(title=PLANTED, facts=PLANTED, blocks=blocks, foot=PLANTED))
    assert not {"script", "img"} & {tag for tag, _ in elements.found}
    assert sum(PLANTED in text for text in elements.texts) == 17
    assert [values["aria-label"] for tag, values in elements.found if tag == "svg"] == [f"{PLANTED}. {PLANTED}."]


def test_nothing_is_loaded_and_nothing_is_run():
    """No script, no handler, no address; and the page's own policy forbids what is not in it."""
    elements = Elements(page())
    for tag, values in elements.found:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base"}
        assert not [name for name in values if name.startswith("on")]
        for name in ("src", "href", "data", "action"):
            assert values.get(name, "#").startswith("#")
    (policy,) = (v["content"] for _, v in elements.found if v.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "script-src" not in policy
    assert "http" not in page().replace('http-equiv="', "")


def test_a_figure_has_its_caption_its_reading_and_its_alternative_text():
    """In this order, under its own name."""
    text = page()
    parts = ("A over b", "It fell</h3>", 'aria-label="A over b. It fell."', "How to read it: ", "Down is less.")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert '<figure id="curve">' in text


def test_a_table_without_rows_is_its_sentence():
    """No head over nothing."""
    text = page(blocks=[Table(title="Moves", head=["a"], rows=[], about="None was made.")])
    assert "None was made." in text
    assert "<table" not in text


def test_dark_is_for_screens_and_paper_is_light():
    """The dark colours stand in one rule, for screens that ask for them; print repeats heads and splits no figure."""
    css = re.search(r"<style>(.*?)</style>", page(), flags=re.DOTALL)[1]
    dark = re.findall(r"@media ([^{]*prefers-color-scheme[^{]*)\\{", css.replace("{", "\\{"))
    assert dark == ["screen and (prefers-color-scheme: dark) "]
    assert "thead { display: table-header-group; }" in css
    assert re.search(r"figure \{[^}]*break-inside: avoid", css)
    assert re.search(r"tr \{[^}]*break-inside: avoid", css)


def test_equal_content_is_an_equal_page():
    """To the byte."""
    assert page() == page()


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """A function that opens a file in a real browser with a profile of its own, and returns what it prints."""
    if BROWSER is None:
        pytest.skip("there is no chromium, chromium-browser or google-chrome here")

    def run(path, *flags):
        profile = tmp_path_factory.mktemp("profile")
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return run


@pytest.fixture(scope="module")
def planted_report(tmp_path_factory):
    """The page of a run whose name, task, reasons and groups hold markup."""
    folder = tmp_path_factory.mktemp("runs") / "<img src=x onerror=planted()>"
    write_run(folder, groups={"<b>head": 9.0}, task=PLANTED)
    decisions = [json.loads(line) for line in (folder / "decisions.jsonl").read_text().splitlines()]
    text = "".join(json.dumps({**row, "reason": PLANTED * 3}) + "\n" for row in decisions)
    (folder / "decisions.jsonl").write_text(text)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "task": PLANTED}))
    return draw_report(folder)


def test_a_browser_lays_it_out_on_desk_and_phone(browse, planted_report, tmp_path):
    """At 1280 and 390 pixels nothing scrolls sideways, all figures are there, their text is readable, nothing runs."""
    text = planted_report.read_text()
    frame = tmp_path / "measure.html"
    frame.write_text(MEASURE.replace("PAGE", json.dumps(text).replace("</", "<\\/")))
    printed = escaping.unescape(browse(frame, "--dump-dom", "--virtual-time-budget=20000"))
    for found in json.loads(re.search(r"FOUND(.*)END", printed)[1]):
        assert found["scrolled"] == 0, found
        assert found["right"] <= found["width"], found
        assert found["figures"] == 8
        assert found["smallest_text"] >= 8, found
        assert (found["requests"], found["scripts"]) == (0, 0)
        assert found["title"] == "<img src=x onerror=planted()>"


def test_a_browser_shows_it_light_and_dark(browse, planted_report, tmp_path):
    """The same page is dark ink on white, or light ink on black, with coloured curves in both."""
    for scheme, light in ((1, True), (0, False)):
        picture = tmp_path / f"{scheme}.png"
        browse(
            planted_report,
            f"--screenshot={picture}",
            "--window-size=800,1600",
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        pixels = imread(picture)[..., :3]
        paper, ink = np.median(pixels), np.quantile(pixels, 0.002 if light else 0.998)
        assert (paper > 0.95) == light
        assert (paper < 0.15) != light
        assert abs(paper - ink) > 0.7
        assert (np.ptp(pixels, axis=-1) > 0.3).mean() > 0.002


def test_a_browser_prints_it(browse, planted_report, tmp_path):
    """On paper it takes a few sheets."""
    paper = tmp_path / "paper.pdf"
    browse(planted_report, f"--print-to-pdf={paper}")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes())) <= 8
