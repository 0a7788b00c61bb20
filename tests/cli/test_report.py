"""`dptrain report RUN [RUN …]`: one line that says where; the report itself is tested in its own room."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dptrain.cli import report as command
from dptrain.cli.main import main


def write_run(folder):
    rows = [
        {
            "kind": "train",
            "step": step,
            "progress/samples": 16 * step,
            "train/loss": 2.0 / step,
            "train/lr": 0.1,
            "batch/global": 16,
            "batch/micro": 4,
            "batch/accumulation": 2,
            "noise_scale/state": "not resolved yet",
            "throughput/samples_per_sec": 100.0,
        }
        for step in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_writes_a_report_and_says_where(tmp_path, capsys):
    """Page and picture lie in the run folder."""
    write_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_several_runs_and_a_place_are_handed_on(tmp_path, capsys, monkeypatch):
    """In the order in which they were given."""
    asked = {}
    monkeypatch.setattr(
        command, "draw_report", lambda *runs, out: asked.update(runs=runs, out=out) or out / "report.html"
    )
    assert main(["report", "one", "two", "--out", str(tmp_path)]) == 0
    assert asked == {"runs": (Path("one"), Path("two")), "out": tmp_path}
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_folder_without_a_run_is_refused(tmp_path, name, capsys):
    """In one sentence that names it."""
    (tmp_path / "empty").mkdir()
    code = main(["report", str(tmp_path / name)])
    out, err = capsys.readouterr()
    assert code != 0
    assert out == ""
    assert err.startswith("dptrain report: ")
    assert str(tmp_path / name) in err
    assert err.count("\n") == 1


def test_help(capsys):
    """It says what RUN is."""
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    output = capsys.readouterr().out
    assert "run folder" in output
    assert "--out DIR" in output
