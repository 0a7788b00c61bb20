"""The Lightning callbacks in Lightning's own Trainer, on two real replicas under DDP."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from dptrain.control.settings import ControlConfig
from dptrain.errors import ConfigError, ObservationError
from tests.integrations.plain import Regression, Samples, follows_sgd, measured_by_hand, parameters_of, recorded
from tests.replicas import run_replicas

MICRO, RATE = 4, 0.05

# 8 samples are a micro-batch on each rank of 13 an epoch, whose end cuts the fifth and the ninth window short.
SCHEDULE = "0:16 32:32 200:8"
TAKEN = [2, 2, 2, 4, 3, 4, 4, 4, 1, *[1] * 13]
PLANNED = [2, 2, 2, 4, 4, 4, 4, 4, 4, *[1] * 13]


def lightning_module(model, *, manual=False):
    from lightning.pytorch import LightningModule

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = model
            self.automatic_optimization = not manual

        def training_step(self, batch):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=RATE)

    return Module()


def train(callbacks, *, world_size=2, folder, checkpoint=None, **settings):
    """13 batches an epoch for each rank; returns what the model saw and what was logged."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import CSVLogger

    model = Regression()
    records = recorded(model)
    trainer = Trainer(
        **{"strategy": "ddp", "devices": world_size, "max_epochs": 2, **settings},
        accelerator="cpu",
        callbacks=callbacks,
        logger=CSVLogger(folder),
        log_every_n_steps=2,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lightning_module(model), DataLoader(Samples(13 * MICRO * world_size), MICRO), ckpt_path=checkpoint)
    return {
        "records": records,
        "parameters": parameters_of(model),
        "metrics": callbacks[0].as_metrics() if callbacks else None,
        "state": callbacks[0].state_dict() if callbacks else None,
        "logged": {name: float(value) for name, value in trainer.logged_metrics.items()},
        "accumulation": trainer.accumulate_grad_batches,
        "rates": [group["lr"] for group in trainer.optimizers[0].param_groups],
        "hooks": sum(len(p._backward_hooks or {}) for p in model.parameters()),
    }, trainer


def one_after_another(rank, world_size, folder):
    from dptrain.integrations.lightning import BatchAdapter, NoiseScaleMonitor

    def adaptive():
        control = ControlConfig(law="schedule", schedule=SCHEDULE)
        return [BatchAdapter(micro_batch_size=MICRO, control=control, rule="linear")]

    measure = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "folder": folder}
    found = {
        "bare": train([], **measure)[0],
        "measured": train([NoiseScaleMonitor(every=1)], **measure)[0],
        "sparse": train([NoiseScaleMonitor(every=2)], **measure)[0],
        "whole": train(adaptive(), accumulate_grad_batches=2, folder=folder, max_epochs=3)[0],
    }
    found["half"], trainer = train(adaptive(), accumulate_grad_batches=2, folder=folder, max_epochs=2)
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    found["resumed"] = train(
        adaptive(), accumulate_grad_batches=2, folder=folder, max_epochs=3, checkpoint=f"{folder}/half.ckpt"
    )[0]
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'dptrain[lightning]'")
    return run_replicas(one_after_another, world_size=2, args=(str(tmp_path_factory.mktemp("lightning")),))


def by_hand(runs, name):
    return measured_by_hand(Regression(), [run[name]["records"] for run in runs])


@pytest.mark.parametrize("name", ["measured", "whole"])
def test_the_pair_is_that_of_plain_gradients(runs, name):
    """Clipped, with short last windows and with a changing batch: as by hand, the same on both ranks."""
    expected, _ = by_hand(runs, name)
    metrics = runs[0][name]["metrics"]
    assert (metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]) == pytest.approx(expected, rel=1e-4)
    assert metrics == runs[1][name]["metrics"]


def test_steps_between_measured_ones_cost_nothing_and_count_for_nothing(runs):
    """With every=2 the pair is that of every other step, and training is the same to the bit."""
    expected, _ = measured_by_hand(Regression(), [run["sparse"]["records"] for run in runs], every=2)
    metrics = runs[0]["sparse"]["metrics"]
    assert (metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]) == pytest.approx(expected, rel=1e-4)
    assert runs[0]["sparse"]["parameters"] == runs[0]["bare"]["parameters"]


