"""Where operations read a run: a heartbeat file, Prometheus, OpenTelemetry."""

from dptrain.tracking.export.exports import Exports, start_exports

__all__ = ["Exports", "start_exports"]
