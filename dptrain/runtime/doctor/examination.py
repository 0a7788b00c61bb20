"""The course of an examination: each rank reads its machine, all meet at a store, call one another and all-reduce.

Rank 0 gathers and judges. Each stage has a deadline and names who or what is missing, so that a fault ends in a
sentence instead of a hang. What the ranks tell each other goes through the store: one entry per rank and stage.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined] # not in __all__

from dptrain.runtime.doctor.collective import Speed, judge_speed, measure
from dptrain.runtime.doctor.finding import Finding, Status, ranks_text
from dptrain.runtime.doctor.machine import Machine, read_machine
from dptrain.runtime.doctor.network import ClockListener, call, interface_towards
from dptrain.runtime.doctor.place import Place
from dptrain.runtime.doctor.rendezvous import RETRY_S, open_store
from dptrain.runtime.doctor.report import EXIT_PROBLEM, Report
from dptrain.runtime.doctor.run_folder import check_writable, made, mark, sees
from dptrain.runtime.doctor.verdicts import judge

_STAGE_S = 8.0  # for calls and for the folder, 5 s of which are NFS's cache
_ALL_REDUCE_S = 10.0
_MAX_SKEW_S = 1.0  # beyond it, logs of several hosts cannot be read side by side


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be examined.

    Attributes:
        run_dir: folder of the run.
        wants_gpu: whether the run is to use GPUs.
        wait_s: longest wait for all ranks to come.
        as_json: whether the report is for a program.
    """

    run_dir: Path
    wants_gpu: bool
    wait_s: float
    as_json: bool = False

    @property
    def limit_s(self) -> float:
        """Seconds after which an examination is over, whatever hangs."""
        return self.wait_s + _STAGE_S + _ALL_REDUCE_S


class _StoppedError(Exception):
    """The examination cannot go on; the findings say why."""


def examine(place: Place, request: Request) -> Report:
    """Examine this rank and, on rank 0, all of them. Every rank of the run calls it; returns within `limit_s`.

    The report of rank 0 has all findings. Another rank's has what it found alone, and the exit code of rank 0's where
    that could be had.
    """
    course = _Course(place, request)
    with course.watched(), ExitStack() as stack, contextlib.suppress(_StoppedError):
        course.run(stack)
    return course.report()


