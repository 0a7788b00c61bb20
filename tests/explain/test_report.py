"""The picture of a run: what its panels say and show, on run folders made up here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml

from dptrain.errors import ConfigError
from dptrain.explain import draw_report
from dptrain.explain.record import read_run
from dptrain.explain.report import CAVEAT, _figure


def _state(index, num_steps, kind):
    """What is known of the noise scale at a step: nothing, then a lower bound, then both ends."""
    if kind == "never" or index < 0.05 * num_steps:
        return "not resolved yet"
    return "at least" if kind == "bound only" or index < 0.2 * num_steps else "resolved"


def _rows(*, num_steps, noise, batches, seed=7):
    rng = np.random.default_rng(seed)
    samples, rows, decisions = 0, [], []
    for step in range(1, num_steps + 1):
        batch = batches[(step - 1) * len(batches) // num_steps]
        samples += batch
        state = _state(step, num_steps, noise)
        phi = 40 * (1 + 7 * step / num_steps) * float(np.exp(0.05 * rng.standard_normal()))
        spread = 1.0 + 0.25 + 1.5 * math.exp(-6 * (step / num_steps - 0.2))
        rows.append(
            {
                "kind": "train",
                "step": step,
                "progress/samples": samples,
                "progress/epoch": samples / 4096,
                "progress/wall_s": step * 0.05,
                "train/loss": 1.8 + 3.7 * math.exp(-5 * step / num_steps) + 0.15 * rng.standard_normal(),
                "train/lr": 0.003 * min(1.0, step / (0.1 * num_steps)) * (1 - 0.8 * step / num_steps),
                "train/grad_norm": 1.0,
                "batch/global": batch,
                "batch/micro": 8,
                "batch/accumulation": batch // 16,
                "gns/b_simple": phi if state == "resolved" else None,
                "gns/lower": 0.0 if state == "not resolved yet" else phi / spread,
                "gns/upper": phi * spread if state == "resolved" else None,
                "gns/state": state,
                "gns/effective_steps": 23.4,
                "throughput/samples_per_sec": 400 + batch / 4 + 30 * rng.standard_normal(),
                "train/steps_dropped": 0,
            }
        )
        if len(rows) > 1 and batch != rows[-2]["batch/global"]:
            before = rows[-2]["batch/global"]
            decisions.append(
                {
                    "step": step,
                    "progress/samples": samples - batch,
                    "batch/before": before,
                    "batch/after": batch,
                    "lr_factor/before": math.sqrt(before / batches[0]),
                    "lr_factor/after": math.sqrt(batch / batches[0]),
                    "reason": "the noise scale is above what the batch is right for",
                }
            )
    return rows, decisions


def _evals(rows, *, every):
    return [
        {
            "kind": "eval",
            "step": row["step"],
            "progress/samples": row["progress/samples"],
            "eval/loss": 1.78 + (5.53 - 1.78) * math.exp(-5 * index / len(rows)),
            "eval/bits_per_byte": (1.78 + (5.53 - 1.78) * math.exp(-5 * index / len(rows))) / math.log(2),
        }
        for index, row in enumerate(rows)
        if index % every == 0
    ]


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes a run folder: seeded curves in the schema of the trainer's logs."""

    def write(
        *, num_steps=300, noise="resolves", batches=(16, 32, 64, 48, 128), eval_every=40, finished=True, edit=None
    ):
        rows, decisions = _rows(num_steps=num_steps, noise=noise, batches=batches)
        if edit:
            edit(rows)
        evals = _evals(rows, every=eval_every) if eval_every else []
        log = "".join(json.dumps(row) + "\n" for row in [*rows, *evals])
        (tmp_path / "metrics.jsonl").write_text(log)
        (tmp_path / "decisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in decisions))
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "pysource", "noise": {"level": 0.95}}))
        if finished:
            summary = {
                "task": "pysource",
                "world_size": 2,
                "backend": "gloo",
                "samples_seen": rows[-1]["progress/samples"],
                "wall_s": 212.4,
                "steps_dropped": rows[-1]["train/steps_dropped"],
            }
            (tmp_path / "summary.json").write_text(json.dumps(summary))
        return tmp_path

    return write


