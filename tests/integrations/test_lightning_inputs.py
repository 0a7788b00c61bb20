"""How many samples a Lightning batch has, and what closes a step, in a Trainer of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dptrain
from dptrain.control.settings import ControlConfig
from dptrain.errors import ObservationError
from tests.integrations.plain import DIM

pytest.importorskip("lightning", reason="Lightning is not installed: pip install 'dptrain[lightning]'")

from lightning.pytorch import LightningModule, Trainer

from dptrain.integrations.lightning import BatchAdapter, NoiseScaleMonitor

MICRO, WINDOW = 4, 2
X = torch.randn(10 * MICRO, DIM, generator=torch.Generator().manual_seed(1))
Y = X[:, :1] + torch.randn(len(X), 1, generator=torch.Generator().manual_seed(2))


class Module(LightningModule):
    """A linear regression that takes its batch in any form."""

    def __init__(self, loss=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(DIM, 1)
        self.loss = loss or (lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).mean())

    def training_step(self, batch):
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Recurrent(Module):
    """Holds a module that takes time first."""

    def __init__(self):
        super().__init__()
        self.unused = nn.LSTM(2, 2)


def fit(callback, loader, *, module=None, epochs=1, window=WINDOW):
    trainer = Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=window,
        callbacks=[callback] if callback else [],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module or Module(), loader)
    return trainer


def pair(callback):
    metrics = callback.as_metrics()
    return metrics["noise_scale/trace"], metrics["noise_scale/grad_sq"]


def detection(samples):
    """Return a list of images and one of records, as detection models take them."""
    return [x for x, _ in samples], [{"target": y} for _, y in samples]


def detection_loss(net, batch):
    images, targets = batch
    return torch.stack([((net(x) - t["target"]) ** 2).mean() for x, t in zip(images, targets, strict=True)]).mean()


def loader(**options):
    return DataLoader(TensorDataset(X, Y), MICRO, **options)


def time_first(samples):
    x, y = torch.utils.data.default_collate(samples)
    return x.T.contiguous(), y.T.contiguous().expand(DIM, MICRO)


@pytest.mark.parametrize(
    ("collate", "module"),
    [(detection, Module(detection_loss)), (time_first, Module(lambda net, batch: net(batch[0].T).mean()))],
    ids=["detection", "time first"],
)
def test_batches_that_leave_their_size_in_doubt_are_refused(collate, module):
    """Lists of images, and tensors that do not begin with the samples: the error names the argument."""
    with pytest.raises(ObservationError, match=r"NoiseScaleMonitor\(micro_batch_size=\)"):
        fit(NoiseScaleMonitor(every=1), loader(collate_fn=collate), module=module)


def test_modules_that_take_time_first_are_refused():
    """The first dimension of their inputs may be time."""
    with pytest.raises(ObservationError, match=r"LSTM with batch_first=False.*NoiseScaleMonitor"):
        fit(NoiseScaleMonitor(every=1), loader(), module=Recurrent())


@pytest.mark.parametrize("given", [lambda batch: len(batch[0]), MICRO], ids=["a function of the batch", "a number"])
def test_given_samples_are_believed(given):
    """Lists of images measure what stacked ones do."""
    stacked, listed = NoiseScaleMonitor(every=1), NoiseScaleMonitor(every=1, micro_batch_size=given)
    fit(stacked, loader())
    fit(listed, loader(collate_fn=detection), module=Module(detection_loss))
    assert pair(listed) == pytest.approx(pair(stacked), rel=1e-5)


def test_an_epochs_last_batch_has_its_own_size():
    """Read by both callbacks, off a loader whose size is that of the others."""
    short = DataLoader(TensorDataset(X[:-1], Y[:-1]), MICRO)
    monitor, adapter = (
        NoiseScaleMonitor(every=1),
        BatchAdapter(micro_batch_size=MICRO, control=ControlConfig(law="constant")),
    )
    for callback in (monitor, adapter):
        fit(callback, short)
    wrong = NoiseScaleMonitor(every=1, micro_batch_size=MICRO)
    fit(wrong, short)
    assert pair(monitor) == pair(adapter) != pair(wrong)


def test_the_batch_that_adapts_is_counted_as_it_was_planned():
    """Lists of images need no second argument: the law's `micro_batch_size` is the meter's too."""
    control = ControlConfig(law="constant")
    stacked, listed = (BatchAdapter(micro_batch_size=MICRO, control=control) for _ in range(2))
    fit(stacked, loader())
    fit(listed, loader(collate_fn=detection), module=Module(detection_loss))
    assert pair(listed) == pytest.approx(pair(stacked), rel=1e-5)


def test_a_second_fit_begins_with_the_first_window(tmp_path):
    """Also after one that went on from a checkpoint."""
    control = ControlConfig(law="schedule", schedule="0:8 16:32")
    adapter = BatchAdapter(micro_batch_size=MICRO, control=control, rule="linear")
    fit(adapter, loader()).save_checkpoint(tmp_path / "end.ckpt")
    begun = adapter.state_dict()
    assert adapter.adapter.accumulation_steps > WINDOW
    adapter.load_state_dict(begun)
    for _ in range(2):
        fit(adapter, loader())
    assert adapter.state_dict() == begun


class Manual(Module):
    """Accumulates and steps by itself."""

    def __init__(self, closure=None):
        super().__init__()
        self.automatic_optimization = False
        self.closure = {} if closure is None else {"closure": closure}
        self.meter = None

    def on_train_start(self):
        self.meter = dptrain.attach(self.net, optimizer=self.optimizers(), every=1)

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(self.net, batch) / WINDOW)
        if batch_idx % WINDOW == WINDOW - 1:
            self.optimizers().step(**self.closure)
            self.optimizers().zero_grad()


def test_manual_optimization_closes_the_step():
    """Lightning hands an empty closure on; one of the user's own is refused all the same."""
    module, monitor = Manual(), NoiseScaleMonitor(every=1)
    fit(None, loader(), module=module, window=1)
    fit(monitor, loader())
    read = module.meter.read()
    assert (read.noise_trace, read.grad_sq_norm) == pytest.approx(pair(monitor), rel=1e-5)
    with pytest.raises(ObservationError, match="closure runs its backward passes"):
        fit(None, loader(), module=Manual(closure=lambda: None), window=1)
