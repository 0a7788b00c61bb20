"""How long measuring takes, and that the events it takes on a GPU do not pile up."""

from __future__ import annotations

import time

import torch

from dptrain.observe.stopwatch import _DRAIN_AT, Stopwatch


class Device:
    """A stream of events that is a number of events behind, each a millisecond after the one before."""

    def __init__(self, *, behind):
        self.behind = behind
        self.num_recorded = self.num_made = 0

    def event(self):
        self.num_made += 1
        return Event(self)


class Event:
    def __init__(self, device):
        self._device = device

    def record(self):
        self._device.num_recorded += 1
        self.place = self._device.num_recorded

    def query(self):
        return self.place + self._device.behind <= self._device.num_recorded

    def elapsed_time(self, other):
        return float(other.place - self.place)


def stopwatch_on(device, monkeypatch):
    monkeypatch.setattr(Stopwatch, "_new_event", staticmethod(device.event))
    return Stopwatch(torch.device("cuda"))


def test_events_do_not_pile_up_where_nobody_takes_the_time(monkeypatch):
    """After 50,000 pairs that nobody asked about, no more events live than the device has work for, and a few."""
    device = Device(behind=600)
    stopwatch = stopwatch_on(device, monkeypatch)
    for _ in range(50_000):
        stopwatch.stop(stopwatch.start())
    assert stopwatch.num_pending <= 300 + _DRAIN_AT
    assert device.num_made <= 2 * (300 + _DRAIN_AT) + 2
    device.behind = 0
    assert abs(stopwatch.take() - 50.0) < 1e-6
    assert stopwatch.num_pending == 0


def test_a_device_that_is_behind_is_not_waited_for(monkeypatch):
    """Time that the device has not spent yet comes with a later call."""
    device = Device(behind=1000)
    stopwatch = stopwatch_on(device, monkeypatch)
    stopwatch.stop(stopwatch.start())
    assert stopwatch.take() == 0.0
    device.behind = 0
    assert stopwatch.take() == 0.001


def test_on_a_cpu_the_clock_counts():
    """Seconds between start and stop add up, and are taken once."""
    stopwatch = Stopwatch(torch.device("cpu"))
    began = stopwatch.start()
    time.sleep(0.01)
    stopwatch.stop(began)
    assert stopwatch.take() >= 0.01
    assert stopwatch.take() == 0.0
