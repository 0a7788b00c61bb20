"""The second copy of the log, in wandb by accelerate's tracker; the first copy, the truth, is metrics.py.

Everything that wandb does happens on one daemon thread that is fed by a queue, because each of its calls may hang on a
dead network or a dead service process, not only fail. What goes wrong becomes one sentence for the caller's `warn`,
which is called on the caller's own thread.
"""

from __future__ import annotations

import contextlib
import http.client
import netrc
import os
import queue
import re
import shlex
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from dptrain.errors import ConfigError
from dptrain.tracking.local_trackers import LocalSink, accelerate_tracker
from dptrain.tracking.redact import without_secrets

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from dptrain.tracking.jsonl import Value

NAMES = ("wandb", "tensorboard", "trackio", "mlflow")
"""Trackers by name. Of these tensorboard, trackio and mlflow need no account."""

START_LIMIT_S = 8.0
"""Longest time that a run waits for its tracker to start."""
FINISH_LIMIT_S = 10.0
"""Longest time that a finished run waits for its tracker."""
_PROBE_LIMIT_S = 2.5
_OFFLINE_START_S = 2.0  # what starting offline takes; kept back from the time that starting online may use
_MAX_PENDING_ROWS = 10_000  # some 10 MB; far more than a service that still lives falls behind
_RUN_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Tracker(Protocol):
    """Where rows go besides the JSONL log. No method raises, and none waits for a network."""

    def log(self, row: Mapping[str, Value], *, step: int) -> None:
        """Hand on one row of `metrics.jsonl`."""

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Hand on the figures of the whole run and close, within `FINISH_LIMIT_S`."""


class SeveralTrackers:
    """Hands everything on to some trackers, or to none.

    Args:
        trackers: each gets every row.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = trackers

    def log(self, row: Mapping[str, Value], *, step: int) -> None:
        """Hand on one row."""
        for tracker in self._trackers:
            tracker.log(row, step=step)

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Hand on the figures of the whole run, and close one after the other."""
        for tracker in self._trackers:
            tracker.finish(summary)


def start_tracker(
    *,
    choice: str,
    project: str,
    run_name: str,
    run_dir: Path,
    config: Mapping[str, Any],
    warn: Callable[[str], None],
) -> Tracker:
    """Start the tracker that `choice` and the environment ask for; returns within `START_LIMIT_S`.

    A user's WANDB_MODE is respected. Where it does not say offline, the server is asked first; if it does not answer,
    if nobody is logged in, or if wandb does not start, the run is recorded offline below `run_dir`. A run that is
    resumed goes on in wandb under the name it had there; what was recorded offline is a run of its own.
    Call it on rank 0 only.

    Args:
        choice: "auto" for wandb where somebody is logged in to it, "none", or names joined by "+".
        project: project in wandb.
        run_name: name of the run there.
        run_dir: folder of the run; wandb's files go below it.
        config: settings to show beside the run; secrets in it are blanked, see `without_secrets`.
        warn: gets each warning or notice, one sentence, from within this function and the tracker's methods only.

    Raises:
        ConfigError: where `choice` is none of these.
    """
    if not is_choice(choice):
        raise ConfigError(f"tracker must be auto, none, or some of {', '.join(NAMES)} joined by +, got {choice!r}")
    names = [] if choice == "none" else ["wandb"] if choice == "auto" else choice.split("+")
    is_disabled = os.environ.get("WANDB_MODE", "").lower() == "disabled" or (
        choice == "auto" and not _has_credentials()
    )
    settings: dict[str, Any] = {"project": project, "run_name": run_name, "run_dir": run_dir}
    settings["config"] = without_secrets(config)
    trackers = [
        BackgroundTracker(
            _WandbSink(**settings) if name == "wandb" else LocalSink(name, **settings), name=name, warn=warn
        )
        for name in names
        if not (name == "wandb" and is_disabled)
    ]
    return trackers[0] if len(trackers) == 1 else SeveralTrackers(trackers)


def is_choice(text: str) -> bool:
    """Whether a text names trackers, each once, or is auto or none."""
    names = text.split("+")
    return text in ("auto", "none") or (set(names) <= set(NAMES) and len(set(names)) == len(names))


class Sink(Protocol):
    """What a background tracker feeds. Any method may raise or hang."""

    def start(self, *, notify: Callable[[str], None]) -> None:
        """Get ready; `notify` takes sentences for the user."""

    def log(self, values: Mapping[str, Value]) -> None:
        """Record one row."""

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Record the summary and close."""

    def release(self) -> None:
        """Let go of processes and hooks; called last, after a failure too."""

    def abandon(self) -> None:
        """Called from another thread when the sink hangs: end what would keep this process from exiting."""


