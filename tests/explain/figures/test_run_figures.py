"""The figures of one run: what they say and what they draw, on run folders made up here."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from dptrain.explain.figures.figure import MOST_POINTS, RunFigure, noise_limits
from dptrain.explain.figures.run_figures import figures
from dptrain.explain.record import read_run
from tests.explain.made_runs import write_run


def made(folder, **how):
    return {figure.name: figure for figure in figures(read_run(write_run(folder, **how)))}


def axes_of(figure):
    axes = Figure().subplots()
    figure.draw(axes)
    return axes


def labels(axes):
    return set(axes.get_legend_handles_labels()[1])


def test_each_figure_says_what_it_found(tmp_path):
    """A run with everything in it gets sentences with its own numbers in them."""
    title = {name: figure.title for name, figure in made(tmp_path, eval_every=299).items()}
    assert list(title) == [
        *("loss", "batch", "noise-scale", "noise-against-loss", "frontier", "learning-rate", "throughput")
    ]
    assert title["loss"] == "Held-out loss fell from 5.53 to 1.81 nats (2.61 bits per byte)"
    assert title["batch"] == "Batch size: 16 → 128 samples in 4 changes"
    assert title["noise-scale"].startswith("The noise scale went from 94 [34, 260] to 300 [")
    assert title["noise-against-loss"].startswith("The training loss fell from ")
    assert title["frontier"].startswith("This run: ")
    assert title["learning-rate"].startswith("Learning rate: peak 0.0027")
    assert title["learning-rate"].endswith("final 0.0006 (scaling with the batch: ×2.83)")
    assert title["throughput"].startswith("Throughput: 40")


@pytest.mark.parametrize("noise", ["resolves", "bound only", "never"])
def test_every_figure_has_labelled_axes_and_a_line_on_how_to_read_it(tmp_path, noise):
    """Whatever is known: a title, how to read it, words for who does not see it, and axes that say what they are."""
    for figure in made(tmp_path, noise=noise, groups={"head": 1.0, "body": 2.0}).values():
        assert figure.title
        assert figure.reading.endswith(".")
        assert figure.title in figure.alt
        if figure.draw is not None:
            axes = axes_of(figure)
            assert axes.get_xlabel()
            assert axes.get_ylabel() or figure.name == "groups"  # whose y axis bears the names of the groups
            assert axes.get_title() == ""


def test_curves_over_samples_share_their_axis(tmp_path):
    """They can be laid over each other: the same limits, in samples."""
    curves = [axes_of(figure) for figure in made(tmp_path).values() if figure.legend is not None]
    assert len(curves) == 5
    assert len({axes.get_xlim() for axes in curves}) == 1
    assert {axes.get_xlabel() for axes in curves} == {"samples seen"}


def test_a_decision_has_its_marker_where_the_batch_line_jumps(tmp_path):
    """Each decision's marker lies on the corner of the batch line that it caused."""
    line, *markers = axes_of(made(tmp_path)["batch"]).get_lines()
    x, y = line.get_data()
    corners = set(zip(x[:-1], y[1:], strict=True))  # a "pre" step leaves its last point for the next height
    marked = [point for marker in markers for point in zip(*marker.get_data(), strict=True)]
    assert len(marked) == 4
    assert set(marked) <= corners


def test_advice_is_hollow(tmp_path):
    """What was only advised is marked apart from what was done."""
    axes = axes_of(made(tmp_path, applied=False)["batch"])
    assert labels(axes) == {"raise advised", "lower advised"}
    assert {line.get_markerfacecolor() for line in axes.get_lines()[1:]} == {"none"}


def test_the_noise_scale_shows_only_what_is_known(tmp_path):
    """Estimate, band, open bound and grey strip appear exactly where the run had them."""
    by_kind = {
        "resolves": {"not resolved yet", "at least (open above)", "interval", "estimate", "global batch"},
        "bound only": {"not resolved yet", "at least (open above)", "global batch"},
        "never": {"not resolved yet", "global batch"},
    }
    for kind, expected in by_kind.items():
        assert labels(axes_of(made(tmp_path, noise=kind)["noise-scale"])) == expected


def test_an_open_bound_never_shows_a_number_as_an_estimate(tmp_path):
    """A run that only ever had a lower bound says "at least", draws open triangles, and has no placement."""
    found = made(tmp_path, noise="bound only")
    assert found["noise-scale"].title == "The noise scale went from at least 10 to at least 240 samples"
    triangles = [line for line in axes_of(found["noise-against-loss"]).get_lines() if line.get_marker() == "^"]
    assert len(triangles[0].get_xdata()) > 5
    assert found["frontier"].draw is None
    assert found["frontier"].title == "No frontier: the noise scale was resolved for only 0% of the samples"


def test_a_run_without_a_noise_scale_has_sentences_in_place_of_figures(tmp_path):
    """Where there is nothing to draw, it is said why."""
    found = made(tmp_path, noise="never")
    for name in ("noise-against-loss", "frontier"):
        assert found[name].draw is None
        assert found[name].title == "The noise scale was not resolved in this run"


def test_the_loss_falls_to_the_right(tmp_path):
    """In the figure of noise scale over loss, time goes with the reading eye."""
    left, right = axes_of(made(tmp_path)["noise-against-loss"]).get_xlim()
    assert left > right


