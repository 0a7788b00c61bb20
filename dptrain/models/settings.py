"""Settings of how a task's model is adapted before it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from dptrain.ranges import AT_LEAST_1, NAME, PATH, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is done to the task's model before training."""

    weights: str | None = setting(None, PATH)
    """Safetensors file of weights to start from; names and shapes must be those of the model."""
    freeze: str | None = setting(None, NAME)
    """Parameters that are not trained: patterns of their names, with commas, such as "embedding.*,blocks.0.*"."""
    lora_rank: int | None = setting(None, AT_LEAST_1)
    """Rank of low-rank adapters (LoRA, by peft); all else is frozen. Default: none."""
    lora_alpha: int = setting(16, AT_LEAST_1)
    """Scale of the adapters: they are multiplied by lora_alpha / lora_rank."""
    lora_targets: str | None = setting(None, NAME)
    """Names of the modules that get adapters, with commas; the ends of names count. Needed with lora_rank."""
