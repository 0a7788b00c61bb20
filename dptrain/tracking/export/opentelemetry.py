"""Metrics by the OpenTelemetry SDK where it is installed; its own OTEL_ variables say where they go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider

from dptrain.tracking.export.prometheus import numbers
from dptrain.tracking.jsonl import Value
from dptrain.version import __version__

_CLOSE_MS = 5000  # a collector that does not answer must not hold up the end of a run


class OpenTelemetryExport:
    """One gauge for each number of a row, named `dptrain.` and its key with dots.

    A provider that the program has set is used and left open. Else one is made that exports by OTLP over HTTP.

    Args:
        run_name: the attribute `run` of each value.

    Raises:
        ImportError: where the exporter is not installed.
    """

    name = "log.opentelemetry"

    def __init__(self, *, run_name: str) -> None:
        self._attributes = {"run": run_name}
        self._gauges: dict[str, Any] = {}
        self._own: MeterProvider | None = None
        provider = metrics.get_meter_provider()
        if not isinstance(provider, MeterProvider):
            from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
            from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

            provider = self._own = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
        self._meter = provider.get_meter("dptrain", __version__)

    def is_due(self) -> bool:
        """Say yes: the SDK exports when it likes."""
        return True

    def update(self, row: Mapping[str, Value]) -> None:
        """Set the gauges; the SDK exports them from its own thread."""
        for key, value in numbers(row).items():
            if key not in self._gauges:
                self._gauges[key] = self._meter.create_gauge("dptrain." + key.replace("/", "."))
            self._gauges[key].set(value, self._attributes)

    def close(self) -> None:
        """Export what is left, where the provider is this object's own."""
        if self._own is not None:
            self._own.shutdown(timeout_millis=_CLOSE_MS)
