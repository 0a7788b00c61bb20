"""`dptrain plan RUN`: what it writes, prints and refuses."""

from __future__ import annotations

import json

import pytest

from dptrain.cli.plan import numbers, plan
from dptrain.errors import ConfigError
from tests.ideal_runs import write_ideal_run


@pytest.fixture
def run(tmp_path):
    return write_ideal_run(tmp_path)


@pytest.fixture
def undrawn(monkeypatch):
    """Spare the seconds that a picture takes."""
    monkeypatch.setattr("dptrain.cli.plan.draw_plan", lambda _plan, path: path.touch())


def test_it_writes_a_picture_and_a_record_and_tells(run, capsys):
    """One line per number of GPUs; the same figures in plan.json."""
    assert plan([str(run), "--gpus", "2,8,64", "--price-per-gpu-hour", "2.5"]) == 0
    out = capsys.readouterr().out
    found = json.loads((run / "plan.json").read_text())
    assert (run / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert [point["num_devices"] for point in found["points"]] == [2, 8, 64]
    assert found["finding"].startswith("2 GPUs: ")
    assert "Time on 2 GPUs: " in out
    assert "noise scale is not the optimal batch size" in out
    for point in found["points"]:
        assert f"{point['micro_batch_size']} × {point['accumulation_steps']}" in out


@pytest.mark.usefixtures("undrawn")
def test_json_to_stdout_is_json_alone(run, capsys):
    """The table goes to stderr."""
    assert plan([str(run), "--gpus", "2", "--json", "-", "--flops-budget", "1e21"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads((run / "plan.json").read_text())
    assert len(json.loads(out)["optimal_sizes"]) == 2
    assert "Compute-optimal by Besiroglu" in err


@pytest.mark.usefixtures("undrawn")
def test_json_to_a_file(run, tmp_path):
    """Beside the one in the run folder."""
    assert plan([str(run), "--gpus", "2", "--json", str(tmp_path / "copy.json")]) == 0
    assert (tmp_path / "copy.json").read_text() == (run / "plan.json").read_text()


@pytest.mark.usefixtures("undrawn")
def test_the_size_of_the_gradients_is_that_of_the_newest_checkpoint(run, capsys):
    """Which a given bandwidth needs; without a checkpoint it says so."""
    options = [str(run), "--gpus", "2,64", "--allreduce-gb-per-s", "1"]
    with pytest.raises(ConfigError, match="keep a checkpoint"):
        plan(options)
    for step, size in ((1, 10), (2, 2_000_000)):
        folder = run / "checkpoints" / f"step-{step:012}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(size))
    assert plan(options) == 0
    assert "2 MB at 1 GB/s, as given" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", [8]),
        ("1,2,4,...,64", [1, 2, 4, 8, 16, 32, 64]),
        ("1, 2, 4, …, 50", [1, 2, 4, 8, 16, 32, 50]),
        ("3,12,...,100,500", [3, 12, 48, 100, 500]),
    ],
)
def test_numbers_with_dots(text, expected):
    """The dots go on by the last factor."""
    assert numbers(text) == expected


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--gpus", "a"),
        ("--gpus", "0"),
        ("--gpus", "1,...,8"),
        ("--gpus", "2,3,...,9"),
        ("--gpus", "1,2,..."),
        ("--price-per-gpu-hour", "-1"),
    ],
)
def test_what_makes_no_sense_is_refused(run, option, value, capsys):
    """By the parser, with the value."""
    with pytest.raises(SystemExit) as ended:
        plan([str(run), option, value])
    assert ended.value.code == 2
    assert repr(value) in capsys.readouterr().err


def test_a_folder_that_takes_no_file_is_named(run):
    """A picture that cannot be written is the user's to repair."""
    (run / "plan.json").mkdir()
    with pytest.raises(ConfigError, match=r"cannot write .*plan\.json"):
        plan([str(run), "--gpus", "2"])
