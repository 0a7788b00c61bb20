"""The meter and the adaptive batch in a loop on accelerate, on two real replicas."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dptrain.control.settings import ControlConfig
from dptrain.errors import ObservationError
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


def loop(kind, *, num_batches, accumulation, last_only=False, left_out=(), epochs=1):
    """One process; `step` is called after each micro-batch but those left out, or only after a window's last."""
    from accelerate import Accelerator

    from dptrain.integrations.accelerate import BatchAdapter, NoiseScaleMonitor

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = Regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loader = DataLoader(Samples(num_batches * MICRO), batch_size=MICRO)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if kind == "measure":
        monitor = NoiseScaleMonitor(accelerator, model, every=1)
    else:
        control = ControlConfig(law="schedule", schedule=SCHEDULE)
        monitor = BatchAdapter(accelerator, model, optimizer, control=control, micro_batch_size=MICRO, rule="linear")
    for _ in range(epochs):
        for number, batch in enumerate(loader):
            with accelerator.accumulate(model):
                if number in left_out:
                    continue
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients or not last_only:
                    monitor.step()
                optimizer.step()
                optimizer.zero_grad()
    monitor.remove()
    return monitor


@pytest.mark.parametrize("kind", ["measure", "adapt"])
@pytest.mark.parametrize("num_batches", [8, 3], ids=["whole windows", "data that ends before a window"])
def test_a_step_for_several_micro_batches_is_refused(kind, num_batches):
    """Where the clipping is, the number of micro-batches is unknown: |G|² and tr(Σ) would be 16 times too large."""
    pytest.importorskip("accelerate")
    with pytest.raises(ObservationError, match=r"after each accelerator\.backward"):
        loop(kind, num_batches=num_batches, accumulation=4, last_only=True)


def test_micro_batches_that_are_left_out_are_no_reason():
    """A loop may skip some, accumulate none, or have data for one; only a step of one small batch is dropped."""
    pytest.importorskip("accelerate")
    assert loop("measure", num_batches=12, accumulation=4, left_out=[5]).meter.steps_dropped == 0
    assert loop("measure", num_batches=6, accumulation=1, left_out=[2, 3], last_only=True).meter.steps_dropped == 4
    assert loop("measure", num_batches=1, accumulation=4, epochs=3).meter.steps_dropped == 3
    assert loop("adapt", num_batches=13, accumulation=2).as_metrics()["progress/samples"] == 13 * MICRO


def test_adapting_goes_on_from_a_run_that_measured():
    """What was measured is taken over, and the batch begins with its first window, with a warning."""
    pytest.importorskip("accelerate")
    measured = loop("measure", num_batches=8, accumulation=2)
    adapting = loop("adapt", num_batches=0, accumulation=2)
    with pytest.warns(UserWarning, match="no adaptive batch"):
        adapting.load_state_dict(measured.state_dict())
    assert adapting.state_dict()["meter"] == measured.state_dict()["meter"]
    assert adapting.as_metrics()["batch/accumulation_steps"] == 2
