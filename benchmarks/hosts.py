"""Does a run on three hosts end the same, and end truly, whatever happens to the hosts on the way?"""
# python -m benchmarks.hosts [--events N] [--minutes M] [--seed S] [--json PATH|-] [--quick]
#
# Three network namespaces, a torchrun with one replica in each, one run folder on a file system of its own. Needs root.

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import harness
from benchmarks.namespaces import Host, Network, network, reason_to_skip
from dptrain.checkpoint.store import load_newest
from dptrain.tasks import Suggestion, Task
from dptrain.tracking.jsonl import read_rows
from dptrain.tracking.run_folder import newest_step, write_config
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig

NUM_SAMPLES = 400_000
LEARNING_RATE = 1.0
LONGEST_RECOVERY_S = 40.0
_LONGEST_WAIT_S = 150.0
_PACE_S = 0.05
_SHIFT = "DPTRAIN_BENCHMARK_SHIFT"
_COLUMNS = {
    "event": "{event}",
    "number": "{number:.0f}",
    "wrong endings": "{wrong:.0f}",
    "recovery p50 s": "{p50:.1f}",
    "recovery max s": "{worst:.1f}",
}


class Numbered(Dataset[tuple[Tensor, int]]):
    """Noise, and the number of each sample; with `shift` it is another data set."""

    def __init__(self, shift: float) -> None:
        self._targets = torch.randn(NUM_SAMPLES, generator=torch.Generator().manual_seed(1)) + shift

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._targets[index], index


class Counted(nn.Module):
    """A mean to learn, and a count for each sample, which its gradient moves by one for each time it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))
        self.count = nn.Parameter(torch.zeros(NUM_SAMPLES))

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean, and the counts of some samples."""
        return self.mean, self.count[numbers]


def counted_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss whose gradient for each sample's count is minus one over the batch."""
    time.sleep(_PACE_S)
    targets, numbers = batch
    mean, counts = model(numbers)
    return torch.as_tensor(0.01 * ((mean - targets) ** 2).mean() - counts.mean())


def task() -> Task:
    """Build the task."""
    shift = float(os.environ.get(_SHIFT, "0"))
    return Task(
        name="counted",
        model=Counted(),
        train_data=Numbered(shift),
        loss=counted_loss,
        suggestion=Suggestion(
            learning_rate=LEARNING_RATE,
            global_batch_size=12,
            micro_batch_size=4,
            max_samples=NUM_SAMPLES,
            eval_every_samples=NUM_SAMPLES,
        ),
    )


