"""Training loops drawn at random, correct or misused, and what the meter says in them against per-sample gradients."""

from __future__ import annotations

import contextlib
import functools
import math
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dptrain
from dptrain.errors import ObservationError
from dptrain.noise import Smoothing

NUM_STEPS = 7
_NUM_SAMPLES, _WIDTH = 48, 5
_LAST_STEP_ONLY = Smoothing(half_life_samples=1e-6)
"""So that a reading is that of the latest step alone, which the truth is known of."""
_LARGEST_ERROR = 2e-3
"""Of the pair's direction; float32 gradients of 46 numbers leave 1e-5."""

CORRECT = "none"
MISUSES = (
    "stale",  # the optimizer that clears has only the head
    "never cleared",
    "not averaged",  # the whole step under no_sync
    "behind the wrapper",  # ddp.module(x)
    "after clearing",
    "before backward",
    "closed twice",
    "clipped by value",
    "one layer scaled",
    "changed by a late hook",
    "list of samples",
    "step per micro-batch",
    "thawed",
    "gradient thrown away",
    "another loss added outside",
)
LATE_FACTORS = MappingProxyType({"first.weight": 0.1, "middle.weight": 3.0})
_NEEDS_REPLICAS = ("not averaged", "behind the wrapper")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One training loop.

    Attributes:
        misuse: what is wrong with it, or "none".
        in_ddp: in DDP or bare.
        method: "parameters" or "hook".
        accumulation_steps: micro-batches per step and replica.
        micro_batch_size: samples in each.
        no_sync: whether only the last micro-batch is reduced.
        summed: whether the loss is the sum over samples.
        close: where the step is closed: "backward", "unscale", "clip" (after each), or "optimizer".
        clear: "none", "zeros" or "model", the form of zero_grad.
        clear_first: whether it stands before the forward passes or after the optimizer's step.
        clip_norm: limit of the gradient's norm, or None.
        scaled: whether a GradScaler is used.
        overflow: whether it overflows once.
        skip: every how many steps the update is thrown away; 0 for never.
        frozen: "no", "first" (from the beginning), "later" (from the third step on).
        extra: passes that no gradient is taken of: "no", "evaluation", "evaluation with gradients", "discarded".
        evaluating: whether the model is in evaluation mode throughout.
        given_norm: whether `grad_norm` is given to `step`.
        seed: of the samples.
    """

    misuse: str = CORRECT
    in_ddp: bool = True
    method: str = "parameters"
    accumulation_steps: int = 1
    micro_batch_size: int = 3
    no_sync: bool = False
    summed: bool = False
    close: str = "backward"
    clear: str = "none"
    clear_first: bool = True
    clip_norm: float | None = None
    scaled: bool = False
    overflow: bool = False
    skip: int = 0
    frozen: str = "no"
    extra: str = "no"
    evaluating: bool = False
    given_norm: bool = False
    seed: int = 0


CHOICES: dict[str, tuple[Any, ...]] = {
    "in_ddp": (True, True, False),
    "method": ("parameters", "parameters", "hook"),
    "accumulation_steps": (1, 2, 3),
    "micro_batch_size": (2, 3, 4),
    "no_sync": (True, False),
    "summed": (True, False),
    "close": ("backward", "unscale", "clip", "optimizer"),
    "clear": ("none", "zeros", "model"),
    "clear_first": (True, False),
    "clip_norm": (None, 0.1, 1e6),
    "scaled": (True, False, False),
    "overflow": (True, False, False),
    "skip": (0, 0, 3, 4),
    "frozen": ("no", "no", "first", "later"),
    "extra": ("no", "no", "evaluation", "evaluation with gradients", "discarded"),
    "evaluating": (True, False, False),
    "given_norm": (True, False, False),
}


def drawn(seed: int, *, misuse: str = CORRECT) -> Loop:
    """Return the loop of this number."""
    draw = random.Random(f"{misuse}{seed}")  # noqa: S311 - nothing secret
    return possible(Loop(misuse=misuse, seed=seed, **{name: draw.choice(values) for name, values in CHOICES.items()}))


def possible(loop: Loop) -> Loop:
    """Return the nearest loop whose settings go together."""
    loop = _with_a_possible_wrapper(loop)
    changed: dict[str, Any] = {}
    if not loop.scaled:
        changed["overflow"] = False
    if loop.misuse == "after clearing":
        changed |= {"scaled": False, "overflow": False}  # the scaler itself refuses to step without a gradient
    if loop.misuse in ("after clearing", "before backward", "closed twice") or loop.given_norm:
        changed["close"] = "backward"
    if loop.misuse == "step per micro-batch":
        changed |= {"accumulation_steps": max(loop.accumulation_steps, 2), "close": "backward", "skip": 0}
    if loop.misuse in ("never cleared", "stale", "after clearing", "thawed"):
        changed |= {"skip": 0, "frozen": "first" if loop.misuse == "thawed" else "no", "overflow": False}
    if loop.misuse == "gradient thrown away":
        changed |= {"accumulation_steps": max(loop.accumulation_steps, 2), "clear": "zeros", "skip": 0}
    return replace(loop, **changed)


def _with_a_possible_wrapper(loop: Loop) -> Loop:
    changed: dict[str, Any] = {}
    if not loop.in_ddp and loop.misuse not in _NEEDS_REPLICAS:
        # One process needs two micro-batches, and has no communication hook.
        changed |= {"method": "parameters", "accumulation_steps": max(loop.accumulation_steps, 2), "no_sync": False}
        return replace(loop, **changed)
    changed["in_ddp"] = True
    if loop.frozen == "later":
        changed["frozen"] = "first"  # DDP itself does not allow to freeze after wrapping
    if loop.misuse == "not averaged":
        changed["method"] = "parameters"
    if changed.get("method", loop.method) == "hook":
        changed["no_sync"] = True
    return replace(loop, **changed)


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_WIDTH, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Any) -> Any:  # noqa: ANN401 - a tensor, or a list of samples
        x = torch.stack(list(x)) if isinstance(x, list) else x
        return self.head(torch.tanh(self.middle(torch.tanh(self.first(x)))))


def _model() -> _Model:
    torch.manual_seed(5)
    return _Model()


@functools.lru_cache(maxsize=1)
def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(_NUM_SAMPLES, _WIDTH, generator=generator)
    return x, x.sum(1, keepdim=True) * 0.3 + torch.randn(_NUM_SAMPLES, 1, generator=generator)


@functools.lru_cache(maxsize=1)
def _sample_gradients() -> Tensor:
    """Return each sample's own gradient, in double precision; the loops' learning rate is 0, so it stays true."""
    model, (x, y) = _model(), _data()
    rows = []
    for k in range(_NUM_SAMPLES):
        loss = (model(x[k : k + 1]) - y[k : k + 1]).square().mean()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    return torch.stack(rows)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the meter said.

    Attributes:
        num_measured: steps that it took in.
        num_wrong: of them, those whose pair is not that of the per-sample gradients.
        reported: warnings and errors.
    """

    num_measured: int
    num_wrong: int
    reported: tuple[str, ...]


