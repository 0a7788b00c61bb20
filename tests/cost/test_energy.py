"""The energy counter, on a driver library made up here: none of the machines that test this has a GPU."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from dptrain.cost.energy import EnergyCounter


@pytest.fixture
def driver(monkeypatch):
    """A driver library with one GPU whose counter the test moves."""
    nvml = types.ModuleType("pynvml")
    nvml.NVMLError = type("NVMLError", (Exception,), {})
    nvml.millijoules, nvml.asked = 5000, []

    def read(handle):
        if nvml.millijoules is None:
            raise nvml.NVMLError
        nvml.asked.append(handle)
        return nvml.millijoules

    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    nvml.nvmlDeviceGetTotalEnergyConsumption = read
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(uuid="ab-12"))
    return nvml


def test_a_cpu_has_no_figure():
    """NaN, which makes NaN of every sum it goes into."""
    counter = EnergyCounter(torch.device("cpu"))
    assert math.isnan(counter.take_j())
    assert math.isnan(counter.take_j(at_once=True))


def test_joules_since_the_last_reading(driver):
    """The counter is millijoules since the driver was loaded; what was drawn before the run is not the run's."""
    now = [0.0]
    counter = EnergyCounter(torch.device("cuda", 0), clock=lambda: now[0])
    now[0], driver.millijoules = 2.0, 8500
    assert counter.take_j() == 3.5
    assert set(driver.asked) == {"GPU-ab-12"}


def test_it_asks_once_a_second_and_loses_nothing(driver):
    """Readings in between are 0, and theirs are in the next; the end of a run asks at once."""
    now = [0.0]
    counter = EnergyCounter(torch.device("cuda", 0), clock=lambda: now[0])
    asked = len(driver.asked)
    total = 0.0
    for tick in range(1, 41):
        now[0], driver.millijoules = tick / 10, 5000 + 100 * tick
        total += counter.take_j()
    assert len(driver.asked) - asked <= 4
    assert total + counter.take_j(at_once=True) == pytest.approx(4.0)


def test_without_a_driver_or_a_counter_there_is_no_figure(driver, monkeypatch):
    """An old GPU, a slice of one, a driver that is gone: NaN, and the run goes on."""
    counter = EnergyCounter(torch.device("cuda", 0))
    driver.millijoules = None
    assert math.isnan(counter.take_j(at_once=True))
    assert math.isnan(EnergyCounter(torch.device("cuda", 0)).take_j())
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert math.isnan(EnergyCounter(torch.device("cuda", 0)).take_j())
