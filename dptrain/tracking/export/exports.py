"""All exports of a run behind one object; one that fails is reported once and left out, and training goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from dptrain.tracking.export.heartbeat import Heartbeat
from dptrain.tracking.export.prometheus import PrometheusEndpoint, PrometheusFile
from dptrain.tracking.jsonl import Value


class Export(Protocol):
    """Something that shows the newest row to another program. Methods may raise OSError."""

    name: str

    def is_due(self) -> bool:
        """Whether a row would change what is shown; where it would not, none is made for this export."""

    def update(self, row: Mapping[str, Value]) -> None:
        """Take a row of `metrics.jsonl`."""

    def close(self) -> None:
        """Release files, ports and threads."""


class Exports:
    """Hands each row to all exports.

    Args:
        exports: in the order of the calls.
        warn: takes a sentence for the user.
    """

    def __init__(self, exports: list[Export], *, warn: Callable[[str], None]) -> None:
        self._exports = exports
        self._warn = warn

    def is_due(self) -> bool:
        """Whether any export would show a row now."""
        return any(export.is_due() for export in self._exports)

    def update(self, row: Mapping[str, Value]) -> None:
        """Hand on a row."""
        for export in list(self._exports):
            try:
                export.update(row)
            except OSError as error:
                self._exports.remove(export)
                self._warn(f"{export.name} is switched off: {error.strerror or error}; training goes on")
                with contextlib.suppress(OSError):  # most likely the same one, which was said
                    export.close()

    def close(self) -> None:
        """Close all exports; one that fails is reported, and the others are closed."""
        while self._exports:
            export = self._exports.pop()
            try:
                export.close()
            except OSError as error:
                self._warn(f"{export.name} is not complete: {error.strerror or error}")


def start_exports(
    *,
    heartbeat: Path,
    metrics_file: str | None,
    metrics_port: int | None,
    opentelemetry: bool,
    run_name: str,
    warn: Callable[[str], None],
) -> Exports:
    """Start the exports that the settings ask for; one that cannot start is reported and left out.

    Args:
        heartbeat: file that shows that the run is alive; always written.
        metrics_file: text file for Prometheus' node exporter, or None.
        metrics_port: port on loopback where Prometheus may read, or None.
        opentelemetry: whether metrics go to OpenTelemetry, as its own OTEL_ variables say.
        run_name: attached to each metric.
        warn: takes a sentence for the user.
    """

    def otel() -> Export:
        from dptrain.tracking.export.opentelemetry import OpenTelemetryExport

        return OpenTelemetryExport(run_name=run_name)

    wanted: list[tuple[str, Callable[[], Export]]] = [("the heartbeat", lambda: Heartbeat(heartbeat))]
    if metrics_file is not None:
        wanted.append(("log.metrics_file", lambda: PrometheusFile(Path(metrics_file), run_name=run_name)))
    if metrics_port is not None:
        wanted.append(("log.metrics_port", lambda: PrometheusEndpoint(metrics_port, run_name=run_name)))
    if opentelemetry:
        wanted.append(("log.opentelemetry", otel))
    started: list[Export] = []
    for name, start in wanted:
        try:
            started.append(start())
        except (OSError, ImportError) as error:
            reason = getattr(error, "strerror", None) or error
            warn(f"{name} is not available: {reason}; training goes on without it")
    return Exports(started, warn=warn)
