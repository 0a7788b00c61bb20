"""The folder of a sweep: what it was asked for, its runs, its tables; how far it is, the runs alone say."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dptrain.config.settings_file import build_config, read_settings
from dptrain.config.train_config import TrainConfig
from dptrain.config.validation import leaves
from dptrain.errors import ConfigError
from dptrain.sweep import SweepRun, SweepSpec
from dptrain.tracking.run_folder import write_config

_CONFIG, _SPEC = "config.yaml", "sweep.json"
_PATIENCE_S = 10.0
"""The runs of a sweep that was killed a moment ago may still hold its locks."""

_BASE = ("base_batch_size", "base_learning_rate", "base_samples", "exponent")
"""What a sweep takes from its settings; what else it is asked for may grow."""


def saved_sweep(path: Path) -> tuple[TrainConfig, SweepSpec] | None:
    """Return the settings and the spec of the sweep that was begun in a folder; None where none was.

    Raises:
        ConfigError: where they are damaged.
    """
    spec = path / _SPEC
    if not spec.is_file():
        return None
    config = build_config(read_settings(path / _CONFIG))
    try:
        return config, SweepSpec(**json.loads(spec.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{spec} is damaged ({error}): choose another --out, or remove it") from error


class SweepFolder:
    """A sweep's folder, which one sweep at a time has.

    Args:
        path: the folder, made if it is not there.

    Raises:
        ConfigError: where it cannot be written, or another sweep has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            for folder in (self.runs, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(path / ".lock")
            self._lock.acquire(timeout=_PATIENCE_S)
        except OSError as error:
            if isinstance(error, Timeout):
                raise ConfigError(f"sweep folder {path} is in use by another sweep: choose another --out") from None
            raise ConfigError(f"cannot write to sweep folder {path}: {error.strerror or error}") from None

    def close(self) -> None:
        """Give the folder free."""
        self._lock.release()

    @property
    def config(self) -> Path:
        """Settings that all runs have in common."""
        return self.path / _CONFIG

    @property
    def runs(self) -> Path:
        """The run folders."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """What each run printed."""
        return self.path / "logs"

    def run_dir(self, run: SweepRun) -> Path:
        """Return the folder of a run."""
        return self.runs / run.name

    def log(self, run: SweepRun) -> Path:
        """Return the file that has what a run printed."""
        return self.logs / f"{run.name}.txt"

    def wait_for(self, run: SweepRun) -> None:
        """Wait until nobody trains in the folder of a run.

        Raises:
            ConfigError: where somebody still does after some seconds.
        """
        lock = self.run_dir(run) / ".lock"
        if not lock.exists():
            return
        try:
            with FileLock(lock).acquire(timeout=_PATIENCE_S):
                pass
        except Timeout:
            raise ConfigError(f"run folder {lock.parent} is in use: end what trains there first") from None

    def save(self, config: TrainConfig, spec: SweepSpec) -> None:
        """Write settings and spec.

        Raises:
            ConfigError: where a sweep of other settings was begun here.
        """
        saved = saved_sweep(self.path)
        if saved is not None:
            before = {**leaves(asdict(saved[0])), **{name: getattr(saved[1], name) for name in _BASE}}
            now = {**leaves(asdict(config)), **{name: getattr(spec, name) for name in _BASE}}
            differing = [
                f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
                for name in sorted(before.keys() | now.keys())
                if before.get(name) != now.get(name)
            ]
            if differing:
                raise ConfigError(
                    f"{self.path} holds a sweep of other settings ({'; '.join(differing)}): choose another --out"
                )
        write_config(self.config, config)
        self.write_json(self.path / _SPEC, asdict(spec))

    @staticmethod
    def write_json(path: Path, record: Mapping[str, Any]) -> None:
        """Write a record; replaces the file in one step."""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)