def _titles(folder):
    return [axes.get_title(loc="left") for axes in _figure(read_run(folder)).axes]


def _labels(axes):
    return set(axes.get_legend_handles_labels()[1])


def test_each_panel_says_what_it_found(run_folder):
    """A run with everything in it gets five sentences with its own numbers in them."""
    loss, batch, noise, rate, speed = _titles(run_folder(batches=(16, 32, 64, 48, 128), eval_every=299))
    assert loss == "Held-out loss fell from 5.53 to 1.81 nats (2.61 bits per byte)"
    assert batch == "The batch moved 4 times, from 16 to 128 samples"
    assert noise.startswith("The noise scale ")
    assert rate.startswith("The learning rate rose to 0.0027")
    assert rate.endswith("ended at 0.0006 (batch changes: × 2.83)")
    assert speed.startswith("A batch of 16 ran at 40")


def test_the_picture_is_written_at_readme_width_and_is_not_blank(run_folder):
    """The PNG is twice 900 pixels wide and each fifth of its height holds coloured pixels."""
    from matplotlib.image import imread

    path = draw_report(run_folder())
    pixels = imread(path)[..., :3]
    assert path.name == "report.png"
    assert pixels.shape[1] == 1800
    for band in np.array_split(pixels, 5):
        assert (np.ptp(band, axis=-1) > 0.2).any()


def test_drawing_leaves_matplotlib_as_it_was(run_folder):
    """Neither the style nor pyplot's figures of a program that draws a report are touched."""
    import matplotlib as mpl
    from matplotlib._pylab_helpers import Gcf

    before = dict(mpl.rcParams)
    draw_report(run_folder(num_steps=5))
    assert dict(mpl.rcParams) == before
    assert not Gcf.figs


def test_all_panels_share_the_samples_axis_and_name_their_units(run_folder):
    """Every panel has a labelled y axis, and one x axis in samples serves them all."""
    panels = _figure(read_run(run_folder())).axes
    assert len(panels) == 5
    assert all(axes.get_ylabel() for axes in panels)
    assert len({axes.get_xlim() for axes in panels}) == 1
    assert panels[-1].get_xlabel() == "samples seen"


def test_the_caption_names_geometry_smoothing_and_the_caveat(run_folder):
    """The foot of the picture says how the batch was laid out, what was averaged, and how far to trust it."""
    caption = _figure(read_run(run_folder())).get_supxlabel()
    assert "micro-batch 8 × accumulation steps 1–8 × 2 replicas" in caption
    assert "Noise scale: mean over about 23 steps, interval at 95%." in caption
    assert CAVEAT in caption
    assert "factor of six" in CAVEAT


def test_a_decision_has_its_marker_where_the_batch_line_jumps(run_folder):
    """Each decision's marker lies on the corner of the batch line that it caused."""
    axes = _figure(read_run(run_folder())).axes[1]
    line, *markers = axes.get_lines()
    x, y = line.get_data()
    corners = set(zip(x[:-1], y[1:], strict=True))  # a "pre" step leaves its last point for the next height
    marked = [point for marker in markers for point in zip(*marker.get_data(), strict=True)]
    assert len(marked) == 4
    assert set(marked) <= corners


def test_the_noise_scale_shows_only_what_is_known(run_folder):
    """Estimate, band, open bound and grey strip appear exactly where the run had them."""
    by_kind = {
        "resolves": {"not resolved yet", "at least (open above)", "interval", "estimate", "global batch"},
        "bound only": {"not resolved yet", "at least (open above)", "global batch"},
        "never": {"not resolved yet", "global batch"},
    }
    for kind, labels in by_kind.items():
        assert _labels(_figure(read_run(run_folder(noise=kind))).axes[2]) == labels


