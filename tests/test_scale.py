"""What a step, a start and a checkpoint cost against replicas and parameters, on simulated groups of 10,000 ranks.

The simulated group has torch's fake backend: this process is rank 0 of as many as are asked for, and each collective
returns at once. What is counted is what this rank hands to it. The figures of docs/scale.md are held here.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dptrain.data.elastic_batch import ElasticBatch

ROOT = Path(__file__).parents[1]

COUNT = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
import dptrain
from dptrain.runtime.replica_check import ReplicaCheck
from dptrain.runtime.startup_check import check_agreement
from dptrain.runtime.step_reduction import RankReport, StepRecord, send

world_size, width = map(int, sys.argv[1:])
dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
meter = dptrain.attach(nn.parallel.DistributedDataParallel(model))
seen = []
real = dist.all_reduce
def counted(tensor, *args, **kwargs):
    seen.append(tensor.nbytes)
    return real(tensor, *args, **kwargs)
dist.all_reduce = counted

def bytes_of(action):
    seen.clear()
    action()
    return list(seen)

def step():
    meter.begin(num_samples=2)
    model(torch.ones(2, width)).sum().backward()
    record = StepRecord(step=1, position=0, global_batch_size=2, micro_batch_size=2, learning_rate=0.1, wall_s=0.0)
    zero = torch.zeros(())
    sums, measured = meter.close_step()
    send(
        record, report=RankReport(), loss_sum=zero, num_samples=2, grad_norm=zero, meter_sums=sums, measured=measured
    )

check = ReplicaCheck(model.named_parameters(), every_steps=1)
print(json.dumps({
    "step": bytes_of(step),
    "start": bytes_of(lambda: check_agreement({str(i): i for i in range(10)}, device=torch.device("cpu"))),
    "replica check": bytes_of(lambda: check.start(1)),
}))
import os
sys.stdout.flush()
os._exit(0)
"""


def counted(*, world_size, width=8):
    """The bytes of each reduction, by what it is for."""
    command = [sys.executable, "-c", COUNT, str(world_size), str(width)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def of_two():
    return counted(world_size=2)


def test_reductions_do_not_grow_with_the_replicas(of_two):
    """10,000 ranks reduce the same bytes as two: one small vector a step, one at the start, one in a replica check."""
    assert counted(world_size=10_000) == of_two
    assert [len(sizes) for sizes in of_two.values()] == [1, 1, 1]
    assert of_two["step"][0] < 512


def test_reductions_do_not_grow_with_the_parameters(of_two):
    """A model with 1,000 times the parameters reduces the same bytes beside its gradients."""
    assert counted(world_size=2, width=256) == of_two


def test_the_replica_check_takes_16_bytes_a_tensor(of_two):
    """The check of the replicas reduces the largest and the smallest sum of each of the four tensors."""
    assert of_two["replica check"] == [4 * 16]


def test_a_rank_finds_its_samples_without_counting_ranks():
    """Among 10,000 ranks one looks at its own micro-batches alone, and keeps four numbers."""
    batch = ElasticBatch(global_batch_size=4_000_000, micro_batch_size=32, position=10**12)
    micro_batches = batch.micro_batches(rank=9_999, world_size=10_000)
    assert len(micro_batches) == batch.accumulation_steps(world_size=10_000) == 13
    assert len(batch.state_dict()) == 4


CHECKPOINT = """
import sys
import torch
from safetensors.torch import save
from torch import nn

width = int(sys.argv[1])
model = nn.Linear(width, width, bias=False)
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, width)).sum().backward()
optimizer.step()
tensors = {"p": model.weight.detach(), **{k: v for k, v in optimizer.state[model.weight].items()}}
print(len(save(tensors)) / width**2)
"""


def test_a_checkpoint_takes_12_bytes_a_parameter():
    """Parameters and AdamW's two moments in float32 are 12 bytes a parameter, whatever the number of replicas."""
    command = [sys.executable, "-c", CHECKPOINT, "512"]
    reported = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert float(reported) == pytest.approx(12, rel=0.01)


def test_the_page_says_what_is_measured_here(of_two):
    """The bytes in docs/scale.md are those counted."""
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    (step,) = re.findall(r"one reduction of (\d+) bytes a step", page)
    assert int(step) == of_two["step"][0]
    assert f"{of_two['start'][0] // 10} bytes for each subject" in page
