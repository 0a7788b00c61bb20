"""The settings of `execution`: how a step runs on the devices; but for rounding, none changes what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dptrain.ranges import AT_LEAST_0, AT_LEAST_1, setting


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a step runs on the devices."""

    compile: Literal["off", "model", "blocks"] = "off"
    """torch.compile: the model as a whole, or each of its repeated blocks, which compiles once for all of them."""
    compile_backend: str = "inductor"
    """Backend of torch.compile."""
    wrapper: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """ddp: each replica holds the model; fsdp: parameters, gradients and optimizer state are sharded over all replicas
    (fully_shard); hsdp: sharded over the replicas of a node, and whole on each node."""
    shard_size: int | None = setting(None, AT_LEAST_1)
    """Replicas that share one copy, for wrapper=hsdp. Default: those of a node."""
    expert_parallel_size: int = setting(1, AT_LEAST_1)
    """Replicas that share out the experts of a mixture (task gpt with num_experts), each with an equal part of them;
    tokens go to their experts by all-to-all, and all else is on each replica. 1: each replica has all experts."""
    activation_checkpointing: Literal["off", "blocks"] = "off"
    """blocks: keep only the inputs of each block, and run it again in the backward pass."""
    tf32: bool = False
    """Multiply float32 matrices with shortened factors where the GPU can."""
    share_devices: bool = False
    """Let several replicas use one GPU, over gloo: for tests, not for speed."""
    collect_garbage_every_steps: int = setting(1000, AT_LEAST_0)
    """Python's cyclic garbage is collected between steps, once in so many, and never within one. 0: as Python does."""