def test_training_is_bit_identical_with_and_without_the_monitor(runs):
    """Measuring changes no parameter in any bit, and leaves no hook behind."""
    assert runs[0]["bare"]["parameters"] == runs[0]["measured"]["parameters"]
    assert runs[0]["measured"]["hooks"] == 0


def test_the_trainers_logger_gets_flat_floats(runs):
    """The keys `noise_scale/…` and `batch/…` reach Lightning's own logging."""
    assert {"noise_scale/trace", "noise_scale/grad_sq", "noise_scale/lower"} <= set(runs[0]["measured"]["logged"])
    assert {"noise_scale/trace", "batch/global"} <= set(runs[0]["whole"]["logged"])


def test_windows_change_after_any_batch(runs):
    """Two micro-batches become four after six, which four do not divide; only an epoch's end cuts a window short."""
    _, steps = by_hand(runs, "whole")
    assert [micro_steps for _, micro_steps, _ in steps] == [[size, size] for size in TAKEN]


def test_updates_use_synchronised_gradients_and_a_rate_that_never_compounds(runs):
    """Every update goes base rate × B/B0 down the mean over both ranks, also after each change."""
    _, steps = by_hand(runs, "whole")

    def rate(step):
        # Lightning divides a window that an epoch cuts short by its planned length all the same.
        return RATE * PLANNED[step] / PLANNED[0] * TAKEN[step] / PLANNED[step]

    assert follows_sgd(steps, rate=rate, last=runs[0]["whole"]["parameters"])
    assert runs[0]["whole"]["rates"] == [RATE]


def test_a_checkpoint_carries_meter_and_batch(runs):
    """Two epochs, saved and gone on with for a third, end in the bits of three epochs in one go."""
    assert runs[0]["resumed"]["parameters"] == runs[0]["whole"]["parameters"]
    assert runs[0]["resumed"]["state"] == runs[0]["whole"]["state"]
    assert runs[0]["resumed"]["accumulation"] == runs[0]["whole"]["accumulation"]


def test_one_process_is_a_case_of_many(tmp_path):
    """Without DDP the accumulated micro-batches are the small batches."""
    pytest.importorskip("lightning")
    from dptrain.integrations.lightning import NoiseScaleMonitor

    run, _ = train(
        [NoiseScaleMonitor(every=1)],
        world_size=1,
        strategy="auto",
        devices=1,
        accumulate_grad_batches=4,
        max_epochs=1,
        folder=tmp_path,
    )
    expected, _ = measured_by_hand(Regression(), [run["records"]])
    assert (run["metrics"]["noise_scale/trace"], run["metrics"]["noise_scale/grad_sq"]) == pytest.approx(
        expected, rel=1e-4
    )


def test_refuses_what_it_cannot_see():
    """Manual optimization, sharding strategies and a second hand on the accumulation are refused with the reason."""
    pytest.importorskip("lightning")
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import GradientAccumulationScheduler
    from lightning.pytorch.strategies import FSDPStrategy

    from dptrain.integrations.lightning import BatchAdapter, NoiseScaleMonitor

    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    with pytest.raises(ObservationError, match="manual"):
        NoiseScaleMonitor().on_fit_start(Trainer(**quiet), lightning_module(Regression(), manual=True))
    trainer = Trainer(**quiet)
    trainer.strategy.__class__ = FSDPStrategy
    with pytest.raises(ObservationError, match="FSDPStrategy"):
        NoiseScaleMonitor().on_fit_start(trainer, lightning_module(Regression()))
    trainer = Trainer(**quiet, callbacks=[GradientAccumulationScheduler({0: 1})])
    adaptive = BatchAdapter(micro_batch_size=MICRO)
    with pytest.raises(ConfigError, match="GradientAccumulationScheduler"):
        adaptive.on_fit_start(trainer, lightning_module(Regression()))
