"""Does the interval of the noise scale hold the truth as often under each kind of exchange as under all-reduce?"""
# python -m benchmarks.exchange --parts meter [--quick]: this is a part of that benchmark
#
# As `benchmarks.accuracy`: two replicas in DDP, real backward passes at fixed parameters with fresh samples, and many
# copies of a problem side by side, each a repetition of its own. The truth is exact: that of digits from the gradient
# of every sample. Compressed gradients have their error feedback, so the residual of a step is in the next one's.

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks.accuracy.cases import Case, Layout, measured
from benchmarks.accuracy.problems import Mixture, Problem, digits_with_replacement, linear, quadratic
from benchmarks.accuracy.repetitions import QUICK, Form
from benchmarks.accuracy.wrappers import Loop, Wrapper
from benchmarks.replicas import run_replicas
from dptrain.errors import ObservationError
from dptrain.exchange import AllReduce, Codistillation, Compressed, Ensemble, Exchange, LocalUpdates, RandomBases

MEASURED: Mapping[str, Callable[[], Exchange]] = {
    "all_reduce": AllReduce,
    "fp16": lambda: Compressed("fp16"),
    "bf16": lambda: Compressed("bf16"),
    "int8": lambda: Compressed("int8"),
}
REFUSED: Mapping[str, Callable[[], Exchange]] = {
    "powersgd": lambda: Compressed("powersgd"),
    "random_bases": RandomBases,
    "local_updates": LocalUpdates,
    "codistillation": Codistillation,
    "ensemble": Ensemble,
}
_FULL = Form(num_copies=160, rounds=2, shortening=2)
_PROBLEMS: Mapping[str, Callable[[], Problem]] = {
    "digits": digits_with_replacement,
    "linear": linear,
    "quadratic": quadratic,
}


def measure(*, quick: bool) -> list[dict[str, Any]]:
    """Return a row for each kind and problem, and one for each kind that the meter refuses."""
    form = QUICK if quick else _FULL
    rows: list[dict[str, Any]] = run_replicas(measured_kinds, world_size=2, args=(form, list(_PROBLEMS)))
    return rows


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the least and the largest coverage, and the largest relative error of a mean."""
    judged = [row for row in rows if "coverage" in row]
    return {
        "meter_coverage_min": min(row["coverage"] for row in judged),
        "meter_coverage_max": max(row["coverage"] for row in judged),
        "meter_error_max": max(max(row["trace_error"], row["grad_error"]) for row in judged),
        "meter_refused": sum("refused" in row for row in rows),
    }


def measured_kinds(rank: int, _world_size: int, form: Form, problems: Sequence[str]) -> list[dict[str, Any]]:
    """Measure each kind as one of two replicas; return the rows."""
    rows: list[dict[str, Any]] = []
    for number, problem in enumerate(_PROBLEMS[name]() for name in problems):
        for name, make in MEASURED.items():
            case = Case(
                wrapper=Wrapper(name=name, wrap=lambda model, make=make: _loop(make(), model)),  # type: ignore[misc] # mypy infers no lambda with a default
                layout=Layout(name="2×2", world_size=2, accumulation_steps=2),
                problems=[problem],
                micro_batch_size=problem.micro_batch_size,
                num_steps=problem.num_steps,
                seed=1000 * number + 11,  # the same samples under every kind
            )
            rows += measured(case, rank=rank, form=form)
    return [*rows, *({"wrapper": name, "refused": _reason(make())} for name, make in REFUSED.items())]


def _loop(exchange: Exchange, model: Mixture) -> Loop:
    wrapped = exchange.wrap(model)
    assert isinstance(wrapped, DistributedDataParallel)
    return Loop(model=wrapped, waits=wrapped.no_sync)


def _reason(exchange: Exchange) -> str:
    """Return what the meter says when it refuses.

    Raises:
        AssertionError: where it does not.
    """
    try:
        dptrain.attach(exchange.wrap(nn.Linear(40, 40))).remove()
    except ObservationError as error:
        return str(error)
    raise AssertionError(f"{exchange.name} was measured")
