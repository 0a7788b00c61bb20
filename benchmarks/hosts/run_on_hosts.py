"""One run on three hosts, what can happen to it, and its audit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts import counted_task
from benchmarks.hosts.counted_task import LEARNING_RATE, NUM_SAMPLES, SHIFT
from benchmarks.hosts.namespaces import Host, Network
from dptrain.checkpoint.store import load_newest
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import newest_step, write_config
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig

_LONGEST_WAIT_S = 300.0
_LATE_STEPS = 2  # that may be in the log after a link is cut: the outcome of a step is read during a later one


class Run:
    """One run on three hosts, and what can happen to it. An event returns what was wrong with it, or nothing."""

    def __init__(self, net: Network, folder: Path, draw: random.Random) -> None:
        self.hosts, self._folder, self._draw = net.hosts, folder, draw
        self.disk = folder / "disk"
        self.run_dir = self.disk / "run"
        self.config = TrainConfig(
            task=f"{counted_task.__file__}:task",
            run_dir=str(self.run_dir),
            device="cpu",
            layout_replicas=3,
            control=ControlConfig(law="schedule", schedule="0:12 1000:27 4000:63 60000:27"),
            optimizer=OptimizerConfig(
                name="sgd",
                beta1=0.0,
                weight_decay=0.0,
                max_grad_norm=None,
                schedule="constant",
                warmup_samples=0,
                rule="none",
            ),
            checkpoint=CheckpointConfig(every_samples=120),
            log=LogConfig(tracker="none", print_every_steps=100_000),
        )

    def start(self, *hosts: Host, resume: bool = False) -> None:
        """Start torchrun on some hosts."""
        settings = self._folder / "settings.yaml"
        write_config(settings, self.config)
        for host in hosts:
            more = ["--resume"] if resume else []
            host.start("--config", settings, *more, nnodes="1:3", max_restarts=1000, DPTRAIN_COLLECTIVE_TIMEOUT_S=8)

    def step(self) -> int:
        """Return the last step that the log has."""
        return int(self._last("step") or 0)

    def replicas(self) -> int:
        """Return how many replicas took that step."""
        return int(self._last("time/world_size") or 0)

    def _last(self, key: str) -> Any:  # noqa: ANN401 - whatever a row holds
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return None
        for line in reversed(path.read_bytes()[-4000:].splitlines()):
            try:
                return json.loads(line)[key]
            except (ValueError, KeyError, TypeError):
                continue
        return None

    def text(self) -> str:
        """Return what was printed on all hosts."""
        return "".join(host.text() for host in self.hosts)

    def mark(self) -> list[int]:
        """Return how much has been printed on each host by now."""
        return [len(host.text()) for host in self.hosts]

    def since(self, mark: list[int]) -> str:
        """Return what was printed since then."""
        return "".join(host.text()[length:] for host, length in zip(self.hosts, mark, strict=True))

    def recovered(self, *, since_s: float, before: list[int]) -> float:
        """Wait until all three replicas train again after a new attempt has resumed; return the seconds since an event.

        A step of the log alone does not say so: some are taken between the look at the log and the event.
        """
        wait(lambda: self._trains_beyond(self._resumed(before)), what="three replicas that resumed", run=self)
        return time.monotonic() - since_s

    def _resumed(self, before: list[int]) -> int | None:
        """Return the step that the newest attempt has resumed from; None where there has been none since a mark."""
        steps = re.findall(r"resumed from step ([0-9,]+)", self.since(before))
        return int(steps[-1].replace(",", "")) if steps else None

    def _trains_beyond(self, step: int | None) -> bool:
        return step is not None and self.replicas() == 3 and self.step() > step

    # Events

    def kill_host(self) -> tuple[str, float | None]:
        """Kill all processes of a host, and start it again."""
        host, since_s, before = self._victim(), time.monotonic(), self.mark()
        name = rank_and_host(host)
        host.kill()
        time.sleep(3 * self._draw.random())
        self.start(host)
        took_s = self.recovered(since_s=since_s, before=before)
        return self._lost(name, before), took_s

    def kill_replica(self) -> tuple[str, float | None]:
        """Kill the replica of any host; its agent stays."""
        host, since_s, before = self._draw.choice(self.hosts), time.monotonic(), self.mark()
        name = rank_and_host(host)
        host.signal_replicas(signal.SIGKILL)
        took_s = self.recovered(since_s=since_s, before=before)
        # Where the agent there starts it again at once, the other agents end their replicas before these can ask.
        by_agent = "exitcode: -9" in host.text()[before[host.number] :]
        return _unless(by_agent, "its agent has not named it") or _other_named(name, self.since(before)), took_s

    def freeze(self) -> tuple[str, float | None]:
        """Freeze a replica for longer than its peers wait, then start its host again."""
        host, since_s, before = self._victim(), time.monotonic(), self.mark()
        name = rank_and_host(host)
        host.signal_replicas(signal.SIGSTOP)
        wait(lambda: "of 3 did not answer" in self.since(before), what="named", run=self)
        host.kill()  # as a health check of the scheduler does
        self.start(host)
        took_s = self.recovered(since_s=since_s, before=before)
        return self._lost(name, before), took_s

    def leave(self) -> tuple[str, float | None]:
        """Ask a host to stop, go on with two, and let it join again."""
        host, since_s, before = self._victim(), time.monotonic(), self.mark()
        host.leave()
        wait(lambda: self.replicas() == 2, what="two replicas", run=self)
        took_s = time.monotonic() - since_s
        host.wait(60)
        resumed_with_two, before_joining = "resumed from step" in self.since(before), self.mark()
        self.start(host)
        self.recovered(since_s=since_s, before=before_joining)
        return _unless(resumed_with_two, "not resumed"), took_s

    def cut_link(self) -> tuple[str, float | None]:
        """Cut a host's link for a few seconds, less than its peers wait."""
        host, since_s, before = self._victim(), time.monotonic(), self.mark()
        host.cut()
        time.sleep(1 + 3 * self._draw.random())
        step = self.step() + _LATE_STEPS
        host.join()
        wait(lambda: self._trains_beyond(step), what=f"three replicas beyond step {step}", run=self)
        took_s = time.monotonic() - since_s
        gone_on = self._resumed(before) is None and "did not answer" not in self.since(before)
        return _unless(gone_on, "ended by a short cut"), took_s

    def fill_disk(self) -> tuple[str, float | None]:
        """Leave no room for a checkpoint until one has failed, then make room."""
        before = self.mark()
        filler = self.disk / "filler"
        free_bytes = os.statvfs(self.disk)
        with filler.open("wb") as file:
            file.write(bytes(max(0, free_bytes.f_bavail * free_bytes.f_bsize - (64 << 10))))
        wait(lambda: "could not be written" in self.since(before), what="a failed save", run=self)
        saved, since_s = newest_step(self.run_dir), time.monotonic()
        filler.unlink()
        wait(lambda: newest_step(self.run_dir) > saved, what="a checkpoint", run=self)
        took_s = time.monotonic() - since_s
        return _unless(self._resumed(before) is None, "ended by a full disk"), took_s

    def damage_log(self) -> tuple[str, float | None]:
        """Stop the run, damage its log, and go on."""
        self._stop()
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        middle = self._draw.randrange(1, len(lines))
        kind = self._draw.choice(["shorter", "garbled", "twice"])
        damaged = {
            "shorter": lines[: max(1, len(lines) - 5)],
            "garbled": [*lines[:middle], b"\x00\x00{\n", *lines[middle:]],
            "twice": [*lines[:middle], *lines[max(0, middle - 3) :]],
        }[kind]
        path.write_bytes(b"".join(damaged))
        took_s, before = self._go_on()
        return _unless(self.since(before).count("the log is damaged") == 1, f"{kind}: not reported once"), took_s

    def change_data(self) -> tuple[str, float | None]:
        """Stop the run, try to go on with other data, and go on with its own."""
        self._stop()
        before = self.mark()
        settings = self._folder / "settings.yaml"
        for host in self.hosts:
            shifted: dict[str, Any] = {SHIFT: 1.0}
            host.start("--config", settings, "--resume", nnodes="3", max_restarts=0, **shifted)
        codes = [host.wait(120) for host in self.hosts]
        printed = self.since(before)
        refused = all(codes) and "the data set is another one" in printed and "exitcode: 2)" in printed
        return _unless(refused, "not refused, or not by exit code 2"), self._go_on()[0]

    def stop(self) -> tuple[str, float | None]:
        """Stop the run on all hosts, and go on."""
        before = self.mark()
        step = self._stop()
        is_reported = f"stopped on request after step {step:,}" in self.since(before)
        return _unless(is_reported, "the end was not reported, or its step was not saved"), self._go_on()[0]

    def _lost(self, name: str, before: list[int]) -> str:
        """Return what the others did not say about a replica that has gone: its name, and an exit code of their own."""
        printed = self.since(before)
        if f"{name} of 3 did not answer" not in printed:
            return "not named"
        return _other_named(name, printed) or _unless("exitcode: 70)" in printed, "no exit code 70")

    def _stop(self) -> int:
        """Stop all hosts; return the step that is saved."""
        for host in self.hosts:
            host.leave()
        for host in self.hosts:
            host.wait(90)
        return newest_step(self.run_dir)

    def _go_on(self) -> tuple[float, list[int]]:
        since_s, before = time.monotonic(), self.mark()
        self.start(*self.hosts, resume=True)
        return self.recovered(since_s=since_s, before=before), before

    def _victim(self) -> Host:
        return self._draw.choice(self.hosts[1:])  # the store of the agents is on the first: torchrun cannot lose that

    # The audit

    def samples_lost_and_doubled(self) -> tuple[int, int]:
        """Read from the newest checkpoint how often each sample up to its position was trained."""
        saved = load_newest(self.run_dir / "checkpoints")
        assert saved is not None
        progress: Any = saved.state["progress"]
        position = int(progress["position"])
        batches = torch.zeros(position)
        for row in read_rows(self.run_dir / "metrics.jsonl"):
            end, batch = int(row["progress/samples"] or 0), int(row["batch/global"] or 0)
            batches[end - batch : end] = batch
        # Rows that damage has cost are not where the batch changes, which it does three times in all.
        for index in torch.nonzero(batches == 0).flatten().tolist():
            batches[index] = batches[index - 1]
        order = _order(position)
        moved = saved.tensors("model")["count"][order] * batches / LEARNING_RATE
        return int((moved < 0.5).sum()), int((moved > 1.5).sum())


