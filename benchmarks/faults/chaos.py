"""A real run under fire: `dptrain train`, killed, stopped, resized and damaged by a seeded parent, then audited."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dptrain.checkpoint.store import load_newest
from dptrain.data import SampleStream, slots
from dptrain.tasks import Suggestion, Task
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import write_config
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig

NUM_SAMPLES = 997
SAMPLES_PER_EVENT = 1200
_LEDGER, _PACE_S = "DPTRAIN_BENCHMARK_LEDGER", "DPTRAIN_BENCHMARK_PACE_S"
_LONGEST_WAIT_S = 120.0
_BY_CLOCK = {"progress/wall_s", "throughput/samples_per_sec", "wall_s", "samples_per_s"}


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """Targets that are mostly noise, so that the batch grows; each sample carries its number."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self._features = torch.randn(NUM_SAMPLES, 8, generator=generator)
        self._targets = self._features[:, :1] + 2 * torch.randn(NUM_SAMPLES, 1, generator=generator)

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self._features[index], self._targets[index], index


def task() -> Task:
    """Build the task: a small network with dropout, which draws random numbers in every forward pass."""
    return Task(
        name="chaos",
        model=nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.1), nn.Tanh(), nn.Linear(32, 1)),
        train_data=Numbered(),
        loss=audited_loss,
        suggestion=Suggestion(
            learning_rate=0.01, global_batch_size=8, micro_batch_size=4, max_samples=10_000, eval_every_samples=5_000
        ),
    )


