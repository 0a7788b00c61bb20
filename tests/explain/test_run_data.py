"""A run folder as columns."""

import math

import pytest

import dptrain
from dptrain.cli.main import main
from dptrain.errors import ConfigError
from tests.explain.made_runs import write_run


def test_a_run_is_columns_decisions_and_summary(tmp_path):
    """Each logged step is a row of every column, NaN where it has no figure."""
    folder = write_run(tmp_path / "run")
    run = dptrain.load_run(folder)
    lengths = {len(values) for values in run.metrics.values()}
    assert lengths == {len(run.metrics["step"])}
    assert run.metrics["step"].tolist() == sorted(run.metrics["step"].tolist())
    assert run.metrics["noise_scale/value"].dtype == float
    assert all("reason" in decision for decision in run.decisions)
    assert run.to_arrow().num_rows == len(run.metrics["step"])


def test_what_is_no_run_is_refused(tmp_path):
    """A folder without metrics is named."""
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        dptrain.load_run(tmp_path)


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_metrics_are_exported_as_a_table(tmp_path, suffix, capsys):
    """`dptrain export RUN --metrics FILE` writes one row for each step, which other tools read."""
    folder = write_run(tmp_path / "run")
    target = tmp_path / f"metrics.{suffix}"
    assert main(["export", str(folder), "--metrics", str(target)]) == 0
    assert "columns" in capsys.readouterr().out
    if suffix == "csv":
        from pyarrow.csv import read_csv as read
    else:
        from pyarrow.parquet import read_table as read
    losses = read(target).column("train/loss").to_pylist()
    assert losses == pytest.approx(dptrain.load_run(folder).metrics["train/loss"].tolist())
    assert all(map(math.isfinite, losses))


def test_weights_are_not_written_into_a_table(tmp_path, capsys):
    """`--to metrics.csv` names the option that was meant; so does an unknown kind of table."""
    folder = write_run(tmp_path / "run")
    assert main(["export", str(folder), "--to", str(tmp_path / "metrics.csv")]) == 2
    assert "--metrics" in capsys.readouterr().err
    assert main(["export", str(folder), "--metrics", str(tmp_path / "metrics.xlsx")]) == 2
    assert ".parquet" in capsys.readouterr().err