class BackgroundTracker:
    """A tracker that runs its sink on a daemon thread, in the order of the calls.

    Rows queue up while the sink is slow. The first exception, or a queue that overflows, gives one warning and
    switches the tracker off.

    Args:
        sink: what does the work.
        name: of the tracker, for those sentences.
        warn: gets sentences for the user.
        start_limit_s: how long the constructor waits for the sink before it leaves it to start in the background.
        finish_limit_s: how long `finish` waits.
    """

    def __init__(
        self,
        sink: Sink,
        *,
        name: str = "wandb",
        warn: Callable[[str], None],
        start_limit_s: float = START_LIMIT_S,
        finish_limit_s: float = FINISH_LIMIT_S,
    ) -> None:
        self._sink = sink
        self._name = name
        self._warn = warn
        self._finish_limit_s = finish_limit_s
        self._rows: queue.SimpleQueue[Mapping[str, Value]] = queue.SimpleQueue()
        self._notices: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._summary: Mapping[str, Value] | None = None
        self._off = False
        started = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(started,), name="dptrain-tracker", daemon=True)
        self._thread.start()
        if not started.wait(start_limit_s):
            self._notices.put(
                f"{self._name} has not started after {start_limit_s:g} s; training goes on without waiting for it"
            )
        self._tell()

    def log(self, row: Mapping[str, Value], *, step: int) -> None:
        """Queue the fields of `row` that hold a value; costs microseconds."""
        if not self._off:
            # wandb's own step stays the count of rows: it must never go back, which ours does when a run is resumed.
            named = {name: value for name, value in row.items() if name not in ("step", "kind") and value is not None}
            self._rows.put({"progress/step": step, **named})
            if self._rows.qsize() > _MAX_PENDING_ROWS:
                self._off = True
                self._notices.put(
                    f"{self._name} is {_MAX_PENDING_ROWS:,} rows behind, so it is switched off; training goes on"
                )
        self._tell()

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Close the sink and wait for it, at most `finish_limit_s`. Calling it again does nothing."""
        if self._summary is not None:
            return
        self._summary = summary
        self._rows.put({})  # wakes the thread, which then sees that there is a summary
        self._thread.join(self._finish_limit_s)
        if self._thread.is_alive():
            self._off = True  # what breaks from here on is our own doing, and no news
            self._notices.put(f"{self._name} did not finish within {self._finish_limit_s:g} s and is left behind")
            self._sink.abandon()
            self._thread.join(1.0)
        self._tell()

    def _tell(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._warn(self._notices.get_nowait())

    def _work(self, started: threading.Event) -> None:
        try:
            self._sink.start(notify=self._notices.put)
            started.set()
            while row := self._rows.get():
                self._sink.log(row)
            self._sink.finish(self._summary or {})
        except BaseException as error:  # noqa: BLE001 - whatever a tracker does, the training goes on
            if not self._off:
                self._off = True
                self._notices.put(f"{self._name} is switched off, training goes on: {_one_line(error)}")
        finally:
            started.set()
            with contextlib.suppress(BaseException):
                self._sink.release()


class _WandbSink:
    def __init__(self, *, project: str, run_name: str, run_dir: Path, config: Mapping[str, Any]) -> None:
        self._project = project
        self._options = {"name": run_name, "dir": str(run_dir), "config": dict(config)}
        self._id_file = run_dir / "wandb" / "run-id"
        # wandb leaves this variable where its service process runs already, for the user or a parent process.
        self._owns_service = "WANDB_SERVICE" not in os.environ
        self._wandb: Any = None
        self._tracker: Any = None

    def start(self, *, notify: Callable[[str], None]) -> None:
        """Open the run at wandb, or offline where its server cannot be had; say which through `notify`."""
        deadline = time.monotonic() + START_LIMIT_S - _OFFLINE_START_S
        # Only where the user left it open: wandb's lines would tear the live view, and its own telemetry, sent to the
        # same server, holds up the exit by 10 s and more where that server hangs.
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # the slow part of a start, so before the time that is left for init is calculated

        self._wandb = wandb
        why_offline = _why_offline()
        if why_offline is None:
            try:
                same_run = {"id": run_id, "resume": "allow"} if (run_id := self._saved_id()) else {}
                self._open(settings={"init_timeout": max(1.0, deadline - time.monotonic())}, **same_run)
                self._save_id(self._tracker.tracker.id)
            except Exception as error:  # noqa: BLE001 - wandb raises what it likes; offline is the answer to all of it
                why_offline = f"wandb did not start ({_one_line(error)})"
        if why_offline is not None:
            self._open(settings={"mode": "offline"})
            folder = Path(self._tracker.tracker.dir).parent
            notify(f"{why_offline}, so wandb records offline; upload with: wandb sync {shlex.quote(str(folder))}")
        elif url := self._tracker.tracker.url:
            notify(f"wandb shows this run at {url}")
        self._tracker.tracker.define_metric("*", step_metric="progress/samples")

    def _saved_id(self) -> str | None:
        """The id of this run on the server, where an earlier attempt had one."""
        try:
            found = self._id_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeError):
            return None
        return found if _RUN_ID.fullmatch(found) else None

    def _save_id(self, run_id: str) -> None:
        with contextlib.suppress(OSError):  # a resumed run is then a new one in wandb
            self._id_file.parent.mkdir(exist_ok=True)
            self._id_file.write_text(run_id, encoding="utf-8")

    def _open(self, *, settings: dict[str, Any], **same_run: str) -> None:
        tracker = accelerate_tracker("WandBTracker")
        # console: what the terminal shows is not worth a copy, and a wrapped stdout would tear the live view
        self._tracker = tracker(self._project, settings={"console": "off", **settings}, **self._options, **same_run)
        self._tracker.start()

    def log(self, values: Mapping[str, Value]) -> None:
        """Send a row."""
        self._tracker.log(dict(values))

    def finish(self, summary: Mapping[str, Value]) -> None:
        """Send the figures of the whole run, and close it."""
        self._tracker.tracker.summary.update(dict(summary))
        self._tracker.finish()

    def release(self) -> None:
        """End wandb's service, where this run started it."""
        if self._owns_service and self._wandb is not None:
            self._wandb.teardown()  # else wandb does it at exit, and may take long over it there

    def abandon(self) -> None:
        """Kill wandb's service, where this run started it: it holds up the exit."""
        import psutil

        for child in psutil.Process().children() if self._owns_service else []:
            with contextlib.suppress(psutil.Error):
                if child.name().startswith("wandb"):
                    child.kill()


