"""Whether gradients of experts, averaged over replicas or shared out among them, are those of one process."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.replicas import run_replicas
from dptrain.checkpoint.store import load_newest
from dptrain.config.execution import ExecutionConfig
from dptrain.models.experts import ExpertsConfig
from dptrain.models.gpt import Gpt, GptConfig
from dptrain.tasks import Task
from dptrain.tasks.base import split_loss
from dptrain.tasks.gpt import gpt, next_token_loss
from dptrain.train import CheckpointConfig, ControlConfig, LogConfig, OptimizerConfig, TrainConfig, Trainer

_BATCH = 16


def expert_errors(*, quick: bool) -> dict[str, float]:
    """Return the largest error of experts on several replicas, and of experts that replicas share out, as figures."""
    sizes = (1, 2) if quick else (1, 2, 4)
    layouts = [(2, 2)] if quick else [(2, 2), (4, 2), (4, 4)]
    return {
        "experts_gradient_error": max(experts_gradient_error(world_size) for world_size in sizes),
        "expert_parallel_error": max(expert_parallel_error(world_size, size=size) for world_size, size in layouts),
    }


def experts_gradient_error(world_size: int) -> float:
    """Return the largest error of the replicas' mean gradient of a GPT of experts, over its largest component.

    The reference is one process with all samples; routing, capacity and balance are counted within a sequence.
    """
    model, windows = _experts(8)
    loss, _ = split_loss(next_token_loss(model, windows, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    found = torch.tensor(run_replicas(_gradient_of_share, world_size=world_size))
    return float((found - expected).abs().max() / expected.abs().max())


def _experts(num_windows: int) -> tuple[Gpt, torch.Tensor]:
    torch.manual_seed(0)
    experts = ExpertsConfig(num_experts=4, top_k=2, capacity_factor=1.25)
    model = Gpt(GptConfig(width=32, depth=1, context=16, experts=experts)).train()
    for parameter in model.parameters():  # blocks begin as the identity, where experts have no gradient
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model, torch.randint(0, 256, (num_windows, 17))


def _gradient_of_share(rank: int, world_size: int) -> list[float]:
    from torch.nn.parallel import DistributedDataParallel

    model, windows = _experts(8)
    share = windows.chunk(world_size)[rank]
    replica = DistributedDataParallel(model)  # has a name: let go before the backward pass, it would average nothing
    loss, _ = split_loss(next_token_loss(replica, share, balance_weight=0.01))
    loss.backward()  # type: ignore[no-untyped-call] # torch declares no types for it
    return [float(value) for p in model.parameters() if p.grad is not None for value in p.grad.flatten()]


def expert_parallel_error(world_size: int, *, size: int) -> float:
    """Return the largest error of a trainer's gradient with its experts shared out, over the largest component.

    The reference is the same step of a trainer in one process, which has all experts.

    Args:
        world_size: replicas.
        size: replicas that share out the experts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = np.random.default_rng(0).integers(0, 256, 17 * 4 * _BATCH)
        (folder / "data").mkdir()
        for part in ("train", "val"):
            tokens.astype(np.uint16).tofile(folder / "data" / f"{part}.bin")
        _one_step(0, 1, str(folder), 1)
        run_replicas(_one_step, world_size=world_size, args=(str(folder), size))
        expected, found = (_gradient(folder / f"run-{number}") for number in (1, world_size))
    return float((found - expected).abs().max() / expected.abs().max())


def _one_step(rank: int, world_size: int, folder: str, size: int) -> list[float]:  # noqa: ARG001 - of `run_replicas`
    """Take a step of plain SGD, whose momentum then is the gradient, and leave it in a checkpoint."""
    config = TrainConfig(
        run_dir=f"{folder}/run-{world_size}",
        device="cpu",
        max_samples=_BATCH,
        global_batch_size=_BATCH,
        micro_batch_size=2,
        control=ControlConfig(law="constant"),
        execution=ExecutionConfig(expert_parallel_size=size),
        optimizer=OptimizerConfig(name="sgd", learning_rate=1e-3, weight_decay=0.0, max_grad_norm=None),
        checkpoint=CheckpointConfig(every_samples=10**9),
        log=LogConfig(tracker="none"),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        Trainer(config, task=lambda: _task(folder)).run()
    return []


def _task(folder: str) -> Task:
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "width": 32, "depth": 1, "context": 16}
    task = gpt(data=f"{folder}/data", **shape, num_experts=4, top_k=2, capacity_factor=1.25)  # type: ignore[arg-type]
    for parameter in task.model.parameters():  # as in `_experts`
        parameter.data += 0.1 * torch.randn_like(parameter)
    return task


def _gradient(run: Path) -> torch.Tensor:
    saved = load_newest(run / "checkpoints")
    assert saved is not None, run
    tensors = saved.tensors("optimizer")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors) if name.startswith("momentum_buffer/")])
