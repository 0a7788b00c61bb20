"""Settings as YAML: read as written, by us and by others; what is refused is in tests/faults/input/test_f_input.py."""

from __future__ import annotations

import os
import threading

import pytest
import yaml

from dptrain.config.settings_file import build_config, nearest, read_settings, setting_names, settings_text, value_in
from dptrain.errors import ConfigError
from dptrain.train import OptimizerConfig, TrainConfig


def test_text_that_looks_like_something_else_is_quoted():
    """`1e3`, `no`, `010` and dates are text again in YAML 1.1 and in what is read here."""
    options = {text: text for text in ("1e3", "no", "010", "2026-01-01", "null", "1:30", ".5", "0o7", "")}
    options["ends"] = ["\x85", "a\u2028b", "a\n b\n", "\t", "\ufeff", "\x1b[2J"]
    config = TrainConfig(task_options=options, optimizer=OptimizerConfig(learning_rate=1e-7))
    assert yaml.safe_load(settings_text(config))["task_options"] == options
    assert value_in(settings_text(config))["task_options"] == options
    assert build_config(value_in(settings_text(config))) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e3", 1000.0),
        ("1E-3", 0.001),
        ("+1.5", 1.5),
        (".5", 0.5),
        ("1_000", 1000),
        ("-0", 0),
        ("~", None),
        ("", None),
        ("True", True),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("0x1f", "0x1f"),
        ("1:30", "1:30"),
        ("2026-01-01", "2026-01-01"),
        ("'1'", "1"),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_values_read_as_they_look(text, value):
    """The core of YAML 1.2, and nothing of what 1.1 adds."""
    found = value_in(text)
    assert (found, type(found)) == (value, type(value))


def test_a_pipe_is_read_once(tmp_path):
    """`--config <(…)` works: the file is not opened a second time."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text("seed: 3\n"))
    writer.start()
    assert read_settings(pipe) == {"seed": 3}
    writer.join()


def test_names_are_known_by_their_dots():
    """Each setting has one name; the nearest is found by the whole name or by its last part."""
    names = setting_names()
    assert len(names) == len(set(names))
    assert {"seed", "task_options", "optimizer.learning_rate", "log.project"} <= set(names)
    assert nearest("learning_rat", names) == "; did you mean optimizer.learning_rate?"
    assert nearest("xyzzy", names) == ""


def test_a_tree_with_a_wrong_value_is_refused():
    """Whatever it was read from."""
    with pytest.raises(ConfigError, match=r"control.min_gain must be float, got 'x'"):
        build_config({"control": {"min_gain": "x"}})


@pytest.mark.parametrize(
    "text",
    [
        "control.law: noise\ncontrol.min_gain: 2\n",
        "control:\n  law: noise\ncontrol.min_gain: 2\n",
        "control.min_gain: 2\ncontrol:\n  law: noise\n",
    ],
)
def test_dotted_names_are_those_of_errors_and_options(tmp_path, text):
    """`control.law` in a file is what `--control.law` is on the command line, beside the group or instead of it."""
    path = tmp_path / "run.yaml"
    path.write_text(f"task: digits\n{text}")
    assert read_settings(path) == {"task": "digits", "control": {"law": "noise", "min_gain": 2}}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("control.law: noise\ncontrol:\n  law: noise\n", "has control.law twice"),
        ("control:\n  law: noise\ncontrol.law: noise\n", "has control.law twice"),
        ("control: 3\ncontrol.law: noise\n", "control in .* must be a group of settings, got 3"),
        ("control.law: noise\ncontrol: 3\n", "control in .* must be a group of settings, got 3"),
        ("control.lav: noise\n", "there is no setting control.lav"),
        ("contol.law: noise\n", "there is no setting contol.law"),
        ("control.law.x: noise\n", "there is no setting control.law.x"),
        ("control.: noise\n", "there is no setting control."),
    ],
)
def test_dotted_names_that_mean_nothing_are_refused(tmp_path, text, words):
    """In one sentence."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_settings(path)


def test_what_an_earlier_version_left_open_is_passed_over_and_what_it_set_has_a_place(tmp_path):
    """A run folder of before goes on; a value that would be lost is refused with the setting that takes it now."""
    (tmp_path / "config.yaml").write_text("control: {law: noise, ratio: null, samples_per_step: null}\n")
    assert read_settings(tmp_path / "config.yaml") == {"control": {"law": "noise"}}
    (tmp_path / "config.yaml").write_text("control: {law: noise, ratio: 2}\n")
    with pytest.raises(ConfigError, match=r"no setting control\.ratio.*; it is control\.law_options\.ratio now"):
        read_settings(tmp_path / "config.yaml")