def _base_url() -> str:
    return os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"


def _has_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    for file in filter(None, (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")):
        # no such file, not that format, no home, no address: each is no login
        with contextlib.suppress(OSError, netrc.NetrcParseError, RuntimeError, ValueError):
            if netrc.netrc(Path(file).expanduser()).authenticators(urlsplit(_base_url()).hostname or ""):
                return True
    return False


def _why_offline() -> str | None:
    """Say why this run cannot be online, or None."""
    if os.environ.get("WANDB_MODE", "").lower() in ("offline", "dryrun"):
        return "WANDB_MODE asks for it"
    if not _has_credentials():
        return "nobody is logged in to wandb (WANDB_API_KEY is not set)"
    why = _why_unreachable(_base_url(), limit_s=_PROBE_LIMIT_S)
    if why is None:
        return None
    host = _base_url().rpartition("//")[2].partition("/")[0].rpartition("@")[2]  # "@": a login in it is not shown
    return f"{host} cannot be reached ({why})"


def _why_unreachable(url: str, *, limit_s: float) -> str | None:
    """Ask a web server for any answer at all; None where one came, else the reason.

    wandb's `init_timeout` alone would do, but at a price: it overruns by 1.3 to 1.6 s (wandb 0.31, closed port and
    silent listener), so within `START_LIMIT_S` (row H1 of the faults) a server that answers slowly would have 2 s left.
    A connection is not enough: there are listeners that accept and never answer. On a thread of its own, because
    the time limit of a socket does not cover the look-up of the name.
    """
    answers: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_ask(url, limit_s=limit_s)), daemon=True).start()
    try:
        return answers.get(timeout=limit_s)
    except queue.Empty:
        return f"no answer within {limit_s:g} s"


def _ask(url: str, *, limit_s: float) -> str | None:
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            return "not a web address"
        # Through the user's proxy, as wandb itself goes; only the headers, and no redirection is followed.
        request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - the scheme was checked
        urllib.request.build_opener(_NoRedirect).open(request, timeout=limit_s).close()
    except urllib.error.HTTPError as error:
        error.close()  # any status is an answer
    except urllib.error.URLError as error:
        # A certificate that is not trusted here may be one that wandb is configured to trust.
        return None if isinstance(error.reason, ssl.SSLError) else _one_line(error.reason)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return _one_line(error)
    return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: object, **_kwargs: object) -> None:
        return None


def _one_line(error: object) -> str:
    """Say an exception in a line. Not more than its first: pydantic quotes the values of settings in the others."""
    lines = str(without_secrets(str(error))).strip().splitlines()
    return ": ".join(filter(None, [type(error).__name__, lines[0] if lines else ""]))