def audited_loss(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return the mean squared error, and write down which samples went into it."""
    features, targets, numbers = batch
    if model.training:
        if pace_s := float(os.environ[_PACE_S]):
            time.sleep(pace_s)
        name = f"{os.environ['DPTRAIN_ATTEMPT']}-{os.environ['RANK']}.jsonl"
        with (Path(os.environ[_LEDGER]) / name).open("a") as file:
            file.write(json.dumps(numbers.tolist()) + "\n")
    return torch.as_tensor((model(features) - targets).square().mean())


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happens to the run once it has come so far.

    Attributes:
        at_samples: how far.
        delay_s: after that, so that it meets any point of a step.
        action: "kill 0", "kill 1", "kill all", "kill launcher", or "stop" with a SIGTERM.
        world_size: number of replicas after it, where the run is started anew.
        damage: whether the newest checkpoint is damaged before the run is started anew.
    """

    at_samples: int
    delay_s: float
    action: str
    world_size: int = 2
    damage: bool = False


@dataclass(kw_only=True)
class Story:
    """What happened to a run.

    Attributes:
        kills: replicas or launchers killed, an event that kills all replicas counting as one.
        restarts: attempts that followed by themselves.
        recoveries_s: from a kill to the next reported step, where the run recovered by itself.
        stops_s: from a SIGTERM to the end of the launcher.
        passed_over: damaged checkpoints that a start has passed over.
    """

    kills: int = 0
    restarts: int = 0
    recoveries_s: list[float] = field(default_factory=list)
    stops_s: list[float] = field(default_factory=list)
    passed_over: int = 0


class Chaos:
    """One run in a folder of its own, its launches, and the ledgers of its replicas.

    Args:
        folder: for the run and the ledgers.
        num_events: from which the length of the run is calculated.
        pace_s: seconds that each forward pass takes longer.
        first_world_size: replicas that start it.
    """

    def __init__(self, folder: Path, *, num_events: int, pace_s: float = 0.002, first_world_size: int = 2) -> None:
        self.run_dir = folder / "run"
        self._folder = folder
        self._pace_s = pace_s
        self._world_size = first_world_size
        self._launches: list[tuple[Path, int]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.max_samples = SAMPLES_PER_EVENT * (num_events + 1)
        self.config = TrainConfig(
            task=f"{__file__}:task",
            run_dir=str(self.run_dir),
            device="cpu",
            max_samples=self.max_samples,
            layout_replicas=2,
            control=ControlConfig(law="noise", min_gain=0.0, largest=32),
            optimizer=OptimizerConfig(weight_decay=0.01),
            checkpoint=CheckpointConfig(every_samples=SAMPLES_PER_EVENT // 4),
            log=LogConfig(tracker="none", print_every_steps=1000),
        )

    # The run

    def survive(self, events: Sequence[Event]) -> Story:
        """Train to the end while the events happen."""
        story = Story()
        self._launch()
        for event in events:
            self._wait(partial(self._has_come_to, event.at_samples))
            time.sleep(event.delay_s)
            if event.action.startswith("kill") and event.action != "kill launcher":
                self._kill_replicas(event, story)
            else:
                self._end_launch(event, story)
        self._finish()
        story.restarts = sum(self._attempts(ledgers) - 1 for ledgers, _ in self._launches)
        return story

    def _launch(self) -> None:
        ledgers = self._folder / f"ledger-{len(self._launches)}"
        ledgers.mkdir(parents=True)
        settings = self._folder / "settings.yaml"
        write_config(settings, self.config)
        begins = not (self.run_dir / "config.yaml").exists()
        source = ["--config", str(settings)] if begins else ["--run_dir", str(self.run_dir), "--resume"]
        self._launches.append((ledgers, self._world_size))
        with (ledgers / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dptrain", "train", "--replicas", str(self._world_size), *source],
                env={**os.environ, _LEDGER: str(ledgers), _PACE_S: str(self._pace_s), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _kill_replicas(self, event: Event, story: Story) -> None:
        assert self._process is not None
        ledgers, _ = self._launches[-1]
        attempt = self._attempts(ledgers)
        replicas = sorted(psutil.Process(self._process.pid).children(), key=lambda child: child.create_time())
        which = event.action.removeprefix("kill ")
        killed_s = time.monotonic()
        for replica in replicas if which == "all" else [replicas[int(which) % len(replicas)]]:
            replica.kill()
        story.kills += 1
        self._wait((ledgers / f"{attempt}-0.jsonl").exists)
        size = self._size()
        self._wait(lambda: self._size() > size)
        story.recoveries_s.append(time.monotonic() - killed_s)

    def _end_launch(self, event: Event, story: Story) -> None:
        assert self._process is not None
        began_s = time.monotonic()
        self._process.send_signal(signal.SIGKILL if event.action == "kill launcher" else signal.SIGTERM)
        code = self._process.wait(timeout=_LONGEST_WAIT_S)
        if event.action == "kill launcher":
            story.kills += 1
        else:
            assert code == 75, self._log()
            story.stops_s.append(time.monotonic() - began_s)
        if event.damage:
            self._damage()
        self._world_size = event.world_size
        self._launch()
        if event.damage:
            self._wait(lambda: "passed over checkpoint" in self._log())
            story.passed_over += 1

    def _damage(self) -> None:
        """Flip one bit in the middle of the newest checkpoint."""
        path = max((self.run_dir / "checkpoints").glob("step-*")) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def _finish(self) -> None:
        assert self._process is not None
        code = self._process.wait(timeout=max(_LONGEST_WAIT_S, 0.1 * self.max_samples))
        assert code == 0, self._log()

    def _wait(self, is_so: Any) -> None:  # noqa: ANN401 - a condition
        assert self._process is not None
        deadline_s = time.monotonic() + _LONGEST_WAIT_S
        while not is_so():
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < deadline_s, self._log()
            time.sleep(0.005)

    def _log(self) -> str:
        return (self._launches[-1][0] / "log").read_text()

    def _has_come_to(self, samples: int) -> bool:
        return self._samples() >= samples

    def _size(self) -> int:
        return (self.run_dir / "metrics.jsonl").stat().st_size

    def _samples(self) -> int:
        """Return how far the run reports to be; cheap, for it is asked all the time."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return 0
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            found = re.findall(rb'"progress/samples": ?(\d+)', file.read())
        return int(found[-1]) if found else 0

    @staticmethod
    def _attempts(ledgers: Path) -> int:
        return len(list(ledgers.glob("*-0.jsonl")))

    # The audit

    def fingerprint(self) -> str:
        """Return a digest of everything that the run leaves, less all clock times."""
        saved = load_newest(self.run_dir / "checkpoints")
        assert saved is not None
        digest = hashlib.sha256()
        for name in ("model", "optimizer"):
            digest.update((saved.path / f"{name}.safetensors").read_bytes())
        state: dict[str, Any] = dict(saved.state)
        parts = [state["control"], state["meter"], self.windows(), read_rows(self.run_dir / "decisions.jsonl")]
        parts.append({key: value for key, value in state["progress"].items() if key not in _BY_CLOCK})
        digest.update(json.dumps(parts, default=str).encode())
        return digest.hexdigest()

    def windows(self) -> list[tuple[int, int, int, int]]:
        """Return (step, first position, batch, micro-batch) of each step that the run has reported."""
        rows: list[dict[str, Any]] = [r for r in read_rows(self.run_dir / "metrics.jsonl") if r["kind"] == "train"]
        return [
            (row["step"], row["progress/samples"] - row["batch/global"], row["batch/global"], row["batch/micro"])
            for row in rows
        ]

    def samples_lost_and_doubled(self) -> tuple[int, int]:
        """Count the samples of the run that no committed step has used, and those that several have.

        What replicas wrote down as they read is compared with what they should have read, attempt by attempt: an
        attempt committed the steps from its checkpoint to that from which the next one went on.
        """
        committed: Counter[tuple[int, int]] = Counter()
        starts = self._starts()
        for (ledgers, attempt, world_size, first), following in zip(starts, [*starts[1:], None], strict=True):
            last = self.windows()[-1][0] if following is None else following[3] - 1
            for rank in range(world_size):
                path = ledgers / f"{attempt}-{rank}.jsonl"
                lines = path.read_text().splitlines() if path.exists() else []
                read = [json.loads(line) for line in lines if line.endswith("]")]
                committed.update(self._committed(read, rank=rank, world_size=world_size, first=first, last=last))
        wanted = Counter(
            (position, int(index)) for position, index in enumerate(self._indices(np.arange(self.max_samples)))
        )
        return (wanted - committed).total(), (committed - wanted).total()

    def _starts(self) -> list[tuple[Path, int, int, int]]:
        """Return (ledgers, attempt, replicas, first step) of each attempt that took a step, in order."""
        found = []
        for ledgers, world_size in self._launches:
            log = (ledgers / "log").read_text()
            resumed = [int(step.replace(",", "")) for step in re.findall(r"resumed from step ([\d,]+)", log)]
            attempts = self._attempts(ledgers)
            firsts = [1] * (attempts - len(resumed)) + [step + 1 for step in resumed]
            found += [(ledgers, attempt, world_size, first) for attempt, first in enumerate(firsts)]
        return found

    def _committed(
        self, read: list[list[int]], *, rank: int, world_size: int, first: int, last: int
    ) -> list[tuple[int, int]]:
        """Return (position, sample) of what a rank has read in its committed steps, by where it should have been."""
        found: list[tuple[int, int]] = []
        micro_batches = iter(read[2:])  # two checks of the task come first
        for step, position, batch, micro in self.windows():
            if not first <= step <= last:
                continue
            layout = {"global_batch_size": batch, "micro_batch_size": micro, "world_size": world_size}
            for slot in slots(position=position, **layout, rank=rank):
                numbers = next(micro_batches, [])
                found += list(zip(range(slot.position, slot.position + slot.num_samples), numbers, strict=False))
        return found

    def _indices(self, positions: Any) -> Any:  # noqa: ANN401 - arrays
        return SampleStream(NUM_SAMPLES, seed=self.config.seed).indices(positions)


def random_kills(num_kills: int, *, seed: int) -> list[Event]:
    """Return kills spread over a run: one replica, the other, or both, at random moments."""
    seeded = random.Random(seed)  # noqa: S311 - repeatable, not secret
    return [
        Event(
            at_samples=int((number + 0.4 + 0.6 * seeded.random()) * SAMPLES_PER_EVENT),
            delay_s=0.03 * seeded.random(),
            action=seeded.choice(["kill 0", "kill 1", "kill all"]),
        )
        for number in range(num_kills)
    ]


def resizes(world_sizes: Sequence[int], *, seed: int) -> list[Event]:
    """Return what takes a run through several numbers of replicas: stops and kills, with damage now and then."""
    seeded = random.Random(seed)  # noqa: S311 - repeatable, not secret
    return [
        Event(
            at_samples=int((number + 0.4 + 0.6 * seeded.random()) * SAMPLES_PER_EVENT),
            delay_s=0.03 * seeded.random(),
            action="kill launcher" if number % 2 else "stop",
            world_size=world_size,
            damage=number % 2 == 0,
        )
        for number, world_size in enumerate(world_sizes)
    ]
