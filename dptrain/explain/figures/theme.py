"""The colours of the report in light and dark, and how a figure becomes an SVG that follows the page's choice."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, SOFT, GRID, GREY, PAPER = "#1b1f24", "#57606a", "#e4e7eb", "#7a828c", "#ffffff"
BLUE, VERMILLION, GREEN, PURPLE, BROWN = "#0072b2", "#d55e00", "#009e73", "#b0558f", "#6b4e00"

DARK = {
    INK: "#e6e9ed",
    SOFT: "#a6afba",
    GRID: "#2b323a",
    GREY: "#8a939e",
    PAPER: "#14181d",
    BLUE: "#56b4e9",
    VERMILLION: "#d55e00",
    GREEN: "#009e73",
    PURPLE: "#cc79a7",
    BROWN: "#f0e442",
}
"""What each colour becomes on a dark page. Figures are drawn in the light ones, which are also those of paper.

The six of `SERIES` are those of Okabe and Ito (2008); on white, where some of them are too faint, purple is darker and
yellow is a brown. They stay apart for the colour-blind, see the tests.
"""

SERIES = (BLUE, VERMILLION, GREEN, PURPLE, INK, BROWN)
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
"""Line styles: colour alone never distinguishes curves. Five styles and six colours make thirty pairs."""

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a name in a figure may hold any character
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "none",  # text stays text: searched, selected, and set in the reader's own font
}

_NOTHING_OF_THE_MAKER: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))


def variable(colour: str) -> str:
    """Return the name of the CSS variable that stands for a colour, such as `--c0072b2`."""
    return f"--c{colour.removeprefix('#')}"


def css_variables(*, dark: bool) -> str:
    """Return the declarations that give each colour its value."""
    return "".join(f"{variable(light)}:{DARK[light] if dark else light};" for light in DARK)


def svg(figure: Figure, *, name: str, alt: str) -> ET.Element:
    """Draw a figure as an element for a page that defines the variables of `css_variables`.

    Equal figures give equal elements. Colours are variables, so one drawing serves light, dark and paper; it scales
    with the page, and holds neither address nor style sheet.

    Args:
        figure: drawn in the colours of this file.
        name: tells its definitions from those of other figures on the page.
        alt: what it shows, for those who do not see it.
    """
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata=_NOTHING_OF_THE_MAKER)
    root = ET.fromstring(text.getvalue())  # noqa: S314 - written by matplotlib two lines above
    used = set(re.findall(r"#([\w.-]+)", " ".join(value for node in root.iter() for value in node.attrib.values())))
    for node in root.iter():
        node.tag = _local(node.tag)
        node.attrib = {
            _local(key): _themed(value, name=name) for key, value in node.attrib.items() if key != "id" or value in used
        }
        if "id" in node.attrib:
            node.set("id", f"{name}-{node.attrib['id']}")
    for definitions in root.findall("defs"):
        for style in definitions.findall("style"):
            definitions.remove(style)
    del root.attrib["width"], root.attrib["height"]
    root.attrib.update({"role": "img", "aria-label": alt})
    return root


def _local(name: str) -> str:
    """Drop the namespace: HTML knows an `svg` by its name."""
    return name.rpartition("}")[2]


def _themed(value: str, *, name: str) -> str:
    """Put variables for colours and this figure's own names for its definitions."""

    def replaced(match: re.Match[str]) -> str:
        found = match[0].lower()
        return f"var({variable(found)})" if found in DARK else f"#{name}-{match[1]}"

    return re.sub(r"#([\w.-]+)", replaced, value)
