"""The picture of a plan: what its graphs show and say."""

from __future__ import annotations

import numpy as np
import pytest

from dptrain.cost.prices import DevicePrice
from dptrain.explain.figures.plan_figure import draw_plan, figure
from dptrain.explain.model.hardware.devices import devices
from dptrain.explain.model.plan import make_plan
from tests.ideal_runs import ideal_record


def _plan(record=None, *, numbers=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512), **options):
    record = record or ideal_record()
    return make_plan(record, devices(record), numbers=numbers, **options)


@pytest.fixture(scope="module")
def plan():
    return _plan(price=DevicePrice.given(2.5))


def test_each_graph_has_its_finding_its_units_and_how_to_read_it(plan):
    """A title of words with numbers, a unit on both axes, and one line of instruction."""
    figures = figure(plan).axes
    assert len(figures) == 3
    for axes in figures:
        assert any(letter.isdigit() for letter in axes.get_title(loc="left"))
        assert axes.get_ylabel() in ("time to the target (seconds)", "time to the target (minutes)")
        assert "How to read: " in axes.get_xlabel()
    assert [axes.get_xlabel().split("\n")[0] for axes in figures] == [
        "number of GPUs",
        "compute (petaflop/s-days, counted)",
        "money ($)",
    ]


def test_without_ledger_and_price_the_axes_are_samples_and_device_hours():
    """What is not known is not drawn."""

    def bare(rows, _evals):
        for row in rows:
            del row["ledger/flops"]

    figures = figure(_plan(ideal_record(edit=bare))).axes
    assert [axes.get_xlabel().split("\n")[0] for axes in figures[1:]] == ["samples seen", "GPU-hours"]


def test_the_bands_lie_round_the_line(plan):
    """Two bands, the one of the interval within that of history."""
    axes = figure(plan).axes[0]
    history, interval = (band.get_paths()[0].get_extents() for band in axes.collections[:2])
    assert history.y0 <= interval.y0 <= interval.y1 <= history.y1
    assert {"planned", "interval and fits", "noise scale off by 6×"} < set(axes.get_legend_handles_labels()[1])


def test_the_picture_is_1800_pixels_wide_and_not_blank(plan, tmp_path):
    """Each third of its height holds coloured pixels."""
    from matplotlib.image import imread

    draw_plan(plan, tmp_path / "plan.png")
    pixels = imread(tmp_path / "plan.png")[..., :3]
    assert pixels.shape[1] == 1800
    for part in np.array_split(pixels, 3):
        assert (np.ptp(part, axis=-1) > 0.2).any()


def test_a_single_number_of_devices_is_drawn():
    """A plan of one point has no line, and no error either."""
    figure(_plan(numbers=(2,))).draw_without_rendering()
