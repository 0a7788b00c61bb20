"""Colours that can be read in light and dark and distinguished by all, and an SVG that has no colour of its own."""

from __future__ import annotations

import re
from itertools import combinations, pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from dptrain.explain.figures.theme import DARK, DASHES, GREY, INK, PAPER, SERIES, SOFT, STYLE, css_variables, svg

TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
SEEN_BY = {
    # Machado, Oliveira and Fernandes 2009, severity 1.
    "everybody": np.eye(3),
    "protanopes": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopes": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopes": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    """Return the sRGB of a hexadecimal form, without its gamma."""
    values = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    """Contrast ratio of WCAG 2: 1 for equal colours, 21 for black on white."""
    darker, lighter = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (lighter + 0.05) / (darker + 0.05)


def lab(rgb):
    """CIE 1976 L*a*b* of linear sRGB: equal distances look about equally far."""
    x = TO_XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def pages():
    return [("light", {light: light for light in DARK}), ("dark", DARK)]


def drawing():
    with rc_context(STYLE):
        figure = Figure(figsize=(3, 2))
        axes = figure.subplots()
        axes.plot([1, 2], [2, 3], "o-", color=SERIES[0], label="<b>$\\x & _1")
        hatched = axes.fill_between([1, 2], [1, 2], [2, 3])
        hatched.set(facecolor="none", edgecolor=SERIES[2], hatch="///")
        axes.axvspan(1, 2, color=GREY, alpha=0.2)
        axes.legend()
    return figure


@pytest.mark.parametrize(("name", "colours"), pages())
def test_text_and_curves_stand_out(name, colours):
    """Text has the contrast that WCAG asks of text (4.5), curves what it asks of graphics (3)."""
    for text in (INK, SOFT):
        assert contrast(colours[text], colours[PAPER]) >= 4.5
    for curve in (*SERIES, GREY):
        assert contrast(colours[curve], colours[PAPER]) >= 3


@pytest.mark.parametrize("who", SEEN_BY)
@pytest.mark.parametrize(("name", "colours"), pages())
def test_runs_are_distinguishable_to_colour_blind_readers(name, colours, who):
    """Every two of the colours lie far apart as they are seen with any kind of colour vision."""
    seen = {colour: lab(SEEN_BY[who] @ linear(colours[colour])) for colour in SERIES}
    assert min(np.linalg.norm(seen[one] - seen[other]) for one, other in combinations(SERIES, 2)) > 15


def test_no_two_runs_share_colour_and_line():
    """As many runs as can be distinguished get a pair of their own, and neighbours differ in both."""
    pairs = [(SERIES[index % len(SERIES)], str(DASHES[index % len(DASHES)])) for index in range(26)]
    assert len(set(pairs)) == 26
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in pairwise(pairs))


def test_contrast_is_that_of_wcag():
    """Black on white is 21, a colour on itself 1, and their grey #767676 passes by a hair."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#123456", "#123456") == 1
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_a_drawing_has_no_colour_address_or_style_of_its_own():
    """All colours are variables that the page declares, for light and for dark; nothing is loaded from anywhere."""
    text = ET.tostring(svg(drawing(), name="fig", alt="what it shows"), encoding="unicode")
    assert set(re.findall(r"#[0-9a-fA-F]{6}\b", text)) == set()
    assert "http" not in text
    assert "<style" not in text
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert len(used) >= 5
    for dark in (False, True):
        assert used <= set(re.findall(r"(--\w+):", css_variables(dark=dark)))


def test_a_drawing_refers_to_its_own_definitions_alone():
    """Every reference leads to one definition, named after the figure; two figures on a page do not mix."""
    root = svg(drawing(), name="fig", alt="")
    text = ET.tostring(root, encoding="unicode")
    names = [node.get("id") for node in root.iter() if node.get("id")]
    referred = set(re.findall(r"#([\w.-]+)", text))
    assert referred == set(names)
    assert len(names) == len(set(names))
    assert all(name.startswith("fig-") for name in names)


def test_a_drawing_says_what_it_shows_and_keeps_its_text():
    """It has its alternative text; labels are text, escaped and not taken for formulas."""
    root = svg(drawing(), name="fig", alt='a "line"')
    assert (root.get("role"), root.get("aria-label")) == ("img", 'a "line"')
    assert "<b>$\\x & _1" in [node.text for node in root.iter("text")]
    assert "&lt;b&gt;$\\x &amp; _1" in ET.tostring(root, encoding="unicode")


def test_equal_drawings_are_equal_to_the_byte():
    """No clock and no chance is in them."""
    assert ET.tostring(svg(drawing(), name="a", alt="")) == ET.tostring(svg(drawing(), name="a", alt=""))
