"""The run folder: who may have it, and that its settings come back as they were."""

from __future__ import annotations

import os
import stat
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from dptrain.cli.settings import parse
from dptrain.config.train_config import EarlyStoppingConfig
from dptrain.errors import ConfigError
from dptrain.exchange.settings import ExchangeConfig
from dptrain.models.settings import DistillationConfig, ModelConfig, SparsityConfig
from dptrain.tracking.run_folder import (
    RunFolder,
    check_not_in_use,
    default_run_dir,
    holds_run,
    launch_of,
    newest_step,
    write_config,
)
from dptrain.train import (
    CheckpointConfig,
    ControlConfig,
    ExecutionConfig,
    LogConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)


def begin_run(path):
    folder = RunFolder(path, resume=False)
    write_config(folder.config, TrainConfig())
    folder.close()


def test_a_new_folder_is_made_with_its_parents(tmp_path):
    """Nothing but the lock is in it, and who has it; nobody else may look into it."""
    folder = RunFolder(tmp_path / "a" / "b", resume=False)
    assert {path.name for path in folder.path.iterdir()} == {".lock", ".holder"}
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    folder.close()
    assert {path.name for path in folder.path.iterdir()} <= {".lock"}


def test_an_empty_folder_may_be_used(tmp_path):
    """A folder that a scheduler made, or that a run left before it began, is no obstacle."""
    RunFolder(tmp_path, resume=False).close()
    RunFolder(tmp_path, resume=False).close()
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")], "nothing but who had the lock"


def test_a_run_is_not_begun_on_top_of_another(tmp_path):
    """It says how to go on with the old one."""
    begin_run(tmp_path)
    with pytest.raises(ConfigError, match="already holds a run: add --resume"):
        RunFolder(tmp_path, resume=False)
    RunFolder(tmp_path, resume=True).close()


def test_what_is_not_there_is_not_resumed(tmp_path):
    """A misspelt folder does not become a new run."""
    with pytest.raises(ConfigError, match="there is no run to resume"):
        RunFolder(tmp_path / "misspelt", resume=True)
    assert not (tmp_path / "misspelt").exists()


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/dptrain"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, place):
    """In a sentence that names it."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=str(tmp_path / place)):
        RunFolder(tmp_path / place, resume=False)


@pytest.mark.parametrize("name", ["a\0b", "n" * 300])
@pytest.mark.parametrize("resume", [False, True])
def test_a_name_that_no_folder_can_have_is_refused(tmp_path, name, resume):
    """In a sentence too; whether there is a checkpoint in it can be asked all the same."""
    with pytest.raises(ConfigError, match="cannot be") as caught:
        RunFolder(tmp_path / name, resume=resume)
    assert "\0" not in str(caught.value)
    assert newest_step(tmp_path / name) == 0


def test_a_run_and_its_newest_checkpoint_are_found_by_name(tmp_path):
    """What is being written, or was set aside, is no checkpoint; a run without a checkpoint is a run."""
    assert (holds_run(tmp_path), newest_step(tmp_path)) == (False, 0)
    begin_run(tmp_path)
    assert (holds_run(tmp_path), newest_step(tmp_path)) == (True, 0)
    for name in ("step-000000000007", "step-000000000012", ".tmp-step-000000000020", ".bad-000000000030-aa", "step-9"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


def test_two_processes_do_not_share_a_folder(tmp_path):
    """While one has it, another is refused; afterwards it is free."""
    begin_run(tmp_path)
    other = FileLock(tmp_path / ".lock")
    with other, pytest.raises(ConfigError, match="in use by another process"):  # which has not signed
        RunFolder(tmp_path, resume=True)
    folder = RunFolder(tmp_path, resume=True)
    folder.close()
    with other.acquire(timeout=0):
        pass


EVERYTHING_ELSE = TrainConfig(
    task="some/file.py:function",
    task_options={"width": 3, "names": ["a", "ä"], "nested": {"x": None}},
    run_dir="runs/ö: x",
    branch_from="runs/other/checkpoints/step-000000000007",
    seed=7,
    max_samples=12,
    max_steps=3,
    global_batch_size=4,
    micro_batch_size=2,
    layout_replicas=2,
    replica_check_every_steps=7,
    device="cpu",
    precision="bf16",
    execution=ExecutionConfig(compile="blocks", wrapper="hsdp", shard_size=2),
    num_workers=1,
    find_unused_parameters=True,
    model=ModelConfig(freeze="head.*"),
    distillation=DistillationConfig(teacher="runs/teacher", temperature=3.0),
    early_stopping=EarlyStoppingConfig(patience=3, figure="accuracy", higher_is_better=True),
    control=ControlConfig(mode="advise", law="schedule", schedule="0:4 8:2", min_gain=0.1),
    noise=NoiseConfig(observer="hook", half_life_samples=1e9, level=0.5),
    optimizer=OptimizerConfig(name="sgd", learning_rate=1e-5, max_grad_norm=None, schedule="linear"),
    checkpoint=CheckpointConfig(every_samples=3, keep=1),
    log=LogConfig(tracker="none", project="no"),
)


IN_TOKENS = TrainConfig(
    model=ModelConfig(quantize="fp8", rounding="stochastic_gradients", unquantized="output"),
    sparsity=SparsityConfig(method="rigl", sparsity=0.75),
    exchange=ExchangeConfig(kind="compressed", codec="int8"),
    max_tokens=4096,
    global_batch_tokens=512,
    control=ControlConfig(law="schedule", schedule_tokens="0:512 2048:1024", smallest_tokens=512, largest_tokens=2048),
    optimizer=OptimizerConfig(reference_batch_tokens=512, warmup_tokens=0),
    checkpoint=CheckpointConfig(every_tokens=1024),
    log=LogConfig(eval_every_tokens=1024),
)


@pytest.mark.parametrize("config", [TrainConfig(), EVERYTHING_ELSE, IN_TOKENS])
def test_settings_come_back_through_the_command_line(tmp_path, config):
    """A run's config.yaml is a --config."""
    path = tmp_path / "config.yaml"
    write_config(path, config)
    assert parse(["--config", str(path)])[0] == config
    assert list(tmp_path.iterdir()) == [path]


