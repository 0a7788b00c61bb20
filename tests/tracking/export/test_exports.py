"""What operations read of a run: heartbeat, Prometheus, OpenTelemetry; and that none of them ends a run."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import urllib.error
import urllib.request

import pytest

from dptrain.tracking.export import heartbeat as heartbeat_file
from dptrain.tracking.export import start_exports
from dptrain.tracking.export.exports import Exports
from dptrain.tracking.export.heartbeat import Heartbeat
from dptrain.tracking.export.prometheus import PrometheusEndpoint, PrometheusFile, exposition, metric_name

ROW = {
    "kind": "train",
    "step": 7,
    "progress/samples": 448,
    "train/loss": 0.25,
    "noise_scale/value": None,
    "noise_scale/state": "not resolved yet",
    "train/grad_norm": float("nan"),
}
LINE = re.compile(r'[a-zA-Z_][a-zA-Z0-9_]*\{run="(?:[^"\\\n]|\\["\\n])*"\} [-+0-9.e]+')


def values_of(text):
    """The metrics in a text of the exposition format, each line checked against its grammar."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("# TYPE "):
            assert LINE.fullmatch(line), line
            found[line.partition("{")[0]] = float(line.rpartition(" ")[2])
    return found


def test_numbers_become_gauges_and_nothing_else_does(tmp_path):
    """Finite numbers are in the file under their names; text, unknown and not finite values are not."""
    export = PrometheusFile(tmp_path / "run.prom", run_name="a")
    export.update(ROW)
    found = values_of((tmp_path / "run.prom").read_text())
    assert found == {"dptrain_step": 7, "dptrain_progress_samples": 448, "dptrain_train_loss": 0.25}
    export.update({**ROW, "train/loss": None, "train/grad_norm": 2.0})
    export.close()
    found = values_of((tmp_path / "run.prom").read_text())
    assert "dptrain_train_loss" not in found
    assert found["dptrain_train_grad_norm"] == 2.0
    assert [path.name for path in tmp_path.iterdir()] == ["run.prom"]


def test_any_name_of_a_run_is_a_label():
    """Quotes, backslashes and line breaks in a name are escaped, and signs in a key become underscores."""
    text = exposition({"eval/bits-per byte": 1e-9}, run_name='a"b\\c\nd')
    assert values_of(text) == {"dptrain_eval_bits_per_byte": 1e-9}
    assert metric_name("noise_scale/value") == "dptrain_noise_scale_value"


def test_the_endpoint_serves_the_newest_row_on_loopback_alone():
    """A reader at /metrics gets what came last, elsewhere a 404; the port is not open to other machines."""
    endpoint = PrometheusEndpoint(0, run_name="a")
    try:
        endpoint.update(ROW)
        endpoint.update({**ROW, "step": 8})
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert values_of(answer.read().decode())["dptrain_step"] == 8
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/secret", timeout=10)
        assert endpoint._server.server_address[0] == "127.0.0.1"
    finally:
        endpoint.close()


def test_a_heartbeat_lives_as_long_as_the_run(tmp_path, monkeypatch):
    """It tells pid, step and time, is rewritten when it is due, and is gone at the end."""
    monkeypatch.setattr(heartbeat_file, "_EVERY_S", 0.0)
    beat = Heartbeat(tmp_path / "heartbeat.json")
    for step in (7, 8):
        beat.update({**ROW, "step": step})
        notes = json.loads((tmp_path / "heartbeat.json").read_text())
        assert (notes["pid"], notes["step"], notes["samples"]) == (os.getpid(), step, 448)
    beat.close()
    assert list(tmp_path.iterdir()) == []


def test_opentelemetry_gets_each_number():
    """With the program's own provider each number arrives as a gauge with the run as its attribute."""
    from opentelemetry import metrics
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    from dptrain.tracking.export.opentelemetry import OpenTelemetryExport

    reader = InMemoryMetricReader()
    metrics.set_meter_provider(MeterProvider([reader]))
    export = OpenTelemetryExport(run_name="a")
    export.update(ROW)
    export.update({**ROW, "step": 8})
    points = {
        metric.name: (point.value, dict(point.attributes))
        for resource in reader.get_metrics_data().resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        for point in metric.data.data_points
    }
    export.close()
    assert points["dptrain.step"] == (8, {"run": "a"})
    assert points["dptrain.train.loss"] == (0.25, {"run": "a"})
    assert "dptrain.noise_scale.value" not in points


def test_what_does_not_start_or_breaks_is_reported_once(tmp_path):
    """A port in use, a folder that is missing, and a file that fails later are each a sentence; the others go on."""
    notes = []
    with socket.create_server(("127.0.0.1", 0)) as taken:
        exports = start_exports(
            heartbeat=tmp_path / "run" / "heartbeat.json",
            metrics_file=str(tmp_path / "missing" / "run.prom"),
            metrics_port=taken.getsockname()[1],
            opentelemetry=False,
            run_name="a",
            warn=notes.append,
        )
    assert [sentence.partition(" is not available")[0] for sentence in notes] == [
        "log.metrics_file",
        "log.metrics_port",
    ]
    notes.clear()
    exports.update(ROW)
    exports.update(ROW)
    exports.close()
    assert notes == ["the heartbeat is switched off: No such file or directory; training goes on"]


def test_an_export_that_fails_at_the_end_is_reported_and_the_others_are_closed(tmp_path):
    """The folder of the metrics is gone when the run ends: a sentence, and the heartbeat is removed all the same."""
    (tmp_path / "node").mkdir()
    notes = []
    exports = start_exports(
        heartbeat=tmp_path / "heartbeat.json",
        metrics_file=str(tmp_path / "node" / "run.prom"),
        metrics_port=None,
        opentelemetry=False,
        run_name="a",
        warn=notes.append,
    )
    exports.update(ROW)
    shutil.rmtree(tmp_path / "node")
    exports.close()
    assert notes == ["log.metrics_file is not complete: No such file or directory"]
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_switched_off_is_closed(tmp_path, monkeypatch):
    """A heartbeat that can no longer be written is removed: it would look like that of a run that hangs."""
    monkeypatch.setattr(heartbeat_file, "_EVERY_S", 0.0)
    exports = Exports([Heartbeat(tmp_path / "heartbeat.json")], warn=lambda _: None)
    exports.update(ROW)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(heartbeat_file, "write_whole", full)
    exports.update(ROW)
    assert list(tmp_path.iterdir()) == []