class Run:
    """One run on three hosts, and what can happen to it. An event returns what was wrong with it, or nothing."""

    def __init__(self, net: Network, folder: Path, draw: random.Random) -> None:
        self.hosts, self._folder, self._draw = net.hosts, folder, draw
        self.disk = folder / "disk"
        self.run_dir = self.disk / "run"
        self.config = TrainConfig(
            task=f"{__file__}:task",
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

    def recovered(self, *, since_s: float, step: int) -> float:
        """Wait until all three replicas train beyond a step; return the seconds since an event."""
        wait(
            lambda: self.replicas() == 3 and self.step() > step + 1, what=f"three replicas beyond step {step}", run=self
        )
        return time.monotonic() - since_s

    # Events

    def kill_host(self) -> tuple[str, float | None]:
        """Kill all processes of a host, and start it again."""
        host, since_s, step, before = self._victim(), time.monotonic(), self.step(), self.mark()
        host.kill()
        time.sleep(3 * self._draw.random())
        self.start(host)
        took_s = self.recovered(since_s=since_s, step=step)
        return _unless(f"on {host_name(host)} of 3 did not answer" in self.since(before), "not named"), took_s

    def kill_replica(self) -> tuple[str, float | None]:
        """Kill the replica of any host; its agent stays."""
        host, since_s, step, before = self._draw.choice(self.hosts), time.monotonic(), self.step(), self.mark()
        host.signal_replicas(signal.SIGKILL)
        took_s = self.recovered(since_s=since_s, step=step)
        # Where the agent there starts it again at once, the other agents end their replicas before these can ask.
        named = f"on {host_name(host)} of 3 did not answer" in self.since(before)
        by_agent = "exitcode: -9" in host.text()[before[host.number] :]
        return _unless(named or by_agent, "not named"), took_s

    def freeze(self) -> tuple[str, float | None]:
        """Freeze a replica for longer than its peers wait, until its agent ends it."""
        host, since_s, step, before = self._victim(), time.monotonic(), self.step(), self.mark()
        host.signal_replicas(signal.SIGSTOP)
        wait(lambda: f"on {host_name(host)} of 3 did not answer" in self.since(before), what="named", run=self)
        host.kill()  # as a health check of the scheduler does
        self.start(host)
        return "", self.recovered(since_s=since_s, step=step)

    def leave(self) -> tuple[str, float | None]:
        """Ask a host to stop, go on with two, and let it join again."""
        host, since_s, before = self._victim(), time.monotonic(), self.mark()
        host.leave()
        wait(lambda: self.replicas() == 2, what="two replicas", run=self)
        took_s = time.monotonic() - since_s
        host.wait(60)
        step = self.step()
        self.start(host)
        self.recovered(since_s=since_s, step=step)
        return _unless("resumed from step" in self.since(before), "not resumed"), took_s

    def cut_link(self) -> tuple[str, float | None]:
        """Cut a host's link for a few seconds, less than its peers wait."""
        host, since_s, step, before = self._victim(), time.monotonic(), self.step(), self.mark()
        host.cut()
        time.sleep(1 + 3 * self._draw.random())
        host.join()
        took_s = self.recovered(since_s=since_s, step=step)
        return _unless("did not answer" not in self.since(before), "ended by a short cut"), took_s

    def fill_disk(self) -> tuple[str, float | None]:
        """Leave no room for a checkpoint until one has failed, then make room."""
        step, before = self.step(), self.mark()
        filler = self.disk / "filler"
        free_bytes = os.statvfs(self.disk)
        with filler.open("wb") as file:
            file.write(bytes(max(0, free_bytes.f_bavail * free_bytes.f_bsize - (64 << 10))))
        wait(lambda: "could not be written" in self.since(before), what="a failed save", run=self)
        filler.unlink()
        since_s = time.monotonic()
        return "", self.recovered(since_s=since_s, step=step)

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
            shifted: dict[str, Any] = {_SHIFT: 1.0}
            host.start("--config", settings, "--resume", nnodes="3", max_restarts=0, **shifted)
        codes = [host.wait(120) for host in self.hosts]
        refused = all(codes) and "the data set is another one" in self.since(before)
        return _unless(refused, "not refused"), self._go_on()[0]

    def stop(self) -> tuple[str, float | None]:
        """Stop the run on all hosts, and go on."""
        before = self.mark()
        step = self._stop()
        is_reported = f"stopped on request after step {step:,}" in self.since(before)
        return _unless(is_reported, "the end was not reported, or its step was not saved"), self._go_on()[0]

    def _stop(self) -> int:
        """Stop all hosts; return the step that is saved."""
        for host in self.hosts:
            host.leave()
        for host in self.hosts:
            host.wait(90)
        return newest_step(self.run_dir)

    def _go_on(self) -> tuple[float, list[int]]:
        since_s, step, before = time.monotonic(), self.step(), self.mark()
        self.start(*self.hosts, resume=True)
        return self.recovered(since_s=since_s, step=step), before

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


def host_name(host: Host) -> str:
    """Return the name that a host gives itself."""
    return f"host{host.number}"


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


EVENTS = ("kill_host", "kill_replica", "freeze", "leave", "cut_link", "fill_disk", "damage_log", "change_data", "stop")


def measure(*, num_events: int, minutes: float, seed: int) -> harness.Findings:
    """Have so many events happen to a run, or as many as the minutes allow."""
    reason = reason_to_skip()
    if reason:
        raise SystemExit(f"hosts cannot be made here: {reason}")
    draw, console = random.Random(seed), Console(stderr=True)  # noqa: S311 - no secret
    plan = [kind for _ in range(-(-num_events // len(EVENTS))) for kind in draw.sample(EVENTS, len(EVENTS))][
        :num_events
    ]
    endings: list[tuple[str, str, float | None]] = []
    with tempfile.TemporaryDirectory() as name, network(Path(name), 3) as net:
        run = Run(net, Path(name), draw)
        run.disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "hosts", str(run.disk)], check=True)
        try:
            run.start(*run.hosts)
            wait(lambda: run.step() >= 5, what="a first step", run=run)
            began_s = time.monotonic()
            for kind in plan:
                if time.monotonic() - began_s > 60 * minutes:
                    break
                time.sleep(2 * draw.random())
                try:
                    wrong, took_s = getattr(run, kind)()
                except (TimeoutError, subprocess.TimeoutExpired) as error:
                    console.print(f"{kind}: {error}")
                    endings.append((kind, "no recovery", None))
                    break
                console.print(f"{len(endings) + 1}. {kind}: {wrong or 'right'}, {took_s or 0:.1f} s, step {run.step()}")
                endings.append((kind, wrong, took_s))
            run._stop()  # noqa: SLF001 - its own driver
            lost, doubled = run.samples_lost_and_doubled()
        finally:
            for host in net.hosts:
                host.kill()
            subprocess.run(["umount", "-l", str(run.disk)], check=False)
    return _findings(endings, lost=lost, doubled=doubled)


def _findings(endings: list[tuple[str, str, float | None]], *, lost: int, doubled: int) -> harness.Findings:
    recoveries = sorted(took_s for _, _, took_s in endings if took_s is not None) or [0.0]
    figures = {
        "events": len(endings),
        "samples_lost": lost,
        "samples_doubled": doubled,
        "wrong_endings": sum(1 for _, wrong, _ in endings if wrong),
        "recovery_p50_s": statistics.median(recoveries),
        "recovery_p95_s": recoveries[min(int(0.95 * len(recoveries)), len(recoveries) - 1)],
    }
    rows: list[dict[str, str | float]] = []
    for kind, number in Counter(kind for kind, _, _ in endings).items():
        own = sorted(took_s for name, _, took_s in endings if name == kind and took_s is not None) or [0.0]
        wrong = sum(1 for name, found, _ in endings if name == kind and found)
        rows.append({"event": kind, "number": number, "wrong": wrong, "p50": statistics.median(own), "worst": own[-1]})
    held = not (lost or doubled or figures["wrong_endings"]) and figures["recovery_p95_s"] <= LONGEST_RECOVERY_S
    note = (
        f"bounds {'held' if held else 'BROKEN'}: nothing lost or doubled, every ending reported correctly, "
        f"p95 of recovery up to {LONGEST_RECOVERY_S:g} s"
    )
    return harness.Findings(figures=figures, rows=rows, columns=_COLUMNS, note=note)


def main() -> None:
    """Read the command line, measure, and tell."""
    parser = harness.command_line(question=__doc__, name="hosts")
    parser.add_argument("--events", type=int, default=None, help="how many (100; 9 with --quick)")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no event later than this (600)")
    parser.add_argument("--seed", type=int, default=0, help="decides what happens when (0)")
    options = parser.parse_args()
    findings = measure(
        num_events=options.events or (9 if options.quick else 100), minutes=options.minutes, seed=options.seed
    )
    harness.tell(findings, options, question=__doc__, name="hosts", device="cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
