"""Variants of the overhead benchmark: ways to take the same step, timed in turns; torch and dptrain suffice for it."""

from __future__ import annotations

import copy
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from benchmarks.overhead.peers import PEERS, Finish

BARE, AGAIN, DEFAULT = "bare", "bare again", "default"
EVERY_STEP, EVERY_STEP_HOOK = "every=1, parameters", "every=1, hook"
PEER = "peer "
_IN_EVERY_ROUND = (BARE, AGAIN, DEFAULT)
_ROUNDS_BETWEEN_LOOKS = 16
_WARM_STEPS = 2
_PACED_STEPS = 12
"""Measured steps, after which the default's median of nine rests on timings without the first passes."""
_EVERY_WHEN_TIMED = 4
"""The default is timed with every fourth step measured, so that its rare kind of step is seen often enough; each kind
counts with the share that it has at the interval which the meter chose."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and a step.

    Attributes:
        parameters: how many, in words.
        compute: "light" or "heavy" for a replica's step of few or many tokens, or "accumulation".
        num_blocks: transformer blocks.
        width: their features.
        num_tokens: in a sample.
        num_samples: in a micro-batch.
        accumulation_steps: micro-batches of a step.
        world_size: replicas.
        in_ddp: whether the model is wrapped.
    """

    parameters: str
    compute: str
    num_blocks: int
    width: int
    num_tokens: int
    num_samples: int = 4
    accumulation_steps: int = 1
    world_size: int = 2
    in_ddp: bool = True

    @property
    def name(self) -> str:
        """Parameters and compute."""
        return f"{self.parameters} {self.compute}"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much is measured of each case.

    Attributes:
        seconds: of turns at least; the last round is finished.
        error: of the default's ratio, for which more time is taken.
        longest_s: seconds of turns at most.
        fewest_rounds: more time is taken for these in any case.
        longest_warm_up: steps after which the default keeps the interval that it has.
        others_every: in every how many rounds variants other than bare DDP and the default have a turn. Where nothing
            hangs on them the time is better spent on what is near to the floor.
    """

    seconds: float
    error: float = math.inf
    longest_s: float = math.inf
    fewest_rounds: int = 4
    longest_warm_up: int = 80
    others_every: int = 5

    def are_met(self, num_rounds: int, passed_s: float, error: Callable[[], float]) -> bool:
        """Return whether enough was measured; the error, which takes its time to tell, is asked for now and then."""
        if num_rounds < self.fewest_rounds or passed_s < self.seconds:
            return False
        if passed_s >= self.longest_s or self.error == math.inf:
            return True
        return num_rounds % _ROUNDS_BETWEEN_LOOKS == 0 and error() <= self.error


class Variant:
    """One way to take a step; all variants of a case share the memory of their parameters.

    Attributes:
        every: every how many steps dptrain measures one, left to itself.
    """

    def __init__(self, name: str, *, network: nn.Module, case: Case) -> None:
        self.name = name
        self._case = case
        model = copy.deepcopy(network)
        for own, shared in zip(model.parameters(), network.parameters(), strict=True):
            own.data = shared.data
        self._model = DistributedDataParallel(model) if case.in_ddp else model
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=1e-4)
        self._meter: dptrain.Meter | None = None
        self.every = 1
        self._finish = self._make_finish()

    def _make_finish(self) -> Finish:
        if self.name.startswith(PEER):
            assert isinstance(self._model, DistributedDataParallel)
            return PEERS[self.name.removeprefix(PEER)](self._model, self._optimizer)
        if self.name == DEFAULT:
            self._meter = dptrain.attach(self._model)
        elif self.name == EVERY_STEP:
            self._meter = dptrain.attach(self._model, every=1, method="parameters")
        elif self.name == EVERY_STEP_HOOK:
            self._meter = dptrain.attach(self._model, every=1, method="hook")
        return self._update

    def _update(self) -> bool:
        measured = self._meter is not None and self._meter.step().measured
        self._optimizer.step()
        self._optimizer.zero_grad()
        return measured

    def step(self, samples: Tensor) -> bool:
        """Take one optimizer step and return whether dptrain measured it."""
        micro_batches = samples.chunk(self._case.accumulation_steps)
        for number, micro_batch in enumerate(micro_batches, start=1):
            with self._waits() if number < len(micro_batches) else nullcontext():
                loss: Tensor = self._model(micro_batch).square().mean() / len(micro_batches)
                loss.backward()  # type: ignore[no-untyped-call]
        return bool(self._finish())

    def _waits(self) -> AbstractContextManager[None]:
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else nullcontext()

    def warm_up(self, samples: Tensor, *, longest: int) -> None:
        """Let buffers, threads and the default's interval find their size, then hold the interval.

        The meter weighs its cost against the time between its steps, which the turns of other variants would lengthen.
        """
        for _ in range(_WARM_STEPS):
            self.step(samples)
        if self.name == DEFAULT and self._meter is not None:
            num_measured = num_steps = 0
            while num_measured < _PACED_STEPS and num_steps < longest:
                num_measured += self.step(samples)
                num_steps += 1
            self.every = self._meter.every
            self._meter.remove()
            self._meter = dptrain.attach(self._model, every=min(self.every, _EVERY_WHEN_TIMED))
            self.step(samples)

    @property
    def share(self) -> float | None:
        """What the meter says that it takes of the time of a step; None for another variant."""
        return None if self._meter is None else self._meter.share


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One step of one variant, in the mean over the replicas.

    Attributes:
        wall_s: by the clock.
        cpu_s: of the process.
        measured: whether dptrain measured it.
    """

    wall_s: float
    cpu_s: float
    measured: bool = False


