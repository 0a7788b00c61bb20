"""Settings of what a task's model starts from, which parts of it are trained, and what it is taught by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dptrain.ranges import AT_LEAST_1, LEVEL, NAME, PATH, POSITIVE, SHARE, setting


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is done to the task's model before training."""

    weights: str | None = setting(None, PATH)
    """Weights to start from, `--from` for short: a safetensors file, a folder of transformers or timm that holds
    model.safetensors, a run folder, or a checkpoint step-… of one; efficientnet-lite0: those of the extra
    dptrain[efficientnet], for timm:tf_efficientnet_lite0. Names and shapes must be those of the model."""
    new_head: str | None = setting(None, NAME)
    """Parameters that do not take weights but begin as the task initialises them: patterns of their names, with commas,
    such as "output.*". They are trained whatever freeze and lora_rank say."""
    freeze: str | None = setting(None, NAME)
    """Parameters that are not trained: patterns of their names, with commas, such as "embedding.*,blocks.0.*"."""
    lora_rank: int | None = setting(None, AT_LEAST_1)
    """Rank of low-rank adapters (LoRA, by peft); all else is frozen, but for new_head. Default: none."""
    lora_alpha: int = setting(16, AT_LEAST_1)
    """Scale of the adapters: they are multiplied by lora_alpha / lora_rank."""
    lora_targets: str | None = setting(None, NAME)
    """Names of the modules that get adapters, with commas; the ends of names count. Needed with lora_rank."""
    layer_decay: float | None = setting(None, SHARE)
    """Learning rate of each block over that of the block after it; the last block has this part of the head's rate.
    Default: one rate for all."""
    quantize: Literal["bf16", "fp8", "fp6", "fp4", "int8", "int6", "int4", "int3"] | None = None
    """Format of weights, activations and output gradients in linear and convolutional layers, emulated in float32: for
    what few bits do to training, not for speed. Default: none."""
    rounding: Literal["nearest", "stochastic", "stochastic_gradients"] = "nearest"
    """Rounding with quantize. stochastic: of activations and output gradients by chance, in the mean to their value;
    stochastic_gradients: of output gradients alone. Weights are rounded to the nearest."""
    unquantized: str | None = setting(None, NAME)
    """Layers that quantize leaves as they are: patterns of their names, with commas, such as "output"."""


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How a trained model, the teacher, takes part in the loss (Hinton et al. 2015, arXiv 1503.02531)."""

    teacher: str | None = setting(None, PATH)
    """Model to learn from, `--teacher` for short: a run folder, a checkpoint step-… of one, or a folder of
    transformers. Its outputs must have the shape of the model's. Default: none."""
    temperature: float = setting(2.0, POSITIVE)
    """The logits of both are divided by it; the divergence is multiplied by its square."""
    weight: float = setting(0.5, SHARE)
    """Weight of the divergence from the teacher in the loss; the task's own loss has the rest."""
    hidden: str | None = setting(None, NAME)
    """Modules whose outputs are to be those of the teacher's, too: names with commas, `model=teacher` where they
    differ, such as "blocks.0=blocks.1,blocks.1=blocks.3". Default: none."""
    hidden_weight: float = setting(1.0, POSITIVE)
    """Weight of their mean squared difference, which is added to the loss."""


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """Which weights of linear and convolutional layers are kept at zero (RigL: Evci et al. 2020, arXiv 1911.11134)."""

    method: Literal["off", "static", "rigl"] = "off"
    """static: a random mask that stays; rigl: at each update the smallest weights are dropped, and as many grow where
    the gradient is largest."""
    sparsity: float = setting(0.9, LEVEL)
    """Part of the weights of these layers that is zero, over all of them."""
    distribution: Literal["erk", "uniform"] = "erk"
    """erk: layers with more inputs and outputs than weights are denser (Erdős–Rényi kernel); uniform: all alike."""
    dense: str | None = setting(None, NAME)
    """Parameters that stay dense: patterns of their names, with commas."""
    update_every_samples: int | None = setting(None, AT_LEAST_1)
    """Samples between two updates of the masks. Default: 1 % of the run."""
    drop_fraction: float = setting(0.3, SHARE)
    """Part of a layer's weights that the first update replaces; it falls to zero by a cosine."""
    end_fraction: float = setting(0.75, SHARE)
    """Part of the run after which masks stay."""
