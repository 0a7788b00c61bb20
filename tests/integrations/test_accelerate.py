"""The meter and the adaptive batch in a loop on accelerate, on two real replicas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dptrain.control.settings import ControlConfig
from tests.integrations.plain import Regression, Samples, follows_sgd, measured_by_hand, parameters_of, recorded
from tests.replicas import run_replicas

MICRO, RATE = 4, 0.05


def train(kind, *, epochs=2, accumulation=3, clip=None, schedule=None, save_in=None, resume=False, every=1):
    """A plain loop on accelerate with 13 batches an epoch for each rank, so that the last window is short."""
    from accelerate import Accelerator

    from dptrain.integrations.accelerate import BatchAdapter, NoiseScaleMonitor

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = Regression()
    records = recorded(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10**6)
    loader = DataLoader(Samples(13 * MICRO * accelerator.num_processes), batch_size=MICRO)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    monitor = None
    if kind == "measure":
        monitor = NoiseScaleMonitor(accelerator, model, every=every)
    if kind == "adapt":
        control = ControlConfig(law="schedule", schedule=schedule)
        monitor = BatchAdapter(accelerator, model, optimizer, control=control, micro_batch_size=MICRO, rule="linear")
    if resume:
        accelerator.load_state(save_in)
    for _ in range(epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if monitor is not None:
                    monitor.step()
                if clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    if save_in and not resume:
        accelerator.save_state(save_in)
    found = {
        "records": records,
        "metrics": monitor and monitor.as_metrics(),
        "state": monitor and monitor.state_dict(),
        "accumulation": accelerator.gradient_accumulation_steps,
        "rates": [group["lr"] for group in optimizer.param_groups],
    }
    if monitor is not None:
        monitor.remove()
    return {**found, "parameters": parameters_of(model)}


# 8 samples are a micro-batch on each rank. A decision rests on the steps before the one under way.
SCHEDULE = "0:16 32:32 80:64 160:8"
PLANNED = [2, 2, 2, 4, 4, 8, 8, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
TAKEN = [2, 2, 2, 4, 3, 8, 5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]


def one_after_another(rank, world_size, folder):
    adaptive = {"kind": "adapt", "accumulation": 2, "schedule": SCHEDULE, "save_in": folder}
    return {
        "bare": train(None),
        "measured": train("measure"),
        "clipped": train("measure", clip=0.5),
        "adaptive": train(**adaptive, epochs=3),
        "resumed": train(**adaptive, epochs=0, resume=True),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("accelerate")
    return run_replicas(one_after_another, world_size=2, args=(str(tmp_path_factory.mktemp("state")),))


def by_hand(runs, name):
    return measured_by_hand(Regression(), [run[name]["records"] for run in runs])


def pair(run):
    return run["metrics"]["noise_scale/trace"], run["metrics"]["noise_scale/grad_sq"]


@pytest.mark.parametrize("name", ["measured", "clipped", "adaptive"])
def test_the_pair_is_that_of_plain_gradients(runs, name):
    """Accumulated, with a short last window, clipped and with a changing batch: as by hand, the same on all ranks."""
    expected, _ = by_hand(runs, name)
    assert pair(runs[0][name]) == pytest.approx(expected, rel=1e-4)
    assert runs[0][name]["metrics"] == runs[1][name]["metrics"]


def test_training_is_bit_identical_with_and_without_the_monitor(runs):
    """Measuring changes no parameter in any bit."""
    assert runs[0]["bare"]["parameters"] == runs[0]["measured"]["parameters"]


def test_the_window_follows_the_decisions(runs):
    """Each window is as long as the schedule says at the position before it; only an epoch's end cuts one short."""
    _, steps = by_hand(runs, "adaptive")
    assert [micro_steps for _, micro_steps, _ in steps] == [[size, size] for size in TAKEN]
    assert runs[0]["adaptive"]["metrics"]["progress/samples"] == 8 * sum(TAKEN)


def test_updates_use_synchronised_gradients_and_a_rate_that_never_compounds(runs):
    """Every update goes base rate × B/B0 down the mean over both ranks; between steps the groups hold the base rate."""
    _, steps = by_hand(runs, "adaptive")

    def rate(step):
        # Accelerate divides a window that an epoch cuts short by its planned length all the same.
        return RATE * PLANNED[step] / PLANNED[0] * TAKEN[step] / PLANNED[step]

    assert follows_sgd(steps, rate=rate, last=runs[0]["adaptive"]["parameters"])
    assert runs[0]["adaptive"]["rates"] == [RATE]


def test_save_state_and_load_state_carry_meter_and_batch(runs):
    """After `load_state` the metrics, the controller and accelerate's own setting are those that were saved."""
    saved, loaded = runs[0]["adaptive"], runs[0]["resumed"]
    assert loaded["state"] == saved["state"]
    assert loaded["accumulation"] == saved["accumulation"] == 1
    assert loaded["parameters"] == saved["parameters"]
