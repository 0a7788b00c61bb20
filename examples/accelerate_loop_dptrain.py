"""The loop of `accelerate_loop.py` with a batch that follows the noise scale; the lines with dptrain are new."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dptrain.integrations.accelerate import BatchAdapter

micro_batch_size, epochs, learning_rate = 8, 4, 0.05

accelerator = Accelerator(gradient_accumulation_steps=1)
torch.manual_seed(0)
centres = torch.randn(4, 20)
labels = torch.randint(4, (1024,))
data = TensorDataset(centres[labels] + 2 * torch.randn(1024, 20), labels)

model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
loader = DataLoader(data, batch_size=micro_batch_size, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
adapter = BatchAdapter(accelerator, model, optimizer, micro_batch_size=micro_batch_size)

for epoch in range(epochs):
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), y)
            accelerator.backward(loss)
            adapter.step()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    batch, scale = adapter.adapter.global_batch_size, adapter.meter.read()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, batch {batch}, noise scale {scale}")

adapter.remove()
accelerator.end_training()