def test_no_setting_is_left_out_of_the_example():
    """Together the examples differ from the defaults in every group, so that the round trip means something."""
    default, *others = asdict(TrainConfig()), asdict(EVERYTHING_ELSE), asdict(IN_TOKENS)
    assert all(any(default[name] != other[name] for other in others) for name in default)


def test_the_default_folder_is_named_after_task_and_time():
    """Of a task file, after the file."""
    assert default_run_dir("digits").startswith(str(Path("runs") / "digits-"))
    assert default_run_dir("some/where/mine.py:build").startswith(str(Path("runs") / "mine-"))


def test_files_of_a_run_are_private_in_a_folder_that_others_may_read(tmp_path):
    """A folder that is there already keeps its mode; what the run writes in it is its owner's alone."""
    tmp_path.chmod(0o755)
    folder = RunFolder(tmp_path, resume=False, launch=[1, 2])
    try:
        write_config(folder.config, TrainConfig())
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    finally:
        folder.close()
    assert set(modes) == {".lock", ".holder", ".launch", "config.yaml"}
    assert set(modes.values()) == {0o600}


def test_a_folder_keeps_the_marks_of_its_latest_launch(tmp_path):
    """They are there for the next attempt, also after the folder was given free; what is no mark counts as none."""
    assert launch_of(tmp_path) == []
    RunFolder(tmp_path, resume=False, launch=[5, 7]).close()
    assert launch_of(tmp_path) == [5, 7]
    for text in ("", "{}", "no", '["a", 1.5]'):
        (tmp_path / ".launch").write_text(text)
        assert launch_of(tmp_path) == []


def test_a_run_that_another_process_trains_is_not_read(tmp_path):
    """Refused by the name of who has it, before anything is loaded; free again when that has ended."""
    (tmp_path / "config.yaml").touch()
    folder = RunFolder(tmp_path, resume=True)
    with pytest.raises(ConfigError, match=f"is in use by process {os.getpid()} on "):
        check_not_in_use(tmp_path)
    folder.close()
    check_not_in_use(tmp_path)
