"""A loop under torchrun whose global batch and sample order stay the same however many processes it has.

Start it, stop it, start it with another number of processes: it goes on at the exact sample.
    torchrun --standalone --nproc_per_node 2 elastic_ddp.py state.pt
    torchrun --standalone --nproc_per_node 3 elastic_ddp.py state.pt
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.data import SampleStream

steps_each_start, learning_rate = 20, 0.05

device = "cuda" if torch.cuda.is_available() else "cpu"
dist.init_process_group("nccl" if device == "cuda" else "gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
if device == "cuda":
    device = f"cuda:{os.environ['LOCAL_RANK']}"
    torch.cuda.set_device(device)
torch.manual_seed(1337)

# 1,000 points in a plane, and on which side of a circle they lie.
points = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
radius = 1.2
inside = (points.norm(dim=1) < radius).float()

model = DistributedDataParallel(nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
stream = SampleStream(len(points), seed=0)
batch = dptrain.ElasticBatch(global_batch_size=50, micro_batch_size=8)

path = Path(sys.argv[1])
if path.exists():
    saved = torch.load(path, map_location=device)
    model.module.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    batch = dptrain.ElasticBatch.from_state_dict(saved["batch"])

for _ in range(steps_each_start):
    loss_sum = torch.zeros((), device=device)
    for micro in batch.micro_batches(rank=rank, world_size=world_size):
        index = torch.from_numpy(stream.indices(micro.positions))
        with nullcontext() if micro.is_last else model.no_sync():
            logits = model(points[index].to(device)).squeeze(1)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, inside[index].to(device))
            (loss * micro.weight).backward()
        loss_sum += loss.detach() * micro.num_samples
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    dist.all_reduce(loss_sum)
    if rank == 0:
        mean = loss_sum.item() / batch.global_batch_size
        print(f"step {batch.steps_done + 1}: samples {batch.position} on, {world_size} processes, loss {mean:.6f}")
    batch = batch.after_step()

if rank == 0:
    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "batch": batch.state_dict()}
    torch.save(state, path)
dist.destroy_process_group()
