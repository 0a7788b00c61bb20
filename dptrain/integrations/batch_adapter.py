"""`BatchAdapter`: adapts the global batch of any loop, with the law, the limits and the step timing of the trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal, cast

from torch import Tensor
from torch.optim import SGD, Optimizer

from dptrain.batch import BatchPlan
from dptrain.config.built import controller
from dptrain.config.exchange_check import check_without_noise
from dptrain.config.filled_in import filled_in, given
from dptrain.config.train_config import OptimizerConfig, TrainConfig
from dptrain.control import RULES, Adapter, Measurement, RuleName, StepTimeModel, StepTimes
from dptrain.control.settings import ControlConfig
from dptrain.errors import CheckpointError, ConfigError
from dptrain.exchange import Exchange
from dptrain.integrations.optimizer_rate import scale_learning_rate
from dptrain.noise import NoiseScale
from dptrain.observe import Meter, PendingSum, Reading
from dptrain.observe.hooks.null import NullHook
from dptrain.observe.measurement_interval import NeverMeasured
from dptrain.observe.reduction import on_device
from dptrain.tasks.base import Suggestion

_READS_CLOCK = ("goodput", "pollux")
_NO_END = 2**62  # samples of a run whose length was not given


@dataclass(frozen=True, kw_only=True)
class Window:
    """The micro-batches of one optimizer step.

    Attributes:
        accumulation_steps: micro-batches per replica.
        learning_rate_factor: by which the optimizer's rates are multiplied in this step.
        reason: why, in one sentence.
    """

    accumulation_steps: int
    learning_rate_factor: float
    reason: str


class BatchAdapter:
    """Moves the number of accumulation steps of a loop with the measured noise scale; the micro-batch stays.

    ```python
    meter = dptrain.attach(model)
    adapter = dptrain.BatchAdapter(meter, optimizer, micro_batch_size=8)
    for step in range(num_steps):
        for micro_step in range(adapter.accumulation_steps):
            ...                            # forward, (loss / adapter.accumulation_steps).backward()
        reading = adapter.step()           # in place of meter.step()
        optimizer.step()
    ```

    All replicas hold equal readings and equal step times, so all come to the same batch without a message. A decision
    rests on all steps but the one under way, so nobody waits for it, and it holds from the next step on. Times of
    steps are those between two calls of `step`; a law that reads them makes two runs differ.

    Args:
        meter: from `dptrain.attach`; None with an exchange under which there is no noise scale.
        optimizer: whose learning rate follows the batch, as a factor on the rates that its groups hold.
        micro_batch_size: samples in one forward–backward on one replica.
        accumulation_steps: of the first step. Its global batch is the one that the learning rate was tuned at.
        control: law and limits; by default those of `dptrain train`.
        rule: how the learning rate follows the batch; by default that of `dptrain train` for this optimizer.
        max_samples: length of the run; by default unknown, and then the largest batch is 64 times the first.
        exchange: what replicas send one another; it has wrapped the model, and `step` and the optimizer call it. Its
            state is its own.

    Raises:
        ConfigError: where a setting is out of range, no batch within the limits can run, or the law needs a noise
            scale that the exchange has not.
    """

    def __init__(
        self,
        meter: Meter | None,
        optimizer: Optimizer | None,
        *,
        micro_batch_size: int,
        accumulation_steps: int = 1,
        control: ControlConfig | None = None,
        rule: RuleName | None = None,
        max_samples: int | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        self._exchange = exchange
        self.meter = meter = _meter(meter, optimizer, exchange=exchange)
        self._world_size = meter.num_replicas
        self._plan = BatchPlan(
            micro_batch_size=micro_batch_size, accumulation_steps=accumulation_steps, world_size=self._world_size
        )
        if rule is not None and rule not in RULES:
            raise ConfigError(f"the learning rate rule must be one of {', '.join(RULES)}, got {rule!r}")
        if exchange is not None and exchange.no_noise_scale is not None:
            kind = f"exchange.kind={exchange.name}"
            check_without_noise(control or ControlConfig(), rule, kind=kind, reason=exchange.no_noise_scale)
        self._settings = partial(_config, optimizer=optimizer, control=control, rule=rule, max_samples=max_samples)
        self._begin_from(self._plan)
        self._clock = _StepClock(meter) if self._config.control.law in _READS_CLOCK else None
        self._samples_seen = 0
        self._num_changes = 0
        self._known: NoiseScale | None = None
        self._rate_in_force = 1.0
        self.window = Window(accumulation_steps=accumulation_steps, learning_rate_factor=1.0, reason="first step")
        if optimizer is not None:
            meter.on_remove(scale_learning_rate(optimizer, lambda: self._rate_in_force))
        if exchange is not None and optimizer is not None:
            meter.on_remove(optimizer.register_step_post_hook(lambda *_: exchange.updated()).remove)

    def _begin_from(self, first: BatchPlan) -> None:
        """Decide by the settings of a run that began with this plan, on the replicas and micro-batches that there are.

        The limits by default and the batch that the learning rate was tuned at are those of the plan, wherever the run
        goes on.
        """
        self._first = first
        self._config = replace(
            self._settings(first), micro_batch_size=self._plan.micro_batch_size, layout_replicas=self._world_size
        )
        self._adapter = Adapter(
            controller(self._config, world_size=self._world_size, quantum=self._quantum),
            rule=RULES[given(self._config.optimizer.rule)],
            reference_batch_size=first.global_batch_size,
        )

    @property
    def reference_batch_size(self) -> int:
        """Global batch that the optimizer's learning rate was tuned at: that of the run's first step, in samples."""
        return self._first.global_batch_size

    @property
    def _quantum(self) -> int:
        return self._plan.micro_batch_size * self._world_size

    @property
    def samples_per_micro_step(self) -> int:
        """Samples in one micro-batch of all replicas together."""
        return self._quantum

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per replica in the step that begins now."""
        return self.window.accumulation_steps

    @property
    def global_batch_size(self) -> int:
        """Samples in the step that begins now, all replicas together."""
        return self._quantum * self.window.accumulation_steps

    @property
    def learning_rate_factor(self) -> float:
        """Factor on the learning rate in the step that begins now."""
        return self.window.learning_rate_factor

    def step(self, *, grad_norm: Tensor | None = None) -> Reading:
        """Close a step and decide on the next: after the last backward, before clipping and `optimizer.step()`.

        A collective, as `meter.step` is; no wait.

        Args:
            grad_norm: norm of the combined gradient before clipping where the loop has it already.
        """
        if self._exchange is not None:
            self._exchange.combine()
        self.note(self.meter.read())
        reading = self.meter.step(grad_norm=grad_norm)
        self.decide()
        return reading

    def note(self, known: NoiseScale) -> None:
        """Take what is known before the step under way is closed; for loops that close it themselves.

        The rate of the step under way is that of its own batch, whether the next is decided on before
        `optimizer.step()` or after it.
        """
        self._known = known
        self._rate_in_force = self.window.learning_rate_factor

    def decide(self, *, micro_steps: int | None = None, has_stepped: bool = False) -> Window:
        """Count the step that was closed, and decide on the next one.

        Args:
            micro_steps: micro-batches that it had on each replica, where they were fewer than planned.
            has_stepped: whether `optimizer.step()` was called already: then the rate of the next step is in force now.
                Lightning runs the backward pass inside of it, so a later moment would be too late.
        """
        assert self._known is not None, "decide was called before note"
        present, taken = self.global_batch_size, micro_steps or self.window.accumulation_steps
        times = None if self._clock is None else self._clock.closed(self._plan.micro_batch_size, taken)
        if self._samples_seen:  # before the first step is over nothing is known
            measurement = Measurement(
                samples_seen=self._samples_seen,
                global_batch_size=present,
                noise_scale=self._known,
                step_time=times,
            )
            adapted = self._adapter.decide(measurement)
            self._num_changes += adapted.global_batch_size != present
            self.window = Window(
                accumulation_steps=adapted.global_batch_size // self._quantum,
                learning_rate_factor=adapted.learning_rate_factor,
                reason=adapted.reason,
            )
        self._samples_seen += self._quantum * taken
        if has_stepped:
            self._rate_in_force = self.window.learning_rate_factor
        return self.window

    def as_metrics(self) -> dict[str, float]:
        """Return flat floats for any logger."""
        return {
            "batch/global": float(self.global_batch_size),
            "batch/accumulation_steps": float(self.window.accumulation_steps),
            "batch/num_changes": float(self._num_changes),
            "batch/lr_factor": self.window.learning_rate_factor,
            "progress/samples": float(self._samples_seen),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return plain values that `load_state_dict` goes on from; the meter's are its own."""
        return {
            "window": asdict(self.window),
            "controller": self._adapter.state(),
            "samples_seen": self._samples_seen,
            "num_changes": self._num_changes,
            "quantum": self._quantum,
            "first_step": asdict(self._first),
            "step_times": None if self._clock is None else self._clock.state(),
        }

    def load_state_dict(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`; on other replicas the batch is kept, the accumulation steps follow.

        The batch that the learning rate was tuned at stays that of the run's first step. A record of an earlier version
        does not have it: then it is that of the first step as this adapter was built.

        Raises:
            CheckpointError: where the record is not one, or its batch cannot be laid out on these replicas.
            ConfigError: where no batch within the limits can run on these replicas.
        """
        try:
            window, batch = Window(**record["window"]), record["quantum"] * record["window"]["accumulation_steps"]
            first = BatchPlan(**record["first_step"]) if "first_step" in record else self._first
        except (KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(f"not the state of a BatchAdapter: {error!r} is missing or wrong") from error
        if batch % self._quantum:
            raise CheckpointError(
                f"the saved batch of {batch} is no multiple of micro-batch × world size = {self._quantum}: resume "
                "on a number of replicas that divides it"
            )
        self._begin_from(first)
        try:
            self._adapter.restore(record["controller"])
            self._samples_seen, self._num_changes = int(record["samples_seen"]), int(record["num_changes"])
            if self._clock is not None and record["step_times"] is not None:
                self._clock.restore(record["step_times"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"not the state of a BatchAdapter: {error!r} is missing or wrong") from error
        self.window = replace(window, accumulation_steps=batch // self._quantum)
        self._rate_in_force = self.window.learning_rate_factor


def _check_arguments(meter: object, optimizer: object) -> None:
    """Raise for what is no meter or no optimizer: the batch would follow nothing, or nothing would follow the batch.

    Raises:
        ConfigError: with the remedy.
    """
    if not isinstance(getattr(meter, "num_replicas", None), int) or not callable(getattr(meter, "on_remove", None)):
        raise ConfigError(
            f"the first argument must be a meter, got a {type(meter).__name__}: give what dptrain.attach(model) returns"
        )
    if optimizer is not None and not hasattr(optimizer, "register_step_pre_hook"):
        raise ConfigError(
            f"the optimizer must be a torch.optim.Optimizer, whose learning rate follows the batch, got a "
            f"{type(optimizer).__name__}: give torch's own, or None and multiply your learning rate by "
            "adapter.learning_rate_factor"
        )


def _meter(meter: Meter | None, optimizer: Optimizer | None, *, exchange: Exchange | None) -> Meter:
    """Return the meter, or one that never measures where the exchange has no noise scale."""
    if exchange is None or exchange.no_noise_scale is None:
        _check_arguments(meter, optimizer)
        return cast("Meter", meter)
    if meter is not None or optimizer is None:
        raise ConfigError(
            f"with exchange.kind={exchange.name} a BatchAdapter takes None for the meter, and an optimizer: "
            f"{exchange.no_noise_scale}"
        )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    hook = NullHook(parameters[0].device)
    return Meter(parameters, hook=hook, group=exchange.group, interval_rule=NeverMeasured())


class _StepClock:
    """Times the steps of a loop by the calls that close them, as the mean over all replicas.

    Args:
        meter: whose group and device the reduction uses.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._began_s: float | None = None
        self._pending: tuple[BatchPlan, PendingSum] | None = None
        self._times = StepTimes()

    def closed(self, micro_batch_size: int, accumulation_steps: int) -> StepTimeModel | None:
        """Note that a step was closed; return the model of all steps whose times have arrived."""
        now_s, began_s = time.perf_counter(), self._began_s
        self._began_s = now_s
        if self._pending is not None:
            shape, pending = self._pending
            seconds, replicas = pending.read()
            self._times = self._times.timed(shape, seconds / replicas)
        if began_s is not None:
            shape = BatchPlan(
                micro_batch_size=micro_batch_size,
                accumulation_steps=accumulation_steps,
                world_size=self._meter.num_replicas,
            )
            vector = on_device([now_s - began_s, 1.0], device=self._meter.join_device)
            self._pending = (shape, PendingSum(vector, group=self._meter.join_process_group))
        return self._times.model()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return asdict(self._times)

    def restore(self, record: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._times = StepTimes.from_json(record)


def _config(
    plan: BatchPlan,
    optimizer: Optimizer | None,
    *,
    control: ControlConfig | None,
    rule: RuleName | None,
    max_samples: int | None,
) -> TrainConfig:
    """Return the settings that `dptrain train` would have for a loop that begins so, filled in by the same rules."""
    kind: Literal["sgd", "adamw"] = "sgd" if isinstance(optimizer, SGD) else "adamw"
    config = TrainConfig(
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_samples=max_samples or _NO_END,
        control=control or ControlConfig(),
        # The loop's own scheduler has the warm-up, of which nothing is known here.
        optimizer=OptimizerConfig(name=kind, rule=rule, warmup_samples=0, schedule="constant"),
    )
    suggestion = Suggestion(
        learning_rate=1.0,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.micro_batch_size,
        max_samples=max_samples or _NO_END,
        eval_every_samples=_NO_END,
    )
    return filled_in(config, suggestion, world_size=plan.world_size)