def run(loop: Loop, *, rank: int, world_size: int) -> Outcome:
    """Run a loop as one of the replicas; the outcome is equal on all, but for warnings, which rank 0 has."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        runner = _Runner(loop, rank=rank, world_size=world_size if loop.in_ddp else 1)
        reported: list[str] = []
        try:
            runner.run()
        except ObservationError as error:
            reported.append(str(error))
        finally:
            runner.remove()
    reported += [str(w.message) for w in caught if "noise scale" in str(w.message)]
    return Outcome(num_measured=runner.num_measured, num_wrong=runner.num_wrong, reported=tuple(reported))


class _Runner:
    def __init__(self, loop: Loop, *, rank: int, world_size: int) -> None:
        self.loop, self.rank, self.world_size = loop, rank, world_size
        self.bare = _model()
        if loop.frozen == "first":
            self.bare.first.requires_grad_(requires_grad=False)
        self.model: nn.Module = DistributedDataParallel(self.bare) if loop.in_ddp else self.bare
        self.optimizer = torch.optim.SGD([p for p in self.bare.parameters() if p.requires_grad], lr=0.0)
        self.clearer = (
            torch.optim.SGD(self.bare.head.parameters(), lr=0.0) if loop.misuse == "stale" else self.optimizer
        )
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=loop.scaled)
        if loop.evaluating:
            self.model.eval()
        self.meter = self._attach()
        if loop.misuse == "changed by a late hook":
            named = dict(self.bare.named_parameters())
            for name, factor in LATE_FACTORS.items():
                if named[name].requires_grad:
                    named[name].register_hook(functools.partial(torch.mul, factor))  # type: ignore[no-untyped-call]
        self.num_measured = self.num_wrong = 0
        self.batches: list[list[Tensor]] = []

    def _attach(self) -> dptrain.Meter:
        loop = self.loop
        options: dict[str, Any] = {"method": loop.method, "loss": "sum" if loop.summed else "mean"}
        if loop.close == "optimizer":
            options["optimizer"] = self.optimizer
        return dptrain.attach(self.model, every=1, smoothing=_LAST_STEP_ONLY, **options)

    def run(self) -> None:
        for step in range(NUM_STEPS):
            self._step(step)

    def remove(self) -> None:
        self.meter.remove()

    # One step

    def _step(self, step: int) -> None:
        loop = self.loop
        if step == 2:
            if loop.frozen == "later":
                self.bare.first.requires_grad_(requires_grad=False)
                for p in self.bare.first.parameters():
                    p.grad = None
            if loop.misuse == "thawed":
                self.bare.first.requires_grad_(requires_grad=True)
        if loop.clear_first:
            self._clear()
        self.batches = []
        for number in range(loop.accumulation_steps):
            self._micro_batch(step, number)
        if loop.skip and step % loop.skip == loop.skip - 1:
            if not loop.clear_first:
                self._clear()
            return
        self._update()
        if not loop.clear_first:
            self._clear()
        self._judge()

    def _micro_batch(self, step: int, number: int) -> None:
        loop = self.loop
        last = number == loop.accumulation_steps - 1
        chosen = [self._indices(step, number, rank) for rank in range(self.world_size)]
        self.batches.append(chosen)
        self._extra_pass()
        quiet = loop.misuse == "not averaged" or (loop.no_sync and not last)
        x, y = (tensor[chosen[self.rank]] for tensor in _data())
        with self.model.no_sync() if quiet and loop.in_ddp else contextlib.nullcontext():  # type: ignore[operator]
            called = self.bare if loop.misuse == "behind the wrapper" else self.model
            out = called(list(x) if loop.misuse == "list of samples" else x)
            if loop.misuse == "before backward" and last:
                self.meter.step()
            loss = (out - y).square()
            share = 1.0 if loop.summed else 1 / loop.accumulation_steps
            loss = (loss.sum() if loop.summed else loss.mean()) * share
            if loop.overflow and step == 3 and number == 0:
                loss = loss * math.inf
            self.scaler.scale(loss).backward()
        if loop.misuse == "step per micro-batch":
            self.optimizer.step()
            self._clear() if not last else None
        if loop.misuse == "gradient thrown away" and number == 0:
            self.bare.middle.weight.grad.zero_()  # type: ignore[union-attr]

    def _extra_pass(self) -> None:
        extra, x = self.loop.extra, _data()[0][:7]
        if self.loop.misuse == "list of samples":
            return
        if extra == "evaluation":
            with torch.no_grad():
                self.bare.eval()(x)
        elif extra == "evaluation with gradients":
            self.bare.eval()(x)
        elif extra == "discarded" and not self.loop.in_ddp:  # DDP itself does not allow it
            self.model(x)
        self.model.train(not self.loop.evaluating)

    def _update(self) -> None:
        loop = self.loop
        if loop.misuse == "another loss added outside":
            torch.stack([p.square().sum() for p in self.bare.parameters()]).sum().backward()  # type: ignore[no-untyped-call]
        if loop.misuse == "clipped by value":
            nn.utils.clip_grad_value_(self.bare.parameters(), 1e-3)
        if loop.misuse == "one layer scaled":
            self.bare.middle.weight.grad.mul_(7.0)  # type: ignore[union-attr]
        if loop.misuse == "after clearing":
            self._clear()
        if loop.close == "backward" and loop.misuse != "before backward":
            self._close()
        if loop.scaled:
            self.scaler.unscale_(self.optimizer)
        if loop.close == "unscale":
            self._close()
        if loop.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.bare.parameters(), loop.clip_norm)
        if loop.close == "clip":
            self._close()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _close(self) -> None:
        norm = None
        if self.loop.given_norm:
            norm = nn.utils.get_total_norm([p.grad for p in self.bare.parameters() if p.grad is not None])
        self.meter.step(grad_norm=norm)
        if self.loop.misuse == "closed twice":
            self.meter.step()

    def _clear(self) -> None:
        if self.loop.misuse == "never cleared":
            return
        if self.loop.clear == "model" and self.loop.misuse != "stale":
            self.model.zero_grad()
        else:
            self.clearer.zero_grad(set_to_none=self.loop.clear != "zeros")

    def _indices(self, step: int, number: int, rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(((self.loop.seed * 97 + step) * 11 + number) * 5 + rank)
        return torch.randint(0, _NUM_SAMPLES, (self.loop.micro_batch_size,), generator=generator)

    # The truth

    def _judge(self) -> None:
        scale = self.meter.read_window()
        if scale.num_steps == self.num_measured:
            return
        self.num_measured = scale.num_steps
        found = torch.tensor([scale.noise_trace, scale.grad_sq_norm], dtype=torch.float64)
        intended = [self._truth(self.batches)]
        if self.loop.misuse == "step per micro-batch":
            intended.append(self._truth(self.batches[-1:]))
        if self.loop.misuse == "before backward" and len(self.batches) > 1:
            intended.append(
                self._truth(self.batches[:-1])
            )  # what was there by then: fewer small batches, no other scale
        if self.loop.misuse == "changed by a late hook" and self.loop.method == "hook":
            # DDP reduces what the hooks return, so small and averaged gradients are changed alike: no misuse.
            intended.append(self._truth(self.batches, factors=LATE_FACTORS))
        self.num_wrong += all(_angle(found, truth) > _LARGEST_ERROR for truth in intended)

    def _truth(self, batches: list[list[Tensor]], factors: Mapping[str, float] = MappingProxyType({})) -> Tensor:
        """Return (tr(Σ), |G|²) of the step by formula F2, from the gradients of its samples."""
        shares = [
            torch.full((p.numel(),), factors.get(name, 1.0) if p.requires_grad else 0.0, dtype=torch.float64)
            for name, p in self.bare.named_parameters()
        ]
        gradients = _sample_gradients() * torch.cat(shares)
        small = torch.stack([gradients[chosen].mean(0) for ranks in batches for chosen in ranks])
        size = float(self.loop.micro_batch_size)
        if self.loop.method == "hook":
            small = small.view(len(batches), self.world_size, -1).mean(0)
            size *= len(batches)
        total = size * len(small)
        mean_square, square = float(small.square().sum(1).mean()), float(small.mean(0).square().sum())
        if len(small) < 2:
            return torch.full((2,), math.nan, dtype=torch.float64)
        trace = (mean_square - square) / (1 / size - 1 / total)
        return torch.tensor([trace, square - trace / total], dtype=torch.float64)


def _angle(a: Tensor, b: Tensor) -> float:
    """Return the sine of the angle between two pairs: a common factor cancels in the noise scale."""
    return float((a[0] * b[1] - a[1] * b[0]).abs() / (a.norm() * b.norm()))


def is_silent_wrong(outcome: Outcome) -> bool:
    """Say whether a wrong number was given without a word."""
    return outcome.num_wrong > 0 and not outcome.reported


def is_false_alarm(outcome: Outcome) -> bool:
    """Say whether a correct loop was warned, refused, or not measured at all."""
    return bool(outcome.reported) or outcome.num_measured == 0
