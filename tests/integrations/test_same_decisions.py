"""One law everywhere: under a law that reads no clock each framework's loop has the batches of `dptrain train`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import dptrain
from dptrain.control.settings import ControlConfig
from dptrain.data import SampleStream
from dptrain.tracking.jsonl import read_rows
from tests.regression import build

NOISE = ControlConfig(law="noise", largest=128)
NUM_SAMPLES, MICRO, LEARNING_RATE = 4000, 4, 0.02
NOISE_OPTIONS = {"every": 1, "population": 960}
ADAPT_OPTIONS = {"control": NOISE, "max_samples": NUM_SAMPLES}


@pytest.fixture(scope="module")
def trainer_batches(tmp_path_factory):
    """Return the global batch size of each whole step of the trainer."""
    folder = tmp_path_factory.mktemp("run")
    optimizer = dptrain.OptimizerConfig(
        name="sgd",
        learning_rate=LEARNING_RATE,
        schedule="constant",
        warmup_samples=0,
        beta1=0.0,
        max_grad_norm=None,
        weight_decay=0.0,
    )
    config = dptrain.TrainConfig(
        device="cpu",
        run_dir=str(folder),
        global_batch_size=16,
        micro_batch_size=MICRO,
        max_samples=NUM_SAMPLES,
        control=NOISE,
        noise=dptrain.NoiseConfig(every=1),
        optimizer=optimizer,
        log=dptrain.LogConfig(tracker="none"),
    )
    dptrain.Trainer(config, task=build).run()
    batches = [row["batch/global"] for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert len(set(batches)) > 2, "there is something to get wrong"
    return batches[:-1]  # the last step is what is left of the run


class Samples(Dataset):
    """The samples in the order in which the trainer reads them."""

    def __init__(self):
        self.data = build().train_data
        self.order = SampleStream(len(self.data), seed=0).window(0, NUM_SAMPLES).tolist()

    def __len__(self):
        return NUM_SAMPLES

    def __getitem__(self, index):
        x, y = self.data[self.order[index]]
        return {"x": x, "y": y}


class Regression(nn.Module):
    """The task's model, which returns its loss, and notes the samples of each update."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = build().model
        self.batches = []
        self._seen = 0

    def forward(self, x, y):
        self._seen += len(x)
        return {"loss": ((self.net(x) - y) ** 2).mean()}

    def optimizer(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)
        optimizer.register_step_post_hook(self._close)
        return optimizer

    def _close(self, *_):
        self.batches.append(self._seen)
        self._seen = 0


def with_accelerate(_):
    accelerate = pytest.importorskip("accelerate")
    from dptrain.integrations.accelerate import BatchAdapter

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    inner = Regression()
    model, optimizer, loader = accelerator.prepare(inner, inner.optimizer(), DataLoader(Samples(), batch_size=MICRO))
    options = {"micro_batch_size": MICRO, **ADAPT_OPTIONS, **NOISE_OPTIONS}
    adapter = BatchAdapter(accelerator, model, optimizer, **options)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch)["loss"])
            adapter.step()
            optimizer.step()
            optimizer.zero_grad()
    adapter.remove()
    return inner.batches


def with_lightning(folder):
    lightning = pytest.importorskip("lightning.pytorch")
    from dptrain.integrations.lightning import BatchAdapter

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.inner = Regression()

        def training_step(self, batch):
            return self.inner(**batch)["loss"]

        def configure_optimizers(self):
            return self.inner.optimizer()

    module = Module()
    adapter = BatchAdapter(micro_batch_size=MICRO, **ADAPT_OPTIONS, **NOISE_OPTIONS)
    lightning.Trainer(
        callbacks=[adapter],
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        accumulate_grad_batches=4,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, DataLoader(Samples(), batch_size=MICRO))
    return module.inner.batches


def with_transformers(folder):
    transformers = pytest.importorskip("transformers")
    from dptrain.integrations.transformers import BatchAdapterMixin

    class AdaptiveTrainer(BatchAdapterMixin, transformers.Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset if dataset is None else dataset)

    model = Regression()
    optimizer = model.optimizer()
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    AdaptiveTrainer(
        model=model,
        args=args,
        train_dataset=Samples(),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        noise=NOISE_OPTIONS,
        **ADAPT_OPTIONS,
    ).train()
    return model.batches


@pytest.mark.parametrize("train", [with_accelerate, with_lightning, with_transformers])
def test_a_framework_decides_as_the_trainer_does(train, trainer_batches, tmp_path):
    """The same samples in the same order: the same global batch size at every step."""
    batches = train(tmp_path)
    assert batches[: len(trainer_batches)] == trainer_batches
