"""Section F of the faults: settings, tasks and samples that are wrong are reported in one sentence, before training."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

import pytest
import torch

from dptrain.cli.settings import parse
from dptrain.config.settings_file import LARGEST_BYTES, build_config, read_settings
from dptrain.data import MicroBatchLoader, SampleStream
from dptrain.errors import ConfigError, TaskError
from dptrain.runtime.startup_check import check_device
from dptrain.tasks import check_task
from dptrain.train import TrainConfig
from tests.tasks.made_tasks import small_task


def refusal(settings_file, *arguments):
    """Return the sentence with which settings are refused."""
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(settings_file), *arguments])
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def written(tmp_path):
    """Write a settings file."""

    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# F1, names of settings


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("batchsize: 3", "there is no setting batchsize"),
        ("global_batchsize: 3", "did you mean global_batch_size?"),
        ("optimizer: {lerning_rate: 3}", "no setting optimizer.lerning_rate"),
        ("lerning_rate: 3", "did you mean optimizer.learning_rate?"),
        ("resume: true", "there is no setting resume"),
        ("3: 4", "there is no setting 3"),
        ("<<: {seed: 3}", "there is no setting <<"),
    ],
)
def test_f1_unknown_names_are_refused_with_the_nearest_one(written, text, part):
    """A name that does not exist ends the command before a process is started."""
    assert part in refusal(written(text))


# F2, their types


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("max_samples: 64.5", "max_samples must be int or null, got 64.5"),
        ("max_samples: true", "max_samples must be int or null, got True"),
        ("seed: null", "seed must be int, got None"),
        ("seed:", "seed must be int, got None"),
        ("seed: [1]", "seed must be int, got [1]"),
        ("seed: 010", "seed must be int, got '010'"),
        ("seed: 0x10", "seed must be int, got '0x10'"),
        ("seed: 0o10", "seed must be int, got '0o10'"),
        ("seed: 1:30", "seed must be int, got '1:30'"),
        ("seed: 99999999999999999999", "seed must be int below 2⁶³, got 99999999999999999999"),
        ("control: {critical_ratio: much}", "control.critical_ratio must be float or null, got 'much'"),
        ("control: {critical_ratio: .nan}", "control.critical_ratio must be float or null and finite, got nan"),
        ("control: {critical_ratio: .inf}", "control.critical_ratio must be float or null and finite, got inf"),
        ("control: {critical_ratio: 1e999}", "control.critical_ratio must be float or null and finite, got inf"),
        ("noise: {half_life_samples: .inf}", "noise.half_life_samples must be float or null and finite, got inf"),
        ("noise: {groups: no}", "noise.groups must be bool or one of 'experts', 'local_blocks', got 'no'"),
        ("noise: {groups: 1}", "noise.groups must be bool or one of 'experts', 'local_blocks', got 1"),
        ("control: {law: newest}", "control.law must be one of 'goodput', 'noise', 'schedule', 'constant'"),
        ("control: {law: false}", "got False"),
        ("run_dir: 2026-01-01", None),
        ("run_dir: 7", "run_dir must be str or null, got 7"),
        ("task: [digits]", "task must be str, got ['digits']"),
        ("optimizer: 3", "optimizer in"),
        ("optimizer: null", "optimizer in"),
        ("task_options: [1]", "task_options must be dict, got [1]"),
        ("task_options: {x: {1: 2}}", "the names in task_options.x must be text, got 1"),
        ("task_options: {x: [.nan]}", "task_options.x.0 must be plain data"),
        ("precision: no", None),
        ("optimizer: {learning_rate: 1e-3}", None),
        ("max_samples: 1_000", None),
    ],
)
def test_f2_types_are_strict_and_yaml_has_no_traps(written, text, sentence):
    """A value of another type is refused by its dotted name and as it was read; `no` is text and 1e-3 a number."""
    if sentence is None:
        assert parse(["--config", str(written(text))])
    else:
        assert sentence in refusal(written(text))


def test_f2_the_traps_of_yaml_1_1_read_as_they_look(written):
    """`no` is no boolean, 1e-3 no text, 1_000 a thousand, a date no date."""
    text = "precision: no\nrun_dir: 2026-01-01\nmax_samples: 1_000\noptimizer: {learning_rate: 1e-3}\n"
    config = build_config(read_settings(written(text)))
    assert (config.precision, config.run_dir, config.max_samples) == ("no", "2026-01-01", 1000)
    assert config.optimizer.learning_rate == 0.001


# F4, their files


BOMB = "\n".join(["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]" for n in range(1, 30))])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "must hold names with values, such as `task: digits`, got nothing"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"seed: 1\x00", "is not YAML"),
        (b"#" * (LARGEST_BYTES + 1), "more than 1,048,576 bytes"),
        (BOMB.encode(), "an alias, *a0, in line 2"),
        (b"seed: 1\ntask: digits\nseed: 2\n", "has seed twice, again in line 3"),
        (b"control: {ratio: 1, ratio: 2}", "ratio twice"),
        (b"task_options: {a: {b: 1, b: 2}}", "b twice"),
        (b"seed: 1\n---\nseed: 2\n", "is not YAML in line 2"),
        (b"[" * 100_000, "without end"),
        (b"seed: " + b"9" * 5000, "thousands of digits"),
        (b"task_options: " + b"{a: " * 60 + b"1" + b"}" * 60, "groups deep"),
        (b"? [1]\n: 2\n", "is not YAML"),
        (b"!!set {a, b}", "a tag"),
    ],
)
def test_f4_files_that_are_no_settings_are_refused(written, content, part):
    """Empty, huge, binary, folded a billion times or ambiguous: one sentence, in the time that reading takes."""
    assert part in refusal(written(content))


def test_f4_a_file_without_end_is_read_up_to_a_limit():
    """/dev/zero is refused like a file that is too large."""
    assert "more than" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize(
    "call",
    ["!!python/object/apply:os.mkdir [MARKER]", "!!python/object/new:os.mkdir [MARKER]", "!!python/name:os.mkdir"],
)
@pytest.mark.parametrize("place", ["file", "option"])
def test_f4_a_tag_runs_nothing(written, tmp_path, call, place):
    """A tag that names code is refused in a file and is plain text on the command line; the code does not run."""
    marker = tmp_path / "ran"
    call = call.replace("MARKER", str(marker))
    if place == "file":
        assert "a tag" in refusal(written(f"task_options:\n  x: {call}\n"))
    else:
        assert parse(["--task_options.x", call])[0].task_options == {"x": call}
    assert not marker.exists()


# F5, where they come from


def test_f5_the_command_line_wins_over_files_and_the_environment_over_none(tmp_path, monkeypatch, capsys):
    """Files in their order, then the command line wherever it stands; --print_config shows what comes out."""
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    for name in ("DPTRAIN_TRAIN_SEED", "DPTRAIN_SEED", "SEED", "DPTRAIN TRAIN_SEED"):
        monkeypatch.setenv(name, "77")
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("seed: 1\nmax_samples: 1\ntask_options: {context: 1, width: 1}\ncontrol: {min_gain: 1}\n")
    second.write_text("max_samples: 2\ntask_options: {width: 2, model: 'true'}\ncontrol: {critical_ratio: 2}\n")
    asked = ["--max_samples", "3", "--config", str(first), f"--config={second}", "--task_options.heads", "4"]
    config, _ = parse(asked)
    assert (config.seed, config.max_samples, config.control.min_gain, config.control.critical_ratio) == (1, 3, 1, 2)
    assert config.task_options == {"context": 1, "width": 2, "model": "true", "heads": 4}
    assert parse([])[0] == TrainConfig()
    with pytest.raises(SystemExit) as ended:
        parse([*asked, "--print_config"])
    assert ended.value.code == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert build_config(read_settings(shown)) == config


# F9, devices


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_here", "part"),
    [
        ("cuda", 0, 1, "device is cuda, but torch finds no GPU: use device=auto or device=cpu"),
        ("auto", 2, 4, "there are 4 replicas on this node, but 2 GPUs"),
        ("cuda", 2, 4, "there are 4 replicas on this node, but 2 GPUs"),
        ("auto", 0, 4, None),
        ("cpu", 2, 4, None),
        ("auto", 4, 4, None),
    ],
)
def test_f9_gpus_that_are_not_there_are_refused(monkeypatch, device, num_gpus, num_here, part):
    """Only `auto` goes to the CPU by itself, and only where there is no GPU at all."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_here))
    if part is None:
        assert check_device(TrainConfig(device=device)) is None
    else:
        with pytest.raises(ConfigError, match=re.escape(part)):
            check_device(TrainConfig(device=device))


