"""The script of `plain_ddp.py` with a batch that follows the noise scale; the lines with dptrain or adapter are new."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dptrain

batch_size, block_size, gradient_accumulation_steps = 8, 32, 2
n_embd, n_head, n_layer = 32, 4, 2
learning_rate, grad_clip = 3e-3, 1.0
max_iters, log_interval = 60, 20

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
if device == "cuda":
    device = f"cuda:{local_rank}"
    torch.cuda.set_device(device)
torch.manual_seed(1337)

# A text of forty made-up words over the letters 1 … 8, with 0 for the space between them.
write = torch.Generator().manual_seed(0)
words = [[*torch.randint(1, 9, (length % 5 + 2,), generator=write).tolist(), 0] for length in range(40)]
text = [letter for word in torch.randint(40, (20_000,), generator=write) for letter in words[word]]
data, vocabulary_size = torch.tensor(text), 9
draw = torch.Generator().manual_seed(rank)


def get_batch() -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(data) - block_size - 1, (batch_size,), generator=draw)
    x = torch.stack([data[i : i + block_size] for i in starts])
    y = torch.stack([data[i + 1 : i + 1 + block_size] for i in starts])
    return x.to(device), y.to(device)


class CharacterModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary_size, n_embd)
        self.position = nn.Parameter(0.02 * torch.randn(block_size, n_embd))
        layer = nn.TransformerEncoderLayer(n_embd, n_head, 4 * n_embd, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, n_layer, enable_nested_tensor=False)
        self.head = nn.Linear(n_embd, vocabulary_size)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(block_size))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        logits = self.head(self.blocks(self.token(x) + self.position, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


model = DistributedDataParallel(CharacterModel().to(device))
optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
adapter = dptrain.BatchAdapter(dptrain.attach(model), optimizer, micro_batch_size=batch_size, accumulation_steps=2)

for iteration in range(1, max_iters + 1):
    gradient_accumulation_steps = adapter.accumulation_steps
    for micro_step in range(gradient_accumulation_steps):
        with nullcontext() if micro_step == gradient_accumulation_steps - 1 else model.no_sync():
            loss = model(*get_batch())
            (loss / gradient_accumulation_steps).backward()
    reading = adapter.step()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if rank == 0 and iteration % log_interval == 0:
        batch = adapter.global_batch_size
        print(f"iter {iteration}: loss {loss.item():.4f}, batch {batch}, noise scale {reading.noise_scale}")

dist.destroy_process_group()
