"""What a run is, known at its start: task, sizes, device, versions; shown in the first line and kept in `run.json`."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dptrain.tracking.row_text import compact
from dptrain.version import __version__

if TYPE_CHECKING:
    from dptrain.tracking.jsonl import Value


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """Facts of a run.

    Attributes:
        task: name.
        num_parameters: of the model.
        num_trained_parameters: those of them that get a gradient.
        gradient_bytes: of their gradients, in the types that they are in.
        num_samples: training samples.
        num_held_out: held-out samples; None without evaluation.
        world_size: replicas.
        device: type of the device, "cpu" or "cuda".
        device_name: its name, such as "NVIDIA H200"; None on the CPU.
        torch_version: of PyTorch.
        tokens_per_sample: of a language model's task; None for others.
        start_samples: position at which the run begins: where the run that it branches off from was, else 0; None where
            that is not known.
    """

    task: str
    num_parameters: int
    num_trained_parameters: int
    gradient_bytes: int
    num_samples: int
    num_held_out: int | None
    world_size: int
    device: str
    device_name: str | None
    torch_version: str
    tokens_per_sample: int | None = None
    start_samples: int | None = 0

    def line(self, *, run_dir: object) -> str:
        """Return the facts in a line, for the console."""
        held_out = "" if self.num_held_out is None else f", {self.num_held_out:,} held out"
        parts = (
            self.task,
            f"{compact(self.num_parameters, like=self.num_parameters)} parameters",
            f"{self.num_samples:,} samples{held_out}",
            f"{self.world_size} {self.device_name or self.device} replica{'s' if self.world_size > 1 else ''}",
            str(run_dir),
        )
        return " | ".join(parts)

    def record(self) -> dict[str, Value]:
        """Return the facts with the date and the machine, for `run.json`."""
        return {
            "started": f"{dt.datetime.now().astimezone():%Y-%m-%d %H:%M}",
            "dptrain_version": __version__,
            "torch_version": self.torch_version,
            "python_version": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "device_type": self.device,
            "device_name": self.device_name,
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained_parameters,
            "gradient_bytes": self.gradient_bytes,
            "num_samples": self.num_samples,
            "num_held_out": self.num_held_out,
            "tokens_per_sample": self.tokens_per_sample,
            "start_samples": self.start_samples,
        }
