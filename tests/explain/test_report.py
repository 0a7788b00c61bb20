"""The files of a report: which there are, where they lie, and what the picture of the curves holds."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf
from matplotlib.image import imread

from dptrain.errors import ConfigError
from dptrain.explain import draw_report
from dptrain.explain.figures.run_figures import figures
from dptrain.explain.record import read_run
from dptrain.explain.report import _named, _stacked
from dptrain.explain.text.findings import CAVEAT
from tests.explain.made_runs import write_run


def stacked(folder):
    record = read_run(folder)
    return _stacked([record], figures(record))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The folder of a run whose report was drawn; that left matplotlib as it was."""
    before = dict(mpl.rcParams)
    folder = write_run(tmp_path_factory.mktemp("drawn") / "run")
    assert draw_report(folder) == folder / "report.html"
    assert dict(mpl.rcParams) == before
    assert not Gcf.figs
    return folder


def test_a_run_gets_a_page_and_pictures(drawn):
    """The page, the curves in one picture, and a picture of each other figure; no half-written file is left."""
    written = {path.name for path in drawn.iterdir()} - {
        "metrics.jsonl",
        "decisions.jsonl",
        "summary.json",
        "config.yaml",
    }
    assert written == {"report.html", "report.png", "report-noise-against-loss.png", "report-frontier.png"}


def test_the_picture_is_at_readme_width_and_is_not_blank(drawn):
    """The PNG is twice 900 pixels wide and each fifth of its height holds coloured pixels."""
    pixels = imread(drawn / "report.png")[..., :3]
    assert pixels.shape[1] == 1800
    for band in np.array_split(pixels, 5):
        assert (np.ptp(band, axis=-1) > 0.2).any()


def test_the_page_says_what_batch_to_use_before_all_else(drawn):
    """Then come figures, decisions, cost and settings, and at the end how far to trust it."""
    text = (drawn / "report.html").read_text()
    parts = (
        *(
            "<h1>run</h1>",
            "Recommended batch size",
            "Recommended constant global batch",
            "<figure",
            "Decisions on the batch",
        ),
        *("Cost", "Settings", CAVEAT),
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert "optimal batch" not in text.replace(CAVEAT, "")


def test_the_caption_names_geometry_smoothing_and_the_caveat(tmp_path):
    """The foot of the picture says how the batch was laid out, what was averaged, and how far to trust it."""
    caption = stacked(write_run(tmp_path)).get_supxlabel()
    assert "micro-batch 8 × accumulation steps 1–8 × 2 replicas" in caption
    assert "Noise scale: as precise as a mean over 23 steps, interval at 95 %." in caption
    assert CAVEAT in caption
    assert "a factor of six" in " ".join(CAVEAT.split())


def test_the_curves_stand_over_each_other_under_their_findings(tmp_path):
    """Five curves on one axis, each titled."""
    axes = stacked(write_run(tmp_path)).axes
    assert len(axes) == 5
    assert all(each.get_title(loc="left") for each in axes)
    assert len({each.get_xlim() for each in axes}) == 1
    assert [each.get_xlabel() for each in axes] == ["", "", "", "", "samples seen"]


def test_a_killed_run_is_drawn_as_far_as_it_came(tmp_path):
    """Without summary.json, decisions and config, and with a torn last line, the rest of the log counts."""
    folder = write_run(tmp_path / "run", num_steps=20, finished=False, eval_every=0, batches=(16,))
    with (folder / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 21, "progr')
    (folder / "decisions.jsonl").unlink()
    (folder / "config.yaml").unlink()
    assert stacked(folder).get_suptitle() == "run · 2 replicas · 320 samples in 1 s · not finished (no summary.json)"


def test_a_torn_summary_is_an_unfinished_run(tmp_path):
    """A summary that was cut short by a kill counts as none."""
    folder = write_run(tmp_path, num_steps=5)
    (folder / "summary.json").write_text('{"task": "pysou')
    assert "not finished" in stacked(folder).get_suptitle()


def test_several_runs_are_laid_over_each_other_where_they_lie(tmp_path):
    """The page stands beside the first run, names all of them, compares them, and touches no run's own report."""
    runs = [write_run(tmp_path / name, num_steps=40) for name in ("one", "two")]
    path = draw_report(*runs)
    text = path.read_text()
    assert path == tmp_path / "report.html"
    assert (tmp_path / "report-loss-over-time.png").is_file()
    assert not (runs[0] / "report.html").exists()
    assert text.index("Comparison of the runs") < text.index("<figure")
    assert "Recommended batch size, from A one" in text
    assert "Recommended batch size, from B two" in text


def test_runs_of_one_name_are_distinguished(tmp_path):
    """By the folders that they lie in."""
    folders = [tmp_path / place for place in ("monday/run", "tuesday/run", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
    records = _named([read_run(write_run(folder, num_steps=3)) for folder in folders], folders)
    assert [record.name for record in records] == ["monday/run", "tuesday/run", "other"]


def test_a_report_is_replaced_and_what_it_no_longer_has_goes(tmp_path):
    """A picture of an earlier report does not stay beside a page that has no such figure; no link is followed."""
    folder = write_run(tmp_path / "run", num_steps=10, noise="never")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    for name in ("report.html", ".report.html.new", "report-frontier.png"):
        (folder / name).symlink_to(elsewhere)
    draw_report(folder)
    assert elsewhere.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()
    assert {path.name for path in folder.glob("*report*")} == {"report.html", "report.png"}


def test_a_folder_that_is_no_run_gets_one_sentence(tmp_path):
    """A missing folder, one without a log, one without a step and a damaged log are distinguished."""
    with pytest.raises(ConfigError, match="is not a folder"):
        draw_report(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"has no metrics\.jsonl"):
        draw_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no training step yet"):
        draw_report(tmp_path)
    log = write_run(tmp_path, num_steps=5) / "metrics.jsonl"
    log.write_text("{broken\n" + log.read_text())
    with pytest.raises(ConfigError, match="line 1 is damaged"):
        draw_report(tmp_path)


def test_a_place_that_takes_no_files_gets_one_sentence(tmp_path):
    """Neither does more runs than letters, or none."""
    run = write_run(tmp_path / "run", num_steps=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write the report to .*give another --out"):
        draw_report(run, out=tmp_path / "file")
    with pytest.raises(ConfigError, match="1 to 26 runs, got 0"):
        draw_report()
