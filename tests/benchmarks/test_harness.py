"""The command line that all benchmarks share, with a measurement that takes no time."""

from __future__ import annotations

import json
import platform
import sys

import pytest

from benchmarks import harness

FINDINGS = harness.Findings(
    figures={"ratio": 1.25},
    rows=[{"case": "one", "seconds": 2.0}],
    columns={"case": "{case}", "time": "{seconds:.2f} s"},
    note="A note.",
)


def run(monkeypatch, *arguments, measure=lambda _quick: FINDINGS):
    monkeypatch.setattr(sys, "argv", ["x", *arguments])
    harness.run(measure, question="Is it?", name="example")


def test_without_json_a_table_goes_to_stdout(monkeypatch, capsys):
    """A person sees question, rows, figures and note."""
    run(monkeypatch)
    shown = capsys.readouterr().out
    for text in ("Is it?", "one", "2.00 s", "ratio 1.25", "A note."):
        assert text in shown


def test_json_on_stdout_is_alone_there(monkeypatch, capsys):
    """`--json -` prints one object to stdout and the table to stderr."""
    run(monkeypatch, "--json", "-", "--quick")
    shown = capsys.readouterr()
    result = json.loads(shown.out)
    assert list(result) == ["question", "command", "environment", "figures", "columns", "rows", "note"]
    assert result["command"] == "python -m benchmarks.example --quick"
    assert result["figures"] == {"ratio": 1.25}
    assert "2.00 s" in shown.err


def test_json_in_a_file(monkeypatch, capsys, tmp_path):
    """`--json PATH` writes the object there; the table stays on stdout, the path stays out of the result."""
    path = tmp_path / "result.json"
    run(monkeypatch, "--json", str(path))
    assert json.loads(path.read_text(encoding="utf-8"))["rows"] == FINDINGS.rows
    assert str(tmp_path) not in path.read_text(encoding="utf-8")
    assert "2.00 s" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["missing/result.json", "."])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(monkeypatch, capsys, tmp_path, place):
    """Nobody waits for a measurement whose result is then lost."""

    def measure(quick):
        pytest.fail("measured")

    with pytest.raises(SystemExit) as stop:
        run(monkeypatch, "--json", str(tmp_path / place), measure=measure)
    assert stop.value.code == 2
    assert "is not a file in a folder that exists" in capsys.readouterr().err


def test_a_figure_that_is_no_number_is_not_written(monkeypatch, tmp_path):
    """NaN is not JSON: the benchmark fails instead of leaving a file that others cannot read."""
    path = tmp_path / "result.json"
    broken = harness.Findings(figures={"ratio": float("nan")}, rows=[], columns={}, note="")
    with pytest.raises(ValueError, match="JSON"):
        run(monkeypatch, "--json", str(path), measure=lambda _quick: broken)
    assert not path.exists()


def test_the_environment_names_versions_but_not_the_machine():
    """What a figure depends on is reported; the host's name is not."""
    found = harness.environment(device="cpu")
    assert set(found) == {"dptrain", "torch", "python", "cpu_count", "processor", "device"}
    assert all(found.values())
    assert platform.node() not in found.values()
