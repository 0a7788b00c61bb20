"""Do replicas send the bytes that each kind of exchange says, and what comes on top?"""
# python -m benchmarks.exchange --parts bytes [--quick]: this is a part of that benchmark
#
# The bytes and the packets of `eth0` in each host's network namespace. Less the headers of Ethernet, IP and TCP, which
# are as many as there are packets, and less the agreement of each step, which an ensemble has alone, they should be
# those of `Exchange.bytes_per_step`. What is left over is counted for each collective by itself.

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.exchanges.slow_networks import WARM_UP, Job, per_step, run_jobs, sent, start_on
from benchmarks.hosts.namespaces import network
from dptrain.exchange.base import all_gather_into

HEADER_BYTES = 66
"""Of a packet: 14 of Ethernet, 20 of IP, 20 of TCP, and 12 of its time stamps. Acknowledgements have nothing else."""
_BATCH = 96
"""A multiple of two and of three replicas."""
_NUM_NUMBERS = 12_000
"""Of the collectives that are measured by themselves: 48 KB."""
_CALLS = 50


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A kind of exchange whose bytes are counted.

    Attributes:
        settings: of the exchange.
        model: wide (1,126,410 parameters), or the task's own of 2,410.
        every: steps from one exchange to the next.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = "wide"
    every: int = 1


ARMS: Mapping[str, Arm] = {
    "all_reduce": Arm(),
    "fp16": Arm(settings={"kind": "compressed", "codec": "fp16"}),
    "bf16": Arm(settings={"kind": "compressed", "codec": "bf16"}),
    "int8": Arm(settings={"kind": "compressed", "codec": "int8"}),
    "powersgd": Arm(settings={"kind": "compressed", "codec": "powersgd"}),
    "local 8": Arm(settings={"kind": "local_updates", "every": 8}, every=8),
    "nesterov 8, overlap 3": Arm(
        settings={"kind": "local_updates", "every": 8, "outer": "nesterov", "overlap": 3}, every=8
    ),
    "random bases 3,200": Arm(settings={"kind": "random_bases", "dimensions": 3_200}, model="own"),
    "codistillation 512": Arm(settings={"kind": "codistillation", "staleness": 0, "shared_samples": 512}),
    "ensemble": Arm(settings={"kind": "ensemble"}),
}


def measure(folder: Path, *, replicas: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each kind, and one for each collective by itself, on each number of hosts."""
    rows: list[dict[str, Any]] = []
    for number in replicas:
        place = folder / str(number)
        place.mkdir()
        with network(place, number) as net:
            for host in net.hosts:
                # A shaped link cuts what is sent into packets of 1,500 bytes, as a network card would.
                host.shape("1gbit", queue="400ms")
            jobs = [
                Job(
                    name=name.replace(" ", "_"),
                    exchange=arm.settings,
                    batch=_BATCH,
                    num_samples=_BATCH * (20 if arm.every == 1 else 4 * arm.every + arm.every // 2 + 2),
                    model=arm.model,
                    evaluates=False,
                )
                for name, arm in ARMS.items()
            ]
            found = run_jobs(jobs, place / "jobs", net=net)
            alone = _collectives(place / "collectives.json", net=net)
        agreement = payload_of_step(found["ensemble"], every=1)
        for (name, arm), job in zip(ARMS.items(), jobs, strict=True):
            _, wire, packets = per_step(found[job.name], every=arm.every)
            said = found[job.name]["bytes_per_step"]
            sizes = {"wire": wire, "packets": packets, "payload": payload_of_step(found[job.name], every=arm.every)}
            rows.append(row(name, replicas=number, said=said, agreement=agreement, **sizes))
        rows += [{"replicas": number, "collective": name, **one} for name, one in alone.items()]
    return rows


def payload(wire: float, packets: float) -> float:
    """Return the bytes that were handed to TCP."""
    return wire - HEADER_BYTES * packets


def payload_of_step(result: Mapping[str, Any], *, every: int) -> float:
    """Return the payload of a step, by the median over rounds of `every` steps past the warm-up.

    A mean would have in it what TCP sent again because an acknowledgement was late: up to 10 % on a busy machine.
    """
    steps = result["steps"][-(-WARM_UP // every) * every + every // 2 - 1 :: every]
    sums = [payload(num_bytes, packets) for _, _, _, num_bytes, packets in steps]
    return statistics.median(b - a for a, b in itertools.pairwise(sums)) / every


def row(
    kind: str, *, replicas: int, said: float, wire: float, packets: float, payload: float, agreement: float
) -> dict[str, str | float]:
    """Return what one kind sends in a step, and by how much the interface is off.

    Args:
        kind: name.
        replicas: number of hosts.
        said: bytes that the interface computes.
        wire: bytes of the network device, all of them.
        packets: of the network device.
        payload: bytes without the headers of packets.
        agreement: payload of a step without an exchange.
    """
    found: dict[str, str | float] = {
        "kind": kind,
        "replicas": replicas,
        "said": said,
        "wire": wire,
        "packets": packets,
        "payload": payload,
        "agreement": agreement,
    }
    if said:
        found["error"] = (payload - agreement) / said - 1
        found["wire_over_said"] = wire / said
    return found


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the largest error of the payload, and how much more is on the wire with all headers and the agreement."""
    compared = [one for one in rows if "error" in one]
    return {
        "bytes_error_max": max(abs(one["error"]) for one in compared),
        "wire_over_said_max": max(one["wire_over_said"] for one in compared),
    }


def _collectives(result: Path, *, net: Any) -> dict[str, Any]:  # noqa: ANN401 - a Network
    codes = [process.wait(timeout=120) for process in start_on(net, "benchmarks.exchanges.sent_bytes", result)]
    if any(codes):
        raise SystemExit(f"counting collectives failed: {net.hosts[0].text()[-2000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _count(result: Path) -> None:
    """Write what each collective of 48 KB sends beyond its bytes; each host runs this."""
    torch.set_num_threads(1)
    rank, number = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    master = f"tcp://{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    dist.init_process_group("gloo", init_method=master, rank=rank, world_size=number)
    whole, part = torch.ones(_NUM_NUMBERS), torch.ones(_NUM_NUMBERS // number)
    share = 4 * _NUM_NUMBERS * (number - 1) / number
    barrier = _payload_of(dist.barrier, number=_CALLS)
    found = {}
    for name, call, said in (
        ("all_reduce", lambda: dist.all_reduce(whole), 2 * share),
        ("all_gather", lambda: all_gather_into(whole, part), share),
        ("all_to_all", lambda: dist.all_to_all_single(torch.empty_like(whole), whole), share),
    ):
        # After the barrier at the end nothing is on its way any more.
        found[name] = {"said": said, "left_over": _payload_of(call, number=_CALLS) - said - barrier / _CALLS}
    dist.barrier()
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.destroy_process_group()


def _payload_of(call: Callable[[], object], *, number: int = 1) -> float:
    """Return what was handed to TCP for a call, a mean over some of them and one barrier at the end."""
    for _ in range(3):
        call()
    dist.barrier()
    before = sent()
    for _ in range(number):
        call()
    dist.barrier()
    after = sent()
    return payload(after[0] - before[0], after[1] - before[1]) / number


if __name__ == "__main__":
    _count(Path(sys.argv[1]))