Turns = dict[str, list[Turn | None]]
"""By variant and round; None where a variant rests."""


def measure_variants(case: Case, *, device: torch.device, limits: Limits) -> list[dict[str, Any]]:
    """Return a row for each variant of a case, as one of its replicas; inside a process group, all ranks alike."""
    torch.manual_seed(0)
    network = _network(case).to(device)
    shape = (case.accumulation_steps * case.num_samples, case.num_tokens, case.width)
    samples = torch.randn(shape, generator=torch.Generator().manual_seed(1 + dist.get_rank())).to(device)
    variants, absent = _variants(network, case=case, samples=samples, limits=limits)
    turns = _turns(variants, samples=samples, limits=limits)
    num_parameters = sum(p.numel() for p in network.parameters())
    rows = [
        _row(variant, turns=turns, case=case, num_parameters=num_parameters)
        for variant in variants
        if variant.name != BARE
    ]
    return rows + [_absent_row(name, case=case, reason=reason) for name, reason in absent.items()]


def _network(case: Case) -> nn.Module:
    block = nn.TransformerEncoderLayer(
        case.width, 8, 4 * case.width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(block, case.num_blocks, enable_nested_tensor=False)


def _variants(
    network: nn.Module, *, case: Case, samples: Tensor, limits: Limits
) -> tuple[list[Variant], dict[str, str]]:
    """Return the variants that work, warm, and the reason for each that does not."""
    names = [BARE, AGAIN, DEFAULT, EVERY_STEP]
    if case.in_ddp:
        names += [EVERY_STEP_HOOK, *(PEER + name for name in PEERS)]
    variants, absent = [], {}
    for name in names:
        try:
            variant = Variant(name, network=network, case=case)
            variant.warm_up(samples, longest=limits.longest_warm_up)
        except Exception as error:
            if not name.startswith(PEER):
                raise
            absent[name] = f"{type(error).__name__}: {error}"
        else:
            variants.append(variant)
    return variants, absent


def _turns(variants: Sequence[Variant], *, samples: Tensor, limits: Limits) -> Turns:
    """Let each variant take one step in every round, in an order that changes, until the time is over.

    A round is over so soon that the machine is the same throughout. Every variant finds the caches of another one.
    """
    order = random.Random(0)  # noqa: S311 - the same on all ranks
    turns: Turns = {variant.name: [] for variant in variants}
    began_s = time.perf_counter()
    (every,) = (variant.every for variant in variants if variant.name == DEFAULT)

    def over(number: int) -> bool:
        passed_s = time.perf_counter() - began_s
        return limits.are_met(number, passed_s, lambda: _wall_ratio(DEFAULT, turns, every=every).error)

    for number in _rounds_until(over):
        for variant in order.sample(variants, len(variants)):
            rests = variant.name not in _IN_EVERY_ROUND and number % limits.others_every
            turns[variant.name].append(None if rests else _turn(variant, samples=samples))
    return turns


def _rounds_until(over: Callable[[int], bool]) -> Iterator[int]:
    """Count rounds until rank 0 says that it is over."""
    number = 0
    while True:
        yield number
        number += 1
        flag = torch.tensor([int(over(number))])
        dist.broadcast(flag, src=0)
        if flag.item():
            return


def _turn(variant: Variant, *, samples: Tensor) -> Turn:
    """Time one step of one variant."""
    dist.barrier()
    clock = _Clock(samples.device)
    measured = variant.step(samples)
    means = torch.tensor(clock.read(), dtype=torch.float64) / dist.get_world_size()
    dist.all_reduce(means)
    wall_s, cpu_s = means.tolist()
    return Turn(wall_s=wall_s, cpu_s=cpu_s, measured=measured)


class _Clock:
    """Wall and CPU seconds from its construction on; the wall by events where the work runs on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._first = _event() if device.type == "cuda" else None
        self._wall_s, self._cpu_s = time.perf_counter(), time.process_time()

    def read(self) -> list[float]:
        """Return both; waits for the device."""
        if self._first is None:
            wall_s = time.perf_counter() - self._wall_s
        else:
            last = _event()
            last.synchronize()
            wall_s = self._first.elapsed_time(last) / 1000
        return [wall_s, time.process_time() - self._cpu_s]


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _row(variant: Variant, *, turns: Turns, case: Case, num_parameters: int) -> dict[str, Any]:
    wall = _wall_ratio(variant.name, turns, every=variant.every)
    cpu = _Ratio.of(variant.name, turns=turns, every=variant.every, seconds=lambda turn: turn.cpu_s)
    floor = _wall_ratio(AGAIN, turns)
    step_s = statistics.median(turn.wall_s for turn in turns[BARE] if turn is not None)
    row = {
        "case": case.name,
        "variant": variant.name,
        "num_parameters": num_parameters,
        "num_tokens": case.num_tokens * case.num_samples * case.accumulation_steps,
        "world_size": case.world_size,
        "ratio": wall.median,
        "ratio_error": wall.error,
        "ratio_quartile_1": wall.quartiles[0],
        "ratio_quartile_3": wall.quartiles[1],
        "cpu_ratio": cpu.median,
        "floor_ratio": floor.median,
        "bare_step_s": step_s,
        "every": variant.every,
        "num_rounds": wall.num_rounds,
        "shown": f"{wall.median:.4f} ± {wall.error:.4f} ({wall.quartiles[0]:.3f}–{wall.quartiles[1]:.3f})",
        "shown_cpu": f"{cpu.median:.4f} ± {cpu.error:.4f}",
        "shown_floor": f"{floor.median:.4f} ± {floor.error:.4f}",
        "shown_step": f"{1000 * step_s:.4g} ms",
    }
    return row if variant.share is None else row | {"share": variant.share}


def _absent_row(name: str, *, case: Case, reason: str) -> dict[str, Any]:
    blank = dict.fromkeys(("shown_cpu", "shown_floor", "shown_step"), "")
    return blank | {
        "case": case.name,
        "variant": name,
        "absent": reason,
        "shown": f"absent: {reason}",
        "every": 1,
        "num_rounds": 0,
    }


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """Time to that of the bare variants in the same round: the median over rounds and what chance leaves of it.

    Of a variant that measures every k-th step it is the mean of three medians: of the steps that are measured and of
    those before them, at whose end hooks are put on, which count 1/k each, and of the others. The median of all
    would never see the few, and timed at a shorter interval than k it would see too much of them.
    """

    median: float
    error: float
    quartiles: tuple[float, float]
    num_rounds: int

    @classmethod
    def of(cls, name: str, *, turns: Turns, seconds: Callable[[Turn], float], every: int = 1) -> _Ratio:
        """Divide by the mean of both bare variants, whose chance is smaller; one of them by the other."""
        references = (BARE,) if name == AGAIN else (BARE, AGAIN)
        ratios: dict[str, list[float]] = {"measured": [], "before": [], "other": []}
        following = [*turns[name][1:], None]
        for turn, after, *bare in zip(turns[name], following, *(turns[other] for other in references), strict=True):
            if turn is not None:
                before = after is not None and after.measured
                kind = "measured" if turn.measured else "before" if before else "other"
                reference_s = statistics.fmean(seconds(other) for other in bare if other is not None)
                ratios[kind].append(seconds(turn) / reference_s)
        shares = {kind: 1 / every for kind in ("measured", "before") if ratios[kind]}
        shares["other"] = 1 - sum(shares.values())
        kinds = [(shares[kind], found) for kind, found in ratios.items() if found]
        low, _, high = _quartiles([ratio for _, found in kinds for ratio in found])
        return cls(
            median=sum(share * statistics.median(found) for share, found in kinds),
            error=math.hypot(*(share * _error(found) for share, found in kinds)),
            quartiles=(low, high),
            num_rounds=sum(len(found) for _, found in kinds),
        )


def _wall_ratio(name: str, turns: Turns, *, every: int = 1) -> _Ratio:
    return _Ratio.of(name, turns=turns, every=every, seconds=lambda turn: turn.wall_s)


def _error(ratios: Sequence[float]) -> float:
    """Return the standard error of a median of normal values, from quartiles that one disturbed round does not move."""
    low, _, high = _quartiles(ratios)
    return 1.2533 * (high - low) / 1.349 / math.sqrt(len(ratios))


def _quartiles(ratios: Sequence[float]) -> list[float]:
    return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * list(ratios)
