"""The settings of `exchange`: what replicas send one another, and the options of each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dptrain.ranges import AT_LEAST_0, AT_LEAST_1, DECAY, POSITIVE, setting


@dataclass(frozen=True, kw_only=True)
class ExchangeConfig:
    """What replicas exchange in a step."""

    kind: Literal["all_reduce", "compressed", "random_bases", "local_updates", "codistillation", "ensemble"] = (
        "all_reduce"
    )
    """all_reduce: the exact mean of the gradients; compressed: gradients in fewer digits; random_bases: coefficients
    in random subspaces; local_updates: parameters now and then; codistillation: predictions; ensemble: nothing."""
    codec: Literal["fp16", "bf16", "int8", "powersgd"] | None = None
    """Digits of compressed gradients. Default: bf16."""
    rank: int | None = setting(None, AT_LEAST_1)
    """Rank of the factors, for codec=powersgd. Default: 2."""
    error_feedback: bool | None = None
    """Whether what rounding loses is added to the next gradient, for compressed. Default: true."""
    dimensions: int | None = setting(None, AT_LEAST_1)
    """Directions of each replica, for random_bases. Default: 256."""
    redraw: bool | None = None
    """Whether directions are new in each step, for random_bases. Default: true."""
    every: int | None = setting(None, AT_LEAST_1)
    """Steps from one exchange to the next, for local_updates. Default: 8."""
    outer: Literal["average", "nesterov"] | None = None
    """What makes common parameters, for local_updates: average; nesterov (DiLoCo). Default: average."""
    outer_learning_rate: float | None = setting(None, POSITIVE)
    """Learning rate of outer=nesterov. Default: 0.7."""
    outer_momentum: float | None = setting(None, DECAY)
    """Momentum of outer=nesterov. Default: 0.9."""
    overlap: int | None = setting(None, AT_LEAST_0)
    """Steps that an exchange may take while training goes on, for local_updates. Default: 0."""
    weight: float | None = setting(None, AT_LEAST_0)
    """Weight of the distance from the others' predictions, for codistillation. Default: 1."""
    staleness: int | None = setting(None, AT_LEAST_0)
    """Steps from a prediction to its use, for codistillation. Default: 10."""
    shared_samples: int | None = setting(None, AT_LEAST_1)
    """Samples of a step that all replicas predict, for codistillation. Default: the micro-batch size."""
    predictions: Literal["outputs", "probabilities"] | None = None
    """What is averaged or compared, for ensemble and codistillation: what the model returns, or its softmax over the
    last dimension. Default: outputs."""
