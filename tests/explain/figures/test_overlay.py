"""Several runs in shared figures: each with its own colour and line, none hidden for what it lacks."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from dptrain.explain.figures.overlay import overlays
from dptrain.explain.record import read_run
from tests.explain.made_runs import write_run


def runs(folder, *hows):
    return [read_run(write_run(folder / f"run{index}", **how)) for index, how in enumerate(hows)]


def axes_of(figure):
    axes = Figure().subplots()
    figure.draw(axes)
    return axes


def test_every_figure_shows_every_run(tmp_path):
    """Two runs are two entries of each legend, in two colours and two line styles."""
    for figure in overlays(runs(tmp_path, {}, {"batches": (64,)})):
        axes = axes_of(figure)
        handles, labels = axes.get_legend_handles_labels()
        assert labels == ["A run0", "B run1"], figure.name
        assert len({handle.get_color() for handle in handles}) == 2
        assert len({handle.get_linestyle() for handle in handles}) == 2
        assert axes.get_xlabel()
        assert axes.get_ylabel()


def test_runs_are_placed_at_the_loss_that_both_reached(tmp_path):
    """A run that went further is placed where it passed the other's best, before its end."""
    short, long = runs(tmp_path, {"num_steps": 300}, {"num_steps": 300, "batches": (64,)})
    frontier = {figure.name: figure for figure in overlays([short, long])}["frontier"]
    stars = [line for line in axes_of(frontier).get_lines() if line.get_marker() == "*"]
    assert frontier.title.startswith("To a held-out loss of ")
    assert all(line.get_xdata()[0] <= 300 for line in stars)
    assert len(stars) == 2


@pytest.mark.parametrize("missing", [{"noise": "never"}, {"eval_every": 0}, {"num_steps": 1}, {"finished": False}])
def test_a_run_that_lacks_something_stands_beside_one_that_does_not(tmp_path, missing):
    """No noise scale, no evaluation, one row or no end are no reason to fail."""
    for figure in overlays(runs(tmp_path, {}, missing)):
        axes_of(figure)


def test_without_any_noise_scale_there_are_sentences(tmp_path):
    """What cannot be drawn of any run is said."""
    found = {figure.name: figure for figure in overlays(runs(tmp_path, {"noise": "never"}, {"noise": "never"}))}
    for name in ("noise-scale", "noise-against-loss", "frontier"):
        assert found[name].draw is None
        assert found[name].title


def test_many_runs_have_lines_without_bands(tmp_path):
    """Intervals of more than three runs would cover each other."""
    few, many = ({figure.name: figure for figure in overlays(runs(tmp_path, *([{}] * number)))} for number in (3, 7))
    assert len(axes_of(few["noise-scale"]).collections) == 3
    assert len(axes_of(many["noise-scale"]).collections) == 0
    assert "not drawn" in many["noise-scale"].reading