def _order(position: int) -> Tensor:
    from dptrain.data import SampleStream

    return torch.from_numpy(SampleStream(NUM_SAMPLES, seed=0).indices(torch.arange(position).numpy()))


def rank_and_host(host: Host) -> str:
    """Return how a message names the replica that trains on a host now."""
    return f"rank {host.replicas()[0].environ()['RANK']} on host{host.number}"


def _other_named(name: str, printed: str) -> str:
    """Return which replica was blamed in the place of the one that has gone."""
    # "Rank 0 did not answer rank 1" is another sentence: its store is gone, and it names who may be the cause as well.
    blamed = set(re.findall(r"(rank \d+ on \S+) of \d+ did not answer:", printed)) - {name}
    return f"blamed {', '.join(sorted(blamed))}, and it was {name}" if blamed else ""


def _unless(right: bool, wrong: str) -> str:  # noqa: FBT001 - a sentence in two words
    return "" if right else wrong


def wait(is_so: Callable[[], bool], *, what: str, run: Run) -> None:
    """Wait until something is so.

    Raises:
        TimeoutError: with the end of what was printed.
    """
    deadline_s = time.monotonic() + _LONGEST_WAIT_S
    while not is_so():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"timed out waiting for {what}: {run.text()[-2000:]}")
        time.sleep(0.1)