class _Course:
    """One rank's examination, stage by stage."""

    def __init__(self, place: Place, request: Request) -> None:
        self._place = place
        self._request = request
        self._began_s = time.monotonic()
        self._stage = "reading the machine"
        self._findings: list[Finding] = []
        self._machines: list[Machine] = []
        self._is_echo = False

    def report(self) -> Report:
        """Return what was found so far."""
        return Report(
            findings=list(self._findings),
            rank=self._place.rank,
            world_size=self._place.world_size,
            num_hosts=max(1, len({machine.host_id for machine in self._machines})),
            took_s=time.monotonic() - self._began_s,
            is_echo=self._is_echo,
        )

    @contextmanager
    def watched(self) -> Iterator[None]:
        """End the process with a report where a stage hangs beyond all deadlines."""
        timer = threading.Timer(self._request.limit_s, self._give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def run(self, stack: ExitStack) -> None:
        """Go through all stages.

        Raises:
            _StoppedError: where the next one would make no sense.
        """
        place = self._place
        machine = read_machine(rank=place.rank, local_rank=place.local_rank, local_world_size=place.local_world_size)
        self._machines = [machine]
        folder = self._own_folder(stack)
        store = self._meet(machine)
        plan = self._plan(store, stack, folder)
        port = self._listen(machine, bytes.fromhex(plan["token"]), stack)
        own = {
            "machine": machine.as_record(),
            "port": port,
            "folder": folder.as_record(),
        }
        _put(store, f"facts/{place.rank}", own)
        if place.rank == 0:
            self._gather(store, plan)
        else:
            self._follow(store, plan)

    # Stages of every rank

    def _own_folder(self, stack: ExitStack) -> Finding:
        run_dir = self._request.run_dir
        try:
            stack.enter_context(made(run_dir))
        except OSError as error:
            text = f"{run_dir} cannot be made: {error.strerror or error}"
            remedy = "choose a folder with --run-dir that this user may make"
            return Finding(check="run folder", status=Status.FAILURE, text=text, remedy=remedy)
        return check_writable(run_dir)

    def _meet(self, machine: Machine) -> Store:
        """Open the store that rank 0 serves.

        Raises:
            _StoppedError: where it cannot be served or reached; this rank's own findings are then all there is.
        """
        self._stage = "rendezvous"
        found = open_store(self._place, wait_s=self._began_s + self._request.wait_s - time.monotonic())
        if isinstance(found, Finding):
            self._findings = [*judge([machine], wants_gpu=self._request.wants_gpu), found]
            raise _StoppedError
        return found

    def _plan(self, store: Store, stack: ExitStack, folder: Finding) -> dict[str, Any]:
        """Return what rank 0 has laid down for all: the token of the calls, and the file to look for."""
        if self._place.rank == 0:
            is_writable = folder.status is not Status.FAILURE
            name = stack.enter_context(mark(self._request.run_dir)) if is_writable else None
            _put(store, "plan", {"token": secrets.token_hex(16), "mark": name})
        return self._get(store, "plan")

    def _listen(self, machine: Machine, token: bytes, stack: ExitStack) -> int:
        """Return the port where this rank answers calls, 0 where it has no address to listen on."""
        if not machine.address:
            return 0
        try:
            return stack.enter_context(ClockListener(machine.address, token=token)).port
        except OSError:
            return 0

    def _look_round(self, store: Store, plan: dict[str, Any], present: list[int]) -> dict[str, Any]:
        """Call the next rank in the ring, one half a ring away, and rank 0; look for rank 0's file in the folder."""
        rank, answers = self._place.rank, {}
        index = present.index(rank)
        for other in {present[(index + 1) % len(present)], present[(index + len(present) // 2) % len(present)], 0}:
            facts = self._get(store, f"facts/{other}")
            if other != rank and facts["port"]:  # else it listens nowhere: its interface is a finding of its own
                address = facts["machine"]["address"]
                reached = call(address, facts["port"], token=bytes.fromhex(plan["token"]))
                answers[str(other)] = {**asdict(reached), "address": address}
        is_shared = plan["mark"] is None or sees(self._request.run_dir, plan["mark"])
        return {"answers": answers, "is_shared": is_shared}

    # Ranks other than 0

    def _follow(self, store: Store, plan: dict[str, Any]) -> None:
        roll = self._get(store, "roll", limit_s=self._request.wait_s + _STAGE_S)
        if self._place.rank in roll["missing"]:
            text = f"rank {self._place.rank} came after rank 0 had waited {self._request.wait_s:g} s for all ranks"
            self._findings.append(_failure("ranks", text, "start all ranks within that time, or raise --wait"))
            raise _StoppedError
        present = [rank for rank in range(self._place.world_size) if rank not in set(roll["missing"])]
        _put(store, f"seen/{self._place.rank}", self._look_round(store, plan, present))
        go = self._get(store, "go", limit_s=2 * _STAGE_S)
        if go["go"]:
            self._stage = "all-reduce"
            with contextlib.suppress(RuntimeError):  # rank 0 says why
                self._measure(store, on_gpu=go["on_gpu"])
        verdict = self._get(store, "verdict", limit_s=_ALL_REDUCE_S)
        if not verdict["ok"]:
            self._findings.append(_failure("all ranks", "rank 0 found a problem", "see its report"))
            self._is_echo = True
        store.add("left", 1)

    # Rank 0

    def _gather(self, store: Store, plan: dict[str, Any]) -> None:
        self._stage = "waiting for all ranks"
        world_size = self._place.world_size
        deadline_s = self._began_s + self._request.wait_s
        facts = self._collect(store, "facts", range(world_size), deadline_s=deadline_s)
        present, missing = sorted(facts), [rank for rank in range(world_size) if rank not in facts]
        self._machines = [Machine.from_record(facts[rank]["machine"]) for rank in present]
        self._findings += judge(self._machines, wants_gpu=self._request.wants_gpu)
        _put(store, "roll", {"missing": missing})
        if missing:
            self._findings.append(self._missing(missing))
        self._stage = "calls between the ranks"
        _put(store, "seen/0", self._look_round(store, plan, present))
        seen = self._collect(store, "seen", present, deadline_s=time.monotonic() + _STAGE_S)
        self._findings.append(self._judge_folder(facts, seen))
        calls = {rank: seen[rank]["answers"] for rank in seen}
        if any(finding.check == "interface" and finding.status is Status.FAILURE for finding in self._findings):
            calls = {rank: {} for rank in calls}  # calls to a wrong address fail: the cause is named already
        self._findings += _judge_calls(calls, self._machines)
        is_whole = not missing and not any(
            finding.status is Status.FAILURE and finding.check in ("ranks", "interface", "devices")
            for finding in self._findings
        )
        _put(store, "go", {"go": is_whole, "on_gpu": self._on_gpu()})
        if is_whole:
            self._findings.append(self._all_reduce(store))
        _put(store, "verdict", {"ok": self.report().code == 0})
        self._wait_for_leavers(store, len(present) - 1)

    def _all_reduce(self, store: Store) -> Finding:
        self._stage = "all-reduce"
        on_gpu = self._on_gpu()
        try:
            speed = self._measure(store, on_gpu=on_gpu)
        except RuntimeError as error:
            text = f"the ranks met, but cannot all-reduce: {str(error).splitlines()[0]}"
            variable = "NCCL_SOCKET_IFNAME" if on_gpu else "GLOO_SOCKET_IFNAME"
            remedy = (
                f"let the firewall pass all ports between the hosts, and set {variable} to the interface between them"
            )
            return _failure("all-reduce", text, remedy)
        num_hosts = len({machine.host_id for machine in self._machines})
        return judge_speed(speed, world_size=self._place.world_size, num_hosts=num_hosts, on_gpu=on_gpu)

    def _measure(self, store: Store, *, on_gpu: bool) -> Speed:
        place = self._place
        return measure(
            PrefixStore("group", store),
            rank=place.rank,
            world_size=place.world_size,
            local_rank=place.local_rank,
            on_gpu=on_gpu,
            limit_s=_ALL_REDUCE_S * 0.8,
        )

    def _on_gpu(self) -> bool:
        return self._request.wants_gpu and torch.cuda.is_available()

    def _missing(self, missing: list[int]) -> Finding:
        text = f"{ranks_text(missing)} of {self._place.world_size} did not come within {self._request.wait_s:g} s"
        per_host = self._place.local_world_size
        hosts = sorted({rank // per_host for rank in missing})
        remedy = (
            f"start it on node {', '.join(map(str, hosts))} (NODE_RANK), and see what it says there: it must reach "
            f"{self._place.address}:{self._place.port}"
        )
        return _failure("ranks", text, remedy)

    def _judge_folder(self, facts: dict[int, Any], seen: dict[int, Any]) -> Finding:
        """Return the one finding on the run folder: that it fails, that it is not shared, or how it is."""
        own = [Finding.from_record(facts[rank]["folder"]) for rank in sorted(facts)]
        hosts = {rank: facts[rank]["machine"]["host"] for rank in facts}
        blind = [rank for rank in sorted(seen) if not seen[rank]["is_shared"]]
        if blind and not any(finding.status is Status.FAILURE for finding in own):
            text = (
                f"{self._request.run_dir} of rank 0 (host {hosts[0]}) is another folder than that of "
                f"{ranks_text(blind)} (host {', '.join(sorted({hosts[rank] for rank in blind}))})"
            )
            remedy = "give --run-dir as an absolute path on storage that all hosts mount"
            return _failure("run folder", text, remedy)
        return max(own, key=lambda finding: list(Status).index(finding.status))

    # The store

    def _collect(self, store: Store, stage: str, ranks: Iterable[int], *, deadline_s: float) -> dict[int, Any]:
        """Return the entries of a stage, of the ranks that made theirs in time."""
        found: dict[int, Any] = {}
        waiting = list(ranks)
        while waiting:
            came = [rank for rank in waiting if store.check([f"{stage}/{rank}"])]
            found |= {rank: json.loads(store.get(f"{stage}/{rank}")) for rank in came}
            waiting = [rank for rank in waiting if rank not in found]
            if time.monotonic() > deadline_s:
                break
            time.sleep(RETRY_S / 4 if waiting else 0)
        return found

    def _get(self, store: Store, key: str, *, limit_s: float = _STAGE_S) -> dict[str, Any]:
        """Return an entry once it is there.

        Raises:
            _StoppedError: where it does not come, or rank 0 is gone.
        """
        try:
            store.wait([key], dt.timedelta(seconds=limit_s))
            return dict(json.loads(store.get(key)))
        except RuntimeError:
            text = f"rank 0 was reached, but then fell silent ({self._stage})"
            self._findings.append(_failure("rendezvous", text, "see what rank 0 says"))
            raise _StoppedError from None

    def _wait_for_leavers(self, store: Store, count: int) -> None:
        """Keep the store up until the others have read the verdict; who hangs is not waited for."""
        deadline_s = time.monotonic() + 2.0
        while store.add("left", 0) < count and time.monotonic() < deadline_s:
            time.sleep(RETRY_S / 4)

    def _give_up(self) -> None:
        text = f"{self._stage} did not end within {self._request.limit_s:g} s"
        remedy = "see the other ranks' reports; py-spy dump --pid shows where this one waits"
        self._findings.append(_failure(self._stage, text, remedy))
        report = self.report()
        sys.stdout.write(report.as_json() if self._request.as_json else report.as_text())
        sys.stdout.flush()
        os._exit(EXIT_PROBLEM)


def _judge_calls(calls: dict[int, Any], machines: list[Machine]) -> list[Finding]:
    """Return the findings on who reaches whom, and on the clocks."""
    failed = [
        (rank, int(other), answer)
        for rank, answers in sorted(calls.items())
        for other, answer in answers.items()
        if answer["problem"]
    ]
    hosts = {machine.rank: machine.host for machine in machines}
    findings = []
    if failed:
        rank, other, answer = failed[0]
        more = f", and {len(failed) - 1} more pairs" if len(failed) > 1 else ""
        text = (
            f"rank {rank} (host {hosts[rank]}) does not reach rank {other} (host {hosts[other]}) at "
            f"{answer['address']}: {answer['problem']}{more}"
        )
        way = interface_towards(answer["address"], 1)
        hint = f" (here: {way[0]})" if way and not way[1].startswith("127.") else ""
        remedy = f"set GLOO_SOCKET_IFNAME to the interface between the hosts{hint}, and let the firewall pass all ports"
        findings.append(_failure("ranks", text, remedy))
    silent = sorted(set(hosts) - set(calls))
    if silent:
        text = f"{ranks_text(silent)} came, then fell silent"
        findings.append(_failure("ranks", text, "see what it says on its own host"))
    if not findings:
        trips = [answer["round_trip_s"] for answers in calls.values() for answer in answers.values()]
        slowest = f"; slowest call {max(trips) * 1e3:.2g} ms" if trips else ""
        text = f"all {len(hosts)} ranks reached{slowest}"
        findings.append(Finding(check="ranks", text=text, figures={"slowest_call_s": max(trips, default=0.0)}))
    return [*findings, *_judge_clocks(calls, hosts)]


def _judge_clocks(calls: dict[int, Any], hosts: dict[int, str]) -> list[Finding]:
    offsets = {
        rank: answers["0"]["clock_offset_s"]
        for rank, answers in calls.items()
        if "0" in answers and not answers["0"]["problem"]
    }
    if not offsets:
        return []
    rank = max(offsets, key=lambda rank: abs(offsets[rank]))
    figures = {"largest_offset_s": offsets[rank]}
    if abs(offsets[rank]) <= _MAX_SKEW_S:
        text = f"within {abs(offsets[rank]) * 1e3:.2g} ms of rank 0"
        return [Finding(check="clocks", text=text, figures=figures)]
    text = f"the clock of rank {rank} (host {hosts[rank]}) is {abs(offsets[rank]):.3g} s off that of rank 0"
    remedy = "let a time service run on all hosts (chrony, systemd-timesyncd)"
    return [Finding(check="clocks", status=Status.WARNING, text=text, remedy=remedy, figures=figures)]


def _failure(check: str, text: str, remedy: str) -> Finding:
    return Finding(check=check, status=Status.FAILURE, text=text, remedy=remedy)


def _put(store: Store, key: str, value: dict[str, Any]) -> None:
    store.set(key, json.dumps(value))
