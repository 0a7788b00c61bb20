"""One spelling for every option of every command, and numbers as people write them."""

from __future__ import annotations

import json

import pytest

from dptrain.cli.settings import parse
from dptrain.cli.spelling import dashed, underscored
from tests.cli.test_train import outcome


def test_names_change_and_values_stay():
    """Only what stands before the equals sign of an option is a name."""
    given = ["--run_dir=a_b", "--log.eval-every_samples", "1_000", "x_y", "--", "-1", "--task_options.num_samples", "3"]
    assert dashed(given) == [
        "--run-dir=a_b",
        "--log.eval-every-samples",
        "1_000",
        "x_y",
        "--",
        "-1",
        "--task-options.num-samples",
        "3",
    ]
    assert underscored(dashed(given))[0] == "--run_dir=a_b"


def test_dashes_and_underscores_are_the_same_option():
    """Every setting can be written both ways, and comes to the same."""
    one = parse(["--run-dir", "a-b_c", "--optimizer.learning-rate", "1e-3", "--task-options.num-samples", "3"])[0]
    other = parse(["--run_dir", "a-b_c", "--optimizer.learning_rate", "1e-3", "--task_options.num_samples", "3"])[0]
    assert one == other
    assert (one.run_dir, one.task_options) == ("a-b_c", {"num_samples": 3})


@pytest.mark.parametrize("text", ["1e5", "100k", "100K", "0.1M", "100_000", "100000", "1.0e5"])
def test_counts_are_read_as_people_write_them(text):
    """In both forms of an option."""
    assert parse(["--max-samples", text])[0].max_samples == 100_000
    assert parse([f"--max-samples={text}"])[0].max_samples == 100_000
    assert parse(["--noise.half-life-samples", text])[0].noise.half_life_samples == 100_000


@pytest.mark.parametrize("text", ["1.5", "1m", "k", "1e", "1 k", "1.2345k"])
def test_what_is_no_count_is_refused(text):
    """Half a sample, and a letter that may mean a thousandth."""
    code, _, stderr = outcome(["train", "--max-samples", text])
    assert code == 2
    assert "max_samples must be int" in stderr


def test_a_settings_file_takes_the_same_counts(tmp_path):
    """So that a value can be moved from the command line to the file."""
    path = tmp_path / "a.yaml"
    path.write_text("max_samples: 1e5\nglobal_batch_size: 1k\nlog: {eval_every_samples: 10k}\nrun_dir: 1k\n")
    config, _ = parse(["--config", str(path)])
    assert (config.max_samples, config.global_batch_size) == (100_000, 1000)
    assert config.log.eval_every_samples == 10_000
    assert config.run_dir == "1k"


def test_every_command_takes_both_spellings(tmp_path):
    """An option of each command with underscores is understood: the error is about its value, or the run."""
    for command, more in {
        "plan": ["--price_per_gpu_hour", "2"],
        "branch": ["--global_batch_sizes", "8"],
        "sweep": ["--global_batch_sizes", "x"],
        "report": ["--out", "a_b"],
        "export": ["--to", "a_b"],
    }.items():
        where = [] if command == "sweep" else [str(tmp_path / "no_run")]
        _, _, stderr = outcome([command, *where, *more])
        assert "unrecognized arguments" not in stderr, (command, stderr)
        assert "no option" not in stderr, (command, json.dumps(stderr))
