"""The folder of a run: made, locked and checked before anything is trained; its files are filled elsewhere."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import re
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from dptrain.checkpoint.permissions import warn_if_exposed
from dptrain.config.settings_file import settings_text
from dptrain.config.train_config import TrainConfig
from dptrain.errors import ConfigError

_LONGEST_NAME = 64  # of a task in the name of a folder
_LAUNCH = ".launch"
_SIGNATURE = ".holder"
_LONGEST_SHOWN = 200  # characters of a name that cannot be one


def default_run_dir(task: str) -> str:
    """Return runs/TASK-DATE-TIME; of a task file, its stem."""
    stem = Path(task.rpartition(":")[0] or task).stem
    name = re.sub(r"[^\w.-]+", "_", stem).lstrip("._-")[:_LONGEST_NAME] or "task"
    return str(Path("runs") / f"{name}-{dt.datetime.now().astimezone():%Y%m%d-%H%M%S}")


class RunFolder:
    """A run folder that this process owns until it is closed.

    Args:
        path: the folder.
        resume: whether it is expected to hold a run.
        launch: what tells the launch of this run from others, for its next attempt, which asks `launch_of`.

    Raises:
        ConfigError: where it holds a run and none is to be resumed, cannot be written, or is in use.
    """

    def __init__(self, path: Path, *, resume: bool, launch: Sequence[int] = ()) -> None:
        self.path = path
        held = _held(path)
        if held and not resume:
            raise ConfigError(
                f"run folder {path} already holds a run: add --resume to continue it, or choose another --run-dir"
            )
        if resume and not held:
            raise ConfigError(f"there is no run to resume in {path}: check --run-dir, or omit --resume")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=0o700, exist_ok=True)  # what is in it is then its owner's alone, whatever its own mode
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise ConfigError(f"cannot write to run folder {path}: {error.strerror or error}") from error
        self._lock = FileLock(path / ".lock", mode=0o600)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ConfigError(_in_use(path)) from None
        self._sign()
        if launch:
            write_private(path / _LAUNCH, json.dumps(list(launch)))
        warn_if_exposed(path)

    def _sign(self) -> None:
        """Write who has the lock, for the error of another process: asking for a lock empties the lock's own file."""
        signature = {
            "pid": os.getpid(),
            "host": platform.node(),
            "since": f"{dt.datetime.now().astimezone():%Y-%m-%d %H:%M:%S}",
        }
        write_private(self._signature, json.dumps(signature))

    @property
    def _signature(self) -> Path:
        return self.path / _SIGNATURE

    @property
    def metrics(self) -> Path:
        """One row for each logged step and each evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def decisions(self) -> Path:
        """One row for each change of the batch."""
        return self.path / "decisions.jsonl"

    @property
    def config(self) -> Path:
        """The settings, filled in."""
        return self.path / "config.yaml"

    @property
    def facts(self) -> Path:
        """Date, versions, device and sizes, written at the start."""
        return self.path / "run.json"

    @property
    def summary(self) -> Path:
        """The figures of the whole run, written at its end."""
        return self.path / "summary.json"

    def close(self) -> None:
        """Give the folder free."""
        self._signature.unlink(missing_ok=True)
        self._lock.release()


def was_removed(path: Path) -> bool:
    """Whether a folder has nothing of the run that was begun in it: it was deleted, emptied or moved."""
    return not any((path / name).exists() for name in ("metrics.jsonl", "run.json", "config.yaml"))


def check_not_in_use(path: Path) -> None:
    """Refuse a run folder that another process trains in, before anything in it is read: it changes all the time.

    Raises:
        ConfigError: naming the process that has it.
    """
    if not holds_run(path):
        return  # opening it reports that
    lock = FileLock(path / ".lock", mode=0o600)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(_in_use(path)) from None
    except OSError:
        return  # it cannot be written: opening it reports that
    lock.release()


def _in_use(path: Path) -> str:
    return f"run folder {path} is in use by {_holder(path)}: wait until that has ended, or choose another --run-dir"


def _holder(path: Path) -> str:
    try:
        found = json.loads((path / _SIGNATURE).read_text(encoding="utf-8"))
        return f"process {found['pid']} on {found['host']} since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has the lock and has not signed yet
        return "another process"


def checkpoints_in(run_dir: Path) -> Path:
    """Return where a run's checkpoints are."""
    return run_dir / "checkpoints"


def _held(path: Path) -> bool:
    """Whether a run was begun in a folder of this name, which must be one that a folder can have."""
    try:
        is_file = not stat.S_ISDIR(path.stat().st_mode)
        held = not is_file and holds_run(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # a name with a NUL in it is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"run folder {str(path)[:_LONGEST_SHOWN]!r} cannot be: {reason}") from None
    if is_file:
        raise ConfigError(f"run folder {path} is a file: choose another --run-dir")
    return held


def holds_run(run_dir: Path) -> bool:
    """Whether a run was begun in this folder, so that there is one to go on with."""
    return (run_dir / "metrics.jsonl").exists() or (run_dir / "config.yaml").exists()


def newest_step(run_dir: Path) -> int:
    """Return the step of the newest checkpoint by its name alone, whether or not it can be trusted; 0 without one."""
    try:
        names = [path.name for path in checkpoints_in(run_dir).iterdir()]
    except (OSError, ValueError):  # the error follows when the folder is made
        return 0
    return max((int(found[1]) for name in names if (found := re.fullmatch(r"step-([0-9]{12,})", name))), default=0)


def launch_of(run_dir: Path) -> list[int]:
    """Return what the latest launch that trained in a folder has left there; empty where there is nothing of it."""
    try:
        found = json.loads((run_dir / _LAUNCH).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [mark for mark in found if type(mark) is int] if isinstance(found, list) else []


def write_config(path: Path, config: TrainConfig) -> None:
    """Write settings so that `--config` reads them back; replaces the file in one step."""
    write_private(path, settings_text(config))


def write_private(path: Path, text: str) -> None:
    """Write a file that its owner alone can read, whatever the mode of its folder; replaces it in one step."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o600)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
