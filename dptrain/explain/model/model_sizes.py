"""Sizes of a language model and its data that a budget of FLOPs pays for, beside those of a run; trains nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from dptrain.explain.model.compute import SCALING_LAWS

if TYPE_CHECKING:
    from dptrain.explain.record import RunRecord

FITTED_FLOPS = (6e18, 3e21)
"""Budgets of the runs behind both scaling laws (Hoffmann et al. 2022, figure 3); beyond, they are extrapolated."""

_FAMILY = "gpt"
_TASKS_OF_FAMILY = ("gpt-", "pysource")
_OTHER_MODEL = "lstm"


@dataclass(frozen=True, kw_only=True)
class OptimalSize:
    """The sizes of a language model and its data that are optimal for a budget of FLOPs.

    Attributes:
        law: whose coefficients.
        num_parameters: of the model.
        num_tokens: of its training.
        loss: that the law promises, in nats per token.
    """

    law: str
    num_parameters: float
    num_tokens: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class PaidSizes:
    """What the compute of a run of a language model would pay for, were sizes chosen for it.

    Attributes:
        flops: the compute.
        num_parameters: of the run's model.
        num_tokens: that the run saw, each as often as it was seen.
        optimal: sizes by each law.
        family: of ready-made models that the run's belongs to; None where it is none of ours.
        nearest: the ready-made size nearest to the laws' (the geometric mean of both); None without a family.
        is_fitted: whether the laws were fitted to such budgets.
    """

    flops: float
    num_parameters: float
    num_tokens: float
    optimal: tuple[OptimalSize, ...]
    family: str | None
    nearest: str | None
    is_fitted: bool


def optimal_sizes(flops: float) -> tuple[OptimalSize, ...]:
    """Return the sizes for a budget, by each law."""
    found = []
    for name, law in SCALING_LAWS.items():
        num_parameters, num_tokens = law.optimum(flops)
        loss = law.loss(num_parameters=num_parameters, num_tokens=num_tokens)
        found.append(OptimalSize(law=name, num_parameters=num_parameters, num_tokens=num_tokens, loss=loss))
    return tuple(found)


def paid_sizes(record: RunRecord, *, flops: float | None, num_samples: float) -> PaidSizes | None:
    """Return what a run's compute would pay for; None where its model is no language model, to which no law applies.

    Args:
        record: the run.
        flops: that it took; None where they were not counted.
        num_samples: that it saw.
    """
    num_parameters, tokens = _fact(record, "num_parameters"), _fact(record, "tokens_per_sample")
    if not (flops and num_parameters and tokens):
        return None
    optimal = optimal_sizes(flops)
    family = _family(record)
    mean = math.exp(sum(math.log(size.num_parameters) for size in optimal) / len(optimal))
    return PaidSizes(
        flops=flops,
        num_parameters=num_parameters,
        num_tokens=tokens * num_samples,
        optimal=optimal,
        family=family,
        nearest=None if family is None else nearest_size(mean),
        is_fitted=FITTED_FLOPS[0] <= flops <= FITTED_FLOPS[1],
    )


def nearest_size(num_parameters: float) -> str:
    """Return the ready-made size of `gpt` whose number of parameters is nearest, by ratio."""
    sizes = _sizes()
    return min(sizes, key=lambda name: abs(math.log(sizes[name] / num_parameters)))


@cache
def _sizes() -> dict[str, int]:
    import torch

    from dptrain.models.gpt import SIZES, Gpt

    with torch.device("meta"):  # which has shapes and no memory
        return {name: sum(p.numel() for p in Gpt(config).parameters()) for name, config in SIZES.items()}


def _family(record: RunRecord) -> str | None:
    task = str(record.summary.get("task") or record.setting("task") or "")
    return _FAMILY if task.startswith(_TASKS_OF_FAMILY) and _OTHER_MODEL not in task else None


def _fact(record: RunRecord, name: str) -> float:
    """Return a number from the facts of a run; 0 where it is not there."""
    value = record.facts.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
