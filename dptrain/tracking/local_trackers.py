"""Trackers that need no account: tensorboard, trackio and mlflow, by accelerate's classes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from dptrain.tracking.jsonl import Value

_CLASSES = {"tensorboard": "TensorBoardTracker", "trackio": "TrackioTracker", "mlflow": "MLflowTracker"}


def accelerate_tracker(name: str) -> type[Any]:
    """Return a class of accelerate's trackers that works on whatever process uses it.

    They look for the main process in a state that only an `Accelerator` would have made.
    """
    import torch
    from accelerate import PartialState, tracking

    if not PartialState._shared_state:  # noqa: SLF001 - accelerate's own test for it
        PartialState(cpu=not torch.cuda.is_available())
    return type(name, (getattr(tracking, name),), {"main_process_only": False})


class LocalSink:
    """Feeds one tracker; for `BackgroundTracker`, which calls it on a thread of its own.

    Args:
        name: tensorboard, trackio or mlflow.
        project: project, or experiment.
        run_name: name of the run there.
        run_dir: folder of the run; tensorboard's and mlflow's files go below it.
        config: settings to show beside the run, without secrets.
    """

    def __init__(self, name: str, *, project: str, run_name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._name = name
        self._project = project
        self._run_name = run_name
        self._run_dir = run_dir
        self._config = config
        self._tracker: Any = None

    def start(self, *, notify: Callable[[str], None]) -> None:
        """Make the tracker and write the settings."""
        folder = self._run_dir / self._name
        made = accelerate_tracker(_CLASSES[self._name])
        try:
            if self._name == "tensorboard":
                self._tracker = made(self._run_name, logging_dir=str(folder))
            elif self._name == "trackio":
                self._tracker = made(self._project, name=self._run_name)
            else:
                self._tracker = made(self._project, logging_dir=str(folder), run_name=self._run_name)
            self._tracker.start()
        except ImportError as error:
            raise RuntimeError(f"it is not installed: pip install {self._name} ({error})") from error
        self._tracker.store_init_configuration(dict(_flat(self._config)))
        if self._name == "tensorboard":
            notify(f"tensorboard shows this run with: tensorboard --logdir {folder}")

    def log(self, values: Mapping[str, Value]) -> None:
        """Record the numbers of a row at its step."""
        step = int(values.get("progress/step") or 0)
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        self._tracker.log(numbers, step=step)

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Record the figures of the whole run and close."""
        numbers = {f"summary/{key}": value for key, value in summary.items() if isinstance(value, (int, float))}
        if numbers:
            self._tracker.log(numbers, step=int(summary.get("steps") or 0))
        self._tracker.finish()

    def release(self) -> None:
        """Do nothing: nothing outlives `finish`."""

    def abandon(self) -> None:
        """Do nothing: no process of its own keeps this one from ending."""


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return nested settings as dotted names and plain values, which is all that these trackers take."""
    found: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, (int, float, str)) else str(value)))
    return found