# F7, what a loss returns


@pytest.mark.parametrize(
    ("loss", "part"),
    [
        (lambda model, batch: (model(batch).mean(), 1), "must return a scalar tensor, got tuple"),
        (lambda *_: None, "must return a scalar tensor, got NoneType"),
        (lambda *_: 3, "must return a scalar tensor, got int"),
        (lambda model, batch: {"mean": model(batch).mean()}, "returned 'mean', and no part named 'loss'"),
        (lambda model, batch: model(batch), "got shape (2, 1)"),
        (lambda model, batch: model(batch).mean().detach(), "returned no graph"),
        (lambda model, batch: model(batch).mean().to("meta"), "is on device meta, and its model on cpu"),
    ],
)
def test_f7_a_loss_that_cannot_train_is_refused_before_the_first_step(loss, part):
    """What it returned is named; two samples are looked at once, and no step is taken for it."""
    calls = []

    def counted(model, batch):
        calls.append(len(batch))
        return loss(model, batch)

    with pytest.raises(TaskError) as caught:
        check_task(small_task(loss=counted))
    assert part in str(caught.value)
    assert calls == [2]


# F8, what a data set returns


class Samples:
    """Eight samples, of which some are not like the others."""

    def __init__(self, bad):
        self.bad = bad

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.bad.get(index, lambda: torch.ones(2))()


def unreadable():
    raise OSError("disk\x1b[31m gone")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({5: unreadable}, ["OSError", "while reading sample 5 "]),
        ({5: lambda: torch.ones(3)}, ["samples", " 5", "micro-batch"]),
    ],
)
def test_f8_a_later_sample_that_is_no_sample_is_named(bad, words, num_workers):
    """The error of the data set comes out, of a worker too, with the numbers of the samples that it is about."""
    stream = SampleStream(8, seed=0)
    with MicroBatchLoader(Samples(bad), stream=stream, rank=0, world_size=1, num_workers=num_workers) as loader:
        with pytest.raises((OSError, RuntimeError)) as caught:
            list(loader.window(position=0, global_batch_size=8, micro_batch_size=4))
        reported = "".join(traceback.format_exception(caught.value))
    assert all(report in reported for report in words)


@pytest.mark.parametrize(
    ("bad", "part"),
    [
        ({1: unreadable}, "sample 1 of the training data of task 'small' cannot be read: OSError: disk"),
        ({1: lambda: torch.ones(3)}, "the first two training samples of task 'small' do not make a micro-batch"),
        ({1: lambda: torch.ones(2, dtype=torch.int64), 0: lambda: None}, "do not make a micro-batch"),
    ],
)
def test_f8_a_first_sample_that_is_no_sample_is_named(bad, part):
    """What the first samples lack is said with their number, before training."""
    with pytest.raises(TaskError) as caught:
        check_task(small_task(train_data=Samples(bad)))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
