"""The newest row in the text format of Prometheus: as a file for its node exporter, or at a port on loopback."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dptrain.tracking.export.heartbeat import write_whole
from dptrain.tracking.jsonl import Value

_EVERY_S = 1.0  # Prometheus reads every 15 s or more
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(values: Mapping[str, float], *, run_name: str) -> str:
    """Return metrics in the text format 0.0.4, each a gauge with the run's name as its label.

    Args:
        values: by the key of the row: `train/loss` becomes `dptrain_train_loss`.
        run_name: the label `run`, escaped as the format asks.
    """
    label = run_name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for key, value in values.items():
        name = metric_name(key)
        lines += [f"# TYPE {name} gauge", f'{name}{{run="{label}"}} {value!r}']
    return "\n".join(lines) + "\n"


def metric_name(key: str) -> str:
    """Return the name of a metric for a key of a row: letters, digits and underscores after `dptrain_`."""
    return "dptrain_" + re.sub(r"[^A-Za-z0-9_]", "_", key)


def numbers(row: Mapping[str, Value]) -> dict[str, float]:
    """Return the finite numbers of a row; text and what is unknown have no metric."""
    return {key: float(value) for key, value in row.items() if isinstance(value, int | float) and math.isfinite(value)}


class _Newest:
    """The newest value of each key: a row of an evaluation adds to that of a step."""

    def __init__(self, run_name: str) -> None:
        self._run_name = run_name
        self._values: dict[str, float] = {}

    def add(self, row: Mapping[str, Value]) -> None:
        self._values |= numbers(row)
        for key in row.keys() - numbers(row).keys():
            self._values.pop(key, None)  # known before and unknown now: the old value would be a wrong one

    def text(self) -> str:
        return exposition(dict(self._values), run_name=self._run_name)


class PrometheusFile:
    """Writes the metrics to a file, at most once a second.

    Args:
        path: the file, such as `/var/lib/node_exporter/dptrain.prom`; its folder exists.
        run_name: see `exposition`.
    """

    name = "log.metrics_file"

    def __init__(self, path: Path, *, run_name: str) -> None:
        self._path = path
        self._newest = _Newest(run_name)
        self._next_s = 0.0
        write_whole(path, "")  # a folder that is missing or closed is found before the first step

    def is_due(self) -> bool:
        """Say yes: a row that comes between two writes may hold what the next one lacks."""
        return True

    def update(self, row: Mapping[str, Value]) -> None:
        """Take a row, and rewrite the file where it is due."""
        self._newest.add(row)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            write_whole(self._path, self._newest.text())

    def close(self) -> None:
        """Write the last values and leave them."""
        write_whole(self._path, self._newest.text())


class PrometheusEndpoint:
    """Serves the metrics at http://127.0.0.1:PORT/metrics from a thread of its own; loopback alone.

    Args:
        port: to listen on.
        run_name: see `exposition`.

    Raises:
        OSError: where the port is in use.
    """

    name = "log.metrics_port"

    def __init__(self, port: int, *, run_name: str) -> None:
        self._newest = _Newest(run_name)
        self._text = self._newest.text()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5  # of a reader that sends nothing

            def do_GET(self) -> None:
                body = endpoint._text.encode()
                self.send_response(200 if self.path in ("/", "/metrics") else 404)
                self.send_header("Content-Type", _CONTENT_TYPE)
                self.end_headers()
                if self.path in ("/", "/metrics"):
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Print nothing: the console is the run's."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, name="dptrain-metrics", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._server.server_address[1])

    def is_due(self) -> bool:
        """Say yes: a reader may come at any time."""
        return True

    def update(self, row: Mapping[str, Value]) -> None:
        """Take a row; the next reader sees it."""
        self._newest.add(row)
        self._text = self._newest.text()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
