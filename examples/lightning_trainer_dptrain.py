"""The training of `lightning_trainer.py` with a batch that follows the noise scale; the lines with dptrain are new."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dptrain.integrations.lightning import BatchAdapter

micro_batch_size, epochs, learning_rate = 8, 4, 0.05


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=learning_rate, momentum=0.9)


seed_everything(0)
centres = torch.randn(4, 20)
labels = torch.randint(4, (1024,))
data = TensorDataset(centres[labels] + 2 * torch.randn(1024, 20), labels)
loader = DataLoader(data, batch_size=micro_batch_size, shuffle=True)

adapter = BatchAdapter(micro_batch_size=micro_batch_size)
trainer = Trainer(
    callbacks=[adapter],
    accelerator="cpu",
    strategy="ddp",
    devices=2,
    max_epochs=epochs,
    gradient_clip_val=1.0,
    logger=CSVLogger("runs", name="lightning"),
    log_every_n_steps=10,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Classifier(), loader)
print({name: round(float(value), 4) for name, value in trainer.logged_metrics.items()})
