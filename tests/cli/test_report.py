"""`dptrain report RUN`: one file, one line; the drawing itself is tested with the report."""

from __future__ import annotations

import json

import pytest

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
            "gns/state": "not resolved yet",
            "throughput/samples_per_sec": 100.0,
        }
        for step in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_it_draws_and_says_where(tmp_path, capsys):
    """The picture lies in the run folder."""
    write_run(tmp_path)
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'report.png'}\n"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


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
    assert "a run folder" in capsys.readouterr().out
