"""The store by which the doctor's ranks meet, opened where the run will open its own; what fails is a finding."""

from __future__ import annotations

import datetime as dt
import os
import socket
import time

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined] # not in __all__

from dptrain.runtime.doctor.finding import Finding, Status
from dptrain.runtime.doctor.network import is_own, owner_of_port, why
from dptrain.runtime.doctor.place import Place

RETRY_S = 0.2
_TRY_S = 3.0


def open_store(place: Place, *, wait_s: float) -> Store | Finding:
    """Serve the store on rank 0, or reach it from another rank within `wait_s`; return it, or why there is none."""
    serves = place.rank == 0 and not place.has_agent_store
    problem = _why_not_served(place) if serves else _why_not_reached(place, wait_s=wait_s)
    if problem is not None:
        return problem
    try:
        store = TCPStore(
            place.address,
            place.port,
            place.world_size,
            is_master=serves,
            timeout=dt.timedelta(seconds=max(1.0, wait_s)),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        return _in_use(place) if "EADDRINUSE" in str(error) else _stranger(place, error)
    # The agent's store outlives an attempt of the ranks.
    return PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _why_not_served(place: Place) -> Finding | None:
    if not is_own(place.address):
        text = f"rank 0 is to serve at {place.address}, which is no address of this host ({socket.gethostname()})"
        return _failure(text, "let the head (HEAD, --head, MASTER_ADDR) name the host of rank 0")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
            probe.listen()
        except PermissionError:
            return _failure(f"this user may not serve at port {place.port}", "choose a port of 1024 or more")
        except OSError:
            return _in_use(place)
    return None


def _why_not_reached(place: Place, *, wait_s: float) -> Finding | None:
    """Try until rank 0 serves: it may start later than this rank."""
    deadline_s = time.monotonic() + wait_s
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=_TRY_S).close()
        except OSError as error:
            if time.monotonic() > deadline_s:
                text = (
                    f"rank {place.rank} did not reach rank 0 at {place.address}:{place.port} within {wait_s:.0f} s: "
                    f"{why(error)}"
                )
                return _failure(text, "start rank 0, check the head's address and port, and let the firewall pass them")
            time.sleep(RETRY_S)
        else:
            return None


def _in_use(place: Place) -> Finding:
    text = f"port {place.port}, where rank 0 is to serve, is in use{owner_of_port(place.port)}"
    return _failure(text, "choose a free port on all hosts (PORT, --port, MASTER_PORT), or end what uses it")


def _stranger(place: Place, error: RuntimeError) -> Finding:
    reason = str(error).strip().splitlines()[0]
    text = f"what answers at {place.address}:{place.port} is not rank 0 of this examination: {reason}"
    return _failure(text, "choose a port that nothing else uses on the head, the same on all hosts")


def _failure(text: str, remedy: str) -> Finding:
    return Finding(check="rendezvous", status=Status.FAILURE, text=text, remedy=remedy)
