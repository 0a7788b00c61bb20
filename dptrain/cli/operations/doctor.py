"""`dptrain doctor`: checks machines, network and folder before a run, as one rank or by starting this host's ranks."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dptrain.errors import ConfigError

if TYPE_CHECKING:
    from dptrain.runtime.doctor import Place, Request

_DESCRIPTION = """Check what a run needs: devices, versions, rendezvous, every rank, all-reduce, clocks, run folder,
/dev/shm, limits. One host: `dptrain doctor`. Several: the same command on each host with --nnodes, --node-rank and
--head, or under the launcher of the run. Exit code 0: training would start; 78: the report names a problem."""

_DEFAULT_PORT = 29500  # torchrun's


def doctor(arguments: Sequence[str]) -> int:
    """Examine, print the report, and return 0, or 78 where a problem was found."""
    options = _parser().parse_args(list(arguments))
    if not 0 < options.wait < 3600:  # noqa: PLR2004 - an hour is far beyond any use
        raise ConfigError(f"--wait must be a number of seconds above 0, got {options.wait:g}")
    from dptrain.runtime.doctor import Place, Request, places_of_host, run_ranks, wants_gpu

    request = Request(
        run_dir=Path(options.run_dir),
        wants_gpu=wants_gpu(options.device),
        wait_s=options.wait,
        as_json=options.json,
    )
    place = Place.from_environment(os.environ)
    if place is not None:
        return _examine(place, request)
    num_nodes = _number("nnodes", options.nnodes, "NNODES", default=1)
    places = places_of_host(
        num_nodes=num_nodes,
        node_rank=_number("node_rank", options.node_rank, "NODE_RANK", default=0),
        address=options.head or os.environ.get("HEAD", ""),
        port=_number("port", options.port, "PORT", default=_DEFAULT_PORT if num_nodes > 1 else _free_port()),
        num_ranks=_number("nproc", options.nproc, "NPROC", default=_count_ranks(options.device)),
    )
    return run_ranks(places, partial(_examine, request=request), limit_s=request.limit_s)


def _examine(place: Place, request: Request) -> int:
    """Examine one rank and print its report, unless rank 0's says it all."""
    from dptrain.runtime.doctor import examine

    report = examine(place, request)
    if place.rank == 0 or (place.local_rank == 0 and report.code and not report.is_echo):
        sys.stdout.write(report.as_json() if request.as_json else report.as_text())
        sys.stdout.flush()
    return report.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dptrain doctor", description=_DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--run-dir", default="runs", help="folder of the run, or where runs are kept (runs)")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="what the run is to use (GPUs if there are)")
    add("--nnodes", help="number of hosts ($NNODES, 1)")
    add("--node-rank", help="number of this host from 0 ($NODE_RANK, 0)")
    add("--head", help="name or address of host 0 ($HEAD)")
    add("--port", help="free port on host 0 ($PORT, 29500; any free one for a single host)")
    add("--nproc", help="ranks on this host ($NPROC, one per GPU, 2 without)")
    add("--wait", type=float, default=15.0, help="seconds to wait for all ranks (15)")
    add("--json", action="store_true", help="report as JSON on one line")
    return parser


def _number(name: str, given: str | None, variable: str, *, default: int) -> int:
    text = given if given is not None else os.environ.get(variable)
    if not text:
        return default
    # Elastic runs give a range of nodes; all of them are to be examined.
    text = text.rpartition(":")[2]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ConfigError(f"{name} must be a whole number, got {text!r}")
    return int(text)


def _count_ranks(device: str) -> int:
    import torch

    return (0 if device == "cpu" else torch.cuda.device_count()) or 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
