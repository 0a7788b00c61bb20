"""A self-contained HTML page of sentences, figures and tables; what they say is decided elsewhere.

The page is built as a tree, so every text in it is escaped when it is written, whatever its source. It holds no
script and no address, and asks the browser to allow neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from dptrain.explain.figures.figure import RunFigure
from dptrain.explain.figures.theme import BLUE, GRID, INK, PAPER, SOFT, css_variables, svg, variable

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a reader came for, in a box of its own.

    Attributes:
        title: the heading.
        sentences: the answer first, then why; at least one.
    """

    title: str
    sentences: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Figures, side by side where there is room. One with nothing to draw is its sentence alone."""

    figures: Sequence[RunFigure]


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table under its heading; its head is repeated on each sheet of paper that it goes on to.

    Attributes:
        title: the heading.
        head: what each column holds.
        rows: cells, as many in each row as in `head`.
        about: a sentence above the table, or, where it has no rows, in its place.
        wordy: whether the last column holds sentences; on a narrow screen they have a line of their own.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    about: str
    wordy: bool = False


def html(*, title: str, facts: str, blocks: Sequence[Answer | Figures | Table], foot: str) -> str:
    """Write a page of blocks between its title, with a line of facts below, and its last line."""
    head = _tag(
        "head",
        _tag("meta", charset="utf-8"),
        _tag("meta", **{"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        _tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("meta", name="color-scheme", content="light dark"),
        _tag("title", title),
        _tag("style", _CSS),
    )
    header = _tag("header", _tag("h1", title), _tag("p", facts))
    body = _tag("body", header, _tag("main", *map(_block, blocks)), _tag("footer", _tag("p", foot)))
    page = _tag("html", head, body, lang="en")
    return f"<!DOCTYPE html>\n{ET.tostring(page, encoding='unicode', method='html')}\n"


def _block(block: Answer | Figures | Table) -> ET.Element:
    match block:
        case Answer():
            answer, *why = block.sentences
            sentences = (_tag("p", _tag("strong", answer)), *(_tag("p", text) for text in why))
            return _tag("section", _tag("h2", block.title), *sentences, **{"class": "answer"})
        case Figures():
            return _tag("div", *map(_figure, block.figures), **{"class": "figures"})
        case Table():
            return _tag("section", _tag("h2", block.title), _tag("p", block.about), *_table(block))


def _figure(figure: RunFigure) -> ET.Element:
    caption = _tag("figcaption", _tag("p", figure.shows), _tag("h3", figure.title))
    if figure.draw is None:
        return _tag("figure", caption, id=figure.name)
    drawing = svg(figure.figure(titled=False), name=figure.name, alt=figure.alt)
    how = _tag("p", _tag("b", "How to read it: "), figure.reading)
    return _tag("figure", caption, drawing, how, id=figure.name)


def _table(table: Table) -> list[ET.Element]:
    if not table.rows:
        return []
    head = _tag("thead", _tag("tr", *(_tag("th", text, scope="col") for text in table.head)))
    rows = (_tag("tr", *(_tag("td", text) for text in row)) for row in table.rows)
    element = _tag("table", head, _tag("tbody", *rows), **({"class": "wordy"} if table.wordy else {}))
    # What is wider than the screen is scrolled by itself, with the keyboard, too.
    return [_tag("div", element, tabindex="0", role="region", **{"class": "wide", "aria-label": table.title})]


def _tag(tag: str, /, *children: ET.Element | str, **attributes: str) -> ET.Element:
    """Make an element of texts and elements, in the order in which they are read."""
    element = ET.Element(tag, attributes)
    last: ET.Element | None = None
    for child in children:
        if isinstance(child, ET.Element):
            element.append(child)
            last = child
        elif last is None:
            element.text = (element.text or "") + child
        else:
            last.tail = (last.tail or "") + child
    return element


def _var(colour: str) -> str:
    return f"var({variable(colour)})"


_CSS = f"""
:root {{ {css_variables(dark=False)} color-scheme: light dark; }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {css_variables(dark=True)} }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 80rem; padding: 1.5rem 1rem; background: {_var(PAPER)}; color: {_var(INK)};
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; margin: 0; }}
h2 {{ font-size: 1.25rem; margin: 0 0 .3rem; }}
h3 {{ font-size: 1.02rem; line-height: 1.35; margin: 0 0 .5rem; }}
p {{ margin: 0 0 .6rem; max-width: 75ch; }}
header p, footer p, figcaption p, figure > p, section > p {{ color: {_var(SOFT)}; }}
.answer {{ border-left: .3rem solid {_var(BLUE)}; padding: .2rem 0 .2rem 1rem; }}
.answer p {{ color: {_var(INK)}; }}
.answer strong {{ font-size: 1.12rem; }}
section {{ margin: 1.8rem 0; }}
.figures {{ columns: 2 30rem; column-gap: 2.2rem; }}
figure {{ margin: 0 0 2.2rem; break-inside: avoid; }}
figcaption p {{ font-size: .85rem; margin: 0; }}
figure > p {{ font-size: .88rem; margin: .3rem 0 0; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; }}
svg * {{ stroke-linejoin: round; }}
svg text {{ font-family: inherit !important; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .8rem .35rem 0;
  border-bottom: 1px solid {_var(GRID)}; }}
table:not(.wordy) :is(th, td) {{ overflow-wrap: break-word; }}
th {{ color: {_var(SOFT)}; font-weight: 600; }}
thead {{ display: table-header-group; }}
tr {{ break-inside: avoid; }}
.wordy td:not(:last-child), .wordy th:not(:last-child) {{ white-space: nowrap; }}
@media (max-width: 40rem) {{
  .wordy tr {{ display: flex; flex-wrap: wrap; column-gap: 1.2rem; border-bottom: 1px solid {_var(GRID)}; }}
  .wordy td, .wordy th {{ border: 0; padding: .2rem 0; white-space: normal !important; }}
  .wordy th:last-child {{ display: none; }}
  .wordy td:last-child {{ flex-basis: 100%; color: {_var(SOFT)}; }}
}}
footer {{ margin-top: 2.5rem; font-size: .85rem; }}
@media print {{
  :root {{ color-scheme: light; font-size: 9pt; }}
  @page {{ margin: 14mm; }}
  body {{ padding: 0; max-width: none; }}
  .figures {{ columns: auto; }}
  svg {{ width: 125mm; }}
  h2 {{ break-after: avoid; }}
}}
"""