def test_the_run_is_a_star_between_the_dotted_lines(tmp_path):
    """The point of the run lies above the fewest samples and to the right of the fewest steps, and on what is shown."""
    record = read_run(write_run(tmp_path))
    axes = axes_of({figure.name: figure for figure in figures(record)}["frontier"])
    (star,) = (line for line in axes.get_lines() if line.get_marker() == "*")
    (steps,), (samples,) = star.get_data()
    assert (steps, samples) == (300, record.train[-1]["progress/samples"])
    fewest_steps, fewest_samples = (line for line in axes.get_lines() if line.get_linestyle() == ":")
    assert axes.get_xlim()[0] < fewest_steps.get_xdata()[0] < steps < axes.get_xlim()[1]
    assert axes.get_ylim()[0] < fewest_samples.get_ydata()[0] < samples < axes.get_ylim()[1]
    assert {text.get_text() for text in axes.texts} >= {"64", "128", "256"}


def test_groups_are_drawn_where_there_are_some(tmp_path):
    """A line for each group, in order of its noise scale, beside that of the whole model."""
    assert "groups" not in made(tmp_path / "a")
    axes = axes_of(made(tmp_path / "b", groups={"embedding" * 9: 9.0, "_$\\head$": 0.5})["groups"])
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["_$\\head$", "embeddingembeddingembed…"]
    assert labels(axes) == {"whole model"}
    bound = axes_of(made(tmp_path / "c", noise="bound only", groups={"head": 2.0})["groups"])
    assert [line.get_marker() for line in bound.get_lines()] == [">"]


@pytest.mark.parametrize(("num_steps", "noise"), [(1, "resolves"), (1, "bound only"), (2, "never"), (3, "resolves")])
def test_a_run_of_a_few_rows_is_drawn(tmp_path, num_steps, noise):
    """Few rows, no evaluation and no end are no reason to fail."""
    found = made(tmp_path, num_steps=num_steps, noise=noise, batches=(32,), eval_every=0, finished=False)
    assert found["batch"].title == "Batch size: constant, 32 samples"
    for figure in found.values():
        if figure.draw is not None:
            figure.figure(titled=True).draw_without_rendering()


def test_dropped_steps_are_counted_and_marked(tmp_path):
    """A dropped step has no loss; it leaves a gap, a mark where it was, and its count in the title."""

    def drop(rows):
        for index, row in enumerate(rows):
            row["train/steps_dropped"] = (index >= 50) + (index >= 120)
        rows[50]["train/loss"] = rows[120]["train/loss"] = None

    record = read_run(write_run(tmp_path, edit=drop))
    loss = figures(record)[0]
    (marks,) = (line for line in axes_of(loss).get_lines() if line.get_label() == "skipped step")
    assert loss.title.endswith("; 2 steps skipped")
    assert list(marks.get_xdata()) == [record.train[index]["progress/samples"] for index in (50, 120)]


def test_a_row_without_throughput_does_not_break_the_smoothed_line(tmp_path):
    """A step that was not timed is a gap in the raw curve alone."""
    untimed = made(tmp_path, edit=lambda rows: [row.update({"throughput/samples_per_sec": None}) for row in rows[::7]])
    raw, smoothed = axes_of(untimed["throughput"]).get_lines()
    assert np.isnan(raw.get_ydata()).any()
    assert np.isfinite(smoothed.get_ydata()).all()


def test_a_run_without_a_single_finite_loss_is_drawn(tmp_path):
    """A run that diverged at once says so instead of failing."""
    diverged = made(
        tmp_path, num_steps=10, eval_every=0, edit=lambda rows: [row.update({"train/loss": None}) for row in rows]
    )
    assert diverged["loss"].title == "No finite loss was logged"
    axes_of(diverged["loss"])


def test_a_long_run_draws_as_many_points_as_a_short_one(tmp_path):
    """A curve has no more points than a figure has room for, and its batch line a corner for each move."""
    found = made(tmp_path, num_steps=9000, eval_every=3000)
    raw, smoothed, *_ = axes_of(found["loss"]).get_lines()
    assert len(raw.get_xdata()) == len(smoothed.get_xdata()) == MOST_POINTS
    assert len(axes_of(found["batch"]).get_lines()[0].get_xdata()) == 6


def test_a_figure_of_its_own_bears_its_title_and_one_on_a_page_does_not():
    """The page says the title in words that wrap with the window."""
    figure = RunFigure(
        name="n", shows="s", title="Found", reading="r.", draw=lambda axes: axes.plot([1, 2], label="line")
    )
    alone, on_page = figure.figure(titled=True), figure.figure(titled=False)
    assert (alone.get_suptitle(), on_page.get_suptitle()) == ("Found", "")
    assert [text.get_text() for text in on_page.legends[0].get_texts()] == ["line"]


def test_a_lower_bound_far_above_the_last_estimate_is_within_the_limits():
    """A run may be resolved early alone: what it says at its end, "at least 350", is to be seen."""
    early = {
        "noise_scale/state": "resolved",
        "noise_scale/value": 10.0,
        "noise_scale/lower": 5.0,
        "noise_scale/upper": 20.0,
    }
    late = {
        "noise_scale/state": "at least",
        "noise_scale/value": None,
        "noise_scale/lower": 350.0,
        "noise_scale/upper": None,
    }
    low, high = noise_limits([early] * 50 + [late])
    assert low < 5
    assert high > 350