def test_an_open_bound_never_shows_a_number_as_an_estimate(run_folder):
    """A run that only ever had a lower bound says "at least" and nothing else."""
    title = _titles(run_folder(noise="bound only"))[2]
    assert title == "The noise scale went from at least 10 to at least 240 samples"


@pytest.mark.parametrize(("num_steps", "noise"), [(1, "resolves"), (1, "bound only"), (2, "never"), (3, "resolves")])
def test_a_run_of_a_few_rows_is_drawn(run_folder, num_steps, noise):
    """Few rows, no evaluation and no end are no reason to fail."""
    folder = run_folder(num_steps=num_steps, noise=noise, batches=(32,), eval_every=0, finished=False)
    assert draw_report(folder).stat().st_size > 10_000
    assert _titles(folder)[1] == "The global batch stayed at 32 samples"


def test_a_killed_run_is_drawn_as_far_as_it_came(run_folder):
    """Without summary.json, decisions and config, and with a torn last line, the rest of the log counts."""
    folder = run_folder(num_steps=20, finished=False, eval_every=0, batches=(16,))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 21, "progr')
    (folder / "decisions.jsonl").unlink()
    (folder / "config.yaml").unlink()
    record = read_run(folder)
    assert len(record.train) == 20
    assert (
        _figure(record).get_suptitle()
        == f"{folder.name} · 2 replicas · 320 samples in 1 s · not finished (no summary.json)"
    )


def test_a_torn_summary_is_an_unfinished_run(run_folder):
    """A summary that was cut short by a kill counts as none."""
    folder = run_folder(num_steps=5)
    (folder / "summary.json").write_text('{"task": "pysou')
    assert "not finished" in _figure(read_run(folder)).get_suptitle()


def test_dropped_steps_are_counted_and_marked(run_folder):
    """A dropped step has no loss; it leaves a gap, a mark where it was, and its count in the title."""

    def drop(rows):
        for index, row in enumerate(rows):
            row["train/steps_dropped"] = (index >= 50) + (index >= 120)
        rows[50]["train/loss"] = rows[120]["train/loss"] = None

    folder = run_folder(edit=drop)
    record = read_run(folder)
    axes = _figure(record).axes[0]
    (marks,) = (line for line in axes.get_lines() if line.get_label() == "step dropped")
    assert axes.get_title(loc="left").endswith("; 2 steps dropped")
    assert list(marks.get_xdata()) == [record.train[index]["progress/samples"] for index in (50, 120)]


def test_a_row_without_throughput_does_not_break_the_smoothed_line(run_folder):
    """A step that was not timed is a gap in the raw curve alone."""
    folder = run_folder(edit=lambda rows: [row.update({"throughput/samples_per_sec": None}) for row in rows[::7]])
    raw, smoothed = _figure(read_run(folder)).axes[4].get_lines()
    assert np.isnan(raw.get_ydata()).any()
    assert np.isfinite(smoothed.get_ydata()).all()


def test_a_run_without_a_single_finite_loss_is_drawn(run_folder):
    """A run that diverged at once says so instead of failing."""
    folder = run_folder(
        num_steps=10, eval_every=0, edit=lambda rows: [row.update({"train/loss": None}) for row in rows]
    )
    assert _titles(folder)[0] == "No finite loss was logged"
    assert draw_report(folder).is_file()


def test_a_folder_that_is_no_run_gets_one_sentence(tmp_path, run_folder):
    """A missing folder, one without a log, one without a step and a damaged log are told apart."""
    with pytest.raises(ConfigError, match="is not a folder"):
        draw_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        draw_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no training step yet"):
        draw_report(tmp_path)
    log = run_folder(num_steps=5) / "metrics.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        draw_report(tmp_path)
